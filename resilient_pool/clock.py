"""Reads the time for everything else, and notices that the process was frozen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

import anyio

_BOOT_TIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


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
        self._now += max(by_boot, by_wall)
        return self._now

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep in the running event loop."""
        await anyio.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Schedule in the running event loop, in a context that is no caller's."""
        return asyncio.get_running_loop().call_later(seconds, callback, context=Context())
