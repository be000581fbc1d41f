"""Who uses a pool alone gets the same connection again, with the tables that are temporary in its session."""

from __future__ import annotations

import time

import pytest

from resilient_pool.pooling import acquire

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@pytest.mark.parametrize("session_reset", ["auto", "background", "on_release", "off"])
@pytest.mark.parametrize("min_size", [0, 3])
@both_loops
async def test_a_temporary_table_is_seen_by_the_next_call(make_pool, monkeypatch, session_reset, min_size):
    """As with asyncpg's pool: one call makes it, the next fills it, the next reads it; leases meet it as well."""
    monkeypatch.setattr(acquire, "_PROMPT", 10.0)  # a busy machine may take longer for a reset than a caller waits
    pool = await make_pool(session_reset=session_reset, min_size=min_size, max_size=5)
    for _ in range(3):
        await pool.execute("CREATE TEMP TABLE passing (id int)")
        await pool.execute("INSERT INTO passing VALUES (1)")
        assert await pool.fetchval("SELECT count(*) FROM passing") == 1
        async with pool.acquire() as connection:
            await connection.execute("INSERT INTO passing VALUES (2)")
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM passing") == 2
        await pool.execute("DROP TABLE passing")
    assert pool.get_size() == max(min_size, 1)


async def test_a_reset_that_hangs_holds_up_nobody_for_long(make_pool):
    """It is waited for as long as a round trip may take, and then another connection is used."""

    async def reset(connection):
        await connection.execute("SELECT pg_sleep(3)")

    pool = await make_pool(reset=reset)
    await pool.execute("SET work_mem = '4MB'")
    began = time.monotonic()
    assert await pool.fetchval("SELECT 1") == 1
    assert time.monotonic() - began < 2.5
    assert pool.get_size() == 2
    pool.terminate()


async def test_no_reset_is_sent_after_a_single_change_of_a_table(make_pool):
    """It leaves the session as it was, so the next call need not wait for one."""
    pool = await make_pool()
    await pool.execute("CREATE TEMP TABLE kept (id int)")
    for sql in ("INSERT INTO kept VALUES (1)", "UPDATE kept SET id = 2", "DELETE FROM kept"):
        await pool.execute(sql)
    await pool.execute("SET work_mem = '4MB'")
    await pool.fetchval("SELECT 1")
    assert pool.stats().resets == 2  # after CREATE and SET
