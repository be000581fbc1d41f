"""A program that was written for asyncpg, with one import changed. It is never run; each `type: ignore` is an error that remains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, assert_type

import asyncpg

from resilient_pool import ResilientConnection as PoolConnectionProxy
from resilient_pool import ResilientPool as Pool
from resilient_pool import create_pool, profiles


class ByName(asyncpg.Record):
    """Records whose columns are attributes."""

    def __getattr__(self, name: str) -> Any:
        """Return a column."""
        return self[name]


class Repository:
    """What holds a pool."""

    def __init__(self, pool: Pool[asyncpg.Record]) -> None:
        self.pool = pool

    async def one(self, number: int) -> asyncpg.Record | None:
        """Return a row."""
        return await self.pool.fetchrow("SELECT * FROM item WHERE id = $1", number, timeout=3)


class Named(Pool[ByName]):
    """A pool of one's own."""


async def init(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Prepare a new connection."""
    await connection.set_type_codec("jsonb", encoder=str, decoder=str, schema="pg_catalog")


async def setup(connection: PoolConnectionProxy[asyncpg.Record]) -> None:
    """Prepare a connection for use."""
    await connection.execute("SET timezone TO 'UTC'")


async def takes_connection(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Take asyncpg's own."""
    await connection.execute("SELECT 1")


async def takes_either(connection: asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]) -> None:
    """Take what comes."""
    await connection.execute("SELECT 1")


async def takes_asyncpgs_pool(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    """Take asyncpg's own."""
    await pool.execute("SELECT 1")


@asynccontextmanager
async def unit_of_work(pool: Pool[ByName]) -> AsyncGenerator[PoolConnectionProxy[ByName]]:
    """Lend a connection with a transaction on it."""
    async with pool.acquire() as connection, connection.transaction(isolation="serializable"):
        yield connection


async def records_of_a_class_of_ones_own() -> None:
    """The class given to the pool is that of every record."""
    async with create_pool("postgresql://x", record_class=ByName, max_queries=10) as pool:
        assert_type(pool, Pool[ByName])
        assert_type(await pool.fetch("SELECT 1 AS one"), list[ByName])
        assert_type(await pool.fetch("SELECT 1 AS one", record_class=asyncpg.Record), list[asyncpg.Record])
        assert_type(await pool.fetchrow("SELECT 1 AS one", idempotent=True), ByName | None)
        assert_type(await pool.fetchmany("SELECT $1::int", [(1,)], deadline=1.0), list[ByName])
        assert_type(await pool.acquire(), PoolConnectionProxy[ByName])
        async for attempt in pool.transaction():
            async with attempt as connection:
                assert_type(connection, PoolConnectionProxy[ByName])
                assert_type(await connection.fetchrow("SELECT 1 AS one"), ByName | None)
        async with unit_of_work(pool) as connection:
            assert_type(await (await connection.prepare("SELECT 1")).fetch(), list[ByName])
            async for row in connection.cursor("SELECT 1", prefetch=10):
                assert_type(row, ByName)
            async for other in connection.cursor("SELECT 1", record_class=asyncpg.Record):
                assert_type(other, asyncpg.Record)
    assert_type(Pool("postgresql://x", **profiles.LAMBDA, record_class=ByName), Pool[ByName])
    assert_type(Pool("postgresql://x"), Pool[asyncpg.Record])
    Named("postgresql://x", record_class=ByName)
    Named("postgresql://x", record_class=asyncpg.Record)  # type: ignore[arg-type]


async def listeners(connection: PoolConnectionProxy[asyncpg.Record]) -> None:
    """The arguments of a lambda are known."""
    await connection.add_listener("changes", lambda _connection, pid, channel, payload: (pid + 1, channel, payload))
    connection.add_log_listener(lambda _connection, message: message.sqlstate)
    connection.add_termination_listener(lambda _connection: None)
    with connection.query_logger(lambda record: record.query):
        await connection.execute("SELECT 1")


async def main() -> None:
    """Use all that asyncpg's pool and connection have."""
    pool = await create_pool(
        dsn="postgresql://x",
        min_size=1,
        max_size=5,
        init=init,
        setup=setup,
        command_timeout=60,
        server_settings={"application_name": "x"},
        ssl="prefer",
    )
    await Repository(pool).one(1)
    connection = await pool.acquire(timeout=3)
    try:
        await takes_connection(connection)  # type: ignore[arg-type] # with asyncpg's own pool too
        await takes_either(connection)
        statement = await connection.prepare("SELECT $1::int")
        repr((await statement.fetchval(1), statement.get_parameters()))
        await connection.set_type_codec("json", encoder=str, decoder=str)
        repr((connection.get_settings(), connection.get_server_version().major, connection.is_in_transaction()))
        await connection.copy_records_to_table("t", records=[(1,)], columns=["id"])
        await connection.copy_to_table("t", source="x.csv", format="csv", header=True)
        await connection.executemany("INSERT INTO t VALUES ($1)", ((number,) for number in range(3)))
    finally:
        await pool.release(connection)
    await takes_asyncpgs_pool(pool)  # type: ignore[arg-type] # it is no `asyncpg.Pool`
    await pool.expire_connections()
    pool.set_connect_args(dsn="postgresql://y", user="z")
    repr((pool.get_size(), pool.get_idle_size(), pool.get_min_size(), pool.get_max_size(), pool.is_closing()))
    async with pool as same:
        repr(same)
    await asyncio.wait_for(pool.close(), 10)
    pool.terminate()
