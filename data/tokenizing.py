"""From documents to token files: what prepare.py scripts for large texts share.

    source          documents in pieces, from files or from the network; it begins at source.start, and has come to source.place
    parts           a piece -> what of it is train and what is val, which each script decides
    write_corpus    parts -> lots of about 1 MB -> ids, by all cores -> the corpus, in the order of the source

Memory stays flat, the number of processes does not change the result, and a run that was stopped at any point, even killed,
goes on from the place that it last saved: its result is the same, byte for byte.
"""

import collections
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from config import UserError, end_with_parent
from data import FOLDER, CorpusWriter, Tokenizer

PIECE = 1 << 20  # bytes that are tokenized at a time
SAVE_EVERY = 10  # seconds of work that a killed run loses, at most
DISK = {"bytes": 2.0, "char": 2.0, "gpt2": 0.5}  # bytes of the corpus for a byte of English text, roughly
SPEED = {"bytes": 100e6, "char": 20e6, "gpt2": 5e6}  # bytes of text a second and process, roughly


def pieces(f):
    """Yields (bytes, whether a document ends here) of an open text file, about 1 MB at a time. A line <|endoftext|> ends a
    document, and so does the end of the file. The tokens of the pieces are those of the text in one piece."""
    piece = b""
    for block in blocks(f):
        first, *others = documents(block)
        if len(piece) >= PIECE and first:
            yield piece, False
            piece = first
        else:
            piece += first
        for other in others:
            yield piece, True
            piece = other
    yield piece, True


def blocks(f):
    """Yields an open file as blocks of whole lines, about 1 MB each, cut where the tokens do not change: between two lines
    that GPT-2's BPE never joins. A text without such a place is cut between two characters at 16 MB."""
    line = b""
    while block := bytearray(line + f.read(PIECE)):
        while line := f.readline(PIECE):
            between_characters = line[0] & 0xC0 != 0x80
            if never_joined(block, line) or len(block) >= 16 * PIECE and between_characters:
                break
            block += line
        yield bytes(block)


def never_joined(piece, line) -> bool:
    """Whether the text in `piece` ends in a single line feed with no white space, of any script, on either side."""
    before, after = (raw.decode("utf-8", "ignore") for raw in (piece[-5:-1], line[:4]))  # a character has up to 4 bytes
    return piece[-1:] == b"\n" and not before[-1:].isspace() and not after[:1].isspace()


def documents(block: bytes) -> list[bytes]:
    """A block of whole lines, split at the lines <|endoftext|>."""
    first, *others = block.split(b"<|endoftext|>")
    found = [first]
    for other in others:
        start = found[-1].rfind(b"\n") + 1
        line, _, after = other.partition(b"\n")
        if (found[-1][start:] + line).strip():  # not alone on its line
            found[-1] += b"<|endoftext|>" + other
        else:
            found[-1] = found[-1][:start]
            found.append(after)
    return found


def fingerprint(raw: bytes) -> str:
    """16 hexadecimal digits that say which document this is, from its first piece: the whole may be too large for memory."""
    return hashlib.sha256(raw[: 1 << 16]).hexdigest()[:16]


class Files:
    """The documents of local files. `read(path, file)` yields (bytes, whether a document ends here)."""

    def __init__(self, paths, read=lambda path, f: pieces(f)):
        self.paths, self.read, names = paths, read, [Path(path).name for path in paths]
        self.sizes = [os.path.getsize(path) for path in paths]
        self.name = ", ".join(names[:9] + [f"... {len(names)} files"] if len(names) > 10 else names)
        self.total = sum(self.sizes)
        self.recipe = {"input": [[name, os.path.getsize(path), os.stat(path).st_mtime_ns]
                                 for name, path in zip(names, paths, strict=True)], "piece_size": PIECE}
        self.start = {"file": 0, "piece": 0, "text": 0, "document": "", "done": 0}

    def __iter__(self):
        """Yields (bytes, whether a document ends here, the document's fingerprint, the file's name)."""
        self.file, self.piece, self.text, self.document, self.done = self.start.values()
        first, skip = self.file, self.piece
        for number, path in enumerate(self.paths[first:], first):
            with open(path, "rb") as f:
                for piece, (raw, ends) in enumerate(self.read(path, f), 1):
                    if piece <= skip or not raw:
                        continue
                    self.file, self.piece, self.text = number, piece, self.text + len(raw)
                    self.done = sum(self.sizes[:number]) + f.tell()
                    document = self.document or fingerprint(raw)
                    self.document = "" if ends else document  # of which the next piece is
                    yield raw, ends, document, path
            skip = 0

    @property
    def place(self) -> dict:
        """Behind how many pieces of which file, how much text, which document (empty: none), how much of all files."""
        return {"file": self.file, "piece": self.piece, "text": self.text, "document": self.document, "done": self.done}


def lots(source, parts):
    """Yields ([(split, bytes, whether a document ends here, where it is from), ...], place), about 1 MB at a time."""
    lot, size = [], 0
    for some in parts:
        lot += some
        for _, raw, _, _ in some:
            size += len(raw)
        if size >= PIECE:
            yield lot, source.place
            lot, size = [], 0
    yield lot, source.place


def encode(tokenizer, lot) -> dict:
    """split -> the ids of a lot."""
    ids = {"train": [], "val": []}
    for split, raw, ends, where in lot:
        try:
            ids[split].append(tokenizer.encode(raw))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if ends:
            ids[split].append(np.array([tokenizer.end_of_text], ids[split][-1].dtype))
    return {split: np.concatenate(arrays) for split, arrays in ids.items() if arrays}


def start_worker(spec):
    """Runs once in each process of the pool."""
    global worker_tokenizer
    end_with_parent()
    worker_tokenizer = Tokenizer(spec)


def encode_in_worker(lot):
    return encode(worker_tokenizer, lot)


def encoded(tokenizer, lots_and_places, workers: int):
    """Yields (encode(lot), place) in order; several workers are several processes beside this one."""
    if workers == 1:
        for lot, place in lots_and_places:
            yield encode(tokenizer, lot), place
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (tokenizer.spec,))
    ahead = collections.deque()
    try:
        for lot, place in lots_and_places:
            ahead.append((pool.submit(encode_in_worker, lot), place))
            if len(ahead) > 2 * workers:  # no more than that in memory
                result, place = ahead.popleft()
                yield result.result(), place
        for result, place in ahead:
            yield result.result(), place
    except BrokenProcessPool:
        raise UserError("a process that tokenizes has died (killed, or no memory left?); fewer --workers need less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(folder, kind: str, text: float, workers: int, what: str) -> int:
    """Says what lies ahead (`text`: bytes, roughly), checks that the disk will hold it, and returns the number of workers."""
    if not workers:  # what takes a second or two is done before a pool has started
        workers = cores() if text > 5 * SPEED[kind] else 1
    disk, minutes = DISK[kind] * text, text / SPEED[kind] / workers / 60
    disk_needed = f"{disk / 1e9:,.1f} GB" if disk > 2e9 else f"{disk / 1e6:,.0f} MB"
    time_needed = f"{minutes / 60:,.1f} hours" if minutes > 90 else f"{minutes:,.0f} minutes" if minutes > 1 else "a minute"
    print(f"{what}; the corpus takes about {disk_needed} in {folder} and about {time_needed} (--workers={workers})")
    free = shutil.disk_usage(folder if folder.exists() else FOLDER).free
    free += sum(path.stat().st_size for path in folder.glob(".*.bin.tmp"))  # which an earlier run has written already
    if disk > free:
        raise UserError(f"the corpus needs about {disk_needed} in {folder}, and {free / 1e9:,.1f} GB are free there: "
                        "make room, or make that folder a link to a larger disk")
    return workers


def check(config, own: str = ""):
    """The options that the scripts have in common; `own` is the name of the script's own folder, if a corpus may lie there."""
    name = config.name
    if name in ("", ".", "..") or Path(name).name != name or (FOLDER / name / "prepare.py").exists() and name != own:
        raise ValueError(f"name={name!r} must be the plain name of a folder in data/ that has no prepare.py of its own")
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"val_fraction={config.val_fraction} must be between 0 and 1")
    if config.workers < 0:
        raise ValueError(f"workers={config.workers} must be 0 or more")


def write_corpus(folder, tokenizer, source, parts, recipe: dict, workers: int):
    """Tokenizes what `parts` yields, lists of (split, bytes, whether a document ends here, where it is from), to a corpus."""
    with CorpusWriter(folder, tokenizer, source.name, recipe) as corpus:
        source.start = corpus.place or source.start
        progress, saved = Progress(source.total, source.start["done"]), time.monotonic()
        with contextlib.closing(encoded(tokenizer, lots(source, parts), workers)) as results:
            for ids, place in results:
                for split, values in ids.items():
                    corpus.write(split, values)
                if time.monotonic() - saved >= SAVE_EVERY:
                    corpus.save(place)
                    saved = time.monotonic()
                progress(place["done"])
        if min(corpus.counts.values()) < 2:
            raise UserError(f"the text gives {corpus.counts['train']:,} tokens to train on and {corpus.counts['val']:,} "
                            "to validate: add text or change --val_fraction")
    print(f"{corpus.counts['train']:,} tokens to train on, {corpus.counts['val']:,} to validate, {tokenizer.vocab_size:,} ids; "
          f"train.py takes it as --dataset={Path(folder).name}")


class Progress:
    """A line on stderr that says how much is done, how fast, and how long the rest will take."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.first = total, done
        self.start = self.shown = time.time()

    def __call__(self, done: int):
        now, terminal = time.time(), sys.stderr.isatty()
        if now - self.shown < (1 if terminal else 30):
            return
        self.shown, speed = now, max(done - self.first, 1) / (now - self.start)
        print(f"{done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s, "
              f"{(self.total - done) / speed:,.0f} s left ", file=sys.stderr, end="\r" if terminal else "\n")
