"""A time limit ends a COPY into a table, also while the driver waits for what its own limit does not bound."""

from __future__ import annotations

import asyncio
import io
import time

import pytest

from resilient_pool import ResilientPool

ROWS = [(number, "x" * 1000) for number in range(30_000)]
TEXT = b"1\tx\n" * 3_000_000
LIMIT = 0.3


async def endless():
    """Records that come to no end."""
    yield ROWS[0]
    await asyncio.Event().wait()


WAYS = {
    "records": lambda where, **limit: where.copy_records_to_table("copied", records=ROWS, **limit),
    "asynchronous records": lambda where, **limit: where.copy_records_to_table("copied", records=endless(), **limit),
    "file": lambda where, **limit: where.copy_to_table("copied", source=io.BytesIO(TEXT), **limit),
    "executemany": lambda where, **limit: where.executemany("INSERT INTO copied VALUES ($1, $2)", ROWS, **limit),
}


@pytest.fixture
async def dsn(postgres, proxy):
    """A way to a server with a table, and through a proxy."""
    async with postgres.admin() as admin:
        await admin.execute("DROP TABLE IF EXISTS copied; CREATE TABLE copied (i int, t text)")
    return proxy.dsn(postgres.dsn())


@pytest.mark.parametrize("limited", ["timeout", "command_timeout"])
@pytest.mark.parametrize("where", ["pool", "fresh lease", "used lease"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_copy_ends_in_time_when_the_server_reads_no_more(dsn, proxy, way, where, limited):
    """Its write buffer is full then, and the driver waits until it may write."""
    command_timeout, limit = (LIMIT, {}) if limited == "command_timeout" else (None, {"timeout": LIMIT})
    async with ResilientPool(dsn, max_size=1, reset_timeout=0.2, command_timeout=command_timeout) as pool:
        lease = await pool.acquire()
        if where == "pool":
            await pool.release(lease)
            while not pool.get_idle_size():
                await asyncio.sleep(0)
        elif where == "used lease":
            await lease.fetchval("SELECT 1")
        proxy.blackhole()
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(WAYS[way](pool if where == "pool" else lease, **limit), 10)
        assert time.monotonic() - started < 5
        await pool.release(lease)
        proxy.restore()
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_copy_whose_records_come_to_no_end_is_ended_in_time(dsn):
    """The server waits for the next record as the driver does, and answers all the while."""
    async with ResilientPool(dsn, max_size=1) as pool:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(WAYS["asynchronous records"](pool, timeout=LIMIT), 10)
        assert await pool.fetchval("SELECT count(*) FROM copied") == 0
