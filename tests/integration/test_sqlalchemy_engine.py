"""SQLAlchemy over a pool's leases: it closes what it borrows, and each time the place is free again."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from resilient_pool import ResilientPool

CHECKOUTS = 1000


@pytest.mark.parametrize("workers", [1, 20])
async def test_a_thousand_checkouts_find_a_place_each(postgres, workers):
    """One after the other, and more at once than there are places."""
    async with ResilientPool(postgres.dsn(), max_size=5, deadline=30) as pool:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=pool.acquire, poolclass=NullPool)

        async def work():
            answers = []
            for number in range(CHECKOUTS // workers):
                async with engine.connect() as connection:
                    answers.append((await connection.execute(text("SELECT CAST(:x AS int)"), {"x": number})).scalar())
            return answers

        async with asyncio.timeout(150):
            answers = await asyncio.gather(*(work() for _ in range(workers)))
        assert answers == [list(range(CHECKOUTS // workers))] * workers
        assert pool.get_size() <= 5
        await engine.dispose()
        async with asyncio.timeout(5):
            await pool.close()


async def test_an_engines_first_statement_meets_a_lost_connection(postgres):
    """Its codecs, and the transaction that it begins by itself, are repaired."""
    async with ResilientPool(postgres.dsn(), max_size=2) as pool:
        engine = create_async_engine("postgresql+asyncpg://", async_creator=pool.acquire, poolclass=NullPool)
        async with engine.connect():
            pass  # the engine asks its first connection what server it is
        for _ in range(3):
            async with engine.connect() as connection:
                raw = (await connection.get_raw_connection()).driver_connection
                await postgres.terminate_backends(f"pid = {raw.get_server_pid()}")
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
        await engine.dispose()


async def test_an_engine_that_keeps_leases_replaces_lost_ones_quietly(postgres, caplog):
    """Its own pool closes each lost lease, which is no error, and acquires another."""
    async with ResilientPool(postgres.dsn(), max_size=2) as pool:
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=pool.acquire, pool_size=2, max_overflow=0, pool_pre_ping=True
        )
        for number in range(3):
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT CAST(:x AS int)"), {"x": number})).scalar() == number
            await postgres.terminate_backends()
        await engine.dispose()
        assert (pool.stats().in_use, caplog.records) == (0, [])
