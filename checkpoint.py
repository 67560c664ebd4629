"""What a run leaves in its out_dir, and how it is read again: checkpoints and log.jsonl.

A checkpoint is one file that torch.load(..., weights_only=True) reads, whatever the number of processes, devices and kind
of sharing: ckpt.pt (the latest, with the optimizer) and best.pt (the model alone). Its parts:

    format            1
    config            the TrainConfig, as a dict
    model, optimizer  whole tensors on the CPU, by the parameters' names
    tokenizer         what data.Tokenizer takes
    corpus_sha256     of train.bin and val.bin
    run               step, seconds, best, best_step, scaler, and the figures that the log lacks yet
"""

import contextlib
import json
import os
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from config import UserError, make, out_of_memory
from data import Corpus, atomic_write
from model import GPT, GPTConfig

# A run may go on with other values of these; any other difference makes it another run.
FREE_TO_CHANGE = {"out_dir", "resume", "micro_batch_size", "log_every", "eval_every", "eval_induction", "checkpoint_every",
                  "device", "dtype", "compile", "fsdp", "recompute", "dry_run", "dry_run_mfu"}


def save_checkpoint(path: Path, model: GPT, optimizers, config, corpus: Corpus, run_state: dict):
    """Writes a single file that `load_checkpoint` reads, whatever the number of processes; all of them call this.
    Without optimizers (best.pt) it can be sampled from, not resumed."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizers is None:
        tensors = {"model": get_model_state_dict(model, options=options)}
    else:
        tensors = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers, options=options), strict=True))
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    with atomic_write(path) as f:
        try:
            torch.save({"format": 1, "config": asdict(config), "tokenizer": corpus.tokenizer, "corpus_sha256": corpus.sha256,
                        "run": run_state} | tensors, f)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch says that the file is too short, and this is why
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path, verify: bool = True) -> dict:
    """A checkpoint, on the CPU; one that is missing, damaged or no checkpoint of ours is a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:  # what torch.save writes; torch itself does not compare the checksums
            if verify and (damaged := archive.testzip()):
                raise UserError(f"{path} is damaged: {damaged} does not match its checksum")
            if any(member.external_attr & 0x10 for member in archive.infolist()):  # torch would leave its tensor unread
                raise UserError(f"{path} is damaged: a part of it is marked as a folder")
        # many processes share the file's pages instead of holding a copy each
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=dist.is_initialized() or not verify)
        if not isinstance(checkpoint, dict):
            raise TypeError
        if checkpoint["format"] != 1:
            raise UserError(f"{path} has format {checkpoint['format']!r}, this version reads format 1")
        if not all(isinstance(checkpoint[part], dict) for part in ("config", "tokenizer", "corpus_sha256", "run", "model")):
            raise TypeError
        if verify and not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
            raise UserError(f"{path} has weights that are not finite")
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except (UserError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch have errors of their own for each kind of damage
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged or no checkpoint of this project ({type(error).__name__})") from None
    return checkpoint


def load_model(checkpoint: dict, device, dtype=torch.float32) -> GPT:
    """The model of a checkpoint, ready to be used (not trained)."""
    saved = checkpoint["config"]
    try:
        with torch.device("meta"):  # without memory and initial weights of its own
            model = GPT(make(GPTConfig, {f.name: saved[f.name] for f in fields(GPTConfig) if f.name in saved}))
        model.load_state_dict({name: weight.to(device, dtype) for name, weight in checkpoint["model"].items()}, assign=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"the checkpoint's weights do not fit its config: {str(error).splitlines()[-1].strip()}") from None
    model.leave_meta()
    return model.eval()


def restore(checkpoint: dict, path, model: GPT, optimizers=()):
    """Gives a model that is to be trained, and its optimizers, what `save_checkpoint` took. `path` is for the error."""
    options = StateDictOptions(full_state_dict=True)
    try:
        if missing := dict(model.named_parameters()).keys() - checkpoint["model"].keys():  # which torch does not report
            raise KeyError(f"it lacks {', '.join(sorted(missing))}")
        set_model_state_dict(model, checkpoint["model"], options=options)
        if optimizers:
            set_optimizer_state_dict(model, optimizers, checkpoint["optimizer"], options=options)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from None


def find_init(config, corpus: Corpus) -> dict:
    """The checkpoint init_from, if its model is config's. Context and dropout may be others: no weight depends on them."""
    checkpoint = load_checkpoint(Path(config.init_from))
    differ = differences(checkpoint["config"], config, {f.name for f in fields(GPTConfig)} - {"block_size", "dropout"})
    if checkpoint["tokenizer"] != corpus.tokenizer:
        differ.append("it has another tokenizer")
    if differ:
        raise UserError(f"init_from={config.init_from} is of another model: {'; '.join(differ)}")
    return checkpoint


def find_checkpoint(config, corpus: Corpus) -> dict | None:
    """The checkpoint to go on from, None for a fresh start; what an earlier run left is then moved aside."""
    out_dir = Path(config.out_dir)
    path = out_dir / "ckpt.pt"
    for half_written in out_dir.glob(".*.tmp"):  # by a run that was killed
        half_written.unlink()
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun: resume=no was for the first start
    if (config.resume != "no" or restarted) and path.exists():
        checkpoint = load_checkpoint(path)
        same_run(checkpoint, config, corpus)
        if "optimizer" not in checkpoint:
            raise UserError(f"{path} has no optimizer, as a copy of best.pt: it can be sampled from, not resumed")
        if (out_dir / "best.pt").exists():  # of a later step than ckpt.pt, where the run was killed in between
            best = load_checkpoint(out_dir / "best.pt", verify=False)["run"]
            checkpoint["run"] |= {"best": best["best"], "best_step": best["best_step"]}
        return checkpoint
    if config.resume == "yes":
        raise UserError(f"resume=yes, but there is no {path}")
    left = [out_dir / name for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png") if (out_dir / name).exists()]
    if left:
        aside = next(p for n in range(1, sys.maxsize) if not (p := out_dir / f"old-{n}").exists())
        aside.mkdir()
        for old in left:
            os.replace(old, aside / old.name)
        print(f"moved an earlier run's files to {aside}")
    return None


def same_run(checkpoint: dict, config, corpus: Corpus):
    """A UserError that names what differs, if the checkpoint is of another run than config's."""
    # cosine and linear end at max_steps: another end is another schedule
    free = FREE_TO_CHANGE | ({"max_steps"} if config.lr_schedule == "constant" else set())
    differ = differences(checkpoint["config"], config, {f.name for f in fields(config)} - free)
    if checkpoint["corpus_sha256"] != corpus.sha256 and not differ:
        differ = [f"the files of {corpus.folder} have changed"]
    if differ:
        raise UserError(f"{config.out_dir}/ckpt.pt is of another run: {'; '.join(differ)}. Use those values, another --out_dir, "
                        "or --resume=no to start over")


def differences(saved: dict, config, names: set) -> list[str]:
    """In words, which of the options `names` are others in config than in a checkpoint's; an option that is younger than the
    checkpoint had its default."""
    return [f"{f.name} was {saved.get(f.name, f.default)!r}, is {getattr(config, f.name)!r}" for f in fields(config)
            if f.name in names and saved.get(f.name, f.default) != getattr(config, f.name)]


def start_log(path: Path, step: int, header: dict):
    """Begins log.jsonl, or leaves the lines of it up to `step`: those after it are written again, and the last may be half a
    line. The first is the header, where it had begun before with the config as it is now: a run may go on with more steps."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            entry = json.loads(line)
            if "config" in entry:
                header = entry | {"config": header["config"]}
            elif entry["step"] <= step:
                kept.append(entry)
    with atomic_write(path) as f:
        f.write("".join(json.dumps(entry) + "\n" for entry in [header, *kept]).encode())
