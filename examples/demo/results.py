"""Keeps the score of one pool: pure bookkeeping over what the application reported and what the database holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

UNKNOWN = "OutcomeUnknownError"
"""The name of the one error that is an honest answer to a plain INSERT cut in flight."""
UNANSWERED = "never answered"
"""Stands for the error of an operation that was still waiting when the application ended."""

ATTEMPTS, ATTEMPTS_LAST = 9, 5.0
"""How many attempts to connect a database may be met with, in how many seconds of waking."""
BETWEEN_ATTEMPTS = 0.75
"""Seconds between two attempts of a patient prober, at least: what a longer resume may cost."""
LATENESS = 2.0
"""Seconds after its resume within which a database must have answered whoever waited for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one operation of the application came to.

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
    def is_unknown(self) -> bool:
        """Whether the application was told, rightly, that nobody can know."""
        return self.error == UNKNOWN and self.kind == "insert"

    @property
    def is_failure(self) -> bool:
        """Whether the application saw a failure that waiting or another connection would have cured."""
        return self.error is not None and not self.is_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What the application was told, compared with the rows that are there.

    Attributes:
        lost: Writes reported as done that are absent.
        duplicated: Writes that are present more than once, whatever was reported.
        ghosts: Writes reported as failed that are present.
        unknown_present: Writes reported as unknown that are present.
    """

    lost: int
    duplicated: int
    ghosts: int
    unknown_present: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came of the operations that were answered during one mistreatment."""

    operations: int = 0
    failures: int = 0
    unknown: int = 0
    unanswered: int = 0
    slowest: float = 0.0


@dataclass(slots=True, kw_only=True)
class Score:
    """Everything one pool's application has reported so far."""

    acts: dict[str, Tally] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    uncertain: set[int] = field(default_factory=set)

    def add(self, answer: Answer, *, act: str, frozen: Iterable[tuple[float, float]] = ()) -> None:
        """Count one answer.

        Args:
            answer: The answer.
            act: During which mistreatment it came.
            frozen: The intervals in which the process was stopped: nobody can wait for an answer in them.
        """
        tally = self.acts.setdefault(act, Tally())
        tally.operations += 1
        tally.failures += answer.is_failure
        tally.unknown += answer.is_unknown
        tally.unanswered += answer.error == UNANSWERED
        tally.slowest = max(tally.slowest, answer.ended - answer.began - _overlap(answer, frozen))
        if answer.error is not None:
            self.errors[f"{answer.kind}: {answer.error}: {' '.join(answer.detail.split())}"] += 1
        if answer.row is not None:
            self._shelf(answer).add(answer.row)

    def total(self) -> Tally:
        """Add the acts up."""
        acts = self.acts.values()
        return Tally(
            operations=sum(tally.operations for tally in acts),
            failures=sum(tally.failures for tally in acts),
            unknown=sum(tally.unknown for tally in acts),
            unanswered=sum(tally.unanswered for tally in acts),
            slowest=max((tally.slowest for tally in acts), default=0.0),
        )

    def compare(self, rows: Mapping[int, int]) -> Ledger:
        """Compare what was reported with `rows`: how often each id is in the table."""
        return Ledger(
            lost=sum(row not in rows for row in self.done),
            duplicated=sum(times > 1 for times in rows.values()),
            ghosts=sum(row in rows for row in self.failed),
            unknown_present=sum(row in rows for row in self.uncertain),
        )

    def _shelf(self, answer: Answer) -> set[int]:
        if answer.error is None:
            return self.done
        return self.uncertain if answer.is_unknown else self.failed


@dataclass(slots=True, kw_only=True)
class Night:
    """What became of the requests that found one pool's database asleep, and what became of its sleep.

    Attributes:
        asked: How many requests there were.
        answered: How many of them were answered.
        errors: How the others ended.
        slowest: Seconds the slowest of all took.
        attempts: How often somebody tried to connect while it slept or woke.
        connections: How many are open.
        database: `"awake"`, `"paused"` or `"resuming"`.
        asleep_after: How many seconds after the last answer it was asleep again, or `None` if it never was.
        awake_for: For how many seconds after the last answer it was watched in vain, or `None`.
    """

    asked: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    attempts: int = 0
    connections: int = 0
    database: str = "awake"
    asleep_after: float | None = None
    awake_for: float | None = None

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

    def failings(self, resume_seconds: float) -> list[str]:
        """Say, one line each, what a pool that keeps its promises would not have let happen."""
        found = []
        if self.failures:
            found.append(f"requests failed although their database was only asleep: {self.failures}")
        if not self.answered:
            found.append("no request was answered at all")
        if self.slowest > resume_seconds + LATENESS:
            found.append(f"a request took {self.slowest:.1f} s, and its database woke in {resume_seconds:g} s")
        if self.attempts > most_attempts(resume_seconds):
            found.append(
                f"attempts to connect while its database woke: {self.attempts}, "
                f"more than {most_attempts(resume_seconds)}"
            )
        if self.asleep_after is None:
            found.append("its database could not fall asleep again")
        return found


def most_attempts(resume_seconds: float) -> int:
    """Tell how many attempts to connect a database may be met with that takes so long to wake."""
    return ATTEMPTS + int(max(0.0, resume_seconds - ATTEMPTS_LAST) / BETWEEN_ATTEMPTS)


def _overlap(answer: Answer, frozen: Iterable[tuple[float, float]]) -> float:
    return sum(max(0.0, min(answer.ended, end) - max(answer.began, start)) for start, end in frozen)


def failings(score: Score, ledger: Ledger) -> list[str]:
    """Say, one line each, what a pool that keeps its promises would not have let happen."""
    counts = {
        "operations failed although waiting or another connection would have cured it": score.total().failures,
        "writes reported as done are not in the database": ledger.lost,
        "writes are in the database more than once": ledger.duplicated,
        "writes reported as failed are in the database": ledger.ghosts,
    }
    found = [f"{what}: {count}" for what, count in counts.items() if count]
    if not score.done:
        found.append("the application wrote nothing at all")
    return found
