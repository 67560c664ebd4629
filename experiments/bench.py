"""How fast training and decoding are, with and without KV shift. About three minutes on a CPU.

    python experiments/bench.py                                      two small models
    python experiments/bench.py --nanogpt=../nanoGPT                 beside a clone of nanoGPT
    python experiments/bench.py config/gpt2.py --micro_batch_size=4  the model of a preset
    python experiments/bench.py config/gpt2.py --measure=decoding    no training

The models run in turn, A B A B. The table has medians over the rounds, and medians of the ratios
within each round. A training step is one micro-batch, gradient clipping and the optimizer.
"""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import choose_device
from config import UserError, parse, run
from data import atomic_write
from experiments.estimate import peak_flops
from model import GPT
from plot import table
from train import TrainConfig, make_optimizers

import torch

SIZES = [  # the first one is nanoGPT's for a CPU
    dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, batch_size=12),
    dict(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=256, batch_size=8)]


@dataclass
class BenchConfig(TrainConfig):
    rounds: int = 9  # measurements of each model
    seconds: float = 0.5  # approximate length of a measurement
    measure: Literal["all", "training", "decoding"] = "all"  # what to measure
    nanogpt: str = ""  # folder of a clone of github.com/karpathy/nanoGPT, to measure it as well
    json: str = ""  # file for the results of all rounds


def main():
    config = parse(BenchConfig)
    configs = [replace(config, **size) for size in SIZES]
    if any(getattr(config, name) != getattr(BenchConfig, name) for name in SIZES[0]):
        configs = [replace(config, vocab_size=config.vocab_size or 256)]  # a preset, or options
    device, _ = choose_device(config.device, config.dtype)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    torch.set_float32_matmul_precision("high")
    modes = [False, True] if config.compile is None else [config.compile]
    plan = []
    if config.measure != "decoding":
        plan += [partial(training, c, mode) for c in configs for mode in modes]
    if config.measure != "training":
        plan += [partial(decoding, configs[0], n) for n in (1, 8)]
    kinds = list(make_models(configs[0], "meta"))
    seconds = len(plan) * len(kinds) * (config.rounds * config.seconds + 8)  # 8: to compile
    print(f"{device_name}, {torch.get_num_threads()} threads: {len(plan)} measurements of "
          f"{', '.join(kinds)}, about {seconds / 60:.1f} minutes\n", flush=True)
    others = [kind for kind in kinds if kind != kinds[1]]
    head = ["", *kinds, *(f"time of {kinds[1]} / {kind}" for kind in others)]
    results, rows = {}, []  # results: name of a measurement -> kind of model -> value per round
    for measure in plan:
        for name, speeds in measure().items():
            results[name] = speeds
            ratios = [median(map(truediv, speeds[kind], speeds[kinds[1]])) for kind in others]
            medians = [f"{median(v):.5g}" for v in speeds.values()]
            rows.append([name, *medians, *(f"{ratio:.3f}" for ratio in ratios)])
            print(", ".join(map(" ".join, zip(head, rows[-1], strict=True))).strip(), flush=True)
    print("\n" + table(head, rows))
    if config.json:
        with atomic_write(config.json) as f:
            f.write(json.dumps({"device": device_name, "results": results}).encode())


def make_models(config: BenchConfig, device) -> dict[str, torch.nn.Module]:
    """kind -> a vanilla model, one with KV shift, and nanoGPT's if config.nanogpt."""
    shifted = config.kv_shift if config.kv_shift != "none" else "kv"
    models = {f"kv_shift={kind}": GPT(replace(config, kv_shift=kind)) for kind in ("none", shifted)}
    if config.nanogpt:
        nanogpt = load_nanogpt(config.nanogpt)
        sizes = {name: getattr(config, name) for name in SIZES[0] if name != "batch_size"}
        models["nanoGPT"] = nanogpt.GPT(nanogpt.GPTConfig(bias=False, **sizes))
    return {kind: model.to(device) for kind, model in models.items()}


def load_nanogpt(folder: str):
    """The module model.py of a clone of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt", f"{folder}/model.py")
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    nanogpt.print = lambda *values: None  # it prints its size
    return nanogpt


def training(config, compiled: bool) -> dict:
    """Tokens/s of training steps; on a known GPU also the MFU."""
    device, dtype = choose_device(config.device, config.dtype, config.n_embd, training=True)
    models = make_models(config, device)
    speeds = time_steps(models, config, device, dtype, compiled)
    name = (f"{'compiled' if compiled else 'eager'}, {str(dtype)[6:]}, {config.n_layer} layers, "
            f"width {config.n_embd}, context {config.block_size}, batch "
            f"{config.micro_batch_size or config.batch_size}")
    results = {f"{name} (tokens/s)": speeds}
    if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device))):
        mfu = models["kv_shift=none"].flops_per_token() / peak
        results[f"{name} (MFU)"] = {kind: [mfu * v for v in speeds[kind]] for kind in speeds}
    return results


def time_steps(models: dict, config, device, dtype, compiled: bool) -> dict[str, list[float]]:
    """Tokens/s of training steps of each model, in each round."""
    batch_size = config.micro_batch_size or config.batch_size
    x, y = torch.randint(config.vocab_size, (2, batch_size, config.block_size), device=device)

    def step(model, fast_model, optimizers):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = fast_model(x, y)
        loss = loss[1] if isinstance(loss, tuple) else loss  # nanoGPT returns logits and loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    steps = {kind: partial(step, m, torch.compile(m, dynamic=False) if compiled else m,
                           make_optimizers(m, config, dtype)) for kind, m in models.items()}
    return in_turn(steps, x.numel(), config, device)


@torch.no_grad()
def decoding(config, batch_size: int) -> dict:
    """Tokens/s of reading a prompt of half the context, and of the tokens after it, one by one.
    nanoGPT has no cache: it reads the prompt again for each token. For each token all weights are
    read, and the keys and values of the prompt: the rate of copying memory gives a bound, unless
    they fit in the processor's cache."""
    device, dtype = choose_device(config.device, config.dtype, config.n_embd)
    models = {kind: m.to(dtype).eval() for kind, m in make_models(config, device).items()}
    T = config.block_size // 2
    prompt = torch.zeros(batch_size, T, dtype=torch.long, device=device)
    a, b = torch.ones(2, 2**28, dtype=torch.uint8, device=device)
    read, decode, size = {}, {}, {}
    for kind, model in models.items():
        size[kind] = sum(p.nbytes for p in model.parameters())
        if kind == "nanoGPT":
            read[kind] = decode[kind] = partial(model, prompt)
        else:
            cache = model.new_cache(batch_size)
            size[kind] += sum(kv.nbytes for pair in cache.kv.values() for kv in pair) // 2
            read[kind] = partial(extend, model, prompt, cache, 0)
            decode[kind] = partial(extend, model, prompt[:, -1:], cache, T)
    name = f"{str(dtype)[6:]}, width {config.n_embd}, prompt {T}, batch {batch_size}"
    prefills = in_turn(read, prompt.numel(), config, device)
    speeds = in_turn(decode | {"copy": partial(b.copy_, a)}, batch_size, config, device)
    bytes_per_s = max(speeds.pop("copy")) / batch_size * 2 * len(a)
    return {f"prefill, {name} (tokens/s)": prefills, f"decoding, {name} (tokens/s)": speeds,
            f"bound by memory, {name} (tokens/s)": {
                kind: [batch_size * bytes_per_s / size[kind]] for kind in models}}


def extend(model: GPT, tokens, cache, length: int):
    """Reads tokens that follow `length` cached ones, and computes the logits after the last."""
    cache.length = length
    model.logits(model.hidden(tokens, cache)[:, -1])


def in_turn(actions: dict, tokens: int, config, device) -> dict[str, list[float]]:
    """Tokens/s of each action, which processes `tokens` tokens, in each round."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    speeds = {kind: [] for kind in actions}
    for i in range(config.rounds + 1):
        for kind, action in actions.items():
            synchronize()
            repeats, start = 0, time.perf_counter()
            while not repeats or time.perf_counter() - start < config.seconds:
                action()
                repeats += 1
            synchronize()
            if i:  # round 0 compiles
                speeds[kind].append(tokens * repeats / (time.perf_counter() - start))
    return speeds


def run_script(path, *arguments, **options) -> float:
    """The seconds that a Python script takes. options: of subprocess.run."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, path, *arguments], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, **options)
    if done.returncode:
        *_, reason = done.stderr.strip().split("\n")
        raise UserError(f"{path} {' '.join(map(str, arguments))} failed: {reason}")
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
