"""Multi-hop induction (Figure 9): models of several depths, with and without KV shift.

    python experiments/hop.py                            minutes on a CPU
    python experiments/hop.py config/toy_hop_paper.py    the paper's size, for one GPU

Prints a table and writes out/toy/hop.png and hop.jsonl (every evaluation).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import parse, run
from induction_toy import SharedConfig, draw_panels, model_name, train_all
from model import GPTConfig
from plot import table

import numpy as np
import torch
import torch.nn.functional as F


@dataclass
class HopConfig(SharedConfig):
    seeds: int = 1  # train every model with the seeds 1, 2, ..., seeds
    max_hops: int = 4  # most hops
    letters: int = 4  # letters of the alphabet
    length: int = 50  # letters in a sequence
    max_layers: int = 4  # the models have 2, 3, ..., max_layers layers
    max_steps: int = 1000  # optimizer steps
    learning_rate: float = 2e-3  # constant after warm-up
    warmup_steps: int = 20  # steps of linear warm-up
    eval_every: int = 100  # steps between evaluations


def hop_batch(config: HopConfig, seed: int, step: int, size: int):
    """X are random letters. find(i) = the largest j <= i with X[j - 1] = X[i]. The answer at i is
    X[find(find(... i))], with k times find, or a blank if some find finds nothing.

    The first token is k. Ids: the letters, the blank (only a target), one for each k. The model is
    trained on all answers and evaluated on letters: blanks are easy. Returns idx, targets, mask,
    each (B, length + 1).
    """
    rng = np.random.default_rng([seed, step])
    letters, blank = config.letters, config.letters
    k = torch.from_numpy(rng.integers(1, config.max_hops + 1, (size, 1)))
    x = torch.from_numpy(rng.integers(0, letters, (size, config.length)))
    positions = torch.arange(config.length)
    # for each letter, the largest j <= i with X[j - 1] = letter, or 0: (B, length, letters)
    latest = F.one_hot(x[:, :-1], letters) * positions[1:, None]
    latest = F.pad(latest, (0, 0, 1, 0)).cummax(dim=1).values
    find = latest.gather(2, x[..., None])[..., 0]  # (B, length); find[0] = 0: it stays there
    at = positions.expand(size, -1)
    for hop in range(config.max_hops):
        at = torch.where(hop < k, find.gather(1, at), at)
    targets = F.pad(torch.where(at > 0, x.gather(1, at), blank), (1, 0), value=-1)
    return torch.cat([blank + k, x], dim=1), targets, (targets >= 0) & (targets != blank)


def score(config: HopConfig, correct, idx, mask) -> dict:
    """Accuracy over all answers that are letters, and the error for 1, 2, ..., max_hops hops."""
    errors = [1 - correct[mask & (idx[:, :1] == config.letters + k)].float().mean().item()
              for k in range(1, config.max_hops + 1)]
    return {"accuracy": correct[mask].float().mean().item(), "errors": errors}


def main():
    c = parse(HopConfig)
    hops = range(1, c.max_hops + 1)
    models = [GPTConfig(c.length + 1, c.letters + 1 + c.max_hops, n_layer, c.n_head, n_embd=c.width,
                        tie_embeddings=False, kv_shift=kv_shift)
              for n_layer in range(2, c.max_layers + 1) for kv_shift in ("none", "kv")]
    models = {model_name(model): model for model in models}
    results = train_all(c, "hop", models, partial(hop_batch, c), partial(score, c))
    errors = {name: [evals[-1]["errors"] for evals in seeds] for name, seeds in results.items()}
    path = draw_panels(c, "hop", models, "n_layer", hops, errors, guess=1 - 1 / c.letters,
                       xlabel="hops", xticks=hops, ylabel="error", ylim=(-0.02, 0.9))
    rows = [[name, *(f"{error:.3f}" for error in np.median(values, axis=0))]
            for name, values in errors.items()]
    head = ["error (median of the seeds)", *(f"{k} hop{'s' * (k > 1)}" for k in hops)]
    print(f"\n{table(head, rows)}\n\nFigure: {path}")


if __name__ == "__main__":
    run(main)
