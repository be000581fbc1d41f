"""Twenty workers, a mistreated server and a mistreated network: what callers were told is what the database holds.

`RESILIENT_POOL_CHAOS_SECONDS` makes it longer, `RESILIENT_POOL_CHAOS_SEED` another one; `make chaos` shows the ledger.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
from ledger import BLOWS, Entry, Report, Told, audit, keep, schedule

SECONDS = float(os.environ.get("RESILIENT_POOL_CHAOS_SECONDS", "6"))
SEED = int(os.environ.get("RESILIENT_POOL_CHAOS_SEED", "1"))


@pytest.fixture(scope="module")
def report() -> Report:
    """One run, looked at from many sides."""
    report = asyncio.run(keep(SEED, SECONDS))
    sys.stdout.write(f"{report}\n")
    return report


def test_the_mistreatment_was_felt(report):
    """Blows of every kind fell and met requests, and enough calls were made for the rest to mean something."""
    assert set(report.blows) == {*BLOWS, "terminate", "terminate some", "restart"}
    assert report.fired > 0
    assert report.retries > 0
    assert report.audit.unknown_present > 0
    assert report.audit.unknown_absent > 0
    assert len(report.book.entries) > 20 * SECONDS
    assert report.book.reads > 20 * SECONDS


def test_no_caller_hung(report):
    """Every call, and closing the pool, ended within the limit."""
    assert report.book.hung == []
    assert [number for number, entry in report.book.entries.items() if entry.told is Told.NOTHING] == []


def test_nothing_acknowledged_is_absent(report):
    """What the caller was told is done, is done."""
    assert report.audit.lost == []


def test_nothing_is_present_twice(report):
    """Neither a write that was repeated nor one whose outcome nobody knew; and nothing that nobody wrote."""
    assert report.audit.doubled == []
    assert report.audit.strangers == []


def test_nothing_reported_failed_is_present(report):
    """An error that does not say "unknown" says "no"."""
    assert report.audit.ghosts == [], report.book.plain_errors


def test_no_plain_write_failed_for_want_of_patience(report):
    """Whatever was not lost on the way was waited for."""
    assert report.book.plain_errors == []


def test_no_read_surfaced_an_error(report):
    """Reads are repeated until they are answered, and every answer agrees with what was acknowledged before."""
    assert report.book.read_errors == []
    assert report.book.wrong_reads == []


def test_no_idempotent_write_surfaced_an_error(report):
    """So are writes that may safely run twice."""
    assert report.book.repeatable_errors == []


def test_no_connection_is_left_over(report):
    """A closed pool holds nothing open, neither at the server nor at the proxy."""
    assert (report.sessions_left, report.sockets_left) == (0, 0)


@pytest.mark.parametrize(
    ("told", "times", "complaint"),
    [
        (Told.DONE, 1, None),
        (Told.DONE, 0, "lost"),
        (Told.DONE, 2, "doubled"),
        (Told.UNKNOWN, 0, None),
        (Told.UNKNOWN, 1, None),
        (Told.UNKNOWN, 2, "doubled"),
        (Told.FAILED, 0, None),
        (Told.FAILED, 1, "ghosts"),
        (None, 1, "strangers"),
    ],
)
def test_the_audit_finds_every_contradiction(told, times, complaint):
    """Each combination of what was told and what is there is judged as it should be."""
    entries = {} if told is None else {7: Entry(repeatable=False, told=told)}
    found = audit(entries, {7: times} if times else {})
    lists = {"lost": found.lost, "doubled": found.doubled, "ghosts": found.ghosts, "strangers": found.strangers}
    assert lists == {name: [7] if name == complaint else [] for name in lists}


def test_a_seed_names_a_schedule():
    """The same seed draws the same blows, another one draws others."""
    assert schedule(1, 6.0) == schedule(1, 6.0) != schedule(2, 6.0)
