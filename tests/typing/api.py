"""A user's program. It is never run: it only has to type-check, and each `assert_type` is a promise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import assert_type

import asyncpg
import backoff

import resilient_pool
from resilient_pool import (
    BackoffPolicy,
    Classifier,
    Disposition,
    Event,
    Failure,
    Fault,
    MigrationFailedError,
    MigrationLockedError,
    MigrationResult,
    Observer,
    Outcome,
    OutcomeUnknownError,
    Phase,
    PoolStats,
    PostgresClassifier,
    ResilientConnection,
    ResilientPool,
    ResilientPoolError,
    RetryBudget,
    StructlogObserver,
    Verdict,
    create_pool,
    run_migration,
)

DSN = "postgresql://shop@localhost/shop"


class Everything:
    """A classifier of the user's own."""

    def classify(self, failure: Failure) -> Verdict:
        """Know nothing about anything."""
        return Verdict(fault=Fault.PERMANENT, outcome=Outcome.UNKNOWN, connection=Disposition.DISCARD)


def listen(event: Event) -> None:
    """Observe as a function."""
    assert_type(event.name, str)


def is_mine(failure: Failure) -> bool:
    """Match one kind of failure."""
    return failure.phase is Phase.EXECUTE and "XX001" in failure.sqlstates


def configured() -> ResilientPool:
    """Make a pool with everything that can be plugged in."""
    observers: list[Observer] = [listen, StructlogObserver()]
    own: Classifier = Everything()
    ruled = PostgresClassifier().with_rule(is_mine, Verdict(fault=Fault.CONTENTION, outcome=Outcome.ROLLED_BACK))
    return ResilientPool(
        DSN,
        min_size=1,
        max_size=20,
        classifier=ruled or own,
        backoff=BackoffPolicy(wait=backoff.fibo, jitter=None, max_attempts=3),
        reconnect=BackoffPolicy(base=0.25, max_value=1.0, max_attempts=None, max_elapsed=60.0),
        retry_budget=RetryBudget(),
        deadline=30.0,
        observers=observers,
        pure_functions=("shop.total",),
        retry_unknown=False,
        session_reset="background",
    )


async def one_shot_calls(pool: ResilientPool) -> None:
    """Every call of the pool, with what it returns."""
    assert_type(await pool.fetch("SELECT 1"), list[asyncpg.Record])
    assert_type(await pool.fetch("SELECT $1", 1, timeout=1.0, idempotent=True, deadline=5.0), list[asyncpg.Record])
    assert_type(await pool.fetchrow("SELECT 1"), asyncpg.Record | None)
    number: int = await pool.fetchval("SELECT 1", column=0)
    assert number
    assert_type(await pool.fetchmany("SELECT $1::int", [(1,), (2,)]), list[asyncpg.Record])
    assert_type(await pool.execute("DELETE FROM basket", idempotent=True), str)
    await pool.executemany("INSERT INTO basket VALUES ($1, $2)", [(1, "a"), (2, "b")])
    assert_type(await pool.copy_records_to_table("basket", records=[(1, "a")], columns=["id", "what"]), str)
    assert_type(await pool.copy_from_query("SELECT 1", output="one.csv", format="csv", header=True), str)
    assert_type(await pool.copy_from_table("basket", output="basket.csv"), str)
    assert_type(await pool.copy_to_table("basket", source="basket.csv"), str)


async def leases(pool: ResilientPool) -> None:
    """Acquire in both ways."""
    async with pool.acquire(timeout=2.0) as connection:
        assert_type(connection, ResilientConnection)
        async with connection.transaction(isolation="serializable"):
            assert_type(await connection.execute("DELETE FROM basket"), str)
        statement = await connection.prepare("SELECT 1")
        assert await statement.fetchval() == 1
    connection = await pool.acquire()
    await pool.release(connection)


async def life(_: object) -> AsyncIterator[ResilientPool]:
    """Open, look, close."""
    async with create_pool(DSN, max_size=5) as pool:
        yield pool
        stats = pool.stats()
        assert_type(stats, PoolStats)
        assert_type(stats.size, int)
        assert_type(stats.retries.get(Fault.STALE), int | None)
    pool = await create_pool(DSN)
    assert_type(pool, ResilientPool)
    await pool.expire_connections()
    await pool.close()
    pool.terminate()


async def failures(pool: ResilientPool) -> None:
    """Tell what went wrong."""
    try:
        await pool.execute("INSERT INTO payment VALUES (1)")
    except OutcomeUnknownError as error:
        assert_type(error.operation, str)
        assert_type(error.xid, int | None)
    except (ResilientPoolError, asyncpg.PostgresError, OSError) as error:
        assert resilient_pool.__version__, error


async def migrations() -> None:
    """Run each kind of migration, with what comes of it."""

    async def function() -> int:
        return 1

    result = await run_migration(["alembic", "upgrade", "head"], dsn=DSN, backoff=BackoffPolicy(), deadline=200.0)
    assert_type(result, MigrationResult)
    assert_type(result.exit_code, int | None)
    assert_type(result.output, tuple[str, ...])
    await run_migration("alembic upgrade head", lock=None, on_line=print, observers=[listen])
    assert_type((await run_migration(Path("migrations"))).applied, tuple[str, ...])
    await run_migration(lambda: None, lock="another", stop_within=5.0, timeout=3.0)
    try:
        await run_migration(function, deadline=None)
    except MigrationFailedError as error:
        assert_type(error.exit_code, int | None)
        assert_type(error.waited, float)
    except MigrationLockedError as error:
        assert_type(error.holder, str)
