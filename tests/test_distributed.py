"""Several processes: DDP and FSDP train the same model as one process, and end together."""

import multiprocessing
import os
import signal
import socket
import sys
import time

import train
from checkpoint import load_checkpoint
from config import run

import pytest
import torch
from conftest import arguments, read_log

NO_DROPOUT = {"dropout": 0, "max_steps": 4}


def work(rank, world_size, port, argv, log):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    sys.argv = ["train.py", *argv]
    run(train.main)


def start(n, argv, log):
    """n processes, as torchrun starts them, without its seconds of imports."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, n, port, argv, log)) for rank in range(n)]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes) -> list[int]:
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def assert_close_to(single, other):
    for name in ("ckpt.pt", "best.pt"):
        a, b = load_checkpoint(single / name), load_checkpoint(other / name)
        torch.testing.assert_close(b["model"], a["model"], rtol=1e-4, atol=2e-5)
    values = [[(line["step"], line.get("loss", 0), line.get("val_loss", 0))
               for line in read_log(out_dir)[1]] for out_dir in (single, other)]
    torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, more", [
    (2, {"micro_batch_size": 1}),
    (4, {"optimizer": "muon", "kv_shift": "none", "shift_at": "block"}),
    (2, {"fsdp": True, "shift_learned": False}),
    (2, {"fsdp": True, "kv_shift": "none", "shift_at": "embedding", "shift_weights": "input"}),
    (4, {"fsdp": True, "recompute": True, "tie_embeddings": False})])
def test_several_processes_train_the_same_model_as_one(fit, corpus, tmp_path, n, more):
    fit(tmp_path / "one", **NO_DROPOUT | more | {"fsdp": False})
    argv = arguments(corpus, tmp_path / "many", **NO_DROPOUT | more)
    assert exit_codes(start(n, argv, tmp_path / "log")) == [0] * n, (tmp_path / "log").read_text()
    assert_close_to(tmp_path / "one", tmp_path / "many")


def test_a_run_resumes_with_another_number_of_processes(fit, corpus, tmp_path):
    more, log = NO_DROPOUT | {"max_steps": 30}, tmp_path / "log"
    fit(tmp_path / "single", **more)
    for n, kind in ((2, {"fsdp": True}), (4, {}), (1, {})):
        log.write_text("")
        processes = start(n, arguments(corpus, tmp_path / "b", **more | kind), log)
        if n > 1:
            wait_for(lambda: "| loss" in log.read_text())
            os.kill(processes[-1].pid, signal.SIGTERM)  # one gets it: all save and stop
        assert exit_codes(processes) == [128 + signal.SIGTERM if n > 1 else 0] * n, log.read_text()
        assert n == 2 or "resuming" in log.read_text()
    assert_close_to(tmp_path / "single", tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_run_that_loses_a_process_can_restart(fit, corpus, tmp_path, monkeypatch, number):
    more = NO_DROPOUT | {"max_steps": 30, "checkpoint_every": 1, "resume": "no"}
    fit(tmp_path / "a", **more)
    log = tmp_path / "log"
    processes = start(2, arguments(corpus, tmp_path / "b", **more, timeout=3), log)
    wait_for((tmp_path / "b" / "ckpt.pt").exists)
    os.kill(processes[1].pid, number)
    assert exit_codes(processes[:1]) == [1]
    processes[1].kill()
    text = log.read_text()
    assert "train.py: lost another process of this run" in text and "Traceback" not in text
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun does
    assert exit_codes(start(2, arguments(corpus, tmp_path / "b", **more), log)) == [0, 0]
    assert "resuming" in log.read_text()
    assert_close_to(tmp_path / "a", tmp_path / "b")


def test_a_mistake_in_several_processes_is_a_line_each(corpus, tmp_path):
    argv = arguments(corpus, tmp_path / "a", batch_size=3)
    assert exit_codes(start(2, argv, tmp_path / "log")) == [2, 2]
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2 and all("batch_size=3 must be a multiple" in line for line in lines)
