"""Trains a GPT with or without KV-shifting attention, on a CPU, an Apple GPU or CUDA GPUs.

    python train.py config/quickstart.py --kv_shift=none --out_dir=out/vanilla
    torchrun --nproc_per_node=8 train.py config/gpt2.py          # DDP, one process per GPU
    torchrun --nproc_per_node=8 train.py config/paper_6.7b.py    # FSDP, the model is sharded

Rerun the same command to resume. The batch, the dropout and the learning rate of a step depend only
on the options and the step, so a run that was stopped or killed ends with the same weights as one
that was not.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

from checkpoint import (
    RunState,
    choose_device,
    load_checkpoint,
    load_init,
    load_resumable,
    move_aside,
    require_finite,
    restore,
    save_checkpoint,
)
from config import UserError, need, parse, run
from data import FOLDER, Corpus, TrainBatches, atomic_write, lock, read_meta
from data.tokenizing import Tokenizer
from eval import evaluate, evaluation_sets
from model import GPT, GPTConfig
from plot import draw_curves

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as activation_checkpoint


@dataclass
class TrainConfig(GPTConfig):
    # input and output
    out_dir: str = "out/run"  # folder of checkpoints and log.jsonl
    dataset: str = "pystdlib"  # a folder in data/, or the absolute path of another corpus
    init_from: str = ""  # checkpoint to take the initial weights from, such as out/x/best.pt
    seed: int = 1  # of the initial weights, the batches and dropout
    resume: Literal["auto", "yes", "no"] = "auto"  # auto: if possible; yes: or fail; no: start over
    # optimization
    batch_size: int = 32  # sequences per step, over all micro-batches and processes
    micro_batch_size: int | None = None  # sequences per forward pass and process; None: all
    max_steps: int = 2000  # optimizer steps
    learning_rate: float = 1e-3  # peak learning rate
    min_lr: float = 1e-4  # final learning rate of cosine and linear
    warmup_steps: int = 100  # steps of linear warm-up
    lr_schedule: Literal["cosine", "constant", "linear"] = "cosine"  # after warm-up
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks
    weight_decay: float = 0.1  # on matrices, except embeddings and shifts
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    # logging and evaluation
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 250  # steps between evaluations
    eval_tokens: int = 262_144  # tokens of the val split to evaluate on; 0: all
    eval_start: int = 0  # first token of the val split to evaluate on
    eval_induction: bool = False  # also evaluate on random tokens and their repetition
    checkpoint_every: int = 250  # steps between checkpoints
    wandb_project: str = ""  # also log to this project of Weights & Biases (pip install wandb)
    # hardware
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: by device
    compile: bool | None = None  # torch.compile; None: on CUDA only
    fsdp: bool = False  # shard weights, gradients and optimizer states over the processes
    recompute: bool = False  # activation checkpointing: less memory, a third more computation
    timeout: int = 1800  # seconds to wait for another process before giving up

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "max_steps", "log_every", "eval_every", "checkpoint_every",
                     "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("seed", "learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip",
                     "eval_tokens", "eval_start"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 2^32)")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be in [0, 1)")
        if not self.out_dir:
            raise ValueError("out_dir must not be empty")
        if self.fsdp and self.optimizer == "muon":
            raise ValueError("optimizer=muon needs whole matrices, which fsdp=True shards")
        if self.eval_induction and self.block_size < 4:
            raise ValueError("eval_induction=True needs block_size of at least 4")


def main():
    config = parse(TrainConfig)
    if "RANK" not in os.environ:
        sys.exit(train(config))
    try:  # started by torchrun
        code = train(config)
    except (UserError, OSError) as error:
        code = 2
        print(f"train.py: {error}", file=sys.stderr)
    except Exception as error:
        code = 1
        if "/gloo/" in str(error) or isinstance(error, dist.DistBackendError):
            print(f"train.py: lost another process of this run: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # destroying a process group that has lost a process can hang


def train(config: TrainConfig) -> int:
    """Trains a model. Returns the exit code: 0, or 128 + the signal that stopped the run."""
    # --- processes and devices; torchrun sets RANK, WORLD_SIZE and LOCAL_RANK
    distributed = "RANK" in os.environ
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if distributed and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, dtype = choose_device(config.device, config.dtype, config.n_embd, training=True)
    if config.fsdp and not distributed:
        raise UserError("fsdp=True needs several processes: torchrun --nproc_per_node=N train.py")
    micro_batch_size = config.micro_batch_size or max(1, config.batch_size // world_size)
    n_micro_batches, rest = divmod(config.batch_size, world_size * micro_batch_size)
    if rest or n_micro_batches < 1:
        raise UserError(f"batch_size={config.batch_size} must be a multiple of micro_batch_size="
                        f"{micro_batch_size} times {world_size} processes")
    if config.wandb_project:
        need("wandb")
    if distributed:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # --- data
    if rank == 0:
        prepare_corpus(config.dataset)
    from_all(None)  # waits for the corpus
    corpus = Corpus(FOLDER / config.dataset)
    config.vocab_size = config.vocab_size or corpus.vocab_size
    if config.vocab_size < corpus.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is below the corpus's {corpus.vocab_size}")
    batches = TrainBatches(corpus, config.block_size, config.batch_size, config.seed)
    eval_sets = evaluation_sets(corpus, config.block_size, config.eval_tokens, config.eval_start,
                                config.eval_induction)

    # --- resume, or start a new run
    out_dir = Path(config.out_dir)
    checkpoint = None
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)  # until this process ends: a second run in out_dir is refused
        checkpoint = load_resumable(config, corpus)
    resumed = from_all(checkpoint and checkpoint["run"])[0]
    state = RunState(**(resumed or {}))
    if state.step >= config.max_steps:
        if rank == 0:
            print(f"{out_dir} is complete: step {state.step}, best val loss {state.best:.4f} at "
                  f"step {state.best_step} (--resume=no starts over)")
        return 0
    if resumed:  # every process loads it, and keeps its part
        checkpoint = checkpoint or load_checkpoint(out_dir / "ckpt.pt")
    elif config.init_from:
        checkpoint = load_init(config, corpus)
    from_all(None)  # waits until all have read init_from, which may be in out_dir
    if rank == 0 and not resumed:
        move_aside(out_dir, ["ckpt.pt", "best.pt", "log.jsonl", "loss.png"])

    # --- model and optimizers
    torch.manual_seed(config.seed)
    model = sharded_model(config, device, dtype) if config.fsdp else GPT(config).to(device)
    optimizers = make_optimizers(model, config, dtype)
    if checkpoint:
        restore(checkpoint, model, optimizers if resumed else ())
        checkpoint = None  # frees its memory
    compiled = device.type == "cuda" if config.compile is None else config.compile
    for block in model.blocks:
        if compiled and config.fsdp:  # FSDP gathers weights between the blocks, uncompiled
            block.forward = torch.compile(block.forward)
        if config.recompute:
            block.forward = partial(activation_checkpoint, block.forward, use_reentrant=False)
    if config.recompute:
        model.loss_options = torch.nn.LinearCrossEntropyOptions()  # never stores all logits
    if compiled and not config.fsdp:
        model.compile()
    train_model = model
    if distributed and not config.fsdp:
        train_model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # --- log
    n_parameters = sum(p.numel() for p in model.parameters())
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    if rank == 0:
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "numpy": np.__version__}
        log = Log(out_dir / "log.jsonl", config, {
            "step": state.step, "config": asdict(config), "parameters": n_parameters,
            "device": device_name, "processes": world_size, "versions": versions,
            "corpus": corpus.tokens, "started": time.strftime("%Y-%m-%d %H:%M:%S")})
        if resumed:
            print(f"resuming {out_dir} from step {state.step}")
        print(f"{n_parameters / 1e6:.2f}M parameters, kv_shift={config.kv_shift}, {world_size} x "
              f"{device_name}, {dtype}{', compiled' if compiled else ''}, {corpus.folder.name}: "
              f"{corpus.tokens['train'] / 1e6:,.1f}M tokens; output in {out_dir}", flush=True)

    # --- training loop
    signals, stop_signal = catch_signals(), 0
    if not resumed:
        with autocast():
            line = {"step": 0} | evaluate(model, eval_sets, micro_batch_size)
        require_finite(all(map(math.isfinite, line.values())), "val_loss")
        if rank == 0:
            log.write(line)
    pending = []  # (loss, gradient norm) of the steps since the last line of the log, on the device
    tokens_per_step = config.batch_size * config.block_size
    clock = time.perf_counter()
    while state.step < config.max_steps and not stop_signal:
        # one optimizer step
        torch.manual_seed(hash((config.seed, state.step, rank)))  # for dropout
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
        batch = batches(state.step, rank, world_size)  # prepared while a GPU computes the last step
        loss = torch.zeros((), device=device)
        for i, tokens in enumerate(torch.from_numpy(batch).split(micro_batch_size)):
            if isinstance(train_model, DistributedDataParallel):  # exchange gradients only once
                train_model.require_backward_grad_sync = i == n_micro_batches - 1
            if device.type == "cuda":
                tokens = tokens.pin_memory()
            tokens = tokens.to(device, non_blocking=True)  # (micro_batch_size, block_size + 1)
            with autocast():
                micro_loss = train_model(tokens[:, :-1], tokens[:, 1:]) / n_micro_batches
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        pending.append(torch.stack([loss, norm.full_tensor() if config.fsdp else norm]))
        state.step += 1

        # log, evaluate, save
        stop_signal = max(from_all(signals[0] if signals else 0))
        last = state.step == config.max_steps
        evaluate_now = last or state.step % config.eval_every == 0
        save_now = last or stop_signal or state.step % config.checkpoint_every == 0
        if not (evaluate_now or save_now or state.step % config.log_every == 0):
            continue
        # means over the processes; waits for the device
        losses, norms = np.mean(from_all(torch.stack(pending).tolist()), axis=0).T.tolist()
        pending.clear()
        require_finite(math.isfinite(sum(losses) + sum(norms)), "a loss or gradient norm between "
                       f"steps {state.step - len(losses)} and {state.step}")
        seconds = time.perf_counter() - clock
        state.seconds += seconds
        line = {"step": state.step, "loss": sum(losses) / len(losses), "grad_norm": norms[-1],
                "lr": learning_rate(state.step - 1, config), "tokens": state.step * tokens_per_step,
                "seconds": round(state.seconds, 3),
                "tokens_per_s": round(len(losses) * tokens_per_step / seconds)}
        if evaluate_now:
            with autocast():
                line |= evaluate(model, eval_sets, micro_batch_size)
            require_finite(all(map(math.isfinite, line.values())), "val_loss")
            if line["val_loss"] < state.best:
                state.best, state.best_step = line["val_loss"], state.step
                save_checkpoint(out_dir / "best.pt", model, None, config, corpus, state)
        if rank == 0:
            log.write(line)
        if save_now:
            save_checkpoint(out_dir / "ckpt.pt", model, optimizers, config, corpus, state)
        clock = time.perf_counter()

    if rank == 0:
        log.close()
    if state.step < config.max_steps:
        if rank == 0:
            name = signal.Signals(stop_signal).name
            print(f"stopped by {name} after step {state.step}: rerun the same command to resume")
        return 128 + stop_signal
    if rank == 0:
        print(f"done: best val loss {state.best:.4f} at step {state.best_step}; {out_dir} contains "
              "best.pt (that model), ckpt.pt (the last one), log.jsonl and loss.png")
        try:
            draw_curves([out_dir], out_dir / "loss.png")
            if not config.fsdp:  # a shard cannot generate text
                print_samples(model, Tokenizer(corpus.tokenizer), device)
        except Exception as error:  # the run is complete all the same
            print(f"{type(error).__name__}: {error}")
    return 0


def from_all(value) -> list:
    """The values of all processes, in all of them: waits for the last one, but for no GPU."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def prepare_corpus(dataset: str):
    """Prepares the two small corpora unless they are complete."""
    folder = FOLDER / dataset
    if dataset in ("pystdlib", "shakespeare_char") and "tokens" not in read_meta(folder):
        print(f"preparing {folder}", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            raise UserError(f"could not prepare {folder}")


def sharded_model(config, device, dtype) -> GPT:
    """A model whose weights, gradients and optimizer states are sharded over the processes (FSDP).
    Weights are stored in float32; each block's are gathered in dtype when they are needed."""
    whole = GPT(config).state_dict() if dist.get_rank() == 0 else {}
    with torch.device("meta"):
        model = GPT(config)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    return model


def make_optimizers(model: GPT, config: TrainConfig,
                    dtype=torch.float32) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest. Weight decay applies to
    matrices only: not to embeddings, norms and shifts. Muon's updates get the RMS of AdamW's, so
    that both use the same learning rate (arXiv 2502.16982). dtype: of Muon's matrix products."""
    muon, decayed, others = [], [], []
    for name, p in model.named_parameters():
        if p.ndim != 2 or "shift." in name or name.startswith("embed"):
            others.append(p)
        elif config.optimizer == "muon" and name.startswith("blocks"):
            muon.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([group for group in groups if group["params"]], fused=True,
                                    lr=config.learning_rate, betas=(config.beta1, config.beta2))]
    if muon:
        cls = torch.optim.Muon if dtype == torch.bfloat16 else Float32Muon
        optimizers.append(cls(muon, lr=config.learning_rate, weight_decay=config.weight_decay,
                              adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Float32Muon(torch.optim.Muon):
    """Muon in float32. torch's Muon always multiplies matrices in bfloat16, which takes 18 times as
    long on a CPU without instructions for it."""

    def step(self, closure=None):
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            return super().step(closure)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ..."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress,
              "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[config.lr_schedule]
    return config.min_lr + factor * (config.learning_rate - config.min_lr)


def catch_signals() -> list[int]:
    """A list to which the first SIGINT or SIGTERM is added. A second one ends the process."""
    received = []

    def remember(number, frame):
        received.append(number)
        if not dist.is_initialized():  # torchrun may send a signal that has arrived already
            signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return received


class Log:
    """Writes lines to log.jsonl, to the console and, if asked for, to Weights & Biases. Keeps the
    lines of an older file up to the step where a run resumes, then adds a header."""

    def __init__(self, path: Path, config: TrainConfig, header: dict):
        text = path.read_text(errors="replace") if path.exists() else ""
        kept, damaged = [], False
        for line in text[: text.rfind("\n") + 1].splitlines():  # a killed run may leave half a line
            try:
                if json.loads(line)["step"] <= header["step"]:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                damaged = True
        if damaged:
            move_aside(path.parent, [path.name])
        with atomic_write(path) as f:
            f.write("".join(f"{line}\n" for line in [*kept, json.dumps(header)]).encode())
        self.file, self.max_steps = open(path, "a"), config.max_steps
        self.wandb = config.wandb_project and need("wandb").init(
            project=config.wandb_project, name=str(path.parent), config=header["config"])

    def write(self, line: dict):
        parts = [f"step {line['step']:>{len(str(self.max_steps))}}/{self.max_steps}"]
        parts += [f"{key.replace('_', ' ')} {line[key]:.4f}"
                  for key in ("loss", "val_loss", "val_induction") if key in line]
        if "lr" in line:
            parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_s']:,} tokens/s"]
            seconds_left = line["seconds"] / line["step"] * (self.max_steps - line["step"])
            parts += [f"{timedelta(seconds=round(seconds_left))} left"]
        print(" | ".join(parts), flush=True)
        print(json.dumps(line), file=self.file, flush=True)
        os.fsync(self.file.fileno())  # ckpt.pt must not be newer than the log
        if self.wandb:
            self.wandb.log(line, step=line["step"])

    def close(self):
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def print_samples(model: GPT, tokenizer: Tokenizer, device):
    """Three short samples that begin with a new line: the starts of documents are often alike."""
    prompt = [] if tokenizer.kind == "char" else tokenizer.encode("\n").tolist()
    prompt = prompt or [tokenizer.start]  # in words, a line break has no token
    idx = torch.tensor(prompt, device=device).repeat(3, 1)
    generator = torch.Generator(device).manual_seed(1)
    texts = model.eval().generate(idx, 150, temperature=0.8, generator=generator)
    for text in texts[:, len(prompt) :].tolist():
        print(f"---\n{tokenizer.decode(text)}")


if __name__ == "__main__":
    run(main)
