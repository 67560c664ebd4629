"""Storms: runs that are killed again and again, and one so long that a leak would show."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, options
from test_train import same

import train
from checkpoint import load_checkpoint
from config import run

STORM = TINY | {"n_layer": 1, "dropout": 0.1, "micro_batch_size": 2, "warmup_steps": 5, "checkpoint_every": 5, "log_every": 1}


def train_in_child(arguments, output, prepare=None, *more):
    """What a forked process does: prepare(*more), and then `python train.py ARGUMENTS`, the output going to a file."""
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    if prepare:
        prepare(*more)
    sys.argv = ["train.py", *arguments]
    try:
        run(train.main)
    except SystemExit as stop:
        with contextlib.suppress(OSError, AttributeError):  # a test may have given it a bad standard output
            sys.stdout.flush()
        os._exit(stop.code or 0)


def die_in(name: str, when: str, n: int):
    """Ends this process before, after or in the middle of the n-th call of os.replace, os.fsync or torch.save."""
    module = torch if name == "save" else os
    function, calls = getattr(module, name), itertools.count(1)

    def dying(*arguments, **more):
        if next(calls) < n:
            return function(*arguments, **more)
        if when == "middle":
            arguments[1].write(b"half a checkpoint")
            arguments[1].flush()
        if when == "after":
            function(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, dying)


def assert_whole(out_dir):
    """Every checkpoint that there is can be read, also what was moved aside."""
    for path in out_dir.rglob("*.pt"):
        if not path.name.startswith("."):
            load_checkpoint(path)


def assert_same_run(undisturbed, other, max_steps: int):
    for name, parts in (("ckpt.pt", ("model", "optimizer", "config")), ("best.pt", ("model",))):
        one, two = load_checkpoint(undisturbed / name), load_checkpoint(other / name)
        one["config"].pop("out_dir"), two["config"].pop("out_dir")
        for part in parts:
            assert same(one[part], two[part])
        assert one["run"] | {"seconds": 0} == two["run"] | {"seconds": 0}
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (undisturbed, other))
    assert [line["step"] for line in two[1:]] == list(range(max_steps + 1))
    for key in ("loss", "val_loss", "lr", "grad_norm", "tokens"):
        assert [line.get(key) for line in one] == [line.get(key) for line in two]
    assert not list(other.glob(".*"))


POINTS = [("save", "middle"), ("fsync", "before"), ("fsync", "after"), ("replace", "before"), ("replace", "after")]


def killed_at_points(forks, arguments, tmp_path, points) -> int:
    """One process after another, each killed at the next point; returns how many were."""
    kills = 0
    for name, when, n in points:
        process = forks.Process(target=train_in_child, args=(arguments, tmp_path / "output", die_in, name, when, n))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
        kills += process.exitcode != 0
        assert_whole(tmp_path / "storm")
    return kills


def test_a_run_killed_at_every_point_of_a_save_ends_as_one_that_was_not(call, forks, corpus, tmp_path):
    values = STORM | {"max_steps": 40, "eval_every": 10}
    assert call(train.main, *options(values, dataset=corpus, out_dir=tmp_path / "undisturbed"))[0] == 0
    arguments = options(values, dataset=corpus, out_dir=tmp_path / "storm")
    # the first calls are those of best.pt at step 0; from a checkpoint on, the log is cut first
    points = [(*point, n) for n, point in zip([1, 2, 2, 3, 3, 2, 4, 5, 4, 4], POINTS * 2, strict=True)]
    assert killed_at_points(forks, arguments, tmp_path, points) == len(points)
    assert call(train.main, *arguments)[0] == 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "storm", 40)


@pytest.mark.slow
def test_a_run_killed_at_many_points_of_many_saves(call, forks, corpus, tmp_path):
    values = STORM | {"max_steps": 500, "eval_every": 7}
    assert call(train.main, *options(values, dataset=corpus, out_dir=tmp_path / "undisturbed"))[0] == 0
    arguments = options(values, dataset=corpus, out_dir=tmp_path / "storm")
    points = [(*point, n) for n in range(1, 11) for point in POINTS]
    kills = killed_at_points(forks, arguments, tmp_path, points)
    assert call(train.main, *arguments)[0] == 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "storm", 500)
    assert kills == len(points)
    print(f"{kills} kills at points")


@pytest.mark.slow
@pytest.mark.parametrize("seed, aimed", [(0, False), (1, True), (2, False), (3, True)])
def test_a_storm_of_kills(call, forks, corpus, tmp_path, seed, aimed):
    """Kills at random moments of a process's life, or (aimed) at a random moment while a half-written file is there."""
    values, storm, moments = STORM | {"max_steps": 1000, "eval_every": 13, "seed": seed}, tmp_path / "storm", random.Random(seed)
    assert call(train.main, *options(values, dataset=corpus, out_dir=tmp_path / "undisturbed"))[0] == 0
    arguments = options(values, dataset=corpus, out_dir=storm)
    kills = hits = 0
    for _ in range(60):
        process = forks.Process(target=train_in_child, args=(arguments, tmp_path / "output"))
        process.start()
        process.join(moments.uniform(0, 0.8))
        while aimed and process.is_alive() and not list(storm.glob(".*.tmp")):
            time.sleep(0.0003)
        time.sleep(moments.uniform(0, 0.002) if aimed else 0)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
        kills += process.exitcode != 0
        hits += bool(list(storm.glob(".*.tmp")))
        assert_whole(storm)
        if process.exitcode == 0:
            break
    call(train.main, *arguments)
    assert_same_run(tmp_path / "undisturbed", storm, 1000)
    assert kills >= 10 and (hits >= 3 or not aimed)
    print(f"seed {seed}: {kills} kills, {hits} of them left a half-written file")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads how much memory a process has from /proc")
def test_memory_and_files_do_not_grow_over_many_steps(corpus, tmp_path):
    values = STORM | {"max_steps": 20_000, "eval_every": 100, "checkpoint_every": 100, "log_every": 50}
    command = [sys.executable, ROOT / "train.py", *options(values, dataset=corpus, out_dir=tmp_path / "out")]
    memory, files = {}, {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            step = int(line.split("/")[0].split()[1]) if line.startswith("step") else -1
            if step >= 2000 and step % 1000 == 0:
                pages = int(open(f"/proc/{process.pid}/statm").read().split()[1])
                memory[step] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
                files[step] = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("[!.]*")}
    assert process.returncode == 0
    print({step: f"{mb:.1f} MB" for step, mb in memory.items()}, files[2000], files[20_000])
    assert memory[20_000] < memory[2000] + 5
    assert files[2000].keys() == files[20_000].keys() == {"ckpt.pt", "best.pt", "log.jsonl"}
    assert all(abs(files[20_000][name] - files[2000][name]) < 1000 for name in ("ckpt.pt", "best.pt"))
