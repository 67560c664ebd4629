"""The mathematics: the shift's equation, what it can do, and that a cache changes nothing."""

import ast
import itertools
import re

from model import GPT, GPTConfig, KVShift, sample

import pytest
import torch
from conftest import ROOT, load, randomize
from hypothesis import given, settings
from hypothesis import strategies as st

V, T = 11, 16  # vocab_size and block_size of the models here
SHIFTS, PER = ["kv", "k", "v", "qkv"], ["head", "channel"]
WEIGHTS = ["free", "gate", "clamp", "input"]
PLACES = [*({"kv_shift": kind} for kind in ["none", *SHIFTS]),
          *({"kv_shift": "none", "shift_at": place} for place in ("block", "embedding"))]


def tiny(seed=0, **more) -> GPT:
    torch.manual_seed(seed)
    sizes = {"block_size": T, "vocab_size": V, "n_layer": 2, "n_head": 4, "n_embd": 16}
    return GPT(GPTConfig(**sizes | more))


def formula(x, w):
    """y_t = sum_i w_i x_{t-i}, term by term: w (window, 1 or B, 1 or T, H, 1 or D)."""
    y, w = torch.zeros_like(x), w.expand(-1, *x.shape)
    for b, t, h, d in itertools.product(*map(range, x.shape)):
        for i in range(min(len(w), t + 1)):
            y[b, t, h, d] += w[i, b, t, h, d] * x[b, t - i, h, d]
    return y


@pytest.mark.parametrize("window, weights, per", [*itertools.product([2, 3, 5], WEIGHTS, PER)])
def test_the_shift_is_the_papers_equation(window, weights, per):
    shift = randomize(KVShift(2, 3, window, per, weights), std=1.0)
    w, x = shift.weight.detach()[:, None, None], torch.randn(2, 7, 2, 3)
    gated, size = weights in ("gate", "input"), 3 if per == "channel" else 1
    assert w.shape == (window - gated, 1, 1, 2, size)
    if weights == "clamp":
        w = w.clamp(0, 1)
    if weights == "input":
        w = w + torch.stack([(x * m).sum(-1, keepdim=True) for m in shift.map.detach()])
    if gated:
        w = torch.cat([w.exp(), torch.ones_like(w[:1])]) / (w.exp().sum(dim=0) + 1)
    torch.testing.assert_close(shift(x), formula(x, w))
    if weights == "clamp":  # the gradient is that of a free scalar, also outside the interval
        (expected,) = torch.autograd.grad(formula(x, w.requires_grad_()).sum(), w)
        (gradient,) = torch.autograd.grad(shift(x).sum(), shift.weight)
        torch.testing.assert_close(gradient[:, None, None], expected)


def test_the_shift_works_without_the_rest_of_model_py():
    tree = ast.parse((ROOT / "model.py").read_text())
    source = next(ast.unparse(node) for node in tree.body if getattr(node, "name", "") == "KVShift")
    names = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(source, names)
    torch.manual_seed(0)
    shift, x = names["KVShift"](n_head=2, head_dim=4), torch.randn(2, 5, 2, 4)
    torch.testing.assert_close(shift(x), formula(x, shift.weight.detach()[:, None, None]))
    assert 0 <= shift.weight.min() and shift.weight.max() <= 1  # initialized by the constructor


@pytest.mark.parametrize("place, window, weights", [*itertools.product(
    PLACES, [2, 3], ["free", "clamp"])])
def test_identity_initialization_is_the_vanilla_model_bit_for_bit(place, window, weights):
    vanilla = tiny(kv_shift="none")
    shifted = tiny(**place, shift_window=window, shift_weights=weights, shift_init="identity")
    idx = torch.randint(V, (3, T))
    assert torch.equal(shifted(idx), vanilla(idx))


def test_induction_initialization_shifts_the_keys_and_nothing_else():
    shift = tiny(kv_shift="qkv", shift_init="induction", shift_learned=False).blocks[1].attn.shift
    weights = {name: shift[name].weight[:, 0, 0].tolist() for name in "qkv"}
    assert weights == {"q": [1, 0], "k": [0, 1], "v": [1, 0]}
    assert not any(p.requires_grad for p in shift.parameters())


def test_without_rotary_positions_the_order_matters_to_the_shift_only():
    idx = torch.arange(T)[None] % V
    swapped = idx[:, [1, 0, *range(2, T)]]
    for kv_shift in ("none", "kv"):
        model = randomize(tiny(kv_shift=kv_shift, n_layer=1, rope_base=0))
        same = torch.allclose(model(idx)[:, -1], model(swapped)[:, -1], atol=1e-5)
        assert same == (kv_shift == "none")


@pytest.mark.parametrize("kv_shift, weights", [*itertools.product(SHIFTS, WEIGHTS)])
def test_one_seed_gives_vanilla_and_shifted_models_the_same_other_weights(kv_shift, weights):
    vanilla = dict(tiny(kv_shift="none").named_parameters())
    model = tiny(kv_shift=kv_shift, shift_weights=weights)
    shifted = dict(model.named_parameters())
    assert all(torch.equal(p, shifted[name]) for name, p in vanilla.items())
    assert list(model.blocks[0].attn.shift) == list("qkv" if kv_shift == "qkv" else kv_shift)
    for block in model.blocks:  # also with a variant that has a matrix of its own
        block.attn.shift["x"] = torch.nn.Linear(3, 3)
    torch.manual_seed(7)
    model.init_weights()
    other = tiny(seed=7, kv_shift="none")
    assert all(torch.equal(p, shifted[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize("weights, window", [*itertools.product(WEIGHTS, [2, 3])])
def test_initial_weights_are_uniform_and_sum_to_one(weights, window):
    torch.manual_seed(0)
    shift = KVShift(8000, 1, window, weights=weights)
    w = torch.stack(shift.weights(torch.randn(1, 1, 8000, 1))).detach().view(window, 8000)
    if weights != "clamp" or window == 2:  # the last of three may be negative, and is clamped
        torch.testing.assert_close(w.sum(dim=0), torch.ones(8000))
    if weights in ("free", "clamp") or window == 2:  # sigmoid(a) ~ U(0, 1)
        assert (torch.histc(w[0], bins=10, min=0, max=1) / 8000 - 0.1).abs().max() < 0.02


def readme_variant() -> type[KVShift]:
    """GatedShift, whose mix depends on the row itself."""
    readme, names = (ROOT / "README.md").read_text(), {"KVShift": KVShift, "torch": torch}
    exec(re.search(r"```python\n(class GatedShift.*?)```", readme, re.DOTALL)[1], names)
    return names["GatedShift"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cache_gives_the_same_logits_in_any_chunking(data):
    draw = data.draw
    model = tiny(n_kv_head=draw(st.sampled_from([1, 2, 4])), **draw(st.sampled_from(PLACES)),
                 shift_window=draw(st.integers(2, 4)), shift_per=draw(st.sampled_from(PER)),
                 shift_weights=draw(st.sampled_from(WEIGHTS)))
    if draw(st.booleans()) and model.config.shift_at == "attention":
        # a data-dependent subclass decodes without further code
        attn = model.blocks[1].attn
        attn.shift["k"] = readme_variant()(attn.n_kv_head, attn.head_dim)
    randomize(model, seed=draw(st.integers(0, 99)))
    n, B = draw(st.integers(1, T)), draw(st.integers(1, 3))
    idx = torch.randint(V, (B, n))
    cuts = sorted(draw(st.sets(st.integers(1, T), max_size=T)) - set(range(n, T + 1)))
    full = model(idx)  # with gradients enabled: a cache works all the same
    for chunks in (cuts, range(1, n)):  # in chunks, and token by token
        cache = model.new_cache(B, max_length=n)
        logits = [model(chunk, cache=cache) for chunk in idx.tensor_split(list(chunks), dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-5, rtol=1e-5)
    alone = torch.cat([model(row[None]) for row in idx])
    torch.testing.assert_close(alone, full, atol=1e-5, rtol=1e-5)


def test_the_variant_in_the_readme_is_trained_saved_loaded_and_decoded(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("model.KVShift", readme_variant())
    fit(tmp_path / "a", optimizer="muon")
    model, idx = randomize(load(tmp_path / "a/ckpt.pt")), torch.randint(256, (2, T))
    cache = model.new_cache(2)
    logits = [model(chunk, cache=cache) for chunk in idx.split([3, 1, 1, 4, 7], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), atol=1e-5, rtol=1e-5)


def test_more_tokens_than_the_context_or_the_cache_holds_are_an_error():
    model, token = tiny(), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model(token.expand(1, 17))
    for cache, length in ((model.new_cache(1, 5), 5), (model.new_cache(1, 99), T)):
        model(token.expand(1, length), cache=cache)
        with pytest.raises(ValueError, match=f"{length + 1} tokens do not fit"):
            model(token, cache=cache)


@pytest.mark.parametrize("prompt_length, block_size", [(3, 16), (16, 16), (40, 16), (1, 1), (3, 2)])
def test_greedy_text_continues_beyond_the_context_as_documented(prompt_length, block_size):
    model = randomize(tiny(block_size=block_size))
    prompt = torch.randint(V, (2, prompt_length))
    text, context = prompt, prompt[:, -block_size:]
    for _ in range(40):  # the rule of `GPT.stream`, without a cache
        if context.size(1) > block_size:
            context = text[:, -max(1, block_size // 2) :]
        token = model(context)[:, -1].argmax(-1, keepdim=True)
        text, context = torch.cat([text, token], dim=1), torch.cat([context, token], dim=1)
    assert torch.equal(model.generate(prompt, 40, temperature=0), text)
    assert torch.equal(model.generate(prompt, 40, temperature=5.0, top_k=1), text)
    assert torch.equal(model.generate(prompt, 40, temperature=5.0, top_p=1e-9), text)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_draws_follow_the_filtered_probabilities():
    logits, inf = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]), torch.inf
    cases = [({}, logits), ({"temperature": 2.0}, logits / 2),
             ({"temperature": 1e-45}, torch.tensor([0.0, -inf, -inf, -inf, -inf])),
             ({"top_k": 2}, torch.tensor([2.0, 1.0, -inf, -inf, -inf])),
             ({"top_p": 0.9}, torch.tensor([2.0, 1.0, 0.0, -inf, -inf])),  # .64 + .24 < .9
             ({"top_k": 3, "top_p": 0.6}, torch.tensor([2.0, -inf, -inf, -inf, -inf]))]
    for options, kept in cases:
        generator = torch.Generator().manual_seed(0)
        draws = sample(logits.repeat(40_000, 1), generator=generator, **options)
        shares = torch.bincount(draws, minlength=5) / len(draws)
        assert (shares - kept.softmax(0)).abs().max() < 0.01, options
        assert (shares[kept == -inf] == 0).all(), options
    assert len(set(sample(torch.zeros(1000, 5), top_k=2).tolist())) == 2  # also where logits tie


def test_generation_stops_when_all_sequences_have_produced_the_stop_token():
    model = randomize(tiny())
    prompt = torch.randint(V, (2, 3))
    free = model.generate(prompt, 12, temperature=0)
    stop = free[0, 5].item()
    stopped = model.generate(prompt, 12, temperature=0, stop_token=stop)
    for row, expected in zip(stopped[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(row)
        assert row == expected[:end] + [stop] * (len(row) - end)


def test_the_loss_ignores_minus_one_in_whole_and_in_chunks():
    model = randomize(tiny())
    idx, targets = torch.randint(V, (2, 3, T))
    targets[0, :5] = -1
    logits = model(idx).flatten(0, 1).log_softmax(-1)
    picked = -logits[torch.arange(3 * T), targets.flatten()][targets.flatten() >= 0]
    gradients = []
    for options in (None, torch.nn.LinearCrossEntropyOptions()):
        model.loss_options = options
        torch.testing.assert_close(model(idx, targets, reduction="sum"), picked.sum())
        loss = model(idx, targets)
        torch.testing.assert_close(loss, picked.mean())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)
    model.loss_options = None
    assert model(idx, torch.full_like(targets, -1)).item() == 0.0  # and not NaN


def test_bfloat16_stays_bfloat16():
    model, idx = tiny().to(torch.bfloat16), torch.randint(V, (1, 4))
    assert model(idx).dtype == model(idx, cache=model.new_cache(1)).dtype == torch.bfloat16


@pytest.mark.parametrize("options, message", [
    ({"n_embd": 18}, "n_embd=18"), ({"n_kv_head": 3}, "n_kv_head=3"), ({"n_layer": 0}, "n_layer=0"),
    ({"shift_window": 1}, "shift_window=1"), ({"dropout": 1.0}, "dropout=1.0"),
    ({"shift_init": "identity", "shift_weights": "gate"}, "gate cannot reach"),
    ({"shift_init": "induction", "shift_weights": "input"}, "input cannot reach"),
    ({"shift_at": "block"}, "needs kv_shift=none"),
    ({"rope_base": float("nan")}, "rope_base=nan"), ({"norm_eps": 0.0}, "norm_eps=0.0")])
def test_options_that_make_no_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
