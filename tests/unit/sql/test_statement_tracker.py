"""What follows for a transaction's end from what was sent in it."""

from __future__ import annotations

import pytest

from resilient_pool.sql.read_only import StatementReader
from resilient_pool.sql.statement_tracker import StatementTracker


@pytest.fixture
def tracker():
    return StatementTracker(StatementReader())


def seen(tracker):
    return {
        name
        for name in ("may_write", "may_have_ended", "may_change_session", "may_be_anything", "ended_by_text")
        if getattr(tracker, name)
    }


@pytest.mark.parametrize(
    ("sql", "flags", "reads"),
    [
        ("SELECT 1", set(), True),
        ("SELECT audit(1)", {"may_write", "may_change_session"}, True),
        ("SELECT id FROM t FOR UPDATE", {"may_write"}, False),
        ("SELECT id FROM t WHERE id = 1 FOR NO KEY UPDATE OF t SKIP LOCKED;", {"may_write"}, False),
        ("INSERT INTO t VALUES (1)", {"may_write"}, False),
        ("  update t SET a = 1", {"may_write"}, False),
        ("SET LOCAL ROLE tenant", {"may_write", "may_change_session"}, False),
        ("SELECT set_config('role', 'tenant', true)", {"may_write", "may_change_session"}, False),
        ("COPY", {"may_write"}, False),
        ("NOTIFY jobs", {"may_write", "may_change_session"}, False),
        (
            "COMMIT",
            {"may_write", "may_change_session", "may_have_ended", "ended_by_text"},
            False,
        ),
        (
            None,
            {"may_write", "may_change_session", "may_have_ended", "may_be_anything"},
            False,
        ),
    ],
)
def test_each_text_says_what_may_have_happened(tracker, sql, flags, reads):
    """And what has none may be anything."""
    tracker.sent("SELECT 2")
    tracker.sent(sql)
    assert seen(tracker) == flags
    assert (tracker.reads is not None) is reads


def test_texts_are_kept_once_each_and_not_without_limit(tracker):
    """Too many are not checked one by one after a failure."""
    tracker.sent("SELECT 1")
    tracker.sent("SELECT 1")
    assert tracker.reads == ("SELECT 1",)
    for number in range(300):
        tracker.sent(f"SELECT {number}")
    assert tracker.reads is None
