"""Your own text files as a corpus.

    python data/text/prepare.py FILE... --name=mytext --tokenizer=bytes|char|gpt2|out/x/best.pt
    python train.py config/quickstart.py --dataset=mytext --out_dir=out/mytext

The files are read in the given order, as UTF-8 (bytes: anything). A line <|endoftext|> ends a
document, and so does the end of a file. The last val_fraction of the text becomes val. Rerun the
same command to resume.
"""

import io
import mmap
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse_with_paths, run
from data import FOLDER
from data.tokenizing import Job, split_documents, write_corpus

SHARD_SIZE = 1 << 24  # bytes of text in a shard, at least, except in the last


@dataclass
class PrepareConfig:
    name: str = "mytext"  # the corpus is written to data/NAME
    tokenizer: str = "bytes"  # bytes, char, gpt2, or a checkpoint that has the tokenizer
    val_fraction: float = 0.1  # fraction of the text, at its end, that becomes val
    workers: int = 0  # processes that tokenize; 0: one for each core


def main():
    config, paths = parse_with_paths(PrepareConfig, "FILE")
    if not paths:
        raise UserError("name the text files: python data/text/prepare.py FILE... --name=mytext")
    files = [(path, os.path.getsize(path)) for path in paths]
    options = {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction,
               "shard_size": SHARD_SIZE, "input": [[Path(path).name, size] for path, size in files]}
    jobs = [Job(sum(end - begin for *_, begin, end in parts),
                partial(read, parts, config.tokenizer != "bytes"))
            for parts in split_files(files, config.val_fraction)]
    spec = {"kind": config.tokenizer}
    if config.tokenizer not in ("bytes", "char", "gpt2"):
        from checkpoint import load_checkpoint  # imports torch

        spec = load_checkpoint(config.tokenizer)["tokenizer"]
    write_corpus(FOLDER / config.name, spec, options, jobs, config.workers)


def split_files(files: list[tuple], val_fraction: float) -> list[list[tuple]]:
    """The parts of files (path, split, begin, end) of each job: SHARD_SIZE bytes, or more."""
    jobs, total, start = {}, sum(size for _, size in files), 0  # start: of a file in the whole text
    val_start = int((1 - val_fraction) * total)
    for path, size in files:
        with open(path, "rb") as f:
            text = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        n_train = min(max(val_start - start, 0), size)
        if 0 < n_train < size:
            n_train = cut(text, n_train, (total - val_start) // 2)
        for split, begin, end in (("train", 0, n_train), ("val", n_train, size)):
            while begin < end:
                stop = min(cut(text, begin + SHARD_SIZE, SHARD_SIZE // 2), end)
                part = path, split, begin, stop
                jobs.setdefault((start + begin) // SHARD_SIZE, []).append(part)
                begin = stop
        start += size
    return list(jobs.values())


def cut(text, at: int, limit: int) -> int:
    """The best position from `at` to at + limit to split a text: behind a line <|endoftext|> or at
    the end of the text, else behind a line, else behind a character."""
    if match := re.compile(rb"\n<\|endoftext\|>\r?\n").search(text, at - 1, at + limit):
        return match.end()
    if at + limit >= len(text):
        return len(text)
    line_end = text.find(b"\n", at - 1, at + limit) + 1
    return line_end or re.compile(rb"(?s).(?![\x80-\xbf])").search(text, at - 1).end()


def read(parts: list[tuple], check_utf8: bool):
    for path, split, begin, end in parts:
        with open(path, "rb") as f:
            f.seek(begin)
            raw, is_end = f.read(end - begin), not f.read(1)
        *documents, last = split_documents(io.BytesIO(raw), path, begin, check_utf8)
        for document in filter(None, documents):
            yield split, document, True
        if last:
            yield split, last, is_end


if __name__ == "__main__":
    run(main)
