"""What a training run needs: parameters, FLOPs, time and memory. It trains nothing.

    python experiments/estimate.py config/paper_19b.py [--key=value]     all options of train.py

The table has numbers of GPUs that train.py accepts. Without the corpus, pass --vocab_size=N.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse, run
from data import FOLDER, Corpus
from model import GPT
from plot import table
from train import TrainConfig

import torch

# Dense bfloat16 FLOP/s of a device (float16 where it lacks bfloat16), from the data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12}


@dataclass
class EstimateConfig(TrainConfig):
    mfu: float = 0.4  # model FLOPs utilization: the fraction of the H100's peak that is reached


def main():
    config = parse(EstimateConfig)
    if not 0 < config.mfu <= 1:
        raise UserError(f"mfu={config.mfu} must be in (0, 1]")
    config.vocab_size = config.vocab_size or Corpus(FOLDER / config.dataset).vocab_size
    with torch.device("meta"):  # no memory for the weights
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters())
    n_block = sum(p.numel() for p in model.blocks[0].parameters())
    n_root = n - config.n_layer * n_block  # the embeddings and the last norm
    n_moments = 2 * n  # AdamW has two moments per weight, Muon one
    if config.optimizer == "muon":
        n_moments -= sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    tokens = config.max_steps * config.batch_size * config.block_size
    flops, peak = model.flops_per_token() * tokens, PEAK_FLOPS["H100"]
    print(f"""{n:,} parameters, {n - n_root:,} without embeddings
{tokens / 1e9:.3g}B tokens, {flops:.3g} FLOPs, ckpt.pt {4 * (n + n_moments) / 1e9:.3g} GB
time: at {config.mfu:.0%} of an H100's {peak / 1e12:.0f} TFLOP/s
memory: weights, gradients and {config.optimizer} in float32, weights in bfloat16, activations\n""")
    states, rows = 4 * (2 * n + n_moments), []
    # FSDP gathers two blocks and the embeddings in bfloat16, and reduces gradients in float32
    gathered = 2 * (2 * n_block + n_root) + (2 + 4) * max(n_block, n_root)
    for gpus in (1, 8, 64, 512):
        micro_batch = config.micro_batch_size or max(1, config.batch_size // gpus)
        if config.batch_size % (gpus * micro_batch) == 0:  # train.py refuses other numbers
            hours = flops / (gpus * config.mfu * peak) / 3600
            activations = activation_bytes(config, micro_batch)
            ddp, fsdp = states + 2 * n + activations, states / gpus + gathered + activations
            rows.append([str(gpus), str(micro_batch),
                         f"{hours:.2g} hours" if hours < 48 else f"{hours / 24:,.1f} days",
                         f"{ddp / 1e9:,.1f} GB",
                         f"{fsdp / 1e9:,.1f} GB" if config.optimizer == "adamw" else "AdamW only"])
    print(table(["GPUs", "micro-batch", "time", "memory, DDP", "memory, FSDP"], rows))


def activation_bytes(c: TrainConfig, micro_batch: int) -> int:
    """About what a compiled forward pass keeps for the backward pass, in bytes: in each block two
    residual streams (float32), norms, q, k, v before and after shift, attention, MLP (bfloat16)."""
    kv, hidden = 2 * (c.n_kv_head or c.n_head) * c.head_dim, c.ffn_size or 8 * c.n_embd // 3
    block = 2 * 4 * c.n_embd + 2 * (5 * c.n_embd + 2 * kv + 3 * hidden)
    per_token = block * c.n_layer + (2 + 2) * c.vocab_size  # logits and their gradient
    if c.recompute:  # the inputs of the blocks, and one block at a time; the loss in chunks
        per_token = 4 * c.n_embd * c.n_layer + block
    return micro_batch * c.block_size * per_token


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by the name that torch gives it; None if unknown."""
    words = f" {device_name.replace('-', ' ')} "  # whole words: an L40 is no L4
    return next((flops for name, flops in PEAK_FLOPS.items() if f" {name} " in words), None)


if __name__ == "__main__":
    run(main)
