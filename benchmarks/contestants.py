"""The contestants: how each is opened and called."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import asyncpg
import psycopg
import psycopg_pool
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from resilient_pool import ResilientPool

READ = "SELECT id, value FROM overhead WHERE id = $1"
WRITE = "UPDATE overhead SET value = value + 1 WHERE id = $1"
ROWS = 10_000

BARE = "bare connection"
AGAIN = "another bare connection"
OURS = "resilient_pool"
ASYNCPG = "asyncpg.Pool"
PSYCOPG = "psycopg_pool"
PSYCOPG_CHECKED = "psycopg_pool, check"
ALCHEMY = "SQLAlchemy + asyncpg"
ALCHEMY_CHECKED = "SQLAlchemy + asyncpg, pre_ping"

Call = Callable[[int], Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What one contestant can be asked to do; the argument is the row's id."""

    read: Call
    write: Call
    lease: Call
    """Take a connection, read on it once, give it back."""
    transact: Call
    """The same with one write in a transaction."""


KINDS = {"reads": "read", "writes": "write", "leases": "lease", "transactions": "transact"}
"""What is measured, and which of the calls that is."""


Contestant = Callable[[str], contextlib.AbstractAsyncContextManager[Calls]]


@contextlib.asynccontextmanager
async def bare_connection(dsn: str) -> AsyncIterator[Calls]:
    connection = await asyncpg.connect(dsn)

    def read(key: int) -> Awaitable[object]:
        return connection.fetch(READ, key)

    async def transact(key: int) -> None:
        async with connection.transaction():
            await connection.execute(WRITE, key)

    yield Calls(read=read, write=lambda key: connection.execute(WRITE, key), lease=read, transact=transact)
    await connection.close()


def calls_of(pool: ResilientPool | asyncpg.Pool) -> Calls:
    """Return what is done with a pool of asyncpg's kind."""

    async def lease(key: int) -> None:
        async with pool.acquire() as connection:
            await connection.fetch(READ, key)

    async def transact(key: int) -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(WRITE, key)

    return Calls(
        read=lambda key: pool.fetch(READ, key),
        write=lambda key: pool.execute(WRITE, key),
        lease=lease,
        transact=transact,
    )


@contextlib.asynccontextmanager
async def resilient_pool(dsn: str, **arguments: object) -> AsyncIterator[Calls]:
    async with ResilientPool(dsn, **arguments) as pool:  # type: ignore[arg-type]
        yield calls_of(pool)


@contextlib.asynccontextmanager
async def asyncpg_pool(dsn: str) -> AsyncIterator[Calls]:
    async with asyncpg.create_pool(dsn, min_size=0, max_size=10) as pool:
        yield calls_of(pool)


@contextlib.asynccontextmanager
async def psycopg_pool_(dsn: str, *, checked: bool = False) -> AsyncIterator[Calls]:
    check = psycopg_pool.AsyncConnectionPool.check_connection if checked else None
    # autocommit, like every other contestant: without it there are three round trips.
    options = {"autocommit": True}
    pool = psycopg_pool.AsyncConnectionPool(dsn, min_size=1, max_size=10, kwargs=options, check=check, open=False)
    read_sql, write_sql = READ.replace("$1", "%s"), WRITE.replace("$1", "%s")

    async def read(key: int) -> list[psycopg.rows.TupleRow]:
        async with pool.connection() as connection:
            return await (await connection.execute(read_sql, (key,))).fetchall()

    async def write(key: int) -> None:
        async with pool.connection() as connection:
            await connection.execute(write_sql, (key,))

    async def transact(key: int) -> None:
        async with pool.connection() as connection, connection.transaction():
            await connection.execute(write_sql, (key,))

    async with pool:
        yield Calls(read=read, write=write, lease=read, transact=transact)


@contextlib.asynccontextmanager
async def sqlalchemy_engine(dsn: str, *, checked: bool = False) -> AsyncIterator[Calls]:
    url = dsn.replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url, pool_size=10, pool_pre_ping=checked, isolation_level="AUTOCOMMIT")
    read_sql, write_sql = (sqlalchemy.text(sql.replace("$1", ":id")) for sql in (READ, WRITE))

    async def read(key: int) -> object:
        async with engine.connect() as connection:
            return (await connection.execute(read_sql, {"id": key})).all()

    async def write(key: int) -> None:
        async with engine.connect() as connection:
            await connection.execute(write_sql, {"id": key})

    # As it is by itself: the driver's transaction is begun with the first statement.
    transacting = engine.execution_options(isolation_level="READ COMMITTED")

    async def transact(key: int) -> None:
        async with transacting.begin() as connection:
            await connection.execute(write_sql, {"id": key})

    yield Calls(read=read, write=write, lease=read, transact=transact)
    await engine.dispose()


ONE_AT_A_TIME: Mapping[str, Contestant] = {
    BARE: bare_connection,
    AGAIN: bare_connection,
    OURS: resilient_pool,
    ASYNCPG: asyncpg_pool,
    PSYCOPG: psycopg_pool_,
    PSYCOPG_CHECKED: lambda dsn: psycopg_pool_(dsn, checked=True),
    ALCHEMY: sqlalchemy_engine,
    ALCHEMY_CHECKED: lambda dsn: sqlalchemy_engine(dsn, checked=True),
}
POOLS: Mapping[str, Contestant] = {
    name: contestant for name, contestant in ONE_AT_A_TIME.items() if name not in {BARE, AGAIN}
}
