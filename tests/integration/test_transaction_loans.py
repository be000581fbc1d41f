"""A transaction's connection that the application gave away, and a command tag that says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import asyncpg
import pytest

from resilient_pool import ResilientPool


class ApplicationError(Exception):
    """Something of the application's own."""


@pytest.fixture
async def table(postgres):
    name = f"t_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TABLE {name} (v text)")
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {name} CASCADE")


@pytest.fixture
async def pool(postgres):
    async with ResilientPool(postgres.dsn(), max_size=1, deadline=8.0) as pool:
        yield pool


async def rows(postgres, table):
    async with postgres.admin() as admin:
        return [row["v"] for row in await admin.fetch(f"SELECT v FROM {table} ORDER BY v")]


async def release(pool, connection):
    await pool.release(connection)


async def close(pool, connection):
    await connection.close()


async def terminate(pool, connection):
    connection.terminate()


WAYS = [release, close, terminate]


@pytest.mark.parametrize("pause", [0.0, 0.1])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_a_connection_given_away_inside_the_block_ends_it_with_an_error(pool, postgres, table, way, pause):
    """It is no success, the block is not run again, and nothing of it is left."""
    runs = []
    with pytest.raises(asyncpg.InterfaceError, match="released or closed inside the block"):
        async for attempt in pool.transaction():
            async with attempt as connection:
                runs.append(None)
                await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
                await way(pool, connection)
                await asyncio.sleep(pause)
    assert len(runs) == 1
    assert await rows(postgres, table) == []
    assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("end", ["by its end", "by an error", "by a use"])
async def test_what_ends_a_block_reaches_nobody_who_has_the_connection_now(pool, postgres, table, way, end):
    """Neither COMMIT nor ROLLBACK: another caller's transaction is that caller's alone."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def other():
        async with pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute(f"INSERT INTO {table} VALUES ('first half')")
                started.set()
                await go_on.wait()
                inside = connection.is_in_transaction()
                await connection.execute(f"INSERT INTO {table} VALUES ('second half')")
        return inside

    async def mine(connection):
        await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
        await way(pool, connection)
        running = asyncio.create_task(other())
        await started.wait()
        if end == "by an error":
            raise ApplicationError
        if end == "by a use":
            await connection.execute("SELECT 1")
        return running

    tasks = []

    async def watched(connection):
        before = asyncio.all_tasks()
        try:
            return await mine(connection)
        finally:
            tasks.extend(asyncio.all_tasks() - before)

    with pytest.raises((asyncpg.InterfaceError, ApplicationError)):
        await pool.run_in_transaction(watched)
    go_on.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert await rows(postgres, table) == ["first half", "second half"]
    assert pool.stats().retries_total == 0


async def test_a_failed_transaction_of_another_caller_is_not_committed_half_way(pool, postgres, table):
    """Its rollback is its own."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def other():
        async with pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute(f"INSERT INTO {table} VALUES ('half of a transfer')")
                started.set()
                await go_on.wait()
                raise ApplicationError

    with pytest.raises(asyncpg.InterfaceError):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
                await pool.release(connection)
                running = asyncio.create_task(other())
                await started.wait()
    go_on.set()
    with pytest.raises(ApplicationError):
        await running
    assert await rows(postgres, table) == []


async def released_later(pool, connection, turns):
    for _ in range(turns):
        await asyncio.sleep(0)
    with contextlib.suppress(Exception):
        await pool.release(connection)


async def test_a_release_by_another_task_while_the_transaction_ends_is_no_success_by_chance(pool, postgres, table):
    """Whatever was asked when it came, what is said agrees with what is there."""
    for turns in range(12):
        async with postgres.admin() as admin:
            await admin.execute(f"TRUNCATE {table}")

        disturbing = []

        async def work(connection, turns=turns, disturbing=disturbing):
            await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
            disturbing.append(asyncio.create_task(released_later(pool, connection, turns)))

        try:
            async with asyncio.timeout(5):
                await pool.run_in_transaction(work)
            expected = ["mine"]
        except asyncpg.InterfaceError:
            expected = []
        await asyncio.gather(*disturbing)
        assert await rows(postgres, table) == expected
        assert await pool.fetchval("SELECT 1") == 1


class Checkpointing(asyncpg.Connection):
    """An application's own class, with a method that commits."""

    async def checkpoint(self):
        await self.execute("COMMIT")
        await self.execute("BEGIN")


CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"


async def test_a_method_that_may_have_committed_is_not_repeated_after_a_conflict(postgres, table):
    """What was committed on the way would be applied twice."""
    async with ResilientPool(postgres.dsn(), connection_class=Checkpointing) as pool:
        with pytest.raises(asyncpg.SerializationError):
            async for attempt in pool.transaction():
                async with attempt as connection:
                    await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
                    await connection.checkpoint()
                    await connection.execute(CONFLICT)
    assert await rows(postgres, table) == ["mine"]


async def test_a_reset_inside_the_block_ends_it_with_an_error(pool, postgres, table):
    """It rolls back, so the block has not been committed."""
    with pytest.raises(asyncpg.InterfaceError, match="ended inside its block"):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
                await connection.reset()
    assert await rows(postgres, table) == []


async def test_a_reset_and_then_a_conflict_is_not_applied_twice(pool, postgres, table):
    """What follows a reset is committed statement by statement."""
    with pytest.raises(asyncpg.SerializationError):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.reset()
                await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
                await connection.execute(CONFLICT)
    assert await rows(postgres, table) == ["mine"]


@pytest.mark.parametrize("options", [{}, {"resolve_commit": False}], ids=str)
@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO {} VALUES ('C:\\dir\\')",
        "PREPARE p_{} AS SELECT 1; INSERT INTO {} VALUES ('d')",
        "CREATE FUNCTION f_{}() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END",
    ],
)
async def test_the_command_tag_is_believed_whatever_a_text_looked_like(pool, postgres, table, sql, options):
    """A transaction whose COMMIT was answered with ROLLBACK was rolled back."""
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        async for attempt in pool.transaction(**options):
            async with attempt as connection:
                await connection.execute(sql.format(table, table))
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    await connection.execute("SELECT 1 / 0")
    assert await rows(postgres, table) == []


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "COMMIT; BEGIN"])
async def test_a_transaction_that_the_application_ends_by_itself_is_its_own_affair(pool, postgres, table, sql):
    """The block ends without an error."""
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES ('mine')")
            await connection.execute(sql)
    assert await rows(postgres, table) == ([] if sql == "ROLLBACK" else ["mine"])


async def test_looking_at_a_connection_costs_nothing_at_the_end(postgres, table):
    """A conflict is repeated after it, and no question is asked for it."""
    runs = []
    async with ResilientPool(postgres.dsn()) as pool:
        async for attempt in pool.transaction():
            async with attempt as connection:
                runs.append(None)
                connection.get_server_version()
                connection.get_settings()
                hasattr(connection, "something")
                await connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
                await connection.copy_records_to_table(table, records=[("a",)])
                if len(runs) == 1:
                    await connection.execute(CONFLICT)
    assert len(runs) == 2
    assert await rows(postgres, table) == ["a"]


class Peculiar(asyncpg.Connection):
    """An application's own class, whose methods take other arguments."""

    async def fetchrow(self, query, *, tag):
        raise AssertionError("only the application calls this")

    async def fetchval(self, query, *, tag):
        raise AssertionError("only the application calls this")


@pytest.mark.parametrize("log", [None, "public.peculiar"])
async def test_what_the_pool_asks_for_itself_goes_past_an_applications_own_methods(postgres, proxy, table, log):
    """They may have other signatures, or count and trace what is not theirs."""
    async with ResilientPool(
        proxy.dsn(postgres.dsn()), max_size=1, deadline=8.0, connection_class=Peculiar, commit_log=log
    ) as pool:
        proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(lambda connection: connection.fetch(f"INSERT INTO {table} VALUES ('a')"))
    assert await rows(postgres, table) == ["a"]
