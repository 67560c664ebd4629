"""Loss curves of runs of train.py with a table, and the learned weights of KV shift.

    python plot.py out/a out/b                  losses over steps (or --x=tokens, --x=seconds)
    python plot.py out/a --scalars=True         alpha and beta of each head

Runs that differ only in their seed form a group: one line, their mean, in a band from the lowest to
the highest. A group's label names the options that differ between the groups.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from checkpoint import FREE_TO_CHANGE, load_checkpoint, load_model
from config import UserError, parse_with_paths, run
from data import atomic_write
from model import GPTConfig

import numpy as np
import torch

# Okabe and Ito's palette: one colour per kind of model in all figures, the others for variants
COLORS = {"kv": "#D55E00", "none": "#0072B2", "k": "#009E73", "v": "#CC79A7"}
OTHER_COLORS = ("#E69F00", "#56B4E9", "#000000", "#F0E442")
PANELS = {"val_loss": "val loss", "loss": "train loss", "saved": "nats saved on the repeat"}


@dataclass
class PlotConfig:
    x: Literal["steps", "tokens", "seconds"] = "steps"  # x axis
    out: str = "out/plot.png"  # the figure, a PNG file
    scalars: bool = False  # draw alpha and beta of each best.pt instead of curves


def main():
    config, folders = parse_with_paths(PlotConfig, "OUT_DIR")
    if not folders:
        raise UserError("no runs: pass their folders, as in python plot.py out/a out/b")
    folders = [Path(folder) for folder in folders]
    result = draw_scalars(folders, config.out) if config.scalars else draw_curves(
        folders, config.out, config.x)
    print(f"{result}\n\nfigure: {config.out}")


def draw_curves(folders, out, x: str = "steps") -> str:
    """Draws the runs in `folders` into the PNG file `out`; returns a table of them."""
    runs = [read_run(folder, x) for folder in folders]
    groups = group(runs)
    keys = [key for key in PANELS if any(key in one for one in runs)]
    figure = new_figure(max(7, 1 + 4 * len(keys)), 4.5)
    for ax, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        late = []  # values after the steep fall at the start, which would hide the differences
        for label, color, members in groups:
            if curves := [one[key] for one in members if key in one]:
                xs, mean, low, high = mean_and_range(curves)
                ax.plot(xs, mean, color=color, label=label)
                ax.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
                late += list(high[xs >= 0.2 * max(xs, default=0)])
        if key != "saved" and late:
            ax.set_ylim(top=1.02 * max(late))
        ax.set(title=PANELS[key], xlabel=x, ylabel="nats")
        ax.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False,
                  ncols=3 if max(map(len, labels)) < 30 else 1,
                  title="line: mean of the seeds, band: lowest to highest")
    save_figure(figure, out)
    return table_of_groups(groups)


def read_run(folder: Path, x: str) -> dict:
    """A run's "config", last "step", and curves: name -> (x, values), (2, n)."""
    path = folder / "log.jsonl"
    text = path.read_text(errors="replace")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        header = [line for line in lines if "config" in line][-1]  # a resumed run has several
        one = {"config": header["config"], "step": lines[-1]["step"]}
        for line in lines:
            if "val_induction" in line:
                line["saved"] = line["val_random"] - line["val_induction"]
        for key in PANELS:  # the step stands for x=steps, and for what step 0 lacks
            if points := [(line.get(x, line["step"]), line[key]) for line in lines if key in line]:
                one[key] = np.array(points, float).T
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if "val_loss" not in one:
        raise UserError(f"{path} has no val loss yet")
    return one


def group(runs: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(label, colour, runs) of each group. The first group of a kind of model has its colour."""
    free = (FREE_TO_CHANGE - {"dtype"}) | {"seed"}
    groups = {}
    for one in runs:  # a model option that is newer than a run had its default value
        config = asdict(GPTConfig()) | one["config"]
        options = tuple((name, value) for name, value in config.items() if name not in free)
        groups.setdefault(options, []).append(one)
    common = set.intersection(*map(set, groups))
    unused, result = dict(COLORS), []
    for options, members in groups.items():
        label = ", ".join(f"{name}={value}" for name, value in options
                          if name == "kv_shift" or (name, value) not in common)
        color = unused.pop(dict(options)["kv_shift"], OTHER_COLORS[len(result) % 4])
        result.append((label, color, members))
    return result


def mean_and_range(curves: list):
    """The points of x that all curves have reached, and their mean, lowest and highest values."""
    xs = curves[0][0]
    xs = xs[xs <= min(curve[0][-1] for curve in curves)]
    values = [np.interp(xs, *curve) for curve in curves]
    return xs, np.mean(values, axis=0), np.min(values, axis=0), np.max(values, axis=0)


def table_of_groups(groups) -> str:
    """A row per group: mean and standard error of the final val loss, and of its difference to the
    first group, seed by seed. No difference unless both have the same seeds at the same step."""
    first, rows = {}, []
    for label, _, runs in groups:
        final = {(one["config"]["seed"], one["step"]): one["val_loss"][1][-1] for one in runs}
        first = first or final
        same = final.keys() == first.keys() and final is not first  # seeds, at the same step
        differences = [final[key] - first[key] for key in final] if same else []
        steps = " / ".join(f"{step:,}" for step in sorted({one["step"] for one in runs}))
        rows.append([label, str(len(runs)), steps, mean_and_error([*final.values()]),
                     mean_and_error(differences, sign="+")])
    return table(["", "runs", "steps", "val loss", f"difference to {groups[0][0]}"], rows)


def mean_and_error(values: list[float], sign="") -> str:
    """Mean ± standard error, as far as there are values for them."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{error}" if values else ""


def draw_scalars(folders, out) -> str:
    """Draws alpha and beta of each head into the PNG file `out`; returns the paper's Table 4."""
    figure = new_figure(9, 5)
    axes = figure.subplots(1, 2)
    rows = [["the paper's 2.9B model", "50", "17", "9", "52"]]
    for label, color, runs in group([read_scalars(folder) for folder in folders]):
        a1, a2, b1, b2 = np.concatenate([one["scalars"] for one in runs], axis=1)
        axes[0].scatter(a1, a2, s=18, color=color, alpha=0.7, label=label)
        axes[1].scatter(b1, b2, s=18, color=color, alpha=0.7, label=label)
        counts = [a & b for b in (b1 > b2, b1 <= b2) for a in (a1 > a2, a1 <= a2)]
        rows.append([label, *(str(heads.sum()) for heads in counts)])
    for ax, symbol in zip(axes, "αβ", strict=True):
        ax.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        ax.axline((0, 1), slope=-1, color="gray", linewidth=0.8, linestyle=":")
        ax.set(xlabel=f"{symbol}1, current token", ylabel=f"{symbol}2, previous token")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", frameon=False,
                  title="dot: a head; solid line: equal weights, dotted: sum 1, as at the start")
    save_figure(figure, out)
    return table(["heads with", "α1 > α2, β1 > β2", "α1 <= α2, β1 > β2 (induction)",
                  "α1 > α2, β1 <= β2", "α1 <= α2, β1 <= β2"], rows)


def read_scalars(folder: Path) -> dict:
    """The config of a best.pt, and "scalars": the rows alpha_1, alpha_2, beta_1, beta_2 as the
    model uses them, one column per head (or channel) of all layers."""
    checkpoint = load_checkpoint(folder / "best.pt")
    shifts = [block.attn.shift for block in load_model(checkpoint, "cpu").blocks]
    if not {"k", "v"} <= {*shifts[0]}:
        raise UserError(f"{folder} has no alpha or no beta: pass runs with kv_shift=kv or qkv")
    row = torch.zeros(1, 1, shifts[0]["k"].n_head, shifts[0]["k"].head_dim)  # for weights=input
    scalars = [torch.cat([shift[name].weights(row)[i].flatten() for shift in shifts])
               for name in "kv" for i in range(2)]
    return {"config": checkpoint["config"], "scalars": torch.stack(scalars).detach().numpy()}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def new_figure(width: float, height: float):
    """A matplotlib figure of this size in inches."""
    from matplotlib.figure import Figure  # not pyplot, which may need a display

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Writes a matplotlib figure to a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=100)


if __name__ == "__main__":
    run(main)
