"""Tiny Shakespeare (1.1 MB) by character: the first 90% to train on, the last 10% to validate.

    python data/shakespeare_char/prepare.py                    downloads it
    python data/shakespeare_char/prepare.py --input=FILE       takes a local copy instead
"""

import hashlib
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import CorpusWriter, Tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class PrepareConfig:
    input: str = ""  # a local copy of the text; empty: download it
    url: str = URL  # where to download it


def download(url: str) -> bytes:
    print(f"downloading {url} (1.1 MB; 2.3 MB of disk for the corpus)")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            if response.status != 200:
                raise UserError(f"{url} answers with status {response.status}; pass a local copy as --input=FILE")
            return response.read()
    except (OSError, ValueError) as error:  # URLError, HTTPError and time-outs are OSErrors
        raise UserError(f"cannot download {url} ({error}); pass a local copy as --input=FILE") from None


def main():
    config = parse(PrepareConfig, sys.argv[1:])
    raw = Path(config.input).read_bytes() if config.input else download(config.url)
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise UserError(f"{config.input or config.url} is not tiny Shakespeare: it has {len(raw):,} bytes and sha256 {found}")
    text = raw.decode()
    tokenizer = Tokenizer({"kind": "char", "chars": "".join(sorted(set(text)))})
    ids = tokenizer.encode(text)
    n_train = int(0.9 * len(ids))
    with CorpusWriter(Path(__file__).parent, tokenizer, source=URL) as corpus:
        corpus.write("train", ids[:n_train])
        corpus.write("val", ids[n_train:])
    print(f"{tokenizer.vocab_size} different characters; {n_train:,} to train on, {len(ids) - n_train:,} to validate")


if __name__ == "__main__":
    run(main)
