"""The README: what it says about verdicts and arguments is what the package does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import resilient_pool
from resilient_pool import events
from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.events import Event
from resilient_pool.retry.verdict import Outcome

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def load_script():
    specification = importlib.util.spec_from_file_location("update_readme", ROOT / "scripts" / "update_readme.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_package_and_of_the_last_benchmark():
    """They are as `make readme` writes them; if this fails, run it and read what changed."""
    assert load_script().render(TEXT) == TEXT


def test_text_outside_the_markers_is_left_alone():
    """A README whose tables were emptied becomes the same README again."""
    emptied = re.sub(
        r"(<!-- (verdicts|arguments|benchmarks|recovery):begin -->\n).*?(<!-- \2:end -->)",
        r"\1\3",
        TEXT,
        flags=re.DOTALL,
    )
    assert emptied != TEXT
    assert load_script().render(emptied) == TEXT


def test_a_readme_without_markers_is_refused():
    """The script says which marker is missing, instead of writing nothing."""
    with pytest.raises(ValueError, match="verdicts:begin"):
        load_script().render("# Nothing here\n")


@pytest.mark.parametrize("outcome", Outcome, ids=lambda outcome: outcome.value)
def test_every_outcome_is_explained(outcome):
    """The table that says what is tried again has a line for each outcome."""
    assert [line for line in TEXT.splitlines() if line.startswith(f"| `{outcome.value}` | ")] != []


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind.name != Event.name
    ],
    ids=lambda kind: kind.name,
)
def test_every_event_is_listed_with_all_its_fields(kind):
    """Whoever builds a dashboard finds the names and fields in the README."""
    line = next(line for line in TEXT.splitlines() if line.startswith(f"| `{kind.name}` |"))
    assert re.findall(r"`(\w+)`", line.rpartition(" | ")[2]) == [field.name for field in dataclasses.fields(kind)]


def test_the_example_is_a_program():
    """It compiles, and every name that it imports from the package is there."""
    example = re.search(r"```python\n(from contextlib.*?)```", TEXT, flags=re.DOTALL)[1]
    compile(example, "README.md", "exec")
    for name in re.findall(r"from resilient_pool import (\w+)", example):
        assert hasattr(resilient_pool, name)


def test_every_argument_is_described():
    """No argument is left out of the table."""
    table = TEXT.partition("<!-- arguments:begin -->")[2].partition("<!-- arguments:end -->")[0]
    assert [name for name in names_of_arguments() if f"| `{name}` |" not in table] == []


def names_of_arguments():
    return [argument.name for argument in ARGUMENTS]


def test_the_script_does_not_need_a_terminal_or_a_path():
    """Loading it changes neither the README nor `sys.path`."""
    before = list(sys.path)
    load_script()
    assert sys.path == before
    assert (ROOT / "README.md").read_text(encoding="utf-8") == TEXT
