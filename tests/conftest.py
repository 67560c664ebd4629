import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import train
from checkpoint import RunState, load_checkpoint, load_model, save_checkpoint
from config import run
from data import Corpus, lock, write_meta
from data.tokenizing import Tokenizer

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are small
os.environ["OMP_NUM_THREADS"] = "1"
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_steps": 6,
        "warmup_steps": 2, "eval_tokens": 48, "eval_every": 2, "checkpoint_every": 2,
        "log_every": 1, "lr_schedule": "constant", "dropout": 0.1, "device": "cpu"}


@pytest.fixture(autouse=True)
def same_random_numbers_in_any_order_of_tests():
    torch.manual_seed(0)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) runs a script's main() in this process, as its command line does. It
    must end with exit code 0 (or code=...); with error=..., with 2 and one line that contains it.
    Returns (stdout, stderr)."""

    def call(main, *arguments, error="", code=0):
        script = sys.modules[main.__module__].__file__
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        locks = []  # a real process holds its lock until it ends
        monkeypatch.setattr("train.lock", lambda folder: locks.append(lock(folder)))
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            run(main)
            ended = 0
        except SystemExit as stop:
            ended = stop.code or 0
        finally:
            for descriptor in locks:
                os.close(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert ended == (2 if error else code), err
        assert not error or error in err and err.count("\n") == 1, err
        return out, err

    return call


def arguments(corpus, folder, **more):
    """The command line of a tiny run of train.py."""
    values = TINY | {"dataset": corpus, "out_dir": folder} | more
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture
def fit(call, corpus):
    """fit(folder, **options) trains with TINY and these options; returns stdout. See `call`."""

    def fit(folder, error="", code=0, **options):
        return call(train.main, *arguments(corpus, folder, **options), error=error, code=code)[0]

    return fit


def read_log(folder, name="log.jsonl"):
    """Headers, and the other lines without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    headers = [line for line in lines if "config" in line]
    clock = ("seconds", "tokens_per_s")
    return headers, [{k: v for k, v in line.items() if k not in clock}
                     for line in lines if "config" not in line]


def randomize(model, std=0.3, seed=0):
    """Weights so large that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std, generator=generator)
    return model


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown tables in a text: head, dashes, ..."""
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]


def save_run(folder: Path, model, config, tokenizer=None) -> Path:
    """A run folder with the best.pt of a model."""
    folder.mkdir(exist_ok=True)
    corpus = SimpleNamespace(tokenizer=tokenizer, checksum="")
    save_checkpoint(folder / "best.pt", model, None, config, corpus, RunState())
    return folder


def load(path):
    """The model of a checkpoint."""
    return load_model(load_checkpoint(path), "cpu")


def make_corpus(folder: Path) -> Path:
    """A small corpus of bytes, the start of model.py."""
    folder.mkdir(parents=True)
    n_train, n_val, text = 6000, 600, (ROOT / "model.py").read_bytes()[:6600]
    for split, raw in (("train", text[:n_train]), ("val", text[n_train:])):
        np.frombuffer(raw, np.uint8).astype("<u2").tofile(folder / f"{split}_0000.bin")
    write_meta(folder, {"options": {}, "tokenizer": {"kind": "bytes"}, "vocab_size": 256,
                        "tokens": {"train": [n_train], "val": [n_val]}})
    return folder


def texts(folder: Path) -> list[str]:
    """Train and val of a corpus as text."""
    corpus = Corpus(folder)
    return [Tokenizer(corpus.tokenizer).decode(corpus.windows(split, [0], n - 1)[0].tolist())
            for split, n in corpus.tokens.items()]


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")
