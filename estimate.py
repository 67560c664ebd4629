"""What training takes, before it is begun: arithmetic, memory, days. `python train.py config/x.py --dry_run=True` prints it."""

import torch

from model import GPT, GPTConfig


def estimate_flops(config: GPTConfig) -> int:
    """Floating-point operations to train on one token: 6 N for the N weights in matrix products (2 forward, 4 backward)
    and 12 n_layer H D T for attention over a full context (PaLM, arXiv 2204.02311, Appendix B). Causal masking is not
    discounted, the mix of KV shift (under 0.1%) not counted."""
    c = config
    attention = c.n_embd * (c.n_head + 2 * c.n_kv_head) * c.head_dim + c.n_embd * c.n_embd
    weights = c.n_layer * (attention + 3 * c.n_embd * c.ffn_size) + c.n_embd * c.padded_vocab_size
    return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


# Dense bfloat16 FLOP/s of one device (float16 where there is no bfloat16), from the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "A40": 150e12,
    "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250X": 383e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by the name that torch gives it, None where it is unknown."""
    words = f" {device_name.replace('-', ' ')} "  # whole words: an RTX A4000 is no A40
    return next((flops for name, flops in PEAK_FLOPS.items() if f" {name} " in words), None)


def print_dry_run(config):
    """What a run of this TrainConfig would take, without a weight being allocated."""
    with torch.device("meta"):
        model = GPT(config)
    n = sum(p.numel() for p in model.parameters())
    n_embeddings = sum(p.numel() for p in {model.embed.weight, model.head.weight})
    flops, tokens = estimate_flops(config), config.batch_size * config.block_size * config.max_steps
    print(f"parameters: {n:,} ({n / 1e9:.2f}B), {n - n_embeddings:,} without embeddings")
    print(f"{flops / 1e9:,.1f} GFLOPs a token (forward, backward, attention); {config.max_steps:,} steps of "
          f"{config.batch_size * config.block_size:,} tokens = {tokens / 1e9:,.1f}B tokens, {flops * tokens:.2e} FLOPs")
    print(f"on disk: ckpt.pt {12 * n / 1e9:,.1f} GB, which the first process puts together in its memory, and best.pt "
          f"{4 * n / 1e9:,.1f} GB; twice that while they are replaced")
    print(f"days at {config.dry_run_mfu:.0%} of {PEAK_FLOPS['H100'] / 1e12:.0f} TFLOP/s (an H100's bfloat16 peak), and memory a "
          "GPU: float32 weights, gradients and\ntwo AdamW moments (16 bytes a parameter), bfloat16 copies of the weights in use, "
          "and about what a forward pass keeps")
    print(f"\n{'GPUs':>5} {'days':>9} {'GB, DDP':>9} {'GB, FSDP':>9} {'sequences a pass':>18}")
    for gpus in (1, 8, 64, 512):
        share = config.batch_size // gpus
        if config.batch_size % gpus:
            print(f"{gpus:>5} {'-':>9} {'-':>9} {'-':>9}   batch_size={config.batch_size} can't be shared out")
            continue
        B = min(config.micro_batch_size or share, share)
        kept = activation_bytes(config, B)
        block = 2 * sum(p.numel() for p in model.blocks[0].parameters()) + n_embeddings  # gathered: two blocks and the root
        days = flops * tokens / (gpus * PEAK_FLOPS["H100"] * config.dry_run_mfu) / 86_400
        print(f"{gpus:>5} {days:>9,.1f} {(18 * n + kept) / 1e9:>9,.1f} {(16 * n / gpus + 2 * block + kept) / 1e9:>9,.1f} {B:>18}")


def activation_bytes(config, B: int) -> int:
    """About what a forward pass over B sequences keeps for the backward pass, in bytes, in bfloat16 and compiled."""
    c, tokens = config, B * config.block_size
    kv = 2 * c.n_kv_head * c.head_dim
    # a block's input and middle (float32), both norms' outputs, q k v before and after shift and rotation, attention's
    # output, gate and up and their product: two bytes each
    block = tokens * (2 * 4 * c.n_embd + 2 * (2 * c.n_embd + 2 * (c.n_embd + kv) + c.n_embd + 3 * c.ffn_size))
    blocks = tokens * 4 * c.n_embd * c.n_layer + block if c.recompute else block * c.n_layer
    return blocks + tokens * c.padded_vocab_size * (2 + 2)  # logits and their gradient: a compiled loss keeps no float32 copy
