"""The README says what the code says."""

import re

from conftest import ROOT

from config import help_text
from train import TrainConfig

README = (ROOT / "README.md").read_text()


def test_the_options_table_is_that_of_the_dataclass():
    fields = re.findall(r"^  --(\w+)=(.*?)  \((.*)\)\n      (.*)$", help_text(TrainConfig), re.MULTILINE)
    assert len(fields) > 30
    table = "\n".join(f"| `{name}` | {default} | {meaning.replace('|', '/')} |" for name, default, _, meaning in fields)
    assert table in README, f"the table of options should be\n{table}"


def test_every_file_that_the_documents_name_exists():
    names = set(re.findall(r"[\w./$]*\w\.(?:py|png|md)\b", README + (ROOT / "RESULTS.md").read_text()))
    variants = [name.replace("$v", v).replace("$n", n) for name in names for v in ("vanilla", "kv") for n in ("0.03m", "0.8m")]
    assert len(names) > 8
    for name in variants:
        assert (ROOT / name).exists() or name.startswith("out/"), name
