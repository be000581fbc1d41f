"""The server's limits on idle and on long transactions: they come again, so the block is not run again and again."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

LIMITS = {
    "idle_in_transaction_session_timeout": ("25P03", 2),
    "transaction_timeout": ("25P04", 1),
}


@pytest.mark.parametrize(("setting", "sqlstate", "most"), [(name, *rest) for name, rest in LIMITS.items()])
async def test_a_block_that_outlasts_the_servers_limit_is_not_repeated(
    postgres: EmbeddedPostgres, setting, sqlstate, most
):
    """The driver keeps no word of a FATAL that it reads while the block sleeps; the error names the limit all the same."""
    runs = 0

    async def block(connection):
        nonlocal runs
        runs += 1
        await connection.execute("CREATE TEMP TABLE x (i int)")
        pid = connection.get_server_pid()
        async with postgres.admin() as admin, asyncio.timeout(10):
            while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        await connection.execute("SELECT 1")

    async with ResilientPool(postgres.dsn(), server_settings={setting: "200"}, deadline=20.0) as pool:
        with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError)) as raised:
            await pool.run_in_transaction(block)
    assert runs <= most
    note = next(note for note in raised.value.__notes__ if setting in note)
    assert sqlstate in note
    assert "0.2 s" in note


async def test_a_statement_that_outlasts_the_limit_is_not_repeated(postgres: EmbeddedPostgres):
    """The limit on a whole transaction, met in the middle of a statement, by itself and in a block."""
    runs = 0

    async def block(connection):
        nonlocal runs
        runs += 1
        await connection.execute("SELECT pg_sleep(5)")

    async with ResilientPool(postgres.dsn(), server_settings={"transaction_timeout": "200"}, deadline=20.0) as pool:
        with pytest.raises(asyncpg.PostgresError) as raised:
            await pool.run_in_transaction(block)
        assert "transaction_timeout" in " ".join(raised.value.__notes__)
        assert "25P04" in " ".join(raised.value.__notes__)
    assert runs == 1


async def test_a_block_that_was_lost_for_another_reason_is_repeated(postgres: EmbeddedPostgres, proxy: FaultProxy):
    """Below the limits a loss is a loss."""
    runs = 0

    async def block(connection):
        nonlocal runs
        runs += 1
        await connection.execute("CREATE TEMP TABLE x (i int)")
        if runs < 3:
            proxy.rst()
        await connection.execute("SELECT 1")

    settings = {"idle_in_transaction_session_timeout": "20000", "transaction_timeout": "30000"}
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, server_settings=settings, deadline=20.0) as pool:
        await pool.run_in_transaction(block)
    assert runs == 3
