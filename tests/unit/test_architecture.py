"""ARCHITECTURE.md: its picture is the one of the imports, and what it names is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PLACES = [line for line in TEXT.partition("## Where to put what")[2].splitlines() if re.match(r"\| .*`", line)]


def load_script():
    specification = importlib.util.spec_from_file_location(
        "draw_architecture", ROOT / "scripts" / "draw_architecture.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    """The script that draws the picture."""
    return load_script()


def test_the_picture_is_that_of_the_imports(script):
    """It is as `make tables` draws it; if this fails, run it and read what changed."""
    assert script.render(TEXT) == TEXT


def test_the_picture_leaves_out_what_follows(script):
    """An import that is implied by two others is no arrow of its own."""
    graph = {"a": frozenset({"b", "c"}), "b": frozenset({"c"}), "c": frozenset()}
    assert list(script.direct(graph)) == [("a", "b"), ("b", "c")]


def test_a_page_without_markers_is_refused(script):
    """The script says which marker is missing, instead of writing nothing."""
    with pytest.raises(ValueError, match="picture:begin"):
        script.render("# Nothing here\n")


def test_every_room_is_described(script):
    """No folder, and no module beside them, is left out of the table of rooms."""
    rooms = TEXT.partition("| room |")[2].partition("\n\n")[0]
    names = {part for part in script.parts() if not part.startswith("__")}
    assert {name for name in names if f"`{name}/`" not in rooms and f"`{name}.py`" not in rooms} == set()


def test_every_file_named_is_there():
    """A reader finds each file of the page, by its path from the root or from the package."""
    paths = set(re.findall(r"`((?:[\w.]+/)*\w+\.py)`", TEXT))
    assert {
        path for path in paths if not any((base / path).is_file() for base in (ROOT, ROOT / "resilient_pool"))
    } == set()


@pytest.mark.parametrize("place", PLACES, ids=lambda line: line.split("|")[1].strip())
def test_what_to_look_for_is_where_it_is_said_to_be(place):
    """The name that stands for a kind of change is in the file that the change belongs to, beside its imports, and its test exists."""
    _, _, where, name, test, _ = place.split("|")
    path = ROOT / re.search(r"`([^`]+)`", where)[1]
    text = re.sub(r"^(?:from|import) .*", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.search(rf"\b{re.escape(name.strip(' `'))}\b", text)
    assert (ROOT / test.strip(" `")).is_file()
