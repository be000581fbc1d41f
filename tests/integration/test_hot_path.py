"""What a call on a healthy pool must not do: create a task, make a second round trip, or have imported a logger."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import ResilientPool
from resilient_pool.testing import FaultProxy

CALLS = 100
READ = "SELECT $1::int AS number"
WRITE = "INSERT INTO hot_path VALUES ($1)"


async def read(pool, number):
    await pool.fetch(READ, number)


async def write(pool, number):
    await pool.execute(WRITE, number)


async def lease(pool, number):
    async with pool.acquire() as connection:
        await connection.fetch(READ, number)
        await connection.execute(WRITE, number)


async def transact(pool, number):
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.fetch(READ, number)
            await connection.execute(WRITE, number)


@pytest.mark.parametrize("use", [read, write, lease, transact])
async def test_happy_uses_create_no_task(dsn, use):
    """A hundred of them on a warm pool are done in the caller's own task."""
    created = []

    def factory(loop, coroutine, **options):
        created.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    async with ResilientPool(dsn) as pool:
        await pool.execute("CREATE TABLE IF NOT EXISTS hot_path (number int)")
        await use(pool, 0)
        await eventually(lambda: pool.get_idle_size() == pool.get_size() and not pool._maintenance._background)
        loop.set_task_factory(factory)
        try:
            for number in range(CALLS):
                await use(pool, number)
        finally:
            loop.set_task_factory(None)
        await pool.execute("DROP TABLE hot_path")
    assert created == []


async def test_reads_that_only_wait_for_their_turn_are_not_remembered(dsn, monkeypatch):
    """A hundred callers on one connection are served without anything kept that only another attempt would need."""
    remembered = []
    async with ResilientPool(dsn, max_size=1) as pool:
        await pool.fetch(READ, 0)
        before = pool.stats().waits
        monkeypatch.setattr(pool._retry_strategy, "new_execution", lambda *_, **__: remembered.append(1))
        await asyncio.gather(*(pool.fetch(READ, number) for number in range(CALLS)))
        assert (remembered, pool.stats().waits - before) == ([], CALLS - 1)


async def test_happy_reads_make_no_second_round_trip(dsn, proxy):
    """The server answers a pool's reads with exactly as many bytes as a bare connection's: it was asked nothing else."""
    bare = await answered(proxy, await asyncpg.connect(proxy.dsn(dsn)))
    assert await answered(proxy, await ResilientPool(proxy.dsn(dsn))) == bare
    assert proxy.accepted == 2


async def answered(proxy: FaultProxy, asked: asyncpg.Connection | ResilientPool) -> int:
    """Count the bytes of the answers to a hundred reads. The names of statements, which differ, are only in the requests."""
    await asked.fetch(READ, 0)
    before = passed(proxy)
    for number in range(CALLS):
        await asked.fetch(READ, number)
    await asked.close()  # whatever is done in the background is done before this returns
    return passed(proxy) - before


def passed(proxy: FaultProxy) -> int:
    """Tell the bytes passed to clients, when the proxy's thread has counted what it has just written."""
    proxy.restore()  # there is nothing to restore, but it waits for that thread
    return proxy.bytes_to_client


def test_the_import_leaves_the_logger_out():
    """An application that does not log with structlog does not pay for importing it, nor for the testing tools."""
    program = (
        "import sys, resilient_pool; print([name for name in {'structlog', 'resilient_pool.testing'} & {*sys.modules}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
