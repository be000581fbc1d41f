"""What belongs to a session, through PgBouncer: kept in session mode, refused with the reason in transaction mode."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from bouncer import PgBouncer, numbers

from resilient_pool import ResilientPool, connect

pytestmark = pytest.mark.needs("pgbouncer")

MODES = {"known": {}, "with a statement cache": {"statement_cache_size": 100}}
LOCKED = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
LOCKED_HERE = f"{LOCKED} AND pid = pg_backend_pid()"
REFUSED = "a pooler in transaction mode gives this connection another session for every transaction"


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "sql", ["LISTEN news", "SELECT pg_advisory_lock(1)", "SET search_path TO tenant", "SELECT 1; SET work_mem = '8MB'"]
)
async def test_what_needs_a_session_is_refused_in_transaction_mode(pooled, behind, sql, arguments):
    """With the reason, and before it is sent: the next client of that session would have it."""
    async with pooled(**arguments) as (_, pool), behind.admin() as admin:
        async with pool.acquire() as connection:
            for _ in range(2):
                with pytest.raises(asyncpg.InterfaceError, match=REFUSED):
                    await connection.execute(sql)
            assert await connection.fetchval("SELECT 42") == 42
        assert await admin.fetchval(LOCKED) == 0
        assert (
            await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SET %' OR query ~ $1", sql)
            == 0
        )


async def test_a_listener_is_refused_in_transaction_mode(pooled):
    """It would never be called, or be another client's."""
    async with pooled() as (_, pool), pool.acquire() as connection:
        with pytest.raises(asyncpg.InterfaceError, match=f"LISTEN was not sent: {REFUSED}.*session mode"):
            await connection.add_listener("news", print)
        assert await connection.fetchval("SELECT 42") == 42


async def test_a_connection_of_its_own_is_refused_the_same(behind, version):
    """`connect()` has no session of its own there either."""
    async with PgBouncer(behind, version) as bouncer, connect(bouncer.dsn(), ssl=False) as connection:
        with pytest.raises(asyncpg.InterfaceError, match=REFUSED):
            await connection.add_listener("news", print)
        assert await connection.fetchval("SELECT 42") == 42


async def test_in_a_transaction_a_setting_serves_and_a_lock_of_the_session_does_not(pooled, behind):
    """SET has its effect until the transaction ends; a lock would outlive it, in a session that is another client's then."""
    async with pooled() as (_, pool), behind.admin() as admin:

        async def block(connection):
            await connection.execute("SET search_path TO tenant")
            await connection.execute("SET LOCAL work_mem = '8MB'")
            await connection.execute("SELECT pg_advisory_xact_lock(1)")
            return await connection.fetchval("SELECT current_setting('search_path') || current_setting('work_mem')")

        assert await pool.run_in_transaction(block) == "tenant8MB"
        with pytest.raises(asyncpg.InterfaceError, match="pg_advisory_xact_lock"):
            await pool.run_in_transaction(lambda connection: connection.execute("SELECT pg_advisory_lock(1)"))
        assert await admin.fetchval(LOCKED) == 0


async def test_settings_that_pgbouncer_follows_are_not_refused(pooled):
    """It gives them to each session that the client gets."""
    async with pooled() as (_, pool), pool.acquire() as connection:
        await connection.execute("SET TimeZone = 'Asia/Tokyo'")
        for _ in range(5):
            assert await connection.fetchval("SHOW TimeZone") == "Asia/Tokyo"


@pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)
async def test_a_session_is_kept_in_session_mode(pooled, behind, arguments):
    """Listeners are called, locks are held, settings stay, until the lease ends."""
    async with pooled({"pool_mode": "session"}, **arguments) as (_, pool), behind.admin() as admin:
        heard = asyncio.Queue()
        async with pool.acquire() as connection:

            def hear(*heard_of):
                heard.put_nowait(heard_of[-1])

            await connection.add_listener("news", hear)
            await connection.execute("SELECT pg_advisory_lock(1)")
            await connection.execute("SET search_path TO tenant")
            await admin.execute("NOTIFY news, 'read all about it'")
            assert await asyncio.wait_for(heard.get(), 10) == "read all about it"
            assert await connection.fetchval(LOCKED) == 1
            assert await connection.fetchval("SHOW search_path") == "tenant"
            await connection.remove_listener("news", hear)
        async with pool.acquire() as connection:
            assert await connection.fetchval(LOCKED) == 0
            assert await connection.fetchval("SHOW search_path") != "tenant"


@pytest.mark.parametrize("query", ["DISCARD ALL", ""], ids=["discards", "leaves"])
async def test_a_session_is_clean_for_the_next_client_whatever_pgbouncer_does_between(behind, version, query):
    """`server_reset_query` is run, in session mode, when a client leaves; without it the pool's own reset is all there is."""
    settings = {"pool_mode": "session", "default_pool_size": 2, "server_reset_query": query}
    async with PgBouncer(behind, version, **settings) as bouncer:
        for _ in range(3):
            async with ResilientPool(bouncer.dsn(), max_size=1, ssl=False) as pool:
                async with pool.acquire() as connection:
                    assert await connection.fetchval("SHOW search_path") != "tenant"
                    assert await connection.fetchval(LOCKED_HERE) == 0
                    assert await connection.fetchval("SELECT count(*) FROM pg_listening_channels()") == 0
                    await connection.execute("SET search_path TO tenant; SELECT pg_advisory_lock(1); LISTEN news")
                if not query:
                    assert (
                        await pool.fetchval("SELECT 42") == 42
                    )  # it waits for the reset, which the pool's end would not


async def test_session_mode_keeps_statements_prepared(pooled):
    """One session for each client was seen, so a query is one round trip."""
    async with pooled({"pool_mode": "session"}) as (_, pool):
        assert await pool.fetchval("SELECT $1::int", 1) == 1
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") > 0
        assert pool.stats().pooler is False


async def test_statements_that_pgbouncer_follows_may_be_kept_prepared(pooled, version):
    """From 1.21 on, where `max_prepared_statements` says so and the pool is told; none is missing in the session."""
    if numbers(version) < (1, 21):
        settings, arguments = {}, {}
    else:
        settings, arguments = {"max_prepared_statements": 10}, {"statement_cache_size": 100}
    async with pooled(settings, **arguments) as (_, pool):
        for _ in range(3):
            answers = await asyncio.gather(*(pool.fetchval(f"SELECT $1::int + {n}", n) for n in range(40)))
            assert answers == [n + n for n in range(40)]
        assert pool.stats().retries_total == 0
