"""The main act: the only module of the demo that lets a database fall asleep, and that asks something of it then."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import asyncpg

from demo.results import Night
from resilient_pool import ResilientPool, profiles
from resilient_pool.config.arguments import PoolArguments
from resilient_pool.testing import EmbeddedPostgres, PausingServer
from resilient_pool.testing.pausing import Away

REQUESTS = 100
"""How many requests each pool is asked: evenly spread over the resume and a little more."""
AFTERWARDS = 1.0
"""For how many seconds requests go on coming when the database is up."""
PAUSE_AFTER = 1.5
"""Seconds without a connection after which a database falls asleep: longer than a prober waits between two attempts."""
IDLE = 2.0
"""Seconds for which ResilientPool keeps an unused connection: 50 in the profile, shortened like everything here."""
PATIENCE = 1.5
"""Seconds beyond these two that a database is given to fall asleep again."""
AWAY: Sequence[Away] = ("57P03", "reset", "28000", "hang")
"""How attempts are met while a database wakes: each draws one of these."""
SEED = 4
"""What they draw from. It is the same for both."""
GLANCE = 0.1
"""Seconds between two looks at a database."""


class Pool(Protocol):
    """What the requests ask of a pool."""

    async def fetchval(self, query: str) -> object:
        """Return one value."""
        ...


@asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Pool]:
    """Ask through `asyncpg.Pool` as it comes."""
    logging.getLogger("asyncpg").addHandler(logging.NullHandler())  # its warnings would run across the table
    pool = await asyncpg.create_pool(dsn, ssl=False)
    try:
        yield pool
    finally:
        pool.terminate()


@asynccontextmanager
async def resilient(dsn: str) -> AsyncIterator[Pool]:
    """Ask through `ResilientPool` with the profile for such a database."""
    shortened: PoolArguments = {"max_inactive_connection_lifetime": IDLE, "ssl": False}
    async with ResilientPool(dsn, **(profiles.AURORA_SERVERLESS | shortened)) as pool:
        yield pool


POOLS: Mapping[str, Callable[[str], AbstractAsyncContextManager[Pool]]] = {
    "asyncpg.Pool": plain,
    "ResilientPool": resilient,
}


class Sleeper:
    """A database that falls asleep, and one pool that has to do with it.

    Args:
        server: The database.
        night: Where to write down what happens.
    """

    def __init__(self, server: PausingServer, night: Night) -> None:
        self._server = server
        self._night = night

    async def live_through(self, pool: Pool, seconds: float) -> None:
        """Let it fall asleep under its pool, ask for `seconds`, and see whether it falls asleep again."""
        await pool.fetchval("SELECT 1")
        await asyncio.to_thread(self._server.pause)
        looking = asyncio.create_task(self._keep_looking())
        try:
            await self._ask_again_and_again(pool, seconds)
            await self._fall_asleep()
        finally:
            looking.cancel()
            self._look()

    async def _ask_again_and_again(self, pool: Pool, seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(REQUESTS):
                group.create_task(self._ask(pool))
                await asyncio.sleep(seconds / REQUESTS)

    async def _ask(self, pool: Pool) -> None:
        began = time.monotonic()
        error: Exception | None = None
        self._night.asked += 1
        try:
            await pool.fetchval("SELECT 1")
        except Exception as failure:  # noqa: BLE001  whatever the pool lets through is what the demo counts
            error = failure
        self._night.add(time.monotonic() - began, error)

    async def _fall_asleep(self) -> None:
        began = time.monotonic()
        try:
            await self._server.until("paused", IDLE + PAUSE_AFTER + PATIENCE)
        except TimeoutError:
            self._night.awake_for = time.monotonic() - began
        else:
            self._night.asleep_after = time.monotonic() - began

    async def _keep_looking(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(GLANCE)

    def _look(self) -> None:
        self._night.attempts = sum(attempt.phase != "awake" for attempt in self._server.attempts)
        self._night.connections = self._server.open_connections
        self._night.database = self._server.phase


def story(resume_seconds: float) -> str:
    """Tell in a sentence what happens."""
    return (
        f"both databases sleep, and take {resume_seconds:g} s to wake: "
        f"{REQUESTS} requests in {resume_seconds + AFTERWARDS:g} s, then no more"
    )


async def play(server: EmbeddedPostgres, nights: Mapping[str, Night], resume_seconds: float) -> None:
    """Let each pool have a sleeping database of its own, both at the same time.

    Args:
        server: The real server behind them.
        nights: Where to write down what happens, by the pool's name.
        resume_seconds: How long a database takes to wake.
    """
    async with asyncio.TaskGroup() as group:
        for pool, night in nights.items():
            group.create_task(_spend(night, pool, server, resume_seconds))


async def _spend(night: Night, pool: str, behind: EmbeddedPostgres, resume_seconds: float) -> None:
    with PausingServer(
        behind.host, behind.port, pause_after=PAUSE_AFTER, resume_seconds=resume_seconds, away=AWAY, seed=SEED
    ) as server:
        async with POOLS[pool](server.dsn(behind.dsn())) as opened:
            await Sleeper(server, night).live_through(opened, resume_seconds + AFTERWARDS)
