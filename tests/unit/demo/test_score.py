"""The demo's bookkeeping: what counts as a failure, and what the rows say about the answers."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from demo.results import Answer, Ledger, Night, Score, failings, most_attempts


def answer(kind: str = "read", row: int | None = None, error: str | None = None, seconds: float = 1.0) -> Answer:
    """Make an answer that came after so many seconds."""
    return Answer(kind=kind, row=row, began=10.0, ended=10.0 + seconds, error=error)


@pytest.mark.parametrize(
    ("kind", "error", "failures", "unknown"),
    [
        ("read", None, 0, 0),
        ("read", "ConnectionDoesNotExistError", 1, 0),
        ("read", "OutcomeUnknownError", 1, 0),
        ("write", "OutcomeUnknownError", 1, 0),
        ("insert", "OutcomeUnknownError", 0, 1),
        ("insert", "TimeoutError", 1, 0),
    ],
)
def test_only_a_plain_insert_may_be_reported_unknown(kind: str, error: str | None, failures: int, unknown: int):
    """Whatever may run twice can be repeated, so for that the same error is a failure."""
    score = Score()
    score.add(answer(kind, error=error), act="reset")
    total = score.total()
    assert (total.operations, total.failures, total.unknown) == (1, failures, unknown)


def test_figures_are_kept_per_act_and_added_up():
    """The slowest answer of all is the slowest of any act; the others are sums."""
    score = Score()
    score.add(answer(seconds=1.0), act="close")
    score.add(answer(seconds=3.0, error="TimeoutError"), act="reset")
    score.add(answer(seconds=2.0, error="never answered"), act="reset")
    assert score.acts["close"].failures == 0
    assert score.acts["reset"].failures == 2
    assert score.total().operations == 3
    assert score.total().unanswered == 1
    assert score.total().slowest == 3.0


def test_nobody_waits_while_the_process_is_frozen():
    """Of five seconds that reach two seconds into a freeze, three were waited."""
    score = Score()
    score.add(answer(seconds=5.0), act="freeze", frozen=[(13.0, 20.0), (30.0, 40.0)])
    assert score.total().slowest == pytest.approx(3.0)


def test_the_ledger_compares_answers_with_rows():
    """Row 1 is right, 2 is lost, 3 is there twice, 4 failed and is there, 5 failed and is not, 6 and 7 were unknown."""
    score = Score()
    for row in (1, 2, 3):
        score.add(answer("write", row), act="close")
    for row in (4, 5):
        score.add(answer("write", row, "TimeoutError"), act="close")
    for row in (6, 7):
        score.add(answer("insert", row, "OutcomeUnknownError"), act="close")
    ledger = score.compare({1: 1, 3: 2, 4: 1, 6: 1})
    assert ledger == Ledger(lost=1, duplicated=1, ghosts=1, unknown_present=1)


@pytest.mark.parametrize("wrong", ["lost", "duplicated", "ghosts"])
def test_each_wrong_row_is_a_failing(wrong: str):
    """One row is enough; what was reported unknown and is there is none."""
    score = Score()
    score.add(answer("write", 1), act="close")
    right = {"lost": 0, "duplicated": 0, "ghosts": 0, "unknown_present": 3}
    assert failings(score, Ledger(**right)) == []
    assert len(failings(score, Ledger(**{**right, wrong: 1}))) == 1


def test_an_application_that_did_nothing_is_a_failing():
    """An empty score must not pass for a clean one."""
    nothing_wrong = Ledger(lost=0, duplicated=0, ghosts=0, unknown_present=0)
    assert failings(Score(), nothing_wrong) == ["the application wrote nothing at all"]


def good_night(**otherwise: object) -> Night:
    """Make a night in which every promise was kept, but for what is said otherwise."""
    return Night(**{"asked": 100, "answered": 100, "slowest": 5.3, "attempts": 9, "asleep_after": 3.5, **otherwise})


def test_the_ends_of_requests_are_counted():
    """The slowest is the slowest of all, answered or not."""
    night = Night()
    night.add(1.0, None)
    night.add(2.0, ConnectionResetError("gone\n away"))
    assert (night.answered, night.failures, night.slowest) == (1, 1, 2.0)
    assert list(night.errors) == ["request: ConnectionResetError: gone away"]


def test_a_good_night_has_no_failings():
    """Neither a request nor the database was disturbed."""
    assert good_night().failings(5.0) == []


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"errors": Counter({"request: TimeoutError: ": 2})}, "requests failed although .*: 2"),
        ({"answered": 0}, "no request was answered"),
        ({"slowest": 7.1}, "a request took 7.1 s, and its database woke in 5 s"),
        ({"attempts": 10}, "attempts to connect while its database woke: 10, more than 9"),
        ({"asleep_after": None}, "could not fall asleep again"),
    ],
)
def test_each_disturbance_of_the_night_is_a_failing(wrong: dict[str, object], complaint: str):
    """One is enough, and it is said which."""
    (said,) = good_night(**wrong).failings(5.0)
    assert re.search(complaint, said)


def test_a_longer_resume_may_cost_more_attempts():
    """One for each pause that a patient prober makes at least."""
    assert [most_attempts(seconds) for seconds in (0.5, 5.0, 15.0)] == [9, 9, 22]
