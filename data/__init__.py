"""Corpora: token files, tokenizers and batches.

A corpus is a folder with train.bin and val.bin (token ids, uint16, or uint32 where there are more than 65,536) and
meta.json (tokenizer, vocabulary size, token counts, hashes). `CorpusWriter` makes one, `Corpus` reads it.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from config import UserError

FOLDER = Path(__file__).parent  # a corpus "name" lies in data/name
CHECKED = 1 << 28  # bytes of train.bin, and of val.bin, that are read through when a corpus is opened: a second, at most


@contextlib.contextmanager
def atomic_write(path):
    """Opens a file to write bytes to that gets the name `path` only when all of it is on the disk; on an error what was
    at `path` stays as it was, and an error of the disk names it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # so that the new name, too, outlives a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class Tokenizer:
    """Text to ids and back. `spec` says which, is kept in meta.json and in checkpoints, and is one of

        {"kind": "bytes"}                 UTF-8 bytes, 256 ids; a zero byte ends a document
        {"kind": "char", "chars": "..."}  the characters of one corpus, in the order of their ids; "\\0" ends a document
        {"kind": "gpt2"}                  GPT-2's BPE (tiktoken), 50,257 ids; <|endoftext|> ends a document
    """

    def __init__(self, spec: dict):
        self.spec, self.kind = spec, spec.get("kind")
        if self.kind == "bytes":
            self.vocab_size, self.end_of_text = 256, 0
        elif self.kind == "char" and isinstance(spec.get("chars"), str):
            self.chars = spec["chars"]
            self.vocab_size = len(self.chars)
            self.end_of_text = self.chars.index("\0") if "\0" in self.chars else None
            codes = np.array([ord(c) for c in self.chars], dtype=np.int64)
            self.ids = np.full(codes.max(initial=0) + 2, -1)  # id of each code point, -1: none
            self.ids[codes] = np.arange(len(codes))
        elif self.kind == "gpt2":
            self.bpe = _gpt2()
            self.vocab_size, self.end_of_text = self.bpe.n_vocab, self.bpe.eot_token
        else:
            raise UserError(f"unknown tokenizer {spec}; known: bytes, gpt2, and char with its chars")
        # what a text without a prompt goes on from
        self.start = self.end_of_text if self.end_of_text is not None else max(self.chars.find("\n"), 0)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text (for bytes of UTF-8 likewise), (T,). A character that the corpus lacks is a UserError."""
        if self.kind == "bytes":
            return np.frombuffer(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text, np.uint8)
        text = utf8(text) if isinstance(text, bytes) else text
        if self.kind == "gpt2":
            if not text.isascii():  # half a character, as a terminal may send, becomes U+FFFD
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        if (ids < 0).any():
            unknown = text[int(np.argmax(ids < 0))]
            raise UserError(f"character {unknown!r} is not among the {self.vocab_size} of this character tokenizer")
        return ids

    def decode_bytes(self, ids) -> bytes:
        """The UTF-8 of some ids. One id may hold a part of a character, so decode a stream incrementally."""
        ids = [i for i in ids if i < self.vocab_size]  # a model may have more ids than texts have (vocab_size of train.py)
        if self.kind == "bytes":
            return bytes(ids)
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(ids)
        return "".join(self.chars[i] for i in ids).encode("utf-8", "surrogatepass")

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


def utf8(raw: bytes) -> str:
    """raw.decode(), an error being the user's."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text is not UTF-8: {error.reason}, {raw[error.start : error.start + 4]!r} "
                        "(the tokenizer of bytes takes any file)") from None


def _gpt2():
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' errors, or a cached file that does not match its hash
        raise UserError(f"cannot load GPT-2's BPE ({type(error).__name__}): tiktoken fetches its files (1.5 MB) once; "
                        "without a network, set TIKTOKEN_CACHE_DIR to a folder that has them") from None


class CorpusWriter:
    """Writes a corpus as a stream, in memory that does not grow:

        with CorpusWriter(folder, tokenizer, source="...") as corpus:
            corpus.write("train", ids)

    The files get their names at the end, meta.json last; after an error everything is as it was before.

    What takes hours gives a `recipe`, all that the result depends on (for JSON), and calls corpus.save(place) now and then:
    a later run with the same recipe, whatever stopped this one, finds that place in corpus.place and goes on from there.
    With another recipe it is refused, here and by `is_complete`.
    """

    def __init__(self, folder, tokenizer: Tokenizer, source: str, recipe: dict | None = None):
        self.folder, self.tokenizer, self.source, self.recipe = Path(folder), tokenizer, source, recipe
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.unfinished = self.folder / ".unfinished.tmp"  # what `save` writes

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        try:
            self.place = self._go_on() if self.recipe else None
            if self.place is None:
                self.unfinished.unlink(missing_ok=True)
                self.counts = {"train": 0, "val": 0}
                self.hashes = {split: hashlib.sha256() for split in self.counts}
                self.files = {split: open(self._temporary(split), "wb") for split in self.counts}
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def _temporary(self, split: str) -> Path:
        return self.folder / f".{split}.bin.tmp"

    def _go_on(self):
        """Opens the files of an earlier run as they were when it last saved its place, which is returned; None: there is
        nothing to go on from."""
        try:
            saved = json.loads(self.unfinished.read_text())
            check_recipe(self.unfinished, saved["recipe"], self.recipe)
            self.counts, self.hashes, self.files = saved["tokens"], {}, {}
            for split, count in self.counts.items():
                path, final = self._temporary(split), self.folder / f"{split}.bin"
                if not path.exists() and final.exists() and not (self.folder / "meta.json").exists():
                    os.replace(final, path)  # it was stopped between giving the files their names and writing meta.json
                self.files[split] = open(path, "r+b")
                self.hashes[split] = sha256_of(self.files[split], count * self.dtype.itemsize)
                self.files[split].truncate()
                if self.hashes[split].hexdigest() != saved["sha256"][split]:
                    raise ValueError(f"{path.name} changed")
            print(f"going on from where an earlier run stopped, after {sum(self.counts.values()):,} tokens")
            return saved["place"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"starting over: what an earlier run left in {self.folder} is damaged ({error})")
            return None

    def write(self, split: str, ids: np.ndarray):
        raw = np.asarray(ids).astype(self.dtype).tobytes()
        self.files[split].write(raw)
        self.hashes[split].update(raw)
        self.counts[split] += len(ids)

    def _flush(self):
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())

    def _sha256(self) -> dict:
        return {split: h.hexdigest() for split, h in self.hashes.items()}

    def save(self, place):
        """Keeps what is written so far, with the place (for JSON) that it goes up to."""
        self._flush()
        with atomic_write(self.unfinished) as f:
            f.write(json.dumps({"recipe": self.recipe, "place": place, "tokens": self.counts, "sha256": self._sha256()}).encode())

    def __exit__(self, kind, error, trace):
        whole = False
        try:
            if kind is None:
                self._flush()
                (self.folder / "meta.json").unlink(missing_ok=True)  # from here to the last line there is no corpus
                for split in self.files:
                    os.replace(self._temporary(split), self.folder / f"{split}.bin")
                meta = {"tokenizer": self.tokenizer.spec, "vocab_size": self.tokenizer.vocab_size, "dtype": self.dtype.name,
                        "tokens": self.counts, "sha256": self._sha256(), "source": self.source, "recipe": self.recipe}
                with atomic_write(self.folder / "meta.json") as f:
                    f.write(json.dumps(meta, indent=1).encode())
                whole = True
        finally:
            for f in self.files.values():
                with contextlib.suppress(OSError):
                    f.close()
            if whole or not self.unfinished.exists():
                for path in self.folder.glob(".*.tmp"):
                    path.unlink()
            else:
                print(f"stopped; what is done stays in {self.folder}, and the same command goes on from there")
            os.close(self.lock)


def is_complete(folder: Path, recipe: dict) -> bool:
    """Whether the folder has the corpus of this recipe already, whole. One of another recipe is a UserError."""
    path = folder / "meta.json"
    try:
        found = json.loads(path.read_text()).get("recipe") or {}
    except (FileNotFoundError, ValueError, AttributeError):
        return False
    check_recipe(path, found, recipe)
    try:
        Corpus(folder)
    except UserError as error:
        print(f"starting over: {error}")
        return False
    print(f"{folder} is complete (to have it made again, remove {path})")
    return True


def check_recipe(path: Path, found: dict, recipe: dict):
    """A UserError if the corpus that `path` belongs to was made by another recipe: it may be the work of hours."""
    if others := [name for name in recipe if found.get(name) != recipe[name]]:
        raise UserError(f"{path.parent} has a corpus made with another {', '.join(others)}: pass another --name, or remove "
                        f"{path}")


def lock(folder):
    """Keeps the folder from a second writer, until the descriptor returned is closed or this process is no more."""
    if os.name != "posix":
        return os.open(os.devnull, os.O_RDONLY)
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing to {folder}") from None
    return descriptor


def sha256_of(f, size: int):
    """The hash of the first `size` bytes of a file, which is left there."""
    h = hashlib.sha256()
    while size and (block := f.read(min(size, 1 << 20))):
        h.update(block)
        size -= len(block)
    return h


class Corpus:
    """A prepared corpus, its files checked against meta.json: their sizes, their first CHECKED bytes for ids that no text
    has, and the hash of a file that is no longer than that. The rest of a large one is checked as it is read."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        again = f"prepare it with python data/{folder.name}/prepare.py (text of your own: data/text/prepare.py)"
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["tokenizer"]["kind"] not in ("bytes", "char", "gpt2"):
                raise ValueError(f"unknown tokenizer {meta['tokenizer']['kind']!r}")
            self.tokenizer, self.vocab_size = meta["tokenizer"], meta["vocab_size"]
            self.dtype, self.tokens, self.sha256 = np.dtype(meta["dtype"]), meta["tokens"], meta["sha256"]
            if self.dtype.name not in ("uint16", "uint32"):
                raise ValueError(f"dtype {self.dtype} is neither uint16 nor uint32")
            if type(self.vocab_size) is not int or not 0 < self.vocab_size <= np.iinfo(self.dtype).max + 1:
                raise ValueError(f"vocab_size {self.vocab_size!r}")
            if self.tokenizer["kind"] == "char" and len(self.tokenizer["chars"]) != self.vocab_size:
                raise ValueError(f"{len(self.tokenizer['chars'])} characters and vocab_size {self.vocab_size}")
            if not all(type(self.tokens[split]) is int and type(self.sha256[split]) is str for split in ("train", "val")):
                raise ValueError("tokens or sha256")
        except FileNotFoundError:
            raise UserError(f"no corpus in {folder} (no meta.json there): {again}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): {again}") from None
        self.files = {}
        for split in ("train", "val"):
            path = folder / f"{split}.bin"
            if not path.is_file():
                raise UserError(f"{path} is missing: {again}")
            expected = self.tokens[split] * self.dtype.itemsize
            if path.stat().st_size != expected:
                raise UserError(f"{path} has {path.stat().st_size:,} bytes, meta.json says {expected:,}: {again}")
            self.files[split] = open(path, "rb", buffering=0)  # held open: it stays the same file if prepared anew
            found = hashlib.sha256()
            with open(path, "rb") as f:
                for _ in range(0, min(expected, CHECKED), 1 << 20):
                    block = f.read(1 << 20)
                    self.check_ids(split, np.frombuffer(block, self.dtype))
                    found.update(block)
            if expected <= CHECKED and found.hexdigest() != self.sha256[split]:
                raise UserError(f"{path} has changed since it was prepared: its hash is not that in meta.json: {again}")

    def check_ids(self, split: str, ids: np.ndarray):
        if ids.max(initial=0) >= self.vocab_size:
            raise UserError(f"{self.folder / split}.bin has token id {ids.max()}, meta.json says vocab_size={self.vocab_size}")

    def windows(self, split: str, starts, block_size: int) -> np.ndarray:
        """The block_size + 1 tokens from each of `starts` on, (len(starts), block_size + 1) int64.

        They are read with plain reads and not through a memory map, whose pages would count as this process's memory.
        """
        rows = np.empty((len(starts), block_size + 1), self.dtype)
        for row, start in zip(rows, starts, strict=True):
            self.files[split].seek(int(start) * self.dtype.itemsize)
            if self.files[split].readinto(row) != row.nbytes:
                raise UserError(f"{self.folder / split}.bin became shorter while it was read")
        self.check_ids(split, rows)
        return rows.astype(np.int64)


class TrainBatches:
    """The training batches, a pure function of (seed, step): each epoch covers every window of block_size tokens once,
    in a shuffled order, from an offset drawn anew. Nothing needs saving to go on from any step, and the processes of a
    run share out the same sequences, however many they are."""

    def __init__(self, corpus: Corpus, block_size: int, batch_size: int, seed: int):
        n_tokens = corpus.tokens["train"]
        if n_tokens < block_size + 1:
            raise UserError(f"{corpus.folder}/train.bin has {n_tokens:,} tokens, too few for a window of block_size="
                            f"{block_size} and the token after it: lower --block_size or add text")
        self.corpus, self.block_size, self.batch_size, self.seed = corpus, block_size, batch_size, seed
        # leaving out one window's tokens leaves room for an offset of up to a window and more
        self.n_windows = max(1, (n_tokens - block_size) // block_size)
        self.n_offsets = n_tokens - self.n_windows * block_size
        self.epoch = None

    def start_epoch(self, epoch: int):
        random = np.random.RandomState([self.seed, epoch])  # unlike numpy's newer generators its numbers never change
        self.epoch, self.offset = epoch, random.randint(self.n_offsets)
        self.order = np.arange(self.n_windows, dtype=np.uint32)
        random.shuffle(self.order)

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """This process's share of the sequences of a step, (batch_size / world_size, block_size + 1) int64."""
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        starts = []
        for sequence in range(first, first + share):
            epoch, place = divmod(sequence, self.n_windows)
            if epoch != self.epoch:
                self.start_epoch(epoch)
            starts.append(self.offset + int(self.order[place]) * self.block_size)
        return self.corpus.windows("train", starts, self.block_size)


def val_starts(corpus: Corpus, block_size: int, eval_tokens: int) -> np.ndarray:
    """Where the validation windows start: side by side from the start of val.bin, at most eval_tokens (0: all) in all."""
    n_tokens = corpus.tokens["val"]
    if n_tokens < block_size + 1:
        raise UserError(f"{corpus.folder}/val.bin has {n_tokens:,} tokens, too few for a window of block_size="
                        f"{block_size} and the token after it: lower --block_size or prepare with a larger --val_fraction")
    n = (n_tokens - 1) // block_size
    return np.arange(max(1, min(n, eval_tokens // block_size)) if eval_tokens else n) * block_size
