"""Types that a migration drops and creates anew, under connections that have used the old ones."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres

CONNECTIONS = 8


@pytest.fixture
async def schema(postgres: EmbeddedPostgres):
    """A schema of its own, which is dropped in the end."""
    name = f"s_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE SCHEMA {name}")
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP SCHEMA {name} CASCADE")


KINDS = {
    "an enum": (
        "CREATE TYPE {0}.k AS ENUM ('a', 'b'); CREATE TABLE {0}.t (v {0}.k)",
        (
            "ALTER TABLE {0}.t DROP COLUMN v; DROP TYPE {0}.k; CREATE TYPE {0}.k AS ENUM ('a', 'b', 'c');"
            "ALTER TABLE {0}.t ADD COLUMN v {0}.k"
        ),
        "a",
    ),
    "a composite": (
        "CREATE TYPE {0}.k AS (x int, y int); CREATE TABLE {0}.t (v {0}.k)",
        (
            "ALTER TABLE {0}.t DROP COLUMN v; DROP TYPE {0}.k; CREATE TYPE {0}.k AS (x int, y int);"
            "ALTER TABLE {0}.t ADD COLUMN v {0}.k"
        ),
        (1, 2),
    ),
    "an array of an enum": (
        "CREATE TYPE {0}.k AS ENUM ('a', 'b'); CREATE TABLE {0}.t (v {0}.k[])",
        (
            "ALTER TABLE {0}.t DROP COLUMN v; DROP TYPE {0}.k; CREATE TYPE {0}.k AS ENUM ('a', 'b');"
            "ALTER TABLE {0}.t ADD COLUMN v {0}.k[]"
        ),
        ["a"],
    ),
    "a domain": (
        "CREATE DOMAIN {0}.k AS int; CREATE TABLE {0}.t (v {0}.k)",
        "ALTER TABLE {0}.t DROP COLUMN v; DROP DOMAIN {0}.k; CREATE DOMAIN {0}.k AS int; ALTER TABLE {0}.t ADD COLUMN v {0}.k",
        1,
    ),
    "another type of a field": (
        "CREATE TYPE {0}.k AS (x int); CREATE TABLE {0}.t (v {0}.k)",
        "ALTER TABLE {0}.t DROP COLUMN v; ALTER TYPE {0}.k ALTER ATTRIBUTE x TYPE bigint; ALTER TABLE {0}.t ADD COLUMN v {0}.k",
        (1,),
    ),
}


async def use_everywhere(pool, text, value):
    """Run the statement on each of the connections."""
    leases = [await pool.acquire() for _ in range(CONNECTIONS)]
    for lease in leases:
        await lease.execute(text, value)
        await pool.release(lease)
    async with asyncio.timeout(10):
        while pool.get_idle_size() < CONNECTIONS:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("before", "migration", "value"), KINDS.values(), ids=KINDS)
async def test_no_call_fails_after_a_type_was_made_anew(postgres, schema, before, migration, value):
    """The first connection that finds it out of date has the others replaced: they would use up the attempts."""
    text = f"INSERT INTO {schema}.t VALUES ($1)"
    async with postgres.admin() as admin:
        await admin.execute(before.format(schema))
    async with ResilientPool(postgres.dsn(), max_size=CONNECTIONS, deadline=10.0) as pool:
        await use_everywhere(pool, text, value)
        async with postgres.admin() as admin:
            await admin.execute(f"TRUNCATE {schema}.t; {migration.format(schema)}")
        for _ in range(3):
            await pool.execute(text, value)
        assert sum(pool.stats().retries.values()) <= 1
        assert await pool.fetchval(f"SELECT count(*) FROM {schema}.t") == 3


async def test_a_transaction_meets_a_type_made_anew_once(postgres, schema):
    """The block is repeated on a new connection, and the other connections are new as well."""
    before, migration, value = KINDS["an enum"]
    text = f"INSERT INTO {schema}.t VALUES ($1)"
    runs = 0

    async def work(connection):
        nonlocal runs
        runs += 1
        await connection.execute(text, value)

    async with postgres.admin() as admin:
        await admin.execute(before.format(schema))
    async with ResilientPool(postgres.dsn(), max_size=CONNECTIONS, deadline=10.0) as pool:
        await use_everywhere(pool, text, value)
        async with postgres.admin() as admin:
            await admin.execute(f"TRUNCATE {schema}.t; {migration.format(schema)}")
        for _ in range(3):
            await pool.run_in_transaction(work)
    assert runs == 4


async def test_a_connection_that_has_never_worked_expires_no_other(postgres, schema):
    """A new one has nothing out of date: what it meets is another trouble, and the others are left alone."""
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE FUNCTION {schema}.f() RETURNS int LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'cache lookup failed for type 1' USING ERRCODE = 'XX000'; END $$"
        )
    async with ResilientPool(postgres.dsn(), max_size=4, deadline=5.0) as pool:
        lease = await pool.acquire()
        await lease.fetchval("SELECT 1")
        with pytest.raises(Exception, match="cache lookup failed"):
            await pool.fetchval(f"SELECT {schema}.f()")
        pid = lease.get_server_pid()
        await pool.release(lease)
        async with asyncio.timeout(10):
            while not pool.get_idle_size():
                await asyncio.sleep(0.01)
        async with pool.acquire() as again:
            assert again.get_server_pid() == pid


async def read_with_a_cursor(connection):
    async with connection.transaction():
        return [row[0] async for row in connection.cursor("SELECT 1")]


async def test_a_cursor_survives_a_reload_by_another_lease(postgres):
    """At whichever moment of its reading another lease says that the schema has changed; no statement is left afterwards."""
    async with ResilientPool(postgres.dsn(), min_size=2, max_size=2) as pool:
        async with pool.acquire() as one, pool.acquire() as other:
            for turns in range(100):
                await one.fetch(f"SELECT 1 AS to_be_closed_{turns}")
                await other.reload_schema_state()
                reading = asyncio.ensure_future(read_with_a_cursor(one))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await other.reload_schema_state()
                assert await reading == [1]
            await other.reload_schema_state()
        async with pool.acquire() as one, pool.acquire() as other:
            for lease in (one, other):
                await lease.fetch("SELECT 'closes what is to be closed'")
                assert await lease.fetchval("SELECT count(*) FROM pg_prepared_statements") == 2
