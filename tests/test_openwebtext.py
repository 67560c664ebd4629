"""Large corpora: the same tokens whatever the format, the number of processes and what stopped a run on the way."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from config import UserError
from data import Corpus, CorpusWriter, Tokenizer, TrainBatches, tokenizing
from data.openwebtext import prepare
from data.text import prepare as prepare_text
from data.tokenizing import Files

BYTES = Tokenizer({"kind": "bytes"})


def some_documents(n: int) -> list[str]:
    words = ["one", "naïve", "word\n", "😀", "\n\n", "\u00a0", "line's\n", "\ud7ff", "0"]
    pick = random.Random(0)
    return [" ".join(pick.choices(words, k=pick.choice([0, 1, 20, 200]))) + "\n" for _ in range(n)]


def write_input(folder, documents):
    """The documents in every format, in two files each."""
    for name, part in (("a", documents[: len(documents) // 3]), ("b", documents[len(documents) // 3 :])):
        lines = "".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=name == "a") + "\n" for text in part).encode()
        for suffix, raw in ((".txt", "<|endoftext|>\n".join(part).encode()), (".jsonl", lines)):
            (folder / f"{name}{suffix}").write_bytes(raw)
            (folder / f"{name}{suffix}.gz").write_bytes(gzip.compress(raw))


def expected(documents, val_fraction: float) -> dict:
    """The corpus of bytes that these documents make."""
    texts = {"train": b"", "val": b""}
    for text in documents:
        digest = hashlib.sha256(text.encode()[:65536]).digest()
        if text:
            texts["val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"] += text.encode() + b"\0"
    return texts


def corpus_bytes(folder) -> dict:
    """The same from a prepared corpus, its hashes checked."""
    corpus, texts = Corpus(folder), {}
    for split in ("train", "val"):
        raw = (folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(raw).hexdigest() == corpus.sha256[split]
        texts[split] = np.frombuffer(raw, corpus.dtype).astype(np.uint8).tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    return texts


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz", "jsonl.gz", "parquet"])
def test_every_format_and_number_of_workers_gives_the_same_corpus(call, tmp_path, monkeypatch, suffix, workers):
    documents = some_documents(300)
    write_input(tmp_path, documents)
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table
        parquet.write_table(table({"text": documents}), tmp_path / "a.parquet", row_group_size=70)
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(tokenizing, "PIECE", 4096)  # many lots
    code, out, err = call(prepare.main, f"--input={tmp_path}/*.{suffix}", "--name=out", "--tokenizer=bytes",
                          "--val_fraction=0.1", f"--workers={workers}")
    assert (code, err) == (0, "") and "the corpus takes about" in out
    texts = corpus_bytes(tmp_path / "out")
    assert texts == expected(documents, 0.1) and 0.03 < len(texts["val"]) / len(texts["train"]) < 0.3


def test_a_document_of_many_pieces_is_whole(call, tmp_path, monkeypatch):
    """It stays in one split, and so does what comes after it."""
    documents = ["".join(f"line {i}\n" for i in range(30_000)), "short\n", "x" * 300_000 + "\n", "end\n"] * 5
    documents = [f"{i}\n{text}" for i, text in enumerate(documents)]
    write_input(tmp_path, documents)
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(tokenizing, "PIECE", 1 << 16)
    for suffix in ("txt", "jsonl"):
        arguments = [f"--input={tmp_path}/*.{suffix}", f"--name={suffix}", "--tokenizer=bytes", "--val_fraction=0.4"]
        assert call(prepare.main, *arguments)[0] == 0
        assert corpus_bytes(tmp_path / suffix) == expected(documents, 0.4)


# what a user does, but saving its place all the time, and slowly enough to be stopped
SCRIPT = """
import pathlib, signal, sys, time
from config import run
from data import CorpusWriter, tokenizing
from data.{script} import prepare

tokenizing.PIECE, tokenizing.SAVE_EVERY, prepare.FOLDER = 1 << 15, 0.05, pathlib.Path({folder!r})
write = CorpusWriter.write
CorpusWriter.write = lambda *arguments: (time.sleep({pause}), write(*arguments))
sys.argv = ["prepare.py", *{arguments!r}]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
run(prepare.main)
"""


def start(script, folder, *arguments, pause):
    code = SCRIPT.format(script=script, pause=pause, folder=str(folder), arguments=arguments)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def workers_of(process) -> list[int]:
    """Its child processes, as long as they are not zombies."""
    children = []
    for path in os.listdir("/proc"):
        try:
            status = open(f"/proc/{path}/stat").read().rpartition(")")[2].split() if path.isdigit() else []
            command = open(f"/proc/{path}/cmdline").read() if status and int(status[1]) == process.pid else ""
        except OSError:  # gone
            continue
        if "spawn_main" in command:
            children.append(int(path))
    return children


def is_running(pid) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
@pytest.mark.parametrize("script, how", [("openwebtext", "kill kill"), ("text", "kill kill"), ("openwebtext", "interrupt"),
                                         ("openwebtext", "worker")])
def test_what_is_stopped_goes_on(call, tmp_path, monkeypatch, script, how):
    documents = some_documents(6_000)
    write_input(tmp_path, documents)
    folder = tmp_path / "out"
    inputs = [f"--input={tmp_path}/*.jsonl.gz"] if script == "openwebtext" else [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"]
    arguments = [*inputs, "--name=out", "--tokenizer=bytes", "--val_fraction=0.1", "--workers=2"]
    unfinished, pick = folder / ".unfinished.tmp", random.Random()
    for signal_sent in {"kill kill": [signal.SIGKILL, signal.SIGKILL], "interrupt": [signal.SIGINT], "worker": [0]}[how]:
        process = start(script, tmp_path, *arguments, pause=0.1)  # so that it is not done before the signal
        had = unfinished.read_bytes() if unfinished.exists() else b""
        wait_for(lambda had=had: unfinished.exists() and unfinished.read_bytes() != had)
        time.sleep(pick.random() / 3)
        workers = workers_of(process)
        assert process.poll() is None and workers
        if signal_sent == signal.SIGINT:
            os.killpg(process.pid, signal_sent)  # as Ctrl-C does
        else:
            os.kill(process.pid if signal_sent else workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=20)
        wait_for(lambda workers=workers: not any(map(is_running, workers)))
        assert process.returncode == (130 if signal_sent == signal.SIGINT else -signal_sent or 2)
        if signal_sent != signal.SIGKILL:
            assert "the same command goes on from there" in out and err.count("\n") == (signal_sent != signal.SIGINT)
        if not signal_sent:
            assert err.startswith("prepare.py: a process that tokenizes has died")
        assert not [path.name for path in folder.iterdir() if not path.name.startswith(".")], "nothing that looks whole"
    process = start(script, tmp_path, *arguments, pause=0)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "") and "going on from where an earlier run stopped" in out
    texts = corpus_bytes(folder)
    if script == "openwebtext":
        assert texts == expected(documents, 0.1)
    else:
        assert texts["train"] + texts["val"] == "".join(text + "\0" for text in documents if text).encode()
        monkeypatch.setattr(prepare_text, "FOLDER", tmp_path)
        assert call(prepare_text.main, *arguments, "--name=undisturbed")[0] == 0
        assert texts == corpus_bytes(tmp_path / "undisturbed")


def test_files_go_on_from_every_place(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "PIECE", 256)
    texts = ["".join(f"line {i}\n" for i in range(200)), "", "short\n", "x" * 9000 + "\ny\n", "a <|endoftext|>\n"]
    (tmp_path / "a").write_text("<|endoftext|>\n".join(texts))
    (tmp_path / "b").write_text("<|endoftext|>\n".join(texts[::-1]) + "  <|endoftext|>\t\r\n<|endoftext|>")
    paths, steps = [tmp_path / "a", tmp_path / "b"], []
    for step in (source := Files(paths)):
        steps.append((source.place, step))
    assert "".join(raw.decode() + "|" * ends for _, (raw, ends, _, _) in steps) == "".join(
        text + "|" for text in texts + texts[::-1] if text)
    assert len(steps) > 20 and any(not ends for _, (_, ends, _, _) in steps)
    for i, (place, _) in enumerate(steps):
        source = Files(paths)
        source.start = json.loads(json.dumps(place))
        assert list(source) == [step for _, step in steps[i + 1 :]]
        assert source.place == steps[-1][0]


def test_an_error_at_the_very_end_loses_nothing(tmp_path, capsys):
    with pytest.raises(IsADirectoryError), CorpusWriter(tmp_path, BYTES, "test", {"x": 1}) as corpus:
        corpus.write("train", [1, 2, 3]), corpus.write("val", [4])
        corpus.save("here")
        (tmp_path / "val.bin").mkdir()
    assert "goes on from there" in capsys.readouterr().out
    (tmp_path / "val.bin").rmdir()
    assert finish(tmp_path, {"x": 1}) == ("here", [1, 2, 3, 5], [4, 6])


def stopped(folder, recipe):
    """A writer that gets no chance to tidy up, as if killed, after it saved [1, 2, 3] and [4]."""
    corpus = CorpusWriter(folder, BYTES, "test", recipe).__enter__()
    corpus.write("train", [1, 2, 3]), corpus.write("val", [4])
    corpus.save("here")
    assert [(folder / f".{split}.bin.tmp").stat().st_size for split in ("train", "val")] == [6, 2]  # and in no buffer
    corpus.write("train", [9, 9])
    corpus._flush()
    os.close(corpus.lock)


def finish(folder, recipe):
    """-> the place that was gone on from, the ids of train, the ids of val."""
    with CorpusWriter(folder, BYTES, "test", recipe) as corpus:
        corpus.write("train", [5]), corpus.write("val", [6])
    corpus_bytes(folder)
    return corpus.place, *(np.fromfile(folder / f"{split}.bin", "<u2").tolist() for split in ("train", "val"))


def test_a_writer_goes_on_from_what_was_saved(tmp_path, capsys):
    stopped(tmp_path, {"x": 1})
    assert finish(tmp_path, {"x": 1}) == ("here", [1, 2, 3, 5], [4, 6])
    assert finish(tmp_path, {"x": 1}) == (None, [5], [6])
    stopped(tmp_path, {"x": 1})  # and now as if stopped between two of the last steps
    (tmp_path / "meta.json").unlink()
    os.replace(tmp_path / ".train.bin.tmp", tmp_path / "train.bin")
    assert finish(tmp_path, {"x": 1}) == ("here", [1, 2, 3, 5], [4, 6])
    stopped(tmp_path, {"x": 1, "y": 2})
    with pytest.raises(UserError, match="another x: pass another --name"):
        finish(tmp_path, {"x": 2, "y": 2})
    assert finish(tmp_path, {"x": 1, "y": 2}) == ("here", [1, 2, 3, 5], [4, 6]), "and nothing was lost"


def test_a_complete_corpus_is_neither_made_again_nor_replaced(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "FOLDER", tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text of some lines\n" * 50)
    assert call(prepare_text.main, tmp_path / "a.txt")[0] == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mytext").iterdir()}
    for arguments, code, message in (((), 0, "is complete"), (("--val_fraction=0.5",), 2, "another val_fraction: pass"),
                                     (("--tokenizer=char",), 2, "another tokenizer: pass")):
        found, out, err = call(prepare_text.main, tmp_path / "a.txt", *arguments)
        assert found == code and message in out + err
    assert "another input: pass" in call(prepare_text.main, tmp_path / "b.txt")[2]
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "mytext").iterdir()}
    (tmp_path / "mytext" / "train.bin").write_bytes(b"damaged")
    code, out, _ = call(prepare_text.main, tmp_path / "a.txt")
    assert code == 0 and "starting over" in out and (tmp_path / "mytext" / "train.bin").read_bytes() == before["train.bin"][0]


def test_damaged_work_is_started_over(tmp_path, capsys):
    for damage in (lambda raw: raw[:4], lambda raw: b"\7" + raw[1:]):
        stopped(tmp_path, {"x": 1})
        (tmp_path / ".train.bin.tmp").write_bytes(damage((tmp_path / ".train.bin.tmp").read_bytes()))
        assert finish(tmp_path, {"x": 1}) == (None, [5], [6]) and "damaged" in capsys.readouterr().out
    for text in (b"", b"[]", b"{}", b"\xff"):
        stopped(tmp_path, {"x": 1})
        (tmp_path / ".unfinished.tmp").write_bytes(text)
        assert finish(tmp_path, {"x": 1}) == (None, [5], [6]) and "damaged" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="folders are not locked there")
def test_two_writers_do_not_meet(tmp_path):
    with CorpusWriter(tmp_path, BYTES, "test") as corpus:
        corpus.write("train", [1])
        with pytest.raises(UserError, match="another process"), CorpusWriter(tmp_path, BYTES, "test"):
            pass
        corpus.write("val", [2])
    assert Corpus(tmp_path).tokens == {"train": 1, "val": 1}


def test_a_full_disk_is_noticed_beforehand(call, tmp_path, monkeypatch):
    write_input(tmp_path, some_documents(300))
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    code, _, err = call(prepare.main, f"--input={tmp_path}/*.jsonl", "--name=out", "--tokenizer=bytes")
    assert code == 2 and "are free there" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, raw, message", [
    ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: is damaged, or not gzip"),
    ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-10], "a.txt.gz: is damaged"),
    ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:10] + b"\xff" * 20, "a.txt.gz: is damaged"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "x"\n', "a.jsonl, line 2: is not JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n', "a.jsonl, line 2: is not JSON"),
    ("a.jsonl", b'{"content": "x"}\n', 'a.jsonl, line 1: a document needs a "text"'),
    ("a.jsonl", b'"text"\n', 'a.jsonl, line 1: a document needs a "text"'),
    ("a.jsonl", b'{"text": null}\n', 'a.jsonl, line 1: a document needs a "text"'),
    ("a.jsonl", b'{"text": "na\xefve"}\n', "a.jsonl, line 1: is not UTF-8"),
    ("a.txt", b"", "add text"), ("a.csv", b"x", "must be .jsonl"), ("a.parquet.gz", b"x", "must be .jsonl"),
])
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, monkeypatch, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    code, _, err = call(prepare.main, f"--input={tmp_path}/a.*", "--name=out", "--tokenizer=bytes")
    assert code == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]


@pytest.mark.parametrize("arguments, message", [
    (["--input=nowhere/*.txt"], "no file is like"), (["--name=text"], "plain name"), (["--val_fraction=0"], "between 0 and 1"),
    (["--workers=-1"], "0 or more"), (["--tokenizer=char"], "gpt2 | bytes"), ([], "pip install datasets"),
    (["--input={}"], "pip install pyarrow"),
])
def test_mistakes_are_one_line(call, tmp_path, monkeypatch, arguments, message):
    for package in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"x")
    code, _, err = call(prepare.main, "--tokenizer=bytes", *[a.format(tmp_path / "a.parquet") for a in arguments])
    assert code == 2 and message in err and err.count("\n") == 1


class Rows:
    """What datasets.load_dataset(..., streaming=True) gives: rows, and a state to go on from. It may break off."""

    def __init__(self, documents, breaks_at):
        self.documents, self.breaks_at, self.at = documents, breaks_at, 0

    def __iter__(self):
        while self.at < len(self.documents):
            if self.at == self.breaks_at:
                raise ConnectionError("the network\nis gone")
            self.at += 1
            yield {"text": self.documents[self.at - 1]}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_the_hub_is_streamed_and_gone_on_with(call, tmp_path, monkeypatch):
    documents, revisions, breaks_at = some_documents(300), iter(["first", "second"]), 200

    def load_dataset(name, split, streaming, revision):
        assert (name, split, streaming, revision) == ("Skylion007/openwebtext", "train", True, "first")
        return Rows(documents, breaks_at)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        SimpleNamespace(dataset_info=lambda name: SimpleNamespace(sha=next(revisions))))
    monkeypatch.setattr(prepare, "FOLDER", tmp_path)
    monkeypatch.setattr(tokenizing, "PIECE", 4096)
    monkeypatch.setattr(tokenizing, "SAVE_EVERY", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    arguments = ["--name=out", "--tokenizer=bytes", "--val_fraction=0.1", "--workers=1"]
    code, out, err = call(prepare.main, *arguments)
    assert code == 2 and "(ConnectionError: the network is gone)" in err and err.count("\n") == 1
    assert "24 GB to download" in out and "79.5 GB" in out and "goes on from there" in out
    breaks_at = None
    code, out, err = call(prepare.main, *arguments)
    assert (code, err) == (0, "") and "going on from where an earlier run stopped" in out
    assert corpus_bytes(tmp_path / "out") == expected(documents, 0.1)


def test_a_loader_at_full_size(tmp_path):
    """Nine billion tokens take no more memory than a few."""
    with open(tmp_path / "train.bin", "wb") as f:
        f.truncate(18_000_000_000)  # sparse: it takes no disk
    (tmp_path / "val.bin").write_bytes(b"")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": {"kind": "gpt2"}, "vocab_size": 50257, "dtype": "uint16",
                                                    "tokens": {"train": 9_000_000_000, "val": 0},
                                                    "sha256": {"train": "", "val": hashlib.sha256().hexdigest()}}))
    batches = TrainBatches(Corpus(tmp_path), block_size=1024, batch_size=12, seed=0)
    assert batches(0).shape == (12, 1025)
    before = resident()
    for step in range(1, 1000):
        batches(step)
    assert resident() - before < 50e6
    (tmp_path / "train.bin").unlink()


def resident() -> int:
    """Bytes of memory of this process."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") if os.path.isdir("/proc") else 0
