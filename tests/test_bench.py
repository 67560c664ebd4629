"""experiments/bench.py, race.py, scaling.py, estimate.py and the presets."""

import json

from config import parse, read_preset
from experiments import bench, estimate, race, scaling
from experiments.hop import HopConfig
from induction_toy import ToyConfig
from model import GPT, GPTConfig
from train import TrainConfig

import numpy as np
import pytest
import torch
from conftest import ROOT, cells, make_corpus
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NANOGPT = """
from types import SimpleNamespace as GPTConfig
import torch

class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.n_embd)
        print("number of parameters: few")

    def forward(self, idx, targets=None):
        return None, super().forward(idx).mean()
"""
FAST = ["--rounds=3", "--seconds=0.01", "--device=cpu", "--compile=False"]


def test_the_benchmark_measures_both_sizes_beside_nanogpt(call, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(NANOGPT)
    small, path = dict(zip(bench.SIZES[0], (1, 2, 16, 8, 65, 2), strict=True)), tmp_path / "a.json"
    monkeypatch.setattr(bench, "SIZES", [small, small | {"block_size": 16}])
    out, err = call(bench.main, *FAST, f"--nanogpt={tmp_path}", f"--json={path}")
    assert not err and "number of parameters" not in out
    results, table = json.loads(path.read_text())["results"], cells(out)
    assert [row[0] for row in table[2:]] == list(results) == [
        "eager, float32, 1 layers, width 16, context 8, batch 2 (tokens/s)",
        "eager, float32, 1 layers, width 16, context 16, batch 2 (tokens/s)",
        *(f"{what}, float32, width 16, prompt 4, batch {n} (tokens/s)" for n in (1, 8)
          for what in ("prefill", "decoding", "bound by memory"))]
    for row, values in zip(table[2:4], results.values(), strict=False):
        none, kv, nanogpt = values.values()
        assert table[0][1:4] == list(values) and out.count(row[0]) == 2  # a line and the table
        # how much more time a model with KV shift takes in the same round
        assert float(row[4]) == pytest.approx(np.median(np.divide(none, kv)), abs=6e-4)
        assert float(row[5]) == pytest.approx(np.median(np.divide(nanogpt, kv)), abs=6e-4)


def test_options_of_the_size_select_one_model(call):
    size = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--micro_batch_size=5"]
    out, _ = call(bench.main, *FAST, *size, "--kv_shift=k")
    assert out.count("eager") == 2 and "context 8, batch 5" in out
    assert "time of kv_shift=k / kv_shift=none" in out


def test_a_race_compares_times_and_losses_on_the_same_tokens(call, tmp_path, monkeypatch):
    corpus = make_corpus(tmp_path / "shakespeare_char", n_val=129)  # two windows
    nanogpt = tmp_path / "nanoGPT"
    (nanogpt / "data/shakespeare_char").mkdir(parents=True)
    (nanogpt / "model.py").write_text(NANOGPT.replace("super().forward(idx).mean()",
                                                      "0.5 + idx[0, 0] + 0 * targets.view(-1)[0]"))
    (nanogpt / "train.py").write_text(
        "import sys, torch; folder = sys.argv[-1].split('=')[1]; __import__('os').mkdir(folder); "
        "torch.save({'model_args': {'vocab_size': 256, 'n_embd': 1}, 'model': {'weight': "
        "torch.zeros(256, 1)}}, folder + '/ckpt.pt')")
    monkeypatch.setattr(race, "FOLDER", tmp_path)
    monkeypatch.setattr(race, "prepare_corpus", lambda name: None)
    monkeypatch.setattr(race, "OURS", f"--dataset={corpus} --block_size=64 --n_layer=1 --n_head=1 "
                        "--n_embd=2 --max_steps=1")
    call(race.main, f"--nanogpt={nanogpt}", "--seeds=1",
         error="must be a clone of nanoGPT with its data/shakespeare_char prepared")
    (nanogpt / "data/shakespeare_char/val.bin").touch()
    out, _ = call(race.main, f"--nanogpt={nanogpt}", "--seeds=1")
    row = cells(out)[2]
    first = (corpus / "val_0000.bin").read_bytes()[0]
    assert row[2] == f"{0.5 + first:.4f}" and float(row[4]) < 6
    assert float(row[5]) == pytest.approx(float(row[3]) / float(row[1]), rel=0.1)


def test_scaling_has_a_row_per_shape_and_size_of_corpus(call, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "SHAPES", [(1, 16)])
    monkeypatch.setattr(scaling, "MEGABYTES", [1])
    (tmp_path / "a.txt").write_text("text\n" * 9)
    out, err = call(scaling.main, tmp_path / "a.txt", "--n_embd=16")
    assert not err
    rows = cells(out)
    assert [row[:2] for row in (rows[2], *rows[5:])] == [["16", "1"], ["1 MB", "1"], ["1 MB", "2"]]


def test_flops_are_those_that_torch_counts():
    model = GPT(GPTConfig(block_size=32, vocab_size=9, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
    idx = torch.zeros(3, 32, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 32 * model.flops_per_token()


def estimated(call, *arguments) -> dict[str, list[str]]:
    return {gpus: row for gpus, *row in cells(call(estimate.main, *arguments)[0])[2:]}


def test_the_estimate_lists_the_numbers_of_gpus_that_training_accepts(call):
    rows = estimated(call, ROOT / "config/gpt2.py")  # 8.4e18 FLOPs at 40% of 989 TFLOP/s
    assert {gpus: row[1] for gpus, row in rows.items()} == {"1": "5.9 hours", "8": "0.74 hours"}
    rows = estimated(call, ROOT / "config/paper_19b.py", "--mfu=0.2")
    assert list(rows) == ["1", "8", "64"] and rows["64"][1] == "28.5 days"


def test_the_estimate_counts_the_moments_of_the_optimizer(call):
    options = [ROOT / "config/gpt2.py", "--batch_size=8", "--micro_batch_size=1"]
    adamw = estimated(call, *options)["8"]
    muon = estimated(call, *options, "--optimizer=muon")["8"]
    n_matrices = 12 * (4 * 768**2 + 3 * 768 * 2048)
    saved = float(adamw[2].split()[0]) - float(muon[2].split()[0])
    assert abs(saved - 4 * n_matrices / 1e9) < 0.11 and muon[3] == "AdamW only"


def test_peak_flops_knows_the_names_of_devices():
    assert estimate.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert estimate.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert estimate.peak_flops("NVIDIA L40") is estimate.peak_flops("cpu") is None


def test_the_presets_have_the_sizes_of_the_paper_and_repeat_no_default():
    sizes = {"1.5b": 1.62, "2.9b": 2.90, "6.7b": 6.89, "13b": 13.20, "19b": 19.04}
    for name, billions in sizes.items():
        with torch.device("meta"):
            model = GPT(parse(TrainConfig, [str(ROOT / f"config/paper_{name}.py")]))
        assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
    for path in {*ROOT.glob("config/*.py")} - {*ROOT.glob("config/[_t]*.py")}:  # not the toy's
        values = read_preset(TrainConfig, str(path))
        assert not [name for name in values if values[name] == getattr(TrainConfig, name)], path
    assert parse(ToyConfig, [str(ROOT / "config/toy_paper.py")]).width == 1024
    assert parse(HopConfig, [str(ROOT / "config/toy_hop_paper.py")]).max_hops == 16
