"""plot.py: labels, curves, the table and the counts of learned weights."""

import json
from dataclasses import asdict
from pathlib import Path

import plot
from model import GPT
from train import TrainConfig

import numpy as np
import pytest
import torch
from conftest import cells, save_run
from matplotlib.image import imread


def write_log(folder: Path, val_losses: list[float], end="", **config) -> Path:
    """The log of a run of 20 steps: an evaluation and a training loss every 10 steps."""
    config = asdict(TrainConfig(vocab_size=64, max_steps=20, **config))
    lines = [{"config": config, "step": 0}]
    for i, val_loss in enumerate(val_losses):
        line = {"step": 10 * i, "val_loss": val_loss, "val_random": 3.0, "val_induction": 2.0}
        late = {"loss": 3.0, "tokens": 1000 * i, "seconds": i * config["seed"]}
        lines.append(line | (late if i else {}))
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join([*map(json.dumps, lines), end]))
    return folder


@pytest.mark.parametrize("configs, labels", [
    ([{}, {"seed": 2, "device": "cpu", "out_dir": "out/b"}], ["kv_shift=kv"]),
    ([{"n_layer": 2, "max_steps": 9}, {"n_layer": 3}],
     ["n_layer=2, kv_shift=kv, max_steps=9", "n_layer=3, kv_shift=kv, max_steps=2000"]),
])
def test_labels_name_what_differs(configs, labels):
    runs = [{"config": asdict(TrainConfig(**config))} for config in configs]
    del runs[0]["config"]["rope_base"]  # an option that is newer than a run had its default
    assert [label for label, *_ in plot.group(runs)] == labels


def test_a_line_is_the_mean_of_the_seeds_as_far_as_all_have_come(tmp_path):
    write_log(tmp_path / "1", [4.0, 3.0, 2.0], seed=1)
    write_log(tmp_path / "2", [4.4, 3.2, 2.6], seed=2)
    write_log(tmp_path / "3", [4.2, 3.4], end='{"step": 20, "val_lo', seed=4)  # was killed

    def points(seeds, x):
        curves = [plot.read_run(tmp_path / seed, x)["val_loss"] for seed in seeds]
        return [list(values) for values in plot.mean_and_range(curves)]

    np.testing.assert_allclose(points("12", "steps"), [
        [0, 10, 20], [4.2, 3.1, 2.3], [4.0, 3.0, 2.0], [4.4, 3.2, 2.6]])
    np.testing.assert_allclose(points("123", "tokens"), [[0, 1000], [4.2, 3.2], [4, 3], [4.4, 3.4]])
    np.testing.assert_allclose(points("12", "seconds")[1], [4.2, 3.4, 2.6])  # seed 2 is slower


def test_the_table_equals_a_computation_by_hand(call, tmp_path):
    finals = {"none": [2.0, 2.2, 2.4], "kv": [1.9, 2.0, 2.1]}
    folders = [write_log(tmp_path / f"{kind}{seed}", [4.0, 2.5, loss], kv_shift=kind, seed=seed)
               for kind in finals for seed, loss in enumerate(finals[kind], start=1)]
    options = "--x=tokens", f"--out={tmp_path}/new/a.png"
    out, err = call(plot.main, *folders, *options)
    head, _, vanilla, shifted = cells(out)
    assert not err and head[-1] == "difference to kv_shift=none"
    # standard deviations of 0.2, 0.1 and (of -0.1, -0.2, -0.3) 0.1, divided by sqrt(3)
    assert vanilla == ["kv_shift=none", "3", "20", "2.2000 ± 0.1155", ""]
    assert shifted == ["kv_shift=kv", "3", "20", "2.0000 ± 0.0577", "-0.2000 ± 0.0577"]
    assert imread(tmp_path / "new/a.png").std() > 0.01

    stopped = write_log(tmp_path / "stopped", [4.0, 2.3], kv_shift="none", seed=4)
    complete = write_log(tmp_path / "complete", [4.0, 2.4, 2.0], kv_shift="kv", seed=4)
    table = cells(call(plot.main, *folders, stopped, complete, *options)[0])
    assert table[2][1:3] == ["4", "10 / 20"] and table[3][-1] == ""  # not at the same step
    assert cells(call(plot.main, *folders, complete, *options)[0])[3][-1] == ""  # unequal seeds


def test_a_missing_or_damaged_file_is_one_line(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "new", [])
    write_log(tmp_path / "damaged", [4.0], end='{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    call(plot.main, "missing", error="No such file or directory: missing/log.jsonl")
    call(plot.main, "damaged", error="damaged/log.jsonl is damaged (JSONDecodeError")
    call(plot.main, "new", error="new/log.jsonl has no val loss yet")


def test_learned_weights_are_counted_as_the_model_uses_them(call, tmp_path):
    weights = {"k": [[0.9, 0.1, 3.0, 2.0], [0.1, 0.9, 0.2, 0.7]],  # head 2 is clamped to (1, 0.2)
               "v": [[0.8, 0.2, 0.6, 1.5], [0.8, 0.1, -1.0, 1.3]]}  # head 3 to (1, 1)
    config = TrainConfig(n_layer=2, n_head=4, n_embd=8, vocab_size=9, shift_weights="clamp")
    model = GPT(config)
    for block in model.blocks:
        for name, shift in block.attn.shift.items():
            shift.weight.data[..., 0] = torch.tensor(weights[name])
    save_run(tmp_path, model, config)
    out, err = call(plot.main, tmp_path, "--scalars=True", f"--out={tmp_path}/a.png")
    assert not err and imread(tmp_path / "a.png").std() > 0.01
    assert cells(out)[2:] == [["the paper's 2.9B model", "50", "17", "9", "52"],
                              ["kv_shift=kv", "2", "2", "4", "0"]]
