"""The promises of train.py and sample.py: exact resume, whole files, a clear word on every mistake."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, options

import sample
import train
from checkpoint import load_checkpoint, load_model
from config import UserError
from data import Corpus, CorpusWriter, Tokenizer, lock
from model import GPT, GPTConfig
from train import TrainConfig, evaluate, learning_rate, make_optimizers

RUN = TINY | {"max_steps": 40, "dropout": 0.1, "micro_batch_size": 2, "warmup_steps": 5, "eval_every": 10, "checkpoint_every": 7,
              "log_every": 4}
TIMES = {"seconds", "tokens_per_s", "started"}


def log_of(out_dir) -> list[dict]:
    """log.jsonl without what the clock says and without the header's out_dir."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    lines[0]["config"].pop("out_dir")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    one, other = load_checkpoint(a / "ckpt.pt"), load_checkpoint(b / "ckpt.pt")
    assert one["run"]["step"] == other["run"]["step"] == 40
    assert same(one["model"], other["model"]) and same(one["optimizer"], other["optimizer"])
    assert same(load_checkpoint(a / "best.pt")["model"], load_checkpoint(b / "best.pt")["model"])
    assert log_of(a) == log_of(b)
    assert [line["step"] for line in log_of(a)[1:]] == sorted({*range(0, 41, 4), *range(0, 41, 10)})


@pytest.fixture
def whole_run(call, corpus, tmp_path):
    assert call(train.main, *options(RUN, dataset=corpus, out_dir=tmp_path / "whole"))[0] == 0
    return tmp_path / "whole"


def test_muon_resumes_exactly_too(call, corpus, tmp_path):
    arguments = options(RUN, dataset=corpus, optimizer="muon", lr_schedule="constant")
    assert call(train.main, *arguments, f"--out_dir={tmp_path / 'whole'}")[0] == 0
    for max_steps in (10, 40):
        assert call(train.main, *arguments, f"--out_dir={tmp_path / 'two_parts'}", f"--max_steps={max_steps}")[0] == 0
    one, other = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "two_parts"))
    kept = {tuple(state) for state in one["optimizer"]["state"].values()}
    assert kept == {("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)}
    assert same(one["model"], other["model"]) and same(one["optimizer"], other["optimizer"])


@pytest.mark.parametrize("number, steps", [(signal.SIGTERM, [13]), (signal.SIGINT, [0, 1, 20, 38])])
def test_a_run_stopped_by_a_signal_ends_as_one_that_was_not(call, corpus, tmp_path, whole_run, monkeypatch, number, steps):
    arguments = options(RUN, dataset=corpus, out_dir=tmp_path / "stopped")
    seed = train.dropout_seed
    for stop_at in steps:

        def interrupted(run_seed, step, rank, stop_at=stop_at):
            if step == stop_at:
                signal.raise_signal(number)
            return seed(run_seed, step, rank)

        monkeypatch.setattr(train, "dropout_seed", interrupted)
        code, out, err = call(train.main, *arguments)
        assert code == 128 + number and f"stopped by {number.name} after step {stop_at + 1}" in out
        assert load_checkpoint(tmp_path / "stopped" / "ckpt.pt")["run"]["step"] == stop_at + 1
    monkeypatch.setattr(train, "dropout_seed", seed)
    code, out, _ = call(train.main, *arguments)
    assert code == 0 and f"going on from step {steps[-1] + 1}" in out
    assert_same_run(whole_run, tmp_path / "stopped")


def test_a_signal_while_the_model_is_evaluated_or_saved_loses_nothing(call, corpus, tmp_path, whole_run, monkeypatch):
    arguments = options(RUN, dataset=corpus, out_dir=tmp_path / "stopped")
    for name in ("evaluate", "save_checkpoint"):
        monkeypatch.setattr(train, name, first_call(getattr(train, name), lambda: signal.raise_signal(signal.SIGTERM)))
        code, out, _ = call(train.main, *arguments)
        monkeypatch.undo()
        saved = load_checkpoint(tmp_path / "stopped" / "ckpt.pt")["run"]["step"]
        assert code == 128 + signal.SIGTERM and f"stopped by SIGTERM after step {saved}" in out
    assert call(train.main, *arguments)[0] == 0
    assert_same_run(whole_run, tmp_path / "stopped")


def first_call(function, action):
    """`function`, whose first call does `action` beforehand."""
    actions = [action]

    def acting(*arguments, **more):
        if actions:
            actions.pop()()
        return function(*arguments, **more)

    return acting


def test_a_run_killed_with_sigkill_goes_on_from_its_last_checkpoint(corpus, tmp_path, whole_run):
    out_dir = tmp_path / "killed"
    command = [sys.executable, ROOT / "train.py", *options(RUN, dataset=corpus, out_dir=out_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    for line in process.stdout:
        if int(line.split(b"/")[0].split()[-1] if line.startswith(b"step") else 0) >= 15:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < load_checkpoint(out_dir / "ckpt.pt")["run"]["step"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(whole_run, out_dir)


def test_a_resumed_run_drops_what_the_log_has_beyond_its_checkpoint(call, corpus, tmp_path, whole_run, monkeypatch):
    out_dir = tmp_path / "cut"
    arguments = options(RUN, dataset=corpus, out_dir=out_dir)
    monkeypatch.setattr(train, "save_checkpoint", fail_at(train.save_checkpoint, 7, OSError(28, "No space left on device", "x")))
    assert call(train.main, *arguments)[0] == 2
    monkeypatch.undo()
    with open(out_dir / "log.jsonl", "a") as f:
        f.write('{"step": 31, "lo')  # a line that a power cut left half written
    assert call(train.main, *arguments)[0] == 0
    assert_same_run(whole_run, out_dir)


def test_a_lost_log_begins_anew(call, corpus, tmp_path):
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path, lr_schedule="constant")
    assert call(train.main, *arguments)[0] == 0
    (tmp_path / "log.jsonl").unlink()
    code, out, _ = call(train.main, *arguments, f"--max_steps={TINY['max_steps'] + 2}")
    header, *lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert code == 0 and header["config"]["max_steps"] == TINY["max_steps"] + 2 and len(lines) == 2 and "and loss.png" in out


def test_a_run_can_begin_with_the_weights_of_another(call, corpus, tmp_path):
    arguments = options(TINY, dataset=corpus, kv_shift="none")
    assert call(train.main, *arguments, f"--out_dir={tmp_path / 'first'}")[0] == 0
    first = tmp_path / "first" / "ckpt.pt"
    arguments += [f"--init_from={first}", f"--out_dir={tmp_path / 'second'}", "--learning_rate=1e-4", "--seed=2"]
    assert call(train.main, *arguments, "--dropout=0.1")[0] == 0
    ends, begins = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[line])["val_loss"]
                    for name, line in (("first", -1), ("second", 1)))
    assert ends == begins
    code, _, err = call(train.main, *arguments, "--dropout=0.2")
    assert code == 2 and "dropout was 0.1, is 0.2" in err
    first.unlink()  # it was needed for the start alone
    assert call(train.main, *arguments, "--dropout=0.1")[0] == 0
    assert "no checkpoint" in call(train.main, *arguments, "--resume=no")[2]


@pytest.mark.parametrize("other, message", [({"kv_shift": "kv"}, "kv_shift was 'none', is 'kv'"), ({"n_head": 1}, "n_head was 2"),
                                            ({"dataset": "efgh"}, "another tokenizer"), ({"block_size": 8}, "")])
def test_only_the_weights_of_the_same_model_are_taken(call, tmp_path, other, message):
    for chars in ("abcd", "efgh"):
        with CorpusWriter(tmp_path / chars, Tokenizer({"kind": "char", "chars": chars}), source="test") as writer:
            writer.write("train", np.arange(600) % 4), writer.write("val", np.arange(600) % 4)
    first = TINY | {"kv_shift": "none", "dataset": "abcd"}
    for values in (first | {"out_dir": tmp_path / "first"},
                   first | other | {"out_dir": tmp_path / "second", "init_from": tmp_path / "first" / "best.pt"}):
        code, _, err = call(train.main, *options(values, dataset=tmp_path / values["dataset"]))
    assert (code, err) == (0, "") if not message else code == 2 and message in err and err.count("\n") == 1


def fail_at(function, n, error):
    """`function`, whose n-th call raises the error."""
    calls = []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) == n:
            raise error
        return function(*arguments, **more)

    return failing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing")])
def test_a_full_disk_leaves_the_last_checkpoint(call, corpus, tmp_path, monkeypatch, error):
    out_dir = tmp_path / "out"
    arguments = options(TINY, dataset=corpus, out_dir=out_dir, eval_every=100, checkpoint_every=2)
    save = torch.save

    def half(checkpoint, f):
        if checkpoint["run"]["step"] > 2:
            f.write(b"half a checkpoint")
            raise error
        save(checkpoint, f)

    monkeypatch.setattr(torch, "save", half)
    if isinstance(error, OSError):
        code, _, err = call(train.main, *arguments)
        assert code == 2 and "No space left" in err and err.count("\n") == 1
    else:
        with pytest.raises(RuntimeError):
            call(train.main, *arguments)
    assert load_checkpoint(out_dir / "ckpt.pt")["run"]["step"] == 2
    assert sorted(path.name for path in out_dir.iterdir()) == ["best.pt", "ckpt.pt", "log.jsonl"]
    monkeypatch.undo()
    assert call(train.main, *arguments)[0] == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(call, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, config: 1e-3 if step < 6 else 1e30)
    out_dir = tmp_path / "out"
    arguments = options(TINY, dataset=corpus, out_dir=out_dir, max_steps=30, checkpoint_every=5, eval_every=5)
    code, out, err = call(train.main, *arguments)
    assert code == 2 and "step 8 has loss" in err and "learning rate 1e+30" in err and err.count("\n") == 1
    assert load_checkpoint(out_dir / "ckpt.pt")["run"]["step"] == 5 and load_checkpoint(out_dir / "best.pt")["run"]["step"] == 5
    assert all(math.isfinite(line.get("loss", 0)) for line in log_of(out_dir)[1:])


def test_best_is_never_replaced_by_a_worse_model(call, corpus, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: next(losses))
    code, _, err = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path, eval_every=1, checkpoint_every=1))
    assert code == 2 and "the val loss is nan after step 4" in err
    assert load_checkpoint(tmp_path / "best.pt")["run"]["best"] == 3.0
    assert load_checkpoint(tmp_path / "ckpt.pt")["run"]["step"] == 3


def test_what_an_earlier_run_left_is_moved_aside(call, corpus, tmp_path):
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path)
    call(train.main, *arguments)
    before = {name: (tmp_path / name).read_bytes() for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png")}
    code, out, _ = call(train.main, *arguments)
    assert code == 0 and "is complete: step 4 of 4" in out
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    for n in (1, 2):
        assert call(train.main, *arguments, "--resume=no", f"--seed={n}")[0] == 0
        assert (tmp_path / f"old-{n}" / "ckpt.pt").exists()
    assert before == {name: (tmp_path / "old-1" / name).read_bytes() for name in before}
    assert load_checkpoint(tmp_path / "ckpt.pt")["config"]["seed"] == 2


def test_a_restart_by_torchrun_goes_on_even_with_resume_no(call, corpus, tmp_path, monkeypatch):
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path, resume="no")
    assert call(train.main, *arguments)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "is complete" in call(train.main, *arguments)[1] and not (tmp_path / "old-1").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "moved an earlier run's files" in call(train.main, *arguments)[1]


def test_what_a_killed_save_left_half_written_is_removed(call, corpus, tmp_path):
    (tmp_path / ".ckpt.pt.99.tmp").write_bytes(b"half a checkpoint")
    assert call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["best.pt", "ckpt.pt", "log.jsonl", "loss.png"]


def test_a_run_ends_well_where_its_tokenizer_cannot_be_had(call, corpus, tmp_path, monkeypatch):
    def unreachable(spec):
        raise UserError("cannot load it")

    monkeypatch.setattr(train, "Tokenizer", unreachable)
    code, out, _ = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path))
    assert code == 0 and "no sample: cannot load it" in out and "more of it:" in out


def test_a_second_run_in_the_same_folder_is_refused(call, corpus, tmp_path):
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock(tmp_path))
        code, _, err = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path))
    assert code == 2 and "another process is writing to" in err and not (tmp_path / "log.jsonl").exists()
    assert call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path))[0] == 0


def test_accumulation_changes_nothing_but_rounding(call, corpus, tmp_path):
    for micro in (4, 2, 1):
        call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / str(micro), micro_batch_size=micro, kv_shift="qkv"))
    logs = [[line for line in log_of(tmp_path / str(micro)) if "loss" in line] for micro in (4, 2, 1)]
    for key in ("loss", "grad_norm"):
        one, two, four = ([line[key] for line in log] for log in logs)
        assert one == pytest.approx(two, abs=1e-4) and one == pytest.approx(four, abs=1e-4)
    models = [load_checkpoint(tmp_path / str(micro) / "ckpt.pt")["model"] for micro in (4, 2, 1)]
    for other in models[1:]:
        for name, p in models[0].items():
            torch.testing.assert_close(p, other[name], atol=1e-5, rtol=1e-4)


def test_evaluation_sees_the_same_tokens_at_any_batch_size(corpus):
    corpus = Corpus(corpus)
    config = TrainConfig(**TINY | {"eval_tokens": 0, "vocab_size": 256})
    torch.manual_seed(0)
    model = GPT(config)
    losses = []
    for micro in (1, 4, 64):
        config.micro_batch_size = micro
        losses.append(evaluate(model, corpus, config, torch.device("cpu"), torch.autocast("cpu", enabled=False)))
    starts = range(0, 600 - 16, 16)
    rows = torch.from_numpy(corpus.windows("val", starts, 16))
    assert losses == pytest.approx([model(rows[:, :-1], rows[:, 1:]).item()] * 3, abs=1e-5)
    assert model.training


def test_learning_rate_schedules():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=9, max_steps=109)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for schedule, middle, end in (("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)):
        config.lr_schedule = schedule
        assert [learning_rate(step, config) for step in (59, 109)] == pytest.approx([middle, end])
    config.lr_schedule = "cosine"
    assert learning_rate(34, config) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_are_decayed(tied):
    config = TrainConfig(**TINY | {"vocab_size": 10, "kv_shift": "qkv", "tie_embeddings": tied})
    model = GPT(config)
    names = {p: name for name, p in model.named_parameters()}
    adamw, = make_optimizers(model, config)
    decayed, others = ([names[p] for p in group["params"]] for group in adamw.param_groups)
    assert {name.split(".")[-2] for name in decayed} == {"qkv", "out", "gate", "up", "down"} | (set() if tied else {"head"})
    assert {name.split(".")[-2] for name in others} == {"embed", "norm_attn", "norm_mlp", "norm", "shift"}
    assert len(decayed) + len(others) == len(names)
    config.optimizer = "muon"  # takes the blocks' matrices alone
    adamw, muon = make_optimizers(model, config)
    assert [names[p] for p in muon.param_groups[0]["params"]] == [name for name in decayed if name.startswith("blocks")]
    assert [names[p] for group in adamw.param_groups for p in group["params"]] == (
        [name for name in decayed if not name.startswith("blocks")] + others)


@pytest.mark.parametrize("dtype, compiled", [("bfloat16", False), ("float16", False), ("float32", True)])
def test_other_arithmetic_learns_the_same(call, corpus, tmp_path, dtype, compiled):
    for name, more in (("plain", {}), ("other", {"dtype": dtype, "compile": compiled})):
        assert call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / name, max_steps=8, learning_rate=1e-2,
                                         warmup_steps=0, n_layer=1, **more))[0] == 0
    plain, other = ([line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("plain", "other"))
    assert plain[-1] < plain[0] - 0.5 and other == pytest.approx(plain, abs=1e-4 if compiled else 0.05)


# ---- mistakes: one line that says what is wrong, exit code 2


@pytest.mark.parametrize("more, message", [
    (["--n_layers=3"], "did you mean --n_layer"), (["--n_layer=x"], "must be int"), (["--n_head=3"], "divisible by 2 * n_head=6"),
    (["--n_kv_head=4"], "n_head=2 must be divisible by n_kv_head=4"), (["--kv_shift=kq"], "none | kv | k | v | qkv"),
    (["--shift_window=1"], "at least 2"), (["--shift_window=17"], "at most block_size=16"), (["--dropout=1"], "below 1"),
    (["--dropout=nan"], "dropout=nan"), (["--learning_rate=nan"], "learning_rate=nan"), (["--learning_rate=-1"], "at least 0"),
    (["--optimizer=muon", "--dtype=float16"], "can't be trained in float16"),
    (["--batch_size=4", "--micro_batch_size=3"], "divisible by micro_batch_size=3"), (["--batch_size=0"], "at least 1"),
    (["--seed=-1"], "seed=-1"), (["--device=gpu"], "device=gpu"), (["--device=meta"], "device=meta"),
    (["--max_steps=0"], "max_steps=0"), (["--rope_base=inf"], "rope_base=inf"), (["--out_dir="], "not empty"),
    (["--learning_rate=1e-5"], "min_lr=0.0001 must not be above learning_rate=1e-05"),
    (["--device=cuda:99"], "can't be used here"),
    (["--dtype=float8"], "must be auto | float32"), (["--dataset=nowhere"], "no corpus 'nowhere'"),
    (["--block_size=6000"], "too few for a window"), (["--block_size=600"], "val.bin has 600 tokens"),
    (["--vocab_size=100"], "too small for the 256 ids"), (["--resume=yes"], "resume=yes, but there is no"),
    (["nowhere.py"], "no config file"), (["--compile"], "written --key=value"), (["--out_dir={file}"], "exists"),
])
def test_a_mistake_in_training_is_one_line(call, corpus, tmp_path, more, message):
    (tmp_path / "file").write_text("not a folder")
    more = [argument.format(file=tmp_path / "file") for argument in more]
    code, _, err = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / "out"), *more)
    assert code == 2 and message in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not (tmp_path / "out" / "log.jsonl").exists()


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path):
    """Turns over one bit in the middle of the file's largest run of data."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def edit(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize("damage, message", [
    (lambda c: (c / "meta.json").unlink(), "no meta.json there"),
    (lambda c: cut(c / "meta.json", 20), "meta.json is damaged"),
    (lambda c: edit(c / "meta.json", dtype="float99"), "meta.json is damaged"),
    (lambda c: edit(c / "meta.json", vocab_size=50), "token id"),
    (lambda c: edit(c / "meta.json", tokenizer={"kind": "x"}), "unknown tokenizer"),
    (lambda c: (c / "val.bin").unlink(), "val.bin is missing"),
    (lambda c: cut(c / "train.bin", 1001), "has 1,001 bytes, meta.json says 12,000"),
])
def test_a_damaged_corpus_is_one_line(call, corpus, tmp_path, damage, message):
    damage(corpus)
    code, _, err = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / "out"))
    assert code == 2 and message in err and err.count("\n") == 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("damage, message", [
    (lambda p: p.unlink(), "no checkpoint"), (lambda p: cut(p, 0), "is damaged"), (lambda p: cut(p, 500), "is damaged"),
    (lambda p: cut(p, p.stat().st_size - 10), "is damaged"), (flip, "does not match its checksum"),
    (lambda p: p.write_text("hello"), "is damaged or no checkpoint"),
    (lambda p: torch.save({"model": Evil()}, p), "no checkpoint of"),
    (lambda p: torch.save({"some": "dict"}, p), "no checkpoint of"), (lambda p: torch.save([1], p), "no checkpoint of"),
    (lambda p: torch.save({"format": 2}, p), "has format 2"),
])
def test_a_damaged_checkpoint_is_one_line_and_stays(call, corpus, tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path / "out")
    call(train.main, *arguments)
    for name, script, more in (("ckpt.pt", train.main, ["--resume=yes"]), ("best.pt", sample.main, [])):
        path = tmp_path / "out" / name
        damage(path)
        before = path.read_bytes() if path.exists() else None
        code, _, err = call(script, *(arguments if script is train.main else [f"--out_dir={tmp_path / 'out'}"]), *more)
        assert code == 2 and (message in err or not path.exists()) and err.count("\n") == 1
        assert before is None or path.read_bytes() == before
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("more, message", [
    (["--n_layer=3"], "n_layer was 2, is 3"), (["--learning_rate=1e-2"], "learning_rate was 0.001, is 0.01"),
    (["--max_steps=9"], "max_steps was 4, is 9"), (["--kv_shift=none", "--seed=2"], "seed was 1, is 2"),
    (["--dataset=other"], "dataset was"),
])
def test_another_run_in_the_same_folder_is_refused(call, corpus, tmp_path, more, message):
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path / "out")
    call(train.main, *arguments)
    corpus.rename(tmp_path / "other") if "--dataset=other" in more else None
    more = [argument.replace("=other", f"={tmp_path / 'other'}") for argument in more]
    code, _, err = call(train.main, *arguments, *more)
    assert code == 2 and "is of another run" in err and message in err and err.count("\n") == 1
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["run"]["step"] == 4


def test_a_corpus_prepared_anew_is_noticed_and_a_constant_rate_may_go_on(call, corpus, tmp_path):
    arguments = options(TINY, dataset=corpus, out_dir=tmp_path / "out", lr_schedule="constant")
    call(train.main, *arguments)
    assert call(train.main, *arguments, "--max_steps=6", "--eval_every=3", "--dtype=float16")[0] == 0
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["run"]["step"] == 6
    assert [line["config"]["max_steps"] for line in log_of(tmp_path / "out") if "config" in line] == [6]
    flip(corpus / "train.bin")
    code, _, err = call(train.main, *arguments, "--max_steps=8")
    assert code == 2 and "has changed since it was prepared" in err
    meta = json.loads((corpus / "meta.json").read_text())
    edit(corpus / "meta.json", sha256=meta["sha256"] | {"train": sha256((corpus / "train.bin").read_bytes()).hexdigest()})
    code, _, err = call(train.main, *arguments, "--max_steps=8")
    assert code == 2 and "have changed" in err


# ---- sampling


@pytest.fixture
def trained(call, corpus, tmp_path):
    call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / "out"))
    for path in corpus.iterdir():
        path.unlink()  # the tokenizer is in the checkpoint
    return tmp_path / "out"


def test_samples_are_streamed_batched_and_repeatable(call, trained, tmp_path):
    arguments = [f"--out_dir={trained}", "--prompt=def ", "--max_new_tokens=40", "--stop=False"]
    code, text, figures = call(sample.main, *arguments)
    assert code == 0 and text.startswith("def ") and "40 tokens in" in figures and "tokens/s" in figures
    assert call(sample.main, *arguments)[1] == text != call(sample.main, *arguments, "--seed=2")[1]
    (tmp_path / "prompt").write_bytes(b"def \xff\xfe")  # not UTF-8: bytes take it
    several = call(sample.main, f"--out_dir={trained}", f"--prompt_file={tmp_path / 'prompt'}", "--num_samples=3")
    assert several[0] == 0 and several[1].count("--- sample") == 3 and several[1].count("def ��") >= 3
    assert call(sample.main, f"--out_dir={trained}", "--max_new_tokens=0", "--checkpoint=ckpt.pt")[0] == 0


def test_characters_are_written_whole(capsys):
    text = "naïve € 😀!"
    tokens = (torch.tensor([byte]) for byte in text.encode())
    written = []

    class Recorder(io.StringIO):
        def write(self, part):
            written.append(part)

    out, sys.stdout = sys.stdout, Recorder()
    try:
        n_tokens = sample.write_stream(tokens, list("é".encode()[:1]), Tokenizer({"kind": "bytes"}), None)
    finally:
        sys.stdout = out
    assert n_tokens == len(text.encode())
    assert "".join(written) == "\ufffd" + text + "\n" and "😀" in written  # the prompt's half character does not stay


@pytest.mark.parametrize("more, message", [
    (["--out_dir=nowhere"], "no checkpoint nowhere"), (["--temperature=-1"], "temperature=-1"), (["--top_p=0"], "top_p=0"),
    (["--num_samples=0"], "num_samples=0"), (["--prompt=a", "--prompt_file=b"], "give one of them"),
    (["--prompt_file=nowhere"], "No such file or directory: nowhere"), (["--promt=a"], "did you mean --prompt"),
])
def test_a_mistake_in_sampling_is_one_line(call, trained, more, message):
    code, _, err = call(sample.main, f"--out_dir={trained}", *more)
    assert code == 2 and message in err and err.startswith("sample.py: ") and err.count("\n") == 1


def test_a_prompt_with_a_character_that_the_corpus_lacks_is_one_line(call, trained):
    checkpoint = load_checkpoint(trained / "best.pt")
    for prompt, message in (("aé", "character 'é' is not among the 2"), ("{file}", "not UTF-8")):
        torch.save(checkpoint | {"tokenizer": {"kind": "char", "chars": "ab"}}, trained / "best.pt")
        (trained / "prompt").write_bytes(b"\xff")
        argument = f"--prompt_file={trained / 'prompt'}" if prompt == "{file}" else f"--prompt={prompt}"
        code, _, err = call(sample.main, f"--out_dir={trained}", argument)
        assert code == 2 and message in err and err.count("\n") == 1


def test_errors_in_the_program_keep_their_traceback(call, monkeypatch):
    monkeypatch.setattr(train, "parse", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(train.main)


def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(call, trained):
    checkpoint = load_checkpoint(trained / "best.pt")
    for wrong in ({"n_embd": 32}, {"kv_shift": "none"}, {"n_layer": 3}):
        torch.save(checkpoint | {"config": checkpoint["config"] | wrong}, trained / "best.pt")
        code, _, err = call(sample.main, f"--out_dir={trained}")
        assert code == 2 and "do not fit" in err and err.count("\n") == 1


def test_the_commands_of_the_readme_work_from_another_folder(tmp_path, corpus):
    def python(*arguments):
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True)

    done = python(ROOT / "train.py", ROOT / "config" / "quickstart.py", *options(TINY, dataset=corpus, out_dir="my out é"))
    assert done.returncode == 0 and not done.stderr
    assert "step 4/4 | loss" in done.stdout and "best val loss" in done.stdout and "--out_dir=my out é" in done.stdout
    done = python(ROOT / "sample.py", "--out_dir=my out é", "--max_new_tokens=20")
    assert done.returncode == 0 and "tokens/s" in done.stderr
    assert python(ROOT / "data/text/prepare.py", "--help").returncode == 0
    done = python(ROOT / "train.py", "--n_layers=3")
    assert done.returncode == 2 and done.stderr == "train.py: unknown option 'n_layers'; did you mean --n_layer=...?\n"


def test_a_reader_that_goes_away_is_no_error(trained):
    command = f"'{sys.executable}' '{ROOT / 'sample.py'}' --out_dir='{trained}' --max_new_tokens=3000 --stop=False | head -c 20"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True)
    assert len(done.stdout) == 20 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_training_learns(call, corpus, tmp_path):
    call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path, max_steps=150, learning_rate=1e-2, warmup_steps=10,
                              n_embd=32, eval_every=50, batch_size=8, log_every=50))
    losses = [line["val_loss"] for line in log_of(tmp_path)[1:] if "val_loss" in line]
    assert losses[-1] < 1.5 < 4 < losses[0]
    model = load_model(load_checkpoint(tmp_path / "best.pt"), "cpu")
    assert isinstance(model.config, GPTConfig) and not model.training
