"""Evaluates a trained model."""

from data import Corpus, val_starts

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


def evaluation_sets(corpus: Corpus, block_size: int, tokens: int, start: int, induction: bool):
    """name -> inputs and targets (n, block_size), -1 where there is no target.

    val_loss: adjacent windows of the val split, `tokens` tokens (0: all) from `start` on. With
    induction also random tokens, block_size / 2 of them and then the same again: val_random has
    the first ones as targets, val_induction the repetition, which an induction head predicts.
    """
    T = block_size
    windows = corpus.windows("val", val_starts(corpus, T, tokens, start), T)
    sets = {"val_loss": (windows[:, :-1], windows[:, 1:])}
    if induction:  # ids that occur in the windows, without a separator
        once = np.random.RandomState(0).choice(np.unique(windows), (64, T // 2))
        ids = np.full((64, T + 1), -1)
        ids[:, : 2 * (T // 2)] = np.concatenate([once, once], axis=1)
        position = np.arange(1, T + 1)
        for name, mask in (("val_random", position < T // 2), ("val_induction", position > T // 2)):
            sets[name] = ids[:, :-1].clip(min=0), np.where(mask, ids[:, 1:], -1)
    return {name: tuple(map(torch.from_numpy, pair)) for name, pair in sets.items()}


@torch.no_grad()
def evaluate(model, eval_sets: dict, batch_size: int) -> dict[str, float]:
    """Mean loss in nats on each evaluation set; all processes share the work."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    model.eval()
    losses = {}
    for name, (inputs, targets) in eval_sets.items():
        n_targets = (targets != -1).sum().item()
        # pad to equal batches: one compiled shape, and equally many in each process
        padding = (0, 0, 0, -len(inputs) % (batch_size * world_size))
        inputs, targets = F.pad(inputs, padding), F.pad(targets, padding, value=-1)
        batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
        total = torch.zeros((), device=device)
        for x, y in batches[rank::world_size]:
            total += model(x.to(device), y.to(device), reduction="sum")
        if dist.is_initialized():
            dist.all_reduce(total)
        losses[name] = total.item() / n_targets
    model.train()
    return losses
