"""plot.py: the right lines under the right names, the right numbers in the table; and what train.py adds to be drawn."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, options, randomize
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot
import train
from checkpoint import load_checkpoint
from data import Corpus
from model import GPT
from plot import curves, ends, group, read_run
from train import TrainConfig, evaluate_induction


def write_log(folder: Path, val: list[float], end: str = "", **config) -> Path:
    """The log of a run of 4 sequences of 16 tokens a step: evaluated every 10 steps, a line of training every 8 steps, 2
    seconds each."""
    config = asdict(TrainConfig(**{"batch_size": 4, "block_size": 16, "vocab_size": 64, "max_steps": 20} | config))
    lines = {10 * i: {"step": 10 * i, "val_loss": loss} for i, loss in enumerate(val)}
    for step in range(8, 10 * len(val) - 9, 8):
        times = {"loss": 3.0, "tokens": step * 64, "seconds": step / 4}
        lines[step] = {"step": step} | times | lines.get(step, {})
    folder.mkdir(parents=True)
    log = [{"config": config, "parameters": 10_000_000}] + [lines[step] for step in sorted(lines)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + end)
    return folder


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("configs, labels", [
    ([{}], ["kv_shift=kv"]),
    ([{}, {"seed": 2, "device": "cpu", "out_dir": "out/b"}], ["kv_shift=kv"]),
    ([{"kv_shift": "none"}, {}], ["kv_shift=none", "kv_shift=kv"]),
    ([{"dtype": "float32"}, {"dtype": "bfloat16", "compile": True}], ["dtype=float32", "dtype=bfloat16"]),
    # the width brings ffn_size with it, the heads n_kv_head; a majority's value is not said
    ([{"n_embd": 96}, {"n_embd": 96, "n_head": 4}, {"n_embd": 192, "n_head": 4}],
     ["n_head=6", "n_head=4", "n_embd=192"]),
    ([{"n_kv_head": 2}, {"ffn_size": 64}, {}], ["n_kv_head=2", "ffn_size=64", "n_kv_head=6"]),
    ([{}, {"shift_window": 3}, {"shift_weights": "gate"}, {"kv_shift": "k"}, {"kv_shift": "k", "shift_weights": "gate"}],
     ["kv_shift=kv", "shift_window=3", "shift_weights=gate", "kv_shift=k", "kv_shift=k, shift_weights=gate"]),
    ([{"kv_shift": kv, "learning_rate": rate} for kv in ("none", "kv") for rate in (1e-3, 1e-2)],
     ["kv_shift=none, learning_rate=0.001", "kv_shift=none, learning_rate=0.01", "kv_shift=kv, learning_rate=0.001",
      "kv_shift=kv, learning_rate=0.01"]),
])
def test_labels_say_what_differs(configs, labels):
    groups = group([{"config": asdict(TrainConfig(**config))} for config in configs])
    assert list(groups) == labels
    assert sum(map(len, groups.values())) == len(configs)


def test_an_option_younger_than_a_run_had_its_default():
    old = asdict(TrainConfig())
    del old["rope_base"]
    assert len(group([{"config": old}, {"config": asdict(TrainConfig())}])) == 1


def test_seeds_are_a_mean_in_a_band_and_evaluations_lie_between_the_lines_of_training(tmp_path):
    runs = [read_run(write_log(tmp_path / "a", [4.0, 3.0, 2.0], seed=1)),
            read_run(write_log(tmp_path / "b", [4.4, 3.2, 2.6], seed=2)),
            read_run(write_log(tmp_path / "c", [4.2, 3.4], end='{"step": 16, "lo', seed=3))]  # at work, or killed
    xs, mean, low, high = curves(runs[:2], "val_loss", "steps")
    np.testing.assert_allclose([xs, mean, low, high], [[0, 10, 20], [4.2, 3.1, 2.3], [4.0, 3.0, 2.0], [4.4, 3.2, 2.6]])
    assert curves(runs, "val_loss", "tokens")[0].tolist() == [0, 640]  # as far as all go
    # no line of training has the time of step 10 and 20: 10 is between two of them, 20 after the last
    assert curves(runs[:1], "val_loss", "seconds")[0].tolist() == [0, 2.5]
    runs[1]["lines"][1]["seconds"] = 4.0  # seed 2 took twice as long to step 8
    xs, mean, _, _ = curves(runs[:2], "loss", "seconds")
    assert (xs[0], xs[-1], mean[0]) == (4.0, 4.0, 3.0)


def test_the_last_loss_over_sizes_and_rates(tmp_path):
    runs = [read_run(write_log(tmp_path / f"{rate}-{seed}", [4.0, rate * 100 + seed], learning_rate=rate, seed=seed))
            for rate in (1e-2, 1e-3) for seed in (1, 3)]
    assert [len(members) for members in group(runs, plot.OVER["learning_rate"]).values()] == [4]
    np.testing.assert_allclose(ends(runs, "val_loss", "learning_rate"), [[1e-3, 1e-2], [2.1, 3], [1.1, 2], [3.1, 4]])
    assert set(ends(runs, "val_loss", "parameters")[0]) == {10_000_000 - 64 * 384}  # without the embeddings


def test_the_table_is_what_a_hand_computes(call, tmp_path):
    folders = [write_log(tmp_path / f"{kv}-{seed}", [4.0, best, final], kv_shift=kv, seed=seed)
               for kv, figures in (("none", [(1.9, 2.0), (2.5, 2.2), (2.6, 2.4)]), ("kv", [(2.5, 1.9), (2.5, 2.0), (2.5, 2.1)]))
               for seed, (best, final) in enumerate(figures, start=1)]
    code, out, _ = call(plot.main, *folders, folders[0], f"--out={tmp_path}/new/a.png")
    assert code == 0
    head, _, vanilla, shifted = cells(out)
    assert head == ["", "runs", "steps", "final val loss", "best val loss", "tokens/s", "against kv_shift=none"]
    assert vanilla == ["kv_shift=none", "3", "20", "2.2000 ± 0.2000", "2.1667 ± 0.2517", "256", ""]
    # the differences are -0.1, -0.2, -0.3: their deviation is 0.1, and 0.1 / sqrt(3) the error of their mean
    assert shifted == ["kv_shift=kv", "3", "20", "2.0000 ± 0.1000", "2.0000 ± 0.1000", "256", "-0.2000 ± 0.0577"]
    height, width, _ = imread(tmp_path / "new/a.png").shape
    assert height > 300 and width > 600

    write_log(tmp_path / "stopped", [4.0, 2.3], kv_shift="none", seed=4)
    write_log(tmp_path / "ended", [4.0, 2.4, 2.0], kv_shift="kv", seed=4)
    _, out, _ = call(plot.main, *folders, tmp_path / "stopped", tmp_path / "ended", f"--out={tmp_path}/b.png")
    assert cells(out)[2][1:3] == ["4", "10 to 20"] and cells(out)[3][-1] == ""  # no difference of what has not ended
    _, out, _ = call(plot.main, *folders, tmp_path / "ended", f"--out={tmp_path}/b.png")
    assert cells(out)[3][1] == "4" and cells(out)[3][-1] == ""  # nor of other seeds


@pytest.mark.parametrize("x", ["seconds", "learning_rate", "parameters"])
def test_every_axis_can_be_drawn(call, tmp_path, x):
    folders = [write_log(tmp_path / f"{kv}-{rate}", [4.0, 3.0, rate * 100 + bonus], learning_rate=rate, kv_shift=kv)
               for kv, bonus in (("none", 0.5), ("kv", 0)) for rate in (1e-3, 1e-2)]
    folders.append(write_log(tmp_path / "begun", [4.0], kv_shift="k"))
    code, out, _ = call(plot.main, *folders, f"--x={x}", f"--out={tmp_path}/a.png")
    assert code == 0 and imread(tmp_path / "a.png").std() > 0.01
    # over rates the rows are in their order, and a group is compared with the first of its own rate, else with the first of all
    assert [row[-1] for row in cells(out)[2:]] == {"seconds": ["", "+0.9000", "-0.5000", "+0.4000", ""],
                                                   "learning_rate": ["", "-0.5000", "", "", "-0.5000"],
                                                   "parameters": ["", "", "-0.5000", "-0.5000", ""]}[x]


def test_sizes_are_fitted_with_a_power_law(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, out: drawn.append(figure))
    folders = []
    for n_embd in (96, 384, 1536):
        parameters = 10_000_000 - 64 * n_embd
        folders.append(write_log(tmp_path / str(n_embd), [4.0, 30 * parameters**-0.123], n_embd=n_embd))
    plot.draw_curves(folders, "unused", "parameters")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["kv_shift=kv, about N^-0.123"]


@pytest.mark.parametrize("arguments, message", [
    ([], "no runs to draw"),
    (["nowhere"], "no log nowhere/log.jsonl"),
    (["damaged"], "damaged/log.jsonl is damaged"),
    (["empty"], "empty/log.jsonl is damaged"),
    (["begun"], "nothing to draw in begun/log.jsonl"),
    (["begun", "--scalars=True"], "no checkpoint begun/best.pt"),
    (["begun", "--out=a.pdf"], "must end in .png"), (["one", "one_again"], "(kv_shift=kv) have the same seed"),
    (["begun", "--x=loss"], "--x=loss: must be steps | tokens"),
])
def test_a_mistake_is_one_line(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "begun", [])
    write_log(tmp_path / "one", [4.0]), write_log(tmp_path / "one_again", [4.0], compile=True)
    write_log(tmp_path / "damaged", [4.0], end='{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/log.jsonl").touch()
    code, out, err = call(plot.main, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture
def trained(call, corpus, tmp_path):
    """A run of 4 steps with clamped scalars, and its output."""
    code, out, err = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / "run", shift_weights="clamp",
                                               eval_every=2, eval_induction=True))
    assert code == 0, err
    return tmp_path / "run", out


def test_train_draws_its_curves(trained):
    folder, out = trained
    height, width, _ = imread(folder / "loss.png").shape
    assert height > 300 and width > 900  # three panels
    assert "loss.png" in out and out.count(" | induction ") == 3
    assert sum("induction" in line for line in read_run(folder)["lines"]) == 3


def test_a_run_ends_well_where_its_picture_cannot_be_drawn(call, corpus, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    code, out, _ = call(train.main, *options(TINY, dataset=corpus, out_dir=tmp_path / "run"))
    assert code == 0 and "no picture of its curves: OSError: No space left" in out and "more of it:" in out
    assert (tmp_path / "run/ckpt.pt").exists() and not list((tmp_path / "run").glob("*.png*"))
    assert not list((tmp_path / "run").glob(".*"))


def test_scalars_are_counted_as_they_are_used(call, trained, tmp_path):
    checkpoint = load_checkpoint(trained[0] / "best.pt")
    heads = {"blocks.0.attn.shift.alpha": [[0.9, 0.1], [0.1, 0.9]], "blocks.0.attn.shift.beta": [[0.8, 0.8], [0.2, 0.2]],
             # held in [0, 1], the first head's alphas are equal
             "blocks.1.attn.shift.alpha": [[3.0, 0.2], [2.0, 0.7]], "blocks.1.attn.shift.beta": [[0.6, -1.0], [0.5, 0.3]]}
    for name, rows in heads.items():
        checkpoint["model"][name].copy_(torch.tensor(rows))
    torch.save(checkpoint, trained[0] / "best.pt")
    code, out, err = call(plot.main, trained[0], "--scalars=True", f"--out={tmp_path}/s.png")
    assert code == 0, err
    assert [row[1:] for row in cells(out)] == [["paper, 2.9B", "kv_shift=kv"], ["-" * 11] * 2, ["50 (39%)", "1 (25%)"],
                                               ["17 (13%)", "2 (50%)"], ["9 (7%)", "0 (0%)"], ["52 (41%)", "1 (25%)"]]
    assert "induction-like" in cells(out)[3][0] and imread(tmp_path / "s.png").std() > 0.01

    checkpoint["config"]["kv_shift"] = "none"
    checkpoint["model"] = {name: w for name, w in checkpoint["model"].items() if ".shift." not in name}
    torch.save(checkpoint, trained[0] / "best.pt")
    code, _, err = call(plot.main, trained[0], "--scalars=True")
    assert code == 2 and "kv_shift=none: only kv and qkv have both alpha and beta" in err and err.count("\n") == 1


def test_induction_is_the_loss_on_what_comes_a_second_time(corpus):
    config = TrainConfig(**TINY | {"block_size": 17, "micro_batch_size": 48, "vocab_size": 256})
    model = randomize(GPT(config))
    found = evaluate_induction(model, Corpus(corpus), config, "cpu", contextlib.nullcontext())
    assert model.training
    text = np.fromfile(corpus / "val.bin", "<u2")[: 64 // 17 * 17 + 1]  # what the val loss is measured on
    once = np.random.RandomState(0).choice(np.unique(text), (64, 8))
    first, second = [], []
    for row in once.tolist():
        row = torch.tensor(row + row)
        log_probs = model.eval()(row[None])[0].log_softmax(dim=-1)  # (16, V)
        first += [-log_probs[i - 1, row[i]].item() for i in range(1, 8)]
        second += [-log_probs[i - 1, row[i]].item() for i in range(9, 16)]  # not the first token of the repeat
    assert found == pytest.approx({"val_random": np.mean(first), "val_induction": np.mean(second)}, rel=1e-5)
