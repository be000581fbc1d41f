"""A user's program. It is never run: it only has to type-check, and each `assert_type` is a promise."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
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
    Gap,
    GapReason,
    Instrument,
    Listener,
    MigrationFailedError,
    MigrationLockedError,
    MigrationResult,
    Notification,
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
    connect,
    create_pool,
    profiles,
    run_migration,
)
from resilient_pool.config.arguments import ProfileArguments
from resilient_pool.contrib.asgi import Answer, ASGIApp, Readiness, WebPool, header_budget
from resilient_pool.contrib.aws import RdsToken, SecretsManager
from resilient_pool.contrib.opentelemetry import PoolTelemetry
from resilient_pool.contrib.prometheus import PoolCollector
from resilient_pool.execution.transaction import Attempt, Isolation, RetriedTransaction, TransactionOptions
from resilient_pool.testing import End, Point, Refusal, ScriptedServer

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
        commit_log="public.commit_log",
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


async def writes_of_all_sorts(pool: ResilientPool) -> None:
    """Say of a write what may be done with it when its answer is lost."""
    assert_type(await pool.execute("DELETE FROM basket", exactly_once=True), str)
    assert_type(await pool.fetch("INSERT INTO basket VALUES (1) RETURNING id", exactly_once=True), list[asyncpg.Record])
    row = await pool.fetchrow("INSERT INTO basket VALUES (1) RETURNING id", exactly_once=True, deadline=5.0)
    assert_type(row, asyncpg.Record | None)
    number: int = await pool.fetchval("INSERT INTO basket VALUES (1) RETURNING id", exactly_once=True)
    assert_type(await pool.fetch("SELECT reserve($1)", number, idempotent=True), list[asyncpg.Record])
    await pool.executemany("DELETE FROM basket WHERE id = $1", [(1,), (2,)], idempotent=True)
    await pool.copy_records_to_table("basket", records=[(1, "a")], idempotent=True)
    await pool.execute("DELETE FROM basket", exactly_once="yes")  # type: ignore[arg-type]


async def transactions(pool: ResilientPool) -> str | None:
    """Repeat a block as a whole, in both forms."""
    async for attempt in pool.transaction():
        assert_type(attempt, Attempt)
        assert_type(attempt.number, int)
        async with attempt as connection:
            assert_type(connection, ResilientConnection)
            assert_type(await connection.execute("DELETE FROM basket"), str)
            async with connection.transaction():
                await connection.executemany("INSERT INTO basket VALUES ($1)", [(1,)])
    isolation: Isolation = "serializable"
    retried = pool.transaction(isolation=isolation, readonly=True, deferrable=True, resolve_commit=False, deadline=10.0)
    assert_type(retried, RetriedTransaction)
    pool.transaction(isolation="chaos")  # type: ignore[arg-type]
    async for attempt in retried:
        async with attempt as connection:
            return str(await connection.fetchval("SELECT 1"))
    return None


async def transfer(connection: ResilientConnection, amount: int, *accounts: str) -> bool:
    """Do something in a transaction."""
    for account in accounts:
        await connection.execute("UPDATE account SET balance = balance + $1 WHERE name = $2", amount, account)
    return True


async def callbacks(pool: ResilientPool) -> None:
    """Repeat a function as a whole, and get what it returns."""
    assert_type(await pool.run_in_transaction(transfer, 5, "a", "b"), bool)
    options = TransactionOptions(isolation="repeatable_read", readonly=False, resolve_commit=True, deadline=None)
    assert_type(await pool.run_in_transaction(transfer, 5, "a", **options), bool)
    await pool.run_in_transaction(transfer, 5, "a", patience=1.0)  # type: ignore[call-arg]


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
        assert_type(error.__cause__, BaseException | None)
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


async def notifications(pool: ResilientPool) -> None:
    """Listen, and look for what was missed."""
    async with pool.listen("jobs", "more", queue_size=100, ping_after=10.0, deadline=5.0) as listener:
        assert_type(listener, Listener)
        async for item in listener:
            assert_type(item, Notification | Gap)
            if isinstance(item, Gap):
                assert_type(item.reason, GapReason)
                assert_type(item.missed, int | None)
            else:
                assert_type(item.payload, str)


async def one_connection() -> None:
    """Open one connection in both ways, with what AWS gives for a password."""
    token = RdsToken("shop.abc.eu-central-1.rds.amazonaws.com", user="shop")
    connection = await connect(DSN, password=token, deadline=5.0)
    assert_type(await connection.fetch("SELECT 1"), list[asyncpg.Record])
    await connection.close()
    async with connect(credentials=SecretsManager("prod/shop")) as other:
        assert_type(await other.fetchrow("SELECT 1"), asyncpg.Record | None)


async def answer_of_an_invocation(pool: ResilientPool) -> int:
    """A return within is the function's end: nothing is swallowed."""
    async with pool.invocation(deadline=3.0):
        return 1


async def function_runtime() -> None:
    """Live with a database that sleeps, in a process that is frozen."""
    ResilientPool(DSN, **profiles.AURORA_SERVERLESS)
    ResilientPool(DSN, **profiles.NEON)
    ResilientPool(DSN, **(profiles.NEON_POOLED | {"timeout": 20.0, "max_size": 5}))
    ResilientPool(DSN, **profiles.NEON_POOLED, timeout=20.0)  # type: ignore[misc]
    ResilientPool(DSN, **profiles.NEON, observers=[StructlogObserver()], command_timeout=5.0)
    assert_type(profiles.suggest(DSN), str | None)
    assert_type(profiles.EXPLAINED["NEON"].choices["timeout"].reason, str)
    assert_type(profiles.EXPLAINED["NEON"].arguments, ProfileArguments)
    create_pool(DSN, **(profiles.AURORA_SERVERLESS | profiles.LAMBDA | {"max_size": 2}))
    async with ResilientPool(DSN, may_pause=True, fail_fast=True) as pool:
        async with pool.invocation(deadline=3.0):
            assert_type(await pool.fetch("SELECT 1", fail_fast=False), list[asyncpg.Record])
        async with pool.invocation(), pool.acquire(fail_fast=True) as connection:
            await connection.execute("SELECT 1", fail_fast=None)
        await pool.run_in_transaction(with_connection, fail_fast=True)
        assert_type(pool.stats().circuit_open, bool)
        assert_type(pool.stats().connect_failures, int)


async def with_connection(connection: ResilientConnection) -> None:
    """Do something in a transaction."""
    await connection.execute("SELECT 1")


async def tests_with_a_script() -> None:
    """Test against what a service says."""
    full = Refusal(
        at=Point.QUERY, sqlstate="58000", message="checkout timeout", then=End.READY, matching="INSERT", times=2
    )
    with ScriptedServer(full, host="127.0.0.1", port=5432) as server:
        assert_type(server, ScriptedServer)
        assert_type(server.dsn(DSN), str)
        assert_type(server.sent, tuple[Refusal, ...])
        assert_type(server.statements, tuple[str, ...])
        assert_type(server.attempts, int)
    async with ScriptedServer(login="scram", parameters={"server_version": "15.0"}) as alone:
        assert_type(alone.dsn(), str)


class Uses(Instrument):
    """Measure uses as an application would."""

    def __call__(self, event: Event, /) -> None:
        """Take note of an event."""

    def attach(self, stats: Callable[[], PoolStats]) -> None:
        """Read the statistics."""
        assert_type(stats().wait_histogram, Mapping[float, int])

    def enter_background(self) -> None:
        """Set nothing."""

    def used(self, seconds: float) -> None:
        """Take note of a use."""


def observability() -> None:
    """Have a pool seen by everything that can see one."""
    telemetry = PoolTelemetry(use_time=False)
    pool = ResilientPool(DSN, observers=[Uses(), telemetry.observer("orders"), StructlogObserver()])
    PoolCollector({"orders": pool})


async def web(application: ASGIApp) -> None:
    """Serve requests."""
    database = WebPool(
        lambda watch: ResilientPool(DSN, observers=[watch]), budget=header_budget("X-Ms", unit=0.001), page_path="/pool"
    )
    assert_type(database.middleware(application), ASGIApp)
    assert_type(database.readiness(), Readiness)
    async with database.lifespan(application):
        await database.pool.execute("SELECT 1")
    answer = database.answer_to(TimeoutError(), "GET")
    assert_type(answer, Answer | None)
