"""Generates text from a trained model and prints it as it is generated.

    python sample.py --out_dir=out/quickstart --prompt="def main(" --max_new_tokens=500

The tokenizer is part of the checkpoint, so the corpus is not needed. For text that is longer than
the context of the model, see `GPT.stream`.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoint import choose_device, load_checkpoint, load_model
from config import parse, run
from data.tokenizing import Tokenizer

import torch


@dataclass
class SampleConfig:
    out_dir: str = "out/run"  # folder of the run
    checkpoint: str = "best.pt"  # file in out_dir; ckpt.pt is the last one
    prompt: str = ""  # text to continue; empty: the start of a document
    prompt_file: str = ""  # file to read the prompt from
    num_samples: int = 1  # one is streamed; several are generated as a batch
    max_new_tokens: int = 500  # maximum length of a sample
    temperature: float = 0.8  # 0: always the most likely token; 1: the model's distribution
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens with this total probability
    stop: bool = True  # end a sample where the model ends the document
    seed: int = 1  # of the random draws
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the best available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: by device

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples} must be at least 1")
        for name in ("max_new_tokens", "temperature", "top_k", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 2^32)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.prompt and self.prompt_file:
            raise ValueError("prompt and prompt_file exclude each other")


def main():
    config = parse(SampleConfig)
    checkpoint = load_checkpoint(Path(config.out_dir) / config.checkpoint)
    tokenizer = Tokenizer(checkpoint["tokenizer"])
    device, dtype = choose_device(config.device, config.dtype, checkpoint["config"]["n_embd"])
    model = load_model(checkpoint, device, dtype)

    text = Path(config.prompt_file).read_bytes() if config.prompt_file else config.prompt
    prompt = tokenizer.encode(text).tolist()
    idx = torch.tensor(prompt or [tokenizer.start], device=device).repeat(config.num_samples, 1)
    stop_token = tokenizer.end_of_text if config.stop else None
    started = time.perf_counter()
    generator = torch.Generator(device).manual_seed(config.seed)
    stream = model.stream(idx, config.max_new_tokens, config.temperature, config.top_k,
                          config.top_p, stop_token, generator)
    if config.num_samples == 1:
        n_tokens = print_stream(stream, prompt, tokenizer, stop_token)
    else:
        n_tokens = 0
        for i, ids in enumerate(zip(*(tokens.tolist() for tokens in stream), strict=True), start=1):
            ids = ids[: ids.index(stop_token)] if stop_token in ids else ids
            print(f"--- sample {i}\n{tokenizer.decode([*prompt, *ids])}")
            n_tokens += len(ids)
    seconds = time.perf_counter() - started
    print(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:,.0f} tokens/s",
          file=sys.stderr)


def print_stream(stream, prompt: list[int], tokenizer: Tokenizer, stop_token: int | None) -> int:
    """Prints the prompt and each token as it arrives; returns the number of new tokens."""
    ids, printed = list(prompt), tokenizer.decode(prompt)
    print(printed, end="", flush=True)
    for token in stream:
        if token.item() != stop_token:
            ids.append(token.item())
            text = tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # waits for whole characters
                print(text[len(printed) :], end="", flush=True)
                printed = text
    print(tokenizer.decode(ids)[len(printed) :])
    return len(ids) - len(prompt)


if __name__ == "__main__":
    run(main)
