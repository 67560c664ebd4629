"""The documents name files and options that exist, and the code in them works."""

import dataclasses
import re

import train
from checkpoint import load_checkpoint, load_model
from eval import EvalConfig
from model import KVShift
from sample import SampleConfig
from train import TrainConfig

import pytest
import torch
from conftest import ROOT, randomize
from test_train import arguments

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


def test_the_variant_in_the_readme_is_trained_saved_loaded_and_decoded_with_a_cache(
        call, corpus, tmp_path, monkeypatch):
    source = re.search(r"```python\n(class GatedShift.*?)```", README, re.DOTALL).group(1)
    names = {"KVShift": KVShift, "torch": torch}
    exec(source, names)
    monkeypatch.setattr("model.KVShift", names["GatedShift"])
    call(train.main, *arguments(corpus, tmp_path / "a", optimizer="muon"))
    model = randomize(load_model(load_checkpoint(tmp_path / "a" / "ckpt.pt"), "cpu"))
    idx, cache = torch.randint(256, (2, 16)), model.new_cache(2)
    logits = [model(chunk, cache=cache) for chunk in idx.split([3, 1, 1, 4, 7], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), atol=1e-5, rtol=1e-5)


def test_dependencies_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w-]+==[\w.]+", line) for line in lines)
