"""OpenWebText by GPT-2's BPE: 8 million web pages, 39.8 GB of text, 9 billion tokens.

    pip install datasets
    python data/openwebtext/prepare.py                              streams it from the Hugging Face hub (24 GB)
    python data/openwebtext/prepare.py --input='pages/*.jsonl.gz'   takes local files instead
    python train.py config/gpt2.py

Local files are .jsonl or .parquet, a document in each row's "text" (.parquet needs pyarrow), or .txt, where a line
<|endoftext|> ends a document; .jsonl.gz and .txt.gz as well. A document goes to train or val by a hash of it. Stopped or
killed, it goes on where it was when the same command is given again; the corpus is the same.
"""

import glob
import gzip
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import FOLDER, Tokenizer, is_complete
from data.tokenizing import Files, check, fingerprint, pieces, plan, write_corpus

HUB = "Skylion007/openwebtext"  # served as 80 parquet files
TEXT = 39_769_491_688  # bytes of text in it
COMPRESSION = {".gz": 3.0, ".parquet": 1.7}  # bytes of text for a byte of such a file, roughly


@dataclass
class PrepareConfig:
    input: str = ""  # local files as a pattern, --input='pages/*.jsonl.gz'; empty: OpenWebText from the Hugging Face hub
    name: str = "openwebtext"  # the corpus is written to data/NAME
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's BPE | 256 bytes
    val_fraction: float = 0.0012  # how many of the documents are val: of OpenWebText 10.8M tokens
    workers: int = 0  # how many processes tokenize; 0: as many as there are cores, where it pays

    def __post_init__(self):
        check(self, own="openwebtext")


class Hub:
    """The documents of OpenWebText as the hub serves them; like data.tokenizing.Files."""

    def __init__(self):
        try:
            import datasets
            import huggingface_hub  # comes with it
        except ImportError:
            raise UserError("the Hugging Face hub is read by their package: pip install datasets "
                            "(or pass local files as --input='*.jsonl.gz')") from None
        self.load, self.newest = datasets.load_dataset, lambda: huggingface_hub.dataset_info(HUB).sha
        self.name, self.total, self.recipe = HUB, TEXT, {"input": HUB}
        self.start = {"revision": None, "rows": None, "done": 0}

    def __iter__(self):
        """Yields as Files does; a document is one piece."""
        try:
            self.revision = self.start["revision"] or self.newest()  # what changes there must not get into a run under way
            self.rows = self.load(HUB, split="train", streaming=True, revision=self.revision)
            if self.start["rows"]:
                self.rows.load_state_dict(self.start["rows"])
            self.done = self.start["done"]
            for row in self.rows:
                raw = document(row, HUB)
                self.done += len(raw)
                if raw:
                    yield raw, True, fingerprint(raw), HUB
        except UserError:
            raise
        except Exception as error:  # of the network, of the hub, of several libraries
            raise UserError(f"cannot read {HUB} from the Hugging Face hub ({type(error).__name__}: {error}); the same command "
                            "tries again and keeps what is done, and --input=... takes local files instead") from None

    @property
    def place(self) -> dict:
        return {"revision": self.revision, "rows": self.rows.state_dict(), "done": self.done}


def document(row, where: str) -> bytes:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f"{where}: a document needs a \"text\" that is a string")
    return row["text"].encode("utf-8", "replace")  # JSON can spell half a character, UTF-8 cannot


def read_jsonl(path, f):
    for number, line in enumerate(f, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{where}: is not UTF-8") from None
        except ValueError as error:
            raise UserError(f"{where}: is not JSON ({error})") from None
        yield document(row, where), True


def read_parquet(path, f):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: .parquet files are read by pyarrow: pip install pyarrow") from None
    try:
        for batch in parquet.ParquetFile(f).iter_batches(256, columns=["text"]):
            for row in batch.to_pylist():
                yield document(row, path), True
    except ArrowException as error:
        raise UserError(f"{path}: is not the parquet file of texts that it should be ({error})") from None


READERS = {".jsonl": read_jsonl, ".txt": lambda path, f: pieces(f), ".parquet": read_parquet}


def kind_of(path: str) -> str:
    """.jsonl, .txt or .parquet."""
    kind = Path(path.removesuffix(".gz")).suffix
    if kind not in READERS or path.endswith(".parquet.gz"):
        raise UserError(f"{path}: must be .jsonl, .jsonl.gz, .txt, .txt.gz or .parquet")
    return kind


def read(path, f):
    """Yields (bytes, whether a document ends here) of any of these files."""
    try:
        yield from READERS[kind_of(path)](path, gzip.open(f) if path.endswith(".gz") else f)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: is damaged, or not gzip ({error})") from None


def by_hash(source, val_fraction: float):
    """Each document to train or, if its hash says so, to val."""
    for raw, ends, hexadecimal, where in source:
        split = "val" if int(hexadecimal, 16) < val_fraction * 2**64 else "train"
        yield [(split, raw, ends, where)]


def main():
    config = parse(PrepareConfig, sys.argv[1:])
    if config.input:
        paths = sorted(glob.glob(config.input, recursive=True))
        if not paths:
            raise UserError(f"no file is like --input={config.input!r}")
        source = Files(paths, read)
        text = sum(size * COMPRESSION.get(Path(path).suffix, 1.0) for path, size in zip(paths, source.sizes, strict=True))
        what = f"{len(paths)} files, {source.total / 1e6:,.1f} MB"
        for path in paths:
            kind_of(path)
    else:
        source, text, what = Hub(), TEXT, "OpenWebText: 24 GB to download, and not kept; 39.8 GB of text"
    folder = FOLDER / config.name
    recipe = source.recipe | {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction}
    if is_complete(folder, recipe):
        return
    workers = plan(folder, config.tokenizer, text, config.workers, what)
    parts = by_hash(source, config.val_fraction)
    write_corpus(folder, Tokenizer({"kind": config.tokenizer}), source, parts, recipe, workers)


if __name__ == "__main__":
    run(main)
