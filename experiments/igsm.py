r"""iGSM (the paper's Table 7): accuracy on math problems, by their number of operations.

    python data/igsm/prepare.py --setting=paper --max_op=12
    python experiments/compare.py --experiment=igsm_rates --arms="vanilla, KV shift" --seeds=101 \
        --rates="6e-3 1.2e-2 2.4e-2"
    python experiments/compare.py --experiment=igsm_long --arms="vanilla, KV shift"
    python experiments/igsm.py out/compare/igsm_long-vanilla-* out/compare/igsm_long-KV-shift-*

Decodes greedily. From 6 operations on, the problems have solution templates that training has not
seen; they have up to `beyond` operations more than in training. An answer is right if its number
is; a solution, if all its steps are. Adds a line per run to results/igsm_accuracy.jsonl, and skips
runs that have one.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import choose_device, load_checkpoint, load_model
from config import UserError, parse_with_paths, run
from data import FOLDER, read_meta
from data.igsm.prepare import draw_problem, grade, template_split
from data.tokenizing import Tokenizer
from experiments.compare import ROOT, Results
from plot import COLORS, OTHER_COLORS, new_figure, save_figure, table

import numpy as np
import torch


@dataclass
class IgsmConfig:
    problems: int = 50  # for each number of operations
    beyond: int = 3  # how many operations more than in training
    results: str = str(ROOT / "experiments" / "results")  # folder of igsm_accuracy.jsonl
    out: str = "out/igsm.png"  # the figure
    device: str = "auto"  # cpu, cuda, mps; auto: the best available


def main():
    config, paths = parse_with_paths(IgsmConfig, "OUT_DIR")
    if not paths:
        raise UserError("pass run folders: python experiments/igsm.py out/a out/b")
    results = Results(Path(config.results))
    done = {r["run"]: r for r in results.read("igsm_accuracy")}
    for path in map(Path, paths):
        if path.name not in done:
            done[path.name] = evaluate_run(config, path)
            results.add("igsm_accuracy", done[path.name])
    report(config, [done[Path(path).name] for path in paths])


def evaluate_run(config: IgsmConfig, path: Path) -> dict:
    """{"run", "kv_shift", "seed", "max_op", "accuracy": number of operations -> (answer, all)}."""
    checkpoint = load_checkpoint(path / "ckpt.pt")
    run_config = checkpoint["config"]
    options = read_meta(FOLDER / run_config["dataset"])["options"]
    model = load_model(checkpoint, choose_device(config.device, "float32")[0])
    tokenizer = Tokenizer(checkpoint["tokenizer"])
    rng, accuracy = random.Random(f"test {options['seed']}"), {}
    for n_op in range(2, options["max_op"] + config.beyond + 1):
        problems = []
        while len(problems) < config.problems and (n_op > 3 or options["setting"] == "full"):
            problem, solution = draw_problem(rng, options["setting"], n_op, n_op)
            if template_split(solution) == "val" or n_op < 6:  # few templates are that short
                problems.append(problem)
        if problems:
            solutions = solve(model, tokenizer, problems)
            grades = [grade(*pair) for pair in zip(problems, solutions, strict=True)]
            answer, steps = accuracy[str(n_op)] = np.mean(grades, axis=0).tolist()
            print(f"{path.name}, {n_op} operations: answers {answer:.0%}, solutions {steps:.0%}",
                  flush=True)
    return {"run": path.name, "kv_shift": run_config["kv_shift"], "seed": run_config["seed"],
            "max_op": options["max_op"], "problems": config.problems, "accuracy": accuracy}


def solve(model, tokenizer: Tokenizer, problems: list[str]) -> list[str]:
    """The solutions that the model writes, in batches of problems of the same length."""
    prompts = [tokenizer.encode(f"{problem} Solution").tolist() for problem in problems]
    solutions = {}
    for length in {len(prompt) for prompt in prompts}:
        batch = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        idx = torch.tensor([prompts[i] for i in batch], device=model.embed.weight.device)
        new = model.generate(idx, model.config.block_size - length, temperature=0,
                             stop_token=tokenizer.end_of_text)[:, length - 1 :]
        for i, ids in zip(batch, new.tolist(), strict=True):
            ids = ids[: ids.index(tokenizer.end_of_text)] if tokenizer.end_of_text in ids else ids
            solutions[i] = tokenizer.decode(ids).strip()
    return [solutions[i] for i in range(len(problems))]


def report(config: IgsmConfig, records: list[dict]):
    """Prints a table of the mean accuracies, and draws them with a band: lowest to highest. Shows
    the numbers of operations that all records have."""
    figure = new_figure(10, 4)
    axes, rows = figure.subplots(1, 2, sharey=True), []
    ops = sorted(set.intersection(*({*map(int, record["accuracy"])} for record in records)))
    for i, kind in enumerate(dict.fromkeys(record["kv_shift"] for record in records)):
        runs = [record for record in records if record["kv_shift"] == kind]
        color = COLORS.get(kind, OTHER_COLORS[i % 4])
        values = np.array([[record["accuracy"][str(n)] for n in ops] for record in runs])
        for ax, name, v in zip(axes, ("answers", "solutions"), np.moveaxis(values, 2, 0),
                               strict=True):  # v: (runs, operations)
            ax.plot(ops, v.mean(0), color=color, label=f"kv_shift={kind}")
            ax.fill_between(ops, v.min(0), v.max(0), color=color, alpha=0.2)
            ax.set(xlabel="operations", ylabel="accuracy", title=name, ylim=(-0.02, 1.02))
            means = [f"{value:.2f}" for value in v.mean(0)]
            rows.append([f"kv_shift={kind}, {name}", str(len(runs)), *means])
    for ax in axes:
        ax.axvline(records[0]["max_op"] + 0.5, color="gray", linewidth=0.8)
    axes[0].legend()
    figure.suptitle("line: mean of the seeds, band: range; left of the gray line: as in training",
                    fontsize=10)
    save_figure(figure, config.out)
    print("\n" + table(["operations", "seeds", *map(str, ops)], rows))
    print(f"\nfigure: {config.out}")


if __name__ == "__main__":
    run(main)
