"""Servers that speak PostgreSQL's protocol and have little else: what the pool asks by itself may be refused, each part of it."""

from __future__ import annotations

import asyncio
import logging
import re
import struct

import asyncpg
import pytest
from migration_tools import program
from test_poolers import Proxy

from resilient_pool import (
    ConfigurationError,
    MigrationFailedError,
    MigrationLockedError,
    OutcomeUnknownError,
    ResilientPool,
    run_migration,
)
from resilient_pool.events import DiscardReason
from resilient_pool.pooling import reset_text
from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedServer

LIMIT = 20.0
LACKING = ("0A000", "42883", "42704", "42P01", "42601")
CODES = (*LACKING, "XX000", "42501")
# Everything that the pool asks, and nothing that the tests do.
OURS = re.compile(
    rb"pg_catalog|pg_advisory|current_setting|set_config|SAVEPOINT|^\s*(RESET|SET (SESSION|ROLE)|CLOSE ALL|UNLISTEN|DISCARD)|session_user"
)


def lines(matching, sqlstate: str = "0A000", **fields) -> tuple[Refusal, Refusal]:
    """Refuse statements when they are prepared, and when they are sent as they are."""
    fields = {"severity": "ERROR", "sqlstate": sqlstate, "message": "not supported", "then": End.READY, **fields}
    return (
        Refusal(at=Point.PARSE, matching=matching, **fields),
        Refusal(at=Point.QUERY, matching=matching, **fields),
    )


def everything(sql: bytes) -> bool:
    return OURS.search(sql) is not None


def containing(*texts: str):
    return lambda sql: any(text.encode() in sql for text in texts)


@pytest.fixture
async def table(postgres: EmbeddedPostgres):
    """An empty table, and a look at it that does not pass the script."""
    async with postgres.admin() as connection:
        await connection.execute("DROP TABLE IF EXISTS elsewhere; CREATE TABLE elsewhere (entry int)")

        async def entries() -> list[int]:
            return [row["entry"] for row in await connection.fetch("SELECT entry FROM elsewhere ORDER BY entry")]

        yield entries
        await connection.execute("DROP TABLE elsewhere")


def in_front_of(postgres: EmbeddedPostgres, *script: Refusal) -> ScriptedServer:
    return ScriptedServer(*script, host=postgres.host, port=postgres.port)


async def insert(pool: ResilientPool, entry: int) -> None:
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute("INSERT INTO elsewhere VALUES ($1)", entry)


async def use(pool: ResilientPool, entry: int) -> None:
    """Do one of each: a read, a write, a lease, a transaction, an exactly-once write; three entries."""
    assert await pool.fetchval("SELECT $1::int", entry) == entry
    await pool.execute("INSERT INTO elsewhere VALUES ($1)", entry)
    async with pool.acquire() as connection, connection.transaction():
        assert await connection.fetchval("SELECT 7") == 7
    await insert(pool, entry)
    await pool.execute("INSERT INTO elsewhere VALUES ($1)", entry, exactly_once=True)


# Nothing that is refused is missed


@pytest.mark.parametrize("sqlstate", CODES)
async def test_a_server_that_refuses_all_that_the_pool_asks_serves_all_the_same(postgres, table, sqlstate):
    """And what it has refused once is not asked again on the same connection, whatever is done there."""
    with in_front_of(postgres, *lines(everything, sqlstate)) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            await use(pool, 1)
            refused = len(server.sent)
            assert refused > 0
            for entry in range(2, 6):
                await use(pool, entry)
            assert len(server.sent) == refused
            assert pool.stats().opened == 1
    assert await table() == sorted([*range(1, 6)] * 3)


@pytest.mark.parametrize("sqlstate", CODES)
async def test_no_caller_sees_a_reset_that_is_refused_for_good(postgres, sqlstate):
    """A server without settings to reset: each session is used once, which is all that is certain."""
    with in_front_of(postgres, *lines(everything, sqlstate)) as server:
        async with asyncio.timeout(LIMIT):
            async with ResilientPool(server.dsn(postgres.dsn()), max_size=1, session_reset="background") as pool:
                for number in range(5):
                    assert await pool.fetchval("SELECT $1::int", number) == number
                assert pool.stats().discarded.get(DiscardReason.RESET_FAILED, 0) >= 4


# What a session is reset with


MARK = "SET application_name = 'left behind'"
LOOK = "SELECT current_setting('application_name')"


@pytest.mark.parametrize("sqlstate", LACKING)
async def test_a_reset_does_without_what_the_server_lacks(postgres, sqlstate):
    """As Aurora DSQL, which has RESET ALL and none of the rest: it is found out once a connection, and settings are reset."""
    parts = ("RESET SESSION", "RESET ROLE", "SET SESSION", "SET ROLE", "pg_advisory", "CLOSE ALL", "UNLISTEN")
    with in_front_of(postgres, *lines(containing(*parts), sqlstate)) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            for _ in range(4):
                await pool.execute(MARK)
                assert await pool.fetchval(LOOK) == ""
            assert pool.stats().opened == 1
        sent = [sql for sql in server.statements if "RESET ALL" in sql]
    assert len(sent[0].splitlines()) == 6
    assert [sql.rstrip(";") for sql in sent[1:]] == ["RESET ALL"] * 4


@pytest.mark.parametrize("left_out", reset_text.ROLES)
async def test_a_role_is_reset_in_the_words_that_the_server_has(postgres, left_out):
    """It does not outlive its use where RESET is refused and SET is not."""
    async with postgres.admin() as admin:
        await admin.execute("DROP ROLE IF EXISTS elsewhere_tenant; CREATE ROLE elsewhere_tenant")
    with in_front_of(postgres, *lines(containing(left_out))) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            for statement in ("SET ROLE elsewhere_tenant", "SET SESSION AUTHORIZATION elsewhere_tenant"):
                await pool.execute(statement)
                assert await pool.fetchval("SELECT session_user || '/' || current_user") == "postgres/postgres"
            assert pool.stats().opened == 1


@pytest.mark.parametrize(
    ("refused", "sqlstate"), [("RESET ALL", "0A000"), ("pg_advisory", "42501"), ("UNLISTEN", "XX000")]
)
async def test_what_cannot_be_reset_is_not_handed_on(postgres, refused, sqlstate):
    """Settings that may stay, locks that the role may not release, and an internal error: the session ends with its use."""
    with in_front_of(postgres, *lines(containing(refused), sqlstate)) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            for _ in range(3):
                await pool.execute(MARK)
                assert await pool.fetchval(LOOK) == ""
            assert pool.stats().discarded[DiscardReason.RESET_FAILED] == 3


async def test_a_class_with_a_reset_of_its_own_keeps_it(postgres):
    """Of the pool's own part is left out what the server lacks; the application's is sent as it is, or fails."""

    class Asking(asyncpg.Connection):
        def get_reset_query(self) -> str:
            return "SET application_name = 'asked'"

    with in_front_of(postgres, *lines(containing("RESET SESSION", "SET SESSION"))) as server:
        async with asyncio.timeout(LIMIT):
            async with ResilientPool(server.dsn(postgres.dsn()), max_size=1, connection_class=Asking) as pool:
                for _ in range(3):
                    await pool.execute(MARK)
                    assert await pool.fetchval(LOOK) == "asked"
                assert pool.stats().opened == 1


async def test_an_applications_own_reset_is_called_where_roles_are_lacking(postgres):
    """After all that is left of the pool's own part, which may be nothing."""
    calls = []

    async def reset(connection: asyncpg.Connection) -> None:
        calls.append(await connection.fetchval("SELECT 1"))

    with in_front_of(postgres, *lines(containing("RESET SESSION", "SET SESSION", "RESET ROLE", "SET ROLE"))) as server:
        async with asyncio.timeout(LIMIT):
            async with ResilientPool(
                server.dsn(postgres.dsn()), max_size=1, reset=reset, session_reset="on_release"
            ) as pool:
                for _ in range(3):
                    await pool.fetchval("SELECT 1")
                assert pool.stats().opened == 1
    assert calls == [1, 1, 1]
    assert sum("ROLE" in sql for sql in server.statements) == 3  # the first reset, and each form alone


async def test_a_role_that_cannot_be_asked_after_init_is_not_guessed(postgres):
    """Who may be in the session then is not known, so no reset gives it back: it is closed."""

    async def init(connection: asyncpg.Connection) -> None:
        await connection.execute("SELECT 1")

    with in_front_of(postgres, *lines(containing("session_user"))) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1, init=init) as pool:
            await pool.execute(MARK)
            assert await pool.fetchval(LOOK) == ""
            assert pool.stats().discarded[DiscardReason.RESET_FAILED] == 1


# What became of a COMMIT


@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("sqlstate", CODES)
async def test_a_lost_commit_is_unknown_where_the_server_cannot_be_asked(postgres, table, sqlstate, executed):
    """Neither committed nor rolled back is claimed, and nothing is applied twice."""
    lost = Refusal(at=Point.COMMIT, then=End.RESET, executed=executed, times=1)
    with in_front_of(postgres, *lines(everything, sqlstate), lost) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), deadline=3.0) as pool:
            with pytest.raises(OutcomeUnknownError) as caught:
                await insert(pool, 1)
            assert caught.value.xid is None
    assert sum("INSERT" in sql for sql in server.statements) == 1
    assert await table() == [1] * executed


class Renamed(Proxy):
    """Says that it is another product of another version."""

    async def _until_ready(self, reader: asyncio.StreamReader) -> bytes:
        greeting = await super()._until_ready(reader)
        begin = greeting.index(b"server_version\0") - 5
        (length,) = struct.unpack_from("!I", greeting, begin + 1)
        body = b"server_version\x0015.2-YB-2.25.1.0-b381\0"
        return greeting[:begin] + b"S" + struct.pack("!I", len(body) + 4) + body + greeting[begin + 1 + length :]


async def test_ids_of_transactions_are_not_asked_of_a_database_that_has_others(postgres, table):
    """YugabyteDB has PostgreSQL's functions, whose answers say nothing of its transactions; an older one ends who asks."""
    lost = Refusal(at=Point.COMMIT, then=End.RESET, executed=False, times=1, nth=3)
    with in_front_of(postgres, lost) as server:
        async with Renamed(server.host, server.port) as proxy:
            dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            async with asyncio.timeout(LIMIT), ResilientPool(dsn, max_size=1, statement_cache_size=0) as pool:
                await insert(pool, 1)
                await insert(pool, 2)
                with pytest.raises(OutcomeUnknownError):
                    await insert(pool, 3)
            words = "psql: error: connection to server at 'db', port 5432 failed: Connection refused"
            failing = program(f"import sys; sys.exit({words!r})")
            with pytest.raises(MigrationFailedError) as caught:
                await run_migration(failing, dsn=dsn, on_line=lambda _: None, deadline=5.0)
            assert "could not be asked" in "".join(caught.value.__notes__)
    assert not [sql for sql in server.statements if "pg_current_xact_id" in sql]
    assert await table() == [1, 2]


async def test_a_server_without_savepoints_is_not_asked_for_one_again(postgres, table):
    """Where it was not found out in time what a server has, a refusal costs one attempt, not all of them."""
    busy = lines(containing("to_regprocedure"), "57014")
    with in_front_of(postgres, *busy, *lines(containing("SAVEPOINT"))) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            for entry in (1, 2, 3):
                await insert(pool, entry)
        assert sum("SAVEPOINT" in sql for sql in server.statements) == 1
    assert await table() == [1, 2, 3]


async def test_another_server_is_asked_again(postgres, table):
    """After a failover to one that has everything, a lost COMMIT is resolved there."""
    lost = Refusal(at=Point.COMMIT, then=End.RESET, executed=True, times=1, nth=1)
    with (
        in_front_of(postgres, *lines(everything), Refusal(at=Point.QUERY, matching="gone", then=End.RESET)) as poor,
        in_front_of(postgres, lost) as rich,
    ):
        where = {"host": [poor.host, rich.host], "port": [poor.port, rich.port], "user": "postgres", "ssl": False}
        async with asyncio.timeout(LIMIT), ResilientPool(**where, database="postgres", max_size=1) as pool:
            assert await pool.fetchval("SELECT 1") == 1
            assert pool._connector.server_info.refused_by is not None
            poor.close()
            await insert(pool, 1)
            assert pool.stats().outcomes_unknown == 0
            assert pool._connector.server_info.refused_by is None
        assert any("pg_xact_status" in sql for sql in rich.statements)
        assert sum("pg_is_in_recovery(), EXTRACT" in sql for sql in rich.statements) == 1
    assert await table() == [1]


async def test_a_commit_log_that_the_server_cannot_have_is_warned_of(postgres, table, caplog):
    """Once; transactions go on without it."""
    with in_front_of(postgres, *lines(everything)) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), commit_log="public.log") as pool:
            await insert(pool, 1)
            await insert(pool, 2)
    assert [record.levelno for record in caplog.records if "commit log" in record.getMessage()] == [logging.WARNING]
    assert await table() == [1, 2]


# Reads that were lost


@pytest.mark.parametrize("sqlstate", CODES)
async def test_a_lost_read_is_not_repeated_where_the_catalog_cannot_be_asked(postgres, sqlstate):
    """What it can do is not known there; one that the application calls idempotent is repeated."""
    lost = Refusal(at=Point.QUERY, matching="lower", then=End.RESET, times=1)
    with in_front_of(postgres, *lines(everything, sqlstate), lost) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), max_size=1) as pool:
            with pytest.raises((asyncpg.PostgresConnectionError, ConnectionError, OutcomeUnknownError)):
                await pool.fetchval("SELECT lower('A')")
            assert await pool.fetchval("SELECT lower('A')", idempotent=True) == "a"
    assert sum("lower" in sql for sql in server.statements) == 2


async def test_a_catalog_that_was_refused_is_not_asked_for_again_on_the_same_connection(postgres):
    """Whatever is to be read next; a catalog that has just failed for another reason is."""
    busy = lines(containing("pg_proc"), "57014", times=1)[:1]
    with in_front_of(postgres, *busy, *lines(containing("pg_proc"))) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn())) as pool, pool.acquire() as lease:
            check, driver = pool._leases.read_check, lease._current_driver
            for number in range(4):
                assert not await check.allows(driver, [f"SELECT elsewhere{number}()"])
    assert len(server.sent) == 2


# What stands there


@pytest.mark.parametrize("sqlstate", CODES)
async def test_each_fact_is_learned_although_others_are_refused(postgres, sqlstate):
    """A server that does not say whether it is a standby still says when it closes idle sessions."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE ROLE elsewhere_idle LOGIN SUPERUSER PASSWORD 'x'")
        await admin.execute("ALTER ROLE elsewhere_idle SET idle_session_timeout = '36s'")
    try:
        with in_front_of(postgres, *lines(containing("pg_is_in_recovery"), sqlstate)) as server:
            async with ResilientPool(server.dsn(postgres.dsn(None, "elsewhere_idle", "x"))) as pool:
                await pool.fetchval("SELECT 1")
                info = pool._connector.server_info
                assert (info.idle_session_timeout, info.in_recovery) == (36.0, False)
                assert info.backend_pid == info.handshake_pid
                assert pool.stats().pooler is False
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP ROLE elsewhere_idle")


async def test_a_proxy_whose_server_cannot_be_asked_who_it_is_is_taken_for_a_pooler(postgres):
    """The safe choice: a process id that differs, and a second client that learns nothing. A profile says otherwise."""
    script = lines(containing("pg_stat_get_activity"), "42883")
    with in_front_of(postgres, *script) as server:
        for arguments, size in (({}, 0), ({"statement_cache_size": 100}, 2)):
            async with Proxy(server.host, server.port) as proxy:
                where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres"}
                async with ResilientPool(**where, ssl=False, max_size=1, **arguments) as pool, pool.acquire() as lease:
                    await lease.fetchval("SELECT $1::int", 1)
                    assert await lease.fetchval("SELECT count(*) FROM pg_prepared_statements") == size


@pytest.mark.parametrize("sqlstate", ["0A000", "42601", "XX000"])
async def test_a_server_without_listen_is_asked_once_whether_sessions_are_kept(postgres, sqlstate):
    """Two clients are two logins: not one more for each SET on a lease, which is sent."""
    with in_front_of(postgres, *lines(containing("LISTEN resilient_pool"), sqlstate)) as server:
        async with Proxy(server.host, server.port) as proxy:
            where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres", "ssl": False}
            async with asyncio.timeout(LIMIT), ResilientPool(**where, statement_cache_size=100, max_size=1) as pool:
                for _ in range(4):
                    async with pool.acquire() as connection:
                        await connection.execute("SET search_path TO elsewhere")
                        assert await connection.fetchval("SELECT current_setting('search_path')") == "elsewhere"
            assert proxy.clients == 1 + 2


async def test_cockroachdb_is_sent_a_whole_reset():
    """asyncpg sends it none, so that one caller's settings would be the next one's."""
    with ScriptedServer(parameters={"crdb_version": "CockroachDB CCL v25.2.1"}) as server:
        async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(), max_size=1) as pool:
            await pool.execute(MARK)
            await pool.execute(MARK)
            assert pool.stats().opened == 1
    assert sum(sql.endswith("RESET ALL;") and "RESET ROLE;" in sql for sql in server.statements) >= 1


async def test_a_role_without_rights_on_the_functions_works_on_a_real_server(postgres, table):
    """REVOKE is a way to have none of it, on PostgreSQL itself: nothing is claimed, nothing fails, one role's reset suffices."""
    functions = "pg_is_in_recovery() pg_current_xact_id() pg_xact_status(xid8) pg_control_system() pg_current_wal_lsn()"
    database = "elsewhere_poor"
    await postgres.create_database(database)
    async with postgres.admin(database) as admin:
        await admin.execute("DROP ROLE IF EXISTS elsewhere_poor; CREATE ROLE elsewhere_poor LOGIN PASSWORD 'x'")
        await admin.execute("CREATE TABLE elsewhere (entry int); GRANT ALL ON elsewhere TO elsewhere_poor")
        for function in functions.split():
            await admin.execute(f"REVOKE EXECUTE ON FUNCTION pg_catalog.{function} FROM PUBLIC")
        await admin.execute("REVOKE SELECT ON pg_catalog.pg_proc, pg_catalog.pg_settings FROM PUBLIC")
    try:
        lost = Refusal(at=Point.COMMIT, then=End.RESET, executed=True, times=1, nth=9)
        with in_front_of(postgres, lost) as server:
            dsn = server.dsn(postgres.dsn(database, "elsewhere_poor", "x"))
            async with asyncio.timeout(LIMIT), ResilientPool(dsn, max_size=1, deadline=3.0) as pool:
                for entry in (1, 2):
                    await use(pool, entry)
                await pool.execute(MARK)
                assert await pool.fetchval(LOOK) == ""
                assert pool.stats().opened == 1
                with pytest.raises(OutcomeUnknownError):
                    for entry in range(3, 9):
                        await insert(pool, entry)
    finally:
        async with postgres.admin() as admin:
            await admin.execute(f"DROP DATABASE {database} WITH (FORCE)")
            await admin.execute("DROP ROLE elsewhere_poor")


# Deployments


@pytest.mark.parametrize("sqlstate", ["0A000", "42883", "42501"])
async def test_a_migration_says_that_the_server_has_no_lock_and_runs_without_one_when_told(
    postgres, tmp_path, sqlstate
):
    """It is never run unlocked by itself."""
    (tmp_path / "1.sql").write_text("SELECT 1;\n")
    with in_front_of(postgres, *lines(containing("pg_try_advisory_xact_lock"), sqlstate)) as server:
        dsn = server.dsn(postgres.dsn())
        with pytest.raises(ConfigurationError, match=r"no advisory lock .*--no-lock"):
            await run_migration(program("print(1)"), dsn=dsn, on_line=lambda _: None)
        result = await run_migration(program("print(1)"), dsn=dsn, lock=None, on_line=lambda _: None)
        assert result.output == ("1",)


async def test_a_migration_holds_its_lock_without_the_settings_that_are_refused(postgres):
    """And is locked all the same: a second one waits for it."""
    script = lines(containing("set_config", "pg_stat_activity", "pg_stat_database"), "42601")
    with in_front_of(postgres, *script) as server:
        dsn = server.dsn(postgres.dsn())

        async def migrate() -> None:
            with pytest.raises(MigrationLockedError, match="does not name"):
                await run_migration(program("print(2)"), dsn=dsn, deadline=0.5, on_line=lambda _: None)

        result = await run_migration(migrate, dsn=dsn)
        assert result.attempts == 1
