"""Every public method, cancelled at random moments under load: afterwards each connection is there and clean, on the server too.

`RESILIENT_POOL_CANCELLATIONS` says how many calls are made on each event loop.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import sys

import pytest
import uvloop
from waiting import eventually

from resilient_pool import ResilientPool

CALLS = int(os.environ.get("RESILIENT_POOL_CANCELLATIONS", "1500"))
WORKERS, CONNECTIONS = 12, 4
SOON = (0.003, 0.03, 0.3)
"""Within how many seconds a call is cancelled, if it has not ended: most of them take some hundredths under this load."""
ROWS = [(number, "x" * 50) for number in range(20)]


def eager_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose tasks begin before `create_task` returns."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
if sys.version_info >= (3, 12):
    LOOPS["eager tasks"] = eager_loop


async def expire_now_and_then(pool):
    if random.random() < 0.1:
        await pool.expire_connections()


async def lease_of_everything(pool):
    async with pool.acquire() as connection:
        await connection.execute("SET work_mem = '8MB'")
        await connection.execute("SELECT pg_advisory_lock(1000 + floor(random() * 1000000)::int)")
        await connection.execute("SET ROLE pg_monitor")
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS mine (id int)")


async def lease_with_a_listener(pool):
    async with pool.acquire() as connection:
        await connection.add_listener("news", hear)
        try:
            await connection.execute("NOTIFY news")
        finally:
            if not connection.is_closed():
                await connection.remove_listener("news", hear)


def hear(*_):
    """Hear a notification."""


async def lease_with_a_transaction(pool):
    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("INSERT INTO cancelled VALUES (1, 'lease')")
            async with connection.transaction():
                await connection.execute("SET LOCAL work_mem = '9MB'; SELECT pg_advisory_xact_lock(1)")


async def lease_with_a_cursor(pool):
    async with pool.acquire() as connection, connection.transaction():
        async for _ in connection.cursor("SELECT generate_series(1, 30)", prefetch=5):
            pass


async def lease_with_a_statement(pool):
    async with pool.acquire() as connection:
        statement = await connection.prepare("SELECT $1::int")
        assert await statement.fetchval(7) == 7


async def lease_with_codecs(pool):
    async with pool.acquire() as connection:
        await connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
        await connection.reset_type_codec("json", schema="pg_catalog")
        await connection.reload_schema_state()


async def lease_by_hand(pool):
    connection = await pool.acquire(timeout=5)
    try:
        await connection.fetchval("SELECT 1")
        await connection.reset()
    finally:
        await pool.release(connection)


async def transaction_loop(pool):
    async for attempt in pool.transaction(isolation="repeatable_read"):
        async with attempt as connection:
            await connection.execute("INSERT INTO cancelled VALUES (2, 'loop')")
            await connection.execute("SET work_mem = '7MB'")


async def block(connection):
    await connection.execute("INSERT INTO cancelled VALUES (3, 'callback')")
    return await connection.fetch("SELECT pg_advisory_lock(1 + floor(random() * 1000000)::int)")


CALLS_OF_ALL_KINDS = [
    lambda pool: pool.fetch("SELECT generate_series(1, 500)"),
    lambda pool: pool.fetchrow("SELECT $1::int", 1),
    lambda pool: pool.fetchval("SELECT pg_sleep(0.003)"),
    lambda pool: pool.fetchmany("SELECT $1::int", [(number,) for number in range(20)]),
    lambda pool: pool.execute("INSERT INTO cancelled VALUES ($1, 'one')", 1),
    lambda pool: pool.execute("SET work_mem = '6MB'"),
    lambda pool: pool.execute("BEGIN; SELECT pg_sleep(0.002)"),
    lambda pool: pool.execute("INSERT INTO cancelled VALUES ($1, 'once')", 1, exactly_once=True),
    lambda pool: pool.executemany("INSERT INTO cancelled VALUES ($1, $2)", ROWS),
    lambda pool: pool.copy_records_to_table("cancelled", records=ROWS),
    lambda pool: pool.copy_to_table("cancelled", source=io.BytesIO(b"1\tcopied\n" * 1000)),
    lambda pool: pool.copy_from_query("SELECT generate_series(1, 3000)", output=io.BytesIO()),
    lambda pool: pool.copy_from_table("few", output=io.BytesIO()),
    lambda pool: pool.run_in_transaction(block),
    expire_now_and_then,
    lease_of_everything, lease_with_a_listener, lease_with_a_transaction, lease_with_a_cursor, lease_with_a_statement,
    lease_with_codecs, lease_by_hand, transaction_loop,
]  # fmt: skip

LEFT_IN_A_SESSION = """
    SELECT (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory') AS locks,
           (SELECT count(*) FROM pg_listening_channels()) AS channels,
           (SELECT count(*) FROM pg_settings WHERE source = 'session') AS settings,
           (SELECT count(*) FROM pg_cursors WHERE name <> '') AS cursors,
           (SELECT count(*) FROM pg_class WHERE relpersistence = 't' AND relname = 'mine'
                                            AND relnamespace = pg_my_temp_schema()) AS temporary,
           current_user = session_user AS own_role
"""
CLEAN = {"locks": 0, "channels": 0, "settings": 0, "cursors": 0, "own_role": True}


@pytest.mark.parametrize("loop_factory", LOOPS.values(), ids=LOOPS)
def test_nothing_is_left_after_calls_that_were_cancelled_at_random(loop_factory, postgres):
    """No connection is missing, no transaction is open, no lock is held; no listener, setting or role is left."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(cancel_at_random(postgres))


async def cancel_at_random(postgres):
    chance = random.Random(7)
    name = f"cancelled_{chance.getrandbits(32)}_{os.getpid()}"
    async with postgres.admin() as admin:
        await admin.execute(
            "DROP TABLE IF EXISTS cancelled, few;"
            "CREATE TABLE cancelled (id int, note text); CREATE TABLE few AS SELECT generate_series(1, 500)"
        )
    counts = {"ended": 0, "cancelled": 0}
    left = iter(range(CALLS))
    async with ResilientPool(
        postgres.dsn(), max_size=CONNECTIONS, deadline=30, server_settings={"application_name": name}
    ) as pool:

        async def work():
            for number in left:
                call = CALLS_OF_ALL_KINDS[number % len(CALLS_OF_ALL_KINDS)]
                task = asyncio.ensure_future(call(pool))
                await asyncio.wait([task], timeout=chance.random() * chance.choice(SOON))
                if not task.done():
                    task.cancel()
                try:
                    await task
                    counts["ended"] += 1
                except asyncio.CancelledError:
                    counts["cancelled"] += 1

        try:
            async with asyncio.timeout(60 + CALLS / 10):
                await asyncio.gather(*(work() for _ in range(WORKERS)))
                await clean(pool, postgres, name)
        except BaseException:
            pool.terminate()
            raise
    assert counts["cancelled"] > CALLS / 5, counts
    assert counts["ended"] > CALLS / 10, counts
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def clean(pool, postgres, name):
    """Look into every session of the pool, and at them from outside."""
    leases = [await pool.acquire() for _ in range(CONNECTIONS)]
    for lease in leases:
        assert not lease.is_in_transaction()
        found = dict(await lease.fetchrow(LEFT_IN_A_SESSION))
        assert found.pop("temporary") in (0, 1)  # asyncpg's reset leaves temporary tables
        assert found == CLEAN, found
    async with postgres.admin() as admin:

        async def none_else():
            states = await admin.fetch("SELECT state FROM pg_stat_activity WHERE application_name = $1", name)
            return len(states) <= CONNECTIONS and {row["state"] for row in states} == {"idle"}

        await eventually(none_else)  # one that the pool has given up may still be ending
    for lease in leases:
        await pool.release(lease)
    while pool.stats().idle < pool.stats().size:
        await asyncio.sleep(0.01)
    stats = pool.stats()
    assert (stats.size, stats.in_use, stats.waiting) == (CONNECTIONS, 0, 0)
