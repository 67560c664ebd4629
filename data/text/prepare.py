"""Your own text files as a corpus.

    python data/text/prepare.py FILE... --name=mytext --tokenizer=bytes|char|gpt2 --val_fraction=0.1
    python train.py config/quickstart.py --dataset=mytext --out_dir=out/mytext

Files are read in the order given, as UTF-8 (bytes: as they are). A line <|endoftext|> ends a document, and so does the
end of a file. The last val_fraction of the whole text becomes val. Everything streams: memory stays flat on files of
any size. A long run that was stopped goes on where it was when the same command is given again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import FOLDER, Tokenizer, is_complete, utf8
from data.tokenizing import Files, check, pieces, plan, write_corpus


@dataclass
class PrepareConfig:
    name: str = "mytext"  # the corpus is written to data/NAME
    tokenizer: Literal["bytes", "char", "gpt2"] = "bytes"  # 256 bytes | the characters of the text | GPT-2's BPE
    val_fraction: float = 0.1  # how much of the text, from its end, becomes val
    workers: int = 0  # how many processes tokenize; 0: as many as there are cores, where it pays

    def __post_init__(self):
        check(self)


def alphabet(files) -> str:
    """The characters of all files and the end of a document, sorted."""
    print("reading the text once for its characters")
    chars = {"\0"}
    for path in files:
        with open(path, "rb") as f:
            for piece, _ in pieces(f):
                chars.update(utf8(piece))
    return "".join(sorted(chars))


def line_start(piece: bytes, at: int) -> int:
    """The first start of a line after `at`, or if there is none the first start of a character from `at` on."""
    start = piece.find(b"\n", at) + 1
    if 0 < start < len(piece):
        return start
    while at < len(piece) and piece[at] & 0xC0 == 0x80:
        at += 1
    return at


def in_order(source, val_from: float):
    """Each piece as what belongs to train and what to val: all that comes after the first val_from bytes of text."""
    for piece, ends, _, path in source:
        cut = min(max(val_from - (source.text - len(piece)), 0), len(piece))  # train gets piece[:cut], val the rest
        if 0 < cut < len(piece):
            cut = line_start(piece, cut)
        whole = cut == len(piece)
        yield [("train", piece[:cut], ends and whole, path), ("val", piece[cut:], ends and not whole, path)]


def main():
    files = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config = parse(PrepareConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not files:
        raise UserError("name the text files: python data/text/prepare.py FILE... --name=mytext (--help says more)")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"no file {path!r}")
    source, folder = Files(files), FOLDER / config.name
    recipe = source.recipe | {"tokenizer": config.tokenizer, "val_fraction": config.val_fraction}
    if is_complete(folder, recipe):
        return
    workers = plan(folder, config.tokenizer, source.total, config.workers, f"{len(files)} files, {source.total / 1e6:,.1f} MB")
    spec = {"kind": config.tokenizer} | ({"chars": alphabet(files)} if config.tokenizer == "char" else {})
    parts = in_order(source, int((1 - config.val_fraction) * source.total))
    write_corpus(folder, Tokenizer(spec), source, parts, recipe, workers)


if __name__ == "__main__":
    run(main)
