"""The demo's results: what counts as a failure, and what the rows say about the answers."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from demo.ledger import Audit, audit
from demo.results import Answer, PauseResult, Score, most_attempts, violations


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
    score.add(answer(kind, error=error), step="reset")
    total = score.total()
    assert (total.operations, total.failures, total.unknown) == (1, failures, unknown)


def test_figures_are_kept_per_act_and_added_up():
    """The slowest answer of all is the slowest of any step; the others are sums."""
    score = Score()
    score.add(answer(seconds=1.0), step="close")
    score.add(answer(seconds=3.0, error="TimeoutError"), step="reset")
    score.add(answer(seconds=2.0, error="never answered"), step="reset")
    assert score.steps["close"].failures == 0
    assert score.steps["reset"].failures == 2
    assert score.total().operations == 3
    assert score.total().unanswered == 1
    assert score.total().slowest == 3.0


def test_time_in_which_the_process_was_frozen_does_not_count_as_waiting():
    """Of five seconds that reach two seconds into a freeze, three were waited."""
    score = Score()
    score.add(answer(seconds=5.0), step="freeze", frozen=[(13.0, 20.0), (30.0, 40.0)])
    assert score.total().slowest == pytest.approx(3.0)


def test_answers_are_compared_with_rows():
    """Row 1 is right, 2 is lost, 3 is there twice, 4 failed and is there, 5 failed and is not, 6 and 7 were unknown, 8 has no answer."""
    score = Score()
    for row in (1, 2, 3):
        score.add(answer("write", row), step="close")
    for row in (4, 5):
        score.add(answer("write", row, "TimeoutError"), step="close")
    for row in (6, 7):
        score.add(answer("insert", row, "OutcomeUnknownError"), step="close")
    score.add(answer("write", 8, "never answered"), step="close")
    found = audit(score.writes, {1: 1, 3: 2, 4: 1, 6: 1, 8: 1})
    assert (found.lost, found.duplicated, found.ghosts) == ([2], [3], [4])
    assert (found.unknown_present, found.unknown_absent) == ([6], [7])


@pytest.mark.parametrize("wrong", ["lost", "duplicated", "ghosts"])
def test_each_wrong_row_is_a_violation(wrong: str):
    """One row is enough; what was reported unknown and is there is none."""
    score = Score()
    score.add(answer("write", 1), step="close")
    assert violations(score, nothing_wrong(unknown_present=[7, 8, 9])) == []
    assert len(violations(score, nothing_wrong(**{wrong: [1]}))) == 1


def test_an_application_that_did_nothing_is_a_violation():
    """An empty score must not pass for a clean one."""
    assert violations(Score(), nothing_wrong()) == ["the application wrote nothing at all"]


def nothing_wrong(**otherwise: list[int]) -> Audit:
    """Make an audit in which every list is empty, except those given."""
    return Audit(**{name: otherwise.get(name, []) for name in Audit.__slots__})


def good_result(**otherwise: object) -> PauseResult:
    """Make a result in which every promise was kept, except for the given values."""
    return PauseResult(
        **{"asked": 100, "answered": 100, "slowest": 5.3, "attempts": 9, "paused_after": 3.5, **otherwise}
    )


def test_the_ends_of_requests_are_counted():
    """The slowest is the slowest of all, answered or not."""
    result = PauseResult()
    result.add(1.0, None)
    result.add(2.0, ConnectionResetError("gone\n away"))
    assert (result.answered, result.failures, result.slowest) == (1, 1, 2.0)
    assert list(result.errors) == ["request: ConnectionResetError: gone away"]


def test_a_good_result_has_no_violations():
    """Neither a request nor the database was disturbed."""
    assert good_result().violations(5.0) == []


@pytest.mark.parametrize(
    ("wrong", "violation"),
    [
        ({"errors": Counter({"request: TimeoutError: ": 2})}, "requests failed although .*: 2"),
        ({"answered": 0}, "no request was answered"),
        ({"slowest": 7.1}, "a request took 7.1 s, and its database resumed in 5 s"),
        ({"attempts": 10}, "attempts to connect while its database resumed: 10, more than 9"),
        ({"paused_after": None}, "could not pause again"),
    ],
)
def test_each_disturbance_of_the_pause_is_a_violation(wrong: dict[str, object], violation: str):
    """One is enough, and it is said which."""
    (said,) = good_result(**wrong).violations(5.0)
    assert re.search(violation, said)


def test_a_longer_resume_may_cost_more_attempts():
    """One for each wait of a prober."""
    assert [most_attempts(seconds) for seconds in (0.5, 5.0, 15.0)] == [9, 9, 22]
