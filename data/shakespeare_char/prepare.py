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
    url = Path(config.input).absolute().as_uri() if config.input else config.url
    job = Job(SIZE, functools.cache(lambda: list(read(url))))  # read twice: for the alphabet, too
    write_corpus(Path(__file__).parent, {"kind": "char"}, {"sha256": SHA256}, [job])


def read(url: str):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            raw = response.read()
    except (OSError, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise UserError(f"cannot read {url} ({error}): pass a local copy as --input=FILE") from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise UserError(f"{url} is not tiny Shakespeare: its sha256 must be {SHA256}")
    n_train = int(0.9 * len(raw))  # all characters are ASCII
    yield "train", raw[:n_train], False
    yield "val", raw[n_train:], False


if __name__ == "__main__":
    run(main)
