"""experiments/bench.py, experiments/estimate.py and the presets."""

import json

from config import parse, read_preset
from experiments import bench, estimate
from model import GPT, GPTConfig
from train import TrainConfig

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NANOGPT = """
from types import SimpleNamespace as GPTConfig
import torch

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets):
        logits = self.embed(idx) @ self.embed.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, idx, max_new_tokens):
        return torch.cat([idx, idx.new_zeros(len(idx), max_new_tokens)], dim=1)
"""
FAST = ["--rounds=3", "--seconds=0.01", "--device=cpu", "--compile=False"]


@pytest.fixture
def nanogpt(tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    return tmp_path


def test_the_benchmark_measures_both_sizes_beside_nanogpt(call, nanogpt, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", [dict(zip(bench.NAMES, size, strict=True)) for size in (
        (1, 2, 16, 8, 65, 2), (1, 2, 16, 16, 65, 2))])
    path = nanogpt / "results.json"
    code, out, err = call(bench.main, *FAST, f"--nanogpt={nanogpt}", f"--json={path}")
    results = json.loads(path.read_text())["results"]
    assert code == 0 and not err and "number of parameters" not in out
    assert list(results) == [
        "eager training step (ms), 1 layers, width 16, context 8, batch 2",
        "eager training step (ms), 1 layers, width 16, context 16, batch 2",
        "prefill (tokens/s)", "decode (tokens/s)", "bound of decode by memory (tokens/s)"]
    for name, values in results.items():
        assert list(values) == ["kv_shift=none", "kv_shift=kv", "nanoGPT"] and out.count(name) == 2
        assert all(len(v) == (1 if "bound" in name else 3) and min(v) > 0 for v in values.values())


def test_options_of_the_size_select_one_model(call):
    size = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--micro_batch_size=5"]
    code, out, _ = call(bench.main, *FAST, *size, "--kv_shift=k")
    assert code == 0 and out.count("training step") == 2 and "context 8, batch 5" in out
    assert "kv_shift=k / kv_shift=none" in out


def test_ratios_are_medians_of_the_rounds():
    values = {"none": [1.0, 2.0, 4.0], "kv": [3.0, 2.0, 8.0], "nanoGPT": [2000.0, 2000.0, 2000.0]}
    assert bench.row("a", values) == ["a", "2", "3", "2,000", "2.000", "0.002"]


@pytest.mark.parametrize("option, message", [
    ("--nanogpt=nowhere", "no nowhere/model.py"), ("--rounds=0", "rounds=0 must be at least 1"),
    ("--round=1", "did you mean --rounds"), ("missing.py", "no preset missing.py"),
])
def test_a_mistake_is_one_line(call, option, message):
    code, out, err = call(bench.main, *FAST, option)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("kv_shift, n_kv_head", [("none", None), ("kv", 2)])
def test_flops_are_those_that_torch_counts(kv_shift, n_kv_head):
    model = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=4, n_kv_head=n_kv_head,
                          n_embd=32, kv_shift=kv_shift))
    idx = torch.zeros(3, 32, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 32 * model.flops_per_token()


def estimated(call, *arguments):
    """The rows of the table, {GPUs: cells}, and the whole output."""
    code, out, err = call(estimate.main, *arguments)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[8:]
            if line.startswith("|")]
    return {int(gpus): cells for gpus, *cells in rows}, out


def test_the_estimate_lists_the_numbers_of_gpus_that_training_accepts(call):
    rows, out = estimated(call, ROOT / "config/gpt2.py")
    assert list(rows) == [1, 8] and "64 GPUs: batch_size=480 is no multiple of 64 times" in out
    # 8.4e18 FLOPs at 40% of 989 TFLOP/s
    assert rows[1][:2] == ["12", "5.90 hours"] and rows[8][1] == "0.74 hours"
    rows, out = estimated(call, ROOT / "config/paper_19b.py", "--mfu=0.2")
    assert list(rows) == [1, 8, 64] and rows[64][1] == "28.5 days" and "19,040,115,456" in out
    rows, _ = estimated(call, "--vocab_size=256", "--max_steps=1", "--batch_size=512")
    assert {time for _, time, *_ in rows.values()} == {"under 0.01 hours"}
    assert [micro_batch for micro_batch, *_ in rows.values()] == ["512", "64", "8", "1"]


def test_the_estimate_counts_the_moments_of_the_optimizer(call):
    options = [ROOT / "config/gpt2.py", "--batch_size=8", "--micro_batch_size=1"]
    adamw, _ = estimated(call, *options)
    muon, out = estimated(call, *options, "--optimizer=muon")
    n, n_blocks = 123_587_904, 84_953_664 - 25 * 768 - 12 * 2 * 2 * 12
    assert f"ckpt.pt {(12 * n - 4 * n_blocks) / 1e9:.3g} GB" in out
    saved = float(adamw[8][2].split()[0]) - float(muon[8][2].split()[0])
    assert abs(saved - 4 * n_blocks / 1e9) < 0.11 and muon[8][3] == "AdamW only"


def test_the_estimate_does_not_prepare_a_corpus(call, tmp_path):
    code, _, err = call(estimate.main, f"--dataset={tmp_path}/new")
    assert code == 2 and "pass --vocab_size=N" in err and not list(tmp_path.iterdir())


def test_peak_flops_knows_the_names_of_devices():
    assert estimate.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert estimate.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert estimate.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert estimate.peak_flops("NVIDIA RTX A4000") is estimate.peak_flops("cpu") is None


@pytest.mark.parametrize("name, billions", [
    ("1.5b", 1.62), ("2.9b", 2.90), ("6.7b", 6.89), ("13b", 13.20), ("19b", 19.04)])
def test_the_presets_have_the_sizes_of_the_paper(name, billions):
    with torch.device("meta"):
        model = GPT(parse(TrainConfig, [str(ROOT / f"config/paper_{name}.py")]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions


def test_no_preset_repeats_a_default():
    presets = [path for path in ROOT.glob("config/*.py") if not path.name.startswith(("_", "toy"))]
    for path in presets:
        values = read_preset(TrainConfig, str(path))
        assert not [name for name in values if values[name] == getattr(TrainConfig, name)], path
    assert len(presets) == 9
