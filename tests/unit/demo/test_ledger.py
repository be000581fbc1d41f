"""The ledger that the demo and the chaos tests share: every contradiction between outcomes and rows is found."""

from __future__ import annotations

import pytest

from demo.ledger import Outcome, Write, audit


def contradictions(writes: dict[int, Write], rows: dict[int, int]) -> list[tuple[str, int]]:
    """List what should not be, each with the id."""
    found = audit(writes, rows)
    names = ("lost", "duplicated", "ghosts", "torn", "unexpected")
    return [(name, number) for name in names for number in getattr(found, name)]


@pytest.mark.parametrize(
    ("outcome", "rows", "contradiction"),
    [
        (Outcome.DONE, {7: 1}, None),
        (Outcome.DONE, {}, "lost"),
        (Outcome.DONE, {7: 2}, "duplicated"),
        (Outcome.UNKNOWN, {}, None),
        (Outcome.UNKNOWN, {7: 1}, None),
        (Outcome.UNKNOWN, {7: 2}, "duplicated"),
        (Outcome.UNANSWERED, {}, None),
        (Outcome.UNANSWERED, {7: 1}, None),
        (Outcome.FAILED, {}, None),
        (Outcome.FAILED, {7: 1}, "ghosts"),
        (None, {7: 1}, "unexpected"),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_audit_finds_every_contradiction(
    outcome: Outcome | None, rows: dict[int, int], contradiction: str | None, mirrored: bool
):
    """Each combination of an outcome and the rows has the one contradiction that it should have."""
    writes = {} if outcome is None else {7: Write(outcome=outcome, mirrored=mirrored)}
    if mirrored and outcome is not None:
        rows = rows | {-number: 1 for number in rows}
    assert contradictions(writes, rows) == ([] if contradiction is None else [(contradiction, 7)])


def test_the_audit_finds_half_a_transaction():
    """Whichever half it is, and whatever the outcome."""
    writes = {7: Write(outcome=Outcome.UNKNOWN, mirrored=True)}
    assert contradictions(writes, {7: 1}) == contradictions(writes, {-7: 1}) == [("torn", 7)]


def test_writes_of_unknown_outcome_are_listed_by_what_became_of_them():
    """Neither is a contradiction."""
    writes = {number: Write(outcome=Outcome.UNKNOWN) for number in (1, 2)}
    found = audit(writes, {2: 1})
    assert (found.unknown_present, found.unknown_absent) == ([2], [1])
