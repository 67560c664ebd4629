"""bench.py measures what it says, beside a nanoGPT, too."""

import json

import bench

NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: few")
        self.embed = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def forward(self, idx, targets=None):
        logits = self.embed(idx) @ self.embed.weight.T
        return logits, None if targets is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def generate(self, idx, max_new_tokens):
        return torch.cat([idx, idx.new_zeros(len(idx), max_new_tokens)], dim=1)
"""
TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=2", "--decode_tokens=4", "--rounds=3",
        "--seconds=0.01", "--device=cpu"]


def test_all_is_measured_and_written(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(NANOGPT)
    code, out, err = call(bench.main, *TINY, f"--nanogpt={tmp_path}", "--json=deep/figures.json", "--profile=True")
    assert code == 0 and "number of parameters" in err and "number of parameters" not in out
    kinds = ["kv_shift=none", "kv_shift=kv", "nanoGPT"]
    rounds = json.loads((tmp_path / "deep/figures.json").read_text())["rounds"]
    for name, figures in rounds.items():
        assert name in out and list(figures) == kinds and all(v > 0 for of in figures.values() for v in of), name
        assert all(len(of) == (1 if "memory" in name else 3) for of in figures.values())
    assert {"training step, ms", "decode, tokens/s, batch 8"} <= rounds.keys()
    for ms, rate in zip(*(rounds[name]["kv_shift=kv"] for name in ("training step, ms", "training, tokens/s")), strict=True):
        assert abs(rate * ms / 1e3 - 2 * 32) < 1e-6  # tokens a step
    assert len(list((tmp_path / "out").glob("trace_*.json"))) == 3
    assert "aten::mm" in (tmp_path / "out/trace_kv_shift_kv.json").read_text()


def test_the_table_has_medians_and_ratios_round_by_round(capsys):
    bench.print_table({"training step, ms": {"kv_shift=none": [1.0, 2.0, 4.0], "kv_shift=kv": [3.0, 2.0, 8.0]}},
                      ["kv_shift=none", "kv_shift=kv"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["training step, ms", "2.000", "3.000", "2.000"]


def test_mistakes_are_one_line(call, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.py").write_text("raise AssertionError('not to be run')")
    for wrong, message in (([f"--nanogpt={tmp_path}"], "must be a folder with karpathy/nanoGPT"), (["--rounds=0"], "at least 1"),
                           (["--decode_tokens=31"], "block_size - 16 = 16"), (["--round=1"], "did you mean --rounds"),
                           ([f"--nanogpt={tmp_path / 'there'}", "--optimizer=muon"], "pass --optimizer=adamw")):
        code, _, err = call(bench.main, *TINY, *wrong)
        assert code == 2 and message in err and err.count("\n") == 1


def test_as_many_tokens_are_decoded_as_fit():
    assert [bench.BenchConfig(block_size=n).decode_tokens for n in (64, 256)] == [48, 100]
