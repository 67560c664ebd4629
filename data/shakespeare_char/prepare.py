"""Tiny Shakespeare (1.1 MB) by character: the first 90% are train, the last 10% val.

    python data/shakespeare_char/prepare.py                    downloads it
    python data/shakespeare_char/prepare.py --input=FILE       reads a local copy
"""

import functools
import hashlib
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data.tokenizing import Job, write_corpus

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE, SHA256 = 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class PrepareConfig:
    input: str = ""  # a local copy of the text; empty: download it
    url: str = URL  # where to download it


def main():
    config = parse(PrepareConfig)
    job = Job(SIZE, functools.cache(lambda: list(read(config))))  # the alphabet needs it, too
    write_corpus(Path(__file__).parent, {"kind": "char"}, {"sha256": SHA256}, [job])


def read(config: PrepareConfig):
    raw = Path(config.input).read_bytes() if config.input else download(config.url)
    if (found := hashlib.sha256(raw).hexdigest()) != SHA256:
        raise UserError(f"{config.input or config.url} is not tiny Shakespeare: it has "
                        f"{len(raw):,} bytes and sha256 {found}")
    n_train = int(0.9 * len(raw))  # all characters are ASCII
    yield "train", raw[:n_train], False
    yield "val", raw[n_train:], False


def download(url: str) -> bytes:
    print(f"downloading {url} (1.1 MB)")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise UserError(f"cannot download {url} ({error}): pass a local copy as --input=FILE"
                        ) from None


if __name__ == "__main__":
    run(main)
