"""Trains a GPT with KV-shifting attention: on a CPU, a CUDA GPU or an Apple GPU, found by itself, or on many.

    python train.py config/quickstart.py --out_dir=out/mine --kv_shift=none
    torchrun --nproc_per_node=8 train.py config/gpt2.py            one process a GPU
    torchrun --nproc_per_node=8 train.py config/paper_6.7b.py      too large for one: it sets fsdp

The same command again goes on where a run was stopped, and says so where it is complete. Everything random at a step is
a function of (seed, step, rank), so that a run that was stopped, killed or moved ends as one that was not.
"""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpoint import find_checkpoint, find_init, load_checkpoint, restore, save_checkpoint, start_log
from config import UserError, for_user, parse, run
from data import FOLDER, Corpus, Tokenizer, TrainBatches, lock, val_starts
from estimate import estimate_flops, peak_flops, print_dry_run
from model import GPT, GPTConfig


@dataclass
class TrainConfig(GPTConfig):
    # what and where
    out_dir: str = "out/run"  # checkpoints and log.jsonl go here
    dataset: str = "pystdlib"  # a folder in data/, or the absolute path of another
    init_from: str = ""  # a checkpoint to take the initial weights from, such as out/x/best.pt; empty: random ones
    seed: int = 1  # of the initial weights, the order of the data and dropout
    resume: Literal["auto", "yes", "no"] = "auto"  # go on if there is a checkpoint | there must be one | start over
    # optimization
    batch_size: int = 32  # sequences a step, over all micro-batches and processes
    micro_batch_size: int = 0  # sequences a forward pass of one process, gradients being added up; 0: all of its share
    max_steps: int = 2000  # optimizer steps
    learning_rate: float = 1e-3  # the highest, after warm-up
    min_lr: float = 1e-4  # where cosine and linear end
    warmup_steps: int = 100  # the learning rate rises from zero
    lr_schedule: Literal["cosine", "constant", "linear"] = "cosine"  # after warm-up
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, AdamW for the rest
    weight_decay: float = 0.1  # on matrices; embeddings, norms and the shift's scalars have none
    beta1: float = 0.9  # AdamW's mean of gradients
    beta2: float = 0.95  # AdamW's mean of squared gradients
    grad_clip: float = 1.0  # highest norm of all gradients together; 0: no clipping
    # looking at it
    log_every: int = 10  # steps between lines on the console and in log.jsonl
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262_144  # tokens of val.bin to evaluate on, from its start; 0: all
    eval_induction: bool = False  # evaluate on random tokens that come twice, too: val_random, val_induction in log.jsonl
    checkpoint_every: int = 250  # steps between checkpoints
    # machine
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: bfloat16 where CUDA has it
    compile: bool | None = None  # torch.compile; None: on CUDA only
    fsdp: bool = False  # share weights, gradients and optimizer out over the processes, for models that a GPU can't hold
    recompute: bool = False  # keep no activations inside a block: less memory, a third more arithmetic
    dry_run: bool = False  # print parameters, FLOPs, memory and days, and stop
    dry_run_mfu: float = 0.4  # share of an H100's peak that the dry run counts on

    def __post_init__(self):
        super().__post_init__()
        for f in fields(self):
            if isinstance(getattr(self, f.name), int) and getattr(self, f.name) >= 2**32:
                raise ValueError(f"{f.name}={getattr(self, f.name)} must be below 2^32")
        for name in ("batch_size", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("seed", "max_steps", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_tokens",
                     "micro_batch_size"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 2^32")
        if self.max_steps < 1 or not self.out_dir:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, and out_dir={self.out_dir!r} not empty")
        if self.eval_induction and self.block_size < 4:
            raise ValueError(f"eval_induction=True needs block_size={self.block_size} to be at least 4")
        if self.min_lr > self.learning_rate and self.lr_schedule != "constant":
            raise ValueError(f"min_lr={self.min_lr} must not be above learning_rate={self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be at least 0 and below 1")
        if not 0 < self.dry_run_mfu <= 1:
            raise ValueError(f"dry_run_mfu={self.dry_run_mfu} must be above 0 and at most 1")


def main():
    config = parse(TrainConfig, sys.argv[1:])
    if config.dry_run:
        if not config.vocab_size:
            prepare_corpus(config.dataset)
            config.vocab_size = Corpus(FOLDER / config.dataset).vocab_size
        return print_dry_run(config)
    try:
        with contextlib.ExitStack() as cleanup:
            code = train(config, cleanup)
    except Exception as error:
        error = for_user(error, "Lower --micro_batch_size, or pass --recompute=True or --fsdp=True")
        if not dist.is_initialized():
            raise error
        code = 2 if isinstance(error, (UserError, OSError)) else 1
        print(f"train.py: {error}" if code == 2 else traceback.format_exc(), file=sys.stderr)
    if dist.is_initialized():  # taking a process group down can hang, above all where it has lost a process: just leave
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def train(config: TrainConfig, cleanup: contextlib.ExitStack) -> int:
    """The whole of it; returns the exit code, 0 or 128 + the signal that stopped it. `cleanup` closes what is open."""
    # --- processes and devices: torchrun starts the processes and tells each its place
    distributed = "RANK" in os.environ
    rank, world_size, local_rank = (int(os.environ[key]) if distributed else default
                                    for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    on_gpus = distributed and config.device in ("auto", "cuda") and torch.cuda.is_available()
    device, dtype = choose_device(f"cuda:{local_rank}" if on_gpus else config.device, config.dtype)
    share = config.batch_size // world_size
    config.micro_batch_size = config.micro_batch_size or share
    if share < 1 or config.batch_size % (world_size * config.micro_batch_size):
        raise UserError(f"batch_size={config.batch_size} must be divisible by micro_batch_size={config.micro_batch_size} "
                        f"times {world_size} processes")
    if config.fsdp and not (distributed and dtype in (torch.float32, torch.bfloat16)):
        raise UserError("fsdp=True needs torchrun (torchrun --nproc_per_node=8 train.py ...) and float32 or bfloat16")
    if config.fsdp and config.optimizer == "muon":
        raise UserError("optimizer=muon needs whole matrices, which fsdp=True shares out: choose one of them")
    if config.optimizer == "muon" and dtype == torch.float16:  # where one optimizer skips a step, the other would not
        raise UserError("optimizer=muon can't be trained in float16: pass --dtype=bfloat16 or float32, or --optimizer=adamw")
    if distributed:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    compiled = device.type == "cuda" if config.compile is None else config.compile
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA for what is not in lower precision anyway

    # --- data
    if rank == 0:
        prepare_corpus(config.dataset)
    from_rank_0(None)  # the others wait until it is there
    corpus = Corpus(FOLDER / config.dataset)
    if config.vocab_size and config.vocab_size < corpus.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is too small for the {corpus.vocab_size} ids of {corpus.folder}")
    config.vocab_size = config.vocab_size or corpus.vocab_size
    batches = TrainBatches(corpus, config.block_size, config.batch_size, config.seed)
    val_starts(corpus, config.block_size, config.eval_tokens)  # too short a val.bin is an error now and not later

    # --- where the run stands; `step` is the number of steps done
    out_dir = Path(config.out_dir)
    checkpoint = None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        cleanup.callback(os.close, lock(out_dir))  # a second run in this folder is refused
        checkpoint = find_checkpoint(config, corpus)
    stands = from_rank_0(checkpoint and checkpoint["run"])
    resumed_at = stands["step"] if stands else -1
    stands = stands or {"step": 0, "seconds": 0.0, "best": math.inf, "best_step": 0, "figures": []}
    step = stands["step"]
    seconds = stands["seconds"]  # of training, without evaluating and saving
    best, best_step = stands["best"], stands["best_step"]
    figures = stands["figures"]  # (loss, gradient norm) of each step since the last line of the log
    if resumed_at >= config.max_steps:
        if rank == 0:
            print(f"{out_dir} is complete: step {step} of {config.max_steps}, best val loss {best:.4f} at step {best_step} "
                  "(--resume=no starts over)")
        return 0

    # --- model and optimizer
    with torch.device("meta"):  # without memory, so that FSDP can give each process its shard alone
        model = GPT(config)
    if config.fsdp:
        shard(model, device, dtype, world_size)
    torch.manual_seed(config.seed)
    model.materialize(device)
    model.recompute = config.recompute
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if resumed_at >= 0:
        checkpoint = checkpoint or load_checkpoint(out_dir / "ckpt.pt", verify=False)  # each process takes its part
        if checkpoint["run"]["step"] != step:
            raise UserError(f"{out_dir} is not the same folder for all processes: the nodes have to share it")
        restore(checkpoint, out_dir / "ckpt.pt", model, optimizers)
        if stands["scaler"]:  # of a run in float16
            scaler.load_state_dict(stands["scaler"])
    elif config.init_from:
        restore(find_init(config, corpus), config.init_from, model)
    checkpoint = None  # its memory
    fast_model = model
    if compiled and config.fsdp:
        for block in model.blocks:  # between them FSDP gathers weights, which is not compiled
            block.compile()
    elif compiled:
        fast_model = torch.compile(model)
    train_model = fast_model
    if distributed and not config.fsdp:
        train_model = DistributedDataParallel(fast_model, gradient_as_bucket_view=True, broadcast_buffers=False)

    # --- what is said, once
    n_parameters = sum(p.numel() for p in model.parameters())
    log = None
    if rank == 0:
        if resumed_at >= 0:
            print(f"going on from step {step} of {out_dir / 'ckpt.pt'}")
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        header = {"config": asdict(config), "parameters": n_parameters, "device": device_name, "processes": world_size,
                  "versions": versions, "corpus": {"tokens": corpus.tokens, "sha256": corpus.sha256},
                  "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        start_log(out_dir / "log.jsonl", step, header)
        log = cleanup.enter_context(open(out_dir / "log.jsonl", "a"))
        print(f"{n_parameters / 1e6:.2f}M parameters, kv_shift={config.kv_shift}, on {world_size} x {device_name} in {dtype}"
              f"{', compiled' if compiled else ''}; {corpus.tokens['train'] / 1e6:,.1f}M tokens in {corpus.folder.name}, "
              f"{config.batch_size * config.block_size:,} a step; checkpoints and log go to {out_dir}")

    # --- the loop
    stop = Stop()
    pending = []  # (loss, gradient norm) of the latest steps, still on the device
    batch = None
    logged_step, logged_seconds = step, seconds
    started = clock = time.perf_counter()
    while True:
        stopped_by = agree(stop.signal)  # read once: a signal that comes while we evaluate or save waits for the next step
        last = step == config.max_steps
        new = step > resumed_at
        log_now = new and step > 0 and (last or step % config.log_every == 0)
        evaluate_now = new and (last or step % config.eval_every == 0)
        save_now = new and step > 0 and (last or stopped_by or step % config.checkpoint_every == 0)
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
                line["val_loss"] = evaluate(fast_model, corpus, config, device, autocast, rank, world_size)
                if not math.isfinite(line["val_loss"]):
                    raise UserError(f"the val loss is {line['val_loss']} after step {step}; checkpoints are left as they were. "
                                    "Start over (--resume=no) with a lower --learning_rate")
                if config.eval_induction:
                    line |= evaluate_induction(fast_model, corpus, config, device, autocast)
            improved = evaluate_now and line["val_loss"] < best
            if improved or save_now:
                check_weights(model, step, config)
            if improved:
                best, best_step = line["val_loss"], step
            run_state = {"step": step, "seconds": seconds, "best": best, "best_step": best_step, "figures": figures,
                         "scaler": scaler.state_dict()}
            if improved:
                save_checkpoint(out_dir / "best.pt", model, None, config, corpus, run_state)
            if rank == 0 and (log_now or evaluate_now):
                seconds_left = (time.perf_counter() - started) / max(1, step - max(0, resumed_at)) * (config.max_steps - step)
                print(console_line(line, config, seconds_left), flush=True)
                print(json.dumps(line), file=log, flush=True)
            if save_now:
                if rank == 0:
                    os.fsync(log.fileno())  # a power cut must not leave a checkpoint without its part of the log
                save_checkpoint(out_dir / "ckpt.pt", model, optimizers, config, corpus, run_state)
            clock = time.perf_counter()
        if last or stopped_by:
            break

        # one optimizer step
        if batch is None:
            batch = batches(step, rank, world_size)
        torch.manual_seed(dropout_seed(config.seed, step, rank))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
        micro_batches = torch.from_numpy(batch).split(config.micro_batch_size)
        loss = torch.zeros((), device=device)
        for i, tokens in enumerate(micro_batches, start=1):  # (micro_batch_size, block_size + 1)
            if isinstance(train_model, DistributedDataParallel):
                # The processes exchange gradients once a step, in the last backward pass. FSDP does in each: a process
                # would otherwise have to hold the gradients of all weights, and not of its share alone.
                train_model.require_backward_grad_sync = i == len(micro_batches)
            tokens = tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
            with autocast:
                micro_loss = train_model(tokens[:, :-1], tokens[:, 1:]) / len(micro_batches)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss, norm.full_tensor() if config.fsdp else norm]))
        step += 1
        batch = batches(step, rank, world_size) if step < config.max_steps else None  # read while a GPU is still at work

    if rank == 0 and last:
        print(f"\ndone: best val loss {best:.4f} at step {best_step}\n"
              f"{out_dir} has best.pt (the model at that step), ckpt.pt (the latest) and log.jsonl (every figure above)")
        try:
            from plot import draw_curves  # here, as nothing else in training needs matplotlib

            draw_curves([out_dir], out_dir / "loss.png")
            print(f"and loss.png (its curves; python plot.py {out_dir} and other runs compares them)\n")
        except Exception as error:  # the run has ended well, and everything that it made is saved
            print(f"no picture of its curves: {type(error).__name__}: {error} (python plot.py {out_dir} tries again)\n")
        if not config.fsdp:  # a shard alone says nothing
            try:
                print_sample(model, Tokenizer(corpus.tokenizer), device)
            except UserError as error:  # the run has ended well, even where a tokenizer's files can't be had
                print(f"no sample: {error}")
        print(f"\nmore of it: python sample.py --out_dir={out_dir}")
    elif rank == 0:
        print(f"stopped by {stopped_by.name} after step {step}: the same command goes on from there")
    return 0 if last else 128 + stopped_by


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of those names, "auto" being the best there is."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device} can't be used here: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        half = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        dtype = half if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def from_rank_0(value):
    """Process 0's value, in every process."""
    values = [value]
    if dist.is_initialized():
        with peers_are_there():
            dist.broadcast_object_list(values, src=0)
    return values[0]


def agree(number: int | None) -> signal.Signals | None:
    """The signal that any process has got, in all of them."""
    numbers = torch.tensor(number or 0)
    if dist.is_initialized():
        with peers_are_there():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)  # on the CPU: a GPU goes on meanwhile
    return signal.Signals(numbers.item()) if numbers else None


@contextlib.contextmanager
def peers_are_there():
    """Ends this process where another one is gone, which will have said why."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process of this run has stopped ({str(error).splitlines()[0]})") from None


def prepare_corpus(dataset: str):
    """Prepares a missing corpus, if that takes no more than seconds."""
    folder = FOLDER / dataset
    if dataset in ("pystdlib", "shakespeare_char") and not (folder / "meta.json").exists():
        print(f"preparing {folder}", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise UserError(f"could not prepare {folder}")
    if not folder.is_dir():
        known = sorted(p.parent.name for p in FOLDER.glob("*/meta.json"))
        raise UserError(f"no corpus {dataset!r} in data/ (prepared: {', '.join(known) or 'none'}); "
                        "data/text/prepare.py makes one of your own text")


def shard(model: GPT, device: torch.device, dtype: torch.dtype, world_size: int):
    """Shares the model's weights, gradients and optimizer out over the processes (FSDP2): each block's are gathered when
    it is their turn. Weights stay in float32, and are gathered and multiplied in `dtype`; in bfloat16 so is what flows
    between the blocks, which under autocast is float32."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def make_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest. Weight decay is on matrices alone: not on
    embeddings, norms and the shift's scalars. Muon's updates are made as large as AdamW's, so that a learning rate and a
    weight decay mean the same for both (arXiv 2502.16982)."""
    of_blocks, decayed, others = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.startswith("embed") or ".shift." in name:
            others.append(p)
        else:
            (of_blocks if name.startswith("blocks") and config.optimizer == "muon" else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # an empty one could not be saved
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)]
    if of_blocks:
        optimizers.append(torch.optim.Muon(of_blocks, lr=config.learning_rate, weight_decay=config.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


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
def evaluate(model, corpus: Corpus, config: TrainConfig, device, autocast, rank: int = 0, world_size: int = 1) -> float:
    """Mean loss in nats over the fixed windows of val.bin, the same for every run, batch size and number of processes."""
    starts = val_starts(corpus, config.block_size, config.eval_tokens)
    model.eval()
    total = torch.zeros((), device=device)
    B = config.micro_batch_size
    for i in range(rank * B, -(-len(starts) // (B * world_size)) * B * world_size, B * world_size):
        # all processes do as many forward passes, all of one shape: where windows run out, rows that do not count (-1)
        tokens = torch.full((B, config.block_size + 1), -1)
        windows = corpus.windows("val", starts[i : i + B], config.block_size)
        tokens[: len(windows)] = torch.from_numpy(windows)
        tokens = tokens.to(device)
        with autocast:
            total += model(tokens[:, :-1].clamp(min=0), tokens[:, 1:], reduction="sum")
    model.train()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / (len(starts) * config.block_size)


@torch.no_grad()
def evaluate_induction(model, corpus: Corpus, config: TrainConfig, device, autocast, n: int = 64) -> dict:
    """Mean losses in nats on n sequences of block_size / 2 random ids, each followed by itself: "val_random" where the ids
    are new, "val_induction" where they come a second time. An induction head that knows only the token before can't bring
    the second to 0: an id that was drawn several times was followed by several.

    The ids are drawn evenly from those that occur in the windows of `evaluate`, the same for every run on a corpus and
    context. The first token of the repeat does not count, as nothing says that one begins.
    """
    ids = np.unique(corpus.windows("val", val_starts(corpus, config.block_size, config.eval_tokens), config.block_size))
    once = np.random.RandomState(0).choice(ids, (n, config.block_size // 2))  # the numbers of a RandomState never change
    L, B = once.shape[1], config.micro_batch_size
    tokens = torch.full((-(-n // B) * B, config.block_size + 1), -1)  # the shape of `evaluate`: torch.compile makes no second one
    tokens[:n, : 2 * L] = torch.from_numpy(np.concatenate([once, once], axis=1))
    first, second = tokens[:, 1:].clone(), tokens[:, 1:].clone()  # what is to be predicted
    first[:, L - 1 :] = -1
    second[:, :L] = -1
    model.eval()
    losses = torch.zeros(2, device=device)
    for x, *halves in zip(tokens[:, :-1].clamp(min=0).split(B), first.split(B), second.split(B), strict=True):
        with autocast:
            losses += torch.stack([model(x.to(device), y.to(device), reduction="sum") for y in halves])
    model.train()
    return dict(zip(("val_random", "val_induction"), (losses / (n * (L - 1))).tolist(), strict=True))


def fetch_figures(pending: list, step: int, config: TrainConfig, scaled: bool) -> list[list[float]]:
    """Empties `pending` of (loss, gradient norm) of the steps up to `step`; returns them as numbers, once all are finite.

    This is the one place where the host waits for the device. Losses are averaged over the processes. Float16's
    gradients may overflow (the scaler skips such a step), its loss may not.
    """
    if not pending:
        return []
    figures = torch.stack(pending)  # (steps, 2)
    pending.clear()
    if dist.is_initialized():
        dist.all_reduce(figures)
        figures /= dist.get_world_size()
    figures = figures.tolist()
    for i, (loss, norm) in enumerate(figures, start=step - len(figures)):
        if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
            raise UserError(f"step {i + 1} has loss {loss} and gradient norm {norm} at learning rate "
                            f"{learning_rate(i, config):.3g}; checkpoints are left as they were. Start over (--resume=no) "
                            "with a lower --learning_rate")
    return figures


def check_weights(model: GPT, step: int, config: TrainConfig):
    """A UserError, in all processes, if a weight is no longer a number: a finite gradient can still be too large a step."""
    norm = torch.nn.utils.get_total_norm(model.parameters())
    if not (norm.full_tensor() if config.fsdp else norm).isfinite():
        raise UserError(f"the weights are no longer finite after step {step}; checkpoints are left as they were. Start over "
                        "(--resume=no) with a lower --learning_rate")


class Stop:
    """Remembers SIGINT or SIGTERM until the step is done; the same signal once more ends the program at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.signal = signal.Signals(number)
        if not dist.is_initialized():  # torchrun passes on a signal that may have come to all processes already
            signal.signal(number, signal.SIG_DFL)
        print(f"{self.signal.name}: finishing the step, then saving", file=sys.stderr)


def console_line(line: dict, config: TrainConfig, seconds_left: float) -> str:
    step = line["step"]
    parts = [f"step {step:>{len(str(config.max_steps))}}/{config.max_steps}"]
    names = {"loss": "loss", "val_loss": "val loss", "val_induction": "induction"}
    parts += [f"{name} {line[key]:.4f}" for key, name in names.items() if key in line]
    if "lr" in line:
        parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,} tokens/s"]
    if "mfu" in line:
        parts.append(f"mfu {line['mfu']:.1%}")
    if 0 < step < config.max_steps:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return " | ".join(parts)


def print_sample(model: GPT, tokenizer: Tokenizer, device):
    """Three short texts from the model as it is now. They go on from a line's end: how documents begin is often all alike."""
    line_end = [tokenizer.start] if tokenizer.kind == "char" else tokenizer.encode("\n").tolist()
    idx = torch.tensor(line_end, device=device).repeat(3, 1)
    generator = torch.Generator(device).manual_seed(1)
    model.eval()
    for text in model.generate(idx, 150, temperature=0.8, generator=generator)[:, len(line_end) :].tolist():
        print(f"---\n{tokenizer.decode(text)}")


if __name__ == "__main__":
    run(main)
