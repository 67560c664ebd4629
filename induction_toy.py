"""Toy experiments of the paper: one layer with KV shift against vanilla transformers.

    python induction_toy.py                       depth and ngram
    python induction_toy.py --experiment=width    or several: --experiment=depth,width,ngram
    python induction_toy.py config/toy_paper.py   depth at the paper's size, for one GPU

depth (Figure 1a): induction with models of 1, 2 and 4 layers. width (Figure 1b): induction with
narrow models. ngram (Figure 3): memorizing a table of 3-grams.

Each experiment prints a table and writes out/toy/<experiment>.png and .jsonl (every evaluation).
"""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from checkpoint import choose_device
from config import parse, run
from data import atomic_write
from model import GPT, GPTConfig
from plot import COLORS, new_figure, save_figure, table

import numpy as np
import torch

DEFAULTS = {  # of the options that are None
    "depth": dict(max_steps=400, learning_rate=2e-3, warmup_steps=20, eval_every=20),
    "width": dict(max_steps=1000, learning_rate=3e-3, warmup_steps=20, eval_every=20),
    "ngram": dict(max_steps=600, learning_rate=4e-3, warmup_steps=200, eval_every=5),
}


@dataclass
class SharedConfig:  # options that experiments/hop.py has, too
    out_dir: str = "out/toy"  # folder of the results
    seeds: int = 3  # train every model with the seeds 1, 2, ..., seeds
    workers: int | None = None  # models trained at a time; None: one per CPU core, or 1 on a GPU
    device: str = "auto"  # cpu, cuda, mps; auto: the fastest one
    batch_size: int = 32  # sequences per step; ngram uses the whole table
    micro_batch_size: int | None = None  # sequences per forward pass; None: all
    eval_sequences: int = 256  # sequences of the evaluation batch, the same for all models
    width: int = 64  # n_embd of the models of depth and hop
    n_head: int = 4  # heads per layer

    def __post_init__(self):
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be positive")
        GPTConfig(n_embd=self.width, n_head=self.n_head)  # ValueError if it is impossible


@dataclass
class ToyConfig(SharedConfig):
    experiment: str = "depth,ngram"  # names, separated by commas: depth, width, ngram
    # training; None: the value in DEFAULTS
    max_steps: int | None = None  # optimizer steps; a model that stays at 100% stops early
    learning_rate: float | None = None  # constant after warm-up
    warmup_steps: int | None = None  # steps of linear warm-up
    eval_every: int | None = None  # steps between evaluations
    # data of depth and width
    vocab_size: int = 32  # tokens to draw from
    length: int = 32  # tokens in a sequence
    min_prefix: int = 8  # fewest distinct tokens before the first repeated one
    max_prefix: int = 16  # most distinct tokens before the first repeated one

    def __post_init__(self):
        super().__post_init__()
        for name in self.experiment.split(","):
            if name not in DEFAULTS:
                raise ValueError(f"experiment={name} must be one of {', '.join(DEFAULTS)}")
        if not 3 <= self.min_prefix <= self.max_prefix <= min(self.vocab_size, self.length - 1):
            raise ValueError("must hold: 3 <= min_prefix <= max_prefix <= vocab_size, and "
                             "max_prefix < length")


def main():
    config = parse(ToyConfig)
    for experiment in config.experiment.split(","):
        c = with_defaults(config, experiment)
        make_batch = partial(ngram_batch if experiment == "ngram" else induction_batch, c)
        models = make_models(c)
        report(c, models, train_all(c, experiment, models, make_batch))


def with_defaults(config: ToyConfig, experiment: str) -> ToyConfig:
    values = {name: value for name, value in DEFAULTS[experiment].items()
              if getattr(config, name) is None}
    return replace(config, experiment=experiment, **values)


# --- data: a batch depends on (seed, step) only and is three tensors (B, T):
#     idx      the tokens that the model reads
#     targets  the token to predict after each of them; -1: none
#     mask     True where the target can be known from the tokens before: evaluated positions

EVAL_SEED = 2**31  # of the evaluation batch; no model is trained with it


def induction_batch(config: ToyConfig, seed: int, step: int, size: int):
    """Random tokens such that whenever a token repeats, the token after it repeats too.

    n distinct tokens are drawn. Then the sequence jumps back to a random one of them, except the
    last, and continues from there; at the end of the n tokens, it jumps to the same one again. With
    n = 5 and a jump to position 2:

        position   0 1 2 3 4 5 6 7 8 9
        token      a b c d e c d e c d
        target     b c d e c d e c d e
        mask                 x x x x x    from n on, the token has been seen before

    As in language modeling, and in the paper, the model is trained on all targets, also on those
    that nobody can know. Accuracy is measured where the mask is True.
    """
    rng = np.random.default_rng([seed, step])
    n = rng.integers(config.min_prefix, config.max_prefix + 1, (size, 1))
    jump = rng.integers(0, n - 1)  # 0, ..., n - 2
    prefix = rng.permuted(np.tile(np.arange(config.vocab_size), (size, 1)), axis=1)
    t = np.arange(config.length + 1)[None]
    source = np.where(t < n, t, jump + (t - n) % (n - jump))  # (B, T + 1), position in the prefix
    tokens = torch.from_numpy(np.take_along_axis(prefix, source, axis=1))
    return tokens[:, :-1], tokens[:, 1:], torch.from_numpy(t[:, :-1] >= n)


def induction_chance(config: ToyConfig) -> float:
    """Accuracy of guessing at the first known position: one of n tokens has just been repeated, and
    only the order of the n - 1 others tells which of them comes next. The mean of 1 / (n - 1)."""
    return (1 / np.arange(config.min_prefix - 1, config.max_prefix)).mean()


def ngram_batch(config: ToyConfig, seed: int, step: int, size: int):
    """200 pairs (x1, x2) of 20 tokens, each with a random x3 to predict: always the whole table."""
    rng = np.random.default_rng(0)
    pairs = rng.choice(20 * 20, 200, replace=False)
    idx = torch.from_numpy(np.stack(np.divmod(pairs, 20), axis=1))
    targets = torch.full_like(idx, -1)
    targets[:, 1] = torch.from_numpy(rng.integers(0, 20, 200))
    return idx, targets, targets >= 0


# --- models


def make_models(c: ToyConfig) -> dict[str, GPTConfig]:
    """The models that an experiment compares, by name."""
    sizes = (2, 20) if c.experiment == "ngram" else (c.length, c.vocab_size)
    new = partial(GPTConfig, *sizes, tie_embeddings=False)
    if c.experiment == "depth":
        models = [new(n_layer, c.n_head, n_embd=c.width, kv_shift=kv_shift)
                  for kv_shift, n_layer in (("kv", 1), ("none", 1), ("none", 2), ("none", 4))]
    elif c.experiment == "width":  # with the same MLP at every width, or it is what fails first
        models = [new(n_layer, 1, n_embd=width, ffn_size=256, kv_shift=kv_shift)
                  for width in (8, 16, 32) for kv_shift, n_layer in (("kv", 1), ("none", 2))]
    else:
        models = [new(n_layer, n_head, n_embd=width, kv_shift=kv_shift) for n_layer, n_head, width
                  in ((1, 1, 8), (2, 4, 64), (4, 4, 128)) for kv_shift in ("kv", "none")]
    return {model_name(model, with_width=c.experiment != "depth"): model for model in models}


def model_name(c: GPTConfig, with_width=False) -> str:
    layers = "1 layer" if c.n_layer == 1 else f"{c.n_layer} layers"
    width = f"width {c.n_embd}, " if with_width else ""
    return f"{layers}, {width}{'KV shift' if c.kv_shift == 'kv' else 'vanilla'}"


@torch.no_grad()
def exact_induction_head(config: ToyConfig) -> GPT:
    """Theorem 2: one KV-shift layer, set by hand, that is an exact induction head.

    Embeddings are random signs: nearly orthogonal, and RMSNorm does not change them. The key of a
    position is the token before it, alpha = (0, 1); its value is its own token, beta = (1, 0).
    Scores are so large that softmax is 0 unless the key equals the query. The output is scaled up
    to outweigh the current token, which the residual connection adds.
    """
    model = GPT(GPTConfig(config.length, config.vocab_size, n_layer=1, n_head=1, ffn_size=1,
                          n_embd=config.width, shift_init="induction",
                          rope_base=1e30))  # rotates few channels only
    attn = model.blocks[0].attn
    model.embed.weight.bernoulli_(generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    for linear, scale in ((attn.q, 100), (attn.k, 1), (attn.v, 1), (attn.out, 10)):
        linear.weight.copy_(scale * torch.eye(config.width))
    model.blocks[0].mlp.down.weight.zero_()
    return model


# --- training


def accuracies(correct, idx, mask) -> dict:
    """Accuracy at the first known position of each sequence, and at all known positions."""
    first = mask & (mask.cumsum(dim=1) == 1)
    return {"accuracy": correct[first].float().mean().item(),
            "accuracy_all": correct[mask].float().mean().item()}


def train_all(config, experiment: str, models: dict[str, GPTConfig], make_batch: Callable,
              score: Callable = accuracies) -> dict[str, list[list[dict]]]:
    """Trains each model with each seed and writes the evaluations to <experiment>.jsonl.

    Each thread trains one model on one CPU core: small models hardly gain from a second core.
    `models` are in order of size, the smallest one first.
    Returns {model name: [evaluations with seed 1, with seed 2, ...]}.
    """
    on_cpu = choose_device(config.device, "auto")[0].type == "cpu"
    workers = config.workers or (torch.get_num_threads() if on_cpu else 1)
    seeds = range(1, config.seeds + 1)
    print(f"\n{experiment}: {len(models) * len(seeds)} models to train", flush=True)
    futures, stop = {}, threading.Event()

    def train_one(name, seed, model):
        evals = []
        for e in train(config, model, make_batch, seed, score):
            evals.append({"model": name, "seed": seed, **e})
            if stop.is_set():
                break
        return evals

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for name, seed in product(reversed(models), seeds):  # the slowest ones first
                torch.manual_seed(seed)  # no other thread draws from torch's random numbers
                futures[name, seed] = pool.submit(train_one, name, seed, GPT(models[name]))
            for i, future in enumerate(as_completed(futures.values()), start=1):
                e = future.result()[-1]
                print(f"[{i}/{len(futures)}] {e['model']}, seed {e['seed']}: accuracy "
                      f"{e['accuracy']:.1%} at step {e['step']}, {e['seconds']:.1f} s", flush=True)
        finally:  # after Ctrl-C or an error, the threads end at their next evaluation
            stop.set()
            pool.shutdown(cancel_futures=True)
    header = {"config": asdict(config),
              "versions": {"torch": torch.__version__, "numpy": np.__version__}}
    path = Path(config.out_dir, f"{experiment}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        for line in (header, *(e for future in futures.values() for e in future.result())):
            f.write(json.dumps(line).encode() + b"\n")
    return {name: [futures[name, seed].result() for seed in seeds] for name in models}


def train(config, model: GPT, make_batch: Callable, seed: int, score: Callable = accuracies):
    """Trains the model in place and yields its evaluations, until its accuracy stays at 100%.

    make_batch(seed, step, size) -> idx, targets, mask. score(correct, idx, mask) -> a dict with
    "accuracy".
    """
    device, dtype = choose_device(config.device, "auto")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    eval_batch = make_batch(EVAL_SEED, 0, config.eval_sequences)
    perfect, started = 0, time.perf_counter()  # perfect: evaluations in a row at 100%
    for step in range(config.max_steps + 1):
        if step % config.eval_every == 0 or step == config.max_steps:
            with autocast:
                scores = evaluate(config, model, eval_batch, score)
            yield {"step": step, "seconds": round(time.perf_counter() - started, 2), **scores}
            perfect = perfect + 1 if scores["accuracy"] > 0.998 else 0
            if step == config.max_steps or perfect == 3:
                return
        idx, targets, _ = make_batch(seed, step, config.batch_size)
        size = config.micro_batch_size or len(idx)
        for x, y in zip(idx.split(size), targets.split(size), strict=True):
            with autocast:
                loss = model(x.to(device), y.to(device), reduction="sum") / (targets >= 0).sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(config, model: GPT, batch, score: Callable = accuracies) -> dict:
    """The score of a batch (idx, targets, mask), and the number of parameters."""
    idx, targets, mask = batch
    predicted = [model(x.to(model.embed.weight.device)).argmax(dim=-1).cpu()
                 for x in idx.split(config.micro_batch_size or 64)]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            **score(torch.cat(predicted) == targets, idx, mask)}


# --- results


def report(config: ToyConfig, models: dict[str, GPTConfig], results: dict[str, list]):
    """Draws the figure of an experiment and prints its table."""
    chance = induction_chance(config)
    steps = np.arange(1 + max(evals[-1]["step"] for seeds in results.values() for evals in seeds))
    curves = {name: [  # a model that stopped early keeps its last accuracy
        np.interp(steps, [e["step"] for e in evals], [e["accuracy"] for e in evals])
        for evals in seeds] for name, seeds in results.items()}
    path = draw_panels(config, config.experiment, models, "n_embd", steps, curves,
                       guess=None if config.experiment == "ngram" else chance,
                       xlabel="training steps", ylabel="accuracy", ylim=(-0.02, 1.04))
    note = f"Guessing is right {chance:.1%} of the time."
    if config.experiment == "depth":
        batch = induction_batch(config, EVAL_SEED, 0, config.eval_sequences)
        exact = evaluate(config, exact_induction_head(config), batch)
        results |= {"1 layer, KV shift, set by hand": [[{"step": 0, "seconds": 0.0, **exact}]]}
        note += " The weights set by hand are those of Theorem 2."
    elif config.experiment == "ngram":
        failed = [name for name, seeds in results.items()
                  if min(evals[-1]["accuracy"] for evals in seeds) < 0.99]
        note = (f"Not all learn 99% of the table: {'; '.join(failed)}." if failed else
                "With and without KV shift, all models learn at least 99% of the table.")
    rows = []
    for name, seeds in results.items():
        ends = [evals[-1] for evals in seeds]
        steps = [next((str(e["step"]) for e in evals if e["accuracy"] >= 0.99),
                      f">{evals[-1]['step']}") for evals in seeds]
        rows.append([name, f"{ends[0]['parameters']:,}",
                     " ".join(f"{e['accuracy']:.3f}" for e in ends),
                     " ".join(f"{e['accuracy_all']:.3f}" for e in ends), " ".join(steps),
                     " ".join(f"{e['seconds']:.0f}" for e in ends)])
    head = ["model", "parameters", "accuracy, first known", "accuracy, all known", "steps to 99%",
            "seconds"]
    print(f"\n{table(head, rows)}\n\n{note}\nFigure: {path}", flush=True)


def draw_panels(config, experiment: str, models: dict[str, GPTConfig], panel: str, x, curves: dict,
                guess: float | None, **axes) -> Path:
    """Draws <experiment>.png, with a panel for each value of the models' option `panel`.

    curves: name -> (seeds, len(x)). guess: what guessing achieves. axes: properties of all axes.
    """
    values = sorted({getattr(model, panel) for model in models.values()})
    figure = new_figure(5 + 2 * len(values), 4.5)
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for name, model in models.items():
        ax = panels[values.index(getattr(model, panel))]
        ys = curves[name]
        color = COLORS[model.kv_shift]
        line = {1: "-", 2: "--", 4: ":"}.get(model.n_layer, "-.")
        ax.plot(x, np.median(ys, axis=0), line, color=color, linewidth=2, label=name)
        ax.fill_between(x, np.min(ys, axis=0), np.max(ys, axis=0), color=color, alpha=0.2,
                        linewidth=0)
    for ax in panels:
        if guess is not None:
            ax.axhline(guess, color="gray", linewidth=1, label=f"guessing ({guess:.1%})")
        ax.set(**axes)
        ax.grid(alpha=0.3)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False,
                  ncols=1 if len(panels) > 1 else 3)
        ax.label_outer()
    figure.suptitle(f"{experiment}, seeds: {config.seeds}. Line: median, band: lowest to highest",
                    fontsize=10)
    path = Path(config.out_dir, f"{experiment}.png")
    save_figure(figure, path)
    return path


if __name__ == "__main__":
    run(main)
