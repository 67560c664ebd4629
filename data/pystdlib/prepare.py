"""The built-in corpus: the source of your own Python's standard library, as bytes. Nothing is downloaded.

    python data/pystdlib/prepare.py

Tests and site-packages are left out, which leaves about 11 MB. A file goes to train or (one in ten) to val by a hash of
its name; a zero byte ends each file.
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, run
from data import Corpus, CorpusWriter, Tokenizer

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def main():
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(stdlib) for path in stdlib.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not LEFT_OUT & set(path.parts))
    if not names:
        raise UserError(f"no Python sources in {stdlib}; --dataset=shakespeare_char or a text of your own will do instead")
    tokenizer = Tokenizer({"kind": "bytes"})
    folder = Path(__file__).parent
    with CorpusWriter(folder, tokenizer, source=f"standard library of Python {sys.version.split()[0]}") as corpus:
        for name in names:
            split = "val" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"
            corpus.write(split, tokenizer.encode((stdlib / name).read_bytes() + b"\0"))
    print(f"{len(names):,} files, {corpus.counts['train']:,} bytes to train on, {corpus.counts['val']:,} to validate")
    print(f"a bigram model of the bytes reaches a val loss of {bigram_loss(Corpus(folder)):.3f} nats")


def bigram_loss(corpus) -> float:
    """Mean -log p(byte | byte before it) on val, in nats, p counted on train with one added to each count."""
    pairs = {}
    for split in ("train", "val"):
        ids = np.fromfile(corpus.folder / f"{split}.bin", corpus.dtype).astype(np.int64)
        pairs[split] = np.bincount(256 * ids[:-1] + ids[1:], minlength=256 * 256).reshape(256, 256)
    p = (pairs["train"] + 1) / (pairs["train"] + 1).sum(axis=1, keepdims=True)
    return float(-(pairs["val"] * np.log(p)).sum() / pairs["val"].sum())


if __name__ == "__main__":
    run(main)
