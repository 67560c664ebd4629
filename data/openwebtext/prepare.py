"""OpenWebText with GPT-2's BPE: 8 million web pages, 40 GB of text, 9 billion tokens.

    pip install huggingface_hub pyarrow
    python data/openwebtext/prepare.py                              downloads 80 files of 0.3 GB
    python data/openwebtext/prepare.py --input='pages/*.jsonl.gz'   reads local files
    python train.py config/gpt2.py

Local files are .jsonl or .parquet with a document in each row's "text" (.parquet needs pyarrow), or
.txt with documents separated by lines <|endoftext|>; also .jsonl.gz and .txt.gz. A document goes to
train or val by a hash of its content. Rerun the same command to resume.
"""

import glob
import gzip
import hashlib
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import FOLDER
from data.tokenizing import Job, read_text, write_corpus

HUB, REVISION = "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c"
HUB_FILES = [f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)]
HUB_SIZE = 300_000_000  # of each, about


@dataclass
class PrepareConfig:
    input: str = ""  # pattern of local files, --input='pages/*.jsonl.gz'; empty: Hugging Face hub
    name: str = "openwebtext"  # the corpus is written to data/NAME
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's BPE | 256 bytes
    val_fraction: float = 0.0012  # fraction of the documents that become val
    workers: int = 0  # processes that download and tokenize; 0: one for each core

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1")


def main():
    config = parse(PrepareConfig)
    folder = FOLDER / config.name
    options = {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction}
    if config.input:
        paths = sorted(glob.glob(config.input, recursive=True))
        if not paths:
            raise UserError(f"no file matches --input={config.input!r}")
        for path in paths:
            if suffix(path) not in READERS:
                raise UserError(f"{path} must be .jsonl, .jsonl.gz, .txt, .txt.gz or .parquet")
        sizes = [os.path.getsize(path) for path in paths]
        options["input"] = [[Path(path).name, n] for path, n in zip(paths, sizes, strict=True)]
        readers = [partial(read_file, path) for path in paths]
    else:
        options["input"], sizes = f"{HUB} at {REVISION}", [HUB_SIZE] * len(HUB_FILES)
        readers = [partial(read_hub, name, folder / ".hub.tmp") for name in HUB_FILES]
    jobs = [Job(size, partial(split_by_hash, reader, config.val_fraction))
            for size, reader in zip(sizes, readers, strict=True)]
    write_corpus(folder, {"kind": config.tokenizer}, options, jobs, config.workers)
    shutil.rmtree(folder / ".hub.tmp", ignore_errors=True)


def split_by_hash(reader, val_fraction: float):
    for raw in reader():
        digest = hashlib.sha256(raw[: 1 << 16]).digest()
        is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
        if raw:
            yield "val" if is_val else "train", raw, True


def read_hub(name: str, folder: Path):
    """Yields the documents of a file of the hub, which is not kept."""
    try:
        from huggingface_hub import hf_hub_download
        from pyarrow import parquet  # noqa: F401, which read_file needs

        path = hf_hub_download(HUB, name, repo_type="dataset", revision=REVISION, local_dir=folder)
    except ImportError:
        raise UserError("pip install huggingface_hub pyarrow, or pass local files as --input"
                        ) from None
    except Exception as error:  # of the network, the hub or a library
        raise UserError(f"cannot download {name} ({type(error).__name__}: {error}): rerun the "
                        "same command to resume, or pass local files as --input") from None
    yield from read_file(path)
    os.unlink(path)


def suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def read_file(path: str):
    """Yields the documents of a file."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            yield from READERS[suffix(path)](f)
    except ImportError:
        raise UserError(f"{path}: pip install pyarrow") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error,
            gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged, or not what its name says "
                        f"({type(error).__name__}: {error})") from None


def read_txt(f):
    document = b""
    for raw, ends in read_text(f, f.name):
        document += raw
        if ends:
            yield document
            document = b""


def read_jsonl(f):
    for number, line in enumerate(f, 1):
        try:
            yield json.loads(line)["text"].encode("utf-8", "replace")  # JSON allows surrogates
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} must be an object with a text, {error}") from None


def read_parquet(f):
    from pyarrow import parquet

    for batch in parquet.ParquetFile(f).iter_batches(256, columns=["text"]):
        for text in batch["text"].to_pylist():
            yield text.encode()


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


if __name__ == "__main__":
    run(main)
