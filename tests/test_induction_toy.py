"""The toy experiments: data against brute force, the theory against the attention itself, and the script as it is called."""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, randomize
from hypothesis import given, settings
from hypothesis import strategies as st

import induction_toy as toy
from config import UserError, parse
from data import lock
from model import GPT, GPTConfig

TINY = {"seeds": 1, "workers": 1, "device": "cpu", "width": 16, "n_head": 2, "max_steps": 4, "eval_every": 2, "batch_size": 4,
        "eval_sequences": 8, "length": 12, "min_prefix": 4, "max_prefix": 6, "vocab_size": 9, "width_sizes": "8 16",
        "width_steps": 3, "ngram_sizes": "1x8 2x16", "ngram_pairs": 20, "ngram_steps": 3, "landscape_sizes": "8 16",
        "hop_depths": "1 2", "hop_max": 2, "hop_length": 12, "hop_steps": 3}


def options(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


# --- data


def test_induction_data_keep_the_rule_and_ask_for_what_is_known():
    config = toy.ToyConfig()
    idx, targets, asked = toy.induction_batch(config, seed=1, step=0, size=200)
    assert idx.shape == targets.shape == asked.shape == (200, 32)
    prefixes = set()
    for tokens, answers, known in zip(idx.tolist(), targets.tolist(), asked.tolist(), strict=True):
        assert answers[:-1] == tokens[1:]
        for t, (token, answer) in enumerate(zip(tokens, answers, strict=True)):
            followers = {tokens[s + 1] for s in range(t) if tokens[s] == token}
            assert known[t] == bool(followers)
            assert not followers or followers == {answer}
        # what has been seen once only is followed by something new, but at the jump
        prefixes.add(n := known.index(True))
        assert len(set(tokens[:n])) == n and len(set(tokens)) == n
    assert prefixes == set(range(8, 17))


def test_the_answer_at_the_first_predictable_position_is_any_of_the_others():
    """Chance is what the best guess without the order is worth: every other token seen must be as likely as the next."""
    config = toy.ToyConfig(min_prefix=3, max_prefix=5, vocab_size=6, length=8)
    idx, targets, asked = toy.induction_batch(config, seed=3, step=0, size=30_000)
    first = asked.float().argmax(dim=1)
    random, right, rank, place = np.random.default_rng(0), [], [], []
    for tokens, answers, n in zip(idx.tolist(), targets.tolist(), first.tolist(), strict=True):
        others = sorted(set(tokens[:n]) - {tokens[n]})
        right.append(answers[n] == random.choice(others))
        if n == 5:
            rank.append(others.index(answers[n]))
            place.append(tokens.index(answers[n]) - 1)  # the first token follows none
    assert np.mean(right) == pytest.approx(toy.induction_chance(config), abs=0.012)  # 4 standard deviations
    for counts in (np.bincount(rank), np.bincount(place)):  # neither the token nor where it stood gives the answer away
        assert counts / len(rank) == pytest.approx([0.25] * 4, abs=0.02)


def test_ngram_table_needs_both_tokens():
    idx, targets, asked = toy.ngram_batch(toy.ToyConfig(), seed=1, step=5, size=7)
    assert idx.shape == (200, 2) and len({tuple(pair) for pair in idx.tolist()}) == 200
    assert (targets[:, 0] == -1).all() and not asked[:, 0].any() and asked[:, 1].all()
    assert len(targets[:, 1].unique()) == 20
    for column in (0, 1):  # the best guess from one of the tokens alone
        known = sum(torch.bincount(targets[idx[:, column] == token, 1]).max().item() for token in range(20))
        assert known < 0.35 * 200


def test_hop_answers_are_those_of_a_slow_search():
    config = toy.ToyConfig(hop_max=5, hop_length=30, hop_letters=3)
    idx, targets, asked = toy.hop_batch(config, seed=1, step=0, size=100)
    assert set(idx[:, 0].tolist()) == {4, 5, 6, 7, 8}  # 3 letters, the blank, and one id for each number of hops
    assert (targets[:, 0] == -1).all()
    for row, answers, known in zip(idx.tolist(), targets.tolist(), asked.tolist(), strict=True):
        k, x = row[0] - 3, row[1:]
        for start in range(len(x)):
            i = start
            for _ in range(k):
                found = [j for j in range(1, i + 1) if x[j - 1] == x[i]] if i is not None else []
                i = max(found, default=None)
            assert answers[start + 1] == (3 if i is None else x[i])
            assert known[start + 1] == (i is not None)


@pytest.mark.parametrize("make_batch", [toy.induction_batch, toy.hop_batch])
def test_a_batch_is_a_function_of_seed_and_step(make_batch):
    first = make_batch(toy.ToyConfig(), 1, 7, 8)[0]
    torch.manual_seed(99)
    assert torch.equal(first, make_batch(toy.ToyConfig(), 1, 7, 8)[0])
    assert not torch.equal(first, make_batch(toy.ToyConfig(), 1, 8, 8)[0])
    assert not torch.equal(first, make_batch(toy.ToyConfig(), 2, 7, 8)[0])


# --- theory and heads


scalar = st.floats(-3, 3)


@settings(max_examples=60, deadline=None)
@given(scalar, scalar, scalar, scalar, st.integers(5, 40), st.data())
def test_closed_form_is_the_attention(alpha1, alpha2, beta1, beta2, T, data):
    i = data.draw(st.integers(1, T - 3))
    alpha, beta = (torch.tensor(pair, dtype=torch.float64) for pair in ((alpha1, alpha2), (beta1, beta2)))
    exact = toy.attention_loss(alpha, beta, T, i).item()
    assert toy.closed_form_loss(alpha1, alpha2, beta1, beta2, T) == pytest.approx(exact, abs=1e-9)


def test_gradient_descent_ends_at_the_induction_head():
    for record in toy.landscape_descents(toy.ToyConfig(landscape_sizes="8 32")):
        assert record["path"][-1][:2] == [0, 1]
        losses = [loss for _, _, loss in record["path"]]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kv_shift", ["none", "kv"])
def test_attention_weights_are_those_of_the_model(kv_shift):
    model = randomize(GPT(GPTConfig(block_size=10, vocab_size=9, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, kv_shift=kv_shift)))
    idx = torch.randint(9, (3, 10), generator=torch.Generator().manual_seed(0))
    block = model.blocks[0]
    x = block.norm_attn(model.embed(idx))
    v = block.attn.project(x)[2].view(3, 10, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)  # (B, H, T, D)
    y = (toy.attention_weights(model, idx) @ v).transpose(1, 2).reshape(3, 10, 32)
    torch.testing.assert_close(block.attn.out(y), block.attn(x, model.cos, model.sin))


def test_induction_score_is_one_for_an_induction_head_and_zero_for_the_current_token(monkeypatch):
    config = toy.ToyConfig()
    model = GPT(toy.models(config, "heads")["1 layer, KV shift"])

    def perfect_and_blind(model, idx):
        B, T = idx.shape
        perfect = torch.zeros(B, T, T)
        for b in range(B):
            for t in range(T):
                for s in range(1, t + 1):
                    perfect[b, t, s] = idx[b, s - 1] == idx[b, t]
        return torch.stack([perfect / perfect.sum(-1, keepdim=True).clamp(min=1), torch.eye(T).expand(B, T, T)], dim=1)

    monkeypatch.setattr(toy, "attention_weights", perfect_and_blind)
    assert toy.inspect_heads(config, model)["induction_score"] == pytest.approx([1, 0])


# --- the script


def test_quick_preset_as_users_call_it(tmp_path, call):
    command = [sys.executable, ROOT / "induction_toy.py", ROOT / "config/toy_quick.py", "--out_dir=here", "--workers=2",
               "--device=cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert "left" in result.stdout and "| steps to 99% |" in result.stdout
    header, *records = map(json.loads, (tmp_path / "here/depth.jsonl").read_text().splitlines())
    end = {r["model"]: r for r in records if r.get("done")}
    chance = toy.induction_chance(toy.ToyConfig(**header["config"]))
    assert end["1 layer, KV shift"]["accuracy"] > 0.99
    assert abs(end["1 layer, vanilla"]["accuracy"] - chance) < 0.08  # 3 standard deviations of 256 guesses
    assert end["2 layers, vanilla"]["accuracy"] < 0.9
    picture = tmp_path / "here/depth.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    code, out, _ = call(toy.main, f"--out_dir={tmp_path / 'here'}", "--plot_only=True")
    assert code == 0 and picture.exists() and "to train" not in out
    assert [line for line in out.splitlines() if line.startswith("|")] == [
        line for line in result.stdout.splitlines() if line.startswith("|")], "the same table"
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["depth.jsonl", "depth.png"]


def test_all_makes_one_page(tmp_path, call):
    code, out, err = call(toy.main, *options(TINY), "--experiment=all", f"--out_dir={tmp_path}")
    assert (code, err) == (0, "")
    page = (tmp_path / "report.md").read_text()
    for name in toy.EXPERIMENTS:
        assert f"({name}.png)" in page and (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = call(toy.main, *options(TINY), "--experiment=width", f"--out_dir={tmp_path}", "--seeds=2")
    assert "width: 4 models to train" in out, "those of seed 1 are there already"
    code, out, err = call(toy.main, *options(TINY), "--experiment=width", f"--out_dir={tmp_path}", "--seeds=2")
    assert "is complete" in out
    code, out, err = call(toy.main, *options(TINY), "--experiment=width", f"--out_dir={tmp_path}", "--width_steps=2")
    assert "width: 4 models to train" in out and (tmp_path / "width.old-1").exists()
    assert "is complete" in call(toy.main, *options(TINY), "--experiment=hop", f"--out_dir={tmp_path}", "--width_steps=2")[1]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock(tmp_path))  # a second run's figures would be lost
        assert "another process is writing to" in call(toy.main, *options(TINY), f"--out_dir={tmp_path}")[2]


@pytest.mark.parametrize("preset", sorted(path.name for path in (ROOT / "config").glob("toy_*.py")))
def test_presets_run(preset, tmp_path, call):
    config = parse(toy.ToyConfig, [str(ROOT / "config" / preset)])
    tiny = {name: value for name, value in TINY.items() if name not in ("n_head", "width")} | {"width": 2 * config.n_head}
    code, out, err = call(toy.main, ROOT / "config" / preset, *options(tiny), f"--out_dir={tmp_path}")
    assert (code, err) == (0, "") and (tmp_path / f"{config.experiment}.png").exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    config = toy.ToyConfig(**TINY | {"max_steps": 8, "out_dir": str(tmp_path)})
    key = ("1 layer, KV shift", 1)
    whole = toy.train(config, "depth", key)
    clock, evaluate = iter(range(0, 10**6, 100)), toy.evaluate  # every look at the clock is more than a minute later
    monkeypatch.setattr(toy.time, "perf_counter", lambda: next(clock))

    def killed_at_step_6(*arguments):
        killed_at_step_6.calls += 1
        if killed_at_step_6.calls == 4:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    killed_at_step_6.calls = 0
    monkeypatch.setattr(toy, "evaluate", killed_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        toy.train(config, "depth", key)
    monkeypatch.setattr(toy, "evaluate", lambda *arguments: killed_at_step_6(*arguments))  # counts on: 2 evaluations are left
    resumed = toy.train(config, "depth", key)
    assert killed_at_step_6.calls == 4 + 2
    assert [r | {"seconds": 0} for r in resumed] == [r | {"seconds": 0} for r in whole]


def test_a_worker_that_dies_ends_the_run():
    with pytest.raises(UserError, match="has died"):
        list(toy.each_trained(os._exit, [1, 1], workers=2))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--experiment=dept"], "must be depth"),
    (["--widht=8"], "did you mean --width="),
    (["--width=10"], "divisible by 2 * n_head"),
    (["--width_sizes=8,16"], "whole numbers"),
    (["--ngram_sizes=8"], "'1x8 2x64'"),
    (["--max_prefix=40"], "max_prefix=40"),
    (["--ngram_pairs=401"], "at most"),
    (["--landscape_sizes=4"], "at least 5"),
    (["--seeds=0"], "seeds=0"),
    (["--learning_rate=-1"], "learning_rate"),
    (["--plot_only=True"], "run the experiment first"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, call):
    code, out, err = call(toy.main, f"--out_dir={tmp_path}", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
