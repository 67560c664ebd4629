"""Toy experiments: their data against slow searches, the theory against attention, the scripts."""

import time

import induction_toy as toy
from experiments import heads, hop, landscape
from model import GPT

import pytest
import torch
from conftest import cells, read_log
from hypothesis import given, settings
from hypothesis import strategies as st

TINY = ["--seeds=1", "--workers=1", "--device=cpu", "--max_steps=4", "--eval_every=2",
        "--batch_size=4", "--eval_sequences=8", "--width=16", "--n_head=2"]


def test_induction_data_keep_the_rule_and_mask_what_is_known():
    idx, targets, mask = toy.induction_batch(toy.ToyConfig(), seed=1, step=0, size=200)
    assert idx.shape == targets.shape == mask.shape == (200, 32)
    prefixes = set()
    for tokens, nexts, known in zip(idx.tolist(), targets.tolist(), mask.tolist(), strict=True):
        assert nexts[:-1] == tokens[1:]
        for t, (token, target) in enumerate(zip(tokens, nexts, strict=True)):
            followers = {tokens[s + 1] for s in range(t) if tokens[s] == token}
            assert known[t] == bool(followers)
            assert followers <= {target}
        prefixes.add(n := known.index(True))
        assert len(set(tokens[:n])) == len(set(tokens)) == n
    assert prefixes == set(range(8, 17))
    for other in ((1, 1), (2, 0)):  # seed and step
        assert not torch.equal(idx, toy.induction_batch(toy.ToyConfig(), *other, size=200)[0])


def test_guessing_after_the_first_repetition_is_right_as_often_as_stated():
    config = toy.ToyConfig(min_prefix=5, max_prefix=5, vocab_size=6, length=8)
    idx, targets, mask = toy.induction_batch(config, seed=3, step=0, size=10_000)
    assert mask[:, 5].all() and not mask[:, :5].any()
    position = (idx[:, :5] == targets[:, 5:6]).int().argmax(dim=1)  # the first follows no token
    shares = torch.bincount(position) / len(idx)
    assert shares[1:].tolist() == pytest.approx([toy.induction_chance(config)] * 4, abs=0.02)


def test_the_ngram_table_needs_both_tokens():
    idx, targets, mask = toy.ngram_batch(toy.ToyConfig(), seed=1, step=5, size=7)
    assert idx.shape == (200, 2) and len({tuple(pair) for pair in idx.tolist()}) == 200
    assert (targets[:, 0] == -1).all() and not mask[:, 0].any() and mask[:, 1].all()
    for column in (0, 1):  # the best guess from one of the two tokens
        right = [torch.bincount(targets[idx[:, column] == token, 1]).max() for token in range(20)]
        assert sum(right) < 0.35 * 200


def test_hop_answers_equal_a_slow_search():
    config = hop.HopConfig(max_hops=5, length=30, letters=3)
    idx, targets, mask = hop.hop_batch(config, seed=1, step=0, size=100)
    assert set(idx[:, 0].tolist()) == {4, 5, 6, 7, 8}  # 3 letters, the blank, 5 numbers of hops
    assert (targets[:, 0] == -1).all()
    for row, answers, known in zip(idx.tolist(), targets.tolist(), mask.tolist(), strict=True):
        k, x = row[0] - 3, row[1:]
        for start in range(len(x)):
            i = start
            for _ in range(k):
                found = [] if i is None else [j for j in range(1, i + 1) if x[j - 1] == x[i]]
                i = max(found, default=None)
            assert answers[start + 1] == (3 if i is None else x[i])
            assert known[start + 1] == (i is not None)


def test_theorem_2_one_layer_set_by_hand_is_exact_and_is_not_without_the_shift():
    config = toy.ToyConfig()
    model, batch = toy.exact_induction_head(config), toy.induction_batch(config, 5, 0, 256)
    scores = toy.evaluate(config, model, batch)
    assert (scores["accuracy"], scores["accuracy_all"]) == (1.0, 1.0)
    attended = []
    attn = model.blocks[0].attn
    attn.out.register_forward_hook(lambda module, inputs, output: attended.append(inputs[0]))
    idx, targets, mask = batch
    model(idx)
    # attention returns the value of the right token and nothing else
    torch.testing.assert_close(attended[-1][mask], model.embed(targets)[mask], atol=0, rtol=1e-5)
    assert heads.induction_scores(model, idx, targets, mask) == pytest.approx([1.0])
    with torch.no_grad():
        attn.shift["k"].weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1))
    assert toy.evaluate(config, model, batch)["accuracy"] < 0.2
    assert heads.induction_scores(model, idx, targets, mask) == pytest.approx([0.0])


scalar = st.floats(-3, 3)


@settings(max_examples=60, deadline=None)
@given(scalar, scalar, scalar, scalar, st.integers(5, 40), st.data())
def test_theorem_3_closed_form_equals_attention(alpha1, alpha2, beta1, beta2, T, data):
    i = data.draw(st.integers(1, T - 3))
    alpha, beta = torch.tensor([[alpha1, alpha2], [beta1, beta2]], dtype=torch.float64)
    exact = landscape.attention_loss(alpha, beta, T, i).item()
    closed = landscape.closed_form_loss(alpha1, alpha2, beta1, beta2, T)
    assert closed == pytest.approx(exact, abs=1e-9)


def test_a_toy_run_makes_tables_figures_and_logs(tmp_path, call):
    out, err = call(toy.main, *TINY, f"--out_dir={tmp_path}", "--experiment=depth,width,ngram")
    assert not err
    (header,), evals = read_log(tmp_path, "depth.jsonl")
    assert header["config"]["width"] == 16 and header["versions"]["torch"] == torch.__version__
    assert [e["step"] for e in evals if e["model"] == "2 layers, vanilla"] == [0, 2, 4]
    for name in ("depth", "width", "ngram"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 layer, width 8, KV shift " in out and "| 2 layers, width 32, vanilla " in out
    assert "Not all learn 99% of the table: 1 layer, width 8, KV shift;" in out
    assert [row[0] for row in cells(out)[2:7]] == [
        "1 layer, KV shift", "1 layer, vanilla", "2 layers, vanilla", "4 layers, vanilla",
        "1 layer, KV shift, set by hand"]


def test_results_do_not_depend_on_the_number_of_workers(tmp_path, call, monkeypatch):
    class SlowGPT(GPT):  # time enough for another thread to draw random numbers
        def init_weights(self):
            time.sleep(0.05)
            super().init_weights()

    monkeypatch.setattr(toy, "GPT", SlowGPT)
    for workers in (1, 3):
        call(toy.main, *TINY, "--seeds=2", "--experiment=depth", f"--workers={workers}",
             f"--out_dir={tmp_path / str(workers)}")
    one, several = (read_log(tmp_path / n, "depth.jsonl")[1] for n in "13")
    assert one == several and len(one) == 4 * 2 * 3


def test_a_model_that_stays_at_100_percent_stops_early():
    config = toy.with_defaults(toy.ToyConfig(), "ngram")
    model = GPT(toy.make_models(config)["2 layers, width 64, KV shift"])
    evals = list(toy.train(config, model, lambda *args: toy.ngram_batch(config, *args), seed=1))
    assert [e["accuracy"] for e in evals[-3:]] == [1, 1, 1] and evals[-1]["step"] < 150


@pytest.mark.parametrize(("main", "name", "options"), [
    (heads.main, "heads", [*TINY, "--n_head=1"]),
    (landscape.main, "landscape", []),
    (hop.main, "hop", [*TINY, "--max_layers=3", "--max_hops=2", "--length=12"])])
def test_experiments_print_a_table_and_draw_a_figure(main, name, options, tmp_path, call):
    out, err = call(main, *options, f"--out_dir={tmp_path / 'new'}")
    assert not err and "| -" in out
    assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line_and_exit_code_2(call):
    call(toy.main, "--experiment=dept", error="experiment=dept must be one of depth, width, ngram")
    call(toy.main, "--width=10", error="no multiple of 2 n_head=8")
    call(toy.main, "--max_prefix=40", error="max_prefix <= vocab_size")
