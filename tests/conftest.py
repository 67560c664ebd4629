import os
import signal
import sys
from pathlib import Path

from config import run
from data import lock, write_meta

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are small
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) runs a script's main() in this process, as its command line does.
    Returns (exit code, stdout, stderr)."""

    def call(main, *arguments):
        script = sys.modules[main.__module__].__file__
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        locks = []  # a real process holds its lock until it ends
        monkeypatch.setattr("train.lock", lambda folder: locks.append(lock(folder)))
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            run(main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for descriptor in locks:
                os.close(descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return call


def randomize(model, std=0.3, seed=0):
    """Weights so large that every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std, generator=generator)
    return model


def make_text(n_bytes: int, seed=0) -> bytes:
    """Text with something to learn: random keywords of Python."""
    words = [b"def ", b"return ", b"self.", b"import ", b"class ", b"None\n", b"(x, y)", b": "]
    picks = np.random.RandomState(seed).randint(len(words), size=n_bytes)
    return b"".join(words[i] for i in picks)[:n_bytes]


def make_corpus(folder: Path, n_train=6000, n_val=600) -> Path:
    """A small corpus of bytes."""
    folder.mkdir(parents=True)
    text = make_text(n_train + n_val)
    tokens = {}
    for split, raw in (("train", text[:n_train]), ("val", text[n_train:])):
        name = f"{split}_0000.bin"
        np.frombuffer(raw, np.uint8).astype("<u2").tofile(folder / name)
        tokens[split] = [len(raw)]
    write_meta(folder, {"options": {}, "tokenizer": {"kind": "bytes"}, "vocab_size": 256,
                        "tokens": tokens})
    return folder


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "corpus")
