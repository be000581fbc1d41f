"""Takes the figures of a pool that holds back: leaves an idle database alone, ends in time, does not retry without end."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import asyncpg

from resilient_pool import ResilientPool, RetryBudget
from resilient_pool.testing import EmbeddedPostgres, FaultProxy, PausingServer
from resilient_pool.testing.pausing import Away

AnyPool = ResilientPool | asyncpg.Pool

# An idle database is left alone

BURST = 50
PAUSE_AFTER = 0.5
SPARE = 2.0
"""Seconds beyond the idle lifetime after which no connection may be left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idleness:
    """What a pool does after a burst.

    Attributes:
        empty_after: Seconds from the burst's end until no connection was left, or None if there still were.
        watched: For how many seconds that was waited for.
        left: How many there were then.
        sent: Bytes the server received from then on.
        phase: What the database was doing at the end.
    """

    empty_after: float | None
    watched: float
    left: int
    sent: int
    phase: str


async def idle_ours(postgres: EmbeddedPostgres, *, lifetime: float, watch: float, pauses: bool) -> Idleness:
    with dozing(postgres, pauses=pauses) as server:
        dsn = server.dsn(postgres.dsn())
        async with ResilientPool(dsn, ssl=False, max_inactive_connection_lifetime=lifetime) as pool:
            return await fall_idle(server, pool, limit=lifetime + SPARE, watch=watch)


async def idle_theirs(postgres: EmbeddedPostgres, *, limit: float, watch: float) -> Idleness:
    with dozing(postgres, pauses=True) as server:
        pool = await asyncpg.create_pool(server.dsn(postgres.dsn()), ssl=False)
        try:
            return await fall_idle(server, pool, limit=limit, watch=watch)
        finally:
            pool.terminate()


def dozing(postgres: EmbeddedPostgres, *, pauses: bool) -> PausingServer:
    return PausingServer(postgres.host, postgres.port, pause_after=PAUSE_AFTER if pauses else None)


async def fall_idle(server: PausingServer, pool: AnyPool, *, limit: float, watch: float) -> Idleness:
    await asyncio.gather(*(pool.execute("CREATE TEMPORARY TABLE IF NOT EXISTS burst ()") for _ in range(BURST)))
    began = time.monotonic()
    while server.open_connections and time.monotonic() - began < limit:  # noqa: ASYNC110 - they end in another thread
        await asyncio.sleep(0.02)
    quiet_from = time.monotonic()
    left = server.open_connections
    await asyncio.sleep(watch)
    return Idleness(
        empty_after=None if left else quiet_from - began,
        watched=quiet_from - began,
        left=left,
        sent=server.bytes_since(quiet_from),
        phase=server.phase,
    )


# No caller waits longer than the deadline

CALLERS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """When callers got their error, in seconds, and which."""

    first: float
    last: float
    errors: tuple[str, ...]


async def meet_deadline(postgres: EmbeddedPostgres, away: Away, *, deadline: float, resume: float) -> Ending:
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=resume, away=away) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, deadline=deadline) as pool:
            return ending(await asyncio.gather(*(failure_of(pool, "SELECT 1") for _ in range(CALLERS))))


async def fail_at_once(postgres: EmbeddedPostgres, away: Away, *, resume: float) -> Ending:
    """Call again and again while the database is known to be away."""
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=resume, away=away) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, fail_fast=True) as pool:
            await failure_of(pool, "SELECT 1")
            return ending([await failure_of(pool, "SELECT 1") for _ in range(CALLERS)])


async def failure_of(pool: ResilientPool, sql: str, *, idempotent: bool = False) -> tuple[float, Exception]:
    began = time.monotonic()
    try:
        await pool.fetchval(sql, idempotent=idempotent)
    except Exception as error:  # noqa: BLE001 - it is what was wanted
        return time.monotonic() - began, error
    raise RuntimeError(f"{sql} succeeded, so there is nothing to measure")


def ending(failures: Iterable[tuple[float, Exception]]) -> Ending:
    taken, errors = zip(*failures, strict=True)
    return Ending(first=min(taken), last=max(taken), errors=tuple(sorted({type(error).__name__ for error in errors})))


# Retries add little to the load of a server that is up and failing

WORKERS = 50
COUNTER = "CREATE SEQUENCE executed"
OVERLOADED = """
    CREATE FUNCTION overloaded() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM nextval('executed');  -- which no rollback takes back
        RAISE EXCEPTION 'as full as can be' USING ERRCODE = '53400';
    END $$
"""
ENDLESS = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What calls came to that all failed.

    Attributes:
        calls: How many there were.
        executed: How often the server executed the statement.
        at_once: How many callers got the error of their first and only attempt.
        median: Seconds that took, the median of these callers.
        errors: Which errors there were.
    """

    calls: int
    executed: int
    at_once: int
    median: float
    errors: tuple[str, ...]


async def overload(postgres: EmbeddedPostgres, budget: RetryBudget, calls: int) -> Load:
    """Call a server that answers every call with 53400."""
    async with ResilientPool(postgres.dsn(), retry_budget=budget) as pool:
        return await load(postgres, pool, "SELECT overloaded()", calls)


async def lose_answers(postgres: EmbeddedPostgres, budget: RetryBudget, calls: int) -> Load:
    """Call a server that executes every statement and resets the connection in place of an answer."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        async with ResilientPool(proxy.dsn(postgres.dsn()), retry_budget=budget) as pool:
            proxy.swallow_next_answer("rst", matching=b"executed", times=10 * calls)
            return await load(postgres, pool, "SELECT nextval('executed')", calls)


async def load(postgres: EmbeddedPostgres, pool: ResilientPool, sql: str, calls: int) -> Load:
    failures: list[tuple[float, Exception]] = []
    numbers = itertools.count(1)

    async def work() -> None:
        while next(numbers) <= calls:
            failures.append(await failure_of(pool, sql, idempotent=True))

    async with postgres.admin() as administrator:
        before = await administrator.fetchval("SELECT nextval('executed')")
        await asyncio.gather(*(work() for _ in range(WORKERS)))
        executed = await administrator.fetchval("SELECT nextval('executed')") - before - 1
    at_once = [seconds for seconds, error in failures if not hasattr(error.__cause__ or error, "__notes__")]
    return Load(
        calls=len(failures),
        executed=executed,
        at_once=len(at_once),
        median=statistics.median(at_once) if at_once else float("nan"),
        errors=ending(failures).errors,
    )


def endless() -> RetryBudget:
    """Make a budget that is never used up."""
    return RetryBudget(reserve=ENDLESS, cap=ENDLESS)
