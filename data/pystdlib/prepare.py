"""The default corpus: the standard library of your own Python as bytes, about 11 MB of source.

    python data/pystdlib/prepare.py

Tests and site-packages are left out. One file in ten is val, by a hash of its name. A zero byte
ends each file. Nothing is downloaded.
"""

import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import parse, run
from data import Corpus
from data.tokenizing import Job, write_corpus

import numpy as np

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass
class PrepareConfig:
    pass  # no options but --help


def main():
    parse(PrepareConfig)
    folder, stdlib = Path(__file__).parent, Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(stdlib) for path in stdlib.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not LEFT_OUT & set(path.parts))
    size = sum((stdlib / name).stat().st_size for name in names)
    options = {"python": sys.version.split()[0], "files": len(names), "bytes": size}
    write_corpus(folder, {"kind": "bytes"}, options, [Job(size, partial(read, stdlib, names))])
    print(f"a bigram model has a val loss of {bigram_loss(Corpus(folder)):.3f} nats per byte")


def read(stdlib: Path, names: list[str]):
    for name in names:
        split = "val" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"
        yield split, (stdlib / name).read_bytes(), True


def bigram_loss(corpus: Corpus) -> float:
    """Mean of -log p(byte | previous byte) on val in nats. p: the counts on train, plus one."""
    train, val = (corpus.windows(split, [0], n - 1)[0] for split, n in corpus.tokens.items())
    counts = np.bincount(256 * train[:-1] + train[1:], minlength=1 << 16).reshape(256, 256) + 1
    p = counts / counts.sum(axis=1, keepdims=True)
    return float(-np.log(p[val[:-1], val[1:]]).mean())


if __name__ == "__main__":
    run(main)
