"""How fast training and decoding are, with and without KV shift. About three minutes on a CPU.

    python experiments/bench.py                                      two small models
    python experiments/bench.py --nanogpt=../nanoGPT                 beside a clone of nanoGPT
    python experiments/bench.py config/gpt2.py --micro_batch_size=4  the model of a preset

A training step is one micro-batch forward and backward, gradient clipping and the optimizer. The
models are measured in turn, A B A B. The table has medians over the rounds, and medians of the
ratios within each round.
"""

import contextlib
import importlib.util
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import UserError, parse, parse_options, run
from data import atomic_write
from experiments.estimate import peak_flops
from model import GPT
from plot import table
from train import TrainConfig, choose_device, make_optimizers

import torch

NAMES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size")
SIZES = [dict(zip(NAMES, size, strict=True)) for size in (
    (4, 4, 128, 64, 65, 12),  # nanoGPT's for a CPU
    (4, 4, 256, 256, 256, 8))]
COMPILE_SECONDS = 20  # to compile a model on a CPU; only for the expected time


@dataclass
class BenchConfig(TrainConfig):
    rounds: int = 9  # measurements of each model
    seconds: float = 0.5  # approximate length of a measurement
    nanogpt: str = ""  # folder of a clone of github.com/karpathy/nanoGPT, to measure it as well
    json: str = ""  # file for the results of all rounds


def main():
    config = parse(BenchConfig)
    if config.rounds < 1:
        raise UserError(f"rounds={config.rounds} must be at least 1")
    options, presets = parse_options(BenchConfig, None, "config/file.py")
    configs = [replace(config, **size) for size in SIZES]
    if presets or options.keys() & {*NAMES}:
        configs = [replace(config, vocab_size=config.vocab_size or 256)]
    device, dtype = choose_device(config.device, config.dtype)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    modes = [False, True] if config.compile is None else [config.compile]
    n_measurements = len(configs) * len(modes) + 2
    kinds = list(make_models(configs[0], "meta"))
    seconds = len(kinds) * (n_measurements * config.rounds * config.seconds
                            + COMPILE_SECONDS * len(configs) * (True in modes))
    print(f"{device_name}, {torch.get_num_threads()} threads, {dtype}, torch {torch.__version__}, "
          f"Python {platform.python_version()}\n{n_measurements} measurements of "
          f"{', '.join(kinds)}, about {seconds / 60:.1f} minutes\n", flush=True)
    torch.set_float32_matmul_precision("high")

    def measurements():
        for c in configs:
            for compiled in modes:
                yield from training(c, device, dtype, compiled, peak_flops(device_name))
        yield from decoding(configs[0], device, dtype)

    head = ["", *kinds, *(f"{kinds[1]} / {kind}" for kind in kinds if kind != kinds[1])]
    results = {}  # name of a measurement -> kind of model -> values of the rounds
    for name, values in measurements():
        results[name] = values
        cells = zip(head, row(name, values), strict=True)
        print(", ".join(f"{label} {cell}".strip() for label, cell in cells), flush=True)
    print("\n" + table(head, [row(name, values) for name, values in results.items()]))
    if config.json:
        with atomic_write(config.json) as f:
            f.write(json.dumps({"config": asdict(config), "device": device_name,
                                "torch": torch.__version__, "results": results}, indent=1).encode())


def row(name: str, values: dict[str, list[float]]) -> list[str]:
    """Medians of all models, and the ratios of the second one to the others."""
    _, shifted, *_ = values
    medians = [median(v) for v in values.values()]
    ratios = [median(a / b for a, b in zip(values[shifted], values[kind], strict=True))
              for kind in values if kind != shifted]
    return [name, *(f"{m:,.0f}" if m >= 1000 else f"{m:.4g}" for m in medians),
            *(f"{ratio:.3f}" for ratio in ratios)]


def make_models(config: BenchConfig, device) -> dict[str, torch.nn.Module]:
    """kind -> a vanilla model, one with KV shift, and nanoGPT's if config.nanogpt."""
    models = {}
    for kv_shift in ("none", config.kv_shift if config.kv_shift != "none" else "kv"):
        models[f"kv_shift={kv_shift}"] = GPT(replace(config, kv_shift=kv_shift))
    if config.nanogpt:
        path = Path(config.nanogpt) / "model.py"
        if not path.is_file():
            raise UserError(f"no {path}: nanogpt must be the folder of a clone of nanoGPT")
        spec = importlib.util.spec_from_file_location("nanogpt", path)
        nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        with contextlib.redirect_stdout(None):  # it prints its size
            models["nanoGPT"] = nanogpt.GPT(nanogpt.GPTConfig(
                block_size=config.block_size, vocab_size=config.vocab_size,
                n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                dropout=config.dropout, bias=False))
    return {kind: model.to(device) for kind, model in models.items()}


def training(config, device, dtype, compiled: bool, peak: float | None):
    """Times of a training step; on a GPU also tokens/s, and the MFU if its peak FLOP/s is known."""
    batch_size = config.micro_batch_size or config.batch_size
    models, tokens = make_models(config, device), batch_size * config.block_size
    seconds = in_turn({kind: training_step(model, config, batch_size, device, dtype, compiled)
                       for kind, model in models.items()}, config, device)
    name = f"{'compiled' if compiled else 'eager'} training step"
    size = (f"{config.n_layer} layers, width {config.n_embd}, context {config.block_size}, "
            f"batch {batch_size}")
    yield f"{name} (ms), {size}", convert(seconds, lambda s: 1e3 * s)
    if device.type == "cuda":
        yield f"{name} (tokens/s), {size}", convert(seconds, lambda s: tokens / s)
    if peak:
        flops = models["kv_shift=none"].flops_per_token() * tokens
        yield f"{name} (MFU), {size}", convert(seconds, lambda s: flops / s / peak)


def training_step(model, config, batch_size: int, device, dtype, compiled: bool):
    """A function that does one training step on random tokens."""
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=device)
    optimizers = make_optimizers(model, config)
    fast_model = torch.compile(model, dynamic=False) if compiled else model

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = fast_model(x, y)
        if isinstance(loss, tuple):  # nanoGPT returns logits and loss
            loss = loss[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def decoding(config, device, dtype):
    """Tokens/s to read block_size - 1 tokens at once (prefill), and to generate up to 64 tokens one
    by one (decode). Decoding reads all weights for each token, so the rate of reading memory,
    divided by their size, is a bound, unless they fit in a cache."""
    models = {kind: m.to(dtype).eval() for kind, m in make_models(config, device).items()}
    text = torch.zeros(1, config.block_size, dtype=torch.long, device=device)
    n = min(64, config.block_size - 1)
    seconds = in_turn({kind: partial(m.generate, text[:, 1:], 1) for kind, m in models.items()},
                      config, device)
    yield "prefill (tokens/s)", convert(seconds, lambda s: (config.block_size - 1) / s)
    seconds = in_turn({kind: partial(m.generate, text[:, :1], n) for kind, m in models.items()},
                      config, device)
    yield "decode (tokens/s)", convert(seconds, lambda s: n / s)
    a, b = torch.ones(2, 2**28, dtype=torch.uint8, device=device)
    bytes_per_s = 2 * len(a) / min(clock(lambda: b.copy_(a), 1, device) for _ in range(5))
    yield "bound of decode by memory (tokens/s)", {
        kind: [bytes_per_s / sum(p.numel() * p.element_size() for p in m.parameters())]
        for kind, m in models.items()}


def convert(seconds: dict[str, list[float]], f) -> dict[str, list[float]]:
    return {kind: [f(s) for s in values] for kind, values in seconds.items()}


def in_turn(actions: dict, config: BenchConfig, device) -> dict[str, list[float]]:
    """The seconds that each action takes, in each round."""
    repeats, seconds = {}, {kind: [] for kind in actions}
    for kind, action in actions.items():
        clock(action, 3, device)  # compiles
        repeats[kind] = max(1, round(config.seconds / clock(action, 1, device)))
    for _ in range(config.rounds):
        for kind, action in actions.items():
            seconds[kind].append(clock(action, repeats[kind], device))
    return seconds


def clock(action, repeats: int, device) -> float:
    """The mean seconds of an action."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    run(main)
