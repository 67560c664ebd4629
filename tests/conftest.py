import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from checkpoint import RunState, save_checkpoint
from config import run
from data import Corpus, lock, write_meta
from data.tokenizing import Tokenizer

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are small
os.environ["OMP_NUM_THREADS"] = "1"


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


def make_text(n_bytes: int, seed=0) -> bytes:
    """Text with something to learn: random keywords of Python."""
    words = [b"def ", b"return ", b"self.", b"import ", b"class ", b"None\n", b"(x, y)", b": "]
    picks = np.random.RandomState(seed).randint(len(words), size=n_bytes)
    return b"".join(words[i] for i in picks)[:n_bytes]


def make_corpus(folder: Path, n_train=6000, n_val=600) -> Path:
    """A small corpus of bytes."""
    folder.mkdir(parents=True)
    text = make_text(n_train + n_val)
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
