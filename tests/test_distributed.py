"""Many processes, on the CPU: they train the model that one process trains, and survive what one survives."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, options
from test_train import log_of, same

from checkpoint import load_checkpoint

RUN = TINY | {"batch_size": 8, "max_steps": 30, "lr_schedule": "constant", "warmup_steps": 5, "learning_rate": 1e-2,
              "eval_every": 10, "checkpoint_every": 5}


def train(n_processes: int, launcher=("--standalone", "--max_restarts=2"), **values) -> subprocess.Popen:
    """Starts train.py, with torchrun unless n_processes is 0."""
    torchrun = ["-m", "torch.distributed.run", *launcher, f"--nproc_per_node={n_processes}"] if n_processes else []
    command = [sys.executable, *torchrun, ROOT / "train.py", *options(RUN, **values)]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=environment)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        out = process.communicate(timeout=100)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hangs: {process.communicate()[0]}") from None
    assert process.returncode == code, out
    return out


def workers(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]


def assert_same_but_for_rounding(a, b):
    """Losses and weights of two runs agree within what another order of adding up makes."""
    one, other = log_of(a)[1:], log_of(b)[1:]
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(31))
    for key in ("loss", "val_loss", "grad_norm"):
        assert [line.get(key) for line in one] == pytest.approx([line.get(key) for line in other], abs=1e-5)
    one, other = (load_checkpoint(path / "ckpt.pt") for path in (a, b))
    for name, p in one["model"].items():
        torch.testing.assert_close(p, other["model"][name], atol=1e-5, rtol=1e-4)
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()


@pytest.fixture
def single(corpus, tmp_path):
    finish(train(0, dataset=corpus, out_dir=tmp_path / "single"))
    return tmp_path / "single"


@pytest.mark.parametrize("n_processes, more", [
    (2, {"fsdp": False, "micro_batch_size": 2}), (2, {"fsdp": True, "micro_batch_size": 1, "recompute": True}),
    pytest.param(2, {"fsdp": False, "optimizer": "muon", "learning_rate": 1e-4}, marks=pytest.mark.slow),
    pytest.param(4, {"fsdp": False}, marks=pytest.mark.slow), pytest.param(4, {"fsdp": True}, marks=pytest.mark.slow),
    pytest.param(2, {"fsdp": True, "tie_embeddings": False, "kv_shift": "qkv", "n_kv_head": 1}, marks=pytest.mark.slow),
    pytest.param(2, {"fsdp": True, "recompute": True, "compile": True}, marks=pytest.mark.slow),
])
def test_several_processes_train_the_same_model_as_one(corpus, tmp_path, n_processes, more):
    alone = {key: value for key, value in more.items() if key not in ("fsdp", "micro_batch_size", "recompute", "compile")}
    finish(train(0, dataset=corpus, out_dir=tmp_path / "one", **alone))
    out = finish(train(n_processes, dataset=corpus, out_dir=tmp_path / "many", **more))
    assert out.count("done: best val loss") == out.count("step 30/30") == 1  # only one process writes
    assert_same_but_for_rounding(tmp_path / "one", tmp_path / "many")


def test_a_run_goes_on_with_another_number_of_processes(corpus, tmp_path, single):
    out_dir = tmp_path / "moved"
    for last, n_processes, fsdp in ((10, 2, True), (20, 0, False), (30, 2, False)):
        out = finish(train(n_processes, dataset=corpus, out_dir=out_dir, max_steps=last, fsdp=fsdp))
        assert last == 10 or f"going on from step {last - 10} " in out
    one, other = ([(line["step"], line["loss"]) for line in log_of(path)[1:] if "loss" in line] for path in (single, out_dir))
    assert one == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in other]


def wait_for_step(out_dir, step: int, process: subprocess.Popen):
    log = out_dir / "log.jsonl"
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > 1 and json.loads(lines[-2]).get("step", 0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_a_killed_process_is_replaced_and_changes_nothing(corpus, tmp_path):
    longer = {"dataset": corpus, "max_steps": 120, "dropout": 0.1}
    finish(train(2, out_dir=tmp_path / "whole", **longer))
    process = train(2, out_dir=tmp_path / "killed", **longer)
    wait_for_step(tmp_path / "killed", 20, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    out = finish(process)
    assert "going on from step" in out
    one, other = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert same(one["model"], other["model"]) and same(one["optimizer"], other["optimizer"])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


@pytest.mark.slow
def test_a_signal_stops_all_processes_and_saves(corpus, tmp_path, single):
    process = train(2, dataset=corpus, out_dir=tmp_path / "stopped")
    wait_for_step(tmp_path / "stopped", 3, process)
    os.kill(workers(process)[-1], signal.SIGTERM)  # to one of them alone
    out = finish(process)  # both save and end; torchrun starts them again, and they go on
    assert "stopped by SIGTERM after step" in out and "going on from step" in out, out
    assert_same_but_for_rounding(single, tmp_path / "stopped")


@pytest.mark.slow
def test_two_nodes(corpus, tmp_path, single):
    launcher = ("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:29511")
    nodes = [train(1, launcher, dataset=corpus, out_dir=tmp_path / "nodes") for _ in range(2)]
    assert sum("done: best val loss" in finish(node) for node in nodes) == 1
    assert_same_but_for_rounding(single, tmp_path / "nodes")


@pytest.mark.parametrize("more, message", [
    ({"fsdp": True}, "fsdp=True needs torchrun"), ({"micro_batch_size": 3}, "must be divisible by micro_batch_size=3"),
])
def test_a_mistake_in_one_process_is_one_line(corpus, tmp_path, more, message):
    out = finish(train(0, dataset=corpus, out_dir=tmp_path / "out", **more), code=2)
    assert message in out and out.count("\n") == 1


@pytest.mark.slow
def test_a_mistake_in_many_processes_ends_all_of_them(corpus, tmp_path, single):
    blow_up = {"learning_rate": 4e9, "weight_decay": 4e9, "warmup_steps": 0, "checkpoint_every": 1, "eval_every": 1000}
    too_large = "the weights are no longer finite after step 1"
    mistakes = [(blow_up | {"fsdp": True}, too_large), (blow_up, too_large), ({"batch_size": 9}, "times 2 processes"),
                ({"out_dir": single, "seed": 2}, "seed was 1, is 2"), ({"dataset": "nowhere"}, "no corpus"),
                ({"learning_rate": 4e9, "grad_clip": 0}, "with a lower --learning_rate")]
    for more, message in mistakes:
        arguments = {"dataset": corpus, "out_dir": tmp_path / "out", "launcher": ["--standalone"]} | more
        out = finish(train(2, **arguments), code=1)  # torchrun's own exit code
        assert message in out and "train.py: " in out, out
        assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("name, billions", [("1.5b", 1.5), ("2.9b", 2.9), ("6.7b", 6.7), ("13b", 13), ("19b", 19)])
def test_the_papers_models_have_their_sizes(name, billions, call):
    import train as script

    vocab_size = 48_000 if name in ("2.9b", "19b") else 36_000  # the paper's
    code, out, _ = call(script.main, ROOT / f"config/paper_{name}.py", "--dry_run=True", f"--vocab_size={vocab_size}")
    assert code == 0 and float(out.split("(")[1].split("B)")[0]) == pytest.approx(billions, rel=0.05)


def test_a_dry_run_says_what_it_counts(call, tmp_path, monkeypatch):
    import train as script

    monkeypatch.chdir(tmp_path)
    more = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 64, "ffn_size": 128, "kv_shift": "none",
            "batch_size": 64, "max_steps": 10, "tie_embeddings": False}
    code, out, _ = call(script.main, "--dry_run=True", *options(more))
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert code == 0 and f"parameters: {blocks + 2 * 64 * 64:,} " in out and f" {blocks:,} without embeddings" in out
    assert "10 steps of 2,048 tokens" in out and not list(tmp_path.iterdir())
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["1", "8", "64", "512"]
    assert call(script.main, "--dry_run=True", "--dataset=nowhere")[0] == 2
