"""The generic pool: an idle stack, fair waiters, lifetimes. It knows no PostgreSQL, does no I/O and retries nothing.

Every method changes the state first and returns what its caller has to close or to open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from resilient_pool.clock import Clock, TimeoutQueue
from resilient_pool.errors import AcquireTimeoutError

R = TypeVar("R")


class PoolEntry(Generic[R]):
    """A place for one resource. The holder of an entry without a resource has the right to open one.

    Attributes:
        resource: What stands in this place, or `None`.
        opened_at: When the resource was opened, on the line of `Clock.now()`.
        expires_at: When it is to be replaced.
        idle_since: When it was given back last.
        taken_at: When it was taken last, or what was asked of it last was begun.
        taken_at_monotonic: The same on the line of `Clock.monotonic()`, which is read at less cost.
        asked_at: When that was asked which it answered last. An answer proves nothing about any later time: it may have
            been read long after it came.
        uses: How much had been asked of it when it was given back last.
        generation: Of which generation it is.
    """

    __slots__ = (
        "asked_at",
        "expires_at",
        "generation",
        "idle_since",
        "opened_at",
        "resource",
        "taken_at",
        "taken_at_monotonic",
        "uses",
    )

    def __init__(self) -> None:
        self.resource: R | None = None
        self.opened_at = 0.0
        self.expires_at = 0.0
        self.idle_since = self.taken_at = self.taken_at_monotonic = self.asked_at = 0.0
        self.uses = 0
        self.generation = 0

    def fill(
        self,
        resource: R,
        *,
        now: float,
        expires_at: float,
        generation: int,
        asked_at: float | None = None,
        uses: int = 0,
    ) -> None:
        """Put a newly opened resource here, whose opening was begun at `asked_at`; by default now."""
        self.resource = resource
        self.opened_at = self.idle_since = now
        self.taken_at = self.asked_at = now if asked_at is None else asked_at
        self.uses = uses
        self.expires_at = expires_at
        self.generation = generation

    def empty(self) -> R | None:
        """Take the resource away and return it."""
        resource, self.resource = self.resource, None
        return resource


class ResourcePool(Generic[R]):
    """At most `max_size` resources: last in, first out for the idle, first come, first served for those who wait.

    One rule holds after every method: while a caller waits no entry is idle. So a caller who takes an idle one has
    overtaken no other.

    How many resources may be opened at the same time is limited as well; at first by `max_size` only. A place for which
    no caller may open is given up, and those who wait go on waiting. So is, for a while, how many there may be: see `restrict`.

    Args:
        max_size: How many resources there can be.
        clock: Times the waiting.
        min_size: How many there should be.

    Attributes:
        idle_entries: The idle ones; the one that was used last is at the end, and is taken first. An entry may be taken from
            there, and put there while no caller waits, without a call of `take` or `put`.
        waiters: Those who wait.
        connect_limit: How many resources may be opened at the same time.
        ceiling: How many resources there may be at present.
        on_connection_needed: Called when an entry was given up although a caller waits, or although fewer than `min_size` are left.
        on_return: Called with an entry whose taker was cancelled before it had it. It must `put` the entry.
    """

    __slots__ = (
        "_drained",
        "_entries",
        "_fail_fast",
        "_limits",
        "_max_size",
        "_min_size",
        "ceiling",
        "connect_limit",
        "idle_entries",
        "on_connection_needed",
        "on_return",
        "waiters",
    )

    def __init__(self, max_size: int, clock: Clock, *, min_size: int = 0) -> None:
        self._max_size = self.connect_limit = self.ceiling = max_size
        self._min_size = min_size
        self._entries: set[PoolEntry[R]] = set()
        self.idle_entries: list[PoolEntry[R]] = []
        self._limits: TimeoutQueue[asyncio.Future[PoolEntry[R]]] = TimeoutQueue(clock, self._time_is_up)
        self.waiters = self._limits.waiting
        self._fail_fast: set[asyncio.Future[PoolEntry[R]]] = set()
        self._drained = asyncio.Event()
        self.on_connection_needed: Callable[[], None] = _ignore
        self.on_return: Callable[[PoolEntry[R]], None] = self.put

    def __repr__(self) -> str:
        return f"<ResourcePool size={self.size} idle={self.idle} waiting={self.waiting} max_size={self._max_size}>"

    def __iter__(self) -> Iterator[PoolEntry[R]]:
        return iter(tuple(self._entries))

    @property
    def size(self) -> int:
        """How many resources exist, whatever they are doing."""
        return len(self._entries)

    @property
    def idle(self) -> int:
        """How many resources could be taken at once."""
        return len(self.idle_entries)

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self.waiters)

    @property
    def is_awaited(self) -> bool:
        """Whether a caller waits that has not been served or cancelled yet."""
        return any(not ticket.done() for ticket in self.waiters)

    @property
    def is_full(self) -> bool:
        """Whether there are as many resources as there may be at present."""
        return len(self._entries) >= self.ceiling

    @property
    def is_connection_needed(self) -> bool:
        """Whether another resource would serve a caller."""
        return bool(self.waiters) or len(self._entries) < self._min_size

    @property
    def opening(self) -> int:
        """How many resources are in the hands of a caller that is about to fill them."""
        return sum(entry.resource is None for entry in self._entries)

    @property
    def may_open(self) -> bool:
        """Whether the holder of an empty entry may fill it."""
        return self.opening <= self.connect_limit and len(self._entries) <= self.ceiling

    @property
    def has_resources(self) -> bool:
        """Whether any entry is filled."""
        return any(entry.resource is not None for entry in self._entries)

    def idle_resources(self) -> Iterator[R]:
        """Iterate over the resources of the idle resources."""
        return (entry.resource for entry in self.idle_entries if entry.resource is not None)

    @property
    def oldest_idle_since(self) -> float | None:
        """Since when the longest unused entry is idle, or `None` if none is."""
        return min((entry.idle_since for entry in self.idle_entries), default=None)

    @property
    def last_used(self) -> PoolEntry[R] | None:
        """The idle entry that was used last, which `take` would take, or `None` if none is idle."""
        return self.idle_entries[-1] if self.idle_entries else None

    def take(self) -> PoolEntry[R] | None:
        """Take the entry that was used last, else a new one to fill, else `None`: the caller has to wait."""
        if self.idle_entries:
            return self.idle_entries.pop()
        return self._grow()

    def _grow(self) -> PoolEntry[R] | None:
        return None if self.is_full or self.opening >= self.connect_limit else self.reserve()

    def reserve(self) -> PoolEntry[R] | None:
        """Take a new and empty entry, admitted or not, or `None` if there are `max_size` already."""
        if len(self._entries) >= self._max_size:
            return None
        entry: PoolEntry[R] = PoolEntry()
        self._entries.add(entry)
        return entry

    def set_connect_limit(self, number: int) -> None:
        """Let that many resources be opened at the same time."""
        self.connect_limit = number

    def restrict(self, ceiling: int | None) -> None:
        """Let no more than that many resources be made by `take` and `offer`; `None` for `max_size`."""
        self.ceiling = self._max_size if ceiling is None else min(ceiling, self._max_size)

    def offer_entry(self) -> bool:
        """Give the first waiter a new entry to fill, if another one may be, and say whether that was so."""
        entry = self._grow() if self.waiters else None
        if entry is not None:
            self.put(entry)
        return entry is not None

    def enqueue(self, seconds: float | None, now: float, *, fail_fast: bool = False) -> asyncio.Future[PoolEntry[R]]:
        """Begin to wait for an entry, behind all callers that wait already.

        Args:
            seconds: For how long at most; `None` for ever. The end may be noticed late, by a fiftieth of that time and
                never by more than 0.05 s.
            now: The time, on the line of `Clock.monotonic()`.
            fail_fast: Whether `fail_fast_waiters` ends it.

        Returns:
            What is to be awaited for the entry. If that ends in any other way, by a cancellation too, `give_up` must follow.
            It raises `AcquireTimeoutError` if no entry became free in time.
        """
        # What a loop's create_future() makes, in half the time.
        ticket: asyncio.Future[PoolEntry[R]] = asyncio.Future()
        self._limits.begin(ticket, seconds, now)
        if fail_fast:
            self._fail_fast.add(ticket)
            ticket.add_done_callback(self._fail_fast.discard)
        return ticket

    def give_up(self, ticket: asyncio.Future[PoolEntry[R]]) -> None:
        """Wait no more. An entry that was handed over all the same, in the turn of the loop in which the caller was cancelled, goes back."""
        self.waiters.pop(ticket, None)
        if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
            self.on_return(ticket.result())  # which knows whether the pool is closing since

    def _time_is_up(self, ticket: asyncio.Future[PoolEntry[R]], seconds: float) -> None:
        if not ticket.done():
            ticket.set_exception(
                AcquireTimeoutError(
                    f"no connection became free within {max(seconds, 0.0):.3g} s: {'all ' * self.is_full}{len(self._entries)} of "
                    f"max_size={self._max_size} are in use and {len(self.waiters)} more callers wait; "
                    "raise max_size or deadline, or hold connections for a shorter time"
                )
            )

    def put(self, entry: PoolEntry[R]) -> None:
        """Give an entry back: to the first waiter, else to the idle stack. An empty entry that no caller may fill is gone."""
        if self.waiters and (entry.resource is not None or self.may_open) and self.hand_over(entry):
            return
        if entry.resource is None:
            self._forget(entry)
        else:
            self.idle_entries.append(entry)

    def hand_over(self, entry: PoolEntry[R]) -> bool:
        """Give an entry to the first waiter that has not been cancelled, and say whether there was one."""
        while self.waiters:
            ticket, _ = self.waiters.popitem(last=False)
            if not ticket.done():
                ticket.set_result(entry)
                return True
        return False

    def withdraw(self, condition: Callable[[PoolEntry[R]], bool], *, keep: int = 0) -> list[PoolEntry[R]]:
        """Take all idle resources that meet a condition, the longest unused first, while more than `keep` resources remain."""
        spare = len(self._entries) - keep
        chosen = [entry for entry in self.idle_entries if condition(entry)][: max(spare, 0)]
        for entry in chosen:
            self.idle_entries.remove(entry)
        return chosen

    def fail_waiters(self, error: Callable[[], Exception]) -> None:
        """Let all waiting callers fail, each with an error of its own."""
        self._limits.stop()
        while self.waiters:
            ticket, _ = self.waiters.popitem(last=False)
            if not ticket.done():
                ticket.set_exception(error())

    def fail_fast_waiters(self, error: Callable[[], Exception]) -> None:
        """Let those fail who wait with `fail_fast`, each with an error of its own."""
        for ticket in tuple(self._fail_fast):
            self.waiters.pop(ticket, None)
            if not ticket.done():
                ticket.set_exception(error())

    def fail_waiters_if(self, hopeless: Callable[[float, float], bool], error: Callable[[], Exception]) -> None:
        """Let those fail, each with an error of its own, of whom that is true: until when, and since when, they wait."""
        for ticket, (until, since) in list(self.waiters.items()):
            if hopeless(until, since):
                del self.waiters[ticket]
                if not ticket.done():
                    ticket.set_exception(error())

    def drop(self, entry: PoolEntry[R]) -> None:
        """Count an entry no more that is not coming back."""
        self._forget(entry)

    async def drained(self) -> None:
        """Wait until no entry is left, or until waiting for it has no more sense: see `stop_draining`."""
        if self._entries:
            self._drained.clear()
            await self._drained.wait()

    def stop_draining(self) -> None:
        """Let `drained` end although resources are left: it is not known when they will come back."""
        self._drained.set()

    def _forget(self, entry: PoolEntry[R]) -> None:
        self._entries.discard(entry)
        if not self._entries:
            self._drained.set()
        if self.is_connection_needed:
            self.on_connection_needed()


def _ignore() -> None:
    """Ignore what is wanted."""
