"""What the driver keeps for the statements of a connection that is lost."""

from __future__ import annotations

import asyncio

import asyncpg

from resilient_pool import ResilientPool
from resilient_pool.pooling.driver import DriverConnection


def statement_timers(loop: asyncio.AbstractEventLoop) -> int:
    """Count the driver's timers that end a statement's time in its cache."""
    return sum("_on_entry_expired" in repr(handle) for handle in loop._scheduled if not handle.cancelled())


async def test_a_statement_whose_connection_was_lost_as_it_was_prepared_is_not_kept(dsn, proxy):
    """The driver puts it into its cache after it has emptied that, with a timer of five minutes that holds the connection."""
    loop = asyncio.get_running_loop()
    async with ResilientPool(proxy.dsn(dsn), ssl=False) as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            inside = connection._con
            statement = await inside.prepare("SELECT 2")
            proxy.rst()
            async with asyncio.timeout(10):
                while not inside.is_closed():
                    await asyncio.sleep(0)
            inside._stmt_cache.put(("SELECT 2", None, False), statement._state)
            assert statement_timers(loop) == 1
        async with asyncio.timeout(10):
            while statement_timers(loop):
                await asyncio.sleep(0.02)


async def test_a_connection_that_only_counts_as_closed_is_let_go_of_when_it_is_dropped(dsn):
    """Its driver waits for the socket's end, which may never come: no timer keeps its statements, its listeners are called."""
    loop = asyncio.get_running_loop()
    connection = await asyncpg.connect(dsn)
    driver, heard = DriverConnection(connection), []
    assert await connection.fetchval("SELECT $1::int", 1) == 1
    connection.add_termination_listener(heard.append)
    goodbye = asyncio.create_task(connection._protocol.close(10))
    await asyncio.sleep(0)
    assert connection.is_closed()
    assert statement_timers(loop) == 1
    driver.terminate()
    assert statement_timers(loop) == 0
    await goodbye
    assert heard == [connection]
    driver.terminate()
