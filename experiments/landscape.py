"""Theorem 3 (Figure 2): gradient descent on alpha and beta ends at the induction head.

    python experiments/landscape.py    seconds

Writes out/toy/landscape.png: the loss in closed form, and the paths of gradient descent on the
loss of KV-shifting attention itself.

One head with identity projections and no positions reads T distinct one-hot tokens, then token x_i
again (1 < i < T - 1). It shall predict x_{i+1}. The weights of the previous token are
alpha2 = 1 - alpha1 and beta2 = 1 - beta1; the induction head is alpha1 = 0, beta1 = 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import parse, run
from plot import new_figure, save_figure, table

import numpy as np
import torch
import torch.nn.functional as F

SIZES = (8, 32, 128)  # values of T
STARTS = ((0.5, 0.5), (0.9, 0.1), (0.9, 0.9), (0.5, 0.1), (0.15, 0.15))  # (alpha1, beta1)


@dataclass
class LandscapeConfig:
    out_dir: str = "out/toy"  # folder of the figure


def main():
    path = Path(parse(LandscapeConfig).out_dir, "landscape.png")
    figure, rows = new_figure(11, 4.5), []
    for ax, T in zip(figure.subplots(1, len(SIZES), sharey=True), SIZES, strict=True):
        draw_loss(ax, T)
        for start in STARTS:
            points, losses = descend(start, T)
            ax.plot(*points.T, color="#D55E00", linewidth=2.5, clip_on=False,
                    label="gradient descent")
            ax.plot(*start, "o", color="#D55E00", markerfacecolor="white", label="its start")
            rows.append([str(T), "({:.2f}, {:.2f})".format(*start),
                         "({:.2f}, {:.2f})".format(*points[-1]), str(len(points) - 1),
                         f"{losses[0]:.4f}", f"{losses[-1]:.4f}"])
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[:3], labels[:3], loc="outside lower center", ncols=3, frameon=False,
                  title="color: loss, lighter is lower; gray: direction of the negative gradient")
    save_figure(figure, path)
    print(table(["T", "start (alpha1, beta1)", "end", "steps", "first loss", "last loss"], rows))
    print(f"\nFigure: {path}")


def closed_form_loss(alpha1, alpha2, beta1, beta2, T: int):
    """The loss of Theorem 3, for numbers or arrays.

    The query x_i has the score alpha1 at the two positions of x_i, alpha2 at the position after
    the first one, and 0 at the T - 2 others. In print, the logit of x_{i-1} and x_T has e^alpha2.
    But their values are the shifted part at the positions of x_i, where attention is e^alpha1 / S.
    """
    a1, a2 = np.exp(alpha1), np.exp(alpha2)
    S = 2 * a1 + a2 + (T - 2)
    x_i = (2 * beta1 * a1 + beta2 * a2) / S
    answer = (beta1 * a2 + beta2) / S  # x_{i+1}
    before = (beta1 + beta2 * a1) / S  # x_{i-1}, and also x_T
    other = (beta1 + beta2) / S  # each of the T - 4 others
    exps = np.exp(x_i) + np.exp(answer) + 2 * np.exp(before) + (T - 4) * np.exp(other)
    return np.log(exps) - answer


def attention_loss(alpha, beta, T: int, i: int):
    """The same loss, computed by attention on one-hot embeddings: alpha (2,), beta (2,) -> scalar.
    Tokens count from 0 here: 1 <= i <= T - 3."""
    x = torch.eye(T, dtype=alpha.dtype)[[*range(T), i]]  # (T + 1, T)
    previous = F.pad(x, (0, 0, 1, 0))[:-1]
    k = alpha[0] * x + alpha[1] * previous
    v = beta[0] * x + beta[1] * previous
    logits = (k @ x[-1]).softmax(dim=0) @ v
    return F.cross_entropy(logits, torch.tensor(i + 1))


def descend(start, T: int):
    """Gradient descent on attention_loss, within [0, 1], until it no longer moves.

    Returns the points (alpha1, beta1), (n, 2), and their losses, (n,)."""
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    points, losses = [], []
    while len(points) < 2 or points[-1] != points[-2]:
        loss = attention_loss(torch.stack([p[0], 1 - p[0]]), torch.stack([p[1], 1 - p[1]]), T, i=1)
        points.append(p.tolist())
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, p)
        with torch.no_grad():
            p.sub_(0.02 * T * gradient).clamp_(0, 1)  # the gradient shrinks like 1 / T
    return np.array(points), losses


def draw_loss(ax, T: int):
    side = np.linspace(0, 1, 101)
    a, b = np.meshgrid(side, side)
    loss = closed_form_loss(a, 1 - a, b, 1 - b, T)
    down_b, down_a = np.gradient(-loss, side, side)
    ax.contourf(a, b, loss, levels=14, cmap="Blues")
    ax.streamplot(side, side, down_a, down_b, color="gray", density=0.5, linewidth=0.8)
    ax.plot(0, 1, "*", color="black", markersize=16, clip_on=False, linestyle="none",
            label="induction head")
    ax.set(title=f"T = {T}", xlabel="alpha1 = 1 - alpha2", ylabel="beta1 = 1 - beta2",
           xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.label_outer()


if __name__ == "__main__":
    run(main)
