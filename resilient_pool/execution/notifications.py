"""What a listener gives out: notifications, and gaps where some may be missing; and the queue in which they wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class GapReason(StrEnum):
    """Why notifications may be missing.

    Attributes:
        CONNECTION_LOST: The listening connection was lost, or closed by the server.
        NO_ANSWER: It had been silent, and did not answer when it was asked.
        SESSION_CHANGED: It answered, but its session did not listen any more: something between had reset or replaced it.
        EXPIRED: `expire_connections()` was called.
        QUEUE_FULL: The application did not take notifications as fast as they came.
    """

    CONNECTION_LOST = "connection_lost"
    NO_ANSWER = "no_answer"
    SESSION_CHANGED = "session_changed"
    EXPIRED = "expired"
    QUEUE_FULL = "queue_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """What a NOTIFY said.

    Attributes:
        channel: The channel's name.
        payload: The text that was sent; empty if there was none.
        pid: The process id of the server process that sent it.
    """

    channel: str
    payload: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """In this place notifications may be missing. Whatever they would have said is to be read from the database now.

    When a gap is given out the session listens again: what is committed from now on is notified.

    Attributes:
        reason: Why; of several reasons in a row, the last.
        seconds: For how long nothing was listened to, at most: from the last sign of the session to the new one's LISTEN. With
            `QUEUE_FULL`, from the first notification that found no place until now.
        missed: How many notifications were dropped, where that is known: with `QUEUE_FULL` only.
    """

    reason: GapReason
    seconds: float
    missed: int | None = None


@dataclass(slots=True, eq=False)
class _OpenGap:
    """A gap that is not given out yet, and may still grow; without `until` it lasts until it is given out."""

    reason: GapReason
    since: float
    until: float | None
    missed: int | None

    def close(self, now: float) -> Gap:
        """Return what the application is given."""
        until = now if self.until is None else self.until
        return Gap(reason=self.reason, seconds=max(until - self.since, 0.0), missed=self.missed)


class NotificationQueue:
    """What was notified and is not taken yet, in order, with gaps where something is missing.

    When it is full, what comes is dropped and counted until the gap that stands for it is taken. So a slow application gets one
    gap, not many, and neither memory nor the server suffers.
    """

    __slots__ = ("_held", "_items", "_now", "_overflow", "_size")

    def __init__(self, size: int, now: Callable[[], float]) -> None:
        self._size = size
        self._now = now
        self._items: deque[Notification | _OpenGap] = deque()
        self._held = 0
        self._overflow: _OpenGap | None = None

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, notification: Notification) -> None:
        """Add a notification, or count it as missed."""
        overflow = self._overflow
        if overflow is not None:
            overflow.missed = None if overflow.missed is None else overflow.missed + 1
        elif self._held < self._size:
            self._items.append(notification)
            self._held += 1
        else:
            self._overflow = self._end_with(_OpenGap(GapReason.QUEUE_FULL, self._now(), None, 1))

    def put_gap(self, reason: GapReason, since: float) -> None:
        """Add a gap that ends now."""
        self._end_with(_OpenGap(reason, since, self._now(), None))

    def _end_with(self, gap: _OpenGap) -> _OpenGap:
        """Let the queue end with a gap: with the one that it ends with already, made wider, or with this one."""
        last = self._items[-1] if self._items else None
        if not isinstance(last, _OpenGap):
            self._items.append(gap)
            return gap
        last.reason, last.missed = gap.reason, None
        last.since = min(last.since, gap.since)
        last.until = None if last is self._overflow else gap.until
        return last

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self._held, self._overflow = 0, None

    def take(self) -> Notification | Gap:
        """Take the oldest item."""
        item = self._items.popleft()
        if isinstance(item, Notification):
            self._held -= 1
            return item
        if item is self._overflow:
            self._overflow = None
        return item.close(self._now())
