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
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import FOLDER
from data.tokenizing import Job, split_documents, write_corpus

HUB, REVISION = "Skylion007/openwebtext", "79d93d786212f7344586290adb811d4ae6a1762c"
HUB_FILES = [f"plain_text/train-{i:05d}-of-00080.parquet" for i in range(80)]
HUB_SIZE = 300_000_000  # of each, about
FORMATS = re.compile(r"\.(jsonl|jsonl\.gz|txt|txt\.gz|parquet)$")


@dataclass
class PrepareConfig:
    input: str = ""  # pattern of local files, --input='pages/*.jsonl.gz'; empty: Hugging Face hub
    name: str = "openwebtext"  # the corpus is written to data/NAME
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's BPE | 256 bytes
    val_fraction: float = 0.0012  # fraction of the documents that become val
    workers: int = 0  # processes that download and tokenize; 0: one for each core


def main():
    config = parse(PrepareConfig)
    folder, files = FOLDER / config.name, [(name, HUB_SIZE) for name in HUB_FILES]
    if config.input:
        paths = sorted(glob.glob(config.input, recursive=True))
        files = [(path, os.path.getsize(path)) for path in paths]
    if not files or not all(FORMATS.search(path) for path, _ in files):
        raise UserError(f"--input={config.input!r} must match files, and only .jsonl, .jsonl.gz, "
                        ".txt, .txt.gz or .parquet")
    options = {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction,
               "input": [[Path(path).name, size] for path, size in files]}
    downloads = None if config.input else folder / ".hub.tmp"
    jobs = [Job(n, partial(read, path, downloads, config.val_fraction)) for path, n in files]
    write_corpus(folder, {"kind": config.tokenizer}, options, jobs, config.workers)
    shutil.rmtree(folder / ".hub.tmp", ignore_errors=True)


def read(path: str, downloads: Path | None, val_fraction: float):
    """Splits the documents of a local file or, with a folder for downloads, of one of the hub."""
    try:
        if downloads:
            from huggingface_hub import hf_hub_download

            path = hf_hub_download(HUB, path, repo_type="dataset", revision=REVISION,
                                   local_dir=downloads)
        for raw in filter(None, read_documents(path)):
            digest = hashlib.sha256(raw[: 1 << 16]).digest()
            is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
            yield "val" if is_val else "train", raw, True
        if downloads:
            os.unlink(path)
    except UserError:
        raise
    except Exception as error:  # of the network, a damaged file, or a package that is missing
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}): rerun the same "
                        "command to resume; the hub and .parquet need: pip install "
                        "huggingface_hub pyarrow") from None


def read_documents(path: str):
    suffix = FORMATS.search(path)[1]
    with gzip.open(path) if suffix.endswith("gz") else open(path, "rb") as f:
        if suffix.startswith("txt"):
            yield from split_documents(f, path)
        elif suffix.startswith("jsonl"):
            for line in f:
                yield json.loads(line)["text"].encode("utf-8", "replace")
        else:
            from pyarrow import parquet

            for batch in parquet.ParquetFile(f).iter_batches(256, columns=["text"]):
                yield from (text.encode() for text in batch["text"].to_pylist())


if __name__ == "__main__":
    run(main)
