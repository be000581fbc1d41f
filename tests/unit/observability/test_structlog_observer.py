"""The log: dotted names, the same fields for every failure, and silence where nobody asked for lines."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
import structlog
from structlog.testing import capture_logs

from resilient_pool.events import (
    CallerWaited,
    ConnectionDiscarded,
    ConnectionOpened,
    DiscardReason,
    OutcomeUnknown,
    PoolerDetected,
    RetryExhausted,
    RetryScheduled,
    WaitEnd,
    WaitReason,
)
from resilient_pool.observability.structlog_observer import StructlogObserver
from resilient_pool.retry.verdict import Fault, Outcome

OPENED = ConnectionOpened(elapsed=0.0041234567, server_pid=4711, size=1)
RETRY = RetryScheduled(
    operation="fetch",
    fault=Fault.DISCONNECTED,
    outcome=Outcome.UNKNOWN,
    sqlstate="57P01",
    attempt=1,
    delay=0.05,
    elapsed=0.2,
)
EXHAUSTED = RetryExhausted(
    operation="fetch",
    reason="deadline",
    fault=Fault.UNREACHABLE,
    outcome=Outcome.NOT_EXECUTED,
    sqlstate=None,
    attempt=7,
    elapsed=60.0,
)
UNKNOWN = OutcomeUnknown(operation="execute", fault=Fault.DISCONNECTED, sqlstate="08003", attempt=1, elapsed=0.3)
FIELDS_OF_POOLER = {"handshake_pid": 1, "backend_pid": 4711, "statement_cache_size": 0}
POOLER = PoolerDetected(**FIELDS_OF_POOLER)


def discarded(reason):
    return ConnectionDiscarded(reason=reason, age=61.5, server_pid=4711)


@pytest.fixture(autouse=True)
def _unconfigured_structlog():
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def configured():
    structlog.configure(cache_logger_on_first_use=False)
    with capture_logs() as lines:
        yield lines


def test_an_event_is_logged_under_its_name_with_its_attributes_as_fields(configured):
    """Enumerations become their words, durations have microseconds."""
    observer = StructlogObserver()
    observer(OPENED)
    observer(RETRY)
    assert configured == [
        {
            "event": "pool.connection.opened",
            "log_level": "debug",
            "elapsed": 0.004123,
            "server_pid": 4711,
            "size": 1,
        },
        {
            "event": "pool.retry.scheduled",
            "log_level": "info",
            "operation": "fetch",
            "fault": "disconnected",
            "outcome": "unknown",
            "sqlstate": "57P01",
            "attempt": 1,
            "delay": 0.05,
            "elapsed": 0.2,
        },
    ]


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (OPENED, "debug"),
        (discarded(DiscardReason.IDLE), "debug"),
        (discarded(DiscardReason.EXPIRED_LIFETIME), "debug"),
        (discarded(DiscardReason.MAX_QUERIES), "debug"),
        (discarded(DiscardReason.GENERATION), "debug"),
        (discarded(DiscardReason.CLOSING), "debug"),
        (discarded(DiscardReason.STALE), "info"),
        (discarded(DiscardReason.PING_FAILED), "info"),
        (discarded(DiscardReason.FAILED), "info"),
        (discarded(DiscardReason.RESET_FAILED), "info"),
        (CallerWaited(reason=WaitReason.BUSY, end=WaitEnd.SERVED, elapsed=0.01), "debug"),
        (CallerWaited(reason=WaitReason.AWAY, end=WaitEnd.SERVED, elapsed=9.5), "info"),
        (RETRY, "info"),
        (EXHAUSTED, "warning"),
        (UNKNOWN, "warning"),
        (POOLER, "warning"),
    ],
)
def test_housekeeping_is_quiet_trouble_is_info_and_defeat_is_a_warning(configured, event, level):
    """Each event has the level that says whether somebody should look."""
    StructlogObserver()(event)
    assert [(level, event.name)] == [(line["log_level"], line["event"]) for line in configured]


@pytest.mark.parametrize("event", [RETRY, EXHAUSTED, UNKNOWN], ids=lambda event: event.name)
def test_every_failure_is_logged_with_the_same_fields(configured, event):
    """Whoever filters by fault, outcome, SQLSTATE, attempt or elapsed time finds all of them."""
    StructlogObserver()(event)
    assert {"fault", "outcome", "sqlstate", "attempt", "elapsed"} <= set(configured[0])


def test_a_logger_that_was_given_is_used():
    """The application's own bound logger keeps its context."""
    lines = []

    def collect(logger, method, line):
        lines.append((method, dict(line)))
        raise structlog.DropEvent

    bound = structlog.make_filtering_bound_logger(logging.DEBUG)(None, [collect], {"service": "shop"})
    StructlogObserver(bound)(POOLER)
    assert lines == [("warning", {"service": "shop", "event": "pool.pooler.detected", **FIELDS_OF_POOLER})]


def test_without_configuration_lines_go_through_the_standard_library(caplog):
    """An application that uses `logging` alone sees them under the name `resilient_pool`, as key=value."""
    with caplog.at_level(logging.DEBUG, logger="resilient_pool"):
        StructlogObserver()(discarded(DiscardReason.IDLE))
    assert caplog.record_tuples == [
        (
            "resilient_pool",
            logging.DEBUG,
            "event=pool.connection.discarded reason=idle age=61.5 server_pid=4711",
        )
    ]


def test_structlog_may_be_configured_after_the_first_event(caplog):
    """The observer asks each time: the pool is often made before the logging is."""
    observer = StructlogObserver()
    observer(POOLER)
    stream = io.StringIO()
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"])],
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    observer(POOLER)
    assert (
        len(caplog.records),
        stream.getvalue(),
    ) == (1, "event='pool.pooler.detected' handshake_pid=1 backend_pid=4711 statement_cache_size=0\n")


PROGRAM = """
import sys
from resilient_pool.events import ConnectionDiscarded, DiscardReason, PoolerDetected
from resilient_pool.observability.structlog_observer import StructlogObserver
observer = StructlogObserver()
assert "structlog" not in sys.modules
observer(ConnectionDiscarded(reason=DiscardReason.STALE, age=1.0, server_pid=1))
observer(PoolerDetected(handshake_pid=1, backend_pid=2, statement_cache_size=0))
"""


def test_a_program_that_configured_nothing_sees_warnings_only():
    """A process of its own, without any logging set up, writes one line, and imports structlog only for its first event."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (
        ran.stdout,
        ran.stderr,
    ) == ("", "event=pool.pooler.detected handshake_pid=1 backend_pid=2 statement_cache_size=0\n")
