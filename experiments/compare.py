"""Compares vanilla attention, KV shift and its relatives on several corpora, with several seeds.

    python experiments/compare.py                     # Python source: hours on two CPU cores
    python experiments/compare.py --experiment=shakespeare --arms="vanilla, KV shift" --seeds="1 2"
    python experiments/compare.py --train=False       # table and figure of the finished runs

Each run is a call of train.py. A finished run adds one line to results/<experiment>.jsonl and is
not trained again: rerun the same command to resume. All kinds of model have vanilla's best learning
rate: the one with the lowest mean loss in `rates`, whose runs have half the steps and other
validation tokens (pass other seeds, such as --seeds=101). --learning_rate sets another one for all
kinds but vanilla.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse, run
from experiments.bench import BenchConfig, run_script, time_steps
from model import GPT, GPTConfig
from plot import COLORS, mean_and_error, new_figure, save_figure, table
from train import prepare_corpus

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128}  # 0.8M parameters
PYTHON = MODEL | {  # bytes, with a context that is long enough for induction to pay
    "dataset": "pystdlib", "block_size": 256, "batch_size": 8, "max_steps": 1500,
    "warmup_steps": 50, "eval_every": 150, "eval_tokens": 131_072, "log_every": 25}
HALF = {"max_steps": 750, "eval_every": 750, "eval_start": 131_072}
IGSM = {"dataset": "igsm", "n_layer": 6, "n_head": 4, "n_embd": 64, "block_size": 384,
        "batch_size": 8, "max_steps": 2000, "warmup_steps": 50, "eval_every": 250,
        "eval_tokens": 98_304, "optimizer": "muon"}
EXPERIMENTS = {  # options of train.py
    "rates": PYTHON | HALF,
    "python": PYTHON,
    "english": PYTHON | {"dataset": "english"},  # 40 MB: RESULTS.md says of what
    "english_small": PYTHON | {"dataset": "english_small"},  # the first 1.3 MB of it
    "shakespeare": MODEL | {"dataset": "shakespeare_char", "block_size": 64, "batch_size": 12,
                            "eval_tokens": 0, "learning_rate": 1e-3},  # nanoGPT's CPU setting
    "retrofit": PYTHON | {"init_from": "python-vanilla-{seed}/ckpt.pt"},  # 1500 steps more
    "no_rotary": PYTHON | {"rope_base": 0},
    "muon_rates": PYTHON | HALF | {"optimizer": "muon"},
    "muon": PYTHON | {"optimizer": "muon"},
    "igsm_rates": IGSM | {"max_steps": 500},
    "igsm": IGSM,
    "igsm_long": IGSM | {"max_steps": 8000, "eval_every": 1000},
    "igsm_full": IGSM | {"dataset": "igsm_full"}}
OUTSIDE = {"kv_shift": "none", "shift_init": "identity"}  # of keys and values
ARMS = {  # kinds of model; the first one is the reference
    "vanilla": {"kv_shift": "none"},
    "KV shift": {"kv_shift": "kv"},
    "keys only": {"kv_shift": "k"},
    "values only": {"kv_shift": "v"},
    "queries too": {"kv_shift": "qkv"},
    "per channel": {"shift_per": "channel"},
    "Canon-A": OUTSIDE | {"shift_at": "block", "shift_per": "channel", "shift_window": 4},
    "smear": OUTSIDE | {"shift_at": "embedding"},
    "window 3": {"shift_window": 3},
    "window 4": {"shift_window": 4},
    "gate": {"shift_weights": "gate"},
    "clamp": {"shift_weights": "clamp"},
    "input": {"shift_weights": "input"},
    "identity": {"shift_init": "identity"},
    "induction": {"shift_init": "induction"},
    "fixed random": {"shift_learned": False},
    "fixed induction": {"shift_init": "induction", "shift_learned": False}}
MAIN = "vanilla, KV shift, keys only, per channel, Canon-A"


@dataclass
class CompareConfig:
    experiment: str = "python"  # one of EXPERIMENTS
    arms: str = MAIN  # kinds of model, separated by commas
    seeds: str = "1 2 3"  # seeds of each kind
    rates: str = "1.5e-3 3e-3 6e-3 1.2e-2"  # learning rates of the experiments called *rates
    learning_rate: float | None = None  # of all kinds but vanilla; None: that of vanilla
    train: bool = True  # False: tables and figures from the results alone
    times: bool = False  # only measure the step times of these kinds, on an idle machine
    workers: int = 2  # runs at the same time, one CPU core each
    out_dir: str = "out/compare"  # folder of the runs and of the figures
    results: str = str(ROOT / "experiments" / "results")  # folder of <experiment>.jsonl


def main():
    config = parse(CompareConfig)
    arms, seeds = config.arms.split(", "), [int(seed) for seed in config.seeds.split()]
    if config.experiment not in EXPERIMENTS or not set(arms) <= set(ARMS):
        raise UserError(f"experiment must be one of {', '.join(EXPERIMENTS)}, and arms some of "
                        f"{', '.join(ARMS)}")
    results = Results(Path(config.results), config.learning_rate)
    if config.times:
        return measure_times(results, ["vanilla", *arms])
    if config.train:
        train_missing(config, results, arms, seeds)
    print(make_table(results, config.experiment))
    if "rates" not in config.experiment and results.arms(config.experiment):
        path = Path(config.out_dir) / f"{config.experiment}.png"
        draw(results, config.experiment, path)
        print(f"\nfigure: {path}")


class Results:
    """The lines of results/<experiment>.jsonl, one for each finished run."""

    def __init__(self, folder: Path, learning_rate: float | None = None):
        self.folder, self.other_rate = folder, learning_rate
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, experiment: str, record: dict):
        with open(self.folder / f"{experiment}.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def read(self, experiment: str) -> list[dict]:
        path = self.folder / f"{experiment}.jsonl"
        return [*map(json.loads, path.read_text().splitlines())] if path.exists() else []

    def learning_rate(self, experiment: str, arm: str) -> float:
        if rate := EXPERIMENTS[experiment].get("learning_rate"):
            return rate
        if self.other_rate and arm != "vanilla":
            return self.other_rate
        own = f"{experiment.split('_')[0]}_rates"
        runs = self.read(own if own in EXPERIMENTS else "rates")
        runs = [r for r in runs if r["arm"] == "vanilla"]
        if not runs:
            raise UserError("no learning rate yet: run --experiment=rates (or muon_rates) first")
        return min((r["learning_rate"] for r in runs), key=lambda rate: np.mean(
            [r["val_loss"] for r in runs if r["learning_rate"] == rate]))

    def arms(self, experiment: str) -> dict[str, dict[int, dict]]:
        """arm -> seed -> record, at the learning rate of the arm, in the order of ARMS."""
        found = {}
        for arm in ARMS:
            for r in sorted(self.read(experiment), key=lambda r: r["seed"]):
                if r["arm"] == arm and r["learning_rate"] == self.learning_rate(experiment, arm):
                    found.setdefault(arm, {})[r["seed"]] = r
        return found


def train_missing(config: CompareConfig, results: Results, arms: list[str], seeds: list[int]):
    experiment = config.experiment
    rates = [*map(float, config.rates.split())] if "rates" in experiment else [None]
    done = {(r["arm"], r["seed"], r["learning_rate"]) for r in results.read(experiment)}
    missing = [(arm, seed, rate or results.learning_rate(experiment, arm))
               for seed in seeds for rate in rates for arm in arms]
    missing = [one for one in missing if one not in done]
    if not missing:
        return
    prepare_corpus(EXPERIMENTS[experiment]["dataset"])  # before several runs want to
    started = time.monotonic()
    with ThreadPoolExecutor(config.workers) as pool:
        records = pool.map(lambda one: train_one(config, *one), missing)
        for i, record in enumerate(records, start=1):
            results.add(experiment, record)
            left = timedelta(seconds=round((time.monotonic() - started) / i * (len(missing) - i)))
            print(f"[{i}/{len(missing)}] {record['arm']}, seed {record['seed']}, learning rate "
                  f"{record['learning_rate']:g}: val loss {record['val_loss']:.4f} | about "
                  f"{left} left", flush=True)


def train_one(config: CompareConfig, arm: str, seed: int, rate: float) -> dict:
    """Trains one model with train.py, returns what its log says."""
    experiment = config.experiment
    name = f"{experiment}-{arm}-{seed}"
    if "rates" in experiment or config.learning_rate:
        name += f"-{rate:g}"
    out_dir = Path(config.out_dir) / name.replace(" ", "-")
    options = EXPERIMENTS[experiment] | ARMS[arm] | {
        "seed": seed, "learning_rate": rate, "min_lr": rate / 10, "eval_induction": True,
        "compile": True, "dtype": "float32", "out_dir": out_dir}
    if "init_from" in options:  # another seed: other batches than those of the first run
        path = Path(config.out_dir) / options["init_from"].format(seed=seed)
        options |= {"init_from": path, "seed": seed + 100}
    run_script(ROOT / "train.py", *(f"--{name}={value}" for name, value in options.items()),
               env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    header = [line for line in lines if "config" in line][-1]
    curve = [[line["step"], line["val_loss"], line["val_random"] - line["val_induction"]]
             for line in lines if "val_loss" in line]
    return {"experiment": experiment, "arm": arm, "seed": seed, "learning_rate": rate,
            "val_loss": curve[-1][1], "saved": curve[-1][2], "seconds": lines[-1]["seconds"],
            "curve": curve, "parameters": header["parameters"], "corpus": header["corpus"],
            "versions": header["versions"]}


def measure_times(results: Results, arms: list[str]):
    """Adds a line per arm: the time of a compiled step, divided by vanilla's in the same round."""
    torch._dynamo.config.recompile_limit = 64  # beyond its 8 kinds, models would run uncompiled
    config = BenchConfig(**MODEL, vocab_size=256, block_size=256, batch_size=8)
    kinds = {arm: GPT(replace(config, **ARMS[arm])) for arm in arms}
    speeds = time_steps(kinds, config, torch.device("cpu"), torch.float32, compiled=True)
    for arm in kinds:
        ratio = np.median(np.divide(speeds["vanilla"], speeds[arm]))
        results.add("step_times", {"arm": arm, "ratio": ratio, "tokens_per_s": speeds[arm]})
        print(f"{arm}: {ratio:.3f}")


def make_table(results: Results, experiment: str) -> str:
    """A row per arm. The reference of the differences is the first row, seed by seed."""
    if "rates" in experiment:
        runs = results.read(experiment)
        losses, rates = {}, sorted({r["learning_rate"] for r in runs})
        for r in runs:
            losses.setdefault((r["arm"], r["learning_rate"]), []).append(r["val_loss"])
        rows = [[arm, *(mean_and_error(losses.get((arm, rate), [])) for rate in rates)]
                for arm in dict.fromkeys(r["arm"] for r in runs)]
        return table(["val loss", *(f"{rate:g}" for rate in rates)], rows)
    arms, times = results.arms(experiment), results.read("step_times")
    ratios = {line["arm"]: line["ratio"] for line in times}  # the last measurement of each
    rows = []
    for arm, seeds in arms.items():
        runs, first = list(seeds.values()), next(iter(arms.values()))
        first_parameters = next(iter(first.values()))["parameters"]
        rows.append([
            arm, str(len(runs)), f"{runs[0]['learning_rate']:g}",
            mean_and_error([r["val_loss"] for r in runs]),
            mean_and_error(differences(arms, arm), sign="+") if seeds is not first else "",
            " ".join(f"{r['saved']:.3f}" for r in runs),
            " ".join(str(steps_to_induction(r["curve"])) for r in runs),
            loss_at_equal_time(runs, ratios.get(arm)),
            f"{ratios[arm]:.2f}" if arm in ratios else "",
            str(runs[0]["parameters"] - first_parameters), str(cache_bytes(arm))])
    return table(["", "seeds", "learning rate", "val loss", "difference", "nats saved on a repeat",
                  "steps to save 0.1", "loss at equal time", "step time", "parameters added",
                  "cache bytes added per layer"], rows)


def differences(arms: dict, arm: str) -> list[float]:
    """How much higher the val losses are than those of the first arm, seed by seed."""
    first = next(iter(arms.values()))
    return [r["val_loss"] - first[s]["val_loss"] for s, r in arms[arm].items() if s in first]


def steps_to_induction(curve) -> int | str:
    """The first evaluated step at which a repetition saves 0.1 nats."""
    return next((step for step, _, saved in curve if saved >= 0.1), f">{curve[-1][0]}")


def loss_at_equal_time(runs: list[dict], ratio: float | None) -> str:
    """The mean loss when vanilla has finished, read from the curves of a slower model."""
    if ratio is None:
        return ""
    curves = [np.transpose(r["curve"]) for r in runs]
    return f"{np.mean([np.interp(c[0][-1] / ratio, c[0], c[1]) for c in curves]):.3f}"


def cache_bytes(arm: str) -> int:
    """Bytes of float32 that decoding keeps for the shifts, per layer and sequence."""
    model = GPT(GPTConfig(**MODEL, vocab_size=256, **ARMS[arm]))
    return sum(rows.nbytes for rows in model.new_cache(1).past.values()) // MODEL["n_layer"]


def draw(results: Results, experiment: str, path: Path):
    """Left: mean differences to the first arm. Right: val loss of the kinds of model in COLORS."""
    arms = results.arms(experiment)
    figure = new_figure(11, 1.5 + max(3, 0.3 * len(arms)))
    dots, curves = figure.subplots(1, 2)
    first = next(iter(arms))
    for arm in sorted(arms, key=lambda arm: -np.mean(differences(arms, arm) or [0])):
        plain = arm in ("vanilla", "KV shift", "keys only", "values only")
        color = COLORS[ARMS[arm]["kv_shift"]] if plain else "gray"
        if d := differences(arms, arm):
            error = np.std(d, ddof=1) / len(d) ** 0.5 if len(d) > 1 else 0
            dots.errorbar(np.mean(d), f"{arm} ({len(d)})", xerr=error, fmt="o", color=color)
        if plain:
            steps, losses, _ = np.transpose([r["curve"][1:] for r in arms[arm].values()])
            curves.plot(steps[:, 0], losses.mean(1), color=color, label=arm)
            curves.fill_between(steps[:, 0], losses.min(1), losses.max(1), color=color, alpha=0.2)
    dots.axvline(0, color=COLORS["none"], linewidth=0.8)
    dots.set(xlabel=f"val loss minus that of {first}, in nats",
             title="mean and standard error (number of seeds)")
    curves.set(xlabel="steps", ylabel="val loss", title="line: mean of the seeds, band: range")
    if curves.lines:
        curves.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
