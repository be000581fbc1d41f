"""Log and counters of a pausing server; no I/O, the time is an argument."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

Phase = Literal["awake", "paused", "resuming"]
"""Whether the server is up, scaled to zero, or on its way up."""

PENDING: Final = "pending"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt to open a TCP connection, and its outcome.

    Attributes:
        number: Which attempt it was, counted from 1.
        at: When it arrived, in seconds of `time.monotonic()`.
        phase: What the server was doing then; the attempt that wakes it finds it "paused".
        outcome: "pending" while it has no answer; "served" when its session was ready for a first statement; "reset";
            "gave up" if the client disconnected without an answer; the SQLSTATE it was refused with; "cancel" for
            a request to cancel; "failed" if it ended otherwise.
        settled_at: When that was known, likewise, or None while it is pending.
    """

    number: int
    at: float
    phase: Phase
    outcome: str = PENDING
    settled_at: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One line of a pausing server's log; `str()` is its form for people.

    Attributes:
        at: When it happened, in seconds of `time.monotonic()`.
        seconds: The same since the server was started.
        event: "started", "paused", "resuming", "resumed", "port closed", "port open", "limit", "no limit", "arrived",
            "left", or the outcome of an attempt.
        attempt: The number of the attempt it is about, or None.
    """

    at: float
    seconds: float
    event: str
    attempt: int | None = None

    def __str__(self) -> str:
        subject = "" if self.attempt is None else f"attempt {self.attempt}: "
        return f"{self.seconds:9.3f} s  {subject}{self.event}"


class EventLog:
    """Log and counters of one server."""

    def __init__(self, now: float) -> None:
        self.phase: Phase = "awake"
        self.pauses = 0
        self.peak_in_flight = 0
        self.log: list[LogEntry] = []
        self._attempts: list[Attempt] = []
        self._pending: set[int] = set()
        self._outage_began = 0
        self._outage_ended: int | None = 0
        self._began = now
        self._awake_since = now
        self._awake_total = 0.0
        self._received: list[tuple[float, int]] = []
        self.record("started", now)

    def record(self, event: str, now: float, attempt: int | None = None) -> None:
        """Append a line to the log."""
        self.log.append(LogEntry(at=now, seconds=now - self._began, event=event, attempt=attempt))

    # Pauses

    def paused(self, now: float) -> None:
        """Enter the phase "paused"; a new outage begins."""
        self.phase = "paused"
        self.pauses += 1
        self._awake_total += now - self._awake_since
        self._outage_began, self._outage_ended = len(self._attempts), None
        self.record("paused", now)

    def resuming(self, now: float) -> None:
        """Enter the phase "resuming"."""
        self.phase = "resuming"
        self.record("resuming", now)

    def resumed(self, now: float) -> None:
        """Enter the phase "awake": the outage is over, and the peak of attempts in flight is reset."""
        self.phase = "awake"
        self._awake_since = now
        self._outage_ended = len(self._attempts)
        self.peak_in_flight = self.in_flight
        self.record("resumed", now)

    def awake_seconds(self, now: float) -> float:
        """Return how many seconds it has been awake until now."""
        return self._awake_total + (now - self._awake_since if self.phase == "awake" else 0.0)

    # Attempts

    def attempt_started(self, now: float) -> int:
        """Count an attempt, and return its number."""
        number = len(self._attempts) + 1
        self._attempts.append(Attempt(number=number, at=now, phase=self.phase))
        self._pending.add(number)
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self.record("arrived", now, number)
        return number

    def set_outcome(self, number: int, outcome: str, now: float) -> None:
        """Record the outcome of an attempt; only the first one counts."""
        if number in self._pending:
            self._pending.remove(number)
            attempt = self._attempts[number - 1]
            self._attempts[number - 1] = dataclasses.replace(attempt, outcome=outcome, settled_at=now)
            self.record(outcome, now, number)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """All attempts, in the order in which they were noticed."""
        return tuple(self._attempts)

    @property
    def outage_attempts(self) -> tuple[Attempt, ...]:
        """Those of the last outage: from the pause, to the resume if it came."""
        return tuple(self._attempts[self._outage_began : self._outage_ended])

    @property
    def in_flight(self) -> int:
        """How many attempts have no outcome yet."""
        return len(self._pending)

    # Bytes from clients

    def bytes_received(self, count: int, now: float) -> None:
        """Count bytes that a client sent."""
        self._received.append((now, count))

    def bytes_since(self, moment: float) -> int:
        """Return how many bytes have arrived at that moment or later."""
        return sum(count for at, count in self._received if at >= moment)
