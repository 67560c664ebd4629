"""The mathematics: what KV shift is, what it can do, and that decoding with a cache changes nothing."""

import itertools

import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from estimate import PEAK_FLOPS, estimate_flops, peak_flops
from model import GPT, GPTConfig, KVShift, sample

SHIFTS = ["kv", "k", "v", "qkv"]
KINDS = ["free", "gate", "clamp"]


def tiny(seed=0, **more) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{"block_size": 16, "vocab_size": 11, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16} | more))


def shift_parameters(model) -> dict:
    return {name: p for name, p in model.named_parameters() if ".shift." in name}


@pytest.mark.parametrize("kv_shift, window, kind", [*itertools.product(SHIFTS, [2, 3, 16], ["free", "clamp"])])
def test_identity_weights_are_vanilla_bit_for_bit(kv_shift, window, kind):
    vanilla = randomize(tiny(kv_shift="none"))
    shifted = tiny(kv_shift=kv_shift, shift_window=window, shift_weights=kind)
    shifted.load_state_dict(vanilla.state_dict(), strict=False)
    with torch.no_grad():
        for p in shift_parameters(shifted).values():
            p.zero_()
            p[0] = 1.0
    idx = torch.randint(11, (3, 16))
    assert torch.equal(shifted(idx), vanilla(idx))


@pytest.mark.parametrize("kv_shift, window, kind", [*itertools.product(SHIFTS, [2, 3], KINDS)])
def test_one_seed_gives_vanilla_and_shifted_the_same_other_weights(kv_shift, window, kind):
    vanilla = dict(tiny(kv_shift="none").named_parameters())
    shifted = dict(tiny(kv_shift=kv_shift, shift_window=window, shift_weights=kind).named_parameters())
    assert all(torch.equal(p, shifted[name]) for name, p in vanilla.items())
    assert {name.split(".")[-1] for name in set(shifted) - set(vanilla)} == {
        "kv": {"alpha", "beta"}, "k": {"alpha"}, "v": {"beta"}, "qkv": {"alpha", "beta", "gamma"}}[kv_shift]


@pytest.mark.parametrize("kind, window", [*itertools.product(KINDS, [2, 3])])
def test_initial_weights_are_uniform_and_sum_to_one(kind, window):
    many = {"n_layer": 200, "n_head": 16, "n_kv_head": 16, "n_embd": 32, "ffn_size": 1}
    model = tiny(shift_weights=kind, shift_window=window, **many)
    shifts = [block.attn.shift for block in model.blocks]
    w = torch.cat([s.weights(p).detach() for s in shifts for p in (s.alpha, s.beta)], dim=1)  # (W, 6400)
    if kind != "clamp" or window == 2:  # a longer window's last weight may be negative, and is then clamped
        torch.testing.assert_close(w.sum(0), torch.ones(6400))
    if window == 2 or kind != "gate":
        deciles = torch.histc(w[0], bins=10, min=0, max=1) / 6400
        assert (deciles - 0.1).abs().max() < 0.02
    alpha, beta = w[0].view(200, 2, 16).transpose(0, 1).flatten(1)
    assert abs(torch.corrcoef(torch.stack([alpha, beta]))[0, 1]) < 0.1  # they are drawn apart


@pytest.mark.parametrize("kv_shift, window, kind, per", [*itertools.product(SHIFTS, [2, 3, 5], KINDS, ["head", "channel"])])
def test_shift_is_the_papers_equation(kv_shift, window, kind, per):
    H, K, D, T = 4, 2, 4, 7
    config = GPTConfig(n_head=H, n_kv_head=K, n_embd=H * D, kv_shift=kv_shift, shift_window=window, shift_weights=kind,
                       shift_per=per)
    shift = randomize(KVShift(config), std=1.0)
    qkv = [torch.randn(2, T, heads * D) for heads in (H, K, K)]
    mixed = shift(*qkv)
    for x, got, stored, name in zip(qkv, mixed, (shift.gamma, shift.alpha, shift.beta), "qkv", strict=True):
        if name not in kv_shift:
            assert stored is None and got is x
            continue
        assert stored.size(1) == (x.size(2) if per == "channel" else x.size(2) // D)
        for channel, t in itertools.product(range(x.size(2)), range(T)):
            w = stored[:, channel if per == "channel" else channel // D]
            if kind == "gate":
                w = torch.cat([w.exp(), torch.ones(1)]) / (w.exp().sum() + 1)
            if kind == "clamp":
                w = w.clamp(0, 1)
            want = sum(w[i] * x[:, t - i, channel] for i in range(window) if t - i >= 0)
            torch.testing.assert_close(got[:, t, channel], want)


@pytest.mark.parametrize("kv_shift, window, kind", [("none", 2, "free"), *itertools.product(SHIFTS, [2, 3], KINDS)])
def test_no_logit_depends_on_a_later_token(kv_shift, window, kind):
    model = randomize(tiny(kv_shift=kv_shift, shift_window=window, shift_weights=kind))
    idx = torch.randint(11, (1, 16))
    for t in (1, 7, 15):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % 11
        a, b = model(idx), model(other)
        assert torch.equal(a[:, :t], b[:, :t])
        assert not torch.allclose(a[:, t], b[:, t], atol=1e-3)


def test_one_layer_with_hand_set_weights_is_an_exact_induction_head():
    """Theorem 2: alpha = (0, 1), beta = (1, 0) and one-hot embeddings make one layer copy what followed."""
    V, T = 10, 12
    # at this base the first frequency alone turns much, and its two dimensions (0 and 16) are left unused
    model = tiny(block_size=T, vocab_size=V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, rope_base=1e30, tie_embeddings=False)
    one_hot = torch.zeros(V, 32)
    one_hot[torch.arange(V), torch.arange(1, V + 1)] = 1.0
    attn = model.blocks[0].attn
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.zero_()
        model.embed.weight[:V] = one_hot
        model.head.weight[:V] = one_hot
        attn.qkv.weight[:32] = 100.0 * torch.eye(32)  # sharp: exp(-100 ...) is zero in float32
        attn.qkv.weight[32:64] = torch.eye(32)
        attn.qkv.weight[64:] = torch.eye(32)
        attn.out.weight.copy_(torch.eye(32))
        attn.shift.alpha.copy_(torch.tensor([[0.0], [1.0]]))
        attn.shift.beta.copy_(torch.tensor([[1.0], [0.0]]))
    attended = []
    attn.out.register_forward_hook(lambda module, inputs, output: attended.append(output))
    for seed in range(20):
        permutation = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
        idx = torch.cat([permutation, permutation[3:5]])[None]  # ... A B C ... A B: after A comes B, after B comes C
        logits = model(idx)
        assert logits[0, V:].argmax(-1).tolist() == permutation[4:6].tolist()
        # not only the likeliest: attention returns the right token's value and nothing else
        value = one_hot[permutation[4:6]] * 32**0.5  # RMSNorm's scale
        torch.testing.assert_close(attended[-1][0, V:], value, atol=1e-4, rtol=0)
    with torch.no_grad():  # and the same weights without the shift do not
        attn.shift.alpha.copy_(torch.tensor([[1.0], [0.0]]))
    assert (model(idx)[0, V:].argmax(-1) != permutation[4:6]).all()


@pytest.mark.parametrize("kv_shift, window, kind", [*itertools.product(["kv", "qkv"], [2, 3], KINDS)])
def test_gradients_of_the_scalars_agree_with_finite_differences(kv_shift, window, kind):
    model = tiny(kv_shift=kv_shift, shift_window=window, shift_weights=kind).double()
    randomize(model)
    idx, targets = torch.randint(11, (2, 16)), torch.randint(11, (2, 16))
    names, values = zip(*shift_parameters(model).items(), strict=True)
    if kind == "clamp":  # inside, where there is a gradient
        values = [torch.rand_like(p) * 0.8 + 0.1 for p in values]

    def loss(*scalars):
        return torch.func.functional_call(model, dict(zip(names, scalars, strict=True)), (idx, targets))

    assert torch.autograd.gradcheck(loss, [p.detach().requires_grad_() for p in values])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_cached_logits_are_those_of_one_full_pass_in_any_chunking(data):
    n_kv_head = data.draw(st.sampled_from([1, 2, 4]))
    kv_shift, kind = data.draw(st.sampled_from(["none", *SHIFTS])), data.draw(st.sampled_from(KINDS))
    window, T, B = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 16)), data.draw(st.integers(1, 3))
    per = data.draw(st.sampled_from(["head", "channel"]))
    model = tiny(n_kv_head=n_kv_head, kv_shift=kv_shift, shift_window=window, shift_weights=kind, shift_per=per)
    randomize(model, seed=data.draw(st.integers(0, 99)))
    idx = torch.randint(11, (B, T))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, T - 1)), max_size=T)) - {T})
    chunkings = [cuts, list(range(1, T))]  # at random, and token by token
    with torch.no_grad():
        full = model(idx)
        for chunking in chunkings:
            cache = model.new_cache(B, max_length=T)
            logits = torch.cat([model(chunk, cache=cache) for chunk in idx.tensor_split(chunking, dim=1)], dim=1)
            torch.testing.assert_close(logits, full, atol=1e-5, rtol=1e-5)
        cache = model.new_cache(B)
        logits = [model.step(idx[:, t, None], cache, torch.tensor([t])) for t in range(T)]  # as it is compiled
        torch.testing.assert_close(torch.stack(logits, dim=1), full, atol=1e-5, rtol=1e-5)
        alone = torch.cat([model(row[None]) for row in idx])  # and a batch is its sequences
        torch.testing.assert_close(alone, full, atol=1e-5, rtol=1e-5)


def test_a_text_too_long_for_the_context_is_an_error():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.new_cache(1)
    model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("prompt_length, block_size", [(3, 16), (16, 16), (40, 16), (1, 1), (3, 2), (5, 5)])
def test_greedy_text_goes_on_beyond_the_context_as_documented(prompt_length, block_size):
    model = randomize(tiny(block_size=block_size))
    prompt = torch.randint(11, (2, prompt_length))
    text, context = prompt, prompt[:, -block_size:]
    for _ in range(40):  # the rule of `GPT.stream`, without a cache
        if context.size(1) > block_size:
            context = text[:, -max(1, block_size // 2) :]
        token = model(context)[:, -1].argmax(-1, keepdim=True)
        text, context = torch.cat([text, token], 1), torch.cat([context, token], 1)
    assert torch.equal(model.generate(prompt, 40, temperature=0), text)
    assert torch.equal(model.generate(prompt, 40, temperature=5.0, top_k=1), text)
    assert torch.equal(model.generate(prompt, 40, temperature=5.0, top_p=1e-9), text)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_draws_follow_the_filtered_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    cases = [({"temperature": 1.0}, logits), ({"temperature": 2.0}, logits / 2),
             ({"top_k": 2}, torch.tensor([2.0, 1.0] + [-torch.inf] * 3)),
             ({"temperature": 1e-45}, torch.tensor([0.0] + [-torch.inf] * 4)),
             # 0.64 + 0.24 < 0.9, so the third stays and the fourth goes
             ({"top_p": 0.9}, torch.tensor([2.0, 1.0, 0.0, -torch.inf, -torch.inf])),
             ({"top_k": 3, "top_p": 0.6}, torch.tensor([2.0] + [-torch.inf] * 4))]
    for options, kept in cases:
        draws = sample(logits.repeat(40_000, 1), generator=torch.Generator().manual_seed(0), **options)
        shares = torch.bincount(draws, minlength=5) / len(draws)
        assert (shares - kept.softmax(0)).abs().max() < 0.01, options
        assert (shares[kept == -torch.inf] == 0).all(), options


def test_padded_ids_are_never_sampled_nor_counted_in_the_loss():
    assert tiny(vocab_size=1023).embed.weight.shape[0] == 1023  # where there are few rows, there is none to add
    model = tiny(vocab_size=1025)
    assert model.embed.weight.shape[0] == 1088
    before = model(torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
    with torch.no_grad():
        model.embed.weight[1025:] = 100.0
    assert torch.equal(model(torch.tensor([[0, 1]]), torch.tensor([[1, 2]])), before)
    assert model(torch.tensor([[0, 1]])).shape == (1, 2, 1025)
    drawn = model.generate(torch.zeros(500, 1, dtype=torch.long), 12, temperature=100.0)
    assert 1000 < drawn.max() < 1025


def test_generation_stops_where_all_sequences_have():
    model = randomize(tiny())
    prompt = torch.zeros(8, 1, dtype=torch.long)
    text = model.generate(prompt, 200, temperature=2.0, stop_token=5, generator=torch.Generator().manual_seed(0))[:, 1:]
    ends = [row.tolist().index(5) for row in text]
    assert len(set(ends)) > 1 and text.size(1) == max(ends) + 1
    assert all((row[end:] == 5).all() for row, end in zip(text, ends, strict=True))


def test_loss_ignores_minus_one_and_sums_or_averages():
    model = randomize(tiny())
    idx, targets = torch.randint(11, (2, 16)), torch.randint(11, (2, 16))
    targets[0, :9] = -1
    log_p = model(idx).log_softmax(-1)
    kept = [-log_p[b, t, targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] >= 0]
    torch.testing.assert_close(model(idx, targets, reduction="sum"), sum(kept))
    torch.testing.assert_close(model(idx, targets), sum(kept) / 23)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_recomputing_changes_neither_loss_nor_gradients(reduction):
    model = randomize(tiny())
    idx, targets = torch.randint(11, (70, 16)), torch.randint(-1, 11, (70, 16))  # 1120 tokens: two pieces of the loss
    found = []
    for model.recompute in (False, True):
        model.zero_grad()
        loss = model(idx, targets, reduction=reduction)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_shift", ["none", "kv"])
def test_estimated_flops_are_those_that_torch_counts(kv_shift):
    config = GPTConfig(block_size=32, vocab_size=100, n_layer=2, n_head=4, n_kv_head=4, n_embd=32, kv_shift=kv_shift)
    model = GPT(config)
    idx = torch.zeros(3, 32, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 32 * estimate_flops(config)
    grouped = GPTConfig(**vars(config) | {"n_kv_head": 1})  # fewer weights in products, attention as before
    assert estimate_flops(config) - estimate_flops(grouped) == 6 * 2 * 2 * 32 * 3 * 8


def test_peak_flops_knows_the_device_names_that_torch_gives():
    assert peak_flops("NVIDIA H100 80GB HBM3") == PEAK_FLOPS["H100"] != peak_flops("NVIDIA H100 PCIe")
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12 and peak_flops("NVIDIA L40S") != peak_flops("NVIDIA L4")
    assert peak_flops("cpu") is peak_flops("NVIDIA RTX A4000") is peak_flops("NVIDIA T400") is None


def test_bfloat16_stays_bfloat16():
    model = tiny().bfloat16()
    dtypes = set()
    for block in model.blocks:
        for module in block.modules():
            module.register_forward_hook(lambda m, i, o: dtypes.update(x.dtype for x in (o if isinstance(o, list) else [o])))
    model(torch.randint(11, (2, 16)))
    assert dtypes == {torch.bfloat16}


def test_the_model_is_one_file_that_needs_torch_alone():
    source = open(model_module.__file__).read()
    assert {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))} == {
        "collections", "dataclasses", "typing", "torch"}
