"""The same acquirer and the same maintenance, with a stopwatch: how long each caller has its connection."""

from __future__ import annotations

import asyncio

from resilient_pool.pooling.acquire import Acquirer
from resilient_pool.pooling.circuit_breaker import CircuitBreaker
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool


class MeteredMaintenance(Maintenance):
    """Maintenance that reports each use to the instruments when it ends."""

    def __init__(self, context: PoolContext, resources: ResourcePool[DriverConnection], connector: Connector) -> None:
        super().__init__(context, resources, connector)
        self._used_since: dict[PoolEntry[DriverConnection], float] = {}

    def begin_use(self, entry: PoolEntry[DriverConnection]) -> None:
        """Take note that a caller has an entry from now on."""
        self._used_since[entry] = self._clock.monotonic()
        self._context.events.emit_use_begin()

    def end_use(self, entry: PoolEntry[DriverConnection]) -> None:
        """Report an entry's use, if it is one: what comes back for a second time, after its reset, or never was a caller's, is none."""
        since = self._used_since.pop(entry, None)
        if since is not None:
            self._context.events.emit_use(self._clock.monotonic() - since)

    def release(self, entry: PoolEntry[DriverConnection]) -> None:
        """End an entry's use, and take it back."""
        self.end_use(entry)
        super().release(entry)

    def reset_and_release(
        self, entry: PoolEntry[DriverConnection], seconds: float | None = None
    ) -> asyncio.Task[None] | None:
        """End an entry's use, and take it back after a reset."""
        self.end_use(entry)
        return super().reset_and_release(entry, seconds)

    def detach(self, entry: PoolEntry[DriverConnection]) -> None:
        """End an entry's use, and let it go."""
        self.end_use(entry)
        super().detach(entry)


class MeteredAcquirer(Acquirer):
    """An acquirer that notes when each use begins."""

    def __init__(
        self,
        context: PoolContext,
        resources: ResourcePool[DriverConnection],
        maintenance: MeteredMaintenance,
        circuit_breaker: CircuitBreaker,
    ) -> None:
        super().__init__(context, resources, maintenance, circuit_breaker)
        self._begin_use, self._end_use = maintenance.begin_use, maintenance.end_use

    async def acquire(
        self, deadline: float | None, *, fail_fast: bool = False, is_begun: bool = False
    ) -> PoolEntry[DriverConnection]:
        """Take an entry with a healthy connection in it, and begin its use."""
        entry = await super().acquire(deadline, fail_fast=fail_fast, is_begun=is_begun)
        self._begin_use(entry)
        return entry

    def try_acquire(self, now: float) -> PoolEntry[DriverConnection] | None:
        """Take the entry that was used last if it is ready, and begin its use."""
        entry = super().try_acquire(now)
        if entry is not None:
            self._begin_use(entry)
        return entry

    def release(self, entry: PoolEntry[DriverConnection]) -> None:
        """End an entry's use, and take it back."""
        self._end_use(entry)
        super().release(entry)
