"""Training: what a step is, exact resume, atomic files, and what a user reads after a mistake."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import sample
import train
from checkpoint import choose_device, load_checkpoint, load_model
from config import UserError, run
from data import Corpus, lock, read_meta, write_meta
from data.tokenizing import Tokenizer
from eval import evaluate, evaluation_sets
from model import GPT, KVShift
from train import TrainConfig, learning_rate, make_optimizers

import pytest
import torch
from conftest import ROOT, make_corpus, randomize

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_steps": 6,
        "warmup_steps": 2, "eval_tokens": 64, "eval_every": 2, "checkpoint_every": 2,
        "log_every": 1, "dropout": 0.1, "device": "cpu",
        "lr_schedule": "constant"}  # such a run may resume with more steps


def arguments(corpus, folder, **more):
    values = TINY | {"dataset": corpus, "out_dir": folder} | more
    return [f"--{name}={value}" for name, value in values.items()]


def read_log(out_dir):
    """Headers, and the other lines without what depends on the clock."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    clock = {"seconds", "tokens_per_s"}
    return ([line for line in lines if "config" in line],
            [{k: v for k, v in line.items() if k not in clock} for line in lines
             if "config" not in line])


def assert_same_run(a, b):
    """Bit for bit: weights, optimizer states, best model and the lines of the log."""
    for name in ("ckpt.pt", "best.pt"):
        x, y = (load_checkpoint(folder / name) for folder in (a, b))
        torch.testing.assert_close(x["model"], y["model"], rtol=0, atol=0)
        if name == "ckpt.pt":
            states = x["optimizer"]["state"], y["optimizer"]["state"]
            torch.testing.assert_close(*states, rtol=0, atol=0)
        assert x["run"] | {"seconds": 0} == y["run"] | {"seconds": 0}
    assert read_log(a)[1] == read_log(b)[1]


@pytest.fixture
def fit(call, corpus):
    """fit(folder, **options) trains with TINY and these options; returns stdout. See `call`."""

    def fit(folder, error="", code=0, **options):
        return call(train.main, *arguments(corpus, folder, **options), error=error, code=code)[0]

    return fit


@pytest.fixture
def whole(fit, tmp_path):
    """A run that nothing interrupted."""
    fit(tmp_path / "whole")
    return tmp_path / "whole"


# --- exact resume


@pytest.mark.parametrize("number, optimizer", [
    (signal.SIGINT, "adamw"), (signal.SIGTERM, "adamw"), (signal.SIGTERM, "muon")])
def test_a_run_stopped_by_signals_ends_like_one_that_was_not(
        fit, tmp_path, monkeypatch, number, optimizer):
    more = {"optimizer": optimizer, "max_steps": 5, "lr_schedule": "cosine"}
    fit(tmp_path / "a", **more)
    stops = [1, 3]  # in the first step of the first call, and in the third of the second

    def clip(*args, clip_grad_norm_=torch.nn.utils.clip_grad_norm_):
        steps.append(1)
        if stops and len(steps) == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), number)
        return clip_grad_norm_(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for expected in (128 + number, 128 + number, 0):
        steps = []
        out = fit(tmp_path / "b", **more, code=expected)
        assert ("rerun the same command to resume" in out) == bool(expected)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    headers, lines = read_log(tmp_path / "b")
    assert [header["step"] for header in headers] == [0, 1, 4]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


def run_until_killed(argv, n):
    """Trains in this process, which SIGKILLs itself at the n-th fsync or rename."""
    counter = iter(range(1, n + 1))

    def counted(function):
        def call(*args):
            if next(counter) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    sys.argv, sys.stdout = ["train.py", *argv], open(os.devnull, "w")
    run(train.main)


def train_with_kills(argv, kills) -> int:
    """Kills the run at each of the file operations, then lets it end; returns the kills."""
    killed = 0
    for n in [*kills, 10**9]:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=run_until_killed, args=(argv, n))
        process.start()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    return killed


def test_a_run_killed_at_every_file_operation_of_a_save_ends_like_one_that_was_not(
        corpus, tmp_path, whole):
    assert train_with_kills(arguments(corpus, tmp_path / "b"), range(1, 26)) > 12
    assert_same_run(whole, tmp_path / "b")
    assert not list((tmp_path / "b").glob(".*"))  # no temporary file is left


@pytest.mark.slow
def test_a_run_killed_50_times_ends_like_one_that_was_not(fit, corpus, tmp_path):
    more = {"max_steps": 200, "optimizer": "muon"}
    fit(tmp_path / "a", **more)
    kills = [14 + i % 7 for i in range(50)]
    assert train_with_kills(arguments(corpus, tmp_path / "b", **more), kills) == 50
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_complete_run_says_so_and_a_constant_rate_may_train_longer(fit, whole, monkeypatch):
    assert "is complete: step 6, best val loss" in fit(whole)
    monkeypatch.setattr(train.platform, "python_version", lambda: "9.9")
    assert "resuming" in fit(whole, max_steps=8)
    headers = read_log(whole)[0]
    assert [header["config"]["max_steps"] for header in headers] == [6, 8]
    assert [header["versions"]["python"] == "9.9" for header in headers] == [False, True]


# --- files of other runs, damaged files


def test_files_of_another_run_are_moved_aside(fit, whole):
    old = (whole / "ckpt.pt").read_bytes()
    (whole / ".notes.tmp").write_text("mine")
    fit(whole, seed=2, error="another run: seed was 1, is 2")
    out = fit(whole, seed=2, resume="no")
    assert "moved ckpt.pt, best.pt, log.jsonl, loss.png" in out
    assert (whole / "old-1" / "ckpt.pt").read_bytes() == old
    assert (whole / ".notes.tmp").read_text() == "mine"


@pytest.mark.parametrize("foreign", ["damaged", "another run's", "missing"])
def test_a_best_pt_that_is_not_this_runs_is_not_adopted(fit, tmp_path, whole, foreign):
    if foreign == "damaged":
        (whole / "best.pt").write_bytes(b"x" * 1000)
    elif foreign == "another run's":
        fit(tmp_path / "b", seed=2)
        shutil.copy(tmp_path / "b" / "best.pt", whole)
    else:
        (whole / "best.pt").unlink()
    fit(whole, max_steps=8)
    assert (whole / "old-1" / "best.pt").exists() == (foreign != "missing")
    best = load_checkpoint(whole / "best.pt")
    assert best["run"]["step"] == 8 and best["config"]["seed"] == 1


def test_best_pt_is_the_best_trained_model(fit, tmp_path, monkeypatch):
    losses = iter([1.0, 3.0, 2.0, 2.5, 2.0])  # at steps 0, 2, 4, 6 and 8
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": next(losses)})
    fit(tmp_path / "a", max_steps=8)
    assert load_checkpoint(tmp_path / "a" / "best.pt")["run"]["step"] == 4
    assert load_checkpoint(tmp_path / "a" / "ckpt.pt")["run"]["best_step"] == 4


def test_a_damaged_log_is_kept_under_another_name(fit, whole):
    log = whole / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + b"garbage \xff\n" + b"".join(lines[3:]) + b'{"step": ')
    damaged = log.read_bytes()
    assert "moved log.jsonl" in fit(whole, max_steps=7)
    assert (whole / "old-1" / "log.jsonl").read_bytes() == damaged
    assert [line["step"] for line in read_log(whole)[1]] == list(range(8))


def damaged_checkpoint(path, damage):
    raw, checkpoint = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    state = checkpoint["optimizer"]["state"]["blocks.0.attn.q.weight"]
    edits = {"no dict": lambda: checkpoint.clear(),
             "not finite": lambda: checkpoint["model"]["norm.weight"].fill_(math.nan),
             "weight's shape": lambda: checkpoint["model"].update({"norm.weight": torch.ones(3)}),
             "weight missing": lambda: checkpoint["model"].pop("norm.weight"),
             "state's shape": lambda: state.update({"exp_avg": torch.ones(())}),
             "state missing": lambda: checkpoint["optimizer"]["state"].pop("norm.weight"),
             "no optimizer": lambda: checkpoint.pop("optimizer"),
             "run's types": lambda: checkpoint["run"].update({"step": "x"}),
             "no config": lambda: checkpoint.pop("config"),
             "version 1": lambda: checkpoint.update({"format": 1})}
    if damage in edits:
        edits[damage]()
        torch.save(checkpoint, path)
    elif damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "one bit":
        with zipfile.ZipFile(path) as archive:  # in the middle of the largest tensor
            info = max(archive.infolist(), key=lambda info: info.file_size)
        raw[info.header_offset + 200 + info.file_size // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "text":
        path.write_text("not a checkpoint")


@pytest.mark.parametrize("damage", [
    "no dict", "not finite", "no config", "run's types", "version 1", "cut", "one bit", "text"])
def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_is(fit, whole, damage):
    path = whole / "ckpt.pt"
    damaged_checkpoint(path, damage)
    raw = path.read_bytes()
    fit(whole, error=f"{path} is damaged, or no checkpoint of")
    assert path.read_bytes() == raw


@pytest.mark.parametrize("damage", ["weight's shape", "weight missing", "state's shape",
                                    "state missing", "no optimizer"])
def test_states_that_do_not_fit_the_model_are_refused(fit, whole, damage):
    damaged_checkpoint(whole / "ckpt.pt", damage)  # torch would crash on the shape of a state
    fit(whole, max_steps=8, error="does not fit the model")


@pytest.mark.parametrize("target", ["torch.save", "os.fsync"])
def test_a_full_disk_leaves_the_last_checkpoint(fit, tmp_path, whole, monkeypatch, target):
    def full(*args):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(target, full)
    shutil.copytree(whole, tmp_path / "b")
    fit(tmp_path / "b", resume="no", error="No space left on")
    assert not [path for path in (tmp_path / "b").rglob(".*")]
    assert {path.name: path.read_bytes() for path in (tmp_path / "b" / "old-1").iterdir()} == before


def test_values_that_are_not_finite_stop_the_run_and_leave_the_checkpoints(
        fit, tmp_path, whole, monkeypatch):
    fit(tmp_path / "a", learning_rate=1e9, max_steps=50, grad_clip=0, min_lr=0,
        error="the checkpoints were not changed")
    before = (whole / "ckpt.pt").read_bytes()
    step = torch.optim.AdamW.step

    def overflow(optimizer, closure=None):  # a finite gradient, and a weight that is not
        step(optimizer)
        if optimizer.param_groups[0]["lr"]:  # torch steps with 0 to create the states
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    fit(whole, max_steps=20, checkpoint_every=1, eval_every=100,
        error="a weight after step 7 is not finite")
    assert (whole / "ckpt.pt").read_bytes() == before


def test_a_second_run_in_the_same_folder_is_refused(fit, tmp_path):
    (tmp_path / "a").mkdir()
    descriptor = lock(tmp_path / "a")
    fit(tmp_path / "a", error="another process is writing to")
    os.close(descriptor)


# --- starting from other weights


def test_a_run_can_start_from_the_weights_of_another(fit, whole):
    before = load_checkpoint(whole / "best.pt")["model"]
    fit(whole, init_from=whole / "best.pt", resume="no", learning_rate=0, min_lr=0,
        block_size=8)  # in the same folder, whose files are moved aside
    torch.testing.assert_close(load_checkpoint(whole / "ckpt.pt")["model"], before, rtol=0, atol=0)


def test_the_shift_can_be_added_to_a_trained_vanilla_model(fit, tmp_path):
    fit(tmp_path / "a", kv_shift="none")
    for i, place in enumerate(({"kv_shift": "kv"}, {"kv_shift": "none", "shift_at": "block"})):
        fit(tmp_path / f"b{i}", init_from=tmp_path / "a/ckpt.pt", shift_init="identity", **place)
        lines = read_log(tmp_path / f"b{i}")[1]
        assert lines[0]["val_loss"] == read_log(tmp_path / "a")[1][-1]["val_loss"]
        shift = [p for n, p in load_model(load_checkpoint(tmp_path / f"b{i}/ckpt.pt"),
                                          "cpu").named_parameters() if "shift." in n]
        assert shift and all(not torch.equal(p[1], torch.zeros_like(p[1])) for p in shift)
    fit(tmp_path / "c", init_from=tmp_path / "a/ckpt.pt",
        error="is of another model: kv_shift was 'none', is 'kv'")


def test_a_fixed_shift_keeps_its_initial_weights_also_over_a_resume(fit, tmp_path):
    more = {"shift_learned": False, "shift_init": "induction"}
    for n_steps in (3, 6):
        fit(tmp_path / "a", **more, max_steps=n_steps)
    shift = load_model(load_checkpoint(tmp_path / "a/ckpt.pt"), "cpu").blocks[1].attn.shift
    assert shift["k"].weight[:, 0, 0].tolist() == [0, 1]
    assert shift["v"].weight[:, 0, 0].tolist() == [1, 0]


def test_weights_of_another_model_or_tokenizer_are_refused(fit, corpus, tmp_path, whole):
    init = {"init_from": whole / "best.pt"}
    fit(tmp_path / "a", n_layer=3, **init, error="is of another model: n_layer was 2, is 3")
    fit(tmp_path / "b", init_from="gpt2", error="must be a checkpoint, such as out/x/best.pt")
    meta = read_meta(corpus) | {"tokenizer": {"kind": "char", "chars": "ab"}}
    write_meta(corpus, meta)
    fit(tmp_path / "c", **init, error="another tokenizer")


# --- a step


def test_training_learns(fit, tmp_path):
    corpus = make_corpus(tmp_path / "large", n_train=50_000)
    fit(tmp_path / "a", dataset=corpus, max_steps=120, learning_rate=1e-2, eval_every=120,
        eval_tokens=512)
    losses = [line["val_loss"] for line in read_log(tmp_path / "a")[1] if "val_loss" in line]
    assert losses[0] > 5 and losses[-1] < 1.5


def test_micro_batches_recomputation_compilation_and_bfloat16_change_rounding_only(fit, tmp_path):
    cases = [{}, {"micro_batch_size": 1}, {"recompute": True}, {"compile": True},
             {"dtype": "bfloat16"}]
    logs = []
    for i, more in enumerate(cases):
        fit(tmp_path / str(i), n_layer=1, dropout=0, **more)  # one layer compiles sooner
        logs.append([(line["step"], line.get("loss", 0), line.get("val_loss", 0))
                     for line in read_log(tmp_path / str(i))[1]])
    logs = torch.tensor(logs)
    for log in logs[1:4]:
        torch.testing.assert_close(log, logs[0], rtol=1e-5, atol=1e-5)
    assert 1e-5 < (logs[4] - logs[0]).abs().max() < 0.02


def test_the_learning_rate_warms_up_and_decays():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=4, max_steps=14)
    rates = {schedule: [learning_rate(step, replace(config, lr_schedule=schedule))
                        for step in range(15)] for schedule in ("cosine", "linear", "constant")}
    for rate in rates.values():
        assert rate[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates["linear"][4:] == pytest.approx([1 - 0.09 * i for i in range(11)])
    assert rates["cosine"][9] == pytest.approx(0.55) and rates["cosine"][14] == pytest.approx(0.1)
    assert set(rates["constant"][4:]) == {1.0}


@pytest.mark.parametrize("optimizer, tied, place", [
    ("adamw", True, "attention"), ("adamw", False, "embedding"), ("muon", True, "attention"),
    ("muon", True, "block"), ("muon", True, "embedding")])
def test_weight_decay_and_muon_leave_embeddings_norms_and_shifts_alone(optimizer, tied, place):
    config = TrainConfig(vocab_size=7, n_layer=2, n_head=2, n_embd=8, shift_at=place,
                         kv_shift="qkv" if place == "attention" else "none",
                         shift_per="channel", optimizer=optimizer, tie_embeddings=tied)
    model = GPT(config)
    for module in [m for m in model.modules() if isinstance(m, KVShift)]:
        module.gate = torch.nn.Linear(4, 1)  # a variant with a matrix
    names = {p: name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, config)
    decayed = {names[p] for o in optimizers for group in o.param_groups for p in group["params"]
               if group["weight_decay"]}
    matrices = {f"{name}.weight" for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and "shift." not in name}
    assert decayed == matrices and ("head.weight" in decayed) != tied
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(names)
    if optimizer == "muon":
        assert {names[p] for p in optimizers[1].param_groups[0]["params"]} == matrices
        assert sum(name.endswith((".q.weight", ".k.weight", ".v.weight")) for name in matrices) == 6


def test_muon_orthogonalizes_in_float32_on_a_cpu():
    config = TrainConfig(vocab_size=7, n_layer=1, n_head=2, n_embd=8, optimizer="muon",
                         learning_rate=0.5, weight_decay=0.0)
    model = randomize(GPT(config))
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    p = model.blocks[0].mlp.up.weight  # (32, 8)
    before, x = p.detach().clone(), p.grad / p.grad.norm()
    for _ in range(5):  # Newton-Schulz with the coefficients of the reference implementation
        gram = x.T @ x
        x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
    make_optimizers(model, config)[1].step()
    update = (before - p.detach()) / (0.5 * 0.2 * 32**0.5)  # scaled to the RMS of AdamW's
    torch.testing.assert_close(update, x, rtol=1e-4, atol=1e-4)


def test_evaluation_sees_the_same_tokens_at_any_batch_size(corpus):
    model = randomize(GPT(TrainConfig(**TINY | {"vocab_size": 256})))
    sets = evaluation_sets(Corpus(corpus), 16, tokens=0, start=0, induction=True)
    assert len(sets["val_loss"][0]) == 37  # (600 - 1) // 16
    results = [evaluate(model, sets, n) for n in (1, 5, 64)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)


def test_induction_is_the_loss_on_the_repetition_of_random_tokens(corpus):
    sets = evaluation_sets(Corpus(corpus), 16, tokens=0, start=0, induction=True)
    inputs, first = sets["val_random"]
    _, second = sets["val_induction"]
    assert torch.equal(inputs[:, :8], inputs[:, 8:]) and inputs.shape == (64, 16)
    assert torch.equal(first[:, :7], inputs[:, 1:8]) and (first[:, 7:] == -1).all()
    assert torch.equal(second[:, 8:15], inputs[:, 9:]) and (second[:, :8] == -1).all()
    assert set(inputs.unique().tolist()) <= set(Corpus(corpus).windows("val", [0], 100)[0].tolist())


# --- sampling


def test_samples_are_streamed_batched_and_repeatable(call, whole):
    options = [f"--out_dir={whole}", "--max_new_tokens=20", "--prompt=def ", "--device=cpu"]
    one, err = call(sample.main, *options)
    assert one.startswith("def ") and "20 tokens in" in err
    assert call(sample.main, *options)[0] == one
    many, err = call(sample.main, *options, "--num_samples=3", "--checkpoint=ckpt.pt")
    assert many.count("--- sample") == 3 and "60 tokens in" in err


def test_the_stop_token_and_what_follows_it_is_not_counted(call, whole, monkeypatch):
    tokens = torch.tensor([[65, 66], [0, 67], [0, 0]])
    monkeypatch.setattr(GPT, "stream", lambda *args: iter(tokens))
    out, err = call(sample.main, f"--out_dir={whole}", "--num_samples=2")
    assert out == "--- sample 1\nA\n--- sample 2\nBC\n" and err.startswith("3 tokens")
    monkeypatch.setattr(GPT, "stream", lambda *args: iter(torch.tensor([[65], [0]])))
    out, err = call(sample.main, f"--out_dir={whole}")
    assert out == "A\n" and err.startswith("1 tokens")


def test_characters_are_printed_whole(capsys):
    ids = torch.tensor([[byte] for byte in "aé€😀".encode() + b"\xc3"])
    assert sample.print_stream(iter(ids), [], Tokenizer({"kind": "bytes"}), None) == 11
    assert capsys.readouterr().out == "aé€😀\ufffd\n"


@pytest.mark.parametrize("options, message", [
    (["--top_p=0"], "top_p=0.0"), (["--prompt=a", "--prompt_file=b"], "exclude each other"),
    (["--checkpoint=nothing.pt"], "No such file"), (["--num_samples=0"], "num_samples=0"),
    (["--prompt_file=nothing"], "No such file or directory: nothing")])
def test_a_mistake_in_sampling_is_one_line(call, whole, options, message):
    call(sample.main, f"--out_dir={whole}", *options, error=message)


# --- mistakes and program errors


@pytest.mark.parametrize("options, message", [
    ({"dataset": "nothing"}, "no corpus in"), ({"block_size": 700}, "not more than 700"),
    ({"batch_size": 4, "micro_batch_size": 3}, "multiple of micro_batch_size=3"),
    ({"vocab_size": 7}, "below the corpus's 256"), ({"device": "cuda:7"}, "device=cuda:7"),
    ({"device": "warp"}, "device=warp is not available"), ({"resume": "yes"}, "resume=yes"),
    ({"fsdp": True}, "torchrun"), ({"fsdp": True, "optimizer": "muon"}, "whole matrices"),
    ({"learning_rate": "nan"}, "learning_rate=nan"), ({"max_steps": 0}, "max_steps=0"),
    ({"wandb_project": "x"}, "pip install wandb"), ({"out_dir": "/proc/x"}, "/proc/x")])
def test_a_mistake_in_training_is_one_line(fit, tmp_path, options, message):
    fit(tmp_path / "a", **options, error=message)


def test_program_errors_keep_their_traceback(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "a")


def test_commands_work_from_another_folder_and_a_reader_may_leave(corpus, tmp_path):
    command = [sys.executable, ROOT / "train.py", *arguments(corpus, tmp_path / "a", max_steps=2)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "done: best val loss" in done.stdout, done.stderr
    command = f"{sys.executable} {ROOT / 'sample.py'} --out_dir=a --max_new_tokens=400 | head -c 1"
    done = subprocess.run(command, cwd=tmp_path, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_auto_is_bfloat16_on_cpus_where_a_model_gains_from_it(monkeypatch):
    for names, n_embd, expected in (
            (["avx512_bf16"], 128, "bfloat16"), (["avx512_bf16"], 127, "float32"),
            (["avx512_bf16", "amx_bf16"], 255, "float32"), ([], 256, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda n=names: dict.fromkeys(n, True))
        assert choose_device("cpu", "auto", n_embd)[1] == getattr(torch, expected)
    with pytest.raises(UserError, match="not available"):
        choose_device("cuda:99", "auto")
