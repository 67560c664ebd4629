"""Your own text files as a corpus.

    python data/text/prepare.py FILE... --name=mytext --tokenizer=bytes|char|gpt2
    python train.py config/quickstart.py --dataset=mytext --out_dir=out/mytext

The files are read in the given order, as UTF-8 (bytes: anything). A line <|endoftext|> ends a
document, and so does the end of a file. The last val_fraction of the text becomes val. Rerun the
same command to resume.
"""

import io
import itertools
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse_with_paths, run
from data import FOLDER
from data.tokenizing import Job, read_text, write_corpus

SHARD_SIZE = 1 << 25  # bytes of text in a shard, about
LINE = 1 << 20  # a line above 1 MB may be split between two characters


@dataclass
class PrepareConfig:
    name: str = "mytext"  # the corpus is written to data/NAME
    tokenizer: Literal["bytes", "char", "gpt2"] = "bytes"  # 256 bytes | its characters | GPT-2's
    val_fraction: float = 0.1  # fraction of the text, at its end, that becomes val
    workers: int = 0  # processes that tokenize; 0: one for each core

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1")


def main():
    config, paths = parse_with_paths(PrepareConfig, "FILE")
    if not paths:
        raise UserError("name the text files: python data/text/prepare.py FILE... --name=mytext")
    sizes = [os.path.getsize(path) for path in paths]
    options = {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction,
               "shard_size": SHARD_SIZE,
               "input": [[Path(path).name, size] for path, size in zip(paths, sizes, strict=True)]}
    jobs = []
    parts = split_files(paths, sizes, config.val_fraction)
    for _, group in itertools.groupby(parts, lambda part: part[0]):
        group = list(group)
        size = sum(stop - begin for *_, begin, stop in group)
        jobs.append(Job(size, partial(read, group, config.tokenizer != "bytes")))
    write_corpus(FOLDER / config.name, {"kind": config.tokenizer}, options, jobs, config.workers)


def split_files(paths: list[str], sizes: list[int], val_fraction: float):
    """Yields (job number, path, split, begin, stop) of parts of files. A job has about SHARD_SIZE
    bytes: one part of a large file, or several small files."""
    total, start = sum(sizes), 0  # start: of a file in the whole text
    val_start = int((1 - val_fraction) * total)
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "rb") as f:
            n_train = min(max(val_start - start, 0), size)
            if 0 < n_train < size:
                n_train = cut(f, n_train, limit=(total - val_start) // 2)
            for split, begin, end in (("train", 0, n_train), ("val", n_train, size)):
                while begin < end:
                    stop = min(cut(f, begin + SHARD_SIZE, limit=LINE), end)
                    yield (start + begin) // SHARD_SIZE, path, split, begin, stop
                    begin = stop
        start += size


def cut(f, at: int, limit: int) -> int:
    """The best position from `at` to at + limit to split a text: after a line <|endoftext|> or at
    the end of the file, else at the start of a line, else between two characters."""
    f.seek(at - 1)
    position, line_start = at - 1, 0
    while (line := f.readline(LINE)) and position + len(line) <= at + limit:
        position += len(line)
        if line.strip() == b"<|endoftext|>":
            return position
        if line.endswith(b"\n"):
            line_start = line_start or position
    if not line:
        return position
    f.seek(at)
    while b"\x80" <= f.read(1) < b"\xc0":  # inside a character
        at += 1
    return line_start or at


def read(parts, check_utf8: bool):
    for _, path, split, begin, stop in parts:
        with open(path, "rb") as f:
            f.seek(begin)
            lines, is_end = io.BytesIO(f.read(stop - begin)), not f.read(1)
        for raw, ends in read_text(lines, path, begin, is_end, check_utf8):
            yield split, raw, ends


if __name__ == "__main__":
    run(main)
