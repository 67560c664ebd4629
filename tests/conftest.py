import dataclasses
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from config import run
from data import CorpusWriter, Tokenizer

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the models here are too small to share out
os.environ["OMP_NUM_THREADS"] = "1"  # and the same for the scripts that are started
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_steps": 4, "eval_tokens": 64,
        "device": "cpu", "log_every": 1}


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) runs a script's main() as its command line does -> (exit code, stdout, stderr)."""

    def _call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [sys.modules[main.__module__].__file__, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            run(main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return _call


@pytest.fixture
def corpus(tmp_path):
    """A small corpus of bytes with something to learn: 6,000 tokens to train on, 600 to validate."""
    words = [b"def ", b"return ", b"self.", b"import ", b"class ", b"None\n", b"(x, y)", b": "]
    picks = np.random.RandomState(0).randint(len(words), size=3000)
    text = b"".join(words[i] for i in picks)
    tokenizer = Tokenizer({"kind": "bytes"})
    with CorpusWriter(tmp_path / "corpus", tokenizer, source="test") as writer:
        writer.write("train", tokenizer.encode(text[:6000]))
        writer.write("val", tokenizer.encode(text[6000:6600]))
    return tmp_path / "corpus"


@pytest.fixture(scope="session")
def forks():
    """Makes processes that have everything imported already, which takes seconds: forks.Process(target=..., args=...)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sample", "test_storm", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


def options(values: dict, **more) -> list[str]:
    return [f"--{name}={value}" for name, value in (values | more).items()]


def randomize(model, std=0.3, seed=0):
    """Weights so large that every part of the model shows in the logits (at the start attention is nearly even)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std, generator=generator)
    return model


def defaults(cls) -> dict:
    return {f.name: f.default for f in dataclasses.fields(cls)}
