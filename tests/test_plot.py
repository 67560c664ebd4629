"""plot.py: labels, curves, the table and the counts of learned weights."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import plot
from checkpoint import RunState, save_checkpoint
from model import GPT
from train import TrainConfig

import numpy as np
import pytest
import torch
from matplotlib.image import imread


def write_log(folder: Path, val_losses: list[float], end="", **config) -> Path:
    """The log of a run of 20 steps: an evaluation and a training loss every 10 steps."""
    config = asdict(TrainConfig(vocab_size=64, max_steps=20, **config))
    lines = [{"config": config, "parameters": 1000 * config["n_layer"], "step": 0}]
    for step, val_loss in zip(range(0, 30, 10), val_losses, strict=False):
        lines.append({"step": step, "val_loss": val_loss, "val_random": 3.0, "val_induction": 2.0})
        if step:
            seconds = step / 10 * config["seed"]
            lines[-1] |= {"loss": 3.0, "tokens": 100 * step, "seconds": seconds}
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("configs, labels", [
    ([{}], ["kv_shift=kv"]),
    ([{}, {"seed": 2, "device": "cpu", "out_dir": "out/b"}], ["kv_shift=kv"]),
    ([{"kv_shift": "none"}, {}], ["kv_shift=none", "kv_shift=kv"]),
    ([{"dtype": "float32"}, {"dtype": "bfloat16"}], ["dtype=float32", "dtype=bfloat16"]),
    ([{}, {"shift_window": 3}, {"kv_shift": "k"}],
     ["kv_shift=kv", "kv_shift=kv, shift_window=3", "kv_shift=k"]),
    ([{"n_layer": 2, "max_steps": 9}, {"n_layer": 3}],
     ["n_layer=2, max_steps=9", "n_layer=3, max_steps=2000"]),
])
def test_labels_name_what_differs(configs, labels):
    groups = plot.group([{"config": asdict(TrainConfig(**config))} for config in configs])
    assert [label for label, _ in groups] == labels
    assert sum(len(runs) for _, runs in groups) == len(configs)


def test_a_model_option_that_is_newer_than_a_run_had_its_default():
    old = asdict(TrainConfig())
    del old["rope_base"]
    assert len(plot.group([{"config": old}, {"config": asdict(TrainConfig())}])) == 1


def test_each_kind_of_model_has_one_colour():
    kinds = [{"shift_weights": "gate"}, {"kv_shift": "none"}, {}, {"kv_shift": "qkv"}]
    runs = [{"config": asdict(TrainConfig(**kind))} for kind in kinds]
    styles = plot.line_styles(plot.group(runs))
    assert styles[1:3] == [("#0072B2", "-"), ("#D55E00", "-")]
    assert len({color for color, _ in styles}) == 4


def test_a_line_is_the_mean_of_the_seeds_as_far_as_all_have_come(tmp_path):
    write_log(tmp_path / "1", [4.0, 3.0, 2.0], seed=1)
    write_log(tmp_path / "2", [4.4, 3.2, 2.6], seed=2)
    write_log(tmp_path / "3", [4.2, 3.4], end='{"step": 20, "val_lo', seed=4)  # was killed

    def points(seeds, x):
        curves = [plot.read_run(tmp_path / seed, x)["val_loss"] for seed in seeds]
        return [list(values) for values in plot.mean_and_range(curves, x)]

    np.testing.assert_allclose(points("12", "steps"), [
        [0, 10, 20], [4.2, 3.1, 2.3], [4.0, 3.0, 2.0], [4.4, 3.2, 2.6]])
    np.testing.assert_allclose(points("123", "tokens"), [[0, 1000], [4.2, 3.2], [4, 3], [4.4, 3.4]])
    np.testing.assert_allclose(points("12", "seconds"), [  # seed 2 took twice as long
        [0, 1, 2], [4.2, 3.4, 2.6], [4.0, 3.0, 2.0], [4.4, 3.8, 3.2]])
    np.testing.assert_allclose(points("123", "parameters"), [[6000], [8 / 3], [2.0], [3.4]])


def test_the_table_equals_a_computation_by_hand(call, tmp_path):
    losses = {"none": [(1.9, 2.0), (2.5, 2.2), (2.6, 2.4)],
              "kv": [(2.5, 1.9), (2.5, 2.0), (2.5, 2.1)]}
    folders = [write_log(tmp_path / f"{kv_shift}{seed}", [4.0, *pair], kv_shift=kv_shift, seed=seed)
               for kv_shift in losses for seed, pair in enumerate(losses[kv_shift], start=1)]
    code, out, _ = call(plot.main, *folders, f"--out={tmp_path}/new/a.png")
    head, _, vanilla, shifted = cells(out)
    assert code == 0 and head[-1] == "difference to kv_shift=none"
    # tokens/s: 1000, 500 and 333
    assert vanilla == ["kv_shift=none", "3", "20", "2.2000 ± 0.2000", "2.1667 ± 0.2517", "611", ""]
    # the differences -0.1, -0.2, -0.3 have a standard deviation of 0.1: 0.1 / sqrt(3) is the error
    assert shifted == ["kv_shift=kv", "3", "20", "2.0000 ± 0.1000", "2.0000 ± 0.1000", "611",
                       "-0.2000 ± 0.0577"]

    stopped = write_log(tmp_path / "stopped", [4.0, 2.3], kv_shift="none", seed=4)
    complete = write_log(tmp_path / "complete", [4.0, 2.4, 2.0], kv_shift="kv", seed=4)
    out = f"--out={tmp_path}/a.png"
    table = cells(call(plot.main, *folders, stopped, complete, out)[1])
    assert table[2][1:3] == ["4", "10 / 20"] and table[3][-1] == ""  # a run is not complete
    assert cells(call(plot.main, *folders, complete, out)[1])[3][-1] == ""  # unequal seeds


@pytest.mark.parametrize("x", ["steps", "tokens", "seconds", "learning_rate", "parameters"])
def test_every_axis_can_be_drawn(call, tmp_path, x):
    folders = [write_log(tmp_path / f"{rate}{depth}", [4.0, 3.0, 2.0 + rate], learning_rate=rate,
                         n_layer=depth) for rate in (0.1, 0.2) for depth in (1, 2)]
    folders.append(write_log(tmp_path / "new", [4.0], kv_shift="k"))
    code, out, err = call(plot.main, *folders, f"--x={x}", f"--out={tmp_path}/a.png")
    assert code == 0 and not err and len(cells(out)) == 7
    height, width, _ = imread(tmp_path / "a.png").shape
    assert height > 300 and width > 600


@pytest.mark.parametrize("arguments, message", [
    ([], "no runs"),
    (["missing"], "No such file or directory: missing/log.jsonl"),
    (["damaged"], "damaged/log.jsonl is damaged (JSONDecodeError"),
    (["empty"], "empty/log.jsonl is damaged (IndexError"),
    (["new"], "new/log.jsonl has no val loss yet"),
    (["new", "--scalars=True"], "No such file or directory: new/best.pt"),
])
def test_a_missing_or_damaged_file_is_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "new", [])
    write_log(tmp_path / "damaged", [4.0], end='{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/log.jsonl").touch()
    code, out, err = call(plot.main, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.rglob("*.png"))


def save(folder: Path, **config) -> Path:
    """Writes the best.pt of a model of two layers with two heads each."""
    config = TrainConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=9, **config)
    model = GPT(config)
    weights = {"k": [[[0.9, 0.1], [0.1, 0.9]], [[3.0, 0.2], [2.0, 0.7]]],  # (3, 2) clamps to (1, 1)
               "v": [[[0.8, 0.8], [0.2, 0.2]], [[0.6, -1.0], [0.5, 0.3]]]}
    for layer, block in enumerate(model.blocks):
        for name, shift in block.attn.shift.items():
            shift.weight.data[..., 0] = torch.tensor(weights[name][layer])
    folder.mkdir()
    corpus = SimpleNamespace(tokenizer={"kind": "bytes"}, checksum="")
    save_checkpoint(folder / "best.pt", model, None, config, corpus, RunState())
    return folder


def test_learned_weights_are_counted_as_the_model_uses_them(call, tmp_path):
    options = "--scalars=True", f"--out={tmp_path}/a.png"
    code, out, err = call(plot.main, save(tmp_path / "clamp", shift_weights="clamp"), *options)
    assert code == 0 and not err and imread(tmp_path / "a.png").std() > 0.01
    _, _, paper, found = cells(out)
    assert paper == ["the paper's 2.9B model", "50 (39%)", "17 (13%)", "9 (7%)", "52 (41%)"]
    assert found == ["kv_shift=kv", "1 (25%)", "2 (50%)", "0 (0%)", "1 (25%)"]

    code, _, err = call(plot.main, save(tmp_path / "vanilla", kv_shift="none"), *options)
    assert code == 2 and "has no alpha or no beta" in err and err.count("\n") == 1
