"""Config files and --key=value options onto a typed dataclass.

    python train.py config/quickstart.py --n_layer=4        later wins, and options win over files

A config file is plain Python, run on its own: it may import and compute. Each public name that it sets must be a field
of the dataclass (imports, functions and names with a leading _ do not count). Names, types, defaults and the text of --help
stand in the dataclass alone: the comment behind a field is its help.
"""

import __future__

import contextlib
import dataclasses
import difflib
import inspect
import multiprocessing
import os
import re
import runpy
import signal
import sys
import threading
import types
import typing
from pathlib import Path


class UserError(Exception):
    """What the user can put right: `run` prints it as one line, without a traceback."""


def run(main, less_memory: str = ""):
    """Calls main() for a script: a UserError, an error of the disk, or one of those that `for_user` knows, ends it with one
    line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # it may have been closed, or be a notebook's
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    try:
        main()
    except UserError as error:
        sys.exit(_report(str(error)))
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush finds a place
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(_report(f"{error.strerror}: {error.filename}" if error.filename else str(error)))
    except (RuntimeError, MemoryError) as error:  # torch's
        if (known := for_user(error, less_memory)) is error:
            raise
        sys.exit(_report(str(known)))
    except KeyboardInterrupt:
        sys.exit(130)


def for_user(error: Exception, less_memory: str) -> Exception:
    """The UserError in place of an error that says that there is no memory, or no compiler; any other as it is. `less_memory`
    is the script's advice."""
    if out_of_memory(error):
        return UserError(f"{(str(error) or 'out of memory.').splitlines()[0]} {less_memory}")
    if "InvalidCxxCompiler" in str(error):
        return UserError("compile=True needs a C++ compiler, and none works here: install one (g++), or pass --compile=False")
    return error


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory. On a CPU torch has no type of its own for it."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def end_with_parent():
    """For a process that a script starts: Ctrl-C is its parent's to answer, and where the parent is killed it ends, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _report(message: str) -> int:
    with contextlib.suppress(OSError, AttributeError):  # our output may lie on the disk that is full, or have been closed
        sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: " + " ".join(message.split()), file=sys.stderr)
    return 2


def parse(cls, argv: list[str], arguments: str = "[config/file.py ...]"):
    """Makes a `cls` from config files and --key=value options. --help prints the fields, with what other `arguments` there
    are, and exits with 0."""
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, arguments))
        raise SystemExit(0)
    values, later = {}, {}
    for arg in argv:
        if arg.startswith("--") and "=" in arg:
            name, text = arg[2:].split("=", 1)
            later[name] = _from_text(cls, name, text)
        elif arg.startswith("-"):
            raise UserError(f"{arg!r}: options are written --key=value{_did_you_mean(cls, arg.lstrip('-'))}")
        else:
            values |= read_file(cls, arg)
    return make(cls, values | later)


def make(cls, values: dict):
    """cls(**values), a value that does not fit being a UserError."""
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_file(cls, path: str) -> dict:
    """The fields that a config file sets."""
    if not os.path.isfile(path):  # which takes any text, unlike Path.is_file
        raise UserError(f"no config file {path!r} (options are written --key=value)")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    values = {}
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, (types.ModuleType, __future__._Feature)) or callable(value):
            continue
        kind = _type_of(cls, name, f"{path}: ")
        try:
            values[name] = _checked(kind, name, value)
        except TypeError as error:
            raise UserError(f"{path}: {error}") from None
    return values


def _fields(cls) -> dict:
    """Field name -> type."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _did_you_mean(cls, name: str) -> str:
    close = difflib.get_close_matches(name.split("=")[0], _fields(cls), n=1)
    return f"; did you mean --{close[0]}=...?" if close else "; --help lists them all"


def _type_of(cls, name: str, where: str = ""):
    fields = _fields(cls)
    if name not in fields:
        raise UserError(f"{where}unknown option {name!r}{_did_you_mean(cls, name)}")
    return fields[name]


def _spell(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("NoneType", "None")


def _from_text(cls, name: str, text: str):
    """The value of an option: the first reading of its text that the field's type takes."""
    kind = _type_of(cls, name)
    readings = [text, {"true": True, "false": False, "none": None}.get(text.lower(), text)]
    for number in (int, float):
        try:
            readings.append(number(text))
        except ValueError:
            pass
    for value in readings:
        try:
            return _checked(kind, name, value)
        except TypeError:
            pass
    raise UserError(f"--{name}={text}: must be {_spell(kind)}")


def _checked(kind, name: str, value):
    """`value`, if it is of the field's type, else a TypeError; an int is accepted for a float."""
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind]:
        if typing.get_origin(option) is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and type(value) is int:
            return float(value)
        elif type(value) is option:
            return value
    raise TypeError(f"{name} = {value!r} ({type(value).__name__}) must be {_spell(kind)}")


def help_text(cls, arguments: str = "[config/file.py ...]") -> str:
    """One line a field: name, type, default and the comment behind it in the source."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): [^#\n]*#(.*)$", inspect.getsource(base), re.MULTILINE))
    script = Path(sys.argv[0]).name
    lines = [inspect.getdoc(sys.modules[cls.__module__]), "", f"usage: python {script} {arguments} [--key=value ...]"]
    for field in dataclasses.fields(cls):
        kind = _spell(_fields(cls)[field.name])
        lines.append(f"  --{field.name}={field.default}  ({kind})\n      {comments.get(field.name, '').strip()}")
    return "\n".join(lines)
