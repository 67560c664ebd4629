"""Converts models from and to other formats.

    python convert.py llama MODEL_DIR out/x          a Hugging Face Llama folder to a run folder
    python convert.py llama out/x MODEL_DIR          and back, for LlamaForCausalLM.from_pretrained
    python convert.py gguf FILE out/x                a GGUF file of Llama type, such as SmolLM2's
    python convert.py baichuan_m1 out/x MODEL_DIR    a model with KV shift, for mlx-lm

llama and baichuan_m1 need: pip install safetensors. gguf needs: pip install gguf tokenizers
Imported models are vanilla. --kv_shift=kv adds the shift with the weights of shift_init=identity:
the logits stay the same, and training can go on from there.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from checkpoint import RunState, load_checkpoint, load_model, restore, save_checkpoint
from config import UserError, need, parse_with_paths, run
from data import atomic_write
from model import GPT, GPTConfig

import torch
import torch.nn.functional as F


@dataclass
class ConvertConfig:
    kv_shift: Literal["none", "kv", "k", "v", "qkv"] = "none"  # import: add a shift at identity


def main():
    config, paths = parse_with_paths(ConvertConfig, "FORMAT IN OUT")
    if len(paths) != 3 or paths[0] not in ("llama", "gguf", "baichuan_m1"):
        raise UserError("pass a format, an input and an output: "
                        "python convert.py llama|gguf|baichuan_m1 IN OUT")
    kind, source, target = paths[0], Path(paths[1]), Path(paths[2])
    if kind == "gguf":
        save_run(source, target, *read_gguf(source), config.kv_shift)
    elif kind == "llama" and (source / "config.json").exists():
        save_run(source, target, *read_llama(source), config.kv_shift)
    else:
        checkpoint = load_checkpoint(source / "best.pt" if source.is_dir() else source)
        model, tokenizer = load_model(checkpoint, "cpu"), checkpoint["tokenizer"]
        write_folder(target, *(to_llama if kind == "llama" else to_baichuan)(model), tokenizer)
    print(f"wrote {target}")


NAMES = """
embed                model.embed_tokens                         token_embd
norm                 model.norm                                 output_norm
head                 lm_head                                    output
blocks.{i}.norm_attn model.layers.{i}.input_layernorm           blk.{i}.attn_norm
blocks.{i}.attn.q    model.layers.{i}.self_attn.q_proj          blk.{i}.attn_q
blocks.{i}.attn.k    model.layers.{i}.self_attn.k_proj          blk.{i}.attn_k
blocks.{i}.attn.v    model.layers.{i}.self_attn.v_proj          blk.{i}.attn_v
blocks.{i}.attn.out  model.layers.{i}.self_attn.o_proj          blk.{i}.attn_output
blocks.{i}.norm_mlp  model.layers.{i}.post_attention_layernorm  blk.{i}.ffn_norm
blocks.{i}.mlp.gate  model.layers.{i}.mlp.gate_proj             blk.{i}.ffn_gate
blocks.{i}.mlp.up    model.layers.{i}.mlp.up_proj               blk.{i}.ffn_up
blocks.{i}.mlp.down  model.layers.{i}.mlp.down_proj             blk.{i}.ffn_down
"""


def names(n_layer: int, column: Literal["llama", "gguf"]) -> dict[str, str]:
    """Names of the other format -> names of our parameters."""
    rows = [[f"{name}.weight" for name in line.split()] for line in NAMES.split("\n") if line]
    return {row[1 + (column == "gguf")].format(i=i): row[0].format(i=i)
            for row in rows for i in range(n_layer)}


def refuse(reasons: dict[str, bool]):
    if found := [reason for reason, present in reasons.items() if present]:
        raise UserError(f"cannot convert a model with {', '.join(found)}")


# --- import


def save_run(source: Path, out_dir: Path, options: dict, weights: dict, tokenizer: dict | None,
             kv_shift: str):
    """Writes out_dir/best.pt from the options of GPTConfig and the weights of a vanilla model, and
    a preset for train.py that starts from it."""
    config = GPTConfig(**options, kv_shift=kv_shift, shift_init="identity")
    model = GPT(config)
    restore({"model": weights, "adds_shift": True, "path": source}, model)
    out_dir.mkdir(parents=True, exist_ok=True)
    corpus = SimpleNamespace(tokenizer=tokenizer, checksum=None)
    save_checkpoint(out_dir / "best.pt", model, None, config, corpus, RunState())
    preset = {"init_from": str(out_dir / "best.pt")} | asdict(config)
    with atomic_write(out_dir / "preset.py") as f:
        f.write("".join(f"{name} = {value!r}\n" for name, value in preset.items()).encode())
    print(f"to train it further: python train.py {out_dir / 'preset.py'} --dataset=NAME "
          f"--out_dir=out/NAME, with a corpus from data/text/prepare.py "
          f"--tokenizer={out_dir / 'best.pt'}")


def read_llama(folder: Path):
    """Options, weights and tokenizer of a Hugging Face folder."""
    safetensors = need("safetensors.torch")
    c = json.loads((folder / "config.json").read_text())
    refuse({f"model_type {c.get('model_type')}": c.get("model_type") != "llama"})
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    heads = c["num_attention_heads"]
    refuse({"biases": c.get("attention_bias") or c.get("mlp_bias"),
            "scaled rotary positions": rope.get("rope_type", rope.get("type")) not in
            (None, "default"),
            "another head_dim than width / heads": (c.get("head_dim") or c["hidden_size"] // heads)
            * heads != c["hidden_size"],
            f"the activation {c.get('hidden_act')}": c.get("hidden_act", "silu") != "silu"})
    options = dict(
        block_size=c["max_position_embeddings"], vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"], n_head=heads, n_kv_head=c.get("num_key_value_heads"),
        n_embd=c["hidden_size"], ffn_size=c["intermediate_size"],
        rope_base=rope.get("rope_theta") or c.get("rope_theta", 10_000.0),
        norm_eps=c.get("rms_norm_eps", 1e-6), tie_embeddings=c.get("tie_word_embeddings", False))
    theirs = {}
    for path in sorted(folder.glob("*.safetensors")):
        theirs |= safetensors.load_file(path)
    ours = names(options["n_layer"], "llama")
    weights = {ours.get(name, name): weight.float() for name, weight in theirs.items()}
    if options["tie_embeddings"]:
        weights.pop("head.weight", None)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        ends = c.get("eos_token_id")
        tokenizer = {"kind": "hf", "json": (folder / "tokenizer.json").read_text(),
                     "end_of_text": ends[0] if isinstance(ends, list) else ends}
    return options, weights, tokenizer


def read_gguf(path: Path):
    """Options, weights and tokenizer of a GGUF file, dequantized to float32."""
    gguf = need("gguf")
    reader = gguf.GGUFReader(path)

    def field(name, default=None):
        found = reader.fields.get(name)
        return found.contents() if found else default

    kind = field("general.architecture")
    refuse({f"the architecture {kind}": kind != "llama",
            "scaled rotary positions": field("llama.rope.scaling.type", "none") != "none"})
    weights = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type))
               for t in reader.tensors}
    options = dict(
        block_size=field("llama.context_length"), vocab_size=len(weights["token_embd.weight"]),
        n_layer=field("llama.block_count"), n_head=field("llama.attention.head_count"),
        n_kv_head=field("llama.attention.head_count_kv"), n_embd=field("llama.embedding_length"),
        ffn_size=field("llama.feed_forward_length"),
        rope_base=field("llama.rope.freq_base", 10_000.0),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in weights)
    ours = names(options["n_layer"], "gguf")
    weights = {ours.get(name, name): weight for name, weight in weights.items()}
    for name, weight in weights.items():  # GGUF rotates neighbours, we rotate halves
        if name.endswith((".q.weight", ".k.weight")):
            heads = options["n_head"] if ".q." in name else options["n_kv_head"]
            halves = weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2)
            weights[name] = halves.reshape(weight.shape)
    return options, weights, gguf_tokenizer(field)


def gguf_tokenizer(field) -> dict:
    """A byte-level BPE, as in SmolLM2: digits stand alone."""
    tokenizers = need("tokenizers")
    model, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    refuse({f"the tokenizer {model}, {pre}": (model, pre) != ("gpt2", "smollm")})
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    pre_tokenizers = tokenizers.pre_tokenizers
    t = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = tokenizers.decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, field("tokenizer.ggml.token_type"),
                                            strict=True) if kind == 3]
    t.add_special_tokens(control)
    return {"kind": "hf", "json": t.to_str(), "end_of_text": field("tokenizer.ggml.eos_token_id")}


# --- export


def write_folder(folder: Path, config: dict, weights: dict, tokenizer: dict | None):
    safetensors = need("safetensors.torch")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model.safetensors": safetensors.save(
        {name: weight.detach().contiguous() for name, weight in weights.items()},
        {"format": "pt"})}
    if tokenizer and tokenizer["kind"] == "hf":
        files["tokenizer.json"] = tokenizer["json"].encode()
    files["config.json"] = json.dumps(config, indent=1).encode()
    for name, content in files.items():
        with atomic_write(folder / name) as f:
            f.write(content)


def hf_config(c: GPTConfig, **more) -> dict:
    return {"vocab_size": c.vocab_size, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head or c.n_head,
            "hidden_act": "silu", "max_position_embeddings": c.block_size,
            "rope_theta": c.rope_base, "rms_norm_eps": c.norm_eps, "torch_dtype": "float32"} | more


def to_llama(model: GPT):
    c = model.config
    refuse({f"kv_shift={c.kv_shift}": c.kv_shift != "none",
            f"shift_at={c.shift_at}": c.shift_at != "attention", "rope_base=0": c.rope_base == 0})
    theirs = {our: their for their, our in names(c.n_layer, "llama").items()}
    return hf_config(
        c, model_type="llama", architectures=["LlamaForCausalLM"], head_dim=c.head_dim,
        intermediate_size=model.blocks[0].mlp.up.out_features, attention_bias=False,
        mlp_bias=False, tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    ), {theirs[name]: p for name, p in model.named_parameters()}


def to_baichuan(model: GPT):
    """Baichuan-M1 normalizes the rows of its head. One more group of heads, all zero, and wider
    layers make room for a column that gives all rows the same norm, so that nothing changes."""
    c = model.config
    refuse({f"kv_shift={c.kv_shift}": c.kv_shift == "qkv", "rope_base=0": c.rope_base == 0,
            f"shift_at={c.shift_at}": c.shift_at != "attention",
            f"shift_window={c.shift_window}": c.shift_window != 2,
            f"shift_per={c.shift_per}": c.shift_per != "head",
            f"shift_weights={c.shift_weights}": c.shift_weights == "input"})
    n_kv_head = c.n_kv_head or c.n_head
    group = c.n_head // n_kv_head
    extra = group * c.head_dim  # channels of the added group
    width = c.n_embd + extra
    scale = (c.n_embd / width) ** 0.5  # RMSNorm divides by the norm over more channels

    def pad(w, rows=0, columns=extra):
        return F.pad(w, (0, columns, 0, rows))

    def norm(w):
        return F.pad(w * scale, (0, extra))

    head = pad(model.head_weight())
    norms = head.norm(dim=1)
    head[:, c.n_embd] = (norms.max() ** 2 - norms**2).clamp(min=0).sqrt()
    weights = {"model.embed_tokens.weight": pad(model.embed.weight), "lm_head.weight": head,
               "model.norm.weight": norm(model.norm.weight) * norms.max()}
    for i, block in enumerate(model.blocks):
        attn, mlp, name = block.attn, block.mlp, f"model.layers.{i}"
        weights |= {
            f"{name}.input_layernorm.weight": norm(block.norm_attn.weight),
            f"{name}.post_attention_layernorm.weight": norm(block.norm_mlp.weight),
            f"{name}.self_attn.W_pack.weight": torch.cat([
                pad(attn.q.weight, extra), pad(attn.k.weight, c.head_dim),
                pad(attn.v.weight, c.head_dim)]),
            f"{name}.self_attn.o_proj.weight": pad(attn.out.weight, extra),
            f"{name}.mlp.gate_proj.weight": pad(mlp.gate.weight),
            f"{name}.mlp.up_proj.weight": pad(mlp.up.weight),
            f"{name}.mlp.down_proj.weight": pad(mlp.down.weight, extra, columns=0)}
        for key in "kv":
            current, previous = torch.ones(n_kv_head), torch.zeros(n_kv_head)
            if key in attn.shift:
                current, previous = (w.flatten() for w in attn.shift[key].weights(None))
            conv = F.pad(torch.stack([previous, current], dim=-1), (0, 0, 0, 1))  # (K + 1, 2)
            weights[f"{name}.self_attn.conv_{key}"] = conv.view(1, 1, n_kv_head + 1, 1, 2)
    return hf_config(
        c, model_type="baichuan_m1", architectures=["BaichuanM1ForCausalLM"], hidden_size=width,
        num_attention_heads=c.n_head + group, num_key_value_heads=n_kv_head + 1,
        intermediate_size=mlp.up.out_features, rms_norm_eps=c.norm_eps * c.n_embd / width,
        conv_window=2, sliding_window=c.block_size, sliding_window_layers=[],
        tie_word_embeddings=False), weights


if __name__ == "__main__":
    run(main)
