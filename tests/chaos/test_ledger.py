"""Twenty workers, a mistreated server and a mistreated network: what callers were told is what the database holds.

Four runs: the server is restarted cleanly or by a crash, with a commit log and without. `RESILIENT_POOL_CHAOS_SECONDS` makes
them longer together, `RESILIENT_POOL_CHAOS_SEED` gives them another seed; `make chaos` shows the ledgers.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
from book import Book, Crash, Entry, Promise, Told, audit
from ledger import WORKERS, Report, keep
from saboteur import BLOWS, CAUGHT, schedule
from workers import ROUNDS

RUNS = {
    "a clean restart": ("fast", None),
    "a clean restart and a commit log": ("fast", "public.commits"),
    "a crash": ("immediate", None),
    "a crash and a commit log": ("immediate", "public.commits"),
}
SECONDS = float(os.environ.get("RESILIENT_POOL_CHAOS_SECONDS", "17")) / len(RUNS)
SEED = int(os.environ.get("RESILIENT_POOL_CHAOS_SEED", "1"))


@pytest.fixture(scope="module", params=RUNS)
def report(request) -> Report:
    """One run, looked at from many sides."""
    restart, log = RUNS[request.param]
    report = asyncio.run(keep(SEED, SECONDS, restart=restart, commit_log=log))
    sys.stdout.write(f"{report}\n")
    return report


def test_the_mistreatment_was_felt(report):
    """Blows of every kind fell and met requests, and enough calls were made for the rest to mean something."""
    assert set(report.blows) == {*BLOWS, "terminate", "terminate some", "restart"}
    assert len(report.crashes) == (report.blows["restart"] if report.restart == "immediate" else 0)
    assert report.fired > 2 * CAUGHT + 2
    assert report.retries > 0
    assert report.resolved.total() > 0 or (report.crashes and not report.commit_log)
    assert report.audit.unknown_present > 0
    assert report.audit.unknown_absent > 0
    # A worker makes ten calls in turn: one plain write, two that may be repeated, three that are resolved, four or five reads.
    assert all(len(report.book.told(Told.DONE, promise)) > WORKERS * (ROUNDS - 1) for promise in Promise)
    assert report.book.reads > 4 * WORKERS * (ROUNDS - 1)


def test_no_caller_hung(report):
    """Every call, and closing the pool, ended within the limit."""
    assert report.book.hung == []
    assert report.book.told(Told.NOTHING) == []


def test_nothing_acknowledged_is_absent(report):
    """What the caller was told is done, is done."""
    assert report.audit.lost == []


def test_nothing_is_present_twice_or_by_half(report):
    """Neither a write that was repeated nor one whose outcome nobody knew; and nothing that nobody wrote."""
    assert report.audit.doubled == []
    assert report.audit.torn == []
    assert report.audit.strangers == []


def test_nothing_reported_failed_is_present(report):
    """An error that does not say "unknown" says "no"."""
    assert report.audit.ghosts == []


def test_no_read_surfaced_an_error(report):
    """Reads are repeated until they are answered, and every answer agrees with what was acknowledged before."""
    assert report.book.read_errors == []
    assert report.book.wrong == []


def test_no_plain_write_failed_for_want_of_patience(report):
    """Whatever was not lost on the way was waited for."""
    assert report.book.errors(Promise.PLAIN, Told.FAILED) == []


def test_no_idempotent_write_surfaced_an_error(report):
    """Writes that may safely run twice are repeated until they are done."""
    assert report.book.errors(Promise.REPEATABLE, Told.FAILED, Told.UNKNOWN) == []


def test_no_transaction_surfaced_an_error(report):
    """Nor did a call that is made exactly once: what failed was repeated as a whole."""
    assert report.book.errors(Promise.RESOLVED, Told.FAILED) == []


def test_of_no_transaction_the_outcome_is_unknown_but_of_those_the_server_crashed_over(report):
    """Through a clean restart, or with a commit log, every COMMIT is resolved; else only a crash leaves any unknown."""
    unknown = report.book.errors(Promise.RESOLVED, Told.UNKNOWN)
    if report.restart == "fast" or report.commit_log:
        assert unknown == []
    else:
        assert unknown != []
        assert report.book.unexplained(report.crashes) == []


def test_no_connection_is_left_over(report):
    """A closed pool holds nothing open, neither at the server nor at the proxy."""
    assert (report.sessions_left, report.sockets_left) == (0, 0)


@pytest.mark.parametrize(
    ("told", "rows", "complaint"),
    [
        (Told.DONE, {7: 1}, None),
        (Told.DONE, {}, "lost"),
        (Told.DONE, {7: 2}, "doubled"),
        (Told.UNKNOWN, {}, None),
        (Told.UNKNOWN, {7: 1}, None),
        (Told.UNKNOWN, {7: 2}, "doubled"),
        (Told.FAILED, {}, None),
        (Told.FAILED, {7: 1}, "ghosts"),
        (None, {7: 1}, "strangers"),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_audit_finds_every_contradiction(told, rows, complaint, mirrored):
    """Each combination of what was told and what is there is judged as it should be."""
    entries = {} if told is None else {7: Entry(promise=Promise.PLAIN, mirrored=mirrored, told=told)}
    if mirrored and told is not None:
        rows = rows | {-number: 1 for number in rows}
    assert complaints(entries, rows) == ([] if complaint is None else [(complaint, 7)])


def test_the_audit_finds_half_a_transaction():
    """Whichever half it is, and whatever was told."""
    entries = {7: Entry(promise=Promise.RESOLVED, mirrored=True, told=Told.UNKNOWN)}
    assert complaints(entries, {7: 1}) == complaints(entries, {-7: 1}) == [("torn", 7)]


def complaints(entries, rows) -> list[tuple[str, int]]:
    found = audit(entries, rows)
    names = ("lost", "doubled", "ghosts", "torn", "strangers")
    return [(name, number) for name in names for number in getattr(found, name)]


@pytest.mark.parametrize(
    ("sent", "told", "xid", "explained"),
    [
        (9.0, 11.0, 5, True),  # under way when the server crashed
        (10.5, 12.0, 5, True),  # sent to a server of whose end the client had not heard
        (8.0, 9.0, 5, False),  # given up before the crash
        (13.0, 14.0, 5, False),  # sent to the next server
        (None, 11.0, 5, False),  # answered, or never sent
        (9.0, 11.0, None, False),  # nobody can ask later
    ],
)
def test_only_a_crash_explains_that_nobody_knows(sent, told, xid, explained):
    """And only for a COMMIT whose answer was outstanding when it came."""
    entry = Entry(promise=Promise.RESOLVED, told=Told.UNKNOWN, error="?", xid=xid, commit_sent=sent, told_at=told)
    crash = Crash(began=10.0, over=12.5)
    assert Book(entries={7: entry}).unexplained([crash]) == ([] if explained else ["?"])
    assert Book(entries={7: entry}).unexplained([]) == ["?"]


def test_a_seed_names_a_schedule():
    """The same seed draws the same blows, another one draws others."""
    assert schedule(1, 6.0) == schedule(1, 6.0) != schedule(2, 6.0)
