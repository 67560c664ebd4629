"""Corpora: token shards on disk, and the batches that training reads from them.

A corpus is a folder with meta.json (options, tokenizer, vocab_size, number of tokens in each shard)
and shards train_0000.bin, val_0000.bin, ...: token ids, uint16 (uint32 above 65,536), no header.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path

from config import UserError

import numpy as np

FOLDER = Path(__file__).parent  # the corpus NAME is in data/NAME


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that becomes `path` when all of it is on disk. After an error, `path` is
    what it was. Only one process may write to `path`: see `lock`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name must be on disk, too
        os.close(folder)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # None: as for a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def lock(folder) -> int:
    """Locks a folder for one writer until the returned descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing to {folder}") from None
    return descriptor


def shard_path(folder: Path, split: str, i: int) -> Path:
    return folder / f"{split}_{i:04d}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def checksum(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def write_meta(folder: Path, meta: dict):
    with atomic_write(folder / "meta.json") as f:
        f.write(json.dumps(meta | {"checksum": checksum(meta)}, indent=1).encode())


def read_meta(folder: Path) -> dict:
    """The content of meta.json; {} if there is none."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, KeyError):
        meta = json.loads(path.read_bytes())
        if meta.pop("checksum") == checksum(meta):
            return meta
    raise UserError(f"{path} is damaged, was changed or is from version 1: remove it and prepare "
                    "the corpus again")


class Corpus:
    """A prepared corpus. Opening it checks the sizes of the shards; reading from it checks the ids.
    tokenizer: the spec of tokenizing.Tokenizer. tokens: {"train": n, "val": n}."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        meta = read_meta(folder)
        if "tokens" not in meta:
            raise UserError(f"{'an unfinished' if meta else 'no'} corpus in {folder}: run python "
                            f"data/{folder.name}/prepare.py, or data/text/prepare.py for your text")
        self.tokenizer, self.vocab_size = meta["tokenizer"], meta["vocab_size"]
        self.checksum, self.dtype = checksum(meta), token_dtype(meta["vocab_size"])
        self.edges = {}  # split -> the position where each shard begins, and the end
        for split, counts in meta["tokens"].items():
            self.edges[split] = np.cumsum([0, *counts])
            for i, count in enumerate(counts):
                path, expected = shard_path(folder, split, i), count * self.dtype.itemsize
                size = path.stat().st_size if path.exists() else 0
                if size != expected:
                    raise UserError(f"{path} has {size:,} bytes, not {expected:,}: remove it and "
                                    "prepare the corpus again, which writes only what is missing")
        self.tokens = {split: int(edges[-1]) for split, edges in self.edges.items()}

    def windows(self, split: str, starts, block_size: int) -> np.ndarray:
        """The block_size + 1 tokens from each start on, (len(starts), block_size + 1) int64."""
        rows = np.empty((len(starts), block_size + 1), np.int64)
        edges = self.edges[split]
        for row, start in zip(rows, starts, strict=True):
            i = np.searchsorted(edges, start, side="right") - 1  # the shard that contains start
            while len(row):  # a window may cross shards
                path, count = shard_path(self.folder, split, i), min(edges[i + 1] - start, len(row))
                offset = (start - edges[i]) * self.dtype.itemsize
                ids = np.fromfile(path, self.dtype, count, offset=offset)
                if len(ids) < count or ids.max(initial=0) >= self.vocab_size:
                    raise UserError(f"{path} is damaged (too short, or an id is too large): remove "
                                    "it and prepare the corpus again")
                row[:count] = ids
                row, start, i = row[count:], start + count, i + 1
        return rows


class TrainBatches:
    """The training batches, a pure function of (seed, step): each epoch cuts the corpus into
    adjacent windows, from a random offset, and reads each one once, in shuffled order. A run can
    resume at any step, and any number of processes divides the same sequences among them."""

    def __init__(self, corpus: Corpus, block_size: int, batch_size: int, seed: int):
        check_length(corpus, "train", block_size)
        self.corpus, self.block_size, self.batch_size = corpus, block_size, batch_size
        self.seed, self.epoch, n_tokens = seed, None, corpus.tokens["train"]
        # one window fewer than fit leaves room for the random offset
        self.n_windows = max(1, (n_tokens - block_size) // block_size)
        self.n_offsets = n_tokens - self.n_windows * block_size

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The sequences of process `rank`, (batch_size / world_size, block_size + 1) int64."""
        n = self.batch_size // world_size
        first, starts = step * self.batch_size + rank * n, []
        for sequence in range(first, first + n):
            epoch, i = divmod(sequence, self.n_windows)
            if epoch != self.epoch:
                random = np.random.RandomState([self.seed, epoch])  # the same in all numpy versions
                self.epoch, self.offset = epoch, random.randint(self.n_offsets)
                self.order = np.arange(self.n_windows, dtype=np.uint32)
                random.shuffle(self.order)
            starts.append(self.offset + int(self.order[i]) * self.block_size)
        return self.corpus.windows("train", starts, self.block_size)


def check_length(corpus: Corpus, split: str, n: int):
    if corpus.tokens[split] <= n:
        raise UserError(f"{corpus.folder} has {corpus.tokens[split]:,} {split} tokens, not more "
                        f"than {n:,}: lower --block_size or prepare more text")
