"""README.md and the documentation: what they say about verdicts, arguments and events is what the package does."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from resilient_pool import events
from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.events import Event
from resilient_pool.retry.verdict import Outcome

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_script():
    specification = importlib.util.spec_from_file_location("update_docs", ROOT / "scripts" / "update_docs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


SCRIPT = load_script()


@pytest.mark.parametrize("name", SCRIPT.PARTS)
def test_the_tables_are_those_of_the_package(name):
    """They are as `make tables` writes them; if this fails, run it and read what changed."""
    text = SCRIPT.PARTS[name][0].read_text(encoding="utf-8")
    assert SCRIPT.render(name, text) == text


@pytest.mark.parametrize("name", SCRIPT.PARTS)
def test_text_outside_the_markers_is_left_alone(name):
    """A page whose table was emptied becomes the same page again."""
    text = SCRIPT.PARTS[name][0].read_text(encoding="utf-8")
    emptied = re.sub(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", r"\1\2", text, flags=re.DOTALL)
    assert emptied != text
    assert SCRIPT.render(name, emptied) == text


def test_a_page_without_markers_is_refused():
    """The script says which marker is missing, instead of writing nothing."""
    with pytest.raises(ValueError, match="verdicts:begin"):
        SCRIPT.render("verdicts", "# Nothing here\n")


def test_every_argument_is_described():
    """No argument is left out of the table."""
    table = (DOCS / "reference" / "arguments.md").read_text(encoding="utf-8")
    assert [argument.name for argument in ARGUMENTS if f"| `{argument.name}` |" not in table] == []


@pytest.mark.parametrize("outcome", Outcome, ids=lambda outcome: outcome.value)
@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "retries.md"], ids=lambda page: page.stem)
def test_every_outcome_is_explained(page, outcome):
    """The table that says what is tried again has a line for each outcome."""
    assert re.search(rf"^\| `{outcome.value}`", page.read_text(encoding="utf-8"), re.MULTILINE)


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
    """An author of a dashboard finds the names and fields in one place."""
    page = (DOCS / "reference" / "events.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith(f"| `{kind.name}` |"))
    assert re.findall(r"`(\w+)`", line.rpartition(" | ")[2]) == [field.name for field in dataclasses.fields(kind)]


def test_the_readme_fits_on_two_screens():
    """What needs more room stands in the documentation."""
    assert len(README.splitlines()) <= 120


def test_every_link_of_the_readme_leads_to_a_file():
    """A page or a picture that was moved is noticed."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_page_stands_in_the_navigation():
    """A page that no reader can reach is noticed, and an entry without a page as well."""
    listed = set(
        re.findall(r"[\w./-]+\.md\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    )
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize(
    "message",
    [
        "connection was closed in the middle of operation",
        "server closed the connection unexpectedly",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "<class 'asyncpg.exceptions._base.InterfaceError'>: connection is closed",
        "cannot perform operation: another operation is in progress",
        "connection has been released back to the pool",
        "the database system is shutting down",
        "the database system is not yet accepting connections",
        'prepared statement "__asyncpg_stmt_1__" already exists',
        'prepared statement "__asyncpg_stmt_1__" does not exist',
        "remaining connection slots are reserved for non-replication superuser connections",
        "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00",
        "Can't reconnect until invalid transaction is rolled back",
        "current transaction is aborted, commands ignored until end of transaction block",
        "pgbouncer cannot connect to server",
        "query_wait_timeout",
        "MaxClientsInSessionMode: max clients reached",
        "Tenant or user not found",
        "Couldn't connect to compute node",
        "nodename nor servname provided, or not known",
        "attached to a different loop",
        "Event loop is closed",
    ],
)
def test_a_message_is_found_as_it_stands_in_a_log(message):
    """A reader who pastes it into a text search of the symptoms finds it, whole and with its class."""
    assert message in (DOCS / "symptoms.md").read_text(encoding="utf-8")


def test_every_page_that_an_error_names_is_there():
    """An error's text leads to a page, and to a heading on it."""
    named = {
        match
        for module in (ROOT / "resilient_pool").rglob("*.py")
        for match in re.findall(r"docs/([\w/-]+\.md)(?:#([\w-]+))?", module.read_text(encoding="utf-8"))
    }
    assert len(named) > 3
    for page, anchor in named:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert not anchor or f"{{ #{anchor} }}" in text, (page, anchor)
