"""Loss curves of any runs in one picture, a table of how they end, and the scalars that they learned.

    python plot.py out/a out/b                    train and val loss over steps; --x=tokens or seconds
    python plot.py out/lr_* --x=learning_rate     the last val loss over learning rates
    python plot.py out/size_* --x=parameters      and over parameters without embeddings, with fitted power laws
    python plot.py out/a out/b --scalars=True     each head's alpha and beta, with the counts of the paper's Table 4

Runs that differ only in their seed become one line, their mean, in a band from the lowest to the highest. Its label is
what differs from most of the other runs' configs; out_dir and what does not change a result do not count.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from checkpoint import FREE_TO_CHANGE, load_checkpoint, load_model
from config import UserError, parse, run
from data import atomic_write
from model import GPTConfig
from train import TrainConfig


@dataclass
class PlotConfig:
    x: Literal["steps", "tokens", "seconds", "learning_rate", "parameters"] = "steps"  # the last two: of the last val loss
    out: str = "out/plot.png"  # the picture
    scalars: bool = False  # draw the alpha and beta of checkpoints, and not curves
    checkpoint: str = "best.pt"  # best.pt or ckpt.pt (the latest) in each folder, for scalars

    def __post_init__(self):
        if not self.out.endswith(".png"):
            raise ValueError(f"out={self.out} must end in .png")


def main():
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    config = parse(PlotConfig, [argument for argument in sys.argv[1:] if argument.startswith("-")], "out_dir ...")
    if not folders:
        raise UserError("no runs to draw: name their folders, as in python plot.py out/a out/b")
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    if config.scalars:
        text = draw_scalars(folders, config.out, config.checkpoint)
    else:
        text = draw_curves(folders, config.out, config.x)
    print(f"{text}\n\nthe picture: {config.out}")


# --- runs, and what tells them apart


def read_run(folder: Path) -> dict:
    """A run's config, parameters without embeddings, and log, {"step", "loss", "val_loss", ...}, as far as it has come."""
    path = folder / "log.jsonl"
    try:
        text = path.read_text()
        header, *lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())  # the last line may be half written
        config = dict(header["config"])
        model = GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config})
        parameters = header["parameters"] - (2 - model.tie_embeddings) * model.padded_vocab_size * model.n_embd
        if not all(math.isfinite(line["step"] + line.get("loss", 0) + line.get("val_loss", 0)) for line in lines):
            raise ValueError("a figure is not finite")
        for line in lines:
            if "val_induction" in line:
                line["induction"] = line["val_random"] - line["val_induction"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no log {path}: the arguments are the out_dirs of runs of train.py") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no log of train.py ({type(error).__name__}: {error})") from None
    if not any("val_loss" in line for line in lines):
        raise UserError(f"nothing to draw in {path}: the run has not been evaluated yet")
    return {"config": config, "parameters": parameters, "lines": lines}


def group(runs: list[dict], over: tuple = ()) -> dict[str, list[dict]]:
    """label -> the runs that differ in nothing but the seed and the options named in `over`."""
    same = FREE_TO_CHANGE - {"dtype"} | {"seed", *over}  # a run may go on in another precision, but not as if it were the same
    options = [f for f in fields(TrainConfig) if f.name not in same]
    groups = {}
    for one in runs:  # an option that is younger than a run had its default
        groups.setdefault(tuple(one["config"].get(f.name, f.default) for f in options), []).append(one)
    configs = [dict(zip((f.name for f in options), values, strict=True)) for values in groups]
    differ = [f.name for f in options if len({config[f.name] for config in configs}) > 1]
    for follows in ("vocab_size", "n_kv_head", "ffn_size"):  # from the corpus, the heads and the width, unless given
        others = [name for name in differ if name != follows]
        if len({tuple(config[name] for name in others) for config in configs}) == len(configs):
            differ = others
    usual = {}  # the value of more than half of the groups is not said
    for name in differ:
        value, count = Counter(config[name] for config in configs).most_common(1)[0]
        usual |= {name: value} if count > len(configs) / 2 else {}
    labels = []
    for config in configs:
        said = [name for name in differ if name not in usual or config[name] != usual[name]]
        labels.append(", ".join(f"{name}={config[name]}" for name in said or differ[:1] or ["kv_shift"]))
    return dict(zip(labels, groups.values(), strict=True))


# --- how pictures and tables look, those of induction_toy.py, too

# Okabe and Ito's colours, which colour-blind readers can tell apart; line and marker say the same once more
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")


def style(i: int) -> tuple[str, str, str]:
    """Colour, line and marker of the i-th curve, another combination for each of the first 140."""
    return COLORS[i % 7], LINES[i % 4], MARKERS[i % 5]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown that can be read as it is."""
    width = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.ljust(w) for cell, w in zip(row, width, strict=True)] for row in (head, ["-" * w for w in width], *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save_figure(figure, out):
    with atomic_write(out) as f:
        figure.savefig(f, format="png", dpi=100)


# --- curves

PANELS = {"loss": "train loss", "val_loss": "val loss", "induction": "saved where random tokens repeat"}
AXES = {"steps": "steps", "tokens": "tokens", "seconds": "seconds of training", "learning_rate": "learning rate",
        "parameters": "parameters without embeddings"}
# runs that differ in no more than this (and the seed) are one line over such an axis
OVER = {"learning_rate": ("learning_rate", "min_lr"),
        "parameters": ("n_layer", "n_head", "n_kv_head", "n_embd", "ffn_size", "learning_rate", "min_lr")}


def draw_curves(folders, out, x: str = "steps") -> str:
    """Draws the runs in `folders` into the file `out`; returns a table of them."""
    from matplotlib.figure import Figure  # not pyplot: it needs no display

    runs = [read_run(folder) for folder in dict.fromkeys(map(Path, folders))]
    groups = group(runs)
    for label, members in groups.items():
        if len({one["config"]["seed"] for one in members}) < len(members):
            raise UserError(f"two of the runs ({label}) have the same seed and differ in nothing that changes a result: leave "
                            "one of them out")
    keys = [key for key in PANELS if any(key in line for one in runs for line in one["lines"])]
    if x in OVER:
        keys = ["val_loss"]
    figure = Figure(figsize=(max(7, 1 + 4 * len(keys)), 4.2), layout="constrained")
    for ax, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        settled = []
        for i, (label, members) in enumerate(group(runs, OVER.get(x, ())).items()):
            members = [one for one in members if any(key in line for line in one["lines"])]
            if not members:
                continue
            xs, mean, low, high = (ends if x in OVER else curves)(members, key, x)
            color, line, marker = style(i)
            if x == "parameters" and len(xs) > 1:  # a power law: a straight line through the logarithms
                slope, offset = np.polyfit(np.log(xs), np.log(mean), 1)
                ax.plot(xs, np.exp(offset) * xs**slope, color=color, linewidth=0.8)
                label += f", about N^{slope:.3f}"
                line = "none"  # points alone
            marks = dict(marker=marker, markersize=4, markevery=max(1, len(xs) // 8))
            ax.plot(xs, mean, linestyle=line, color=color, label=label, **marks)
            ax.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            late = xs >= 0.2 * xs.max(initial=0) if x not in OVER else slice(None)
            settled += [*low[late], *high[late]]
        if x in OVER:
            ax.set_xscale("log")
        if x == "parameters":
            ax.set_yscale("log")
            labels = {f"{one['parameters'] / 1e6:.2g}M": one["parameters"] for one in runs}  # the shift adds some thousandths
            heights = np.geomspace(min(settled), max(settled), 6)
            ax.set_xticks(list(labels.values()), list(labels))
            ax.set_yticks(heights, [f"{height:.2f}" for height in heights])
            ax.minorticks_off()
        if key != "induction" and x not in OVER and settled:  # the first fall would leave no room for the differences
            margin = 0.05 * (max(settled) - min(settled)) or 0.1
            ax.set_ylim(min(settled) - margin, max(settled) + margin)
        ax.set(title=PANELS[key] + (" at the end" if x in OVER else ""), xlabel=AXES[x])
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats")
    label_of = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(label_of.values(), label_of.keys(), loc="outside lower center", ncols=min(3, len(label_of)), frameon=False)
    save_figure(figure, out)
    return ends_table(groups, x)


def curves(runs: list[dict], key: str, x: str):
    """x, and the runs' mean, lowest and highest figure `key` there, each (points,), as far as all of the runs go."""
    each = []
    for one in runs:
        steps, ys = np.array([(line["step"], line[key]) for line in one["lines"] if key in line], float).T
        xs = steps
        if x == "tokens":
            xs = steps * one["config"]["batch_size"] * one["config"]["block_size"]
        if x == "seconds":  # an evaluation between two lines of training lies between their times
            logged, seconds = zip((0, 0.0), *((line["step"], line["seconds"]) for line in one["lines"] if "seconds" in line),
                                  strict=True)
            known = steps <= logged[-1]
            xs, ys = np.interp(steps, logged, seconds)[known], ys[known]
        each.append((xs, ys))
    grid = np.unique(np.concatenate([xs for xs, _ in each]))
    grid = grid[(grid >= max(xs[0] for xs, _ in each)) & (grid <= min(xs[-1] for xs, _ in each))]
    values = np.array([np.interp(grid, xs, ys) for xs, ys in each])  # (runs, points)
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def ends(runs: list[dict], key: str, x: str):
    """Likewise, of the last figure `key` of each run, over its learning rate or its number of parameters."""
    at = {}
    for one in runs:
        at.setdefault(float(one[x] if x in one else one["config"][x]), []).append(last(one, key))
    xs = sorted(at)
    return np.array(xs), *(np.array([f(at[value]) for value in xs]) for f in (np.mean, np.min, np.max))


def last(one: dict, key: str) -> float:
    return [line[key] for line in one["lines"] if key in line][-1]


def ends_table(groups: dict[str, list[dict]], x: str = "steps") -> str:
    """A row for each group: means and standard deviations over its runs, and how far it is from the first group (of the
    same rate or size, where x is that, and the rows are in its order), seed by seed, with the standard error."""
    rows = []
    if x in OVER:
        groups = dict(sorted(groups.items(), key=lambda item: item[1][0].get(x, item[1][0]["config"].get(x))))
    for label, runs in groups.items():
        steps = sorted({last(one, "step") for one in runs})
        best = [min(line["val_loss"] for line in one["lines"] if "val_loss" in line) for one in runs]
        speed = [last(one, "tokens") / last(one, "seconds") for one in runs if any("tokens" in line for line in one["lines"])]
        row = [label, str(len(runs)), " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))]
        row += [spread([last(one, "val_loss") for one in runs]), spread(best), f"{np.mean(speed):,.0f}" if speed else ""]
        first = next(others for others in groups.values()
                     if all(others[0]["config"][name] == runs[0]["config"][name] for name in OVER.get(x, ())))
        rows.append(row + [difference(first, runs) if runs is not first else ""])
    against = f"the first of the same {AXES[x]}" if x in OVER else next(iter(groups))
    head = ["", "runs", "steps", "final val loss", "best val loss", "tokens/s", f"against {against}"]
    return table(head, rows) if len(rows) > 1 else table(head[:-1], [rows[0][:-1]])


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")


def difference(first: list[dict], runs: list[dict]) -> str:
    """How far the last val losses of `runs` are from those of `first`, if they have the same seeds and have all ended."""
    a, b = ({one["config"]["seed"]: last(one, "val_loss") for one in some} for some in (first, runs))
    ended = all(last(one, "step") == one["config"]["max_steps"] for one in first + runs)
    if a.keys() != b.keys() or len(a) < len(first) or len(b) < len(runs) or not ended:
        return ""
    by_seed = [b[seed] - a[seed] for seed in a]
    error = f" ± {np.std(by_seed, ddof=1) / len(by_seed) ** 0.5:.4f}" if len(by_seed) > 1 else ""
    return f"{np.mean(by_seed):+.4f}{error}"


# --- scalars

# the paper's Table 4: the 128 key/value heads of its 2.9B model
TABLE_4 = {"α1 > α2, β1 > β2": 50, "α1 <= α2, β1 > β2 (induction-like)": 17, "α1 > α2, β1 <= β2": 9, "α1 <= α2, β1 <= β2": 52}


def draw_scalars(folders, out, checkpoint: str = "best.pt") -> str:
    """Draws alpha and beta of the runs in `folders`, a row for each group; returns the counts of the paper's Table 4."""
    from matplotlib.figure import Figure

    runs = [read_scalars(folder / checkpoint) for folder in dict.fromkeys(map(Path, folders))]
    groups = group(runs)
    figure = Figure(figsize=(11, 0.4 + 3.5 * len(groups)), layout="constrained")
    columns = {"": list(TABLE_4), "paper, 2.9B": [f"{n} ({n / 128:.0%})" for n in TABLE_4.values()]}
    rows = figure.subplots(len(groups), 3, squeeze=False)
    for (keys, values, both), (label, members) in zip(rows, groups.items(), strict=True):
        alpha, beta = (np.concatenate([one[name] for one in members], axis=2) for name in ("alpha", "beta"))
        counts = count_heads(alpha, beta)
        columns[label] = [f"{n} ({n / sum(counts):.0%})" for n in counts]
        n_layer = len(alpha)
        layer = np.broadcast_to(np.arange(1, n_layer + 1)[:, None], alpha[:, 0].shape)
        colors = dict(c=layer, cmap="viridis", vmin=1, vmax=max(2, n_layer), s=18, alpha=0.8)
        keys.scatter(alpha[:, 0], alpha[:, 1], **colors)
        values.scatter(beta[:, 0], beta[:, 1], **colors)
        points = both.scatter(alpha[:, 0] - alpha[:, 1], beta[:, 0] - beta[:, 1], **colors)
        for ax, name in ((keys, "alpha"), (values, "beta")):
            ax.axline((0, 0), slope=1, color="black", linewidth=0.8)
            ax.axline((0, 1), slope=-1, color="black", linewidth=0.8, linestyle=":")
            ax.set(xlabel=rf"$\{name}_1$, the token's own", ylabel=rf"$\{name}_2$, the token's before")
        both.axhline(0, color="black", linewidth=0.8)
        both.axvline(0, color="black", linewidth=0.8)
        names = ("", "induction-like: ", "", "")
        for name, n, (across, up) in zip(names, counts, ((1, 1), (0, 1), (1, 0), (0, 0)), strict=True):
            both.text(0.02 + 0.96 * across, 0.02 + 0.96 * up, f"{name}{n}", transform=both.transAxes,
                      ha="right" if across else "left", va="top" if up else "bottom",
                      bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1})
        both.margins(0.2)  # room for the counts
        both.set(xlabel=r"$\alpha_1 - \alpha_2$", ylabel=r"$\beta_1 - \beta_2$")
        figure.colorbar(points, ax=both, label="layer", ticks=np.unique(np.linspace(1, n_layer, min(n_layer, 8)).round()))
        keys.set_title(label)
        values.set_title("dotted: the sum is 1, as at the start", fontsize=9)
    save_figure(figure, out)
    return table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def read_scalars(path: Path) -> dict:
    """The config of a checkpoint, and its alpha and beta as they are used, each (layers, window, key/value heads, or their
    channels)."""
    checkpoint = load_checkpoint(path)
    shifts = [block.attn.shift for block in load_model(checkpoint, "cpu").blocks]
    if any(shift is None or shift.alpha is None or shift.beta is None for shift in shifts):
        raise UserError(f"{path} has kv_shift={checkpoint['config']['kv_shift']}: only kv and qkv have both alpha and beta")
    with torch.no_grad():
        alpha = np.stack([shift.weights(shift.alpha).float().numpy() for shift in shifts])
        beta = np.stack([shift.weights(shift.beta).float().numpy() for shift in shifts])
    return {"config": checkpoint["config"], "alpha": alpha, "beta": beta}


def count_heads(alpha: np.ndarray, beta: np.ndarray) -> list[int]:
    """How many heads are in each row of TABLE_4."""
    own_key, own_value = alpha[:, 0] > alpha[:, 1], beta[:, 0] > beta[:, 1]
    return [int(np.sum((own_key == a) & (own_value == b))) for b in (True, False) for a in (True, False)]


if __name__ == "__main__":
    run(main)
