"""What the heads of one trained KV-shift layer attend to, and the weights that they learned.

    python experiments/heads.py    seconds

Trains the layer on the induction data of induction_toy.py (all its options work here, too), prints
a table and writes out/toy/heads.png.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import parse, run
from induction_toy import EVAL_SEED, ToyConfig, induction_batch, make_models, train, with_defaults
from model import GPT
from plot import new_figure, save_figure, table

import torch
import torch.nn.functional as F


def main():
    config = with_defaults(parse(ToyConfig), "depth")
    torch.manual_seed(1)
    model = GPT(make_models(config)["1 layer, KV shift"])
    for e in train(config, model, partial(induction_batch, config), seed=1):
        print(f"step {e['step']}: accuracy {e['accuracy']:.1%}", flush=True)
    model.cpu()
    scores = induction_scores(model, *induction_batch(config, EVAL_SEED, 1, 64))
    period = config.max_prefix
    idx = torch.arange(config.length)[None] % period  # tokens 0, 1, ..., period - 1, 0, 1, ...
    weights = attention_weights(model, idx)[0].detach().numpy()
    alpha, beta = (model.blocks[0].attn.shift[name].weight[..., 0].T.tolist() for name in "kv")

    rows, n = [], config.n_head
    figure = new_figure(2.6 * n, 3.8)
    for h, ax in enumerate(figure.subplots(1, n, sharey=True, squeeze=False)[0]):
        rows.append([str(h + 1), *(f"{w:.2f}" for w in (*alpha[h], *beta[h], scores[h]))])
        ax.imshow(weights[h], cmap="Greys", vmin=0, vmax=1)
        ax.set_title("head {}\nalpha = {}, {}\nbeta = {}, {}".format(*rows[-1]), fontsize=9)
        ax.set(xlabel="attended position", ylabel="position")
        ax.label_outer()
    figure.suptitle(f"Attention on {period} tokens that repeat (white 0, black 1)", fontsize=10)
    path = Path(config.out_dir, "heads.png")
    save_figure(figure, path)
    print("\n" + table(["head", "alpha1", "alpha2", "beta1", "beta2", "induction score"], rows))
    print("\nInduction score: mean attention to the positions that follow a copy of the current "
          f"token.\nFigure: {path}")


def attention_weights(model: GPT, idx):
    """The attention of the first layer: idx (B, T) -> (B, H, T, T), rows sum to 1."""
    weights, attend = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):  # the weighted sum of unit vectors is the weights
        units = torch.eye(v.size(2)).to(v).expand(*v.shape[:3], -1)
        weights.append(attend(q, k, units, **options))
        return attend(q, k, v, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", watched):
        model(idx)
    return weights[0]


@torch.no_grad()
def induction_scores(model: GPT, idx, targets, mask) -> list[float]:
    """For each head, its mean attention (over the mask) to positions s <= t that follow a copy of
    the current token: x[s - 1] = x[t]."""
    follows = F.pad(idx[:, None, :-1] == idx[:, :, None], (1, 0)).tril()  # (B, t, s)
    attention = (attention_weights(model, idx) * follows[:, None]).sum(dim=-1)  # (B, H, T)
    return attention.transpose(1, 2)[mask].mean(dim=0).tolist()


if __name__ == "__main__":
    run(main)
