"""Whatever is broken, full, empty, strange or too large: one line that says so and exit code 2, or a sane run; and nothing
that was there is lost."""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, defaults, options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_storm import assert_same_run, train_in_child

import data
import sample
import train
from checkpoint import load_checkpoint
from config import UserError, parse, run
from data import Corpus, CorpusWriter, Tokenizer, tokenizing
from data.text import prepare as prepare_text
from sample import SampleConfig
from train import TrainConfig

RUN = TINY | {"lr_schedule": "constant", "n_layer": 1}  # a constant learning rate may go on to more steps


def contents(folder) -> dict:
    """Every file in a folder, and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line(result, message: str = ""):
    code, _, err = result
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err, err


def make_corpus(folder, train_text: bytes, val_text: bytes, **spec) -> Path:
    tokenizer = Tokenizer({"kind": "bytes"} | spec)
    with CorpusWriter(folder, tokenizer, source="test") as writer:
        writer.write("train", tokenizer.encode(train_text))
        writer.write("val", tokenizer.encode(val_text))
    return folder


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a corpus and a run that is complete; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    make_corpus(folder / "corpus", b"to be or not to be " * 300, b"that is the question " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *options(RUN, dataset=folder / "corpus", out_dir=folder / "out")])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit, match="0"):
            train.main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return folder


def directory_at(raw: bytes) -> int:
    """Where a zip archive's list of members starts: truncation before and in it are two kinds of damage."""
    return raw.index(b"PK\x01\x02")


def keep(where):
    """Truncates a file to where(its bytes) bytes."""
    return lambda path: path.write_bytes(path.read_bytes()[: where(path.read_bytes())])


def flip(where):
    """Turns over one bit of the byte at where(its bytes)."""

    def damage(path):
        raw = bytearray(path.read_bytes())
        raw[where(raw)] ^= 8
        path.write_bytes(raw)

    return damage


def change(**more):
    """Another value of some of a checkpoint's parts, in a file that is whole."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        torch.save(checkpoint | {key: value(checkpoint[key]) if callable(value) else value for key, value in more.items()}, path)

    return damage


def weight(make):
    """Another tensor in the place of the model's first."""
    return change(model=lambda model: model | {"embed.weight": make(model["embed.weight"].clone())})


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


class EvilEval:
    def __reduce__(self):
        return eval, ("open('evil', 'w')",)


def mark_as_folder(path):
    raw = path.read_bytes()
    member = raw.rindex(b"PK\x01\x02", 0, raw.rindex(b"/data/0"))  # its entry in the directory
    path.write_bytes(raw[: member + 38] + bytes([raw[member + 38] | 16]) + raw[member + 39 :])


def zip_of(members: dict):
    def damage(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)

    return damage


def with_pickle(make):
    """A real checkpoint, its data.pkl replaced."""

    def damage(path):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        zip_of({name: make(raw) if name.endswith("data.pkl") else raw for name, raw in members.items()})(path)

    return damage


def in_place_of_a_file(path):
    path.unlink()
    path.mkdir()


def filled(x, value):
    x[0, 0] = value
    return x


DAMAGED = CODE = "is damaged or no checkpoint"
CHECKPOINTS = {
    "cut to nothing": (keep(lambda raw: 0), DAMAGED),
    "cut to a byte": (keep(lambda raw: 1), DAMAGED),
    "cut in the first header": (keep(lambda raw: 20), DAMAGED),
    "cut in the pickle": (keep(lambda raw: 700), DAMAGED),
    "cut in a tensor": (keep(lambda raw: len(raw) // 2), DAMAGED),
    "cut before the directory": (keep(directory_at), DAMAGED),
    "cut in the directory": (keep(lambda raw: directory_at(raw) + 90), DAMAGED),
    "cut before the end record": (keep(lambda raw: len(raw) - 22), DAMAGED),
    "cut by a byte": (keep(lambda raw: len(raw) - 1), DAMAGED),
    "a bit in the first header": (flip(lambda raw: 1), ""),
    "a bit in a member's name": (flip(lambda raw: 32), ""),
    "a bit in the pickle": (flip(lambda raw: 300), "does not match its checksum"),
    "a bit in a tensor": (flip(lambda raw: len(raw) // 2), "does not match its checksum"),
    "a bit in the directory": (flip(directory_at), ""),
    "a bit that makes a tensor a folder": (  # of which torch would return memory that nobody has written
        mark_as_folder, "is marked as a folder"),
    "a bit in a checksum": (flip(lambda raw: directory_at(raw) + 17), "does not match its checksum"),
    "a bit in a compression method": (flip(lambda raw: directory_at(raw) + 10), DAMAGED),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), DAMAGED),
    "zeros from the middle on": (lambda p: p.write_bytes(p.read_bytes()[:9000] + bytes(p.stat().st_size - 9000)), DAMAGED),
    "random bytes": (lambda path: path.write_bytes(np.random.RandomState(0).bytes(9000)), DAMAGED),
    "text": (lambda path: path.write_text("not a checkpoint\n"), DAMAGED),
    "a folder": (in_place_of_a_file, "Is a directory"),
    "an empty archive": (zip_of({}), DAMAGED),
    "another archive": (zip_of({"a.txt": b"hello"}), DAMAGED),
    "an archive with an empty pickle": (with_pickle(lambda raw: b""), DAMAGED),
    "an archive with half a pickle": (with_pickle(lambda raw: raw[:400]), DAMAGED),
    "an archive without tensors": (with_pickle(lambda raw: pickle.dumps({"format": 1})), DAMAGED),
    "code in a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), CODE),
    "code in torch's older format": (lambda p: torch.save(Evil(), p, _use_new_zipfile_serialization=False), CODE),
    "code in an archive": (lambda path: torch.save(Evil(), path), CODE),
    "code deep in an archive": (lambda path: torch.save({"format": 1, "model": {"embed.weight": [EvilEval()]}}, path), CODE),
    "code in a real checkpoint": (change(run=Evil()), CODE),
    "code in a real checkpoint's pickle": (with_pickle(lambda raw: pickle.dumps(EvilEval(), protocol=2)), CODE),
    "code beside the tensors": (change(extra=EvilEval()), CODE),
    "a whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), CODE),
    "torch's older format": (lambda path: torch.save({"format": 1}, path, _use_new_zipfile_serialization=False), DAMAGED),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), DAMAGED),
    "an empty dict": (lambda path: torch.save({}, path), DAMAGED),
    "another version": (change(format=2), "has format 2, this version reads format 1"),
    "no version": (change(format=None), "has format None"),
    "weights that are a list": (change(model=[1, 2]), DAMAGED),
    "weights that are text": (change(model={"embed.weight": "hello"}), DAMAGED),
    "no config": (change(config=None), DAMAGED),
    "no state of the run": (change(run=7), DAMAGED),
    "a weight that is NaN": (weight(lambda w: filled(w, torch.nan)), "has weights that are not finite"),
    "a weight that is infinite": (weight(lambda w: filled(w, -torch.inf)), "has weights that are not finite"),
    "another size of model": (change(config=lambda c: c | {"n_embd": 32}), ""),
    "another number of blocks": (change(config=lambda c: c | {"n_layer": 2}), ""),
    "a config of other types": (change(config=lambda c: c | {"n_embd": "16"}), ""),
    "a weight of another shape": (weight(lambda w: w[:7]), ""),
    "a weight too few": (change(model=lambda m: {name: w for name, w in m.items() if name != "norm.weight"}), ""),
    "a weight too many": (change(model=lambda m: m | {"norm.bias": torch.zeros(16)}), ""),
}
TOKENIZERS = {  # which best.pt alone needs
    "an unknown tokenizer": (change(tokenizer={"kind": "words"}), "unknown tokenizer"),
    "no characters": (change(tokenizer={"kind": "char"}), "unknown tokenizer"),
    "characters that are no text": (change(tokenizer={"kind": "char", "chars": 7}), "unknown tokenizer"),
}
OPTIMIZERS = {  # of ckpt.pt alone
    "a copy of best.pt": (lambda path: shutil.copy(path.with_name("best.pt"), path), "has no optimizer"),
    "an empty optimizer": (change(optimizer={}), "does not fit the model"),
    "an optimizer that is text": (change(optimizer="hello"), "does not fit the model"),
    "an optimizer of other weights": (change(optimizer=lambda o: o | {"state": {"x": 1}}), "does not fit the model"),
}


@pytest.mark.parametrize("name, script, damage, message", [
    *[(name, script, *case) for name, case in CHECKPOINTS.items() for script in ("train", "sample")],
    *[(name, "train", *case) for name, case in OPTIMIZERS.items()],
    *[(name, "sample", *case) for name, case in TOKENIZERS.items()]])
def test_an_unreadable_checkpoint_is_one_line_and_stays(call, finished, tmp_path, monkeypatch, name, script, damage, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    damage(out / ("ckpt.pt" if script == "train" else "best.pt"))
    before = contents(tmp_path)
    if script == "train":
        assert_one_line(call(train.main, *options(RUN, dataset=finished / "corpus", out_dir=out, max_steps=9)), message)
    else:
        assert_one_line(call(sample.main, f"--out_dir={out}", "--max_new_tokens=5"), message)
    assert contents(tmp_path) == before


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flips(finished, tmp_path, places):
    """Turns over one bit at each of `places` in turn -> how many of them were noticed; the others changed nothing."""
    whole, path, noticed = (finished / "out" / "best.pt").read_bytes(), tmp_path / "flipped.pt", 0
    model = load_checkpoint(finished / "out" / "best.pt")["model"]
    for place, bit in places:
        raw = bytearray(whole)
        raw[place] ^= 1 << bit
        path.write_bytes(raw)
        try:
            assert same_tensors(load_checkpoint(path)["model"], model), (place, bit)
        except UserError:
            noticed += 1
    return noticed


def test_a_bit_turned_over_is_noticed_or_changes_nothing(finished, tmp_path):
    raw = (finished / "out" / "best.pt").read_bytes()
    start = directory_at(raw)
    random = np.random.RandomState(0)
    places = np.concatenate([random.randint(len(raw), size=60), random.randint(start, len(raw), size=60)]).tolist()
    places = [(place, int(random.randint(8))) for place in places]
    assert flips(finished, tmp_path, places) > 60


@pytest.mark.slow
def test_each_bit_of_an_archives_directory_turned_over(finished, tmp_path):
    raw = (finished / "out" / "best.pt").read_bytes()
    places = [(at, bit) for at in (*range(200), *range(directory_at(raw), len(raw))) for bit in range(8)]
    assert flips(finished, tmp_path, places) > len(places) // 3


# ---- damaged corpora


def meta(**more):
    """Other values in meta.json; None takes one out."""

    def damage(folder):
        values = json.loads((folder / "meta.json").read_text()) | more
        (folder / "meta.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def tokens(split, edit, honest=True):
    """Other tokens, and a meta.json that fits them (honest) or is still that of the old ones."""

    def damage(folder):
        ids = edit(np.fromfile(folder / f"{split}.bin", "<u2"))
        ids.tofile(folder / f"{split}.bin")
        if honest:
            old = json.loads((folder / "meta.json").read_text())
            meta(tokens=old["tokens"] | {split: len(ids)},
                 sha256=old["sha256"] | {split: hashlib.sha256(ids.tobytes()).hexdigest()})(folder)

    return damage


def put(ids, place, value):
    ids[place] = value
    return ids


def raw_meta(raw: bytes):
    return lambda folder: (folder / "meta.json").write_bytes(raw)


def append(split, raw: bytes):
    return lambda folder: (folder / f"{split}.bin").write_bytes((folder / f"{split}.bin").read_bytes() + raw)


def replaced_by_a_folder(name):
    return lambda folder: in_place_of_a_file(folder / name)


BAD_META = "meta.json is damaged"
CORPORA = {
    "an odd number of bytes": (append("train", b"x"), "bytes, meta.json says"),
    "a token more": (append("val", b"xy"), "bytes, meta.json says"),
    "a token less": (tokens("train", lambda ids: ids[:-1], honest=False), "bytes, meta.json says"),
    "an empty file": (tokens("train", lambda ids: ids[:0], honest=False), "bytes, meta.json says"),
    "no tokens": (tokens("train", lambda ids: ids[:0]), "too few for a window"),
    "no tokens to validate": (tokens("val", lambda ids: ids[:0]), "too few for a window"),
    "an id beyond the vocabulary": (tokens("train", lambda ids: put(ids, 3000, 256)), "train.bin has token id 256"),
    "a first id beyond": (tokens("train", lambda ids: put(ids, 0, 65535)), "token id 65535"),
    "a last id beyond": (tokens("train", lambda ids: put(ids, -1, 300)), "token id 300"),
    "an id beyond in val": (tokens("val", lambda ids: put(ids, -1, 256)), "val.bin has token id 256"),
    "ids of a larger vocabulary": (tokens("train", lambda ids: ids + 1000), "token id 1"),
    "bytes the wrong way round": (tokens("train", lambda ids: ids.byteswap()), "token id"),
    "another id": (tokens("train", lambda ids: put(ids, 50, 1), honest=False), "train.bin has changed"),
    "another id in val": (tokens("val", lambda ids: put(ids, -1, 1), honest=False), "val.bin has changed"),
    "zeros": (tokens("train", lambda ids: ids * 0, honest=False), "train.bin has changed"),
    "no train.bin": (lambda folder: (folder / "train.bin").unlink(), "train.bin is missing"),
    "no val.bin": (lambda folder: (folder / "val.bin").unlink(), "val.bin is missing"),
    "a folder for train.bin": (replaced_by_a_folder("train.bin"), "train.bin is missing"),
    "a folder for meta.json": (replaced_by_a_folder("meta.json"), "Is a directory"),
    "no meta.json": (lambda folder: (folder / "meta.json").unlink(), "no meta.json there"),
    "an empty meta.json": (raw_meta(b""), BAD_META),
    "half a meta.json": (lambda folder: keep(lambda raw: len(raw) // 2)(folder / "meta.json"), BAD_META),
    "zeros for meta.json": (raw_meta(bytes(300)), BAD_META),
    "no UTF-8 in meta.json": (raw_meta(b"{\"\xff\": 1}"), BAD_META),
    "a list in meta.json": (raw_meta(b"[1, 2]"), BAD_META),
    "null in meta.json": (raw_meta(b"null"), BAD_META),
    "no vocabulary": (meta(vocab_size=None), BAD_META),
    "a vocabulary of 0": (meta(vocab_size=0), BAD_META),
    "a vocabulary of -1": (meta(vocab_size=-1), BAD_META),
    "a vocabulary in words": (meta(vocab_size="256"), BAD_META),
    "a vocabulary of 256.0": (meta(vocab_size=256.0), BAD_META),
    "a vocabulary that is True": (meta(vocab_size=True), BAD_META),
    "a vocabulary too small": (meta(vocab_size=100), "token id"),
    "a vocabulary that no file holds": (meta(vocab_size=10**12), BAD_META),
    "no dtype": (meta(dtype=None), BAD_META),
    "a dtype of floats": (meta(dtype="float16"), BAD_META),
    "a dtype with a sign": (meta(dtype="int16"), BAD_META),
    "a dtype of objects": (meta(dtype="O"), BAD_META),
    "a wider dtype": (meta(dtype="uint32"), "bytes, meta.json says"),
    "no counts": (meta(tokens=None), BAD_META),
    "a count of one split": (meta(tokens={"train": 5700}), BAD_META),
    "a negative count": (meta(tokens={"train": -1, "val": 630}), "bytes, meta.json says"),
    "a count in words": (meta(tokens={"train": "many", "val": 630}), BAD_META),
    "counts in the wrong place": (meta(tokens={"train": 630, "val": 5700}), "bytes, meta.json says"),
    "no hashes": (meta(sha256=None), BAD_META),
    "a hash of one split": (meta(sha256={"train": "0" * 64}), BAD_META),
    "other hashes": (meta(sha256={"train": "0" * 64, "val": "0" * 64}), "has changed"),
    "no tokenizer": (meta(tokenizer=None), BAD_META),
    "a tokenizer without a kind": (meta(tokenizer={}), BAD_META),
    "an unknown tokenizer": (meta(tokenizer={"kind": "words"}), BAD_META),
    "a tokenizer in a word": (meta(tokenizer="bytes"), BAD_META),
    "characters that are missing": (meta(tokenizer={"kind": "char"}), BAD_META),
    "characters too few": (meta(tokenizer={"kind": "char", "chars": "abc"}), BAD_META),
}


@pytest.mark.parametrize("damage, message", CORPORA.values(), ids=CORPORA.keys())
def test_a_corpus_that_cannot_be_right_is_one_line_before_training(call, finished, tmp_path, damage, message):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "corpus")
    before = contents(tmp_path)
    result = call(train.main, *options(RUN, dataset=tmp_path / "corpus", out_dir=tmp_path / "out", resume="no"))
    assert_one_line(result, message)
    assert "step" not in result[1] and contents(tmp_path) == before


def test_of_a_large_corpus_the_beginning_is_read_through_and_the_rest_batch_by_batch(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "corpus", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(data, "CHECKED", 1000)
    tokens("train", lambda ids: put(ids, 5000, 300))(tmp_path)
    with pytest.raises(UserError, match="token id 300"):
        Corpus(tmp_path).windows("train", [4990], 16)
    monkeypatch.setattr(data, "CHECKED", 20_000)
    with pytest.raises(UserError, match="token id 300"):
        Corpus(tmp_path)


@pytest.mark.parametrize("damage", [
    b"\0" * 40, b"\xff\xfe not UTF-8\n", b"12\n", b"[1]\n", b"null\n", b'{"step": "nine"}\n', b'{"step": 5, "lo', b"\n\n"])
def test_a_log_with_damaged_lines_is_gone_on_with(call, finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "out" / "log.jsonl"
    good = log.read_bytes()
    log.write_bytes(good + damage)
    good = good.splitlines()[1:]  # behind the config, which is the new one
    assert call(train.main, *options(RUN, dataset=finished / "corpus", out_dir=tmp_path / "out", max_steps=6))[0] == 0
    assert log.read_bytes().splitlines()[1 : 1 + len(good)] == good
    assert [json.loads(line)["step"] for line in log.read_bytes().splitlines()[1:]] == [0, 1, 2, 3, 4, 5, 6]


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(call, finished, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(Path(new).name), replace(old, new)))
    arguments = options(RUN, dataset=finished / "corpus", out_dir=tmp_path, checkpoint_every=1, eval_every=1000)
    assert call(train.main, *arguments)[0] == 0
    log = (tmp_path / "log.jsonl").stat().st_ino
    assert [what for what in done if what in (log, "ckpt.pt")] == [log] + [log, "ckpt.pt"] * 4  # the first: its header


# ---- numbers


@pytest.mark.parametrize("more", [
    {"learning_rate": 1e6}, {"learning_rate": 1e6, "dtype": "float16"}, {"learning_rate": 1e6, "dtype": "bfloat16"},
    {"learning_rate": 1e6, "grad_clip": 0}, {"learning_rate": 4e9, "weight_decay": 4e9},
    {"learning_rate": 4e9, "weight_decay": 4e9, "dtype": "float16"}, {"learning_rate": 1.0, "dtype": "float16", "grad_clip": 0},
    {"grad_clip": 1e-30}, {"beta1": 0, "beta2": 0, "learning_rate": 100}, {"weight_decay": 2000}, {"dropout": 0.999999}])
@pytest.mark.parametrize("eval_every", [1, 1000])
def test_numbers_that_blow_up_stop_the_run_or_stay_finite(call, finished, tmp_path, more, eval_every):
    values = RUN | {"max_steps": 30, "warmup_steps": 0, "checkpoint_every": 1, "eval_every": eval_every} | more
    result = call(train.main, *options(values, dataset=finished / "corpus", out_dir=tmp_path))
    if result[0]:
        assert_one_line(result, "checkpoints are left as they were")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = load_checkpoint(tmp_path / "best.pt")["run"]
    assert best["best"] == min(losses.values()) == losses[best["step"]]
    if (tmp_path / "ckpt.pt").exists():  # load_checkpoint refuses weights that are not finite
        assert load_checkpoint(tmp_path / "ckpt.pt")["run"]["step"] == lines[-1].get("step", 0)
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_is_too_large_is_not_saved(call, finished, tmp_path):
    arguments = options(RUN, dataset=finished / "corpus", out_dir=tmp_path, max_steps=9, checkpoint_every=1, eval_every=1000)
    assert call(train.main, *arguments, "--max_steps=2")[0] == 0
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda step, config: 1e39)  # the loss before this step is finite, and no
        assert_one_line(call(train.main, *arguments), "the weights are no longer finite after step 3")  # evaluation follows
    assert {name: raw for name, raw in contents(tmp_path).items() if name.suffix == ".pt"} \
        == {name: raw for name, raw in before.items() if name.suffix == ".pt"}
    assert call(train.main, *arguments)[0] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_an_optimizer_gone_wrong_stops_the_run(call, finished, tmp_path, value):
    shutil.copytree(finished / "out", tmp_path, dirs_exist_ok=True)
    change(optimizer=lambda o: o | {"state": {name: s | {"exp_avg": s["exp_avg"] * 0 + value} for name, s in o["state"].items()}}
           )(tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    arguments = options(RUN, dataset=finished / "corpus", out_dir=tmp_path, max_steps=20, checkpoint_every=1)
    assert_one_line(call(train.main, *arguments), "checkpoints are left as they were")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_best_is_the_best_also_where_a_killed_run_was_ahead_of_its_checkpoint(call, finished, tmp_path, monkeypatch):
    arguments = options(RUN, dataset=finished / "corpus", out_dir=tmp_path, checkpoint_every=2, max_steps=6)
    losses, seed = iter([5.0, 3.0]), train.dropout_seed
    monkeypatch.setattr(train, "evaluate", lambda *more: next(losses))
    monkeypatch.setattr(train, "dropout_seed", lambda run_seed, step, rank: seed(run_seed, step, rank) if step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(train.main, *arguments, "--eval_every=3")
    assert [load_checkpoint(tmp_path / name)["run"]["step"] for name in ("best.pt", "ckpt.pt")] == [3, 2]
    monkeypatch.setattr(train, "dropout_seed", seed)
    monkeypatch.setattr(train, "evaluate", lambda *more: 4.0)
    assert "best val loss 3.0000 at step 3" in call(train.main, *arguments, "--eval_every=4")[1]
    assert load_checkpoint(tmp_path / "best.pt")["run"]["best"] == 3.0


# ---- edges


EDGES = {
    "a context of 1": {"block_size": 1},
    "a context of 2": {"block_size": 2},
    "one head": {"n_head": 1},
    "one KV head": {"n_head": 4, "n_kv_head": 1},
    "the smallest heads": {"n_head": 8},
    "a window as long as the context": {"shift_window": 16},
    "a window, a gate and one KV head": {"shift_window": 16, "shift_weights": "gate", "n_kv_head": 1, "kv_shift": "qkv"},
    "a context of 1 with a gate": {"block_size": 1, "shift_weights": "gate", "kv_shift": "qkv"},
    "the smallest model": {"n_layer": 1, "n_head": 1, "n_embd": 2, "ffn_size": 1, "block_size": 1, "batch_size": 1},
    "a batch larger than the corpus": {"batch_size": 1000, "max_steps": 2},
    "a batch larger than the corpus, in parts": {"batch_size": 1000, "max_steps": 2, "micro_batch_size": 8},
    "one step": {"max_steps": 1},
    "a longer warm-up than run": {"warmup_steps": 1000},
    "a learning rate of 0": {"learning_rate": 0, "min_lr": 0},
    "the whole of val": {"eval_tokens": 0},
    "a single token to evaluate on": {"eval_tokens": 1},
    "one window of val": {"block_size": 629},
    "one window of training": {"block_size": 5699, "val_text": 7000, "batch_size": 1, "max_steps": 2},
    "more ids than texts have": {"vocab_size": 5000, "max_steps": 1},
    "the largest seed": {"seed": 2**32 - 1},
    "a vocabulary of 1": {"chars": "a"},
    "a vocabulary of 2": {"chars": "ab"},
    "one byte again and again": {"repeat": True, "max_steps": 30, "learning_rate": 1.0},
    "rare lines": {"log_every": 10**9, "eval_every": 10**9, "checkpoint_every": 10**9},
}


@pytest.mark.parametrize("values", EDGES.values(), ids=EDGES.keys())
def test_edges_train_go_on_and_sample(call, tmp_path, values):
    values = dict(values)
    chars, length = values.pop("chars", ""), values.pop("val_text", 630)
    text = chars.encode() * 3000 if chars else b"x" * 9000 if values.pop("repeat", False) else b"to be or not to be " * 300
    make_corpus(tmp_path / "corpus", text[:5700], (text * 2)[:length], **({"kind": "char", "chars": chars} if chars else {}))
    arguments = options(RUN | values, dataset=tmp_path / "corpus", out_dir=tmp_path / "out")
    steps = (RUN | values)["max_steps"]
    for max_steps in (steps, steps + 1):
        code, out, err = call(train.main, *arguments, f"--max_steps={max_steps}")
        assert (code, err) == (0, "") and f"step {max_steps}/{max_steps} | loss" in out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["run"]["step"] == steps + 1
    prompt = "a" if chars else "to be"
    for more in ([], ["--max_new_tokens=0"], ["--num_samples=2"], [f"--prompt={prompt}"], [f"--prompt={prompt * 30}"]):
        code, out, err = call(sample.main, f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=7", "--stop=False", *more)
        assert code == 0 and "tokens/s" in err and out.endswith("\n")


@pytest.mark.parametrize("values, message", [
    ({"block_size": 5700}, "train.bin has 5,700 tokens, too few"), ({"block_size": 630}, "val.bin has 630 tokens, too few"),
    ({"batch_size": 10**30}, "batch_size="), ({"n_embd": 10**30}, "n_embd="), ({"n_layer": 2**32}, "n_layer="),
    ({"block_size": 10**12}, "block_size="), ({"checkpoint_every": 10**30}, "checkpoint_every="),
    ({"n_embd": 2**21, "ffn_size": 1}, "memory"), ({"vocab_size": 2**31, "n_embd": 2**12}, "memory"),
])
def test_edges_too_far_are_one_line(call, finished, tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(train.main, *options(RUN | {"dataset": finished / "corpus", "out_dir": "out"} | values)), message)


TEXTS = {
    "nothing": b"", "a byte": b"x", "a null byte": b"\0", "characters": "naïve € 😀".encode(), "no UTF-8": b"\xff\xfe\x80",
    "half a character": "😀".encode()[:2], "Windows line ends": b"to be\r\nor not\r\n", "a mark at the start": b"\xef\xbb\xbfx",
    "a long text": b"to be " * 500, "a surrogate": b"\xed\xa0\x80",
}


@pytest.mark.parametrize("raw", TEXTS.values(), ids=TEXTS.keys())
def test_any_prompt_is_gone_on_with(call, finished, tmp_path, raw):
    path = tmp_path / "a prompt é"
    path.write_bytes(raw)
    arguments = [f"--out_dir={finished / 'out'}", "--max_new_tokens=5", "--stop=False", "--temperature=0"]
    code, text, err = call(sample.main, *arguments, f"--prompt_file={path}")
    assert code == 0 and "5 tokens" in err and text.startswith(raw.decode("utf-8", "replace").rstrip("\ufffd"))
    assert call(sample.main, *arguments, f"--prompt={os.fsdecode(raw)}")[1] == text  # as a command line gives it


@pytest.mark.parametrize("raw", [raw for raw in TEXTS.values() if len(raw) > 5], ids=lambda raw: repr(raw[:9]))
def test_any_text_is_a_corpus_of_bytes(call, tmp_path, monkeypatch, raw):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    for module in (prepare_text, sys.modules["data.tokenizing"]):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "a text é.txt").write_bytes(raw)
    assert call(prepare_text.main, tmp_path / "a text é.txt", "--val_fraction=0.3")[0] == 0
    ids = [np.fromfile(tmp_path / "mytext" / f"{split}.bin", "<u2").astype(np.uint8).tobytes() for split in ("train", "val")]
    assert b"".join(ids) == raw + b"\0"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp1252"])
def test_a_folder_of_any_name_and_any_text_can_be_shown(forks, finished, tmp_path, encoding):
    out_dir = os.fsdecode(os.fsencode(tmp_path) + "/é 😀 ".encode() + b"\xff")  # the last byte is no UTF-8
    output = tmp_path / "output"
    process = forks.Process(target=train_in_child, args=(
        options(RUN, dataset=finished / "corpus", out_dir=out_dir), output, write_to, output, encoding))
    process.start()
    process.join()
    assert process.exitcode == 0 and b"Traceback" not in output.read_bytes()
    assert b"more of it: python sample.py" in output.read_bytes()
    assert load_checkpoint(Path(out_dir) / "ckpt.pt")["run"]["step"] == 4


def write_to(path, encoding=None):
    sys.stdout = open(path, "w", encoding=encoding) if path else None


@pytest.mark.parametrize("path", ["/dev/full", None])
@pytest.mark.parametrize("mistake", [[], ["--n_layer=x"], ["--help"]])
def test_output_that_nobody_can_take_is_no_traceback(forks, finished, tmp_path, path, mistake):
    """A full disk, or no standard output at all."""
    arguments = options(RUN, dataset=finished / "corpus", out_dir=tmp_path / "out", max_steps=1) + mistake
    process = forks.Process(target=train_in_child, args=(arguments, tmp_path / "output", write_to, path))
    process.start()
    process.join()
    err = (tmp_path / "output").read_text()
    if mistake == ["--n_layer=x"] or path and not mistake:
        assert_one_line((process.exitcode, "", err), "must be int" if mistake else "No space left on device")
    else:
        assert "Traceback" not in err and (process.exitcode == 0 or path)


# ---- disks


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
@pytest.mark.parametrize("name", ["new", "old"])
def test_a_folder_without_permission_is_one_line(call, forks, finished, name):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can be entered by its user alone
        shutil.copytree(finished / "corpus", f"{folder}/corpus")
        arguments = options(RUN, dataset=f"{folder}/corpus", out_dir=f"{folder}/{name}", max_steps=9)
        assert call(train.main, *options(RUN, dataset=f"{folder}/corpus", out_dir=f"{folder}/old"))[0] == 0
        open(f"{folder}/output", "w").close()
        os.chmod(f"{folder}/output", 0o666)
        for path in (f"{folder}/old", folder):
            os.chmod(path, 0o555)
        before = contents(Path(folder))
        process = forks.Process(target=train_in_child, args=(arguments, f"{folder}/output", become_nobody))
        process.start()
        process.join()
        assert_one_line((process.exitcode, "", Path(folder, "output").read_text().splitlines(True)[-1]), "Permission denied: ")
        before.pop(Path("output"))
        assert {path: raw for path, raw in contents(Path(folder)).items() if path.name != "output"} == before
        os.chmod(f"{folder}/old", 0o755)
        os.chmod(folder, 0o755)


def become_nobody():
    torch.save({}, buffer := io.BytesIO())
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # imports, as nobody may not be allowed to read torch's folder
    if os.geteuid() == 0:  # to whom all is permitted
        os.seteuid(65534)


def call_here(main, *arguments):
    """What the fixture `call` does, in a process that is to end."""
    sys.argv = [sys.modules[main.__module__].__file__, *map(str, arguments)]
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out, err.getvalue()


DISK = RUN | {"max_steps": 40, "checkpoint_every": 5, "eval_every": 5, "n_layer": 2}


def in_child(forks, tmp_path, target, *arguments):
    process = forks.Process(target=say_what_failed, args=(tmp_path / "output", target, *arguments))
    process.start()
    process.join()
    if process.exitcode == CANNOT_MOUNT:
        pytest.skip("this system lets us mount nothing")
    assert process.exitcode == 0, (tmp_path / "output").read_text()


CANNOT_MOUNT = 77


def say_what_failed(output, target, *arguments):
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except Exception:
        Path(output).write_text(traceback.format_exc())
        raise


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such limit")
def test_a_checkpoint_too_large_for_the_disk_leaves_the_last_one(call, forks, finished, tmp_path):
    assert call(train.main, *options(DISK, dataset=finished / "corpus", out_dir=tmp_path / "undisturbed"))[0] == 0
    in_child(forks, tmp_path, files_of_limited_size, finished, tmp_path)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "limited", 40)


def files_of_limited_size(finished, folder):
    """The disk ends a file at some size: in the pickle, in a tensor, in the archive's directory, in the log."""
    import resource  # which Windows lacks

    arguments = options(DISK, dataset=finished / "corpus", out_dir=folder / "limited")
    assert call_here(train.main, *arguments, "--max_steps=10")[0] == 0
    before = {name: raw for name, raw in contents(folder / "limited").items() if name.suffix == ".pt"}
    size = (folder / "limited" / "ckpt.pt").stat().st_size
    log = (folder / "limited" / "log.jsonl").stat().st_size
    for limit in (0, 100, log - 1, log + 10, *range(log + 1500, size, size // 40), size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        result = call_here(train.main, *arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert_one_line(result, "File too large")
        after = contents(folder / "limited")
        assert after[Path("ckpt.pt")] == before[Path("ckpt.pt")] and not list((folder / "limited").glob(".*"))
        load_checkpoint(folder / "limited" / "best.pt")
    assert call_here(train.main, *arguments)[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts are made with Linux's calls")
def test_a_full_disk_stops_a_run_and_a_corpus_and_loses_nothing(call, forks, finished, tmp_path):
    assert call(train.main, *options(DISK, dataset=finished / "corpus", out_dir=tmp_path / "undisturbed"))[0] == 0
    (tmp_path / "disk").mkdir()
    in_child(forks, tmp_path, on_a_small_disk, finished, tmp_path, tmp_path / "disk")


def mount_small_disk(folder, size: int):
    """Mounts a file system of `size` bytes that this process alone sees; returns a function that makes it read-only."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    new_mounts, new_user, remount, read_only = 0x20000, 0x10000000, 32, 1
    if libc.unshare(new_mounts | new_user):
        os._exit(CANNOT_MOUNT)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    except OSError:
        os._exit(CANNOT_MOUNT)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(CANNOT_MOUNT)
    return lambda: libc.mount(b"none", os.fsencode(folder), b"tmpfs", remount | read_only, None)


def leave(disk, free: int):
    """Fills the disk but for `free` bytes."""
    (disk / "filler").unlink(missing_ok=True)
    with open(disk / "filler", "wb") as f:
        f.write(bytes(shutil.disk_usage(disk).free - free))


def on_a_small_disk(finished, folder, disk):
    make_read_only = mount_small_disk(disk, 8 << 20)
    out_dir = disk / "out"
    arguments = options(DISK, dataset=finished / "corpus", out_dir=out_dir)
    leave(disk, 0)
    assert_one_line(call_here(train.main, *arguments), "No space left on device")
    for free in range(4096, 1 << 20, 3 * 4096):  # it ends in best.pt, in the first ckpt.pt, in the next, which needs both
        leave(disk, free)
        result = call_here(train.main, *arguments, "--max_steps=20")
        for path in out_dir.rglob("*.pt"):
            load_checkpoint(path)
        assert not list(out_dir.glob(".*"))
        if result[0] == 0:
            break
        assert_one_line(result, "No space left on device")
    assert free > 9 * 4096 and result[0] == 0

    # no room for the log, whose lines are all that is written
    before = (out_dir / "ckpt.pt").read_bytes()
    leave(disk, 4096 + (out_dir / "log.jsonl").stat().st_size)
    rarely = ["--max_steps=500", "--checkpoint_every=1000", "--eval_every=1000"]
    assert_one_line(call_here(train.main, *arguments, *rarely), "No space left on device")
    assert (out_dir / "ckpt.pt").read_bytes() == before and (out_dir / "log.jsonl").read_bytes().count(b"\n") > 22
    (disk / "filler").unlink()
    assert call_here(train.main, *arguments)[0] == 0
    assert_same_run(folder / "undisturbed", out_dir, 40)

    # a corpus
    for module in (prepare_text, tokenizing):
        module.FOLDER = disk
    (disk / "filler").write_bytes(bytes(10))
    (folder / "text").write_bytes(b"to be or not to be\n" * 2000)
    assert call_here(prepare_text.main, folder / "text")[0] == 0
    before = contents(disk / "mytext")
    assert Corpus(disk / "mytext").tokens["train"] > 1000
    (folder / "text").write_bytes(b"that is the question\n" * 10_000)
    leave(disk, 100_000)
    assert_one_line(call_here(prepare_text.main, folder / "text"), "another input: pass another --name")
    other = (folder / "text", "--name=other")
    assert_one_line(call_here(prepare_text.main, *other), "make room")
    tokenizing.DISK = dict.fromkeys(tokenizing.DISK, 0.0)  # what was foreseen is not always what is needed
    for free in (0, 4096, 100_000, 400_000):
        leave(disk, free)
        assert_one_line(call_here(prepare_text.main, *other), "No space left on device")
        assert contents(disk / "mytext") == before and contents(disk / "other") == {}
    (disk / "filler").unlink()
    shutil.rmtree(out_dir)
    assert call_here(prepare_text.main, *other)[0] == 0
    assert Corpus(disk / "other").tokens["train"] > 100_000

    assert not make_read_only()
    for main, more in ((train.main, arguments), (prepare_text.main, [folder / "text", "--name=another"])):
        assert_one_line(call_here(main, *more), "Read-only file system: ")


# ---- anything at all: random configs, arguments and texts


EXAMPLES = pytest.mark.parametrize("examples", [4, pytest.param(500, marks=pytest.mark.slow)])
MANY_EXAMPLES = pytest.mark.parametrize("examples", [150, pytest.param(5000, marks=pytest.mark.slow)])
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@st.composite
def configs(draw):
    """Values that fit together, of nearly every field."""
    n_head, block_size, micro = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 16)), draw(st.integers(1, 3))
    learning_rate = draw(st.floats(0, 1) | st.floats(0, 1e6))
    return {
        "n_head": n_head, "block_size": block_size, "micro_batch_size": micro, "batch_size": micro * draw(st.integers(1, 3)),
        "n_kv_head": draw(st.sampled_from([k for k in (0, 1, 2, 4) if n_head % (k or 1) == 0])),
        "n_layer": draw(st.integers(1, 3)), "n_embd": 2 * n_head * draw(st.integers(1, 5)), "ffn_size": draw(st.integers(0, 40)),
        "rope_base": draw(st.floats(1.001, 1e9)), "dropout": draw(st.floats(0, 0.9)), "tie_embeddings": draw(st.booleans()),
        "kv_shift": draw(st.sampled_from(["none", "kv", "k", "v", "qkv"])),
        "shift_window": draw(st.integers(2, max(2, block_size))),
        "shift_weights": draw(st.sampled_from(["free", "gate", "clamp"])),
        "seed": draw(st.integers(0, 2**32 - 1)), "max_steps": draw(st.integers(2, 5)), "warmup_steps": draw(st.integers(0, 5)),
        "learning_rate": learning_rate, "min_lr": learning_rate * draw(st.floats(0, 1)),
        "lr_schedule": draw(st.sampled_from(["cosine", "constant", "linear"])), "weight_decay": draw(st.floats(0, 10)),
        "beta1": draw(st.floats(0, 0.99)), "beta2": draw(st.floats(0, 0.999)), "grad_clip": draw(st.floats(0, 10)),
        "vocab_size": draw(st.sampled_from([0, 256, 300])), "log_every": draw(st.integers(1, 5)),
        "eval_every": draw(st.integers(1, 5)), "checkpoint_every": draw(st.integers(1, 5)),
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        "eval_tokens": draw(st.integers(0, 300)), "recompute": draw(st.booleans()), "device": "cpu"}


@EXAMPLES
def test_any_config_trains_saves_goes_on_and_samples(call, finished, monkeypatch, examples):
    seed = train.dropout_seed

    @settings(max_examples=examples, **SETTINGS)
    @given(configs(), st.data())
    def check(values, more):
        def interrupted(run_seed, step, rank):
            if step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return seed(run_seed, step, rank)

        with tempfile.TemporaryDirectory() as folder:
            whole, stopped = (options(values, dataset=finished / "corpus", out_dir=f"{folder}/{name}") for name in ("a", "b"))
            result = call(train.main, *whole)
            if result[0]:
                return assert_one_line(result, "checkpoints are left as they were")
            stop_at = more.draw(st.integers(0, values["max_steps"] - 2))
            monkeypatch.setattr(train, "dropout_seed", interrupted)
            assert call(train.main, *stopped)[0] == 128 + signal.SIGTERM
            monkeypatch.setattr(train, "dropout_seed", seed)
            assert call(train.main, *stopped)[0] == 0
            for name in ("ckpt.pt", "best.pt"):
                assert same_tensors(*(load_checkpoint(Path(folder, one, name))["model"] for one in ("a", "b")))
            code, _, err = call(sample.main, f"--out_dir={folder}/b", "--prompt=to be", "--max_new_tokens=3", "--stop=False",
                                f"--top_k={more.draw(st.integers(0, 400))}", f"--temperature={more.draw(st.floats(0, 100))}",
                                f"--top_p={more.draw(st.floats(0.001, 1))}", f"--num_samples={more.draw(st.integers(1, 3))}")
            assert code == 0 and "tokens/s" in err

    check()


VALUES = st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers()), st.binary(),
                   st.sampled_from(["kv", "gate", "cosine", "bfloat16", "1e999", "-0", "1_0", "٣", "0x10", "nan", "None"]))


@MANY_EXAMPLES
@pytest.mark.parametrize("cls", [TrainConfig, SampleConfig, prepare_text.PrepareConfig])
def test_any_option_and_any_config_file_is_read_or_refused(tmp_path, cls, examples):
    names = st.sampled_from([*defaults(cls), "n_layers", "_hidden", "", "os"]) | st.text(max_size=5)
    arguments = st.builds("--{}={}".format, names, VALUES) | st.text().map("-".__add__) | st.text()
    lines = st.builds("{} = {!r}".format, names, VALUES) | st.text(alphabet="abc =()[]'\"\n\t:#.,\0é1\ud800")

    @settings(max_examples=examples, **SETTINGS)
    @given(st.lists(arguments, max_size=3), st.lists(lines, max_size=3))
    def check(arguments, lines):
        path = tmp_path / "config.py"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        for argv in (arguments, [str(path)], [str(path), *arguments]):
            if not {"--help", "-h"} & set(argv):
                try:
                    assert type(parse(cls, argv)) is cls
                except UserError as error:
                    assert str(error)

    check()


# ---- what a run touches

WATCH = """
import os, sys

allowed = sys.argv.pop(1).split(os.pathsep)

def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise AssertionError(f"{event} {arguments}")
    write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if write or event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link"):
        path = os.path.realpath(os.fsdecode(arguments[0])) if not isinstance(arguments[0], int) else os.devnull
        if not path.startswith((*allowed, os.devnull)) and "__pycache__" not in path:
            raise AssertionError(f"{event} {path}")

sys.addaudithook(watch)
import runpy
import model, induction_toy, data.text.prepare, data.openwebtext.prepare
out_dir, corpus, *options = sys.argv[1:]
for script, arguments in (("train.py", [f"--dataset={corpus}", *options]), ("sample.py", ["--max_new_tokens=20"])):
    sys.argv = [script, f"--out_dir={out_dir}", *arguments]
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
"""


def test_training_and_sampling_use_no_network_and_write_nothing_elsewhere(finished, tmp_path):
    for name in ("home", "tmp", "cwd"):
        (tmp_path / name).mkdir()
    environment = os.environ | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in environment.items() if not name.startswith(("XDG_", "TORCH"))}
    shutil.copytree(finished / "corpus", tmp_path / "corpus")
    before = contents(tmp_path / "corpus")
    allowed = os.pathsep.join([str(tmp_path / "out"), str(tmp_path / "tmp")])  # torch tries whether it can write there
    program = f"ROOT = {str(ROOT)!r}{WATCH}"
    command = [sys.executable, "-c", program, allowed, tmp_path / "out", tmp_path / "corpus", *options(RUN)]
    done = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "20 tokens in" in done.stderr, done.stderr
    assert contents(tmp_path / "corpus") == before and load_checkpoint(tmp_path / "out" / "ckpt.pt")["run"]["step"] == 4
    left = [path for name in ("home", "tmp", "cwd") for path in (tmp_path / name).rglob("*")]
    assert [path for path in left if not path.name.startswith("torchinductor_")] == []  # torch's cache, an empty folder


def test_requirements_are_pinned():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 4 and all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)


def no_compiler():
    raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found in None")


@pytest.mark.parametrize("fail, words", [(lambda: torch.empty(1 << 60, dtype=torch.uint8), "allocate"),
                                         (lambda: bytearray(1 << 62), "out of memory"), (no_compiler, "needs a C++ compiler")])
def test_no_memory_or_no_compiler_is_one_line(call, finished, monkeypatch, fail, words):
    monkeypatch.setattr(sample, "write_stream", lambda *arguments: fail())
    assert_one_line(call(sample.main, f"--out_dir={finished / 'out'}"), words)


def test_an_error_in_the_program_keeps_its_traceback(call, finished, monkeypatch):
    monkeypatch.setattr(sample, "write_stream", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # an error in the program keeps its traceback
        call(sample.main, f"--out_dir={finished / 'out'}")
