"""Tortoise, Piccolo and databases over the pool: their own ways of working, repeated transactions, and a database that sleeps."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest
from cut import Cut
from databases.backends.postgres import PostgresBackend
from piccolo.columns import Serial, Text
from piccolo.engine.postgres import PostgresEngine
from piccolo.querystring import QueryString
from piccolo.table import Table
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from tortoise import fields
from tortoise.context import TortoiseContext
from tortoise.exceptions import IntegrityError
from tortoise.models import Model
from tortoise.transactions import in_transaction

from resilient_pool import ResilientPool
from resilient_pool.contrib.databases import Database, ResilientBackend
from resilient_pool.contrib.piccolo import ResilientEngine
from resilient_pool.contrib.sqlalchemy import pool_of
from resilient_pool.testing import PausingServer

CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"
CALLERS = 30


class Order(Model):
    """Tortoise's."""

    id = fields.IntField(primary_key=True)
    name = fields.TextField()

    class Meta:
        table = "orders"


class PiccoloOrder(Table, tablename="orders"):
    """Piccolo's."""

    id = Serial(primary_key=True)
    name = Text()


@pytest.fixture
async def database(postgres, empty_database):
    """A database with an empty table."""
    async with postgres.admin(empty_database) as admin:
        await admin.execute("CREATE TABLE orders (id serial PRIMARY KEY, name text NOT NULL)")
    return empty_database


def where(server, database):
    """What says where to connect, as a dict."""
    return {"host": server.host, "port": server.port, "user": "postgres", "database": database}


@contextlib.asynccontextmanager
async def tortoise_on(server, database, **more):
    """Tortoise with its models; gives its client."""
    config = {
        "connections": {
            "default": {"engine": "resilient_pool.contrib.tortoise", "credentials": {**where(server, database), **more}}
        },
        "apps": {"models": {"models": [__name__], "default_connection": "default"}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config)
        yield context.connections.get("default")


@contextlib.asynccontextmanager
async def piccolo_on(server, database, **more):
    """Piccolo's engine with its pool open, and its table on it."""
    # It asks the server's version in a loop of its own.
    engine = await asyncio.to_thread(ResilientEngine, config=where(server, database))
    await engine.start_connection_pool(**more)
    PiccoloOrder._meta._db = engine
    try:
        yield engine
    finally:
        await engine.close_connection_pool()


@contextlib.asynccontextmanager
async def databases_on(server, database, **more):
    """The package databases, connected."""
    async with Database(
        f"postgresql://postgres@{server.host}:{server.port}/{database}?max_size=7", **more
    ) as connected:
        yield connected


async def stored(postgres, database):
    async with postgres.admin(database) as admin:
        return [row["name"] for row in await admin.fetch("SELECT name FROM orders ORDER BY id")]


# As they are used


async def test_tortoise_works_on_the_pool(postgres, database):
    """Models, transactions and savepoints."""
    async with tortoise_on(postgres, database, maxsize=3, deadline=20) as client:
        order = await Order.create(name="one")
        assert await Order.get(id=order.id) == order
        async with in_transaction():
            await Order.create(name="two")
            with pytest.raises(KeyError):
                async with in_transaction():
                    await Order.create(name="gone")
                    raise KeyError
        with pytest.raises(IntegrityError):
            await Order.create(id=order.id, name="twice")
        pool = client.pool
        assert (type(pool), pool.get_max_size(), pool.get_min_size(), pool._config.deadline) == (
            ResilientPool,
            3,
            0,
            20,
        )
    assert pool.is_closed
    assert await stored(postgres, database) == ["one", "two"]


async def test_piccolo_works_on_the_pool(postgres, database):
    """Tables, transactions, savepoints and batches."""
    async with piccolo_on(postgres, database, max_size=3) as engine:
        await PiccoloOrder(name="one").save()
        async with engine.transaction() as transaction:
            await PiccoloOrder(name="two").save()
            savepoint = await transaction.savepoint()
            await PiccoloOrder(name="gone").save()
            await savepoint.rollback_to()
        names = []
        async with await PiccoloOrder.select(PiccoloOrder.name).batch(batch_size=1) as batch:
            async for rows in batch:
                names += [row["name"] for row in rows]
        assert names == ["one", "two"]
        pool = engine.pool
        assert (type(pool), pool.get_max_size()) == (ResilientPool, 3)
    assert pool.is_closed
    assert isinstance(engine, PostgresEngine)


async def test_databases_works_on_the_pool(postgres, database):
    """Queries, iteration, transactions and nested ones."""
    async with databases_on(postgres, database, deadline=20) as connected:
        await connected.execute("INSERT INTO orders (name) VALUES (:name)", {"name": "one"})
        async with connected.transaction():
            await connected.execute("INSERT INTO orders (name) VALUES ('two')")
            with pytest.raises(KeyError):
                async with connected.transaction():
                    await connected.execute("INSERT INTO orders (name) VALUES ('gone')")
                    raise KeyError
        assert [row.name async for row in connected.iterate("SELECT name FROM orders ORDER BY id")] == ["one", "two"]
        pool = connected.pool
        assert (type(pool), pool.get_max_size(), pool._config.deadline) == (ResilientPool, 7, 20)
    assert pool.is_closed
    with pytest.raises(RuntimeError, match="there is no pool"):
        _ = connected.pool
    assert issubclass(ResilientBackend, PostgresBackend)


# Units of work that are repeated


@pytest.mark.parametrize("lost", [False, True])
async def test_transactions_of_the_pool_are_theirs_too(postgres, proxy, database, lost):
    """A conflict, or a lost connection, repeats the whole block, in which their queries run in the pool's transaction."""

    async def fail(run):
        if lost:
            proxy.rst()
        await run(CONFLICT)

    async def with_tortoise():
        async with tortoise_on(proxy, database) as client:
            await Order.all().count()
            async for attempt in client.pool.transaction():
                async with attempt as connection:
                    with client.within(connection) as inside:
                        await Order.create(name="tortoise")
                        async with in_transaction():
                            await Order.create(name="nested")
                        if attempt.number == 1:
                            await fail(inside.execute_script)

    async def with_piccolo():
        async with piccolo_on(proxy, database) as engine:
            async for attempt in engine.pool.transaction():
                async with attempt as connection:
                    with engine.within(connection):
                        await PiccoloOrder(name="piccolo").save()
                        if attempt.number == 1:
                            await fail(lambda sql: engine.run_querystring(QueryString(sql)))

    async def with_databases():
        async with databases_on(proxy, database) as connected:
            async for attempt in connected.pool.transaction():
                async with attempt as connection:
                    with connected.within(connection):
                        await connected.execute("INSERT INTO orders (name) VALUES ('databases')")
                        async with connected.transaction():
                            await connected.execute("INSERT INTO orders (name) VALUES ('nested')")
                        if attempt.number == 1:
                            await fail(connected.execute)
            assert await connected.fetch_val("SELECT count(*) FROM orders") == 5
            async with connected.connection():
                with pytest.raises(RuntimeError, match="uses a connection"), connected.within(connection):
                    pass

    for work in (with_tortoise, with_piccolo, with_databases):
        await work()
    assert await stored(postgres, database) == ["tortoise", "nested", "piccolo", "databases", "nested"]


async def test_tortoise_gives_a_connection_back_on_which_no_transaction_began(proxy, database):
    """When its task was cancelled before that, say; Tortoise's own class would keep it for ever."""

    async def begin():
        async with in_transaction():
            pass

    async with tortoise_on(proxy, database, maxsize=1, deadline=10) as client:
        assert await Order.all().count() == 0
        proxy.blackhole()
        task = asyncio.create_task(begin())
        async with asyncio.timeout(5):
            while not client.pool.stats().in_use:
                await asyncio.sleep(0)
        task.cancel()
        proxy.restore()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await Order.all().count() == 0


async def rows_of(connected):
    return [row async for row in connected.iterate("SELECT 1")]


@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
async def test_databases_keeps_no_connection_of_an_iteration_that_was_cancelled_anywhere(postgres, database, late):
    """The transaction that it has begun ends as any other does; the package's own class would keep it for ever."""
    async with Database(postgres.dsn(database), max_size=1, deadline=10) as connected:
        for at in range(30):
            cut = Cut(rows_of(connected), at=at, late=late)
            await asyncio.wait([asyncio.create_task(awaited(cut))])
            async with asyncio.timeout(10):
                assert await connected.fetch_val("SELECT 2") == 2
            assert connected.pool.stats().in_use == 0
            if not cut.happened:
                break
        assert at > 2


async def awaited(work):
    return await work


@pytest.mark.parametrize("lost", ["BEGIN", "SELECT 1", "COMMIT"])
async def test_databases_gives_a_connection_back_that_was_lost_in_a_transaction(postgres, proxy, database, lost):
    """Its task goes on with another one; the package's own class would leave it with the lost one for ever."""
    async with Database(proxy.dsn(postgres.dsn(database)), max_size=1, deadline=10) as connected:
        await connected.execute("SELECT 1")
        # As many times as the pool may begin anew.
        proxy.swallow_next_answer(matching=lost, times=50 if lost == "BEGIN" else 1)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            async with asyncio.timeout(20), connected.transaction():
                await connected.execute("SELECT 1")
        proxy.restore()
        assert await connected.fetch_val("SELECT 2") == 2
        assert connected.pool.stats().in_use == 0


@pytest.mark.parametrize("lost", ["BEGIN", "SELECT 1", "COMMIT"])
async def test_piccolo_gives_a_connection_back_that_was_lost_in_a_transaction(proxy, database, lost):
    """Its task goes on with another one; Piccolo's own class would leave it with the lost one for ever."""
    async with piccolo_on(proxy, database, max_size=1, deadline=10) as engine:
        assert await PiccoloOrder.count() == 0
        proxy.swallow_next_answer(matching=lost, times=50 if lost == "BEGIN" else 1)
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            async with asyncio.timeout(20), engine.transaction():
                await PiccoloOrder.raw("SELECT 1")
        proxy.restore()
        assert await PiccoloOrder.count() == 0
        assert engine.pool.stats().in_use == 0


# Asleep


async def test_a_database_that_sleeps_serves_every_caller(postgres, database):
    """Thirty at once through each of the four, while it takes 3 s to wake; and again when it has fallen asleep once more."""

    async def with_sqlalchemy(server):
        engine = create_async_engine(f"postgresql+resilient://postgres@{server.host}:{server.port}/{database}")

        async def ask():
            async with engine.connect() as connection:
                return (await connection.execute(text("SELECT count(*) FROM orders"))).scalar()

        await twice(server, ask)
        assert pool_of(engine).stats().in_use == 0
        await engine.dispose()

    async def with_tortoise(server):
        async with tortoise_on(server, database):
            await twice(server, lambda: Order.all().count())

    async def with_piccolo(server):
        async with piccolo_on(server, database):
            await twice(server, lambda: PiccoloOrder.count().run())

    async def with_databases(server):
        async with databases_on(server, database) as connected:
            await twice(server, lambda: connected.fetch_val("SELECT count(*) FROM orders"))

    async def twice(server, ask):
        for _ in range(2):
            server.pause()
            assert await asyncio.gather(*(asyncio.create_task(each(ask)) for _ in range(CALLERS))) == [0] * CALLERS

    async def each(ask):
        return await ask()

    async def asleep(work, seed):
        away = ("hang", "reset", "57P03", "28000")
        async with PausingServer(postgres.host, postgres.port, resume_seconds=3, away=away, seed=seed) as server:
            await work(server)

    async with asyncio.timeout(60):
        await asyncio.gather(
            *(
                asleep(work, seed)
                for seed, work in enumerate((with_sqlalchemy, with_tortoise, with_piccolo, with_databases))
            )
        )
