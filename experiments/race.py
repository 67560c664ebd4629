"""A race with nanoGPT: time to the val loss of its run for CPUs (tiny Shakespeare by character).

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python ../nanoGPT/data/shakespeare_char/prepare.py
    python experiments/race.py --nanogpt=../nanoGPT      ten minutes on 2 CPU cores

Runs in turn the command in nanoGPT's README and a model of the same size here, with KV shift and
fewer steps. Times are those of the whole commands, with evaluations on as many tokens. The losses
in the table are on the whole val split, and are not timed.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import load_checkpoint, load_model
from config import UserError, parse, run
from data import FOLDER, Corpus
from eval import evaluate, evaluation_sets
from experiments.bench import load_nanogpt, run_script
from plot import table
from train import prepare_corpus

import torch

ROOT = Path(__file__).parents[1]
NANOGPT = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
           "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
           "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0")
OURS = (f"{ROOT}/config/shakespeare_char_cpu.py --device=cpu --optimizer=muon --max_steps=270 "
        "--learning_rate=1e-2 --min_lr=0 --warmup_steps=20 --eval_every=270 --eval_tokens=15360")


@dataclass
class RaceConfig:
    nanogpt: str = "../nanoGPT"  # folder of a clone of github.com/karpathy/nanoGPT
    seeds: int = 3  # rounds, with the seeds 1, 2, ... here; nanoGPT's is fixed


def main():
    config = parse(RaceConfig)
    nanogpt = Path(config.nanogpt).resolve()
    if not (nanogpt / "data/shakespeare_char/val.bin").exists():
        raise UserError(f"--nanogpt={config.nanogpt} must be a clone of nanoGPT with its "
                        "data/shakespeare_char prepared")
    prepare_corpus("shakespeare_char")
    eval_sets = evaluation_sets(Corpus(FOLDER / "shakespeare_char"), 64, 0, 0, induction=False)
    rows = []
    with tempfile.TemporaryDirectory() as out_dir:
        for seed in range(1, config.seeds + 1):
            theirs = run_script(nanogpt / "train.py", *NANOGPT.split(),
                                f"--out_dir={out_dir}/theirs", cwd=nanogpt)
            ours = run_script(ROOT / "train.py", *OURS.split(), f"--seed={seed}", "--resume=no",
                              f"--out_dir={out_dir}/ours")
            their_loss = nanogpt_loss(nanogpt, Path(out_dir, "theirs/ckpt.pt"), eval_sets)
            our_model = load_model(load_checkpoint(Path(out_dir, "ours/ckpt.pt")), "cpu")
            our_loss = evaluate(our_model, eval_sets, 64)["val_loss"]
            rows.append([str(seed), f"{theirs:.1f}", f"{their_loss:.4f}", f"{ours:.1f}",
                         f"{our_loss:.4f}", f"{ours / theirs:.3f}"])
            print(f"round {seed} of {config.seeds}: {ours / theirs:.3f} of its time", flush=True)
    print("\n" + table(["seed", "nanoGPT, seconds", "val loss", "KV shift, seconds", "val loss",
                        "ratio of the times"], rows))
    print(f"median ratio: {median(float(row[-1]) for row in rows):.3f}")


def nanogpt_loss(folder, path: Path, eval_sets: dict) -> float:
    """The loss of a checkpoint of nanoGPT. Its ids are ours: the sorted characters of the text."""
    nanogpt, checkpoint = load_nanogpt(folder), torch.load(path, weights_only=True)
    model = nanogpt.GPT(nanogpt.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    inputs, targets = eval_sets["val_loss"]
    with torch.no_grad():
        losses = [model(x, y.contiguous())[1].item() * len(x)
                  for x, y in zip(inputs.split(64), targets.split(64), strict=True)]
    return sum(losses) / len(inputs)


if __name__ == "__main__":
    run(main)
