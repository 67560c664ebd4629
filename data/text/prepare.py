"""Your own text files as a corpus.

    python data/text/prepare.py FILE... --name=mytext --tokenizer=bytes|char|gpt2 --val_fraction=0.1
    python train.py --dataset=mytext

Files are read in the order given, as UTF-8 (bytes: as they are). A line <|endoftext|> ends a document, and so does the
end of a file. The last val_fraction of the whole text becomes val. Everything streams: memory stays flat on files of
any size.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import UserError, parse, run
from data import FOLDER, CorpusWriter, Progress, Tokenizer, utf8

PIECE = 1 << 20  # bytes that are tokenized at a time


@dataclass
class PrepareConfig:
    name: str = "mytext"  # the corpus is written to data/NAME
    tokenizer: Literal["bytes", "char", "gpt2"] = "bytes"  # 256 bytes | the characters of the text | GPT-2's BPE
    val_fraction: float = 0.1  # how much of the text, from its end, becomes val

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name or (FOLDER / self.name / "prepare.py").exists():
            raise ValueError(f"name={self.name!r} must be the plain name of a folder in data/ that has no prepare.py of its own")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1")


def pieces(path):
    """Yields (bytes, whether a document ends here), about 1 MB at a time.

    Inside a document the cut is made between two lines where the first ends in one line feed only and neither has white
    space at the cut: GPT-2's BPE never joins such lines, so that the tokens are those of the text in one piece. A text
    without such a place is cut between two characters at 16 MB.
    """
    piece = bytearray()
    with open(path, "rb") as f:
        while line := f.readline(PIECE):
            if line.strip() == b"<|endoftext|>":
                yield bytes(piece), True
                piece.clear()
                continue
            clean = piece[-1:] == b"\n" and not piece[-2:-1].isspace() and not line[:1].isspace()
            between_characters = line[0] & 0xC0 != 0x80
            if len(piece) >= PIECE and clean or len(piece) >= 16 * PIECE and between_characters:
                yield bytes(piece), False
                piece.clear()
            piece += line
    yield bytes(piece), True


def alphabet(files) -> str:
    """The characters of all files and the end of a document, sorted."""
    print("reading the text once for its characters")
    chars = {"\0"}
    for path in files:
        for piece, _ in pieces(path):
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


def main():
    files = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config = parse(PrepareConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not files:
        raise UserError("name the text files: python data/text/prepare.py FILE... --name=mytext (--help says more)")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"no file {path!r}")
    total = sum(Path(path).stat().st_size for path in files)
    disk = total * {"bytes": 2.0, "char": 2.0, "gpt2": 0.6}[config.tokenizer]
    print(f"{len(files)} files, {total / 1e6:,.1f} MB; the corpus takes about {disk / 1e6:,.0f} MB in {FOLDER / config.name}")
    spec = {"kind": config.tokenizer} | ({"chars": alphabet(files)} if config.tokenizer == "char" else {})
    tokenizer = Tokenizer(spec)

    val_from, done, progress = int((1 - config.val_fraction) * total), 0, Progress(total)
    with CorpusWriter(FOLDER / config.name, tokenizer, source=", ".join(Path(path).name for path in files)) as corpus:
        for path in files:
            for piece, ends in pieces(path):
                cut = min(max(val_from - done, 0), len(piece))  # train gets piece[:cut], val the rest
                if 0 < cut < len(piece):
                    cut = line_start(piece, cut)
                corpus.write("train", tokenizer.encode(piece[:cut]))
                corpus.write("val", tokenizer.encode(piece[cut:]))
                if ends and piece:
                    corpus.write("train" if cut == len(piece) else "val", [tokenizer.end_of_text])
                done += len(piece)
                progress(done)
        if min(corpus.counts.values()) < 2:
            raise UserError(f"{total:,} bytes give {corpus.counts['train']:,} tokens to train on and {corpus.counts['val']:,} "
                            "to validate: add text or change --val_fraction")
    print(f"{corpus.counts['train']:,} tokens to train on, {corpus.counts['val']:,} to validate, {tokenizer.vocab_size:,} ids; "
          f"train with: python train.py --dataset={config.name}")


if __name__ == "__main__":
    run(main)
