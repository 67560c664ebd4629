"""Compares vanilla attention, KV shift and its variants over several seeds.

    python experiments/compare.py                       # all of it: hours of CPU time
    python experiments/compare.py --experiment=python --arms="vanilla, KV shift" --seeds="1 2 3"

Each run is a call of train.py in out/compare. A finished run adds one line to
experiments/results/<experiment>.jsonl and is not trained again: rerun the same command to resume.
Table and figure are made from that file alone: --plot_only=True trains nothing.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse, run
from plot import COLORS, save_figure, table

import numpy as np

ROOT = Path(__file__).parents[1]
EXPERIMENTS = {  # options of train.py
    "python": {  # bytes, with a context that is long enough for induction to pay
        "dataset": "pystdlib", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256,
        "batch_size": 8, "max_steps": 1500, "learning_rate": 3e-3, "min_lr": 3e-4,
        "warmup_steps": 50, "eval_every": 150, "eval_tokens": 131_072, "log_every": 25},
    "shakespeare": {  # characters, context 64
        "dataset": "shakespeare_char", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64,
        "batch_size": 12, "max_steps": 2000, "learning_rate": 1e-3, "min_lr": 1e-4,
        "warmup_steps": 100, "eval_every": 250, "eval_tokens": 0, "log_every": 50},
}
ARMS = {  # the first one is the reference
    "vanilla": {"kv_shift": "none"},
    "KV shift": {"kv_shift": "kv"},
    "keys only": {"kv_shift": "k"},
    "values only": {"kv_shift": "v"},
    "queries, too": {"kv_shift": "qkv"},
    "window 3": {"shift_window": 3},
    "window 4": {"shift_window": 4},
    "gate": {"shift_weights": "gate"},
    "clamp": {"shift_weights": "clamp"},
    "per channel": {"shift_per": "channel"},
    "identity": {"shift_init": "identity"},
}


@dataclass
class CompareConfig:
    experiment: str = "python, shakespeare"  # experiments to run
    arms: str = ", ".join(ARMS)  # kinds of model to train
    seeds: str = "1 2 3"  # seeds of each kind
    workers: int = 2  # runs at the same time, one CPU core each
    out_dir: str = "out/compare"  # folder of the runs and of the figures
    results: str = str(ROOT / "experiments" / "results")  # folder of the .jsonl files
    plot_only: bool = False  # train nothing: table and figure from the results

    def __post_init__(self):
        self.experiments = names(self.experiment, EXPERIMENTS)
        self.arm_names = names(self.arms, ARMS)
        self.seed_numbers = [int(seed) for seed in self.seeds.split()]


def names(text: str, known) -> list[str]:
    chosen = [name.strip() for name in text.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown name {unknown[0]!r}; known: {', '.join(known)}")
    return chosen


def main():
    config = parse(CompareConfig)
    Path(config.results).mkdir(parents=True, exist_ok=True)
    wanted = [(experiment, arm, seed) for experiment in config.experiments
              for seed in config.seed_numbers for arm in config.arm_names]
    if not config.plot_only:
        train_missing(config, wanted)
    for experiment in config.experiments:
        records = read_results(config, experiment)
        if not records:
            raise UserError(f"no results of {experiment} in {config.results}")
        figure = Path(config.out_dir) / f"{experiment}.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(records, figure)
        print(f"\n{experiment}\n\n{make_table(records)}\n\nfigure: {figure}")


def train_missing(config: CompareConfig, wanted: list[tuple]):
    done = {(experiment, r["arm"], r["seed"]) for experiment in config.experiments
            for r in read_results(config, experiment)}
    missing = [key for key in wanted if key not in done]
    started = time.monotonic()
    with ThreadPoolExecutor(config.workers) as pool:
        for i, future in enumerate(as_completed([pool.submit(train_one, config, *key)
                                                 for key in missing]), start=1):
            record = future.result()
            path = Path(config.results) / f"{record['experiment']}.jsonl"
            with open(path, "a") as f:
                f.write(json.dumps(record) + "\n")
            left = (time.monotonic() - started) / i * (len(missing) - i)
            print(f"[{i}/{len(missing)}] {record['experiment']}, {record['arm']}, seed "
                  f"{record['seed']}: val loss {record['val_loss']:.4f} | about "
                  f"{timedelta(seconds=round(left))} left", flush=True)


def train_one(config: CompareConfig, experiment: str, arm: str, seed: int) -> dict:
    """Trains one model with train.py; returns what its log says."""
    name = f"{experiment}-{arm}-{seed}".replace(", ", "-").replace(" ", "-")
    out_dir = Path(config.out_dir) / name
    options = EXPERIMENTS[experiment] | ARMS[arm] | {
        "seed": seed, "eval_induction": True, "compile": True, "checkpoint_every": 500,
        "out_dir": out_dir}
    command = [sys.executable, ROOT / "train.py", *(f"--{k}={v}" for k, v in options.items())]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    header = [line for line in lines if "config" in line][-1]
    curve = [[line["step"], line["val_loss"], line["val_random"] - line["val_induction"]]
             for line in lines if "val_loss" in line]
    return {"experiment": experiment, "arm": arm, "seed": seed, "val_loss": curve[-1][1],
            "saved": curve[-1][2], "seconds": lines[-1]["seconds"], "curve": curve,
            "parameters": header["parameters"], "learning_rate": header["config"]["learning_rate"],
            "versions": header["versions"]}


def read_results(config: CompareConfig, experiment: str) -> list[dict]:
    path = Path(config.results) / f"{experiment}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_arm(records: list[dict]) -> dict[str, dict[int, dict]]:
    """arm -> seed -> record, in the order of ARMS."""
    arms = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in ARMS}
    return {arm: seeds for arm, seeds in arms.items() if seeds}


def paired(seeds: dict, reference: dict) -> tuple[float, float, int]:
    """Mean, standard error and number of the differences in val loss, seed by seed."""
    d = [seeds[s]["val_loss"] - reference[s]["val_loss"] for s in seeds if s in reference]
    return np.mean(d), np.std(d, ddof=1) / len(d) ** 0.5 if len(d) > 1 else np.nan, len(d)


def make_table(records: list[dict]) -> str:
    arms = by_arm(records)
    reference = arms[next(iter(ARMS))]
    rows = []
    for arm, seeds in arms.items():
        mean, error, n = paired(seeds, reference)
        first = [next((step for step, _, saved in r["curve"] if saved >= 0.1), None)
                 for r in seeds.values()]
        parameters = {r["parameters"] for r in seeds.values()}.pop()
        rows.append([
            arm, f"{len(seeds)}", f"{next(iter(seeds.values()))['learning_rate']:g}",
            f"{np.mean([r['val_loss'] for r in seeds.values()]):.4f}",
            f"{mean:+.4f} ± {error:.4f}" if seeds is not reference and n > 1 else "",
            ", ".join(f"{r['saved']:.2f}" for r in seeds.values()),
            ", ".join(str(step or "-") for step in first),
            f"{parameters - next(iter(reference.values()))['parameters']:,}"])
    return table(["", "seeds", "learning rate", "val loss", "against vanilla",
                  "nats saved on the repeat", "steps until it saves 0.1", "parameters added"], rows)


def draw(records: list[dict], path: Path):
    """Left: difference to vanilla of each arm. Right: val loss of the four main arms."""
    from matplotlib.figure import Figure

    arms = by_arm(records)
    reference = arms[next(iter(ARMS))]
    figure = Figure(figsize=(11, 0.3 * len(arms) + 2.5), layout="constrained")
    dots, curves = figure.subplots(1, 2)
    ordered = sorted((*paired(seeds, reference), arm) for arm, seeds in arms.items()
                     if seeds is not reference)
    for y, (mean, error, _, arm) in enumerate(reversed(ordered)):
        color = COLORS[ARMS[arm]["kv_shift"]] if set(ARMS[arm]) == {"kv_shift"} and \
            ARMS[arm]["kv_shift"] in COLORS else "#555555"
        dots.errorbar(mean, y, xerr=error, fmt="o", color=color, capsize=3)
    dots.set_yticks(range(len(ordered)), [arm for *_, arm in reversed(ordered)])
    dots.axvline(0, color=COLORS["none"])
    dots.set(xlabel="val loss minus vanilla's, in nats", title="dot: mean, bar: standard error")
    for arm in ("vanilla", "KV shift", "keys only", "values only"):
        if arm in arms:
            values = np.array([[v for _, v, _ in r["curve"]] for r in arms[arm].values()])
            steps = [step for step, *_ in next(iter(arms[arm].values()))["curve"]]
            color = COLORS[ARMS[arm]["kv_shift"]]
            curves.plot(steps[1:], values.mean(axis=0)[1:], color=color, label=arm)
            curves.fill_between(steps[1:], values.min(axis=0)[1:], values.max(axis=0)[1:],
                                color=color, alpha=0.2, linewidth=0)
    curves.set(xlabel="steps", ylabel="val loss", title="line: mean of the seeds, band: range")
    curves.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
