"""Tokenizers, and the shard writer that the scripts data/*/prepare.py share.

A script splits its input into jobs; job i writes the shards train_i and val_i. Jobs run in several
processes. A finished shard is never written again, so rerunning the same command resumes.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from config import UserError
from data import Corpus, atomic_write, lock, read_meta, shard_path, token_dtype, write_meta

import numpy as np

SPLITS = ("train", "val")
PIECE = 1 << 20  # bytes of text that are tokenized at a time


class Tokenizer:
    """Text to token ids and back. `spec`, which meta.json and checkpoints keep, is one of

        {"kind": "bytes"}                 UTF-8 bytes; a zero byte ends a document
        {"kind": "char", "chars": "..."}  the characters of a corpus; if among them, "\\0" ends one
        {"kind": "gpt2"}                  GPT-2's BPE, 50,257 ids; <|endoftext|> ends a document

    end_of_text: the id that ends a document, or None. start: the id that generation starts with.
    """

    def __init__(self, spec: dict):
        self.spec, self.kind = spec, spec.get("kind")
        if self.kind == "bytes":
            self.vocab_size, self.end_of_text = 256, 0
        elif self.kind == "char":
            self.chars = spec["chars"]
            self.vocab_size = len(self.chars)
            self.end_of_text = self.chars.index("\0") if "\0" in self.chars else None
            codes = np.array([ord(c) for c in self.chars], np.int64)
            self.ids = np.full(codes.max(initial=0) + 2, -1, np.int32)  # code point -> id; -1: none
            self.ids[codes] = np.arange(len(codes))
        elif self.kind == "gpt2":
            self.bpe = load_gpt2()
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token
        else:
            raise UserError(f"unknown tokenizer {spec}")
        self.start = self.end_of_text
        if self.start is None:
            self.start = max(self.chars.find("\n"), 0)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids (T,) of a text or of its UTF-8 bytes."""
        if self.kind == "bytes":
            raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            return np.frombuffer(raw, np.uint8)
        if isinstance(text, bytes):
            text = decode_utf8(text, "the text")
        elif self.kind == "gpt2":  # half a character, which a terminal may send, becomes U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.kind == "gpt2":
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if (ids < 0).any():
            raise UserError(f"character {text[int(np.argmax(ids < 0))]!r} is not among the "
                            f"{self.vocab_size} of this tokenizer")
        return ids

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 bytes of some ids. An id may be part of a character: decode incrementally."""
        ids = [i for i in ids if i < self.vocab_size]  # a model may have more ids than its corpus
        if self.kind == "bytes":
            return bytes(ids)
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(ids)
        return "".join(self.chars[i] for i in ids).encode("utf-8", "surrogatepass")

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


def load_gpt2():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the network, or a cached file that does not match its hash
        raise UserError(f"cannot load GPT-2's BPE ({type(error).__name__}): tiktoken downloads it "
                        "once; without a network, set TIKTOKEN_CACHE_DIR to a folder that has it"
                        ) from None


def decode_utf8(raw: bytes, name, position: int = 0) -> str:
    """raw.decode(); an error names the file and the byte, where raw starts at byte `position`."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {position + error.start:,} (the tokenizer "
                        "bytes takes any file)") from None


def read_text(f, name, position: int = 0, ends: bool = True, check_utf8: bool = True):
    """Yields (text, whether a document ends there) for the lines of f, about 1 MB at a time.

    Lines <|endoftext|> separate documents; `ends`: whether the end of f ends one, too. Drops empty
    documents and a byte order mark; \\r\\n becomes \\n. f starts at byte `position` of file `name`.
    """
    lines, size, in_document = [], 0, False
    for line in itertools.chain(f, [b""]):
        is_delimiter = line.strip() == b"<|endoftext|>"
        if line and not is_delimiter:
            lines.append(line)
            size += len(line)
            if size < PIECE:
                continue
        raw = b"".join(lines)
        if check_utf8:
            decode_utf8(raw, name, position)
        text = (raw.removeprefix(b"\xef\xbb\xbf") if position == 0 else raw).replace(b"\r\n", b"\n")
        in_document = in_document or bool(text)
        document_ends = in_document and (is_delimiter or not line and ends)
        if text or document_ends:
            yield text, document_ends
        in_document = in_document and not document_ends
        position += size + len(line) * is_delimiter
        lines, size = [], 0


class Job(NamedTuple):
    size: int  # bytes of input, for the progress
    read: Callable  # () -> iterable of (split, UTF-8 bytes, whether the document ends there)


def write_corpus(folder: Path, spec: dict, options: dict, jobs: list[Job], workers: int = 1):
    """Writes a corpus, or the shards that an interrupted call with the same options did not write.

    spec: of the tokenizer; "char" without "chars" takes those of the text. options: all that the
    content depends on, input sizes included (JSON). workers: processes; 0: one for each core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder)
    try:
        meta = start_or_resume(folder, spec, options, jobs)
        missing = [i for i in range(len(jobs))
                   if not all(shard_path(folder, split, i).exists() for split in SPLITS)]
        if "tokens" in meta and not missing:
            Corpus(folder)  # checks the sizes
            print(f"{folder} is complete (remove {folder / 'meta.json'} to prepare it again)")
            return
        print(f"{folder}: {len(jobs) - len(missing)} of {len(jobs)} parts are done", flush=True)
        start, done, total = time.monotonic(), 0, sum(jobs[i].size for i in missing)
        for i in run_jobs(folder, meta["tokenizer"], jobs, missing, workers or os.cpu_count()):
            done += jobs[i].size
            rate = max(done, 1) / (time.monotonic() - start)
            print(f"part {i}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s, "
                  f"{(total - done) / rate:,.0f} s left", flush=True)
        finish(folder, meta, len(jobs))
    finally:
        os.close(descriptor)


def start_or_resume(folder: Path, spec: dict, options: dict, jobs: list[Job]) -> dict:
    """Writes meta.json without numbers of tokens, unless a preparation has got further. Returns its
    content."""
    if any(folder.glob("*_*.bin")) and (meta := read_meta(folder)):
        if differ := [key for key in options if meta["options"].get(key) != options[key]]:
            raise UserError(f"{folder} was prepared with another {', '.join(differ)}: use another "
                            f"--name, or remove {folder / 'meta.json'} to prepare it again")
        return meta
    for split in SPLITS:  # shards without meta.json are of unknown origin
        for path in [*folder.glob(f"{split}_*.bin"), *folder.glob(f".{split}_*.bin.tmp")]:
            path.unlink()
    if spec == {"kind": "char"}:
        chars = set()
        for _, raw, ends in itertools.chain.from_iterable(job.read() for job in jobs):
            chars |= set(raw.decode()) | ({"\0"} if ends else set())
        spec = {"kind": "char", "chars": "".join(sorted(chars))}
    meta = {"options": options, "tokenizer": spec, "vocab_size": Tokenizer(spec).vocab_size}
    write_meta(folder, meta)
    return meta


def finish(folder: Path, meta: dict, n_jobs: int):
    """Adds the number of tokens in each shard to meta.json."""
    size = token_dtype(meta["vocab_size"]).itemsize
    tokens = {split: [shard_path(folder, split, i).stat().st_size // size for i in range(n_jobs)]
              for split in SPLITS}
    n_train, n_val = sum(tokens["train"]), sum(tokens["val"])
    if min(n_train, n_val) < 2:
        (folder / "meta.json").unlink()
        raise UserError(f"the text gives {n_train:,} train and {n_val:,} val tokens: add text or "
                        "change --val_fraction")
    write_meta(folder, meta | {"tokens": tokens})
    print(f"{n_train:,} train and {n_val:,} val tokens, {meta['vocab_size']:,} ids; train on them "
          f"with --dataset={folder.name}")


def run_jobs(folder: Path, spec: dict, jobs: list[Job], numbers: list[int], workers: int):
    """Runs the jobs of these numbers; yields each number when its shards are written."""
    workers = min(workers, len(numbers))
    if workers < 2:
        for i in numbers:
            yield write_shards(folder, spec, i, jobs[i])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent)
    mask = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    mask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is for this process
    futures = [pool.submit(write_shards, folder, spec, i, jobs[i]) for i in numbers]
    mask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker was killed or ran out of memory: rerun the same command with "
                        "fewer --workers to resume") from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent():
    """Ends this worker when the main process is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_shards(folder: Path, spec: dict, i: int, job: Job) -> int:
    """Tokenizes job i. Returns i."""
    tokenizer = Tokenizer(spec)
    dtype, end = token_dtype(tokenizer.vocab_size), tokenizer.end_of_text
    train_path, val_path = (shard_path(folder, split, i) for split in SPLITS)
    with atomic_write(train_path) as train, atomic_write(val_path) as val:
        for split, raw, ends in job.read():
            f = train if split == "train" else val
            f.write(tokenizer.encode(raw).astype(dtype))
            if ends and end is not None:
                f.write(dtype.type(end))
    return i
