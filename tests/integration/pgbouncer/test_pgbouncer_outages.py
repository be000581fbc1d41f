"""PgBouncer paused, restarted, full, or without a server: calls wait, are repeated, or fail with what is known."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest
from bouncer import PgBouncer
from under_load import Load

from resilient_pool import AcquireTimeoutError, ResilientPool

pytestmark = pytest.mark.needs("pgbouncer")


@pytest.fixture
async def table(behind):
    async with behind.admin() as admin:
        await admin.execute("DROP TABLE IF EXISTS item; CREATE TABLE item (id int)")
    return "item"


async def test_a_restart_under_load_loses_and_doubles_nothing(pooled, behind, table):
    """Calls wait until it is back."""
    async with pooled() as (bouncer, pool), Load(pool) as load:
        for mode in ("immediate", "kill"):
            await bouncer.restart(mode)
            await load.progress()
    await load.assert_ledger_holds(behind)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_server_behind_under_load_loses_and_doubles_nothing(pooled, behind, table, mode):
    """PgBouncer says that its server is away, or just hangs up."""
    async with pooled() as (_, pool), Load(pool) as load:
        await behind.restart(mode)
        await load.progress()
    await load.assert_ledger_holds(behind)


async def test_pause_and_resume_under_load_are_only_a_wait(pooled, behind, table):
    """Nothing fails, nothing is repeated, and nothing is of unknown outcome."""
    async with pooled() as (bouncer, pool), Load(pool) as load:
        await bouncer.console("PAUSE")
        await load.standstill()
        await bouncer.console("RESUME")
        await load.progress()
    assert load.unknown == {}
    assert pool.stats().retries_total == 0
    await load.assert_ledger_holds(behind)


async def test_kill_under_load_is_waited_for_until_resume(pooled, behind, table):
    """KILL drops clients and servers at once, and lets no client in until RESUME."""
    async with pooled() as (bouncer, pool), Load(pool) as load:
        await bouncer.console("KILL postgres")
        await asyncio.sleep(0.3)
        await bouncer.console("RESUME postgres")
        await load.progress()
    await load.assert_ledger_holds(behind)


async def test_reconnect_and_reload_under_load_are_not_noticed(pooled, behind, table):
    """RECONNECT closes each server session when it is released."""
    async with pooled() as (bouncer, pool), Load(pool) as load:
        for command in ("RECONNECT", "RELOAD", "RECONNECT postgres"):
            await bouncer.console(command)
            await load.progress()
    assert load.unknown == {}
    assert pool.stats().retries_total == 0
    await load.assert_ledger_holds(behind)


async def test_a_call_that_is_queued_for_too_long_by_it_is_run_again(pooled, behind):
    """`query_wait_timeout`: it was not executed. Afterwards the client is gone, which is a connection of the pool's."""
    settings = {"default_pool_size": 1, "query_wait_timeout": 1}
    async with pooled(settings) as (_, pool):
        await pool.fetchval("SELECT 1")
        async with behind.admin() as admin:
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("SELECT 1")
                queued = asyncio.create_task(pool.fetchval("SELECT 42"))
                async with asyncio.timeout(20):
                    while not pool.stats().retries_total:
                        await asyncio.sleep(0.05)
            assert await queued == 42
            assert await admin.fetchval("SELECT 1") == 1


async def test_the_client_limit_is_shared_by_those_connections_that_are_let_in(behind, version):
    """`no more connections allowed`: the callers share what there is, and none fails."""
    async with PgBouncer(behind, version, max_client_conn=4) as bouncer:
        async with ResilientPool(bouncer.dsn(), max_size=10, deadline=20, ssl=False) as pool:
            answers = await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(200)))
            assert answers == list(range(200))
            assert pool.stats().size <= 4


async def test_a_caller_that_is_never_let_in_is_told_why(behind, version):
    """Its deadline ends with PgBouncer's own words."""
    async with PgBouncer(behind, version, max_client_conn=1) as bouncer:
        held = await asyncpg.connect(bouncer.dsn(), statement_cache_size=0, ssl=False)
        async with ResilientPool(bouncer.dsn(), deadline=1.0, ssl=False) as pool:
            with pytest.raises((asyncpg.PostgresError, AcquireTimeoutError)) as caught:
                await pool.fetchval("SELECT 1")
        assert "no more connections allowed" in f"{caught.value} {caught.value.__cause__}"
        held.terminate()


async def test_a_server_that_is_not_there_is_waited_for(pooled, behind):
    """PgBouncer accepts its clients all the same, and caches what its server said."""
    async with pooled() as (_, pool):
        await behind.stop("fast")
        try:
            waiting = asyncio.create_task(pool.fetchval("SELECT 42"))
            await asyncio.sleep(1.5)
            assert not waiting.done()
        finally:
            await behind.start()
        assert await waiting == 42


async def test_a_wrong_database_is_refused_at_once(behind, version):
    """No wait cures it."""
    async with PgBouncer(behind, version) as bouncer:
        dsn = bouncer.dsn().replace("/postgres", "/no_such_database")
        async with asyncio.timeout(10):
            with pytest.raises(asyncpg.PostgresError, match=r"no such database|authentication failed"):
                async with ResilientPool(dsn, deadline=30.0, ssl=False) as pool:
                    await pool.fetchval("SELECT 1")


async def test_closing_the_pool_leaves_no_client_behind(pooled):
    """Also while it is paused."""
    async with pooled(reset_timeout=1.0) as (bouncer, pool):
        await asyncio.gather(*(pool.fetchval("SELECT pg_sleep(0.05)") for _ in range(5)))
        await bouncer.console("PAUSE")
        waiting = asyncio.create_task(pool.fetchval("SELECT 1"))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            await pool.close()
        await bouncer.console("RESUME")
        async with asyncio.timeout(10):
            while [row for row in await bouncer.console("SHOW CLIENTS") if row["database"] == "postgres"]:
                await asyncio.sleep(0.05)
