"""Tokenizers, and the shard writer that the scripts data/*/prepare.py share.

A script splits its input into jobs; job i writes the shards train_i and val_i. Jobs run in several
processes. A finished shard is never written again, so rerunning the same command resumes.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from config import UserError, need
from data import Corpus, atomic_write, lock, read_meta, shard_path, token_dtype, write_meta

import numpy as np


class Tokenizer:
    """Text to token ids and back. `spec`, which meta.json and checkpoints keep, is one of

        {"kind": "bytes"}                 UTF-8 bytes; a zero byte ends a document
        {"kind": "char", "chars": "..."}  the characters of a corpus; if among them, "\\0" ends one
        {"kind": "words", "words": [...]} words between spaces; the first one ends a document
        {"kind": "gpt2"}                  GPT-2's BPE, 50,257 ids; <|endoftext|> ends a document
        {"kind": "hf", "json": "...", "end_of_text": 0}    the content of a tokenizer.json

    end_of_text: the id that ends a document, or None. start: the id that generation starts with.
    """

    def __init__(self, spec: dict):
        self.spec, self.kind = spec, spec and spec.get("kind")
        if self.kind == "bytes":
            self.vocab_size, self.end_of_text = 256, 0
        elif self.kind == "char":
            self.chars = spec["chars"]
            self.ids = {char: i for i, char in enumerate(self.chars)}
            self.vocab_size, self.end_of_text = len(self.chars), self.ids.get("\0")
        elif self.kind == "words":
            self.chars = [f"{word} " for word in spec["words"]]
            self.ids = {word: i for i, word in enumerate(spec["words"])}
            self.vocab_size, self.end_of_text = len(self.chars), 0
        elif self.kind == "gpt2":
            import tiktoken

            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # of the network, or a cached file with another hash
                raise UserError(f"tiktoken cannot download GPT-2's BPE ({type(error).__name__}): "
                                "set TIKTOKEN_CACHE_DIR to a folder that has it") from None
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token
        elif self.kind == "hf":
            self.hf = need("tokenizers").Tokenizer.from_str(spec["json"])
            self.vocab_size = max(self.hf.get_vocab().values()) + 1
            self.end_of_text = spec["end_of_text"]
        else:
            raise UserError(f"unknown tokenizer {spec}" if spec else "the model has no tokenizer")
        self.start = self.end_of_text
        if self.start is None:
            self.start = self.ids.get("\n", 0) if self.kind == "char" else 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids (T,) of a text or of its UTF-8 bytes."""
        raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
        if self.kind == "bytes":
            return np.frombuffer(raw, np.uint8)
        text = raw.decode("utf-8", "replace")
        if self.kind == "gpt2":
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        if self.kind == "hf":
            return np.array(self.hf.encode(text, add_special_tokens=False).ids, np.uint32)
        units = text.split() if self.kind == "words" else text
        try:
            return np.fromiter(map(self.ids.__getitem__, units), np.uint32, len(units))
        except KeyError as error:
            raise UserError(f"{error} is not among the {self.vocab_size} ids of this "
                            "tokenizer") from None

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 bytes of some ids. They may end within a character (hf: then as U+FFFD)."""
        ids = [i for i in ids if i < self.vocab_size]  # a model may have more ids than its corpus
        if self.kind == "bytes":
            return bytes(ids)
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(ids)
        if self.kind == "hf":
            return self.hf.decode(ids, skip_special_tokens=False).encode()
        return "".join(self.chars[i] for i in ids).encode()

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


def split_documents(f, name, position: int = 0, check_utf8: bool = True):
    """Yields the documents (bytes) of an open file, which lines <|endoftext|> separate. Drops a
    byte order mark; \\r\\n becomes \\n. f starts at byte `position` of the file `name`."""
    lines, errors = [], "strict" if check_utf8 else "ignore"
    for line in itertools.chain(f, [b"<|endoftext|>"]):
        try:
            line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 at byte {position + error.start:,}: convert it "
                            "(or use --tokenizer=bytes)") from None
        if line.strip() == b"<|endoftext|>":
            yield b"".join(lines).replace(b"\r\n", b"\n")
            lines = []
        else:
            lines.append(line if position else line.removeprefix(b"\xef\xbb\xbf"))
        position += len(line)


class Job(NamedTuple):
    size: int  # of the input, such as bytes, for the progress
    read: Callable  # () -> iterable of (split, UTF-8 bytes, whether the document ends there)


def write_corpus(folder: Path, spec: dict, options: dict, jobs: list[Job], workers: int = 1):
    """Writes a corpus, or the shards that an interrupted call with the same options did not write.
    spec: of the tokenizer; "char" without "chars" takes those of the text. options: all that the
    content depends on, input sizes included (JSON). workers: processes; 0: one for each core."""
    if not 0 < options.get("val_fraction", 0.1) < 1:
        raise UserError("--val_fraction must be between 0 and 1")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder)
    try:
        meta = start_or_resume(folder, spec, options, jobs)
        shards = {split: [shard_path(folder, split, i) for i in range(len(jobs))]
                  for split in ("train", "val")}
        missing = {i: job for i, job in enumerate(jobs)
                   if not all(paths[i].exists() for paths in shards.values())}
        print(f"{folder}: {len(jobs) - len(missing)} of {len(jobs)} parts are done", flush=True)
        done, total = 0, sum(job.size for job in missing.values())
        for i in run_jobs(folder, meta["tokenizer"], missing, workers or os.cpu_count()):
            done += jobs[i].size
            print(f"part {i} is done: {done / max(1, total):.0%} of the input", flush=True)
        if "tokens" not in meta:
            size = token_dtype(meta["vocab_size"]).itemsize
            meta["tokens"] = {split: [path.stat().st_size // size for path in paths]
                              for split, paths in shards.items()}
            write_meta(folder, meta)
        n_train, n_val = Corpus(folder).tokens.values()  # checks the sizes
        print(f"{n_train:,} train and {n_val:,} val tokens, {meta['vocab_size']:,} ids")
    finally:
        os.close(descriptor)


def start_or_resume(folder: Path, spec: dict, options: dict, jobs: list[Job]) -> dict:
    """The content of meta.json: of the preparation that it resumes, or new, without `tokens`."""
    if any(folder.glob("*_*.bin")) and (meta := read_meta(folder)):
        if differ := [key for key in options if meta["options"].get(key) != options[key]]:
            raise UserError(f"{folder} was prepared with another {', '.join(differ)}: use another "
                            f"--name, or remove {folder / 'meta.json'} to prepare it again")
        return meta
    for path in [*folder.glob("train_[0-9]*.bin"), *folder.glob("val_[0-9]*.bin")]:
        path.unlink()  # of unknown origin
    if spec == {"kind": "char"}:
        chars = set()
        for job in jobs:
            for _, raw, ends in job.read():
                chars.update(raw.decode(), "\0" * ends)
        spec = {"kind": "char", "chars": "".join(sorted(chars))}
    meta = {"options": options, "tokenizer": spec, "vocab_size": Tokenizer(spec).vocab_size}
    write_meta(folder, meta)
    return meta


def run_jobs(folder: Path, spec: dict, jobs: dict[int, Job], workers: int):
    """Runs the jobs, by number; yields each number when its shards are written."""
    write = partial(write_shards, folder, spec)
    if min(workers, len(jobs)) < 2:
        yield from map(write, jobs, jobs.values())
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield from pool.map(write, jobs, jobs.values())
    finally:
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Makes a worker end with the main process, and only then: Ctrl-C reaches all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shards(folder: Path, spec: dict, i: int, job: Job) -> int:
    """Tokenizes job i. Returns i."""
    tokenizer = Tokenizer(spec)
    dtype, end = token_dtype(tokenizer.vocab_size), tokenizer.end_of_text
    with (atomic_write(shard_path(folder, "train", i)) as train,
          atomic_write(shard_path(folder, "val", i)) as val):
        for split, raw, ends in job.read():
            f = train if split == "train" else val
            f.write(tokenizer.encode(raw).astype(dtype))
            if ends and end is not None:
                f.write(dtype.type(end))
    return i
