"""Twenty workers under faults of the server and of the network: what callers were told is what the database holds.

Four runs: the server is restarted cleanly or by a crash, with a commit log and without. `RESILIENT_POOL_CHAOS_SECONDS` makes
them longer together, `RESILIENT_POOL_CHAOS_SEED` gives them another seed; `make chaos` shows the reports.
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
from call_log import CallLog, Crash, Promise, TracedWrite
from chaos_run import WORKERS, Report, run_chaos
from fault_injector import COMMITS_IN_FLIGHT, PROXY_FAULTS, schedule
from workers import ROUNDS

from demo.ledger import Outcome

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
    """One run, which all tests look at."""
    restart, log = RUNS[request.param]
    report = asyncio.run(run_chaos(SEED, SECONDS, restart=restart, commit_log=log))
    sys.stdout.write(f"{report}\n")
    return report


def test_faults_of_every_kind_met_requests(report):
    """And enough calls were made for the other tests to mean something."""
    assert set(report.faults) == {*PROXY_FAULTS, "terminate", "terminate some", "restart"}
    assert len(report.crashes) == (report.faults["restart"] if report.restart == "immediate" else 0)
    assert report.fired > 2 * COMMITS_IN_FLIGHT + 2
    assert report.retries > 0
    assert report.resolved.total() > 0 or (report.crashes and not report.commit_log)
    assert report.audit.unknown_present
    assert report.audit.unknown_absent
    # A worker makes ten calls in turn: one plain write, two that may be repeated, three that are resolved, four or five reads.
    assert all(len(report.call_log.ended_as(Outcome.DONE, promise)) > WORKERS * (ROUNDS - 1) for promise in Promise)
    assert report.call_log.reads > 4 * WORKERS * (ROUNDS - 1)


def test_no_caller_hung(report):
    """Every call, and closing the pool, ended within the limit."""
    assert report.call_log.hung == []
    assert report.call_log.ended_as(Outcome.UNANSWERED) == []


def test_nothing_acknowledged_is_absent(report):
    """What the caller was told is done, is done."""
    assert report.audit.lost == []


def test_nothing_is_present_twice_or_by_half(report):
    """Neither a write that was repeated nor one of unknown outcome; and no row is there that was never written."""
    assert report.audit.duplicated == []
    assert report.audit.torn == []
    assert report.audit.unexpected == []


def test_nothing_reported_failed_is_present(report):
    """An error that does not say "unknown" says "no"."""
    assert report.audit.ghosts == []


def test_no_read_surfaced_an_error(report):
    """Reads are repeated until they are answered, and every answer agrees with what was acknowledged before."""
    assert report.call_log.read_errors == []
    assert report.call_log.wrong == []


def test_no_plain_write_failed_for_want_of_patience(report):
    """A call that was not sent waits for the server."""
    assert report.call_log.errors(Promise.PLAIN, Outcome.FAILED) == []


def test_no_idempotent_write_surfaced_an_error(report):
    """Writes that may safely run twice are repeated until they are done."""
    assert report.call_log.errors(Promise.REPEATABLE, Outcome.FAILED, Outcome.UNKNOWN) == []


def test_no_transaction_surfaced_an_error(report):
    """Nor did a call that is made exactly once: what failed was repeated as a whole."""
    assert report.call_log.errors(Promise.RESOLVED, Outcome.FAILED) == []


def test_only_a_crash_of_the_server_leaves_transactions_of_unknown_outcome(report):
    """Through a clean restart, or with a commit log, every COMMIT is resolved; else only a crash leaves any unknown."""
    unknown = report.call_log.errors(Promise.RESOLVED, Outcome.UNKNOWN)
    if report.restart == "fast" or report.commit_log:
        assert unknown == []
    else:
        assert unknown != []
        assert report.call_log.unexplained(report.crashes) == []


def test_no_connection_is_left_over(report):
    """A closed pool holds nothing open, neither at the server nor at the proxy."""
    assert (report.sessions_left, report.sockets_left) == (0, 0)


@pytest.mark.parametrize(
    ("sent", "ended", "xid", "explained"),
    [
        (9.0, 11.0, 5, True),  # in flight when the server crashed
        (10.5, 12.0, 5, True),  # sent to a server that had crashed, which the client did not know
        (8.0, 9.0, 5, False),  # given up before the crash
        (13.0, 14.0, 5, False),  # sent to the next server
        (None, 11.0, 5, False),  # answered, or never sent
        (9.0, 11.0, None, False),  # its outcome cannot be queried later
    ],
)
def test_only_a_crash_explains_an_unknown_outcome(sent, ended, xid, explained):
    """And only for a COMMIT whose answer was outstanding when it came."""
    write = TracedWrite(
        promise=Promise.RESOLVED, outcome=Outcome.UNKNOWN, error="?", xid=xid, commit_sent=sent, ended=ended
    )
    crash = Crash(began=10.0, over=12.5)
    assert CallLog(writes={7: write}).unexplained([crash]) == ([] if explained else ["?"])
    assert CallLog(writes={7: write}).unexplained([]) == ["?"]


def test_a_seed_names_a_schedule():
    """The same seed draws the same faults, another one draws others."""
    assert schedule(1, 6.0) == schedule(1, 6.0) != schedule(2, 6.0)
