"""The log of all calls of one chaos run: outcomes, errors, and what a crash of the server explains; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from demo.ledger import Outcome, Write


class Promise(Enum):
    """What the pool promises of a write."""

    PLAIN = "one-shot"
    """Done, not done, or of unknown outcome."""
    REPEATABLE = "idempotent"
    """Done, as often as it takes."""
    RESOLVED = "transactional"
    """Done once; unknown only if the server crashed during its COMMIT and there is no commit log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """One crash of the server.

    Attributes:
        began: The last moment before it, on a monotonic clock.
        over: When all of its processes had certainly ended.
    """

    began: float
    over: float


@dataclass(slots=True, kw_only=True)
class TracedWrite(Write):
    """One write of a worker, with what is known of its COMMIT.

    Attributes:
        promise: What its caller may expect.
        error: The text of its error.
        xid: The transaction's id, if the error named it.
        commit_sent: When its last COMMIT was sent, on a monotonic clock, if no answer to that came.
        ended: When the call ended.
    """

    promise: Promise
    error: str = ""
    xid: int | None = None
    commit_sent: float | None = None
    ended: float | None = None

    def was_in_flight(self, crash: Crash) -> bool:
        """Whether the answer to its COMMIT was outstanding when the server crashed.

        That is so if the COMMIT was sent on a connection to the server that crashed, was never answered, and its
        outcome was not resolved before the crash.
        """
        return (
            self.commit_sent is not None
            and self.ended is not None
            and self.commit_sent < crash.over
            and self.ended > crash.began
        )


@dataclass(slots=True, kw_only=True)
class CallLog:
    """What the workers record.

    Attributes:
        writes: Every write, by its id.
        reads: How many reads were answered.
        wrong: Answers that contradict what had been acknowledged before, or what was asked, as text.
        read_errors: Errors that reads ended in.
        hung: Calls that took too long, or were never answered, as text.
        slowest: Seconds the slowest call took.
    """

    writes: dict[int, TracedWrite] = field(default_factory=dict)
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    read_errors: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def ended_as(self, outcome: Outcome, promise: Promise | None = None) -> list[TracedWrite]:
        """List the writes of that outcome."""
        return [
            write for write in self.writes.values() if write.outcome is outcome and promise in (None, write.promise)
        ]

    def errors(self, promise: Promise, *outcomes: Outcome) -> list[str]:
        """List the errors of the writes of those outcomes to which that was promised."""
        return [write.error for outcome in outcomes for write in self.ended_as(outcome, promise)]

    def unexplained(self, crashes: Iterable[Crash]) -> list[str]:
        """List the transactions of unknown outcome whose COMMITs were not in flight during a crash.

        One whose error has no transaction id, so that its outcome cannot be queried later, is not explained either.
        """
        crashes = list(crashes)
        return [
            write.error
            for write in self.ended_as(Outcome.UNKNOWN, Promise.RESOLVED)
            if write.xid is None or not any(write.was_in_flight(crash) for crash in crashes)
        ]
