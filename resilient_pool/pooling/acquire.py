"""From a slot to a healthy connection: check it, replace it, open it."""

from __future__ import annotations

import asyncio
from math import inf

from resilient_pool.clock import Clock
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.events import DiscardReason
from resilient_pool.observability.stats import Counters
from resilient_pool.pooling.circuit_breaker import RecoveryGate
from resilient_pool.pooling.driver import Link
from resilient_pool.pooling.maintenance import Upkeep
from resilient_pool.pooling.resource_pool import Slot, Slots

# An answer that took longer than this, in seconds, and longer than `ping_after`, may be one that a frozen process read late.
_SLOW = 0.1


# For so many seconds the end of a reset is waited for, where another connection could be taken or opened.
_PROMPT = 0.05


class Checkout:
    """Hands out slots whose connections were checked a moment ago.

    Args:
        config: How long a connection may be idle unasked, and how long a ping may take.
        slots: Where slots come from.
        upkeep: Closes.
        gate: Opens.
        clock: Tells idle times and deadlines.
        counters: Where it counts.
    """

    def __init__(
        self,
        config: PoolConfig,
        slots: Slots[Link],
        upkeep: Upkeep,
        gate: RecoveryGate,
        clock: Clock,
        counters: Counters,
    ) -> None:
        self._ping_after = config.ping_after
        self._ping_timeout = config.ping_timeout
        self._sets_up = config.setup is not None
        self._slots = slots
        self._upkeep = upkeep
        self._gate = gate
        self._clock = clock
        self._counters = counters

    async def take(self, deadline: float | None, *, fail_fast: bool = False) -> Slot[Link]:
        """Take a slot with a healthy connection in it.

        Args:
            deadline: Until when to wait for a slot and for a connection, on the line of `Clock.monotonic()`.
            fail_fast: Whether not to wait for a server that is known to be away.

        Raises:
            AcquireTimeoutError: No slot became free in time.
            Exception: Whatever opening a connection raised last. No slot is held then.
        """
        if self._upkeep.returning:
            await self._let_a_lone_reset_end(deadline)
        while True:
            slot = self._at_hand()
            if slot is None:
                slot = await self._wait(deadline, fail_fast=fail_fast)
            if not self._is_fit(slot):
                self._upkeep.retire(slot)
                if not await self.mend(slot, deadline):
                    continue
            self._counters.acquired += 1
            return slot

    async def _let_a_lone_reset_end(self, deadline: float | None) -> None:
        # One who uses the pool alone gets the same connection again, as with asyncpg's pool, with the tables that are
        # temporary in its session; when others use it too there is no telling who gets which.
        reset = self._upkeep.lone_reset
        if reset is not None:
            started = self._clock.monotonic()
            left = inf if deadline is None else deadline - started
            self._counters.waits += 1
            await asyncio.wait([reset], timeout=max(min(_PROMPT, left), 0.0))
            self._counters.wait_seconds += self._clock.monotonic() - started

    def _at_hand(self) -> Slot[Link] | None:
        if not self._slots.idle:
            if self._slots.is_full or self._is_worth_waiting():
                return None
            self._gate.doubt_if_alone()
        return self._slots.take()

    def at_once(self) -> Slot[Link] | None:
        """Take the slot that was used last if it is idle and its connection needs neither mending nor setting up."""
        slot = self._slots.newest
        if slot is None or self._upkeep.returning == 1 or self._sets_up or not self._is_fit(slot):
            return None
        self._counters.acquired += 1
        return self._slots.take()

    def _is_fit(self, slot: Slot[Link]) -> bool:
        """Whether a slot's connection can be used as it is. What it is asked from now on is asked at this time."""
        now, link = self._clock.now(), slot.resource
        slot.taken_at = now
        return (
            link is not None
            and now - slot.asked_at < self._ping_after
            and now < slot.expires_at
            and link.is_quiet()
            and not self._upkeep.is_outdated(slot)
        )

    def _is_worth_waiting(self) -> bool:
        # A connection that is being reset comes back sooner than a new one could be opened, as long as nobody else waits
        # for it. One to spare is opened all the same: then a caller whose writes follow each other need not wait for the
        # resets between them, and still it does not open one connection after the other.
        return self._upkeep.returning > self._slots.waiting + 1

    async def _wait(self, deadline: float | None, *, fail_fast: bool) -> Slot[Link]:
        self._upkeep.require_open()
        refusal = self._gate.refusal() if fail_fast else None
        self._gate.call()
        if refusal is not None:
            raise refusal
        started = self._clock.monotonic()
        self._counters.waits += 1
        try:
            return await self._slots.wait(None if deadline is None else deadline - started, impatient=fail_fast)
        except AcquireTimeoutError as timeout:
            failure = self._gate.most_telling(timeout)
        finally:
            self._counters.wait_seconds += self._clock.monotonic() - started
            self._gate.leave()
        raise failure

    async def mend(self, slot: Slot[Link], deadline: float | None) -> bool:
        """Make sure that a slot in the caller's hands has a healthy connection: the one it has, or another.

        Returns:
            Whether it has. If not, because the server is not known to be up, the slot is given up: take another one.

        Raises:
            AcquireTimeoutError: There was no time left to find out whether it has.
            Exception: Whatever opening a connection raises. The slot is given up then.
        """
        if deadline is not None and self._clock.monotonic() >= deadline:
            self._upkeep.give_back(slot)
            raise AcquireTimeoutError(
                "the deadline had passed before a connection could be checked or opened; raise deadline"
            )
        reason: DiscardReason | None = DiscardReason.FAILED
        try:
            found = await self._examine(slot, deadline)
            if found is not None:
                self._upkeep.close_connection(slot, found)
            if slot.resource is not None:
                reason = None
            elif await self._gate.open_into(slot, deadline):
                # Opening may have begun before the process was frozen.
                reason = await self._ask_if_long_ago(slot, deadline)
        finally:
            if reason is not None:
                self._upkeep.discard(slot, reason)
        slot.taken_at = self._clock.now()
        return reason is None

    async def _examine(self, slot: Slot[Link], deadline: float | None) -> DiscardReason | None:
        """Say why a slot's connection must not be used, or `None`: it may be, or there is none."""
        link, now = slot.resource, self._clock.now()
        if link is None:
            return None
        if link.doomed:
            return DiscardReason.FAILED
        if self._upkeep.is_outdated(slot) or now >= slot.expires_at:
            return DiscardReason.GENERATION if now < slot.expires_at else DiscardReason.EXPIRED_LIFETIME
        if not link.is_quiet() and not await link.settle():
            self._counters.stale_found += 1
            return DiscardReason.STALE
        return await self._ask_if_long_ago(slot, deadline)

    async def _ask_if_long_ago(self, slot: Slot[Link], deadline: float | None) -> DiscardReason | None:
        """Ping a connection that has answered nothing that was asked a short time ago."""
        link = slot.resource
        if link is None or self._clock.now() - slot.asked_at < self._ping_after:
            return None
        reason = await self._ping(slot, link, deadline)
        if reason is None and self._clock.now() - slot.asked_at >= max(self._ping_after, _SLOW):
            reason = await self._ping(slot, link, deadline)
        return reason

    async def _ping(self, slot: Slot[Link], link: Link, deadline: float | None) -> DiscardReason | None:
        now, left = self._clock.now(), inf if deadline is None else deadline - self._clock.monotonic()
        self._counters.pings += 1
        if await link.ping(max(min(self._ping_timeout, left), 0.001)):
            slot.asked_at = now
            return None
        self._counters.pings_failed += 1
        if left < self._ping_timeout:
            self._upkeep.close_connection(slot, DiscardReason.PING_FAILED)
            raise AcquireTimeoutError(
                f"a connection that was asked something {now - slot.asked_at:.3g} s ago for the last time was pinged, and did "
                f"not answer within the {max(left, 0.0):.3g} s that were left of the deadline; raise deadline"
            )
        # Asking the others in turn would add up.
        self._upkeep.condemn(slot.asked_at)
        return DiscardReason.PING_FAILED
