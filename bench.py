"""How fast: training steps and decoding with and without KV shift, in turn, in one table.

    python bench.py                                               4 layers, width 256, on what there is
    python bench.py config/gpt2.py --micro_batch_size=32          the sizes of a preset
    python bench.py config/gpt2.py --nanogpt=../nanoGPT           beside karpathy/nanoGPT, from a clone of it

A training step is one micro-batch of random tokens forward and backward, clipping and the optimizer. All that is compared
is measured in turn, A B A B; a figure is the median of its rounds, a ratio the median of the rounds' ratios.
"""

import contextlib
import ctypes
import importlib.util
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch.profiler import profile

from config import UserError, parse, run
from data import atomic_write
from estimate import estimate_flops, peak_flops
from model import GPT
from plot import table
from train import TrainConfig, choose_device, make_optimizers


@dataclass
class BenchConfig(TrainConfig):
    block_size: int = 256  # context
    vocab_size: int = 256  # token ids
    n_layer: int = 4  # blocks
    n_head: int = 4  # query heads in a block
    n_embd: int = 256  # width
    batch_size: int = 8  # sequences in a training step, where micro_batch_size is not given
    rounds: int = 9  # how often each thing is measured
    seconds: float = 0.5  # about how long a round measures one thing
    decode_tokens: int = 0  # tokens decoded after a prompt of 16 (prefill reads block_size); 0: 100, or as many as fit
    nanogpt: str = ""  # a folder with nanoGPT, to be measured beside
    profile: bool = False  # write chrome traces of training steps to out/trace_*.json
    json: str = ""  # a file for all figures

    def __post_init__(self):
        self.vocab_size = self.vocab_size or 256
        super().__post_init__()
        if self.rounds < 1 or not 0 <= self.seconds < 3600:
            raise ValueError(f"rounds={self.rounds} must be at least 1, and seconds={self.seconds} from 0 to 3600")
        self.decode_tokens = self.decode_tokens or min(100, self.block_size - 16)
        if not 1 <= self.decode_tokens <= self.block_size - 16:
            raise ValueError(f"decode_tokens={self.decode_tokens} must be between 1 and block_size - 16 = {self.block_size - 16}")


def main():
    config = parse(BenchConfig, sys.argv[1:])
    device, dtype = choose_device(config.device, config.dtype)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    torch.set_float32_matmul_precision("high")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":
        device_name += f", {torch.get_num_threads()} threads"
    config.micro_batch_size = config.micro_batch_size or config.batch_size
    print(f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.block_size}, vocabulary "
          f"{config.vocab_size}, micro-batch {config.micro_batch_size}, {dtype}{', compiled' if compiled else ''}; "
          f"{device_name}; torch {torch.__version__}, Python {platform.python_version()}\n", flush=True)

    models = {}
    for kv_shift in ("none", config.kv_shift if config.kv_shift != "none" else "kv"):
        torch.manual_seed(config.seed)
        models[f"kv_shift={kv_shift}"] = GPT(replace(config, kv_shift=kv_shift)).to(device)
    if config.nanogpt:
        with contextlib.redirect_stdout(sys.stderr):  # it has much to say
            models["nanoGPT"] = load_nanogpt(config).to(device)
    figures = train_figures(models, config, device, dtype, compiled)
    flops = estimate_flops(config) * config.micro_batch_size * config.block_size  # a step's
    rates = {"a large matrix product": matmul_rate(device, dtype), "the peak (MFU)": peak_flops(device_name)}
    for name, rate in rates.items():
        if rate:
            times = figures["training step, ms"].items()
            figures[f"training, share of {name}"] = {kind: [flops / (ms / 1e3) / rate for ms in v] for kind, v in times}
    for model in models.values():
        model.eval().to(dtype)
    for batch in (1, 8):
        figures |= decode_figures(models, config, device, batch, compiled)
    bandwidth = copy_rate(device)
    weights = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}
    figures["decode, batch 1: weights read, share of a copy's rate"] = {
        name: [rate * weights[name] / bandwidth for rate in v] for name, v in figures["decode, tokens/s, batch 1"].items()}
    print_table(figures, list(models))
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(config.json) as f:
            f.write(json.dumps({"config": asdict(config), "device": device_name, "torch": torch.__version__, "rounds": figures},
                               indent=1).encode())


def load_nanogpt(config: BenchConfig) -> torch.nn.Module:
    """nanoGPT of the same sizes, from the model.py of a clone: without biases, and with our number of embedding rows."""
    path = Path(config.nanogpt) / "model.py"
    if not path.is_file():
        raise UserError(f"no {path}: nanogpt={config.nanogpt} must be a folder with karpathy/nanoGPT")
    if config.optimizer != "adamw":
        raise UserError("nanoGPT has AdamW alone: pass --optimizer=adamw, to compare like with like")
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    nanogpt = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    sizes = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd")}
    return nanogpt.GPT(nanogpt.GPTConfig(vocab_size=config.padded_vocab_size, bias=False, dropout=config.dropout, **sizes))


def in_turn(actions: dict, config: BenchConfig, device) -> dict[str, list[float]]:
    """name -> seconds that the action takes, one figure for each round. Each is done often enough to last config.seconds."""
    often = {}
    for name, action in actions.items():
        for _ in range(3):  # compiles, and warms up
            seconds = clock(action, 1, device)
        often[name] = max(1, round(config.seconds / seconds))
    measured = {name: [] for name in actions}
    for _ in range(config.rounds):
        for name, action in actions.items():
            measured[name].append(clock(action, often[name], device))
    return measured


def clock(action, times: int, device) -> float:
    """Seconds that an action takes, done `times` times."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(times):
        action()
    wait()
    return (time.perf_counter() - started) / times


def train_figures(models: dict, config: BenchConfig, device, dtype, compiled: bool) -> dict:
    x, y = torch.randint(config.vocab_size, (2, config.micro_batch_size, config.block_size), device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    steps = {}
    for name, model in models.items():
        model.recompute = config.recompute
        if isinstance(model, GPT):
            optimizers = make_optimizers(model, config)
        else:  # nanoGPT's own choice of AdamW, fused on CUDA alone
            with contextlib.redirect_stdout(sys.stderr):
                optimizers = [model.configure_optimizers(config.weight_decay, config.learning_rate, (0.9, 0.95), device.type)]

        fast_model = torch.compile(model) if compiled else model

        def step(model=model, fast_model=fast_model, optimizers=optimizers):
            with autocast:
                loss = fast_model(x, y)
            (loss if isinstance(model, GPT) else loss[1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)

        steps[name] = step
    seconds = in_turn(steps, config, device)
    figures = {"training step, ms": {name: [s * 1e3 for s in v] for name, v in seconds.items()},
               "training, tokens/s": {name: [x.numel() / s for s in v] for name, v in seconds.items()}}
    memory = {name: [step_memory(step, device) / 1e6] for name, step in steps.items()}
    if all(most > 0 for most, in memory.values()):
        figures["a step's memory beyond weights and optimizer, MB"] = memory
    if config.profile:
        for name, step in steps.items():
            with profile() as trace:
                clock(step, 3, device)
            path = Path("out") / f"trace_{name.replace('=', '_')}.json"
            path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(path))
            print(f"trace: {path}")
    return figures


def step_memory(step, device) -> int:
    """Bytes that a step takes at its highest, above what is taken before it; 0 where that can't be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # free memory goes back to Linux, which then counts what the step takes anew
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # which some containers forbid
        return 0
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """This process's memory on Linux, in bytes: VmRSS, now, or VmHWM, at its highest."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


def decode_figures(models: dict, config: BenchConfig, device, batch: int, compiled: bool) -> dict:
    """Tokens/s of reading a text in one go, and of writing one token by token. nanoGPT's generate is not compiled."""
    n = config.decode_tokens
    prompt = torch.randint(config.vocab_size, (batch, 16), device=device)
    text = torch.randint(config.vocab_size, (batch, config.block_size), device=device)

    def prefill(model):
        with torch.inference_mode():
            if isinstance(model, GPT):
                model.logits(model.hidden(text, model.new_cache(batch))[:, -1])
            else:
                model(text)  # nanoGPT's, too, gives the last token's logits alone

    def decode(model):
        model.generate(prompt, n, **({"compile": compiled} if isinstance(model, GPT) else {}))

    read = in_turn({name: lambda model=model: prefill(model) for name, model in models.items()}, config, device)
    written = in_turn({name: lambda model=model: decode(model) for name, model in models.items()}, config, device)
    return {f"prefill, tokens/s, batch {batch}": {name: [text.numel() / s for s in v] for name, v in read.items()},
            f"decode, tokens/s, batch {batch}": {name: [batch * n / s for s in v] for name, v in written.items()}}


def matmul_rate(device, dtype) -> float:
    """FLOP/s of one large matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(clock(lambda: a @ b, 3, device) for _ in range(5))


def copy_rate(device) -> float:
    """Bytes/s at which memory is read where it is copied, the writing counted too."""
    a = torch.empty(2**28 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(clock(lambda: b.copy_(a), 3, device) for _ in range(5))


def print_table(figures: dict, names: list[str]):
    """Medians, and how the shifted model stands to each of the others."""
    shifted = names[1]
    others = [name for name in names if name != shifted]
    rows = []
    for figure, of in figures.items():
        row = [figure] + [f"{median(of[name]):,.{0 if median(of[name]) >= 1000 else 1 if median(of[name]) >= 10 else 3}f}"
                          for name in names]
        rows.append(row + [f"{median(a / b for a, b in zip(of[shifted], of[other], strict=True)):.3f}" for other in others])
    print(table(["", *names, *(f"{shifted} / {other}" for other in others)], rows))


if __name__ == "__main__":
    run(main, less_memory="Lower --micro_batch_size")
