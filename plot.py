"""Loss curves of runs of train.py with a table, and the learned weights of KV shift.

    python plot.py out/a out/b                  losses over steps (or --x=tokens, --x=seconds)
    python plot.py out/lr_* --x=learning_rate   final val loss over learning rates (or parameters)
    python plot.py out/a --scalars=True         alpha and beta of each head

Runs that differ only in their seed form a group: one line, their mean, in a band from the lowest to
the highest. A group's label names the options that differ between the groups.
"""

import itertools
import json
from dataclasses import dataclass
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
PANELS = {"loss": "train loss", "val_loss": "val loss", "saved": "nats saved on the repeat"}
# Over these axes a run is one point, and the runs of one line may differ in these options
POINTS = {"learning_rate": {"learning_rate", "min_lr"},
          "parameters": {"learning_rate", "min_lr", "n_layer", "n_head", "n_kv_head", "n_embd",
                         "ffn_size"}}


@dataclass
class PlotConfig:
    x: Literal["steps", "tokens", "seconds", "learning_rate", "parameters"] = "steps"  # x axis
    out: str = "out/plot.png"  # the figure, a PNG file
    scalars: bool = False  # draw alpha and beta of each best.pt instead of curves


def main():
    config, folders = parse_with_paths(PlotConfig, "OUT_DIR")
    if not folders:
        raise UserError("no runs: pass their folders, as in python plot.py out/a out/b")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    if config.scalars:
        print(draw_scalars(folders, config.out))
    else:
        print(draw_curves(folders, config.out, config.x))
    print(f"\nfigure: {config.out}")


def draw_curves(folders, out, x: str = "steps") -> str:
    """Draws the runs in `folders` into the PNG file `out`; returns a table of them."""
    from matplotlib.figure import Figure  # not pyplot, which may need a display

    runs = [read_run(folder, x) for folder in dict.fromkeys(map(Path, folders))]
    lines = group(runs, POINTS.get(x, set()))
    keys = [key for key in PANELS if any(key in one for one in runs)]
    keys = ["val_loss"] if x in POINTS else keys
    figure = Figure(figsize=(max(7, 1 + 4 * len(keys)), 4.5), layout="constrained")
    for ax, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        late = []  # values after the steep fall at the start, which would hide the differences
        for (label, members), (color, line) in zip(lines, line_styles(lines), strict=True):
            if curves := [one[key] for one in members if key in one]:
                xs, mean, low, high = mean_and_range(curves, x)
                ax.plot(xs, mean, line, color=color, label=label, marker=".", markevery=0.1)
                ax.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
                late += list(high[xs >= 0.2 * max(xs, default=0)])
        if x in POINTS:
            ax.set_xscale("log")
        elif key != "saved" and late:
            ax.set_ylim(top=1.02 * max(late))
        ax.set(title="final " * (x in POINTS) + PANELS[key])
        ax.set(xlabel=x.replace("_", " "), ylabel="nats")
        ax.grid(alpha=0.3)
    handles, labels = figure.axes[keys.index("val_loss")].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False,
                  title="line: mean of the seeds, band: lowest to highest")
    save_figure(figure, out)
    return table_of_groups(group(runs))


def read_run(folder, x: str) -> dict:
    """A run's "config", last "step", and curves: name -> (x, values), (2, n)."""
    path = folder / "log.jsonl"
    text = path.read_text(errors="replace")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        header = [line for line in lines if "config" in line][-1]  # a resumed run has several
        one = {"config": header["config"], "step": lines[-1]["step"]}
        at = (header | one["config"])[x] if x in POINTS else 0
        for line in lines:
            line["steps"] = line["step"]
            if "val_induction" in line:
                line["saved"] = line["val_random"] - line["val_induction"]
        for key in (*PANELS, "tokens", "seconds"):  # step 0 has no tokens and no seconds yet
            if points := [(line.get(x, at), line[key]) for line in lines if key in line]:
                one[key] = np.array(points, float).T
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if "val_loss" not in one:
        raise UserError(f"{path} has no val loss yet")
    return one


def group(runs: list[dict], free=frozenset()) -> list[tuple[str, list[dict]]]:
    """(label, runs that differ only in their seed and the options `free`) for each group."""
    free = FREE_TO_CHANGE - {"dtype", "init_from"} | {"seed", *free}
    names = dict.fromkeys(name for one in runs for name in one["config"] if name not in free)
    groups = {}
    for one in runs:  # a model option that is newer than a run had its default value
        values = tuple(one["config"].get(name, getattr(GPTConfig, name, None)) for name in names)
        groups.setdefault(values, []).append(one)
    differ = {name for name, *values in zip(names, *groups, strict=True) if len(set(values)) > 1}
    if all(name.startswith("shift_") for name in differ):
        differ.add("kv_shift")
    labels = [", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)
                        if name in differ and not is_default(name, value)) for values in groups]
    return list(zip(labels, groups.values(), strict=True))


def is_default(name: str, value) -> bool:
    """Whether an option of KVShift has its default value, which labels do not name."""
    return name.startswith("shift_") and value == getattr(GPTConfig, name, value)


def line_styles(groups) -> list[tuple[str, str]]:
    """(colour, line) of each group; the first plain model of a kind has the colour of its kind."""
    others = itertools.cycle((color, line) for line in ("-", "--", ":") for color in OTHER_COLORS)
    styles = []
    for _, (one, *_) in groups:
        style = COLORS.get(one["config"]["kv_shift"]), "-"
        plain = all(is_default(name, value) for name, value in one["config"].items()
                    if name.startswith("shift_"))
        styles.append(style if plain and style[0] and style not in styles else next(others))
    return styles


def mean_and_range(curves: list, x: str):
    """The points of x that all curves have reached (with x in POINTS: all points, of the final
    values), and the curves' mean, lowest and highest value there, (n,) each."""
    if x in POINTS:
        curves = [curve[:, -1:] for curve in curves]
    points = np.unique([at for curve in curves for at in curve[0]])
    values = np.array([np.interp(points, *curve, left=np.nan, right=np.nan) for curve in curves])
    if x not in POINTS:
        reached = ~np.isnan(values).any(axis=0)
        points, values = points[reached], values[:, reached]
    return points, *(f(values, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))


def table_of_groups(groups) -> str:
    """A row per group: means and standard deviations over its runs, and the mean difference to the
    first group, seed by seed, with its standard error."""
    head = ["", "runs", "steps", "final val loss", "best val loss", "tokens/s",
            f"difference to {groups[0][0]}"]
    rows = []
    for label, runs in groups:
        steps = " / ".join(f"{n:,}" for n in sorted({one["step"] for one in runs}))
        speeds = [one["tokens"][1][-1] / one["seconds"][1][-1] for one in runs if "seconds" in one]
        rows.append([label, str(len(runs)), steps,
                     mean_and_spread([one["val_loss"][1][-1] for one in runs]),
                     mean_and_spread([one["val_loss"][1].min() for one in runs]),
                     f"{np.mean(speeds):,.0f}" if speeds else "", difference(groups[0][1], runs)])
    if len(groups) == 1:  # no difference
        head, rows = head[:-1], [rows[0][:-1]]
    return table(head, rows)


def difference(first: list[dict], runs: list[dict]) -> str:
    """Mean and standard error of how much higher the final val losses of `runs` are; empty unless
    both groups have the same seeds and all runs are complete."""
    a, b = ({one["config"]["seed"]: one["val_loss"][1][-1] for one in g} for g in (first, runs))
    complete = all(one["step"] == one["config"]["max_steps"] for one in first + runs)
    if runs is first or a.keys() != b.keys() or not complete:
        return ""
    return mean_and_spread([b[seed] - a[seed] for seed in a], sign="+", n=len(a))


def mean_and_spread(values: list[float], sign="", n=1) -> str:
    """Mean ± standard deviation, or with n = len(values) ± standard error."""
    spread = f" ± {np.std(values, ddof=1) / n**0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{spread}"


def draw_scalars(folders, out) -> str:
    """Draws alpha and beta of each head into the PNG file `out`; returns the paper's Table 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = dict(zip("kv", figure.subplots(1, 2), strict=True))
    counts = {"the paper's 2.9B model": [50, 17, 9, 52]}
    groups = group([read_scalars(folder) for folder in folders])
    for (label, runs), (color, _) in zip(groups, line_styles(groups), strict=True):
        own = {}  # whether the weight of this token is larger than that of the previous one
        for name, symbol in {"k": "α", "v": "β"}.items():
            this, previous, *_ = np.concatenate([one[name] for one in runs], axis=1)
            own[name] = this > previous
            axes[name].scatter(this, previous, s=18, color=color, alpha=0.7, label=label)
            axes[name].set(xlabel=f"{symbol}1, this token", ylabel=f"{symbol}2, previous token")
        counts[label] = [np.sum((own["k"] == a) & (own["v"] == b)) for b in (1, 0) for a in (1, 0)]
    for ax in axes.values():
        ax.axline((0, 0), slope=1, color="gray", linewidth=0.8)
        ax.axline((0, 1), slope=-1, color="gray", linewidth=0.8, linestyle=":")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", frameon=False,
                  title="dot: a head; solid line: equal weights, dotted: sum 1, as at the start")
    save_figure(figure, out)
    head = ["", "α1 > α2, β1 > β2", "α1 <= α2, β1 > β2 (induction)", "α1 > α2, β1 <= β2",
            "α1 <= α2, β1 <= β2"]
    return table(head, [[label, *(f"{count} ({count / sum(row):.0%})" for count in row)]
                        for label, row in counts.items()])


def read_scalars(folder) -> dict:
    """The config of a best.pt, and "k" and "v": alpha and beta as the model uses them, (window,
    heads of all layers), with shift_per=channel (window, channels of all layers)."""
    checkpoint = load_checkpoint(Path(folder) / "best.pt")
    shifts = [block.attn.shift for block in load_model(checkpoint, "cpu").blocks]
    if not {"k", "v"} <= {*shifts[0]}:
        raise UserError(f"{folder} has no alpha or no beta: pass runs with kv_shift=kv or qkv")
    return {"config": checkpoint["config"]} | {
        name: torch.cat([torch.stack(shift[name].weights(None)).detach().flatten(1)
                         for shift in shifts], dim=1).numpy() for name in "kv"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def save_figure(figure, path):
    """Writes a matplotlib figure to a PNG file."""
    with atomic_write(path) as f:
        figure.savefig(f, format="png", dpi=100)


if __name__ == "__main__":
    run(main)
