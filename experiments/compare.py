"""Compares vanilla attention, KV shift and its variants over several seeds.

    python experiments/compare.py                       # all arms: hours of CPU time
    python experiments/compare.py --experiment=shakespeare --arms="vanilla, KV shift" --seeds="1 2"

Each run is a call of train.py. A finished run adds one line to the results and is not trained
again: rerun the same command to resume. Table and figure are made from the results alone.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse, run
from plot import COLORS, mean_and_error, save_figure, table
from train import prepare_corpus

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "eval_induction": True, "compile": True}
EXPERIMENTS = {  # options of train.py
    "python": MODEL | {  # bytes, with a context that is long enough for induction to pay
        "dataset": "pystdlib", "block_size": 256, "batch_size": 8, "max_steps": 1500,
        "learning_rate": 3e-3, "min_lr": 3e-4, "warmup_steps": 50, "eval_every": 150,
        "eval_tokens": 131_072, "log_every": 25},
    "shakespeare": MODEL | {  # characters
        "dataset": "shakespeare_char", "block_size": 64, "batch_size": 12, "eval_tokens": 0}}
ARMS = {  # the first one is the reference
    "vanilla": {"kv_shift": "none"}, "KV shift": {"kv_shift": "kv"},
    "keys only": {"kv_shift": "k"}, "values only": {"kv_shift": "v"},
    "queries too": {"kv_shift": "qkv"},
    "window 3": {"shift_window": 3}, "window 4": {"shift_window": 4},
    "gate": {"shift_weights": "gate"}, "clamp": {"shift_weights": "clamp"},
    "per channel": {"shift_per": "channel"}, "identity": {"shift_init": "identity"}}


@dataclass
class CompareConfig:
    experiment: Literal["python", "shakespeare"] = "python"  # corpus and size of the model
    arms: str = ", ".join(ARMS)  # kinds of model to train
    seeds: str = "1 2 3"  # seeds of each kind
    workers: int = 2  # runs at the same time, one CPU core each
    out_dir: str = "out/compare"  # folder of the runs and of the figure
    results: str = str(ROOT / "experiments" / "results")  # folder of <experiment>.jsonl
    plot_only: bool = False  # train nothing: table and figure from the results


def main():
    config = parse(CompareConfig)
    path = Path(config.results) / f"{config.experiment}.jsonl"
    figure = Path(config.out_dir) / f"{config.experiment}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.parent.mkdir(parents=True, exist_ok=True)
    if not config.plot_only:
        train_missing(config, path)
    if not (arms := read_results(path)):
        raise UserError(f"no results in {path}")
    draw(arms, figure)
    print(f"{make_table(arms)}\n\nfigure: {figure}")


def train_missing(config: CompareConfig, path: Path):
    arms, done = config.arms.split(", "), read_results(path)
    if not set(arms) <= set(ARMS):
        raise UserError(f"arms={config.arms} must be some of: {', '.join(ARMS)}")
    missing = [(arm, seed) for seed in map(int, config.seeds.split()) for arm in arms
               if seed not in done.get(arm, {})]
    prepare_corpus(EXPERIMENTS[config.experiment]["dataset"])  # before several runs want to
    started = time.monotonic()
    with ThreadPoolExecutor(config.workers) as pool:
        futures = [pool.submit(train_one, config, *arm_and_seed) for arm_and_seed in missing]
        for i, future in enumerate(as_completed(futures), start=1):
            record = future.result()
            with open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
            left = timedelta(seconds=round((time.monotonic() - started) / i * (len(missing) - i)))
            print(f"[{i}/{len(missing)}] {record['arm']}, seed {record['seed']}: val loss "
                  f"{record['val_loss']:.4f} | about {left} left", flush=True)


def train_one(config: CompareConfig, arm: str, seed: int) -> dict:
    """Trains one model with train.py; returns what its log says."""
    out_dir = Path(config.out_dir) / f"{config.experiment}-{arm}-{seed}".replace(" ", "-")
    options = EXPERIMENTS[config.experiment] | ARMS[arm] | {"seed": seed, "out_dir": out_dir}
    command = [sys.executable, ROOT / "train.py", *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"{out_dir}: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    header = [line for line in lines if "config" in line][-1]
    curve = [[line["step"], line["val_loss"], line["val_random"] - line["val_induction"]]
             for line in lines if "val_loss" in line]
    return {"experiment": config.experiment, "arm": arm, "seed": seed, "val_loss": curve[-1][1],
            "saved": curve[-1][2], "seconds": lines[-1]["seconds"], "curve": curve,
            "parameters": header["parameters"], "learning_rate": header["config"]["learning_rate"],
            "versions": header["versions"]}


def read_results(path: Path) -> dict[str, dict[int, dict]]:
    """arm -> seed -> record, in the order of ARMS."""
    records = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    arms = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    return {arm: seeds for arm, seeds in arms.items() if seeds}


def differences(arms: dict, arm: str) -> list[float]:
    """How much higher the val losses are than those of the first arm, seed by seed."""
    first = next(iter(arms.values()))
    return [r["val_loss"] - first[s]["val_loss"] for s, r in arms[arm].items() if s in first]


def make_table(arms: dict) -> str:
    rows = [[arm, str(len(seeds)), mean_and_error([r["val_loss"] for r in seeds.values()]),
             mean_and_error(differences(arms, arm), sign="+"),
             mean_and_error([r["saved"] for r in seeds.values()])] for arm, seeds in arms.items()]
    return table(["", "seeds", "val loss", "difference to the first", "saved on a repeat"], rows)


def draw(arms: dict, path: Path):
    """Left: differences to the first arm. Right: val loss of the kinds of model in COLORS."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    dots, curves = figure.subplots(1, 2)
    for arm in sorted(arms, key=lambda arm: -np.mean(differences(arms, arm))):
        color, d = COLORS.get(ARMS[arm].get("kv_shift")), differences(arms, arm)
        dots.plot(d, [arm] * len(d), "o", color=color or "gray")
        if color:
            steps, losses, _ = np.transpose([r["curve"][1:] for r in arms[arm].values()])
            curves.plot(steps[:, 0], losses.mean(1), color=color, label=arm)
            curves.fill_between(steps[:, 0], losses.min(1), losses.max(1), color=color, alpha=0.2)
    dots.set(xlabel=f"val loss minus that of {next(iter(arms))}", title="dot: a seed")
    curves.set(xlabel="steps", ylabel="val loss", title="line: mean of the seeds, band: range")
    curves.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
