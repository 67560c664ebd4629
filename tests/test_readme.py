"""The documents name files and options that exist, and the code in them works."""

import dataclasses
import re
from pathlib import Path

from eval import EvalConfig
from model import GPT, GPTConfig, KVShift
from sample import SampleConfig
from train import TrainConfig

import pytest
import torch
from conftest import ROOT, randomize

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text()
    named = set(re.findall(r"[\w./-]+/[\w.-]+\.(?:py|png|svg|jsonl|md)\b|\b[\w]+\.py\b", text))
    named -= {path for path in named if path.startswith(("out/", "config/x", "config/file"))}
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_every_option_in_the_readme_exists():
    fields = {f.name for cls in (TrainConfig, SampleConfig, EvalConfig)
              for f in dataclasses.fields(cls)}
    others = {"help", "name", "tokenizer", "val_fraction", "nproc_per_node", "nnodes",
              "max_restarts", "rdzv_backend", "rdzv_endpoint", "experiment", "nanogpt", "arms",
              "seeds", "key"}
    assert set(re.findall(r"--(\w+)", README)) <= fields | others


def test_the_variant_in_the_readme_decodes_with_a_cache():
    source = re.search(r"```python\n(class GatedShift.*?)```", README, re.DOTALL).group(1)
    names = {"KVShift": KVShift, "torch": torch}
    exec(source, names)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=4, n_embd=16))
    for block in model.blocks:
        block.attn.shift["v"] = names["GatedShift"](4, 4)
    randomize(model)
    idx, cache = torch.randint(11, (2, 16)), model.new_cache(2)
    logits = [model(chunk, cache=cache) for chunk in idx.split([3, 1, 1, 4, 7], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), atol=1e-5, rtol=1e-5)


def test_dependencies_are_pinned_and_files_are_narrow():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w-]+==[\w.]+", line) for line in lines)
    wide = [f"{path}:{i}" for path in Path(ROOT).rglob("*.py") if "out" not in path.parts
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not [name for name in wide if "venv" not in name]
