"""Trains a GPT with KV-shifting attention: on a CPU, one CUDA GPU or an Apple GPU, found by itself.

    python train.py config/quickstart.py --out_dir=out/mine --kv_shift=none

The same command again goes on where a run was stopped, and says so where it is complete. Everything random at a step is
a function of (seed, step, rank), so that a run that was stopped, killed or moved ends as one that was not.
"""

import contextlib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from config import UserError, make, parse, run
from data import FOLDER, Corpus, Tokenizer, TrainBatches, atomic_write, val_starts
from model import GPT, GPTConfig, estimate_flops, peak_flops


@dataclass
class TrainConfig(GPTConfig):
    # what and where
    out_dir: str = "out/run"  # checkpoints and log.jsonl go here
    dataset: str = "pystdlib"  # a folder in data/, or the path of another
    seed: int = 1  # of the initial weights, the order of the data and dropout
    resume: Literal["auto", "yes", "no"] = "auto"  # go on if there is a checkpoint | there must be one | start over
    # optimization
    batch_size: int = 32  # sequences a step, over all micro-batches and processes
    micro_batch_size: int = 0  # sequences a forward pass; the gradients of several are added up; 0: batch_size
    max_steps: int = 2000  # optimizer steps
    learning_rate: float = 1e-3  # the highest, after warm-up
    min_lr: float = 1e-4  # where cosine and linear end
    warmup_steps: int = 100  # the learning rate rises from zero
    lr_schedule: Literal["cosine", "constant", "linear"] = "cosine"  # after warm-up
    weight_decay: float = 0.1  # on matrices; embeddings, norms and the shift's scalars have none
    beta1: float = 0.9  # AdamW's mean of gradients
    beta2: float = 0.95  # AdamW's mean of squared gradients
    grad_clip: float = 1.0  # highest norm of all gradients together; 0: no clipping
    # looking at it
    log_every: int = 10  # steps between lines on the console and in log.jsonl
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262_144  # tokens of val.bin to evaluate on, from its start; 0: all
    checkpoint_every: int = 250  # steps between checkpoints
    # machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: bfloat16 where CUDA has it
    compile: bool | None = None  # torch.compile; None: on CUDA only

    def __post_init__(self):
        super().__post_init__()
        self.micro_batch_size = self.micro_batch_size or self.batch_size
        for name in ("batch_size", "micro_batch_size", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("seed", "max_steps", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_tokens"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 2^32")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be at least 0 and below 1")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} must be divisible by micro_batch_size={self.micro_batch_size}")


# A run may go on with other values of these; any other difference makes it another run.
FREE_TO_CHANGE = {"out_dir", "resume", "micro_batch_size", "log_every", "eval_every", "eval_tokens", "checkpoint_every",
                  "device", "dtype", "compile"}


def main():
    config = parse(TrainConfig, sys.argv[1:])
    device, dtype = choose_device(config.device, config.dtype)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    compiled = device.type == "cuda" if config.compile is None else config.compile
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what is not in lower precision anyway
    rank, world_size = 0, 1

    # --- data
    corpus = open_corpus(config.dataset)
    if config.vocab_size and config.vocab_size < corpus.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is too small for the {corpus.vocab_size} ids of {corpus.folder}")
    config.vocab_size = config.vocab_size or corpus.vocab_size
    batches = TrainBatches(corpus, config.block_size, config.batch_size, config.seed)
    val_starts(corpus, config.block_size, config.eval_tokens)  # too short a val.bin is an error now and not later

    # --- where the run stands; `step` is the number of steps done
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = find_checkpoint(config, corpus)
    step, resumed_at, seconds = 0, -1, 0.0  # seconds of training, without evaluating and saving
    best, best_step = math.inf, 0
    figures = []  # (loss, gradient norm) of each step since the last line of the log
    if checkpoint is not None:
        step = resumed_at = checkpoint["step"]
        best, best_step = checkpoint["best_val_loss"], checkpoint["best_step"]
        figures, seconds = checkpoint["figures"], checkpoint["seconds"]
        if step >= config.max_steps:
            print(f"{out_dir} is complete: step {step} of {config.max_steps}, best val loss {best:.4f} at step {best_step} "
                  "(--resume=no starts over)")
            return
        print(f"going on from step {step} of {out_dir / 'ckpt.pt'}")
        cut_log(out_dir / "log.jsonl", step)

    # --- model and optimizer
    torch.manual_seed(config.seed)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        del checkpoint
    fast_model = torch.compile(model) if compiled else model

    n_parameters = sum(p.numel() for p in model.parameters())
    log = open(out_dir / "log.jsonl", "a")
    if resumed_at < 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        header = {"config": asdict(config), "parameters": n_parameters, "device": device_name, "versions": versions,
                  "corpus": {"tokens": corpus.tokens, "sha256": corpus.sha256}, "started": time.strftime("%F %T")}
        print(json.dumps(header), file=log, flush=True)
    print(f"{n_parameters / 1e6:.2f}M parameters, kv_shift={config.kv_shift}, on {device_name} in {dtype}"
          f"{', compiled' if compiled else ''}; {corpus.tokens['train'] / 1e6:,.1f}M tokens in {corpus.folder.name}, "
          f"{config.batch_size * config.block_size:,} a step; checkpoints and log go to {out_dir}")

    # --- the loop
    stop = Stop()
    pending = []  # (loss, gradient norm) of the latest steps, still on the device
    batch = None
    logged_step, logged_seconds = step, seconds
    started = clock = time.perf_counter()
    while True:
        stopped_by = stop.signal  # read once: a signal that comes while we evaluate or save waits for the next step
        last = step == config.max_steps
        new = step > resumed_at
        log_now = new and step > 0 and (last or step % config.log_every == 0)
        evaluate_now = new and (last or step % config.eval_every == 0)
        save_now = stopped_by or new and step > 0 and (last or step % config.checkpoint_every == 0)
        if log_now or evaluate_now or save_now:
            figures += fetch_figures(pending, step, config, scaler.is_enabled())  # waits for the device
            seconds += time.perf_counter() - clock
            line = {"step": step}
            if log_now:
                tokens_per_s = (step - logged_step) * config.batch_size * config.block_size / (seconds - logged_seconds)
                norm = figures[-1][1]
                line |= {"loss": sum(loss for loss, _ in figures) / len(figures), "lr": learning_rate(step - 1, config),
                         "grad_norm": norm if math.isfinite(norm) else None,  # JSON has no infinity
                         "tokens": step * config.batch_size * config.block_size, "seconds": round(seconds, 3),
                         "tokens_per_s": round(tokens_per_s)}
                if peak := peak_flops(device_name):
                    line["mfu"] = round(tokens_per_s * estimate_flops(config) / (peak * world_size), 4)
                figures, logged_step, logged_seconds = [], step, seconds
            if evaluate_now:
                line["val_loss"] = evaluate(fast_model, corpus, config, device, autocast)
                if not math.isfinite(line["val_loss"]):
                    raise UserError(f"the val loss is {line['val_loss']} after step {step}: lower --learning_rate; "
                                    f"the last good checkpoint is still in {out_dir}")
                if line["val_loss"] < best:
                    best, best_step = line["val_loss"], step
                    save_checkpoint(out_dir / "best.pt", model, config, corpus, step=step, best_val_loss=best)
            if log_now or evaluate_now:
                seconds_left = (time.perf_counter() - started) / max(1, step - max(0, resumed_at)) * (config.max_steps - step)
                print(console_line(line, config, seconds_left), flush=True)
                print(json.dumps(line), file=log, flush=True)
            if save_now:
                save_checkpoint(out_dir / "ckpt.pt", model, config, corpus, step=step, best_val_loss=best, best_step=best_step,
                                figures=figures, seconds=seconds, optimizer=optimizer.state_dict(),
                                scaler=scaler.state_dict())
            clock = time.perf_counter()
        if last or stopped_by:
            break

        # one optimizer step
        if batch is None:
            batch = batches(step, rank, world_size)
        torch.manual_seed(dropout_seed(config.seed, step, rank))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        micro_batches = torch.from_numpy(batch).split(config.micro_batch_size)
        loss = torch.zeros((), device=device)
        for tokens in micro_batches:  # (micro_batch_size, block_size + 1)
            tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
            with autocast:
                micro_loss = fast_model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss, norm]))
        step += 1
        batch = batches(step, rank, world_size) if step < config.max_steps else None  # read while a GPU is still at work

    if stopped_by and not last:
        print(f"stopped by {stopped_by.name} after step {step} and saved: the same command goes on from there")
        sys.exit(128 + stopped_by)
    print(f"\ndone: best val loss {best:.4f} at step {best_step}\n"
          f"{out_dir} has best.pt (the model at that step), ckpt.pt (the latest) and log.jsonl (every figure above)\n")
    print_sample(model, Tokenizer(corpus.tokenizer), device)
    print(f"\nmore of it: python sample.py --out_dir={out_dir}")


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of those names, "auto" being the best there is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device} can't be used here: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        half = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        dtype = half if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def open_corpus(dataset: str) -> Corpus:
    """The corpus of that name or path; one that is prepared in seconds is prepared here."""
    folder = FOLDER / dataset
    if dataset in ("pystdlib", "shakespeare_char") and not (folder / "meta.json").exists():
        print(f"preparing {folder}", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise UserError(f"could not prepare {folder}")
    if not folder.is_dir():
        known = sorted(p.parent.name for p in FOLDER.glob("*/meta.json"))
        raise UserError(f"no corpus {dataset!r} in data/ (prepared: {', '.join(known) or 'none'}); "
                        "data/text/prepare.py makes one of your own text")
    return Corpus(folder)


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Weight decay on matrices alone: not on embeddings, norms and the shift's scalars."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and not name.startswith("embed") and ".shift." not in name
        (decayed if is_matrix else others).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and process, so that no generator's state needs saving."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ..."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    share = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.lr_schedule]
    return config.min_lr + share * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model, corpus: Corpus, config: TrainConfig, device, autocast) -> float:
    """Mean loss in nats over the fixed windows of val.bin, the same for every run and batch size."""
    starts = val_starts(corpus, config.block_size, config.eval_tokens)
    model.eval()
    total = torch.zeros((), device=device)
    for i in range(0, len(starts), config.micro_batch_size):
        tokens = torch.from_numpy(corpus.windows("val", starts[i : i + config.micro_batch_size], config.block_size))
        # the last batch is filled up with rows that do not count, so that a compiled model sees one shape alone
        filled = torch.full((config.micro_batch_size, config.block_size + 1), -1)
        filled[: len(tokens)] = tokens
        filled = filled.to(device)
        with autocast:
            total += model(filled[:, :-1].clamp(min=0), filled[:, 1:], reduction="sum")
    model.train()
    return total.item() / (len(starts) * config.block_size)


def fetch_figures(pending: list, step: int, config: TrainConfig, scaled: bool) -> list[list[float]]:
    """Empties `pending` of (loss, gradient norm) of the steps up to `step`; returns them as numbers, once all are finite.

    This is the one place where the host waits for the device. Float16's gradients may overflow (the scaler skips such
    a step), its loss may not.
    """
    figures = torch.stack(pending).tolist() if pending else []
    pending.clear()
    for i, (loss, norm) in enumerate(figures, start=step - len(figures)):
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            raise UserError(f"step {i + 1} has loss {loss} and gradient norm {norm} at learning rate "
                            f"{learning_rate(i, config):.3g}: lower --learning_rate; the last good checkpoint is still in "
                            f"{config.out_dir}")
    return figures


class Stop:
    """Remembers SIGINT or SIGTERM until the step is done; the same signal once more ends the program at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        print(f"{self.signal.name}: finishing the step, then saving", file=sys.stderr)


def console_line(line: dict, config: TrainConfig, seconds_left: float) -> str:
    step = line["step"]
    parts = [f"step {step:>{len(str(config.max_steps))}}/{config.max_steps}"]
    parts += [f"{name} {line[key]:.4f}" for name, key in (("loss", "loss"), ("val loss", "val_loss")) if key in line]
    if "lr" in line:
        parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,} tokens/s"]
    if "mfu" in line:
        parts.append(f"mfu {line['mfu']:.1%}")
    if 0 < step < config.max_steps:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return " | ".join(parts)


def save_checkpoint(path: Path, model: GPT, config: TrainConfig, corpus: Corpus, **state):
    """Writes model, config, tokenizer and `state` to a file that `load_checkpoint` reads. best.pt has no optimizer."""
    checkpoint = {"format": 1, "model": model.state_dict(), "config": asdict(config), "tokenizer": corpus.tokenizer,
                  "corpus_sha256": corpus.sha256} | state
    with atomic_write(path) as f:
        torch.save(checkpoint, f)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint, on the CPU; a file that is missing, damaged, or no checkpoint of ours is a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; torch itself does not compare the checksums
            if damaged := archive.testzip():
                raise UserError(f"{path} is damaged: {damaged} does not match its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != 1:
            raise UserError(f"{path} has format {checkpoint['format']}, this version reads format 1")
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint of this project ({type(error).__name__})") from None
    return checkpoint


def load_model(checkpoint: dict, device) -> GPT:
    """The model of a checkpoint, ready to be used (not trained)."""
    config = make(GPTConfig, {f.name: checkpoint["config"][f.name] for f in fields(GPTConfig) if f.name in checkpoint["config"]})
    model = GPT(config)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its config: {str(error).splitlines()[-1].strip()}") from None
    return model.to(device).eval()


def find_checkpoint(config: TrainConfig, corpus: Corpus) -> dict | None:
    """The checkpoint to go on from, None for a fresh start; what an earlier run left is then moved aside."""
    out_dir = Path(config.out_dir)
    path = out_dir / "ckpt.pt"
    if config.resume != "no" and path.exists():
        checkpoint = load_checkpoint(path)
        same_run(checkpoint, config, corpus)
        return checkpoint
    if config.resume == "yes":
        raise UserError(f"resume=yes, but there is no {path}")
    left = [out_dir / name for name in ("ckpt.pt", "best.pt", "log.jsonl") if (out_dir / name).exists()]
    if left:
        aside = next(p for n in range(1, sys.maxsize) if not (p := out_dir / f"old-{n}").exists())
        aside.mkdir()
        for old in left:
            os.replace(old, aside / old.name)
        print(f"moved an earlier run's files to {aside}")
    return None


def same_run(checkpoint: dict, config: TrainConfig, corpus: Corpus):
    """A UserError that names what differs, if the checkpoint is of another run than config's."""
    saved, now = checkpoint["config"], asdict(config)
    # cosine and linear end at max_steps: another end is another schedule
    free = FREE_TO_CHANGE | ({"max_steps"} if config.lr_schedule == "constant" else set())
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    differ = [f"{name} was {saved.get(name, defaults[name])!r}, is {now[name]!r}"
              for name in now if name not in free and saved.get(name, defaults[name]) != now[name]]
    if checkpoint["corpus_sha256"] != corpus.sha256 and not differ:
        differ = [f"the files of {corpus.folder} have changed"]
    if differ:
        raise UserError(f"{config.out_dir}/ckpt.pt is of another run: {'; '.join(differ)}. Use those values, another --out_dir, "
                        "or --resume=no to start over")


def cut_log(path: Path, step: int):
    """Leaves the lines of log.jsonl up to `step`: those after it are written again, and the last may be half a line."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
    with atomic_write(path) as f:
        f.write("".join(kept).encode())


def print_sample(model: GPT, tokenizer: Tokenizer, device):
    """A short text from the model as it is now."""
    idx = torch.full((1, 1), tokenizer.start, device=device)
    generator = torch.Generator(device).manual_seed(1)
    model.eval()
    print(tokenizer.decode(model.generate(idx, 200, temperature=0.8, generator=generator)[0, 1:].tolist()))


if __name__ == "__main__":
    run(main)
