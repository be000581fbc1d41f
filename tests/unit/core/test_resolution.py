"""What a server's word about a transaction means."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_pool.core.resolution import Answer, Epoch, Mark, Reply, judge, judge_token

EPOCH = Epoch(system="7", timeline=1, stats_reset="1.5")
MARK = Mark(xid=753, epoch=EPOCH)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("committed", Answer.COMMITTED),
        ("aborted", Answer.ABORTED),
        ("in progress", Answer.IN_PROGRESS),
        (None, Answer.UNKNOWN),
        ("something new", Answer.UNKNOWN),
    ],
)
def test_in_the_same_epoch_the_status_counts(status, expected):
    """And what the server has forgotten is unknown."""
    assert judge(MARK, Reply(status=status, epoch=EPOCH)) is expected


@pytest.mark.parametrize("status", ["committed", "aborted", "in progress", None])
@pytest.mark.parametrize(
    ("mark", "reply"),
    [
        (MARK, {"epoch": replace(EPOCH, system="8")}),
        (MARK, {"epoch": replace(EPOCH, timeline=2)}),
        (MARK, {"epoch": replace(EPOCH, stats_reset="2.5")}),
        (MARK, {"epoch": None}),
        (MARK, {"epoch": EPOCH, "in_recovery": True}),
        (Mark(xid=753), {"epoch": EPOCH}),
        (Mark(xid=753), {"epoch": None}),
        (Mark(epoch=EPOCH), {"epoch": EPOCH}),
    ],
    ids=["system", "timeline", "crash", "no epoch now", "standby", "no epoch then", "no epoch ever", "no id"],
)
def test_otherwise_no_status_is_believed(mark, reply, status):
    """The id may be a stranger's."""
    assert judge(mark, Reply(status=status, **reply)) is Answer.UNKNOWN


@pytest.mark.parametrize(
    ("fenced", "expected"), [(True, Answer.ABORTED), (False, Answer.COMMITTED), (None, Answer.IN_PROGRESS)]
)
def test_a_tokens_row_tells_who_was_first(fenced, expected):
    """The transaction, or whoever asked."""
    assert judge_token(fenced=fenced) is expected
