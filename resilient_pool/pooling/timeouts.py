"""Time limits of many waiters on one timer, which costs less than a timer for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import inf
from typing import Generic, TypeVar

from resilient_pool.clock import Clock, Timer

K = TypeVar("K")

# How late a limit may be noticed when several end close together: seconds, and never more than this share of the limit.
_LATEST = 0.05
_LATEST_SHARE = 0.02
# Event loops count in milliseconds and may call a little early.
_TICK = 0.001


class TimeoutQueue(Generic[K]):
    """The things that wait, in the order in which they began, and what becomes of those whose time is up.

    The end of a limit may be noticed late, by a fiftieth of it and never by more than 0.05 s.

    Args:
        clock: Times them.
        expire: Called with a thing whose time is up, which waits no more, and with its limit in seconds.

    Attributes:
        waiting: What waits. Taking something out ends its limit.
    """

    __slots__ = ("_clock", "_expire", "_sweep_at", "_timer", "waiting")

    def __init__(self, clock: Clock, expire: Callable[[K, float], object]) -> None:
        self._clock = clock
        self._expire = expire
        self._timer: Timer | None = None
        self._sweep_at = inf
        # Until when, and since when.
        self.waiting: OrderedDict[K, tuple[float, float]] = OrderedDict()

    def begin(self, thing: K, seconds: float | None) -> None:
        """Let something wait for that many seconds, or for ever."""
        now = self._clock.monotonic()
        due = inf if seconds is None else now + seconds
        self.waiting[thing] = (due, now)
        if due < self._sweep_at:
            self._sweep_by(due)

    def stop(self) -> None:
        """Set the timer no more, until something begins to wait."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._sweep_at = None, inf

    def _sweep_by(self, instant: float) -> None:
        self.stop()
        self._sweep_at = instant
        self._timer = self._clock.call_later(max(instant - self._clock.monotonic(), 0.0), self._sweep)

    def _sweep(self) -> None:
        """Expire what is overdue, and come again for the others, for as many of them at once as may be."""
        self.stop()
        now = self._clock.monotonic() + _TICK
        for thing, (due, since) in list(self.waiting.items()):
            if due <= now:
                self.waiting.pop(thing, None)
                self._expire(thing, due - since)
        latest = min((due + _tolerance(due - since) for due, since in self.waiting.values()), default=inf)
        if latest < self._sweep_at:
            self._sweep_by(latest)


def _tolerance(seconds: float) -> float:
    return min(_LATEST, max(seconds, 0.0) * _LATEST_SHARE)
