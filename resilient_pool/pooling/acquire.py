"""From an entry to a healthy connection and back: check it, replace it, open it; put it where the next caller finds it."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

from resilient_pool.errors import AcquireTimeoutError, PoolOverloadedError
from resilient_pool.events import CallerWaited, DiscardReason, WaitEnd, WaitReason
from resilient_pool.pooling.circuit_breaker import CircuitBreaker
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool

# An answer that took longer than this, in seconds, and longer than `ping_after`, may be one that a frozen process read late.
_SLOW = 0.1


# For so many seconds the end of a reset is waited for, where another connection could be taken or opened.
_PROMPT = 0.05
# Looking a member up in its enumeration takes long (Python 3.11).
_BUSY, _CONNECTING = WaitReason.BUSY, WaitReason.CONNECTING
_SERVED, _CANCELLED = WaitEnd.SERVED, WaitEnd.CANCELLED


class Acquirer:
    """Hands out resources whose connections were checked a moment ago, and takes back those that need nothing.

    What nearly every call does is done here without a further call: `try_acquire` and `release` know what an idle entry of a
    `ResourcePool` is. All else is for `acquire`, and for `Maintenance`.

    Args:
        context: How long a connection may be idle unasked, and how long a ping may take.
        resources: Where resources come from.
        maintenance: Closes.
        circuit_breaker: Opens.
    """

    def __init__(
        self,
        context: PoolContext,
        resources: ResourcePool[DriverConnection],
        maintenance: Maintenance,
        circuit_breaker: CircuitBreaker,
    ) -> None:
        self._ping_after = context.config.ping_after
        self._ping_timeout = context.config.ping_timeout
        self._max_queries = context.config.max_queries
        self._max_waiting = inf if context.config.max_waiting is None else context.config.max_waiting
        self._resources = resources
        self._maintenance = maintenance
        self._circuit_breaker = circuit_breaker
        self._idle = resources.idle_entries
        self._clock = context.clock
        self._now = context.clock.now
        self._monotonic = context.clock.monotonic
        self._counters = context.counters
        self._events = context.events
        self._has_observers = bool(context.events)

    def try_acquire(self, now: float) -> PoolEntry[DriverConnection] | None:
        """Take the entry that was used last, if it is idle and its connection can be used as it is.

        Args:
            now: The time, on the line of `Clock.monotonic()`.
        """
        if not self._idle or self._maintenance.returning == 1:
            return None
        entry = self._idle[-1]
        if not self.is_ready(entry, now):
            return None
        self._counters.acquired += 1
        return self._idle.pop()

    def is_ready(self, entry: PoolEntry[DriverConnection], now_monotonic: float) -> bool:
        """Whether an entry's connection can be used as it is. What it is asked from now on is asked at this time."""
        entry.taken_at = now = self._now()
        entry.taken_at_monotonic = now_monotonic
        driver = entry.resource
        return (
            driver is not None
            and now - entry.asked_at < self._ping_after
            and now < entry.expires_at
            and entry.generation == self._maintenance.generation
            and driver.socket_is_idle()
        )

    def release(self, entry: PoolEntry[DriverConnection]) -> None:
        """Take back an entry whose session is as it was."""
        driver, maintenance, resources = entry.resource, self._maintenance, self._resources
        uses = 0 if driver is None else driver.protocol.queries_count
        if (
            driver is None
            or not (driver.has_served and driver.is_usable)
            or uses >= self._max_queries
            or entry.generation != maintenance.generation
            or maintenance.closing
            or (maintenance.reaper is None and maintenance.may_reap)
        ):
            maintenance.release(entry)
            return
        if uses != entry.uses:
            entry.uses, entry.asked_at = uses, entry.taken_at
        if resources.waiters and resources.hand_over(entry):
            return
        entry.idle_since = entry.taken_at + self._monotonic() - entry.taken_at_monotonic
        self._idle.append(entry)

    async def acquire(
        self, deadline: float | None, *, fail_fast: bool = False, is_begun: bool = False
    ) -> PoolEntry[DriverConnection]:
        """Take an entry with a healthy connection in it.

        Args:
            deadline: Until when to wait for an entry and for a connection, on the line of `Clock.monotonic()`.
            fail_fast: Whether not to wait for a server that is known to be away.
            is_begun: Whether it is for something that is under way, for which `max_waiting` is no limit.

        Raises:
            PoolOverloadedError: As many callers as may wait do so already.
            AcquireTimeoutError: No entry became free in time.
            Exception: Whatever opening a connection raised last. No entry is held then.
        """
        if self._maintenance.returning:
            await self._let_a_lone_reset_end(deadline)
        while True:
            entry: Any = self._at_hand()
            now = self._monotonic()
            if entry is None:
                if not is_begun and len(self._resources.waiters) >= self._max_waiting:
                    raise self._overload()
                is_begun = True  # who has waited is not sent away
                reason, end, failure = self._begin_wait(deadline, fail_fast), _CANCELLED, None
                ticket = self._resources.enqueue(None if deadline is None else deadline - now, now, fail_fast=fail_fast)
                try:
                    entry = await ticket
                    end = _SERVED
                except Exception as error:  # noqa: BLE001 - it is raised below, when the wait has ended
                    end, failure = self._end_and_failure(error)
                finally:
                    if entry is None:
                        self._resources.give_up(ticket)
                    now = self._end_wait(now, reason, end)
                    self._circuit_breaker.stop_prober_if_unused()
                if failure is not None:
                    raise failure
            if not self.is_ready(entry, now):
                self._maintenance.close_if_idle_too_long(entry)
                if not await self.ensure_healthy(entry, deadline):
                    continue
            self._counters.acquired += 1
            return entry  # type: ignore[no-any-return]

    def _overload(self) -> PoolOverloadedError:
        self._counters.overloads += 1
        return PoolOverloadedError(
            f"{self._resources.waiting} callers wait for a connection, and max_waiting={self._max_waiting}; "
            "shed load, or raise max_waiting or max_size"
        )

    async def _let_a_lone_reset_end(self, deadline: float | None) -> None:
        # One who uses the pool alone gets the same connection again, as with asyncpg's pool, with the tables that are
        # temporary in its session; when others use it too there is no telling who gets which.
        reset = self._maintenance.lone_reset
        if reset is not None:
            started = self._clock.monotonic()
            left = inf if deadline is None else deadline - started
            end = WaitEnd.CANCELLED
            try:
                await asyncio.wait([reset], timeout=max(min(_PROMPT, left), 0.0))
                end = WaitEnd.SERVED
            finally:
                self._end_wait(started, WaitReason.RESETTING, end)

    def _at_hand(self) -> PoolEntry[DriverConnection] | None:
        resources = self._resources
        if not self._idle:
            # A connection that is being reset comes back sooner than a new one could be opened, as long as no other caller waits
            # for it. One to spare is opened all the same: then a caller whose writes follow each other need not wait for the
            # resets between them, and still it does not open one connection after the other.
            if resources.is_full or self._maintenance.returning > len(resources.waiters) + 1:
                return None
            self._circuit_breaker.half_open_if_unconnected()
        return resources.take()

    def _begin_wait(self, deadline: float | None, fail_fast: bool) -> WaitReason:
        """Let a connection be opened if that is needed, and say why the caller has to wait. Raises if it need not wait."""
        if self._maintenance.closing:
            self._maintenance.require_open()
        if not self._circuit_breaker.is_settled:
            refusal = self._circuit_breaker.refusal(deadline, fail_fast=fail_fast)
            self._circuit_breaker.ensure_prober()
            if refusal is not None:
                raise refusal
        return _BUSY if not self._has_observers or self._resources.has_resources else _CONNECTING

    def _end_and_failure(self, error: Exception) -> tuple[WaitEnd, Exception]:
        if not isinstance(error, AcquireTimeoutError) or error.retry_after is not None:
            return WaitEnd.FAILED, error
        self._counters.wait_timeouts += 1
        return WaitEnd.TIMEOUT, self._circuit_breaker.error_for_timeout(error)

    def _end_wait(self, started: float, reason: WaitReason, end: WaitEnd) -> float:
        """Count a wait that ends now, and return the time."""
        now = self._monotonic()
        self._counters.count_wait(now - started)
        if not self._has_observers:
            return now
        outage = self._circuit_breaker.outage_since(started)
        self._events.emit(
            CallerWaited(
                reason=reason if outage is None else WaitReason.AWAY,
                end=end,
                elapsed=now - started,
                fault=None if outage is None else outage.fault,
                outage=None if outage is None else outage.lasted(now),
                attempts=0 if outage is None else outage.attempts,
            )
        )
        return now

    async def keep_or_acquire(
        self, entry: PoolEntry[DriverConnection] | None, deadline: float | None, *, fail_fast: bool = False
    ) -> PoolEntry[DriverConnection]:
        """Return an entry with a healthy connection for what is under way: this one if it has one or gets one, else another."""
        if entry is not None and await self.ensure_healthy(entry, deadline):
            return entry
        return await self.acquire(deadline, fail_fast=fail_fast, is_begun=True)

    async def ensure_healthy(self, entry: PoolEntry[DriverConnection], deadline: float | None) -> bool:
        """Make sure that an entry in the caller's hands has a healthy connection: the one it has, or another.

        Returns:
            Whether it has. If not, because the server is not known to be up, the entry is given up: take another one.

        Raises:
            AcquireTimeoutError: There was no time left to find out whether it has.
            Exception: Whatever opening a connection raises. The entry is given up then.
        """
        if deadline is not None and self._clock.monotonic() >= deadline:
            self._maintenance.release(entry)
            raise AcquireTimeoutError(
                "the deadline had passed before a connection could be checked or opened; raise deadline"
            )
        reason: DiscardReason | None = DiscardReason.FAILED
        try:
            found = await self._check(entry, deadline)
            if found is not None:
                self._maintenance.close_connection(entry, found)
            if entry.resource is not None:
                reason = None
            elif await self._circuit_breaker.open_into(entry, deadline):
                # Opening may have begun before the process was frozen.
                reason = await self._ask_if_long_ago(entry, deadline)
        finally:
            if reason is not None:
                self._maintenance.discard(entry, reason)
        entry.taken_at, entry.taken_at_monotonic = self._now(), self._monotonic()
        return reason is None

    async def _check(self, entry: PoolEntry[DriverConnection], deadline: float | None) -> DiscardReason | None:
        """Say why an entry's connection must not be used, or `None`: it may be, or there is none."""
        driver, now = entry.resource, self._clock.now()
        if driver is None:
            return None
        if driver.invalidated:
            return DiscardReason.FAILED
        if self._maintenance.is_outdated(entry) or now >= entry.expires_at:
            return DiscardReason.GENERATION if now < entry.expires_at else DiscardReason.EXPIRED_LIFETIME
        if not driver.socket_is_idle() and not await driver.drain_socket():
            self._counters.stale_found += 1
            return DiscardReason.STALE
        return await self._ask_if_long_ago(entry, deadline)

    async def _ask_if_long_ago(
        self, entry: PoolEntry[DriverConnection], deadline: float | None
    ) -> DiscardReason | None:
        """Ping a connection that has answered nothing that was asked a short time ago."""
        driver = entry.resource
        if driver is None or self._clock.now() - entry.asked_at < self._ping_after:
            return None
        reason = await self._ping(entry, driver, deadline)
        if reason is None and self._clock.now() - entry.asked_at >= max(self._ping_after, _SLOW):
            reason = await self._ping(entry, driver, deadline)
        return reason

    async def _ping(
        self, entry: PoolEntry[DriverConnection], driver: DriverConnection, deadline: float | None
    ) -> DiscardReason | None:
        now, left = self._clock.now(), inf if deadline is None else deadline - self._clock.monotonic()
        self._counters.pings += 1
        if await driver.ping(max(min(self._ping_timeout, left), 0.001)):
            entry.asked_at = now
            return None
        self._counters.pings_failed += 1
        if left < self._ping_timeout:
            self._maintenance.close_connection(entry, DiscardReason.PING_FAILED)
            raise AcquireTimeoutError(
                f"a connection that was asked something {now - entry.asked_at:.3g} s ago for the last time was pinged, and did "
                f"not answer within the {max(left, 0.0):.3g} s that were left of the deadline; raise deadline"
            )
        # Asking the others in turn would add up.
        self._maintenance.discard_idle_since(entry.asked_at)
        return DiscardReason.PING_FAILED
