"""Text from a trained checkpoint, written as it is made.

    python sample.py --out_dir=out/quickstart --prompt="def main(" --max_new_tokens=500

The tokenizer is in the checkpoint, so the corpus is not needed. Text longer than the model's context goes on: see
`GPT.stream` for how.
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import load_checkpoint, load_model
from config import parse, run
from data import Tokenizer
from train import choose_device


@dataclass
class SampleConfig:
    out_dir: str = "out/run"  # the run to sample from
    checkpoint: str = "best.pt"  # best.pt or ckpt.pt (the latest) in out_dir
    prompt: str = ""  # text to go on from; empty: the start of a document
    prompt_file: str = ""  # a file with the prompt instead
    num_samples: int = 1  # one is written as it is made; several are made together and written at the end
    max_new_tokens: int = 500  # at most, for each sample
    temperature: float = 0.8  # 0: always the most likely token; 1: as the model predicts; above 1: wilder
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    stop: bool = True  # end a sample where the model ends the document
    seed: int = 1  # of the draws
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: bfloat16 where CUDA has it
    compile: bool = False  # torch.compile, on CUDA one graph a token: faster after a minute, for many tokens

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        for name in ("max_new_tokens", "temperature", "top_k", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 2^32")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.prompt and self.prompt_file:
            raise ValueError("prompt and prompt_file: give one of them")


def main():
    config = parse(SampleConfig, sys.argv[1:])
    device, dtype = choose_device(config.device, config.dtype)
    checkpoint = load_checkpoint(Path(config.out_dir) / config.checkpoint)
    tokenizer = Tokenizer(checkpoint["tokenizer"])
    model = load_model(checkpoint, device, dtype)

    prompt = tokenizer.encode(Path(config.prompt_file).read_bytes() if config.prompt_file else config.prompt).tolist()
    idx = torch.tensor(prompt or [tokenizer.start], device=device).repeat(config.num_samples, 1)
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p,
               "stop_token": tokenizer.end_of_text if config.stop else None,
               "generator": torch.Generator(device).manual_seed(config.seed), "compile": config.compile}
    started = time.perf_counter()
    if config.num_samples == 1:
        n_tokens = write_stream(model.stream(idx, config.max_new_tokens, **options), prompt, tokenizer, options["stop_token"])
    else:
        made = model.generate(idx, config.max_new_tokens, **options)[:, idx.size(1) :].tolist()
        for i, ids in enumerate(made, start=1):
            if options["stop_token"] in ids:
                ids = ids[: ids.index(options["stop_token"])]
            print(f"--- sample {i}\n{tokenizer.decode(prompt + ids)}")
        n_tokens = sum(map(len, made))
    seconds = time.perf_counter() - started
    print(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def write_stream(tokens, prompt: list[int], tokenizer: Tokenizer, stop_token: int | None) -> int:
    """Writes the prompt and each token as it comes, whole characters only; returns the number of tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds back the first bytes of a character
    print(decoder.decode(tokenizer.decode_bytes(prompt)), end="", flush=True)
    n_tokens = 0
    for token in tokens:
        n_tokens += 1
        if token.item() != stop_token:
            print(decoder.decode(tokenizer.decode_bytes([token.item()])), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return n_tokens


if __name__ == "__main__":
    run(main, less_memory="Lower --num_samples or --max_new_tokens")
