"""What each profile promises, seen on real servers that have the service's limits."""

from __future__ import annotations

import asyncio
import logging

import asyncpg
import pytest
from test_other_servers import containing, lines
from test_poolers import Proxy
from waiting import eventually

from resilient_pool import ResilientPool, profiles
from resilient_pool.events import DiscardReason
from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedClock, ScriptedServer, TlsCertificates

LIMIT = 20.0
EXPLAINED = profiles.EXPLAINED
CUT_WHEN_IDLE = [name for name, profile in EXPLAINED.items() if profile.idle_cut]
CUT_WHEN_OLD = [name for name, profile in EXPLAINED.items() if profile.age_cut]
ENCRYPTED = [name for name, profile in EXPLAINED.items() if "ssl" in profile.choices]
POOLED = [name for name, profile in EXPLAINED.items() if "session_reset" in profile.choices]


def unencrypted(name: str, **changes: object) -> dict[str, object]:
    """A profile for a server of the tests, which speaks no TLS."""
    return getattr(profiles, name) | {"ssl": False} | changes


def in_front_of(postgres: EmbeddedPostgres, *script: Refusal, **arguments: object) -> ScriptedServer:
    return ScriptedServer(*script, host=postgres.host, port=postgres.port, **arguments)


# Times


@pytest.mark.parametrize("name", CUT_WHEN_IDLE)
async def test_nothing_is_open_any_more_when_the_service_would_cut_it(postgres, name):
    """Not even where it would not say so, as a load balancer that forgets: the next caller finds no dead connection."""
    clock = ScriptedClock(auto=False)
    with in_front_of(postgres) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), **unencrypted(name, clock=clock, max_size=3)) as pool:
            await asyncio.gather(*(pool.fetchval("SELECT pg_sleep(0.02)") for _ in range(3)))
            opened = pool.stats().opened
            await clock.run(EXPLAINED[name].idle_cut - 1)
            await eventually(lambda: server.open_connections == 0)
            assert await pool.fetchval("SELECT 1") == 1
            stats = pool.stats()
            assert stats.discarded == {DiscardReason.IDLE: opened}
            assert (stats.stale_found, stats.pings_failed) == (0, 0)


@pytest.mark.parametrize("name", CUT_WHEN_OLD)
async def test_a_connection_in_steady_use_is_replaced_before_the_service_ends_it(postgres, name):
    """By its age on the pool's clock, however often it is used; nothing fails on the way."""
    clock, limit = ScriptedClock(auto=False), EXPLAINED[name].age_cut
    born: dict[int, float] = {}
    async with ResilientPool(postgres.dsn(), **unencrypted(name, clock=clock, max_size=1)) as pool:
        while clock.now() < 2.5 * limit:
            pid = await pool.fetchval("SELECT pg_backend_pid()")
            assert clock.now() - born.setdefault(pid, clock.now()) < limit
            clock.advance(limit / 60)
    assert len(born) >= 3


# TLS


@pytest.fixture(scope="module")
def certificates() -> TlsCertificates:
    return TlsCertificates()


@pytest.mark.parametrize("name", ENCRYPTED)
async def test_no_client_goes_unencrypted_to_a_service_that_wants_tls(postgres, certificates, name):
    """What does not speak it is sent no login, although the DSN says nothing of TLS."""
    with in_front_of(postgres, tls=certificates) as server:
        async with (
            ResilientPool(server.dsn(postgres.dsn()), **getattr(profiles, name)) as pool,
            pool.acquire() as lease,
        ):
            assert lease._current_driver.connection._transport.get_extra_info("ssl_object") is not None
    with in_front_of(postgres) as server:
        arguments = getattr(profiles, name) | {"deadline": 0.2}
        async with ResilientPool(server.dsn(postgres.dsn()), **arguments) as pool:
            with pytest.raises((ConnectionError, asyncpg.InterfaceError, TimeoutError)):
                await pool.fetchval("SELECT 1")
        assert (server.attempts > 0, server.statements) == (True, ())


# Poolers


class Forbidding(Proxy):
    """A pooler in transaction mode that ends a client which names a statement."""

    named = 0

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        request = await super()._request(reader)
        if request[:1] == b"P" and request[5:6] != b"\0":
            self.named += 1
            raise ConnectionError
        return request


@pytest.mark.parametrize("name", [name for name in POOLED if name != "PGDOG"])
async def test_a_pooler_that_forbids_named_statements_sees_none_and_no_reset(postgres, name, caplog):
    """From the first connection on, without a second client to find out: calls, leases, transactions, many at a time."""
    async with Forbidding(postgres.host, postgres.port, sessions=2) as proxy:
        with in_front_of_port(proxy.port) as server:
            async with asyncio.timeout(LIMIT), ResilientPool(server.dsn(postgres.dsn()), **unencrypted(name)) as pool:
                answers = await asyncio.gather(*(use(pool, number) for number in range(12)))
                assert answers == list(range(12))
                clients = pool.stats().opened
        assert proxy.named == 0
        assert proxy.clients == clients
    assert not [sql for sql in server.statements if "RESET" in sql or "pg_advisory" in sql]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def use(pool: ResilientPool, number: int) -> int:
    assert await pool.fetchval("SELECT $1::int", number) == number
    async with pool.acquire() as connection, connection.transaction():
        assert await connection.fetchval("SELECT $1::int + 1", number) == number + 1
    async for attempt in pool.transaction():
        async with attempt as connection:
            answer = await connection.fetchval("SELECT $1::int + 0", number)
    return answer


def in_front_of_port(port: int) -> ScriptedServer:
    return ScriptedServer(host="127.0.0.1", port=port)


async def test_a_pooler_that_follows_named_statements_is_sent_them(postgres):
    """PgDog: one round trip a query. One session for all stands here for what it follows."""
    async with Proxy(postgres.host, postgres.port, sessions=1) as proxy:
        where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres"}
        async with asyncio.timeout(LIMIT), ResilientPool(**where, **unencrypted("PGDOG", max_size=1)) as pool:
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT $1::int", 1)
                before = proxy.requests
                for number in range(10):
                    assert await connection.fetchval("SELECT $1::int", number) == number
                assert proxy.requests - before == 10


async def test_no_more_statements_are_named_than_supabase_allows_a_client(postgres):
    """A hundred are the end of the connection there, and asyncpg drops the oldest only after the next one."""
    async with ResilientPool(postgres.dsn(), **unencrypted("SUPABASE_SESSION", max_size=1)) as pool:
        async with pool.acquire() as connection:
            for number in range(120):
                await connection.fetchval(f"SELECT {number} + $1::int", 1)
            assert 40 < await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") <= 51


async def test_rds_proxy_is_sent_nothing_that_pins_a_session(postgres):
    """No named statement, no SET and no reset, as long as the application sends none."""
    with in_front_of(postgres) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), **unencrypted("RDS_PROXY", max_size=1)) as pool:
            for number in range(3):
                await use(pool, number)
            assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
            assert pool.stats().resets == 0
            await pool.execute("SET application_name = 'pinned'")
            assert await pool.fetchval("SELECT current_setting('application_name')") == ""
    own = [sql.upper() for sql in server.statements]
    pinning = [sql for sql in own if sql.startswith(("SET", "RESET", "PREPARE", "DISCARD")) or "SET_CONFIG" in sql]
    assert [sql[:3] for sql in pinning] == ["SET", "RES"]


# Other servers


DSQL = lines(
    containing(
        *(
            "pg_backend_pid",
            "pg_is_in_recovery",
            "current_setting",
            "pg_catalog",
            "pg_advisory",
            "SAVEPOINT",
            "CLOSE ALL",
        ),
        *("UNLISTEN", "RESET SESSION", "RESET ROLE", "SET SESSION", "SET ROLE"),
    )
)


async def test_aurora_dsql_is_used_without_what_it_lacks_and_conflicts_are_repeated(postgres):
    """No savepoint, no advisory lock, no catalog; a conflict is said at COMMIT only."""
    conflict = Refusal(
        at=Point.COMMIT,
        severity="ERROR",
        sqlstate="40001",
        message="change conflicts with another transaction, please retry: (OC000)",
        then=End.READY,
        times=2,
    )
    async with postgres.admin() as admin:
        await admin.execute("DROP TABLE IF EXISTS dsql; CREATE TABLE dsql (entry int)")
    with in_front_of(postgres, *DSQL, conflict) as server:
        dsn = server.dsn(postgres.dsn())
        async with asyncio.timeout(LIMIT), ResilientPool(dsn, **unencrypted("AURORA_DSQL", max_size=1)) as pool:
            async for attempt in pool.transaction():
                async with attempt as connection:
                    await connection.execute("INSERT INTO dsql VALUES ($1)", 1)
            assert attempt.number == 3
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT $1::int", 1)
                before = len(server.statements)
                await connection.fetchval("SELECT $1::int", 1)
                assert len(server.statements) == before + 1
            await pool.execute("SET application_name = 'left'")
            await pool.fetchval("SELECT 1")
            assert pool.stats().opened == 1
    async with postgres.admin() as admin:
        assert await admin.fetch("SELECT entry FROM dsql") == [(1,)]
        await admin.execute("DROP TABLE dsql")


async def test_cockroachdb_is_used_with_named_statements_although_it_cannot_be_asked_who_it_is(postgres):
    """And its restarts are repeated."""
    restart = Refusal(
        at=Point.COMMIT,
        severity="ERROR",
        sqlstate="40001",
        message="restart transaction: TransactionRetryWithProtoRefreshError",
        then=End.READY,
        nth=2,  # the first one is the application's own
        times=1,
    )
    lacking = lines(
        containing("pg_current_xact_id", "pg_xact_status", "pg_walfile", "pg_advisory", "pg_stat_get"), "42883"
    )
    with in_front_of(postgres, *lacking, restart) as server:
        async with Proxy(server.host, server.port) as proxy:  # whose process id is not the server's
            where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres"}
            async with asyncio.timeout(LIMIT), ResilientPool(**where, **unencrypted("COCKROACHDB", max_size=1)) as pool:
                assert [await use(pool, number) for number in range(3)] == [0, 1, 2]
                async with pool.acquire() as connection:
                    await connection.fetchval("SELECT $1::int", 1)
                    before = proxy.requests
                    await connection.fetchval("SELECT $1::int", 1)
                    assert proxy.requests == before + 1
            assert proxy.clients == 1
