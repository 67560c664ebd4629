"""experiments/: bench.py, estimate.py with the presets, and compare.py."""

import json

from config import parse, read_preset
from experiments import bench, compare, estimate
from experiments.hop import HopConfig
from induction_toy import ToyConfig
from model import GPT, GPTConfig
from train import TrainConfig

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cells
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


def test_the_benchmark_measures_both_sizes_beside_nanogpt(call, tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(NANOGPT)
    small, path = dict(zip(bench.SIZES[0], (1, 2, 16, 8, 65, 2), strict=True)), tmp_path / "a.json"
    monkeypatch.setattr(bench, "SIZES", [small, small | {"block_size": 16}])
    out, err = call(bench.main, "--rounds=3", "--seconds=0.01", "--device=cpu", "--compile=False",
                    f"--nanogpt={tmp_path}", f"--json={path}")
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


def test_flops_are_those_that_torch_counts():
    model = GPT(GPTConfig(block_size=32, vocab_size=9, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
    idx = torch.zeros(3, 32, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 32 * model.flops_per_token()


def test_the_estimate_lists_the_numbers_of_gpus_that_training_accepts(call):
    def estimated(*arguments) -> dict[str, list[str]]:
        return {gpus: row for gpus, *row in cells(call(estimate.main, *arguments)[0])[2:]}

    gpt2 = ROOT / "config/gpt2.py"  # 8.4e18 FLOPs at 40% of 989 TFLOP/s
    adamw = estimated(gpt2)
    assert {gpus: row[1] for gpus, row in adamw.items()} == {"1": "5.9 hours", "8": "0.74 hours"}
    muon = estimated(gpt2, "--optimizer=muon")
    n_matrices = 12 * (4 * 768**2 + 3 * 768 * 2048)  # with one moment less
    saved = float(adamw["8"][2].split()[0]) - float(muon["8"][2].split()[0])
    assert abs(saved - 4 * n_matrices / 1e9) < 0.11 and muon["8"][3] == "AdamW only"
    rows = estimated(ROOT / "config/paper_19b.py", "--mfu=0.2")
    assert list(rows) == ["1", "8", "64"] and rows["64"][1] == "28.5 days"


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


def record(arm, seed, loss, rate=3e-3, saved=(0.0, 0.2)):
    curve = [[0, 5.0, 0.0], [10, loss + 0.2, saved[0]], [20, loss, saved[1]]]
    return {"arm": arm, "seed": seed, "learning_rate": rate, "val_loss": loss, "saved": saved[1],
            "curve": curve, "parameters": 1000 + 32 * (arm != "vanilla"), "seconds": 1.0}


@pytest.fixture
def results(tmp_path):
    return compare.Results(tmp_path / "results")


def test_finished_runs_are_not_trained_again(call, corpus, results, tmp_path, monkeypatch):
    python = TINY | {"dataset": corpus, "max_steps": 2}
    monkeypatch.setattr(compare, "EXPERIMENTS", {
        "rates": python, "python": python,
        "retrofit": python | {"init_from": "python-vanilla-{seed}/ckpt.pt"}})
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    for experiment, arm in (("rates", "vanilla"), ("python", "vanilla"), ("python", "vanilla"),
                            ("retrofit", "identity")):
        call(compare.main, f"--experiment={experiment}", f"--arms={arm}", "--seeds=1",
             "--rates=2e-3", f"--out_dir={tmp_path}/out", f"--results={tmp_path}/results")
    assert [one["learning_rate"] for one in results.read("python")] == [2e-3]  # one run
    assert (tmp_path / "out/retrofit.png").exists()


def test_all_kinds_have_the_learning_rate_of_vanillas_lowest_mean_loss_or_the_given_one(results):
    for arm, rate, loss in (("vanilla", 1e-3, 1.0), ("vanilla", 1e-3, 1.4), ("vanilla", 3e-3, 1.1),
                            ("KV shift", 3e-3, 1.1), ("KV shift", 6e-3, 1.0)):
        results.add("rates", record(arm, 101, loss, rate))
    assert {results.learning_rate("python", arm) for arm in ("vanilla", "KV shift")} == {3e-3}
    assert results.learning_rate("shakespeare", "vanilla") == 1e-3
    other = compare.Results(results.folder, 6e-3)
    assert [other.learning_rate("python", arm) for arm in ("vanilla", "smear")] == [3e-3, 6e-3]


def test_the_table_states_paired_differences_and_their_standard_error(results):
    losses = {"vanilla": [1.30, 1.32, 1.31], "KV shift": [1.20, 1.24, 1.25]}
    for arm, values in losses.items():
        results.add("rates", record(arm, 101, 1.0))
        for seed in (2, 0, 1):  # the table has them in order
            results.add("python", record(arm, seed, values[seed], saved=(0.0, 0.2 + seed / 10)))
        results.add("python", record(arm, 9, 9.0, rate=1e-3))  # at a rate that was not chosen
    results.add("step_times", {"arm": "KV shift", "ratio": 1.25})
    row = cells(compare.make_table(results, "python"))[3]
    d = np.subtract(losses["KV shift"], losses["vanilla"])
    assert row[:3] == ["KV shift", "3", "0.003"]
    assert row[4] == f"{d.mean():+.4f} ± {d.std(ddof=1) / 3**0.5:.4f}"
    assert row[5:7] == ["0.200 0.300 0.400", "20 20 20"]
    assert row[7] == f"{np.mean(losses['KV shift']) + 0.2 * 4 / 10:.3f}"  # at step 20 / 1.25 = 16
    assert row[8:11] == ["1.25", "32", "1024"]  # a key and a value of 4 heads in float32


def test_cache_bytes_are_the_unmixed_rows():
    row = 128 * 4  # width, float32
    expected = {"vanilla": 0, "KV shift": 2 * row, "keys only": row, "queries too": 3 * row,
                "window 4": 6 * row, "Canon-A": 3 * row, "smear": row // 4}
    assert {arm: compare.cache_bytes(arm) for arm in expected} == expected


def test_mistakes_are_one_line(call, tmp_path):
    call(compare.main, "--experiment=latin", error="experiment must be one of rates, python")
    call(compare.main, "--experiment=python", f"--results={tmp_path}",
         error="no learning rate yet: run --experiment=rates")
