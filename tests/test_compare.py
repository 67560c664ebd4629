"""experiments/compare.py: each run once, chosen learning rates, tables from the log alone."""

import json

from experiments import compare

import numpy as np
import pytest
from conftest import cells

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2, "max_steps": 2,
        "warmup_steps": 1, "eval_tokens": 64, "eval_every": 1, "device": "cpu"}


def record(arm, seed, loss, rate=3e-3, saved=(0.0, 0.2)):
    curve = [[0, 5.0, 0.0], [10, loss + 0.2, saved[0]], [20, loss, saved[1]]]
    return {"arm": arm, "seed": seed, "learning_rate": rate, "val_loss": loss, "saved": saved[1],
            "curve": curve, "parameters": 1000 + 32 * (arm != "vanilla"), "seconds": 1.0}


@pytest.fixture
def results(tmp_path):
    return compare.Results(tmp_path / "results")


def test_finished_runs_are_not_trained_again(call, corpus, tmp_path, monkeypatch):
    python = TINY | {"dataset": corpus}
    monkeypatch.setattr(compare, "EXPERIMENTS", {
        "rates": python, "python": python,
        "retrofit": python | {"init_from": "python-vanilla-{seed}/ckpt.pt"}})
    monkeypatch.setattr(compare, "train_one", lambda *a, f=compare.train_one: ran.append(a) or
                        f(*a))
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    for experiment, arms, expected in (
            ("rates", "vanilla", 1), ("python", "vanilla, smear", 2), ("python", "smear", 0),
            ("retrofit", "identity", 1)):
        ran = []
        call(compare.main, f"--experiment={experiment}", f"--arms={arms}", "--seeds=1",
             "--rates=2e-3", f"--out_dir={tmp_path}/out", f"--results={tmp_path}/results")
        assert len(ran) == expected
    runs = map(json.loads, (tmp_path / "results/python.jsonl").read_text().splitlines())
    assert {r["arm"]: r["learning_rate"] for r in runs} == {"vanilla": 2e-3, "smear": 2e-3}
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


@pytest.mark.parametrize("arguments, message", [
    (["--experiment=latin"], "experiment must be one of rates, python"),
    (["--experiment=python", "--arms=vanila"], "arms some of vanilla, KV shift"),
    (["--experiment=python"], "no learning rate yet: run --experiment=rates")])
def test_mistakes_are_one_line(arguments, message, call, tmp_path):
    call(compare.main, *arguments, f"--out_dir={tmp_path}", f"--results={tmp_path}", error=message)
