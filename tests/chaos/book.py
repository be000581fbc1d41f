"""What callers were told, and how it is held against what the database holds; it knows neither of them itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Promise(Enum):
    """What the pool promises of a write."""

    PLAIN = "one-shot"
    """Done or not, or nobody knows."""
    REPEATABLE = "idempotent"
    """Done, as often as it takes."""
    RESOLVED = "transactional"
    """Done once; nobody knows only if the server crashed over its COMMIT and there is no commit log."""


class Told(Enum):
    """What the caller of a write was told."""

    NOTHING = "nothing"
    DONE = "done"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """One crash of the server.

    Attributes:
        began: Until when all was well, on a monotonic clock.
        over: When nothing of the crashed server can have been there any more.
    """

    began: float
    over: float


@dataclass(slots=True, kw_only=True)
class Entry:
    """One write.

    Attributes:
        promise: What its caller may expect.
        mirrored: Whether it writes the negative of its id, too, in the same transaction.
        told: What the caller was told.
        error: In which words, if it was an error.
        xid: The transaction's id, if the error named it.
        commit_sent: When its last COMMIT was sent, on a monotonic clock, if no answer to that came.
        told_at: When the caller was told.
    """

    promise: Promise
    mirrored: bool = False
    told: Told = Told.NOTHING
    error: str = ""
    xid: int | None = None
    commit_sent: float | None = None
    told_at: float | None = None

    def was_in_flight(self, crash: Crash) -> bool:
        """Whether the answer to its COMMIT was outstanding when the server crashed.

        That is so if the COMMIT was sent on a connection to the server that crashed, no answer to it ever came, and
        nobody had found out what became of it before the crash.
        """
        return (
            self.commit_sent is not None
            and self.told_at is not None
            and self.commit_sent < crash.over
            and self.told_at > crash.began
        )


@dataclass(slots=True, kw_only=True)
class Book:
    """What the workers write down.

    Attributes:
        entries: Every write, by its id.
        reads: How many reads were answered.
        wrong: Answers that contradict what was acknowledged before the question, or what was asked, in words.
        read_errors: Errors that reads ended in.
        hung: Calls that took too long, or were never answered, in words.
        slowest: Seconds the slowest call took.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    read_errors: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def told(self, told: Told, promise: Promise | None = None) -> list[Entry]:
        """List the writes whose callers were told that."""
        return [entry for entry in self.entries.values() if entry.told is told and promise in (None, entry.promise)]

    def errors(self, promise: Promise, *kinds: Told) -> list[str]:
        """Quote the errors of those kinds that writes of which that was promised ended in."""
        return [entry.error for kind in kinds for entry in self.told(kind, promise)]

    def unexplained(self, crashes: Iterable[Crash]) -> list[str]:
        """Quote the transactions nobody knows the fate of, although their COMMITs were not in flight during a crash.

        A transaction that nobody could ask about later, since its error names no id, is not explained either.
        """
        crashes = list(crashes)
        return [
            entry.error
            for entry in self.told(Told.UNKNOWN, Promise.RESOLVED)
            if entry.xid is None or not any(entry.was_in_flight(crash) for crash in crashes)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The book held against the database; all but the last two should be empty.

    Attributes:
        lost: Ids acknowledged but absent.
        doubled: Ids present more than once.
        ghosts: Ids reported failed, yet present.
        torn: Ids of transactions of which one half is present and the other is not.
        strangers: Ids present that nobody wrote.
        unknown_present: How many writes of unknown outcome are present.
        unknown_absent: How many are not.
    """

    lost: list[int]
    doubled: list[int]
    ghosts: list[int]
    torn: list[int]
    strangers: list[int]
    unknown_present: int
    unknown_absent: int


def audit(entries: Mapping[int, Entry], rows: Mapping[int, int]) -> Audit:
    """Compare what was told with how often each id is present."""
    unknown = [number for number, entry in entries.items() if entry.told is Told.UNKNOWN]
    written = set(entries) | {-number for number, entry in entries.items() if entry.mirrored}
    return Audit(
        lost=[number for number, entry in entries.items() if entry.told is Told.DONE and number not in rows],
        doubled=[number for number, times in rows.items() if times > 1],
        ghosts=[number for number, entry in entries.items() if entry.told is Told.FAILED and number in rows],
        torn=[number for number, entry in entries.items() if entry.mirrored and (number in rows) != (-number in rows)],
        strangers=[number for number in rows if number not in written],
        unknown_present=sum(number in rows for number in unknown),
        unknown_absent=sum(number not in rows for number in unknown),
    )
