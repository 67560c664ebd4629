"""Training: what a step is, exact resume, atomic files, and what a user reads after a mistake."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace

import sample
import train
from checkpoint import choose_device, load_checkpoint
from config import UserError, run
from data import Corpus, lock, read_meta, write_meta
from data.tokenizing import Tokenizer
from eval import evaluation_sets
from model import GPT, KVShift
from train import TrainConfig, learning_rate, make_optimizers

import pytest
import torch
from conftest import arguments, load, randomize, read_log


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
def whole(fit, tmp_path):
    """A run that nothing interrupted."""
    fit(tmp_path / "whole")
    return tmp_path / "whole"


# --- exact resume


@pytest.mark.parametrize("number, optimizer", [(signal.SIGINT, "adamw"), (signal.SIGTERM, "muon")])
def test_a_run_stopped_by_signals_resumes_exactly(fit, tmp_path, monkeypatch, number, optimizer):
    more = {"optimizer": optimizer, "max_steps": 5, "lr_schedule": "cosine"}
    fit(tmp_path / "a", **more)
    stops, learning_rate = [0, 3], train.learning_rate  # steps: in the first and the second call

    def interrupted(step, config):
        if step in stops:
            stops.remove(step)
            os.kill(os.getpid(), number)
        return learning_rate(step, config)

    monkeypatch.setattr(train, "learning_rate", interrupted)
    for expected in (128 + number, 128 + number, 0):
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


def test_a_run_killed_at_every_file_operation_ends_like_one_that_was_not(corpus, tmp_path, whole):
    context = multiprocessing.get_context("fork")
    for n in range(1, 100):
        argv = arguments(corpus, tmp_path / "b")
        process = context.Process(target=run_until_killed, args=(argv, n))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert n > 13
    assert_same_run(whole, tmp_path / "b")
    assert not list((tmp_path / "b").glob(".*"))  # no temporary file is left


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


@pytest.mark.parametrize("foreign", [True, False])
def test_a_foreign_or_missing_best_pt_is_replaced(fit, tmp_path, whole, foreign, monkeypatch):
    (whole / "best.pt").unlink()
    if foreign:
        fit(tmp_path / "other", seed=2)
        shutil.copy(tmp_path / "other/best.pt", whole / "best.pt")
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss": 9.0})  # no lower loss
    fit(whole, max_steps=8)
    assert (whole / "old-1/best.pt").exists() == foreign
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
    damaged = b"garbage \xff\n" + log.read_bytes() + b'{"step": '
    log.write_bytes(damaged)
    assert "moved log.jsonl" in fit(whole, max_steps=7)
    assert (whole / "old-1/log.jsonl").read_bytes() == damaged
    assert [line["step"] for line in read_log(whole)[1]] == list(range(8))


def edit(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    weights = load_checkpoint(path)["model"]["embed.weight"].numpy().tobytes()
    raw[raw.index(weights)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [
    flip_a_bit,
    lambda path: os.truncate(path, path.stat().st_size // 2),
    lambda path: edit(path, lambda c: c["model"]["norm.weight"].fill_(math.nan)),
    lambda path: edit(path, lambda c: c["run"].update(step="x")),
    lambda path: edit(path, lambda c: c.pop("config")),
    lambda path: edit(path, lambda c: c.update(format=1)),
    lambda path: edit(path, lambda c: c.update(code=path))])  # weights_only=False would load it
def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_is(fit, whole, damage):
    path = whole / "ckpt.pt"
    damage(path)
    raw = path.read_bytes()
    fit(whole, error=f"{path} is damaged, or no checkpoint of")
    assert path.read_bytes() == raw


@pytest.mark.parametrize("change", [
    lambda c: c["model"].update({"norm.weight": torch.ones(3)}),
    lambda c: c["optimizer"]["state"]["norm.weight"].update(exp_avg=torch.ones(())),
    lambda c: c["optimizer"]["state"].pop("norm.weight"),
    lambda c: c.pop("optimizer")])
def test_states_that_do_not_fit_the_model_are_refused(fit, whole, change):
    edit(whole / "ckpt.pt", change)  # torch's fused AdamW would crash on another shape
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


def test_values_that_are_not_finite_stop_the_run(fit, tmp_path, whole, monkeypatch):
    fit(tmp_path / "a", learning_rate=1e9, max_steps=50, grad_clip=0,
        error="the checkpoints were not changed")
    before, step = (whole / "ckpt.pt").read_bytes(), torch.optim.AdamW.step

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


def test_the_shift_can_be_added_to_a_trained_vanilla_model(fit, tmp_path):
    source = tmp_path / "vanilla/ckpt.pt"
    fit(source.parent, kv_shift="none")
    loss = read_log(source.parent)[1][-1]["val_loss"]
    for place in ({"kv_shift": "kv"}, {"kv_shift": "none", "shift_at": "block"}):
        fit(tmp_path / "a", init_from=source, shift_init="identity", **place, resume="no")
        assert read_log(tmp_path / "a")[1][0]["val_loss"] == loss
        model = load(tmp_path / "a/ckpt.pt")
        shift = [p for name, p in model.named_parameters() if "shift." in name]
        assert shift and all(not torch.equal(p[1], torch.zeros_like(p[1])) for p in shift)
    fit(source.parent, init_from=source, kv_shift="none", resume="no")  # moves source aside
    assert read_log(source.parent)[1][0]["val_loss"] == loss
    fit(tmp_path / "b", init_from=source,
        error="is of another model: kv_shift was 'none', is 'kv'")


def test_a_fixed_shift_keeps_its_initial_weights_also_over_a_resume(fit, tmp_path):
    for n_steps in (3, 6):
        fit(tmp_path / "a", shift_learned=False, shift_init="induction", max_steps=n_steps)
    shift = load(tmp_path / "a/ckpt.pt").blocks[1].attn.shift
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
    ("adamw", False, "embedding"), ("muon", True, "attention"), ("muon", True, "block")])
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


def test_muon_orthogonalizes_in_float32_unless_dtype_is_bfloat16():
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
    assert type(make_optimizers(model, config, torch.bfloat16)[1]) is torch.optim.Muon


def test_induction_is_the_loss_on_the_repetition_of_random_tokens(corpus):
    sets = evaluation_sets(Corpus(corpus), 16, tokens=0, start=0, induction=True)
    inputs, first = sets["val_random"]
    _, second = sets["val_induction"]
    assert torch.equal(inputs[:, :8], inputs[:, 8:]) and inputs.shape == (64, 16)
    assert torch.equal(first[:, :7], inputs[:, 1:8]) and (first[:, 7:] == -1).all()
    assert torch.equal(second[:, 8:15], inputs[:, 9:]) and (second[:, :8] == -1).all()
    assert set(inputs.unique().tolist()) <= set(Corpus(corpus).windows("val", [0], 599)[0].tolist())


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


def test_characters_are_printed_whole_and_the_stop_token_is_not(capsys):
    ids = torch.tensor([[byte] for byte in "aé€😀".encode() + b"\xc3\0"])
    assert sample.print_stream(iter(ids), [], Tokenizer({"kind": "bytes"}), 0) == 11
    assert capsys.readouterr().out == "aé€😀\ufffd\n"


def test_a_mistake_in_sampling_is_one_line(call, whole):
    run = f"--out_dir={whole}"
    call(sample.main, run, "--top_p=0", error="top_p=0.0")
    call(sample.main, run, "--num_samples=0", error="num_samples=0")
    call(sample.main, run, "--prompt=a", "--prompt_file=b", error="exclude each other")
    call(sample.main, run, "--prompt_file=none", error="No such file or directory: none")


@pytest.mark.parametrize("options, message", [
    ({"dataset": "nothing"}, "no corpus in"), ({"block_size": 700}, "not more than 700"),
    ({"micro_batch_size": 3}, "multiple of micro_batch_size=3"), ({"resume": "yes"}, "resume=yes"),
    ({"vocab_size": 7}, "below the corpus's 256"), ({"learning_rate": "nan"}, "learning_rate=nan"),
    ({"fsdp": True}, "torchrun"), ({"fsdp": True, "optimizer": "muon"}, "whole matrices"),
    ({"max_steps": 0}, "max_steps=0"), ({"wandb_project": "x"}, "pip install wandb"),
    ({"out_dir": "/proc/x"}, "/proc/x")])
def test_a_mistake_in_training_is_one_line(fit, tmp_path, options, message):
    fit(tmp_path / "a", **options, error=message)


def test_auto_is_bfloat16_on_cpus_where_a_model_gains_from_it(monkeypatch):
    for names, n_embd, training, expected in (
            (["avx512_bf16"], 128, True, "bfloat16"), (["avx512_bf16"], 127, True, "float32"),
            (["avx512_bf16"], 255, False, "float32"), (["avx512_bf16"], 256, False, "bfloat16"),
            (["avx512_bf16", "amx_bf16"], 255, True, "float32"), ([], 256, True, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda n=names: dict.fromkeys(n, True))
        assert choose_device("cpu", "auto", n_embd, training)[1] == getattr(torch, expected)
    with pytest.raises(UserError, match="not available"):
        choose_device("cuda:99", "auto")
