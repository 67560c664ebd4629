"""Command lines: presets and options, what a user reads after a mistake, and the documents."""

import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

from config import UserError, parse, parse_with_paths
from eval import EvalConfig
from sample import SampleConfig
from train import TrainConfig

import pytest
from conftest import ROOT


@dataclass
class Config:
    width: int = 1  # comment of width
    rate: float = 0.5  # 100% of the rate
    name: str = "a"  # a name
    kind: Literal["x", "y"] = "x"  # one of two
    flag: bool = False  # a switch
    heads: int | None = None  # None: as many as there are

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1")


def test_presets_are_read_in_order_and_options_override_them(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("import math\nwidth = 2\nrate = 1\nheads = 4\n_private = 3\ndef f(): pass\n")
    second.write_text("width = 3\nflag = True\nheads = None\n")
    config = parse(Config, ["--name=b=c", str(first), "--kind=x", str(second), "--kind", "y"])
    assert config == Config(width=3, rate=1.0, name="b=c", kind="y", flag=True, heads=None)
    assert type(config.rate) is float
    assert parse_with_paths(Config, "FILE", ["p", "--width=2", "q"]) == (Config(2), ["p", "q"])


@pytest.mark.parametrize("argument, message", [
    ("--width=x", "argument --width: must be int, not 'x'"),
    ("--flag=1", "argument --flag: must be True|False, not '1'"),
    ("--heads=x", "argument --heads: must be int | None, not 'x'"),
    ("--kind=z", "argument --kind: must be x|y, not 'z'"),
    ("--flag", "argument --flag: expected one argument"),
    ("--wid=2", "unknown option --wid=2; did you mean --width=...?"),
    ("--start=abc", "did you mean --prompt=TEXT, or --prompt_file=FILE?"),
    ("--width=0", "width=0 must be at least 1"),
    ("nothing.py", "no preset nothing.py (options are written --key=value)")])
def test_a_mistake_is_one_line_that_says_what_to_do(argument, message):
    with pytest.raises(UserError) as error:
        parse(Config, [argument])
    assert message in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("widht = 2", "unknown option --widht=2; did you mean --width=...?"),
    ("widht = 'a b'", "unknown option --widht=a b; did you mean --width=...?"),
    ("flag = 1", "flag: must be True|False"), ("1 / 0", "ZeroDivisionError")])
def test_a_mistake_in_a_preset_names_the_file(tmp_path, text, message):
    (tmp_path / "preset.py").write_text(text)
    with pytest.raises(UserError, match="preset.py: ") as error:
        parse(Config, [str(tmp_path / "preset.py")])
    assert message in str(error.value)


def test_help_and_mistakes_as_users_see_them():
    def train(*arguments):
        command = [sys.executable, ROOT / "train.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    shown, wrong = train("--help"), train("config/quickstart.py", "--n_layers=2")
    assert shown.returncode == 0 and "peak learning rate (default: 0.001)" in shown.stdout
    assert "python train.py config/quickstart.py" in shown.stdout
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "train.py: unknown option --n_layers=2; did you mean --n_layer=...?\n"


def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")  # imported first, as by train.py
    done = subprocess.run([sys.executable, ROOT / "train.py"], capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path)})
    assert done.stderr == "" and done.returncode != 0


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_file_that_a_document_names_exists(name):
    text = (ROOT / name).read_text()
    named = set(re.findall(r"[\w./-]+/[\w.-]+\.(?:py|png|svg|jsonl|md)\b|\b[\w]+\.py\b", text))
    named -= {path for path in named if path.startswith(("out/", "config/x", "config/file"))}
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_every_option_in_the_readme_exists():
    known = {f.name for cls in (TrainConfig, SampleConfig, EvalConfig) for f in fields(cls)}
    known |= {"help", "name", "tokenizer", "val_fraction", "nproc_per_node", "nnodes",
              "max_restarts", "rdzv_backend", "rdzv_endpoint", "experiment", "nanogpt", "arms",
              "seeds", "key"}
    assert set(re.findall(r"--(\w+)", (ROOT / "README.md").read_text())) <= known
