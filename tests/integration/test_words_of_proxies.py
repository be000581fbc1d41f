"""What proxies and poolers say instead of a server, and what an application's `init` meets while connecting."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

PASSING = {
    "a waking Neon compute": ("XX000", "Couldn't connect to compute node"),
    "what Neon's compute says": ("XX000", "the database system is starting up"),
    "a crowd at Neon": (
        "XX000",
        "Failed to acquire permit to connect to the database. Too many database connection attempts are currently ongoing.",
    ),
    "a full Supavisor": ("XX000", "(EMAXCONNSESSION) max clients reached in session mode"),
    "PgDog without a server": ("58000", 'connection pool for user "app" and database "shop" is down'),
    "a server out of memory": ("53200", "out of memory"),
    "a rate limit": ("53400", "Unable to accept connection, rate exceeded."),
}
FINAL = {
    "a wrong password at Neon": ("XX000", "password authentication failed for user 'app'"),
    "wrong passwords at Supavisor": (
        "XX000",
        "(ECIRCUITBREAKER) too many authentication failures, new connections are temporarily blocked",
    ),
    "PgCat without such a pool": ("58000", "No pool configured for database"),
}


@pytest.mark.parametrize(("sqlstate", "message"), PASSING.values(), ids=PASSING)
async def test_a_refusal_that_passes_is_waited_for(postgres: EmbeddedPostgres, proxy: FaultProxy, sqlstate, message):
    """Whatever its code, it is not final, and the call is served when it is over."""
    proxy.answer_with_error(sqlstate, message)
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, deadline=20.0) as pool:
        call = asyncio.ensure_future(pool.fetchval("SELECT 42"))
        async with asyncio.timeout(10):
            while not pool.stats().connect_failures:
                await asyncio.sleep(0.01)
        proxy.restore()
        assert await call == 42


@pytest.mark.parametrize(("sqlstate", "message"), FINAL.values(), ids=FINAL)
async def test_a_refusal_that_does_not_pass_is_final(postgres: EmbeddedPostgres, proxy: FaultProxy, sqlstate, message):
    """It is raised after one attempt."""
    proxy.answer_with_error(sqlstate, message)
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, deadline=20.0) as pool:
        with pytest.raises(asyncpg.PostgresError):
            await pool.fetchval("SELECT 42")
        assert pool.stats().connect_failures == 1


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "53200"])
async def test_an_init_that_meets_a_conflict_is_run_again(postgres: EmbeddedPostgres, sqlstate):
    """On a new connection: nothing of the application's was sent on that one."""
    runs = 0

    async def init(connection):
        nonlocal runs
        runs += 1
        if runs == 1:
            await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$")

    async with ResilientPool(postgres.dsn(), init=init, deadline=10.0) as pool:
        assert await pool.fetchval("SELECT 42") == 42
    assert runs == 2


@pytest.mark.parametrize("text", ["SELECT 1/0", "SELECT * FROM no_such_table"])
async def test_an_init_that_is_wrong_is_final(postgres: EmbeddedPostgres, text):
    """Its error is raised after one attempt."""
    runs = 0

    async def init(connection):
        nonlocal runs
        runs += 1
        await connection.execute(text)

    async with ResilientPool(postgres.dsn(), init=init, deadline=10.0) as pool:
        with pytest.raises(asyncpg.PostgresError):
            await pool.fetchval("SELECT 42")
    assert runs == 1


async def test_a_limit_of_the_statements_own_is_met_once(postgres: EmbeddedPostgres):
    """A sort that exceeds temp_file_limit exceeds it again."""
    async with ResilientPool(
        postgres.dsn(), server_settings={"temp_file_limit": "1MB", "work_mem": "64kB"}, deadline=10.0
    ) as pool:
        with pytest.raises(asyncpg.ConfigurationLimitExceededError):
            await pool.fetch("SELECT g, repeat('y', 100) AS y FROM generate_series(1, 60000) g ORDER BY y, g DESC")
        assert not any(pool.stats().retries.values())


async def test_an_init_that_meets_a_conflict_is_no_outage(postgres: EmbeddedPostgres, caplog):
    """Connections that work go on serving, also those who do not wait, and the log does not call the server away."""
    conflicting = False

    async def init(connection):
        if conflicting:
            await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$")

    async with ResilientPool(postgres.dsn(), init=init, max_size=4, deadline=10.0) as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            conflicting = True
            waiting = asyncio.ensure_future(pool.fetchval("SELECT 42"))
            async with asyncio.timeout(10):
                while not pool.stats().connect_failures:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            assert await waiting == 42
            assert await pool.fetchval("SELECT 42", fail_fast=True) == 42
        conflicting = False
    assert "is away" not in caplog.text
