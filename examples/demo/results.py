"""The results of one pool: what its application reported, and what the pool's promises forbid; pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from demo.ledger import Audit, Outcome, Write

UNKNOWN = "OutcomeUnknownError"
"""The name of the one error that is an honest answer to a plain INSERT cut in flight."""
UNANSWERED = "never answered"
"""Stands for the error of an operation that was still waiting when the application ended."""

ATTEMPTS, ATTEMPTS_LAST = 9, 5.0
"""How many attempts to connect are allowed, in how many seconds of a resume."""
BETWEEN_ATTEMPTS = 0.75
"""Seconds between two attempts of a prober, at least: each allows one attempt more during a longer resume."""
LATENESS = 2.0
"""Seconds after its resume within which a database must have answered every waiting request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of one operation of the application.

    Attributes:
        kind: `"read"`, `"page"`, `"write"` (may safely run twice) or `"insert"` (may not).
        row: The unique id that a write carried, else `None`.
        began: When it was asked for, on the machine's monotonic clock, in seconds.
        ended: When the answer was there, likewise.
        error: The name of the exception's type, or `None` for success.
        detail: The exception's text.
    """

    kind: str
    row: int | None
    began: float
    ended: float
    error: str | None = None
    detail: str = ""

    def to_json(self) -> str:
        """Write the answer as one line."""
        return json.dumps(asdict(self))

    @property
    def outcome(self) -> Outcome:
        """What the application was told; an unknown outcome is an honest answer to a plain INSERT only."""
        if self.error is None:
            return Outcome.DONE
        if self.error == UNANSWERED:
            return Outcome.UNANSWERED
        return Outcome.UNKNOWN if self.error == UNKNOWN and self.kind == "insert" else Outcome.FAILED

    @property
    def is_failure(self) -> bool:
        """Whether the application saw a failure that waiting or another connection would have cured."""
        return self.outcome in {Outcome.FAILED, Outcome.UNANSWERED}


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of the operations that were answered during one step."""

    operations: int = 0
    failures: int = 0
    unknown: int = 0
    unanswered: int = 0
    slowest: float = 0.0


@dataclass(slots=True, kw_only=True)
class Score:
    """Everything one pool's application has reported so far."""

    steps: dict[str, Tally] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    writes: dict[int, Write] = field(default_factory=dict)

    def add(self, answer: Answer, *, step: str, frozen: Iterable[tuple[float, float]] = ()) -> None:
        """Count one answer.

        Args:
            answer: The answer.
            step: During which step it came.
            frozen: The intervals in which the process was stopped: they do not count as waiting.
        """
        tally = self.steps.setdefault(step, Tally())
        tally.operations += 1
        tally.failures += answer.is_failure
        tally.unknown += answer.outcome is Outcome.UNKNOWN
        tally.unanswered += answer.outcome is Outcome.UNANSWERED
        tally.slowest = max(tally.slowest, answer.ended - answer.began - _overlap(answer, frozen))
        if answer.error is not None:
            self.errors[f"{answer.kind}: {answer.error}: {' '.join(answer.detail.split())}"] += 1
        if answer.row is not None:
            self.writes[answer.row] = Write(outcome=answer.outcome)

    def total(self) -> Tally:
        """Add the steps up."""
        steps = self.steps.values()
        return Tally(
            operations=sum(tally.operations for tally in steps),
            failures=sum(tally.failures for tally in steps),
            unknown=sum(tally.unknown for tally in steps),
            unanswered=sum(tally.unanswered for tally in steps),
            slowest=max((tally.slowest for tally in steps), default=0.0),
        )


@dataclass(slots=True, kw_only=True)
class PauseResult:
    """Results of the requests to one pool's paused database.

    Attributes:
        asked: How many requests there were.
        answered: How many of them were answered.
        errors: How the others ended.
        slowest: Seconds the slowest of all took.
        attempts: How many connections were attempted while it was paused or resuming.
        connections: How many are open.
        database: `"awake"`, `"paused"` or `"resuming"`.
        paused_after: How many seconds after the last answer it paused again, or `None` if it did not.
        not_paused_in: For how many seconds after the last answer it did not pause, or `None`.
    """

    asked: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    attempts: int = 0
    connections: int = 0
    database: str = "awake"
    paused_after: float | None = None
    not_paused_in: float | None = None

    def add(self, seconds: float, error: Exception | None) -> None:
        """Count the end of one request, after so many seconds."""
        self.slowest = max(self.slowest, seconds)
        if error is None:
            self.answered += 1
        else:
            self.errors[f"request: {type(error).__name__}: {' '.join(str(error).split())}"] += 1

    @property
    def failures(self) -> int:
        """How many requests ended in an error."""
        return self.errors.total()

    def violations(self, resume_seconds: float) -> list[str]:
        """Say, one line each, what a pool that keeps its promises would not have let happen."""
        found = []
        if self.failures:
            found.append(f"requests failed although their database was only paused: {self.failures}")
        if not self.answered:
            found.append("no request was answered at all")
        if self.slowest > resume_seconds + LATENESS:
            found.append(f"a request took {self.slowest:.1f} s, and its database resumed in {resume_seconds:g} s")
        if self.attempts > most_attempts(resume_seconds):
            found.append(
                f"attempts to connect while its database resumed: {self.attempts}, "
                f"more than {most_attempts(resume_seconds)}"
            )
        if self.paused_after is None:
            found.append("its database could not pause again")
        return found


def most_attempts(resume_seconds: float) -> int:
    """Return how many attempts to connect are allowed during a resume of so many seconds."""
    return ATTEMPTS + int(max(0.0, resume_seconds - ATTEMPTS_LAST) / BETWEEN_ATTEMPTS)


def _overlap(answer: Answer, frozen: Iterable[tuple[float, float]]) -> float:
    return sum(max(0.0, min(answer.ended, end) - max(answer.began, start)) for start, end in frozen)


def violations(score: Score, audit: Audit) -> list[str]:
    """Say, one line each, what a pool that keeps its promises would not have let happen."""
    counts = {
        "operations failed although waiting or another connection would have cured it": score.total().failures,
        "writes reported as done are not in the database": len(audit.lost),
        "writes are in the database more than once": len(audit.duplicated),
        "writes reported as failed are in the database": len(audit.ghosts),
    }
    found = [f"{what}: {count}" for what, count in counts.items() if count]
    if not any(write.outcome is Outcome.DONE for write in score.writes.values()):
        found.append("the application wrote nothing at all")
    return found
