"""The generic pool: an idle stack, fair waiters and lifetimes. It knows no PostgreSQL, does no I/O and retries nothing.

Every method changes the state first and returns what its caller has to close or to open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from resilient_pool.core.clock import Clock
from resilient_pool.core.limits import TimeLimits
from resilient_pool.errors import AcquireTimeoutError

R = TypeVar("R")


class Slot(Generic[R]):
    """A place for one resource. Whoever holds a slot without a resource has the right to open one.

    Attributes:
        resource: What stands in this place, or `None`.
        opened_at: When the resource was opened, on the line of `Clock.now()`.
        expires_at: When it is to be replaced.
        idle_since: When it was last known to be alive.
        generation: Of which generation it is.
    """

    __slots__ = ("expires_at", "generation", "idle_since", "opened_at", "resource")

    def __init__(self) -> None:
        self.resource: R | None = None
        self.opened_at = 0.0
        self.expires_at = 0.0
        self.idle_since = 0.0
        self.generation = 0

    def fill(self, resource: R, *, now: float, expires_at: float, generation: int) -> None:
        """Put a newly opened resource here."""
        self.resource = resource
        self.opened_at = self.idle_since = now
        self.expires_at = expires_at
        self.generation = generation

    def empty(self) -> R | None:
        """Take the resource away and return it."""
        resource, self.resource = self.resource, None
        return resource


class Slots(Generic[R]):
    """At most `max_size` slots: last in, first out for the idle, first come, first served for those who wait.

    One rule holds after every method: while somebody waits no slot is idle. So a caller who takes an idle one has
    overtaken nobody.

    Args:
        max_size: How many slots there can be.
        clock: Times the waiting.
    """

    __slots__ = ("_all", "_drained", "_idle", "_limits", "_max_size", "_waiters")

    def __init__(self, max_size: int, clock: Clock) -> None:
        self._max_size = max_size
        self._all: set[Slot[R]] = set()
        self._idle: list[Slot[R]] = []
        self._limits: TimeLimits[asyncio.Future[Slot[R]]] = TimeLimits(clock, self._time_is_up)
        self._waiters = self._limits.waiting
        self._drained = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Slots size={self.size} idle={self.idle} waiting={self.waiting} max_size={self._max_size}>"

    def __iter__(self) -> Iterator[Slot[R]]:
        return iter(tuple(self._all))

    @property
    def size(self) -> int:
        """How many slots exist, whatever they are doing."""
        return len(self._all)

    @property
    def idle(self) -> int:
        """How many slots could be taken at once."""
        return len(self._idle)

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._waiters)

    @property
    def oldest_idle_since(self) -> float | None:
        """Since when the longest unused slot is idle, or `None` if none is."""
        return self._idle[0].idle_since if self._idle else None

    @property
    def newest(self) -> Slot[R] | None:
        """The idle slot that was used last, which `take` would take, or `None` if none is idle."""
        return self._idle[-1] if self._idle else None

    def take(self) -> Slot[R] | None:
        """Take the slot that was used last, else a new and empty one, else `None`: the caller has to wait."""
        if self._idle:
            return self._idle.pop()
        return self.reserve()

    def reserve(self) -> Slot[R] | None:
        """Take a new and empty slot, or `None` if there are `max_size` already."""
        if len(self._all) >= self._max_size:
            return None
        slot: Slot[R] = Slot()
        self._all.add(slot)
        return slot

    async def wait(self, seconds: float | None) -> Slot[R]:
        """Wait for a slot, behind everybody who waits already.

        Args:
            seconds: For how long at most; `None` for ever. The end may be noticed late, by a fiftieth of that time and
                never by more than 0.05 s.

        Raises:
            AcquireTimeoutError: None became free in time.
        """
        ticket: asyncio.Future[Slot[R]] = asyncio.get_running_loop().create_future()
        self._limits.begin(ticket, seconds)
        served = False
        try:
            slot = await ticket
            served = True
        finally:
            if not served:
                self._leave(ticket)
        return slot

    def _leave(self, ticket: asyncio.Future[Slot[R]]) -> None:
        self._waiters.pop(ticket, None)
        # The slot may have been handed over in the same turn of the loop as a cancellation: it goes to the next in line.
        if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
            self.put(ticket.result())

    def _time_is_up(self, ticket: asyncio.Future[Slot[R]], seconds: float) -> None:
        if not ticket.done():
            ticket.set_exception(
                AcquireTimeoutError(
                    f"no connection became free within {max(seconds, 0.0):.3g} s: all {len(self._all)} of "
                    f"max_size={self._max_size} are in use and {len(self._waiters)} more callers wait; "
                    "raise max_size or deadline, or hold connections for a shorter time"
                )
            )

    def put(self, slot: Slot[R]) -> None:
        """Give a slot back: to whoever waits first, else to the idle stack. An empty slot nobody waits for is gone."""
        while self._waiters:
            ticket, _ = self._waiters.popitem(last=False)
            if not ticket.done():
                ticket.set_result(slot)
                return
        if slot.resource is None:
            self._forget(slot)
        else:
            self._idle.append(slot)

    def withdraw(self, condition: Callable[[Slot[R]], bool], *, keep: int = 0) -> list[Slot[R]]:
        """Take all idle slots that meet a condition, the longest unused first, while more than `keep` slots remain."""
        spare = len(self._all) - keep
        chosen = [slot for slot in self._idle if condition(slot)][: max(spare, 0)]
        for slot in chosen:
            self._idle.remove(slot)
        return chosen

    def dismiss_waiters(self, error: Callable[[], Exception]) -> None:
        """Let everybody who waits fail, each with an error of its own."""
        self._limits.stop()
        while self._waiters:
            ticket, _ = self._waiters.popitem(last=False)
            if not ticket.done():
                ticket.set_exception(error())

    async def drained(self) -> None:
        """Wait until no slot is left, or until waiting for it has no more sense: see `abandon`."""
        if self._all:
            self._drained.clear()
            await self._drained.wait()

    def abandon(self) -> None:
        """Let `drained` end although slots are left: nobody knows when they will come back."""
        self._drained.set()

    def _forget(self, slot: Slot[R]) -> None:
        self._all.discard(slot)
        if not self._all:
            self._drained.set()
