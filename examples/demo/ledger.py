"""What callers were told about their writes, compared with the rows in the database; pure, and shared with tests/chaos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """What the caller of a write was told."""

    UNANSWERED = "unanswered"
    """Nothing: the call did not end."""
    DONE = "done"
    """Success."""
    UNKNOWN = "unknown"
    """`OutcomeUnknownError`: the write may or may not be there."""
    FAILED = "failed"
    """Any other error: the write must not be there."""


@dataclass(slots=True, kw_only=True)
class Write:
    """One write.

    Attributes:
        outcome: What the caller was told.
        mirrored: Whether the same transaction also writes the negative of the id.
    """

    outcome: Outcome = Outcome.UNANSWERED
    mirrored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The audit compared with the database; all but the last two should be empty.

    Attributes:
        lost: Ids reported done, but absent.
        duplicated: Ids present more than once, whatever was reported.
        ghosts: Ids reported failed, but present.
        torn: Ids of transactions of which one half is present and the other is absent.
        unexpected: Ids present that were never written.
        unknown_present: Ids of unknown outcome that are present.
        unknown_absent: Ids of unknown outcome that are absent.
    """

    lost: list[int]
    duplicated: list[int]
    ghosts: list[int]
    torn: list[int]
    unexpected: list[int]
    unknown_present: list[int]
    unknown_absent: list[int]


def audit(writes: Mapping[int, Write], rows: Mapping[int, int]) -> Audit:
    """Compare what was reported with what is there.

    Args:
        writes: The writes by id.
        rows: How often each id is in the table.
    """

    def ids(outcome: Outcome, *, present: bool) -> list[int]:
        return [row for row, write in writes.items() if write.outcome is outcome and (row in rows) == present]

    mirrored = [row for row, write in writes.items() if write.mirrored]
    written = {*writes, *(-row for row in mirrored)}
    return Audit(
        lost=ids(Outcome.DONE, present=False),
        duplicated=[row for row, times in rows.items() if times > 1],
        ghosts=ids(Outcome.FAILED, present=True),
        torn=[row for row in mirrored if (row in rows) != (-row in rows)],
        unexpected=[row for row in rows if row not in written],
        unknown_present=ids(Outcome.UNKNOWN, present=True),
        unknown_absent=ids(Outcome.UNKNOWN, present=False),
    )
