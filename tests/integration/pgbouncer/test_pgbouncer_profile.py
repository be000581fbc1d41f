"""`profiles.PGBOUNCER`, on PgBouncer itself."""

from __future__ import annotations

import asyncio
import logging

import pytest

from resilient_pool import profiles

pytestmark = pytest.mark.needs("pgbouncer")


async def test_many_clients_share_few_sessions_without_a_word(pooled, behind, caplog):
    """No second client finds out what the profile says, nothing is reset, and no statement stays behind in a shared session."""
    arguments = profiles.PGBOUNCER | {"max_size": 20}
    async with pooled({"default_pool_size": 2}, **arguments) as (_, pool):

        async def work(number: int) -> int:
            async for attempt in pool.transaction():
                async with attempt as connection:
                    await connection.execute("SELECT $1::int", number)
            return await pool.fetchval("SELECT $1::int", number)

        async with asyncio.timeout(20):
            assert await asyncio.gather(*(work(number) for number in range(60))) == list(range(60))
            assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
        assert pool.stats().resets == 0
        async with behind.admin() as admin:
            sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            assert await admin.fetchval(sessions) <= 2 + 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
