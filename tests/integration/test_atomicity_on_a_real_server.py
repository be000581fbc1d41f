"""What commits on its way: held against servers of both versions, and against a deadlock half-way."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.sql.read_only import StatementReader

SCHEMA = """
CREATE TABLE t (a int PRIMARY KEY, b int);
INSERT INTO t SELECT i, i FROM generate_series(1, 1000) AS i;
CREATE INDEX i ON t (b);
CREATE TABLE parted (a int) PARTITION BY LIST (a);
CREATE TABLE part PARTITION OF parted FOR VALUES IN (1);
CREATE INDEX parted_i ON parted (a);
CREATE MATERIALIZED VIEW v AS SELECT a FROM t;
CREATE UNIQUE INDEX v_i ON v (a);
CREATE SUBSCRIPTION s CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false);
"""
REFUSED_IN_A_BLOCK = (
    "CREATE INDEX CONCURRENTLY x ON t (b)",
    "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS x ON t (a)",
    "DROP INDEX CONCURRENTLY i",
    "DROP INDEX CONCURRENTLY IF EXISTS i",
    "REINDEX INDEX CONCURRENTLY i",
    "REINDEX (VERBOSE, CONCURRENTLY) TABLE t",
    "REINDEX TABLE CONCURRENTLY t",
    "REINDEX TABLE parted",
    "REINDEX INDEX parted_i",
    "REINDEX SCHEMA public",
    "REINDEX DATABASE atomicity",
    "REINDEX SYSTEM atomicity",
    "VACUUM",
    "VACUUM t",
    "VACUUM (ANALYZE) t",
    "CLUSTER",
    "CREATE DATABASE x",
    "DROP DATABASE x",
    "ALTER DATABASE atomicity SET TABLESPACE pg_default",
    "CREATE TABLESPACE x LOCATION '/nowhere'",
    "DROP TABLESPACE x",
    "ALTER SYSTEM SET work_mem = '1MB'",
    "ALTER SYSTEM RESET ALL",
    "ALTER TABLE parted DETACH PARTITION part CONCURRENTLY",
    "CREATE SUBSCRIPTION x CONNECTION 'dbname=nowhere' PUBLICATION p",
    "DISCARD ALL",
    "COMMIT PREPARED 'x'",
    "ROLLBACK PREPARED 'x'",
)
COMMIT_ON_THEIR_WAY = (
    "ANALYZE t, v",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY v",
    "CALL p()",
    "DO $$BEGIN END$$",
    "ALTER SUBSCRIPTION s REFRESH PUBLICATION",
    "ALTER SUBSCRIPTION s SET PUBLICATION p",
)
ATOMIC = (
    "CREATE INDEX x ON t (b)",
    "DROP INDEX i",
    "ALTER TABLE parted DETACH PARTITION part",
    "REFRESH MATERIALIZED VIEW v",
    "CREATE TABLE x AS TABLE t",
    "ALTER TABLE t ADD c int",
    "TRUNCATE t",
    "LOCK t",
    "CREATE SCHEMA x CREATE TABLE y (z int)",
    "COMMENT ON TABLE t IS 'x'",
    "GRANT SELECT ON t TO PUBLIC",
    "EXPLAIN ANALYZE INSERT INTO t VALUES (0)",
    "SET work_mem = '1MB'",
    "NOTIFY x",
    "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
)


@pytest.fixture(params=["postgres", "postgres16"])
async def connection(request):
    """A superuser's connection to a database of its own, on each version."""
    server = request.getfixturevalue(request.param)
    await server.create_database("atomicity")
    try:
        async with server.admin("atomicity") as connection:
            await connection.execute(SCHEMA)
            yield connection
    finally:
        async with server.admin("atomicity") as connection:
            await connection.execute("ALTER SUBSCRIPTION s SET (slot_name = NONE)")
            await connection.execute("DROP SUBSCRIPTION s")
        async with server.admin() as admin:
            await admin.execute("DROP DATABASE atomicity WITH (FORCE)")


async def refusal(connection, sql):
    """What the server says to a statement inside a transaction block."""
    await connection.execute("BEGIN")
    try:
        await connection.execute(sql)
    except asyncpg.PostgresError as error:
        return error
    finally:
        await connection.execute("ROLLBACK")
    return None


async def test_what_the_server_refuses_in_a_transaction_block_is_never_atomic(connection):
    """The reader's list is the server's."""
    refused = {sql: await refusal(connection, sql) for sql in REFUSED_IN_A_BLOCK}
    assert {sql for sql, error in refused.items() if not isinstance(error, asyncpg.ActiveSQLTransactionError)} == set()
    assert [sql for sql in (*REFUSED_IN_A_BLOCK, *COMMIT_ON_THEIR_WAY) if StatementReader().read(sql).is_atomic] == []


async def test_what_the_server_takes_in_a_transaction_block_is_atomic(connection):
    """Ordinary statements, whatever they define."""
    assert {sql: error for sql in ATOMIC if (error := await refusal(connection, sql))} == {}
    assert [sql for sql in ATOMIC if not StatementReader().read(sql).is_atomic] == []


@pytest.mark.parametrize("connection", ["postgres"], indirect=True)
@pytest.mark.parametrize("leased", [False, True], ids=["one shot", "lease"])
async def test_an_index_built_concurrently_that_failed_half_way_is_not_reported_as_built(postgres, connection, leased):
    """A deadlock leaves an invalid index behind, and IF NOT EXISTS would pass over it."""
    sql = "CREATE INDEX CONCURRENTLY IF NOT EXISTS half ON t (b)"
    settings = {"deadlock_timeout": "1s"}  # looked at once, when the other one must be waiting already
    await connection.execute("SET deadlock_timeout = '1h'")
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await connection.execute("SELECT FROM t LIMIT 1")
    async with ResilientPool(postgres.dsn(database="atomicity"), deadline=20, server_settings=settings) as pool:
        blocked = asyncio.create_task(wait_for_each_other(connection))
        with pytest.raises(OutcomeUnknownError) as caught:
            await asyncio.wait_for(build(pool, sql, leased=leased), 20)
        await blocked
        assert isinstance(caught.value.__cause__, asyncpg.DeadlockDetectedError)
        assert pool.stats().retries_total == 0
    assert await connection.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'half'::regclass") is False


async def build(pool, sql, *, leased):
    if not leased:
        return await pool.execute(sql)
    async with pool.acquire() as lease:
        return await lease.execute(sql)


async def wait_for_each_other(connection):
    """Once the index waits for this transaction, let that wait for the index."""
    while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        await asyncio.sleep(0.02)
    await connection.execute("LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE")
    await connection.execute("ROLLBACK")


async def test_what_no_rollback_undoes_is_not_repeated_after_a_conflict(postgres):
    """A replication slot stays when the statement that made it fails: that the second one exists already is no news."""
    async with postgres.admin() as admin:
        await admin.execute(
            "CREATE FUNCTION conflict() RETURNS int LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'conflict' USING errcode = '40001'; END $$"
        )
    try:
        async with ResilientPool(postgres.dsn(), deadline=10) as pool:
            with pytest.raises(OutcomeUnknownError) as caught:
                await pool.fetch("SELECT pg_create_physical_replication_slot('made'), conflict()")
        assert isinstance(caught.value.__cause__, asyncpg.SerializationError)
        async with postgres.admin() as admin:
            assert await admin.fetchval("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'made'") == 1
    finally:
        async with postgres.admin() as admin:
            await admin.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
            await admin.execute("DROP FUNCTION conflict()")
