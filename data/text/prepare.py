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
from data import FOLDER, CorpusWriter, Progress, Tokenizer

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


def decoded(piece: bytes, path) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}: {error.object[error.start : error.start + 4]!r}); "
                        "--tokenizer=bytes takes any file") from None


def alphabet(files) -> str:
    """The characters of all files, sorted, and the end of a document."""
    chars, progress, done = {"\0"}, Progress(sum(Path(path).stat().st_size for path in files)), 0
    print("reading the text once for its characters")
    for path in files:
        for piece, _ in pieces(path):
            chars |= set(decoded(piece, path))
            done += len(piece)
            progress(done)
    return "".join(sorted(chars))


def main():
    files = [arg for arg in sys.argv[1:] if not arg.startswith("-")]
    config = parse(PrepareConfig, [arg for arg in sys.argv[1:] if arg.startswith("-")])
    if not files:
        raise UserError("name the text files: python data/text/prepare.py FILE... --name=mytext (--help says more)")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"no file {path!r}")
    total = sum(Path(path).stat().st_size for path in files)
    disk = {"bytes": 2.0, "char": 2.0, "gpt2": 0.6}[config.tokenizer] * total
    print(f"{len(files)} files, {total / 1e6:,.1f} MB; the corpus takes about {disk / 1e6:,.0f} MB of disk in {FOLDER / config.name}")
    tokenizer = Tokenizer({"kind": "char", "chars": alphabet(files)} if config.tokenizer == "char" else {"kind": config.tokenizer})

    val_from, done, progress = (1 - config.val_fraction) * total, 0, Progress(total)
    with CorpusWriter(FOLDER / config.name, tokenizer, source=", ".join(Path(path).name for path in files)) as corpus:
        for path in files:
            for piece, ends in pieces(path):
                # a small text is one piece: cut where val begins, at the start of a line if there is one
                cut = len(piece)
                if done < val_from < done + len(piece):
                    cut = piece.find(b"\n", int(val_from - done)) + 1 or len(piece)
                for split, part in (("train", piece[:cut]), ("val", piece[cut:])):
                    if done >= val_from:
                        split = "val"
                    corpus.write(split, tokenizer.encode(part if config.tokenizer == "bytes" else decoded(part, path)))
                if ends and piece:
                    corpus.write("val" if done + cut >= val_from else "train", [tokenizer.end_of_text])
                done += len(piece)
                progress(min(done, total))
        if not corpus.counts["train"] or not corpus.counts["val"]:
            raise UserError(f"{total:,} bytes give {corpus.counts['train']:,} tokens to train on and {corpus.counts['val']:,} to validate: "
                            "add text or change --val_fraction")
    progress(total)
    print(f"{corpus.folder}: {corpus.counts['train']:,} tokens to train on, {corpus.counts['val']:,} to validate, "
          f"{tokenizer.vocab_size:,} ids; train with: python train.py --dataset={config.name}")


if __name__ == "__main__":
    run(main)
