"""What a server's word about a transaction means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_pool.retry.commit_status import (
    RETENTION,
    CommitStatus,
    CommitToken,
    Epoch,
    Token,
    XactStatusReply,
    interpret_status,
    interpret_token,
)

EPOCH = Epoch(system="7", timeline="00000003", stats_reset="1.5")
TOKEN = Token(value="t", log="5/6", written_at=1000.0)
MARK = CommitToken(xid=753, epoch=EPOCH)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("committed", CommitStatus.COMMITTED),
        ("aborted", CommitStatus.ABORTED),
        ("in progress", CommitStatus.IN_PROGRESS),
        (None, CommitStatus.UNKNOWN),
        ("something new", CommitStatus.UNKNOWN),
    ],
)
def test_in_the_same_epoch_the_status_counts(status, expected):
    """And what the server has forgotten is unknown."""
    assert interpret_status(MARK, XactStatusReply(status=status, epoch=EPOCH)) is expected


@pytest.mark.parametrize("status", ["committed", "aborted", "in progress", None])
@pytest.mark.parametrize(
    ("mark", "reply"),
    [
        (MARK, {"epoch": replace(EPOCH, timeline="0000000A")}),
        (MARK, {"epoch": replace(EPOCH, stats_reset="2.5")}),
        (MARK, {"epoch": None}),
        (CommitToken(xid=753), {"epoch": EPOCH}),
        (CommitToken(xid=753), {"epoch": None}),
        (CommitToken(epoch=EPOCH), {"epoch": EPOCH}),
    ],
    ids=["timeline", "crash", "no epoch now", "no epoch then", "no epoch ever", "no id"],
)
def test_otherwise_no_status_is_believed(mark, reply, status):
    """The id may be a stranger's."""
    assert interpret_status(mark, XactStatusReply(status=status, **reply)) is CommitStatus.UNKNOWN


STARTED = replace(EPOCH, started=100.0, asked_at=200.25)


@pytest.mark.parametrize(
    ("later", "goes_on"),
    [
        ({"started": 100.0, "asked_at": 300.0, "checkpoint_at": 50.0}, True),
        ({"started": 250.0, "asked_at": 300.0, "checkpoint_at": 200.0}, True),
        ({"started": 150.0, "asked_at": 300.0, "checkpoint_at": 250.0}, False),
        ({"started": 250.0, "asked_at": 300.0, "checkpoint_at": 199.0}, False),
        ({"started": 250.0, "asked_at": 300.0, "checkpoint_at": 250.0, "stats_reset": "2.5"}, False),
    ],
    ids=["the same start", "a clean restart", "a copy that ran already", "a copy that was started later", "a crash"],
)
def test_a_copy_of_a_server_that_was_shut_down_is_another_server(later, goes_on):
    """It has the same statistics, and gives the same ids to others; only a clean restart ends with a later checkpoint."""
    reply = XactStatusReply(status="committed", epoch=replace(EPOCH, **later))
    expected = CommitStatus.COMMITTED if goes_on else CommitStatus.UNKNOWN
    assert interpret_status(CommitToken(xid=753, epoch=STARTED), reply) is expected


@pytest.mark.parametrize("status", ["committed", "aborted", "in progress", None])
@pytest.mark.parametrize(
    "reply",
    [
        {"epoch": EPOCH, "in_recovery": True},
        {"epoch": None, "in_recovery": True},
        {"epoch": replace(EPOCH, system="8")},
        {"epoch": replace(EPOCH, timeline="00000002")},
    ],
    ids=["a standby", "a standby of any epoch", "another system", "a server left behind by a failover"],
)
def test_a_server_that_cannot_know_is_not_the_last_to_be_asked(reply, status):
    """Its word is its own: another one may know."""
    assert interpret_status(MARK, XactStatusReply(status=status, **reply)) is CommitStatus.ELSEWHERE


@pytest.mark.parametrize(
    ("fenced", "log", "age", "expected"),
    [
        (True, "5/6", 0.0, CommitStatus.ABORTED),
        (True, "5/6", RETENTION - 1, CommitStatus.ABORTED),
        (True, "5/6", RETENTION, CommitStatus.UNKNOWN),
        (True, "5/7", 0.0, CommitStatus.UNKNOWN),
        (False, "5/6", 0.0, CommitStatus.COMMITTED),
        (False, "5/6", RETENTION * 2, CommitStatus.COMMITTED),
        (False, "5/7", 0.0, CommitStatus.COMMITTED),
        (None, "5/6", 0.0, CommitStatus.IN_PROGRESS),
    ],
)
def test_a_tokens_row_says_who_was_first_as_long_as_none_was_deleted(fenced, log, age, expected):
    """Absence proves nothing after the retention time, nor in a table that was made anew or emptied."""
    assert interpret_token(TOKEN, fenced=fenced, log=log, now=TOKEN.written_at + age) is expected
