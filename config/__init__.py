"""Command lines made from dataclasses: preset files and --key=value options.

    python train.py config/quickstart.py --n_layer=4 --kv_shift=none

A preset is a plain Python file; every public name that it assigns is an option. Presets are read in
order, options override them, and of several options the last one wins. The dataclass is the only
place that names an option; the comment behind a field is its --help text.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
import types
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct. `run` prints it as one line, without a traceback."""


HINTS = {  # options of nanoGPT that have another name here
    "start": "--prompt=TEXT, or --prompt_file=FILE",
    "gradient_accumulation_steps": "--micro_batch_size=N, a part of --batch_size",
    "wandb_log": "--wandb_project=NAME",
    "eval_interval": "--eval_every=N",
}


def need(package: str):
    """Imports a package that is not in requirements.txt."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"this needs: pip install {package.split('.')[0]}") from None


def run(main):
    """Calls main() for a script. A user's mistake or a file error is one line and exit code 2."""
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        message = str(error)
        if getattr(error, "filename", None):
            message = f"{error.strerror}: {error.filename}"
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def silent_interrupt(kind, error, trace):
    """Ctrl-C ends a script without a traceback, also during its imports."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = silent_interrupt


def parse(cls, argv: list[str] | None = None):
    """An instance of the dataclass cls from presets and options (default: the command line)."""
    options, presets = parse_options(cls, argv, "config/file.py")
    values = {}
    for path in presets:
        values |= read_preset(cls, path)
    return make(cls, values | options)


def parse_with_paths(cls, metavar: str, argv: list[str] | None = None):
    """Like `parse`, where the other arguments are paths and not presets: (instance, paths)."""
    options, paths = parse_options(cls, argv, metavar)
    return make(cls, options), paths


def make(cls, values: dict):
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_options(cls, argv, metavar="") -> tuple[dict, list[str]]:
    """The options among the arguments, and the other arguments (without a metavar: a mistake)."""
    parser = Parser(description=sys.modules["__main__"].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    if metavar:
        parser.add_argument("paths", nargs="*", metavar=metavar)
    kinds, comments = typing.get_type_hints(cls), field_comments(cls)
    for field in dataclasses.fields(cls):
        help = f"{comments[field.name]} (default: {field.default})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", metavar=spell(kinds[field.name]), help=help,
                            type=lambda text, kind=kinds[field.name]: convert(kind, text))
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}{suggest(cls, unknown[0])}")
    options = vars(options)
    return options, options.pop("paths", [])


def read_preset(cls, path: str) -> dict:
    """The options that a preset file sets."""
    if not os.path.isfile(path):
        raise UserError(f"no preset {path} (options are written --key=value)")
    try:
        names = runpy.run_path(path)
        options = [f"--{name}={value}" for name, value in names.items() if not (
            name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))]
        return parse_options(cls, options)[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None


def convert(kind, text: str):
    """text as a value of a field's type: int, float, str, bool, Literal[...] or X | None."""
    options = typing.get_args(kind) or [kind]  # the values of a Literal, X and NoneType of X | None
    value = {"True": True, "False": False, "None": None}.get(text, text)
    if value in options or type(value) in options:
        return value
    for option in (int, float, str):
        if option in options:
            with contextlib.suppress(ValueError):
                return option(text)
    raise argparse.ArgumentTypeError(f"must be {spell(kind)}, not {text!r}")


def spell(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return "True|False" if kind is bool else getattr(kind, "__name__", str(kind))


def suggest(cls, argument: str) -> str:
    name = argument.lstrip("-").split("=")[0]
    close = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(cls)], n=1)
    hint = HINTS.get(name) or (f"--{close[0]}=..." if close else None)
    return f"; did you mean {hint}?" if hint else "; --help lists all options"


def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment behind it, or below it, in the source of the dataclass."""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?\s+# (.*)$", source, re.MULTILINE))
