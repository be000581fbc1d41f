"""A clock for tests, which only the test advances."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

from resilient_pool._validation import constructor_names_nearest

_TURNS = 10
"""Turns of the event loop that what a timer woke may take before the next one fires."""


class ScriptedTimer:
    """A call that the clock holds for later."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Make sure that the call does not happen, if it has not yet."""
        self._callback = None

    def fire(self) -> None:
        """Make the call, unless it was cancelled or made before."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    @property
    def is_pending(self) -> bool:
        """Whether the call is still to come."""
        return self._callback is not None


@constructor_names_nearest
class ScriptedClock:
    """A `resilient_pool.clock.Clock` for tests.

        clock = ScriptedClock()
        await clock.sleep(3.0)              # returns at once
        assert clock.sleeps == [3.0]
        clock.call_later(5.0, ping)
        clock.advance(5.0)                  # ping() was called
        clock.freeze(3600.0)                # as if the machine had been suspended

    Args:
        auto: Whether a sleep moves the time by itself and returns at once; that is the default. Otherwise a sleeper
            waits until the test has advanced the time far enough.
        start: What both `now()` and `monotonic()` begin with, in seconds; 0 by default.

    Attributes:
        sleeps: The seconds of every sleep that was asked for, in order.
    """

    def __init__(self, *, auto: bool = True, start: float = 0.0) -> None:
        self.sleeps: list[float] = []
        self._auto = auto
        self._monotonic = start
        self._frozen = 0.0
        self._timers: list[tuple[float, int, ScriptedTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        """Return the time, time spent frozen included."""
        return self._monotonic + self._frozen

    def monotonic(self) -> float:
        """Return the time without what was spent frozen."""
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        """Record the sleep and wait for the time to pass, giving way to other tasks at least once."""
        self.sleeps.append(seconds)
        if self._auto:
            self.advance(max(seconds, 0.0))
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            # A task may have been cancelled and not run since: then its future is done, and the timer still there.
            if not awake.done():
                awake.set_result(None)

        timer = self.call_later(seconds, wake)
        try:
            await awake
        finally:
            timer.cancel()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> ScriptedTimer:
        """Call `callback()` once the time has advanced that far."""
        timer = ScriptedTimer(callback)
        heapq.heappush(self._timers, (self._monotonic + max(seconds, 0.0), next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass, and call what falls due, in order and each at its own time.

        Raises:
            ValueError: Time does not run backwards.
        """
        end = self._end_after(seconds)
        while self._fire_next(end):
            pass
        self._monotonic = max(self._monotonic, end)

    async def run(self, seconds: float) -> None:
        """Like `advance()`, but let tasks run after every timer, so that they can sleep again on the way."""
        end = self._end_after(seconds)
        await self._settle()
        while self._fire_next(end):
            await self._settle()
        self._monotonic = max(self._monotonic, end)

    def freeze(self, seconds: float) -> None:
        """Let that many seconds pass as in a suspended process: only `now()` shows them, and no timer fires."""
        self._frozen += seconds

    @property
    def pending(self) -> list[float]:
        """In how many seconds each waiting sleep or call falls due, soonest first."""
        return [
            due - self._monotonic
            for due, _, timer in sorted(self._timers, key=lambda entry: entry[:2])
            if timer.is_pending
        ]

    def _end_after(self, seconds: float) -> float:
        if not seconds >= 0:  # nor by what is no number
            raise ValueError(f"time cannot advance by {seconds} seconds")
        return self._monotonic + seconds

    def _fire_next(self, end: float) -> bool:
        if not self._timers or self._timers[0][0] > end:
            return False
        due, _, timer = heapq.heappop(self._timers)
        self._monotonic = max(self._monotonic, due)
        timer.fire()
        return True

    @staticmethod
    async def _settle() -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
