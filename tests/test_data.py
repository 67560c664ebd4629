"""Corpora: a preparation can be interrupted anywhere, and every run reads the tokens it should."""

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from config import UserError
from data import Corpus, TrainBatches, atomic_write, lock
from data.openwebtext import prepare as openwebtext
from data.pystdlib import prepare as pystdlib
from data.shakespeare_char import prepare as shakespeare
from data.text import prepare as text
from data.tokenizing import Job, Tokenizer, write_corpus
from eval import evaluation_sets

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

LINES = b"".join(b"line %d\n" % i for i in range(1000))
BIG = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x12000)]))  # 71,680 characters


def write_counting(folder, train_counts, n_val=50, chars=BIG[:500]) -> Corpus:
    """Token i is i, so that a window shows where it was read. One shard for each count."""
    jobs = [Job(1, lambda: [("val", chars[:n_val].encode(), False)])]
    for end, n in zip(np.cumsum(train_counts), train_counts, strict=True):
        jobs.append(Job(1, lambda part=chars[end - n : end]: [("train", part.encode(), False)]))
    write_corpus(folder, {"kind": "char", "chars": chars}, {}, jobs)
    return Corpus(folder)


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_windows_cross_shards_as_if_they_were_one_array(tmp_path):
    corpus = write_counting(tmp_path / "a", [7, 0, 1, 60, 35])
    assert corpus.tokens == {"train": 103, "val": 50}
    expected = np.add.outer(range(93), range(11))
    assert np.array_equal(corpus.windows("train", range(93), 10), expected)
    assert np.array_equal(corpus.windows("train", [0], 102)[0], range(103))
    large = write_counting(tmp_path / "b", [len(BIG)], chars=BIG)
    assert large.windows("train", [71_670], 9).tolist() == [list(range(71_670, 71_680))]


@pytest.mark.parametrize("n, block_size", [(103, 10), (11, 10), (64, 1)])
def test_each_epoch_covers_every_window_once(tmp_path, n, block_size):
    batches = TrainBatches(write_counting(tmp_path, [n]), block_size, batch_size=4, seed=3)
    rows = np.concatenate([batches(i) for i in range(3 * batches.n_windows // 4 + 1)])
    assert (np.diff(rows) == 1).all()
    for epoch in np.split(rows[: 3 * batches.n_windows, 0], 3):
        assert (np.diff(np.sort(epoch)) == block_size).all()
    assert n - 1 - batches.n_windows * block_size < 2 * block_size


def test_batches_are_a_function_of_seed_and_step_for_any_number_of_processes(tmp_path):
    corpus = write_counting(tmp_path, [103])
    whole = [TrainBatches(corpus, 10, 12, seed=5)(step) for step in range(6)]
    batches = TrainBatches(corpus, 10, 12, seed=5)
    for n, step in [(1, 5), (2, 0), (4, 3)]:
        ranks = [batches(step, rank, world_size=n) for rank in range(n)]
        assert np.array_equal(np.concatenate(ranks), whole[step])
    assert not np.array_equal(TrainBatches(corpus, 10, 12, seed=6)(0), whole[0])
    assert TrainBatches(corpus, 10, 4, seed=3)(5)[:, 0].tolist() == [32, 82, 12, 62]


def test_validation_windows_are_adjacent(tmp_path):
    corpus = write_counting(tmp_path, [100], n_val=50)
    for tokens, first, starts in ((0, 0, [0, 7, 14, 21, 28, 35, 42]), (20, 3, [3, 10])):
        inputs, targets = evaluation_sets(corpus, 7, tokens, first, induction=False)["val_loss"]
        assert inputs[:, 0].tolist() == starts and (targets == inputs + 1).all()
    with pytest.raises(UserError, match="50 val tokens, not more than 50"):
        evaluation_sets(corpus, 50, 0, 0, induction=False)


@pytest.mark.parametrize("kind", ["bytes", "char", "gpt2"])
def test_any_text_round_trips_through_each_tokenizer(monkeypatch, kind):
    gpt2 = tiktoken.Encoding(  # without its merges
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)

    @settings(max_examples=40, deadline=None)
    @given(st.text() | st.text(alphabet=" \n\r\u3000\xa0<|endoftx>anoi'é😀"))
    def check(text):
        tokenizer = Tokenizer({"kind": kind, "chars": "".join(sorted(set(text)))})
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()) == text and all(ids < tokenizer.vocab_size)
        assert np.array_equal(ids, tokenizer.encode(text.encode()))

    check()
    tokenizer = Tokenizer({"kind": kind, "chars": "?é😀"})  # half a character in the terminal:
    assert tokenizer.decode(tokenizer.encode("é\ud800😀").tolist()) == "é?😀"
    if kind == "char":
        with pytest.raises(UserError, match="'x' is not among the 3 ids"):
            tokenizer.encode("é?x")
    if kind == "gpt2":
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)
        with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
            Tokenizer({"kind": kind})


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_preparation_resumes(call, tmp_path, monkeypatch, sent):
    monkeypatch.setattr(text, "SHARD_SIZE", 1 << 18)
    file, folder = tmp_path / "a.txt", tmp_path / "corpus"
    file.write_bytes(LINES * 600)
    script = ("import data.text.prepare as p, signal; p.SHARD_SIZE = 1 << 18; "
              "signal.signal(signal.SIGINT, signal.default_int_handler); p.run(p.main)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, file, f"--name={folder}", "--workers=2"], text=True,
        cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(6):
        process.stdout.readline()
    (os.kill if sent == signal.SIGKILL else os.killpg)(process.pid, sent)  # Ctrl-C goes to all
    err = process.communicate(timeout=20)[1]  # returns when the workers have ended, too
    assert process.returncode == -sent and "Traceback" not in err
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("train_*.bin")}
    with pytest.raises(UserError, match="an unfinished corpus"):
        Corpus(folder)
    call(text.main, file, f"--name={folder}", "--tokenizer=char", error="another tokenizer")
    call(text.main, file, f"--name={folder}", "--workers=1")
    assert 5 <= len(finished) < len(list(folder.glob("train_*.bin")))
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    call(text.main, file, f"--name={tmp_path / 'reference'}", "--workers=1")
    assert contents(folder) == contents(tmp_path / "reference")


def test_a_complete_or_locked_corpus_is_not_prepared_again(call, tmp_path):
    a, b, folder = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "corpus"
    a.write_bytes(LINES), b.write_bytes(LINES * 2)
    call(text.main, a, f"--name={folder}")
    before = contents(folder)
    assert "part 0" not in call(text.main, a, f"--name={folder}")[0]
    call(text.main, a, f"--name={folder}", "--val_fraction=0.5", error="another val_fraction: ")
    call(text.main, b, f"--name={folder}", error="another input: ")
    descriptor = lock(folder)
    call(text.main, a, f"--name={folder}", error="another process is writing")
    os.close(descriptor)
    assert contents(folder) == before
    (folder / "meta.json").unlink()
    (folder / "train_0007.bin").write_bytes(b"of another preparation")
    call(text.main, a, f"--name={folder}")
    assert contents(folder) == before


def test_damage_is_one_line(tmp_path):
    write_counting(tmp_path, [90, 10])
    before, meta, shard = contents(tmp_path), tmp_path / "meta.json", tmp_path / "train_0002.bin"
    meta.write_bytes(before["meta.json"].replace(b"abc", b"acb"))  # the alphabet
    with pytest.raises(UserError, match="meta.json is damaged, was changed"):
        Corpus(tmp_path)
    meta.write_bytes(before["meta.json"])
    shard.write_bytes(before[shard.name][:-2])
    with pytest.raises(UserError, match="train_0002.bin has 18 bytes, not 20"):
        Corpus(tmp_path)
    shard.write_bytes(before[shard.name][:-2] + b"\xff\xff")
    with pytest.raises(UserError, match="train_0002.bin is damaged"):
        Corpus(tmp_path).windows("train", [0, 80], 19)
    shard.unlink()
    write_counting(tmp_path, [90, 10])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shard_size", [1 << 25, 150])
@pytest.mark.parametrize("files, expected", [
    (["x y\n<|endoftext|>\n" * 300], "x y\n\0" * 29),  # documents
    (["a\n" + "<|endoftext|>\n" * 200 + "word\n" * 300], "word\n" * 86 + "\0"),
    (["w\n" * 470 + "<|endoftext|>\n" + "w\n" * 10], "w\n" * 32 + "\0" + "w\n" * 10 + "\0"),
    (["line\n" * 300], "line\n" * 30 + "\0"),  # one document
    (["a" + "é😀" * 200], "é😀" * 20 + "\0"),  # one line
    (["a" * 950, "", "b" * 50], "b" * 50 + "\0"),
])
def test_val_is_the_end_of_the_text(call, tmp_path, monkeypatch, files, expected, shard_size):
    monkeypatch.setattr(text, "SHARD_SIZE", shard_size)
    for i, content in enumerate(files):
        (tmp_path / f"{i}.txt").write_text(content)
    call(text.main, *sorted(tmp_path.glob("*.txt")), f"--name={tmp_path / 'out'}", "--workers=1")
    train, val = texts(tmp_path / "out")
    documents = "<|endoftext|>\n".join(filter(None, files)).split("<|endoftext|>\n")
    assert train + val == "".join(d + "\0" for d in documents if d) and val == expected


def write_documents(path) -> list[str]:
    """Writes 60 documents as a file; returns their train and val, for val_fraction=0.1."""
    documents = [f"naïve 😀 {i}\n\n\u00a0\n" * ((i + 1) % 40) for i in range(60)]  # one is empty
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow").table({"text": documents})
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=25)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": d, "url": ""}) + "\n" for d in documents))
    else:  # from Windows
        raw = b"\xef\xbb\xbf" + "<|endoftext|>\n".join(documents).encode().replace(b"\n", b"\r\n")
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    splits = ["", ""]
    for document in filter(None, documents):
        is_val = hashlib.sha256(document.encode()).digest()[:8] < b"\x19\x99\x99\x99\x99\x99\x9a"
        splits[is_val] += document + "\0"
    return splits


@pytest.mark.parametrize("suffix, workers", [
    (".txt", 1), (".txt.gz", 1), (".jsonl", 1), (".jsonl", 2), (".parquet", 1)])
def test_every_format_and_number_of_workers_gives_one_corpus(call, tmp_path, suffix, workers):
    splits = [write_documents(tmp_path / f"{name}{suffix}") for name in "ab"]
    call(openwebtext.main, f"--input={tmp_path}/*{suffix}", f"--name={tmp_path / 'out'}",
         "--tokenizer=bytes", "--val_fraction=0.1", f"--workers={workers}")
    assert texts(tmp_path / "out") == [a + b for a, b in zip(*splits, strict=True)] and splits[0][1]


def test_a_download_from_the_hub_resumes(call, tmp_path, monkeypatch):
    def hf_hub_download(repo, name, repo_type, revision, local_dir):
        if name in broken:
            raise ConnectionError("the network\nis down")
        local_dir.mkdir(exist_ok=True)
        splits.append(write_documents(local_dir / name))
        return str(local_dir / name)

    splits, broken = [], ["1.jsonl"]
    monkeypatch.setattr(openwebtext, "HUB_FILES", ["0.jsonl", "1.jsonl"])
    arguments = [f"--name={tmp_path}", "--tokenizer=bytes", "--val_fraction=0.1", "--workers=1"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(**locals()))
    call(openwebtext.main, *arguments, error="(ConnectionError: the network is down): rerun")
    broken.clear()
    call(openwebtext.main, *arguments)
    assert texts(tmp_path) == [a * 2 for a in splits[0]] and len(splits) == 2  # read once each
    assert not (tmp_path / ".hub.tmp").exists()


def test_mistakes_are_one_line(call, tmp_path, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    call(text.main, "nowhere.txt", error="No such file or directory: nowhere.txt")
    call(text.main, tmp_path, error=f"Is a directory: {tmp_path}")
    call(text.main, error="name the text files")
    options = f"--name={tmp_path / 'out'}", "--tokenizer=bytes"
    call(openwebtext.main, *options, "--val_fraction=1", error="between 0 and 1")
    call(openwebtext.main, *options, "--input=*.csv", error="must match files, and only .jsonl")
    call(openwebtext.main, *options, f"--input={tmp_path}/*.txt.gz", error="a.txt.gz (EOFError")
    (tmp_path / "latin1").write_bytes(b"\xef\xbb\xbfline\r\n" * 100 + b"\xff")
    monkeypatch.setattr(text, "SHARD_SIZE", 50)
    call(text.main, tmp_path / "latin1", options[0], "--tokenizer=char",
         error="latin1 is not UTF-8 at byte 900: ")


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    with atomic_write(tmp_path / "file") as f:
        f.write(b"old")
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "file") as f:
        f.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "file") and contents(tmp_path) == {"file": b"old"}


def test_the_default_corpus_is_the_standard_library(call, tmp_path, monkeypatch):
    monkeypatch.setattr(pystdlib, "__file__", str(tmp_path / "prepare.py"))
    assert "usage:" in call(pystdlib.main, "--help")[0] and not contents(tmp_path)
    assert 1.5 < float(call(pystdlib.main)[0].split("val loss of ")[1].split()[0]) < 3.5
    train, val = texts(tmp_path)
    assert Path(json.__file__).read_text() + "\0" in train + val
    assert 0.03 < len(val) / len(train) < 0.3


def test_shakespeare_is_checked_and_prepared_by_character(call, tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "__file__", str(tmp_path / "out" / "prepare.py"))
    raw = b"First Citizen:\nBefore we proceed any further, " * 10
    (tmp_path / "input.txt").write_bytes(raw)
    call(shakespeare.main, f"--input={tmp_path / 'input.txt'}", error="is not tiny Shakespeare")
    call(shakespeare.main, "--url=http://127.0.0.1:1/", error="cannot read http")
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(raw).hexdigest())
    call(shakespeare.main, f"--input={tmp_path / 'input.txt'}")
    train, val = texts(tmp_path / "out")
    assert (train + val).encode() == raw and len(train) == int(0.9 * len(raw))
