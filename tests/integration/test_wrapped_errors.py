"""Errors that wrap the driver's, by SQLAlchemy and by applications, in a transaction that is repeated as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import StaticPool

from resilient_pool import OutcomeUnknownError, PostgresClassifier, ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

CONFLICT_ONCE = "DO $$ BEGIN IF nextval('{0}') = 1 THEN RAISE EXCEPTION 'x' USING ERRCODE = '{1}'; END IF; END $$"


class Sealed(Exception):
    """An application's own error around the driver's."""

    def __init__(self, inside: BaseException) -> None:
        super().__init__("sealed")
        self.inside = inside


@pytest.fixture
async def table(postgres: EmbeddedPostgres):
    """An empty table with a key, and a sequence of the same name with an `s`."""
    name = f"t_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TABLE {name} (id int PRIMARY KEY); CREATE SEQUENCE {name}s")
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {name}; DROP SEQUENCE {name}s")


@pytest.fixture
async def pool(postgres: EmbeddedPostgres, proxy: FaultProxy):
    async with ResilientPool(proxy.dsn(postgres.dsn()), deadline=10.0) as pool:
        yield pool


@pytest.fixture
async def other(postgres: EmbeddedPostgres):
    """A connection of the application's own, which the pool knows nothing of."""
    connection = await asyncpg.connect(postgres.dsn())
    yield connection
    connection.terminate()
    await asyncio.sleep(0)


class Inside:
    """A connection that SQLAlchemy must neither close nor end the transaction of."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)

    async def close(self, *, timeout=None):
        pass

    def terminate(self):
        pass


@contextlib.asynccontextmanager
async def session_on(connection):
    """A SQLAlchemy session in the transaction that is open on a lease."""

    async def creator(*_args, **_options):
        return Inside(connection)

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=creator,
        poolclass=StaticPool,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    try:
        async with AsyncSession(engine) as session:
            yield session
            await session.commit()
    finally:
        await engine.dispose()


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_a_session_of_sqlalchemy_that_loses_a_conflict_is_repeated(pool, table, sqlstate):
    """The conflict arrives wrapped twice, and the whole unit of work runs again."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        async with session_on(connection) as session:
            await session.execute(text(f"INSERT INTO {table} VALUES (1)"))
            await session.execute(text(CONFLICT_ONCE.format(f"{table}s", sqlstate)))

    await pool.run_in_transaction(work)
    assert attempts == 2
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_a_session_of_sqlalchemy_that_loses_its_connection_is_repeated(pool, proxy, table):
    """On another connection, and only once."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        async with session_on(connection) as session:
            await session.execute(text(f"INSERT INTO {table} VALUES (1)"))
            if attempts == 1:
                proxy.rst()
            await session.execute(text("SELECT 1"))

    async with asyncio.timeout(20):
        await pool.run_in_transaction(work)
    assert attempts == 2
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_what_repeating_does_not_cure_reaches_the_application_in_its_wrapping(pool, table):
    """SQLAlchemy's own error, as a handler written for SQLAlchemy expects it."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        async with session_on(connection) as session:
            await session.execute(text(f"INSERT INTO {table} VALUES (1), (1)"))

    with pytest.raises(IntegrityError) as raised:
        await pool.run_in_transaction(work)
    assert isinstance(raised.value, DBAPIError)
    assert attempts == 1


@pytest.mark.parametrize("knows", [True, False])
async def test_an_applications_wrapper_is_seen_through_where_the_classifier_is_told_how(postgres, table, *, knows):
    """With the constructor's `unwrap` the block is repeated; without it the error is the application's own."""
    classifier = (
        PostgresClassifier(unwrap=lambda error: getattr(error, "inside", None)) if knows else PostgresClassifier()
    )
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        try:
            await connection.execute(CONFLICT_ONCE.format(f"{table}s", "40001"))
        except asyncpg.SerializationError as error:
            raise Sealed(error) from None

    async with ResilientPool(postgres.dsn(), classifier=classifier) as pool:
        with contextlib.nullcontext() if knows else pytest.raises(Sealed):
            await pool.run_in_transaction(work)
    assert attempts == (2 if knows else 1)


@pytest.mark.parametrize("when", ["in the middle", "before"])
async def test_a_connection_to_another_database_that_is_lost_is_not_this_one(pool, other, table, when):
    """The block is not run again for it: what it has done there could be done twice."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        await connection.execute(f"INSERT INTO {table} VALUES (1)")
        if when == "before":
            other.terminate()
        asyncio.get_running_loop().call_later(0.05, other.terminate)
        await other.execute("SELECT pg_sleep(10)")

    with pytest.raises((asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)):
        await pool.run_in_transaction(work)
    assert attempts == 1


def lost_in_the_middle(other):
    asyncio.get_running_loop().call_later(0.05, other.terminate)
    return other.execute("SELECT pg_sleep(10)")


async def closed_before(other):
    other.terminate()
    await other.execute("SELECT 1")


async def a_socket_of_the_applications(_other):
    raise ConnectionResetError(104, "the application's own")


@pytest.mark.parametrize("fail", [lost_in_the_middle, closed_before, a_socket_of_the_applications])
async def test_what_a_copys_source_reads_from_may_be_lost_without_this_connection(pool, other, table, fail):
    """The source's own error arrives as it is, and nothing was copied."""

    async def source():
        yield (1,)
        await fail(other)

    with pytest.raises((asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError, ConnectionResetError)):
        await pool.copy_records_to_table(table, records=source())
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 0


class Traced(asyncpg.Connection):
    """An application's class that adds nothing that is sent."""

    async def execute(self, query, *args, timeout=None):
        return await super().execute(query, *args, timeout=timeout)


class Audited(asyncpg.Connection):
    """An application's class that sends two statements where one is asked for."""

    between = staticmethod(lambda: None)

    async def execute(self, query, *args, timeout=None):
        result = await super().execute(query, *args, timeout=timeout)
        if query.startswith("INSERT"):
            await type(self).between(self)
            await super().execute("SELECT 'audited'")
        return result


async def closed_in_between(connection):
    connection.terminate()


async def conflicting_in_between(connection):
    await asyncpg.Connection.execute(connection, "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")


@pytest.mark.parametrize("between", [closed_in_between, conflicting_in_between])
@pytest.mark.parametrize("on_lease", [False, True])
async def test_the_second_statement_of_an_overridden_method_says_nothing_of_the_first(
    postgres, table, monkeypatch, between, *, on_lease
):
    """What was inserted is not inserted again because something else failed after it."""
    monkeypatch.setattr(Audited, "between", between)
    async with ResilientPool(postgres.dsn(), connection_class=Audited) as pool:
        await pool.fetchval("SELECT 1")
        with pytest.raises(OutcomeUnknownError):
            if on_lease:
                async with pool.acquire() as lease:
                    await lease.execute(f"INSERT INTO {table} VALUES ((SELECT count(*) FROM {table}))")
            else:
                await pool.execute(f"INSERT INTO {table} VALUES ((SELECT count(*) FROM {table}))")
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_a_method_that_only_adds_tracing_costs_no_repeat(postgres, table):
    """One statement was sent for one, so a conflict has left no effect."""
    async with postgres.admin() as admin:
        body = CONFLICT_ONCE.format(f"{table}s", "40001").removeprefix("DO $$ BEGIN").removesuffix("END $$")
        await admin.execute(
            f"CREATE FUNCTION {table}f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN {body} RETURN 1; END $$"
        )
    async with ResilientPool(postgres.dsn(), connection_class=Traced) as pool:
        await pool.execute(f"INSERT INTO {table} VALUES ({table}f())")
        assert await pool.fetchval(f"SELECT last_value FROM {table}s") == 2
    async with postgres.admin() as admin:
        await admin.execute(f"DROP FUNCTION {table}f")


async def test_what_fails_after_a_commit_in_an_overridden_method_does_not_undo_it(postgres, table):
    """COMMIT is sent by itself, so that its answer is about nothing else."""

    class Grumbling(asyncpg.Connection):
        async def execute(self, query, *args, timeout=None):
            result = await super().execute(query, *args, timeout=timeout)
            if query == "COMMIT":
                await conflicting_in_between(self)
            return result

    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        await connection.execute(f"INSERT INTO {table} VALUES ((SELECT count(*) FROM {table}))")

    async with ResilientPool(postgres.dsn(), connection_class=Grumbling) as pool:
        await pool.run_in_transaction(work)
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1
    assert attempts == 1
