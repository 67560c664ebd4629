"""Corpora: what is read is what was written, whole or not at all, and every run sees the tokens it is promised."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import tiktoken
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import UserError
from data import Corpus, CorpusWriter, Tokenizer, TrainBatches, atomic_write, tokenizing, val_starts
from data.pystdlib import prepare as prepare_pystdlib
from data.shakespeare_char import prepare as prepare_shakespeare
from data.text import prepare as prepare_text

BYTES = Tokenizer({"kind": "bytes"})


def tokens(folder, split) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", "<u2")


def counting_corpus(folder, n_train, n_val=50) -> Corpus:
    """Token i is i, so that a window says where it was read."""
    tokenizer = Tokenizer({"kind": "char", "chars": "".join(map(chr, range(max(n_train, n_val))))})
    with CorpusWriter(folder, tokenizer, source="test") as corpus:
        corpus.write("train", np.arange(n_train))
        corpus.write("val", np.arange(n_val))
    return Corpus(folder)


@given(st.binary())
def test_bytes_come_back_from_the_tokenizer_of_bytes(raw):
    assert BYTES.decode_bytes(BYTES.encode(raw).tolist()) == raw


@given(st.text(), st.text(min_size=1))
def test_known_characters_come_back_and_unknown_ones_are_named(text, others):
    tokenizer = Tokenizer({"kind": "char", "chars": "".join(sorted(set(text)))})
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    for other in set(others) - set(text):
        with pytest.raises(UserError, match="is not among"):
            tokenizer.encode(text + other)


@pytest.mark.parametrize("n_tokens, block_size, batch_size", [(103, 10, 4), (21, 10, 3), (11, 10, 2), (64, 1, 5), (500, 7, 500)])
def test_each_epoch_covers_every_window_once_in_a_new_order(tmp_path, n_tokens, block_size, batch_size):
    corpus = counting_corpus(tmp_path, n_tokens)
    batches = TrainBatches(corpus, block_size, batch_size, seed=3)
    rows = np.concatenate([batches(step) for step in range(4 * batches.n_windows // batch_size + 1)])
    assert (np.diff(rows) == 1).all()  # each row is a run of the text
    epochs = [rows[i * batches.n_windows : (i + 1) * batches.n_windows, 0] for i in range(3)]
    for starts in epochs:
        ordered = np.sort(starts)
        assert (np.diff(ordered) == block_size).all() and ordered[-1] + block_size < n_tokens
        assert n_tokens - 1 - len(starts) * block_size < 2 * block_size  # nearly all of the text
    if batches.n_windows > 3:
        assert (epochs[0] - epochs[0].min()).tolist() != (epochs[1] - epochs[1].min()).tolist()  # another order
        assert len({starts.min() for starts in epochs}) > 1 or block_size == 1  # from another offset


def test_every_offset_is_drawn(tmp_path):
    batches = TrainBatches(counting_corpus(tmp_path, 47), block_size=5, batch_size=1, seed=0)
    offsets = set()
    for epoch in range(200):
        batches.start_epoch(epoch)
        offsets.add(batches.offset)
    assert offsets >= set(range(5))


def test_the_tokens_of_a_step_do_not_depend_on_the_processes_or_on_earlier_steps(tmp_path):
    corpus = counting_corpus(tmp_path, 103)
    whole = [TrainBatches(corpus, 10, 12, seed=5)(step) for step in range(6)]  # a fresh one for every step
    one_by_one = TrainBatches(corpus, 10, 12, seed=5)
    for world_size in (1, 2, 3, 4, 12):
        ranks = [TrainBatches(corpus, 10, 12, seed=5) for _ in range(world_size)]
        for step in range(6):
            shares = [batches(step, rank, world_size) for rank, batches in enumerate(ranks)]
            assert np.array_equal(np.concatenate(shares), whole[step])
    assert all(np.array_equal(one_by_one(step), whole[step]) for step in (5, 0, 3))
    assert not np.array_equal(TrainBatches(corpus, 10, 12, seed=6)(0), whole[0])


def test_validation_windows_lie_side_by_side_from_the_start(tmp_path):
    corpus = counting_corpus(tmp_path, 100, n_val=50)
    assert val_starts(corpus, 7, eval_tokens=0).tolist() == [0, 7, 14, 21, 28, 35, 42]
    assert val_starts(corpus, 7, eval_tokens=20).tolist() == [0, 7]
    assert val_starts(corpus, 49, eval_tokens=1).tolist() == [0]
    with pytest.raises(UserError, match="too few for a window"):
        val_starts(corpus, 50, eval_tokens=0)


def test_large_ids_take_four_bytes(tmp_path):
    tokenizer = Tokenizer({"kind": "bytes"})
    tokenizer.vocab_size = 70_000
    with CorpusWriter(tmp_path, tokenizer, source="test") as corpus:
        for split in ("train", "val"):
            corpus.write(split, [1, 69_999, 2])
    assert Corpus(tmp_path).windows("val", [0], 2).tolist() == [[1, 69_999, 2]]


def test_a_corpus_is_replaced_whole_or_not_at_all(tmp_path):
    counting_corpus(tmp_path, 100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), CorpusWriter(tmp_path, BYTES, source="test") as corpus:
        corpus.write("train", [1, 2, 3])
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as f:
        f.write(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as f:
        f.write(b"ne")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as f:
        f.write(b"new")
        f.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_built_in_corpus_is_the_standard_library(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_pystdlib, "__file__", str(tmp_path / "prepare.py"))
    code, out, err = call(prepare_pystdlib.main)
    assert (code, err) == (0, "") and "bigram" in out
    train, val = tokens(tmp_path, "train"), tokens(tmp_path, "val")
    assert 5e6 < len(train) + len(val) < 50e6 and 0.03 < len(val) / len(train) < 0.3
    text = train.astype(np.uint8).tobytes()
    assert open(json.__file__, "rb").read() + b"\0" in text + val.astype(np.uint8).tobytes()
    assert np.count_nonzero(train == 0) > 300  # one ends each file
    assert 1.5 < float(out.split("val loss of ")[1].split()[0]) < 3.5


def test_shakespeare_is_checked_before_anything_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_shakespeare, "__file__", str(tmp_path / "corpus" / "prepare.py"))
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 10

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/input.txt" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for arguments, message in ((f"--url={url}/other", "404"), (f"--url={url}/input.txt", "is not tiny Shakespeare"),
                               ("--url=http://127.0.0.1:1/", "cannot download"), (f"--input={ROOT / 'model.py'}", "is not tiny")):
        code, out, err = call(prepare_shakespeare.main, arguments)
        assert code == 2 and message in err and err.count("\n") == 1
        assert not (tmp_path / "corpus").exists()
    monkeypatch.setattr(prepare_shakespeare, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    assert call(prepare_shakespeare.main, f"--url={url}/input.txt")[0] == 0
    server.shutdown()
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.tokens == {"train": int(0.9 * len(text)), "val": len(text) - int(0.9 * len(text))}
    ids = np.concatenate([tokens(corpus.folder, split) for split in ("train", "val")])
    assert Tokenizer(corpus.tokenizer).decode(ids.tolist()) == text


@pytest.fixture
def small_bpe(monkeypatch):
    """GPT-2's way of splitting a text into words, with a few merges of our own in place of its 50,000 (no download)."""
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    merges = [b"  ", b"\n\n", b"\r\n", b" \n", b"\n ", b" a", b"no", b"in", b"ine", b"\n\n\n", b"x\n", b"\n\xc2", b"\n\xc2\xa0"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    bpe = tiktoken.Encoding("small", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256 + len(merges)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bpe)


@pytest.mark.usefixtures("small_bpe")
@pytest.mark.parametrize("kind", ["bytes", "char", "gpt2"])
def test_text_is_cut_where_tokens_are_not(call, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prepare_text, "FOLDER", tmp_path)
    documents = ["One  line\n\n\n  and another, naïve 😀\r\nline's end\n" * 40, "no line feed at all " * 30,
                 "x\n" * 100 + "x\n\xa0\xa0x\n\u3000y\xa0\n" * 40]
    (tmp_path / "a.txt").write_bytes("<|endoftext|>\n".join(documents[:2]).replace("at all <|", "at all \n<|").encode())
    (tmp_path / "b.txt").write_bytes(documents[2].encode())
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    results = []
    for size in (1 << 20, 64):  # in one piece, and in pieces of 64 bytes
        monkeypatch.setattr(tokenizing, "PIECE", size)
        name = f"{kind}{size}"
        assert call(prepare_text.main, *files, f"--name={name}", f"--tokenizer={kind}", "--val_fraction=0.2")[0] == 0
        results.append(np.concatenate([tokens(tmp_path / name, split) for split in ("train", "val")]))
        corpus = Corpus(tmp_path / name)
        tokenizer = Tokenizer(corpus.tokenizer)
        texts = [tokenizer.decode_bytes(tokens(tmp_path / name, split).tolist()) for split in ("train", "val")]
        end = tokenizer.decode_bytes([tokenizer.end_of_text]).decode()
        assert b"".join(texts).decode() == end.join(documents) + end
        assert 0.15 < len(texts[1]) / len(b"".join(texts)) < 0.21
    assert np.array_equal(*results)


@pytest.mark.usefixtures("small_bpe")
def test_a_text_that_is_not_utf8_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "FOLDER", tmp_path)
    (tmp_path / "a.txt").write_bytes("naïve\n".encode("latin1"))
    code, _, err = call(prepare_text.main, tmp_path / "a.txt", "--tokenizer=gpt2")
    assert code == 2 and "a.txt: the text is not UTF-8" in err and err.count("\n") == 1
    assert not (tmp_path / "mytext" / "meta.json").exists()


def test_half_a_character_can_be_encoded(small_bpe):
    tokenizer = Tokenizer({"kind": "gpt2"})
    assert tokenizer.decode(tokenizer.encode("é\ud800😀").tolist()) == "é\ufffd😀"


@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bytes", "char", "gpt2"])
def test_any_text_comes_back_from_each_tokenizer(small_bpe, kind, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.text() | st.text(alphabet=" \n\r\t\u3000\xa0<|endoftx>anoi'é😀"))
    def check(text):
        spec = {"kind": kind} | ({"chars": "".join(sorted(set(text)))} if kind == "char" else {})
        tokenizer = Tokenizer(spec)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()) == text and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert np.array_equal(ids, tokenizer.encode(text.encode()))

    check()


def test_val_is_never_empty_where_there_is_one_line(call, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "FOLDER", tmp_path)
    (tmp_path / "a.txt").write_text("naïve é😀" * 20)
    assert call(prepare_text.main, tmp_path / "a.txt", "--tokenizer=char")[0] == 0
    corpus = Corpus(tmp_path / "mytext")
    ids = [tokens(corpus.folder, split).tolist() for split in ("train", "val")]
    assert Tokenizer(corpus.tokenizer).decode(ids[0] + ids[1]) == "naïve é😀" * 20 + "\0" and len(ids[1]) > 10


@pytest.mark.parametrize("arguments, message", [
    ([], "name the text files"), (["nowhere.txt"], "no file 'nowhere.txt'"), (["{latin1}", "--tokenizer=char"], "not UTF-8"),
    (["{empty}"], "add text"), (["{text}", "--name=pystdlib"], "plain name"), (["{text}", "--name=../x"], "plain name"),
    (["{text}", "--val_fraction=1"], "between 0 and 1"), (["{text}", "--tokenizer=gpt3"], "bytes | char | gpt2"),
    (["{text}", "--name=.."], "plain name"), (["{text}", "--tokeniser=char"], "did you mean --tokenizer"),
])
def test_mistakes_in_preparing_a_text_are_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(prepare_text, "FOLDER", ROOT / "data" if "--name=pystdlib" in arguments else tmp_path)
    (tmp_path / "latin1").write_bytes("naïve\n".encode("latin1") * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_bytes(b"some text\n" * 10)
    before = list(tmp_path.iterdir())
    code, _, err = call(prepare_text.main, *[a.format(**{p.name: p for p in before}) for a in arguments])
    assert code == 2 and message in err and err.count("\n") == 1
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(before)


def test_an_unreachable_bpe_is_one_line(monkeypatch, tmp_path):
    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer({"kind": "gpt2"})
    assert data.FOLDER == ROOT / "data"
