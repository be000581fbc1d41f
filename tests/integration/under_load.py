"""Callers under an outage, and the ledger of what they were told."""

from __future__ import annotations

import asyncio
import time

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres


class Load:
    """Ten callers that read and write until they are stopped, and what became of each call.

    Args:
        pool: The pool. Its database has a table `item` of numbers.

    Attributes:
        reads: How many reads were answered.
        done: The numbers whose writes were acknowledged.
        unknown: Those of unknown outcome, by how they were written.
        errors: What else was raised.
        recovered: Seconds from `outage()` to the next write that was acknowledged.
    """

    def __init__(self, pool: ResilientPool) -> None:
        self._pool = pool
        self._out_at: float | None = None
        self.recovered: float | None = None
        self._over = False
        self._number = 0
        self.reads = 0
        self.done: list[int] = []
        self.unknown: dict[int, str] = {}
        self.errors: list[Exception] = []

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._work()) for _ in range(10)]
        await self.progress()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        async with asyncio.timeout(40):
            await asyncio.gather(*self._tasks)

    async def progress(self, calls: int = 20) -> None:
        """Wait until some more calls were answered."""
        aim = self.reads + calls, len(self.done) + calls
        async with asyncio.timeout(40):
            while self.reads < aim[0] or len(self.done) < aim[1]:
                await asyncio.sleep(0.01)

    def outage(self) -> None:
        """Measure from now on how long it takes until a write is acknowledged."""
        self._out_at, self.recovered = time.monotonic(), None

    async def standstill(self) -> None:
        """Wait until no call is answered any more: some answers may still be on their way."""
        async with asyncio.timeout(20):
            before = None
            while before != (before := (self.reads, len(self.done))):
                await asyncio.sleep(0.3)

    async def _work(self) -> None:
        ways = [self._one_shot, self._transaction, self._exactly_once]
        while not self._over:
            self._number += 1
            number, began = self._number, time.monotonic()
            write = ways[number % len(ways)]
            try:
                assert await self._pool.fetchval("SELECT $1::int", number) == number
                self.reads += 1
                await write(number)
            except OutcomeUnknownError:
                self.unknown[number] = write.__name__.strip("_")
            except Exception as error:
                self.errors.append(error)
            else:
                self.done.append(number)
                if self._out_at is not None and began > self._out_at and self.recovered is None:
                    self.recovered = time.monotonic() - self._out_at

    async def _one_shot(self, number: int) -> None:
        await self._pool.execute("INSERT INTO item VALUES ($1)", number)

    async def _exactly_once(self, number: int) -> None:
        await self._pool.execute("INSERT INTO item VALUES ($1)", number, exactly_once=True)

    async def _transaction(self, number: int) -> None:
        await self._pool.run_in_transaction(
            lambda connection: connection.execute("INSERT INTO item VALUES ($1)", number)
        )

    async def assert_ledger_holds(self, server: EmbeddedPostgres) -> None:
        """What was acknowledged is there once; what is not known once or not at all; nothing else."""
        assert self.errors == [], list(map(repr, self.errors))[:5]
        async with server.admin() as admin:
            rows = [row["id"] for row in await admin.fetch("SELECT id FROM item")]
        assert len(rows) == len(set(rows)), "applied twice"
        assert set(self.done) <= set(rows), "acknowledged and absent"
        assert set(rows) <= {*self.done, *self.unknown}, "reported as failed, and present"
