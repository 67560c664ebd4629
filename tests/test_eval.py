"""eval.py: losses, bits per byte and choices against direct computations, and the harness."""

import json
import math
import re

import eval as eval_module
from data.tokenizing import Tokenizer
from eval import score
from model import GPT
from train import TrainConfig

import pytest
import torch
from conftest import load, make_corpus, randomize, save_run

CHARS = "\n .abcdefgh"
NEXT = {"a": " ", " ": "b", "b": "c", "c": "d", "d": "."}  # what the model below predicts


@pytest.fixture
def bytes_run(tmp_path):
    """A random model of bytes and its corpus."""
    config = TrainConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=16, block_size=16,
                         dataset=str(make_corpus(tmp_path / "corpus")))
    return save_run(tmp_path / "run", randomize(GPT(config), std=0.2), config, {"kind": "bytes"})


@pytest.fixture
def bigram_run(tmp_path):
    """A model that predicts NEXT: its blocks are zero and its head is a table."""
    config = TrainConfig(vocab_size=len(CHARS), n_layer=1, n_head=2, n_embd=16, block_size=16,
                         tie_embeddings=False)
    model = GPT(config)
    with torch.no_grad():
        model.blocks[0].attn.out.weight.zero_()
        model.blocks[0].mlp.down.weight.zero_()
        model.embed.weight.copy_(torch.eye(16)[: len(CHARS)])
        model.head.weight.zero_()
        for a, b in NEXT.items():
            model.head.weight[CHARS.index(b), CHARS.index(a)] = 5.0
    return save_run(tmp_path / "bigram", model, config, {"kind": "char", "chars": CHARS})


def direct(model, context, continuation):
    """The log-probability and the greedy match, token by token from single forward passes."""
    logprob, greedy = 0.0, True
    for i, token in enumerate(continuation):
        ids = [*context, *continuation[:i]]
        logprobs = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        logprob += logprobs[token].item()
        greedy &= logprobs.argmax().item() == token
    return logprob, greedy


def test_scores_of_padded_batches_equal_those_of_single_tokens(bytes_run):
    model = load(bytes_run / "best.pt")
    pairs = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([9] * 12, [1, 2]), ([7, 7], [3, 3, 3]),
             ([8, 9], [])]
    for batch_size in (1, 3, 16):
        scores = score(model, pairs, batch_size)
        for pair, (logprob, greedy) in zip(pairs, scores, strict=True):
            expected = direct(model, *pair)
            assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])


def test_bits_per_byte_of_a_text_equal_a_direct_sum(bytes_run, tmp_path, call):
    text = "def f(x): return x  # and a few others: é".encode()
    (tmp_path / "a.txt").write_bytes(text)
    out, _ = call(eval_module.main, bytes_run, f"--text={tmp_path / 'a.txt'}")
    ids, model = [0, *text], load(bytes_run / "best.pt")
    nats = -sum(direct(model, *pair)[0] for pair in (
        (ids[:1], ids[1:17]), (ids[16:17], ids[17:33]), (ids[26:33], ids[33:])))  # windows of 16
    assert "text: 42 tokens" in out
    assert f"{nats / 42:.4f} nats" in out and f"{nats / math.log(2) / 42:.4f} bits per byte" in out


def test_the_val_split_has_the_loss_of_training_and_an_induction_score(bytes_run, call):
    out, _ = call(eval_module.main, bytes_run)
    numbers = [float(x) for x in re.findall(r"-?\d\.\d{4}", out)]
    loss, bits, random, repeated, saved = numbers
    assert "592 tokens" in out  # 37 windows of 16
    assert bits == pytest.approx(loss / math.log(2), abs=1e-3)
    assert saved == pytest.approx(random - repeated, abs=2e-4)


def test_the_last_word_and_the_right_choice_are_found(bigram_run, tmp_path, call):
    lines = [{"text": "a bcd."}, {"text": "a bcd"}, {"text": "a bb"},  # two right, one wrong
             {"context": "a", "choices": ["bc", "cb"], "answer": 0},
             {"context": "a", "choices": ["hhhhhhhh", "h"], "answer": 0}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out, _ = call(eval_module.main, bigram_run, f"--jsonl={path}")
    assert "last word: accuracy 0.6667" in out and "(3 texts)" in out
    # the sum prefers short choices; the mean does not
    assert "choices: accuracy 0.5000 by log-probability, 1.0000 by its mean" in out


def test_mistakes_are_one_line_and_exit_code_2(bigram_run, tmp_path, call):
    (tmp_path / "a").write_text('{"text": "a b"}\n{"context": "a"}\n')
    call(eval_module.main, error="pass one run folder")
    call(eval_module.main, bigram_run, "--text=none", error="No such file or directory: none")
    call(eval_module.main, bigram_run, "--batch_size=0", error="batch_size must be")
    call(eval_module.main, bigram_run, f"--jsonl={tmp_path / 'a'}",
         error="each line must have text, or context")


def test_a_harness_task_gives_the_scores_of_direct_computations(bigram_run, tmp_path, call):
    pytest.importorskip("lm_eval")
    docs = [{"q": "a", "choices": ["bc", "cb"], "gold": 0, "text": "a bcd. a"},
            {"q": "a b", "choices": ["h", "cd"], "gold": 1, "text": "bcd bb"}]
    (tmp_path / "docs.jsonl").write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    tasks = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
                  "doc_to_choice: choices\nmetric_list: [{metric: acc}]",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
                   "doc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]",
        "generate": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: ' bcd'\n"
                    "generation_kwargs: {until: ['.'], max_gen_toks: 10}\n"
                    "metric_list: [{metric: exact_match}]"}
    for name, body in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
            f"{tmp_path / 'docs.jsonl'}}}}}\ntest_split: test\n{body}\n")
    out, _ = call(eval_module.main, bigram_run, f"--tasks={','.join(tasks)}",
                  f"--include_path={tmp_path}")
    values = {name: float(re.search(rf"{name} *\|.*?\|\s*(\d\.\d+)\|", out)[1]) for name in tasks}
    model, tokenizer = load(bigram_run / "best.pt"), Tokenizer({"kind": "char", "chars": CHARS})
    nats = sum(-direct(model, [0], tokenizer.encode(doc["text"]).tolist())[0] for doc in docs)
    n_bytes = sum(len(doc["text"]) for doc in docs)
    assert values["choice"] == 0.5
    assert values["rolling"] == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)
    assert values["generate"] == 0.5  # "a" -> " bcd", but "a b" -> "cd"
