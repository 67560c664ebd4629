"""Checkpoints of a run: ckpt.pt and best.pt in out_dir.

A checkpoint is one file that torch.load(..., weights_only=True) reads. It does not depend on the
number of processes, nor on how they share the model:

    format     2
    config     the TrainConfig, as a dict; the GPTConfig of an imported model
    tokenizer  the spec of data.tokenizing.Tokenizer
    corpus     the checksum of the corpus; None for an imported model
    run        the RunState, as a dict
    model      parameters by name, on the CPU
    optimizer  optimizer states by parameter name (ckpt.pt only: best.pt is for sampling)
"""

import math
import os
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from config import UserError, make
from data import atomic_write
from model import GPT, GPTConfig

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp

# A run may be resumed with other values of these options, and of max_steps if its learning rate is
# constant; any other difference is another run.
FREE_TO_CHANGE = {"out_dir", "resume", "micro_batch_size", "log_every", "eval_every",
                  "eval_induction", "checkpoint_every", "device", "dtype", "compile", "fsdp",
                  "recompute", "timeout", "wandb_project"}


@dataclass
class RunState:
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    best: float = math.inf  # lowest val loss so far, after step best_step
    best_step: int = 0

    def __post_init__(self):
        if not all(isinstance(getattr(self, f.name), f.type) for f in fields(self)):
            raise TypeError("wrong types in the run state")


def require_finite(finite, what: str):
    if not finite:
        raise UserError(f"{what} is not finite; the checkpoints were not changed. Start over "
                        "(--resume=no) with a lower --learning_rate")


def save_checkpoint(path: Path, model, optimizers, config, corpus, state: RunState):
    """Writes a checkpoint, without optimizer if optimizers is empty. All processes call this. A
    finite gradient can still give a weight that is not finite: no file is written then."""
    norm = torch.nn.utils.get_total_norm(model.parameters())
    require_finite(norm.isfinite(), f"a weight after step {state.step}")
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    checkpoint = {"format": 2, "config": asdict(config), "tokenizer": corpus.tokenizer,
                  "corpus": corpus.checksum, "run": asdict(state),
                  "model": dcp.get_model_state_dict(model, options=options)}
    if optimizers:
        checkpoint["optimizer"] = dcp.get_optimizer_state_dict(model, optimizers, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with atomic_write(path) as f:
            try:
                torch.save(checkpoint, f)
            except RuntimeError as error:  # torch hides the reason, such as a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def load_checkpoint(path) -> dict:
    """Reads and checks a checkpoint, on the CPU. A damaged or foreign file is a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load does not
        checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=dist.is_initialized())  # the processes share the memory
        RunState(**checkpoint["run"])
        sound = all(weight.isfinite().all() for weight in checkpoint["model"].values())
        sound &= {"config", "tokenizer", "corpus"} <= checkpoint.keys()
        if damaged or not sound or checkpoint["format"] != 2:
            raise ValueError("damaged")
    except OSError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise many types for a damaged file
        raise UserError(f"{path} is damaged, or no checkpoint of this version "
                        f"({type(error).__name__})") from None
    return checkpoint | {"path": str(path)}


def choose_device(device: str, dtype: str, n_embd: int = 0,
                  training=False) -> tuple[torch.device, torch.dtype]:
    """The device and dtype with these names. "auto": the best device; bfloat16 on CUDA, and on CPUs
    with instructions for it if the model is wide enough to gain (128 with AMX: not measured)."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device} is not available: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        cpu = torch.cpu.get_capabilities()
        width = 128 if training and not cpu.get("amx_bf16") else 256
        gains = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
                 else cpu.get("avx512_bf16") and n_embd >= width)
        dtype = "bfloat16" if gains else "float32"
    return device, getattr(torch, dtype)


def load_model(checkpoint: dict, device, dtype=torch.float32) -> GPT:
    """The model of a checkpoint, in eval mode."""
    names = {f.name for f in fields(GPTConfig)} & checkpoint["config"].keys()
    config = make(GPTConfig, {name: checkpoint["config"][name] for name in names})
    with torch.device("meta"):  # no memory and no random weights
        model = GPT(config)
    model.to_empty(device=device)
    restore(checkpoint, model)
    return model.to(dtype).eval()


def restore(checkpoint: dict, model, optimizers=()):
    """Loads the weights, and the states of optimizers, if their shapes fit."""
    adds_shift = checkpoint.get("adds_shift", False)  # its weights are those of identity
    shapes = {name: p.shape for name, p in model.named_parameters()
              if not (adds_shift and "shift." in name)}
    saved = {name: weight.shape for name, weight in checkpoint["model"].items()}
    differ = {name for name, _ in shapes.items() ^ saved.items()}
    if optimizers:  # torch crashes on an optimizer state of another shape
        states = checkpoint.get("optimizer", {}).get("state", {})
        learned = {name for name, p in model.named_parameters() if p.requires_grad}
        differ |= learned ^ states.keys() | {
            name for name in learned & states.keys() for key, value in states[name].items()
            if value.shape != (() if key == "step" else shapes[name])}
    if differ:
        raise UserError(f"{checkpoint['path']} does not fit the model: weights or optimizer states "
                        f"differ in {', '.join(sorted(map(str, differ))[:3])}")
    options = dcp.StateDictOptions(full_state_dict=True, strict=not adds_shift)
    dcp.set_model_state_dict(model, checkpoint["model"], options=options)
    if optimizers:
        dcp.set_optimizer_state_dict(model, optimizers, checkpoint["optimizer"], options=options)


def load_resumable(config, corpus) -> dict | None:
    """The checkpoint to resume from; None for a new run."""
    path = Path(config.out_dir) / "ckpt.pt"
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
    if not path.exists() or (config.resume == "no" and not restarted):
        if config.resume == "yes":
            raise UserError(f"resume=yes, but there is no {path}")
        return None
    checkpoint = load_checkpoint(path)
    names = {f.name for f in fields(config)} - FREE_TO_CHANGE
    if config.lr_schedule == "constant":
        names.remove("max_steps")
    require_same("run", checkpoint, config, names, corpus, ". Use those values or another "
                 "--out_dir, or start over with --resume=no")
    try:
        require_same("run", load_checkpoint(path.with_name("best.pt")), config, names, corpus)
    except (UserError, OSError):  # missing, damaged or of another run
        if checkpoint["run"]["step"] < config.max_steps:  # the next evaluation writes a new one
            move_aside(config.out_dir, ["best.pt"])
            checkpoint["run"]["best"] = math.inf
    return checkpoint


def load_init(config, corpus) -> dict:
    """The checkpoint init_from, of a model that differs at most in block_size, dropout and
    shift_init, or of a vanilla one to which shift_init=identity adds the shift: its logits stay."""
    if not Path(config.init_from).is_file():
        raise UserError(f"init_from={config.init_from} must be a checkpoint, such as out/x/best.pt "
                        "(to resume a run, rerun its command)")
    checkpoint = load_checkpoint(config.init_from)
    names = {f.name for f in fields(GPTConfig)} - {"block_size", "dropout", "shift_init"}
    if config.shift_init == "identity" and not any("shift." in key for key in checkpoint["model"]):
        checkpoint["adds_shift"] = True
        names = {name for name in names if "shift" not in name}
    require_same("model", checkpoint, config, names)
    if checkpoint["tokenizer"] != corpus.tokenizer:
        raise UserError(f"{config.init_from} has another tokenizer than the corpus")
    return checkpoint


def require_same(what: str, checkpoint: dict, config, names: set, corpus=None, advice=""):
    """A UserError if a checkpoint differs from config in the options `names`, or from corpus."""
    defaults = {f.name: f.default for f in fields(config)}  # of options the checkpoint lacks
    saved = defaults | checkpoint["config"]
    differ = [f"{name} was {saved[name]!r}, is {value!r}" for name, value in asdict(config).items()
              if name in names and saved[name] != value]
    if not differ and corpus and checkpoint["corpus"] != corpus.checksum:
        differ = ["the corpus has changed"]
    if differ:
        raise UserError(f"{checkpoint['path']} is of another {what}: {'; '.join(differ)}{advice}")


def move_aside(out_dir, names: list[str]):
    """Moves the files that exist to a new folder old-1, old-2, ... in out_dir."""
    paths = [path for name in names if (path := Path(out_dir) / name).exists()]
    if paths:
        n = 1
        while (aside := Path(out_dir) / f"old-{n}").exists():
            n += 1
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        moved = ", ".join(path.name for path in paths)
        print(f"moved {moved} to {aside}")
