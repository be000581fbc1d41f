"""The main step: requests to a database that is paused, one database for each pool."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import asyncpg

from demo.results import PauseResult
from resilient_pool import ResilientPool, profiles
from resilient_pool.config.arguments import PoolArguments
from resilient_pool.testing import EmbeddedPostgres, PausingServer
from resilient_pool.testing.pausing import Away

REQUESTS = 100
"""How many requests each pool gets: evenly spread over the resume and a little more."""
TAIL_SECONDS = 1.0
"""For how many seconds requests continue when the database is up."""
PAUSE_AFTER = 1.5
"""Seconds without a connection after which a database pauses: longer than a prober waits between two attempts."""
IDLE_LIFETIME = 2.0
"""Seconds for which ResilientPool keeps an unused connection: 50 in the profile, shortened like everything here."""
PAUSE_GRACE = 1.5
"""Seconds beyond these two within which a database must have paused again."""
AWAY: Sequence[Away] = ("57P03", "reset", "28000", "hang")
"""How attempts are answered while a database resumes: each draws one of these."""
SEED = 4
"""What they draw from. It is the same for both."""
SAMPLE_INTERVAL = 0.1
"""Seconds between two looks at a database."""


class Pool(Protocol):
    """The method of a pool that the requests call."""

    async def fetchval(self, query: str) -> object:
        """Return one value."""
        ...


@asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Pool]:
    """Ask through `asyncpg.Pool` as it comes."""
    pool = await asyncpg.create_pool(dsn, ssl=False)
    try:
        yield pool
    finally:
        pool.terminate()


@asynccontextmanager
async def resilient(dsn: str) -> AsyncIterator[Pool]:
    """Ask through `ResilientPool` with the profile for such a database."""
    shortened: PoolArguments = {"max_inactive_connection_lifetime": IDLE_LIFETIME, "ssl": False}
    async with ResilientPool(dsn, **(profiles.AURORA_SERVERLESS | shortened)) as pool:
        yield pool


POOLS: Mapping[str, Callable[[str], AbstractAsyncContextManager[Pool]]] = {
    "asyncpg.Pool": plain,
    "ResilientPool": resilient,
}


class PauseProbe:
    """Sends requests through one pool to a paused database, and records the result.

    Args:
        server: The database.
        result: The result to fill.
    """

    def __init__(self, server: PausingServer, result: PauseResult) -> None:
        self._server = server
        self._result = result

    async def run(self, pool: Pool, seconds: float) -> None:
        """Pause the database, send requests for `seconds`, and see whether it pauses again."""
        await pool.fetchval("SELECT 1")
        await asyncio.to_thread(self._server.pause)
        sampling = asyncio.create_task(self._keep_sampling())
        try:
            await self._send_requests(pool, seconds)
            await self._wait_for_pause()
        finally:
            sampling.cancel()
            self._sample()

    async def _send_requests(self, pool: Pool, seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(REQUESTS):
                group.create_task(self._request(pool))
                await asyncio.sleep(seconds / REQUESTS)

    async def _request(self, pool: Pool) -> None:
        began = time.monotonic()
        error: Exception | None = None
        self._result.asked += 1
        try:
            await pool.fetchval("SELECT 1")
        except Exception as failure:  # noqa: BLE001  every error that the pool lets through is counted
            error = failure
        self._result.add(time.monotonic() - began, error)

    async def _wait_for_pause(self) -> None:
        began = time.monotonic()
        try:
            await self._server.until("paused", IDLE_LIFETIME + PAUSE_AFTER + PAUSE_GRACE)
        except TimeoutError:
            self._result.not_paused_in = time.monotonic() - began
        else:
            self._result.paused_after = time.monotonic() - began

    async def _keep_sampling(self) -> None:
        while True:
            self._sample()
            await asyncio.sleep(SAMPLE_INTERVAL)

    def _sample(self) -> None:
        self._result.attempts = sum(attempt.phase != "awake" for attempt in self._server.attempts)
        self._result.connections = self._server.open_connections
        self._result.database = self._server.phase


def describe(resume_seconds: float) -> str:
    """Describe in a sentence what happens."""
    return (
        f"both databases are paused, and take {resume_seconds:g} s to resume: "
        f"{REQUESTS} requests in {resume_seconds + TAIL_SECONDS:g} s, then no more"
    )


async def run(server: EmbeddedPostgres, pause_results: Mapping[str, PauseResult], resume_seconds: float) -> None:
    """Run the requests of all pools at the same time, each with a paused database of its own.

    Args:
        server: The real server behind them.
        pause_results: The results to fill, by the pool's name.
        resume_seconds: How long a database takes to resume.
    """
    for library in ("asyncpg", "resilient_pool"):
        logging.getLogger(library).addHandler(logging.NullHandler())  # warnings would run across the table
    async with asyncio.TaskGroup() as group:
        for pool, result in pause_results.items():
            group.create_task(_run_one(result, pool, server, resume_seconds))


async def _run_one(result: PauseResult, pool: str, postgres: EmbeddedPostgres, resume_seconds: float) -> None:
    with PausingServer(
        postgres.host, postgres.port, pause_after=PAUSE_AFTER, resume_seconds=resume_seconds, away=AWAY, seed=SEED
    ) as server:
        async with POOLS[pool](server.dsn(postgres.dsn())) as opened:
            await PauseProbe(server, result).run(opened, resume_seconds + TAIL_SECONDS)
