"""Time: the machine's clocks, the deadline of a context, and the limits of many waiters on one timer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from math import inf
from typing import Generic, Protocol, TypeVar

import anyio

K = TypeVar("K")

_BOOT_TIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# How late a limit may be noticed when several end close together: seconds, and never more than this share of the limit.
_LATEST = 0.05
_LATEST_SHARE = 0.02
# Event loops count in milliseconds and may call a little early.
_TICK = 0.001

_LIMIT: ContextVar[float | None] = ContextVar("resilient_pool_limit", default=None)


class Timer(Protocol):
    """A call scheduled for later."""

    def cancel(self) -> None:
        """Make sure that the call does not happen, if it has not yet."""
        ...


class Clock(Protocol):
    """Where the pool takes its time from, and what can be given as `clock=`. All durations and instants are float seconds."""

    def now(self) -> float:
        """Return the time on a line of its own, which never stands still while any clock of the machine moves on."""
        ...

    def monotonic(self) -> float:
        """Return the event loop's kind of time, on which deadlines are counted."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep; cancellation passes through."""
        ...

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call `callback()` in the running event loop after that many seconds."""
        ...


class SystemClock:
    """The machine's clocks.

    `now()` advances by the largest step that any clock claims since the reading before: boot time, which counts what
    the monotonic clock counts and the time spent suspended besides, and the wall clock. A process that was suspended
    with its machine, paused by its container's runtime or frozen between two invocations sees that time has passed,
    whichever clock it was that kept counting. A wall clock that is set back is ignored; one that is set forward makes
    connections look older than they are, which costs a ping.
    """

    __slots__ = ("_boot", "_now", "_wall")

    def __init__(self) -> None:
        self._boot = time.clock_gettime(_BOOT_TIME)
        self._wall = time.time()
        self._now = 0.0

    def now(self) -> float:
        """Return the time on the line described above, in seconds since this clock was made."""
        boot, wall = time.clock_gettime(_BOOT_TIME), time.time()
        by_boot, by_wall = boot - self._boot, wall - self._wall
        self._boot, self._wall = boot, wall
        # A call of max() would take longer than all else here but the clocks.
        self._now = now = self._now + (by_wall if by_wall > by_boot else by_boot)  # noqa: FURB136
        return now

    monotonic = staticmethod(time.monotonic)  # itself, and not a call of it: the pool reads it twice in each call

    async def sleep(self, seconds: float) -> None:
        """Sleep in the running event loop."""
        await anyio.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Schedule in the running event loop, in a context that is no caller's."""
        return asyncio.get_running_loop().call_later(seconds, callback, context=Context())


def deadline_after(started: float, seconds: float | None) -> float | None:
    """Return the instant `seconds` after `started`, or the limit of the context if that is earlier; `None` for never."""
    limit = _LIMIT.get()
    if seconds is None:
        return limit
    ends = started + seconds
    return ends if limit is None or ends < limit else limit


@contextlib.contextmanager
def deadline_scope(instant: float | None) -> Iterator[None]:
    """Let nothing that begins within have a later deadline than that instant, also in tasks that are started there."""
    outer = _LIMIT.get()
    inner = instant if outer is None or (instant is not None and instant < outer) else outer
    token = _LIMIT.set(inner)
    try:
        yield
    finally:
        _LIMIT.reset(token)


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

    def begin(self, thing: K, seconds: float | None, now: float) -> None:
        """Let something wait from `now` on for that many seconds, or for ever."""
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
