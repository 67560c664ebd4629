"""Config files and options: what is meant is what is set, and a slip is one line."""

from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, defaults
from hypothesis import given
from hypothesis import strategies as st

from config import UserError, help_text, parse, run
from sample import SampleConfig
from train import TrainConfig


@dataclass
class Small:
    """Options of a test."""

    n_layer: int = 2  # layers; at least one
    rate: float = 0.5  # a rate
    name: str = ""  # a name
    fast: bool = False  # quick
    maybe: bool | None = None  # None: as it comes
    kind: Literal["a", "b"] = "a"  # one of two

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer={self.n_layer} must be at least 1")


def test_later_wins_and_options_win_over_files(tmp_path):
    (tmp_path / "one.py").write_text("from __future__ import annotations\n"
                                     "import math\nfrom os.path import join\n_k = 1\nn_layer = 3 * _k\nrate = 1\nname = 'x=y'\n")
    (tmp_path / "two.py").write_text("rate = 0.25\nmaybe = True\n")
    one, two = str(tmp_path / "one.py"), str(tmp_path / "two.py")
    config = parse(Small, ["--n_layer=7", one, two, "--fast=True", "--name=a=b c", "--n_layer=8"])
    assert config == Small(n_layer=8, rate=0.25, name="a=b c", fast=True, maybe=True)
    assert parse(Small, [two, one]) == Small(n_layer=3, rate=1.0, name="x=y", maybe=True)
    assert type(parse(Small, [one]).rate) is float
    assert parse(Small, ["--maybe=None", "--name=3", "--rate=1e-3", "--kind=b"]) == Small(name="3", rate=1e-3, kind="b")
    assert parse(Small, ["--name="]) == Small()


@pytest.mark.parametrize("argument, message", [
    ("--n_layers=3", "unknown option 'n_layers'; did you mean --n_layer=...?"), ("--zzz=3", "--help lists them all"),
    ("--n_layer", "written --key=value; did you mean --n_layer=...?"), ("-n_layer=3", "written --key=value"),
    ("--n_layer=2.5", "--n_layer=2.5: must be int"), ("--n_layer=", "must be int"), ("--n_layer=0", "must be at least 1"),
    ("--rate=fast", "--rate=fast: must be float"), ("--fast=yes", "must be bool"), ("--fast=1", "must be bool"),
    ("--maybe=2", "must be bool | None"), ("--kind=c", "must be a | b"), ("nowhere.py", "no config file 'nowhere.py'"),
])
def test_a_slip_on_the_command_line(argument, message):
    with pytest.raises(UserError) as error:
        parse(Small, [argument])
    assert message in str(error.value)


@pytest.mark.parametrize("source, message", [
    ("n_layers = 3", "unknown option 'n_layers'; did you mean --n_layer"),
    ("n_layer = 'three'", "n_layer = 'three' (str) must be int"),
    ("n_layer = True", "n_layer = True (bool) must be int"), ("rate = None", "must be float"), ("kind = 'c'", "must be a | b"),
    ("kind = ['a']", "must be a | b"), ("n_layer = (", "SyntaxError"), ("n_layer = 1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("n_layer = -1", "must be at least 1"),
])
def test_a_slip_in_a_config_file(tmp_path, source, message):
    path = tmp_path / "x.py"
    path.write_text(source)
    with pytest.raises(UserError) as error:
        parse(Small, [str(path)])
    assert message in str(error.value) and (str(path) in str(error.value) or "at least" in message)


@given(st.lists(st.text() | st.from_regex(r"--(n_layer|rate|name|fast|maybe|kind|x)=.*"), max_size=4))
def test_any_arguments_are_parsed_or_refused(arguments):
    if not {"--help", "-h"} & set(arguments):
        try:
            assert type(parse(Small, arguments)) is Small
        except UserError as error:
            assert str(error)


@pytest.mark.parametrize("cls", [Small, TrainConfig, SampleConfig])
def test_help_has_each_field_with_type_default_and_meaning(cls):
    text = help_text(cls)
    for name, default in defaults(cls).items():
        line, meaning = text.split(f"  --{name}={default}  (")[1].split("\n")[:2]
        assert line.endswith(")") and len(meaning.strip()) > 3, name
    assert "python" in text.splitlines()[2] or cls is not Small


def test_every_preset_fits_its_script():
    presets = [path for path in (ROOT / "config").glob("*.py") if path.stem != "__init__" and "toy" not in path.stem]
    assert {path.stem for path in presets} >= {"quickstart", "shakespeare_char", "shakespeare_char_cpu", "gpt2"}
    for path in presets:
        assert parse(TrainConfig, [str(path)]).out_dir != TrainConfig.out_dir, path


def test_every_comparison_is_a_corpus_and_a_variant():
    presets = {path.stem: str(path) for path in (ROOT / "config/compare").glob("*.py")}
    bases = [presets.pop("pystdlib"), str(ROOT / "config/shakespeare_char_cpu.py")]
    assert {"vanilla", "kv", "size_2.7m", "learning_rates", "smeared"} <= presets.keys()
    for base in bases:
        for name, path in presets.items():
            same = parse(TrainConfig, [base, path]) == parse(TrainConfig, [base])
            assert same == (name in ("kv", "size_0.8m")), name  # these two are what the others are compared with


def test_what_needs_too_much_memory_ends_with_advice(capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: bytearray(1 << 62), less_memory="Lower --batch_size")
    assert stop.value.code == 2 and capsys.readouterr().err.endswith(": out of memory. Lower --batch_size\n")
