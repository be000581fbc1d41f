"""How connections are made: arguments, later changes to them, classes of the application's own, and standbys."""

from __future__ import annotations

import asyncio
import socket
import ssl

import asyncpg
import pytest

from resilient_pool import (
    BackoffPolicy,
    ConfigurationError,
    Disposition,
    Fault,
    Outcome,
    PostgresClassifier,
    ResilientPool,
    Verdict,
    create_pool,
)
from resilient_pool.testing import FaultProxy, TlsCertificates

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


class Counting(asyncpg.Connection):
    """A connection with a method of its own, an attribute, and one method changed."""

    motto = "ours"

    async def answer(self, *, plus=0):
        return await super().fetchval("SELECT 42") + plus

    async def fetchval(self, query, *args, **options):
        return await super().fetchval(query, *args, **options) + 1


class ByName(asyncpg.Record):
    """A record whose columns are attributes."""

    def __getattr__(self, name):
        return self[name]


async def test_keywords_are_passed_to_every_connection(make_pool):
    """What asyncpg.connect takes beside the DSN holds for each connection the pool ever makes."""
    async with make_pool(
        max_size=3, max_queries=1, statement_cache_size=0, server_settings={"application_name": "passed on"}
    ) as pool:

        async def look(_):
            async with pool.acquire() as connection:
                await connection.fetch("SELECT $1::int", 1)
                return await connection.fetchrow(
                    "SELECT current_setting('application_name'), (SELECT count(*) FROM pg_prepared_statements),"
                    " pg_backend_pid()"
                )

        rows = await asyncio.gather(*map(look, range(12)))
    assert {tuple(row)[:2] for row in rows} == {("passed on", 0)}
    assert len({row[2] for row in rows}) == 12


async def test_a_command_timeout_bounds_every_statement(make_pool):
    """`command_timeout` cuts one-shot calls and those on leases, and a statement may have its own."""
    async with make_pool(max_size=1, command_timeout=0.05) as pool:
        with pytest.raises(asyncio.TimeoutError):
            await pool.execute("SELECT pg_sleep(60)")
        async with pool.acquire() as connection:
            with pytest.raises(asyncio.TimeoutError):
                await connection.execute("SELECT pg_sleep(60)")
        assert await pool.fetchval("SELECT 1 FROM pg_sleep(0.1)", timeout=10) == 1


async def test_a_pool_can_be_made_without_a_dsn(postgres):
    """Host, port, user and database may all be keywords, and `loop=` is accepted."""
    arguments = postgres.connect_arguments()
    async with ResilientPool(**arguments, loop=asyncio.get_running_loop()) as pool:
        assert await pool.fetchval("SELECT current_database()") == arguments["database"]
    async with create_pool(**arguments, min_size=1) as pool:
        assert pool.get_size() == 1


async def test_a_password_may_be_made_for_each_connection(postgres):
    """A function, plain or asynchronous, is asked for the password at every connect."""
    await postgres.create_role("by_function", "p@ss:wörd/%")
    asked = 0

    def password():
        nonlocal asked
        asked += 1
        return "p@ss:wörd/%"

    async def awaited_password():
        return password()

    try:
        for supplier in (password, awaited_password):
            asked = 0
            arguments = postgres.connect_arguments("postgres", "by_function")
            arguments["password"] = supplier
            async with ResilientPool(**arguments, max_size=1, max_queries=1) as pool:
                for _ in range(3):
                    assert await pool.fetchval("SELECT current_user") == "by_function"
            assert asked == 3
    finally:
        async with postgres.admin() as connection:
            await connection.execute("DROP ROLE by_function")


async def test_a_password_that_is_wrong_ends_at_once(postgres):
    """Waiting does not cure a wrong password, so nobody waits."""
    await postgres.create_role("mistyped", "right")
    try:
        async with asyncio.timeout(5), ResilientPool(postgres.dsn("postgres", "mistyped", "wrong")) as pool:
            for _ in range(2):
                with pytest.raises(asyncpg.InvalidPasswordError):
                    await pool.fetchval("SELECT 1")
    finally:
        async with postgres.admin() as connection:
            await connection.execute("DROP ROLE mistyped")


@both_loops
async def test_connect_arguments_can_be_changed(make_pool, dsn):
    """New arguments hold for new connections; `expire_connections()` hurries, in a lease and when idle."""
    async with make_pool(max_size=1, server_settings={"application_name": "first"}) as pool:

        async def name():
            return await pool.fetchval("SHOW application_name")

        async with pool.acquire() as connection:
            assert await connection.fetchval("SHOW application_name") == "first"
            pool.set_connect_args(dsn, server_settings={"application_name": "second"})
            await pool.expire_connections()
            assert await connection.fetchval("SHOW application_name") == "first"
        assert await name() == "second"
        pool.set_connect_args(dsn, server_settings={"application_name": "third"})
        assert await name() == "second"
        await pool.expire_connections()
        assert await name() == "third"
        async with pool.acquire() as connection:
            assert connection.get_settings().application_name == "third"


async def test_changed_arguments_need_no_dsn(make_pool, postgres):
    """They may be keywords alone; what was given before is not kept."""
    async with make_pool(max_size=1, server_settings={"lock_timeout": "7s"}) as pool:
        pool.set_connect_args(**postgres.connect_arguments(), statement_cache_size=0)
        assert await pool.fetchval("SHOW lock_timeout") == "0"


@both_loops
async def test_the_application_may_connect_by_itself(make_pool, dsn):
    """`connect=` is awaited with what asyncpg.connect would get, and its connection is used."""
    calls = []

    async def connect(*arguments, **keywords):
        calls.append(keywords)
        connection = await asyncpg.connect(*arguments, **keywords)
        await connection.execute("SET lock_timeout = '9s'")
        return connection

    async with make_pool(
        max_size=1, connect=connect, connection_class=Counting, server_settings={"application_name": "by itself"}
    ) as pool:
        assert await pool.fetchval("SELECT 1") == 2
        async with pool.acquire() as connection:
            assert isinstance(connection, Counting)
            assert await connection.answer() == 42
    assert len(calls) == 1
    assert calls[0]["connection_class"] is Counting


async def test_connect_is_called_as_asyncpgs_pool_calls_it(postgres, dsn):
    """The DSN first and unread, the other words as they were given, unknown ones too: as Cloud SQL's connector needs it."""
    calls = []

    async def getconn(instance, **options):
        calls.append((instance, options))
        kept = {name: options[name] for name in ("loop", "connection_class", "record_class")}
        return await asyncpg.connect(dsn, **kept)

    words = {"ip_type": "private", "user": "u", "password": "p", "timeout": 7, "db": 5}
    for create in (asyncpg.create_pool, create_pool):
        async with create("project:region:instance", connect=getconn, min_size=1, max_size=1, **words) as pool:
            assert await pool.fetchval("SELECT 42") == 42
    (theirs, their_options), (ours, our_options) = calls
    assert ours == theirs == "project:region:instance"
    assert {**our_options, "loop": None} == {**their_options, "loop": None}


async def test_connect_is_called_with_the_words_that_were_set_last(dsn):
    """`set_connect_args` takes what the function takes, and nothing of what was given before is left."""
    calls = []

    async def getconn(instance, **options):
        calls.append((instance, {name: options[name] for name in options if name.startswith("my_")}))
        return await asyncpg.connect(dsn)

    async with create_pool("first", connect=getconn, my_word=1, max_size=1) as pool:
        await pool.fetchval("SELECT 1")
        pool.set_connect_args(["second"], my_other=2)
        await pool.expire_connections()
        await pool.fetchval("SELECT 1")
        pool.set_connect_args()
        await pool.expire_connections()
        await pool.fetchval("SELECT 1")
    assert calls == [("first", {"my_word": 1}), (["second"], {"my_other": 2}), (None, {})]


async def test_a_connector_that_returns_a_closed_connection_is_refused_at_once(dsn):
    """Waiting would not help: it returns one that it has kept."""
    kept = await asyncpg.connect(dsn)
    await kept.close()

    async def getconn(_instance, **_options):
        return kept

    async with create_pool("somewhere", connect=getconn, min_size=0) as pool:
        with pytest.raises(asyncpg.InterfaceError, match="connect= returned a closed connection; it must open a new"):
            await pool.fetchval("SELECT 1")


async def test_a_connector_that_hangs_is_cut_by_the_timeout(dsn):
    """The pool's limits hold, whatever the function does with its own."""

    async def getconn(_instance, **_options):
        await asyncio.Event().wait()

    async with create_pool("x", connect=getconn, timeout=0.2, deadline=0.5) as pool:
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1")


async def test_what_a_connector_raises_is_judged_as_any_failure_to_connect(dsn):
    """What the network says is waited out; what only the application knows, its classifier may say."""

    class QuotaError(Exception):
        pass

    failures = [ConnectionRefusedError("metadata server"), QuotaError("later"), OSError("no route")]

    async def getconn(_instance, **_options):
        if failures:
            raise failures.pop()
        return await asyncpg.connect(dsn)

    later = Verdict(fault=Fault.UNREACHABLE, outcome=Outcome.NOT_EXECUTED, connection=Disposition.DISCARD)
    classifier = PostgresClassifier().with_rule(lambda failure: isinstance(failure.error, QuotaError), later)
    prompt = BackoffPolicy(base=0.01, max_attempts=None, max_elapsed=60.0)
    async with create_pool("x", connect=getconn, classifier=classifier, reconnect=prompt) as pool:
        assert await pool.fetchval("SELECT 42") == 42
    assert failures == []


async def test_what_connect_returns_must_be_a_connection(make_pool):
    """A `connect=` that returns something else is told so, by name."""

    async def connect(*_arguments, **_keywords):
        return object()

    async with make_pool(connect=connect) as pool:
        with pytest.raises(asyncpg.InterfaceError, match=r"connect.*return.*object"):
            await pool.acquire()
        with pytest.raises(asyncpg.InterfaceError, match=r"connect.*return.*object"):
            await pool.fetchval("SELECT 1")


async def test_what_connect_raises_reaches_the_caller(make_pool):
    """An error of the application's own passes unchanged, after one attempt."""
    calls = 0

    async def connect(*_arguments, **_keywords):
        nonlocal calls
        calls += 1
        raise LookupError("no such tenant")

    async with make_pool(connect=connect, max_size=1) as pool:
        with pytest.raises(LookupError, match="no such tenant"):
            await pool.fetchval("SELECT 1")
        assert calls == 1


@both_loops
async def test_a_connection_class_brings_its_methods(make_pool):
    """Leases have the class's own methods and attributes, are instances of it, and use the methods it changes."""
    async with make_pool(max_size=2, connection_class=Counting) as pool:
        async with pool.acquire() as connection:
            assert isinstance(connection, Counting)
            assert connection.motto == "ours"
            assert await connection.answer() == 42
            assert await connection.answer(plus=1) == 43
            assert await connection.fetchval("SELECT 1") == 2
        assert await pool.fetchval("SELECT 1") == 2
        with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
            answer = connection.answer()
            await answer


async def test_an_attribute_that_no_connection_has_is_missing(make_pool):
    """A misspelt method is an `AttributeError`, so that `hasattr` tells the truth."""
    async with make_pool() as pool, pool.acquire() as connection:
        assert not hasattr(connection, "fetchone")
        with pytest.raises(AttributeError, match="fetchone"):
            connection.fetchone  # noqa: B018 - reading it is the test


@both_loops
async def test_a_record_class_is_used_everywhere(make_pool):
    """The pool's `record_class` shapes what one-shot calls, leases, prepared statements and cursors return."""
    async with make_pool(max_size=1, record_class=ByName) as pool:
        assert (await pool.fetchrow("SELECT 1 AS one")).one == 1
        assert [row.one for row in await pool.fetch("SELECT 1 AS one")] == [1]
        async with pool.acquire() as connection, connection.transaction():
            assert (await connection.fetchrow("SELECT 1 AS one")).one == 1
            statement = await connection.prepare("SELECT 1 AS one")
            assert (await statement.fetchrow()).one == 1
            assert [row.one async for row in connection.cursor("SELECT 1 AS one")] == [1]


async def test_a_call_may_have_its_own_record_class(make_pool):
    """`record_class=` on one call overrules the pool's."""
    async with make_pool(max_size=1) as pool:
        assert (await pool.fetchrow("SELECT 1 AS one", record_class=ByName)).one == 1
        assert [row.one for row in await pool.fetch("SELECT 1 AS one", record_class=ByName)] == [1]
        assert type(await pool.fetchrow("SELECT 1 AS one")) is asyncpg.Record
        async with pool.acquire() as connection:
            assert (await connection.fetchrow("SELECT 1 AS one", record_class=ByName)).one == 1


async def test_the_systems_authorities_are_trusted_when_it_is_asked_for(postgres, tmp_path, monkeypatch):
    """`sslrootcert=system` checks the certificate against the system's store, and the name in it."""
    certificates = TlsCertificates("localhost")
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy:
        dsn = f"postgresql://postgres@localhost:{proxy.port}/postgres?sslrootcert=system"
        async with ResilientPool(dsn, deadline=2) as pool:
            with pytest.raises(
                ssl.SSLCertVerificationError, match=r"self-signed certificate|unable to get local issuer"
            ):
                await pool.fetchval("SELECT 1")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.write_ca(tmp_path / "ca.pem")))
        async with ResilientPool(dsn) as pool, pool.acquire() as connection:
            assert await connection.fetchval("SELECT 42") == 42
            assert connection._con._transport.get_extra_info("ssl_object").version().startswith("TLS")
        async with ResilientPool(dsn.replace("localhost", "127.0.0.1"), deadline=2) as pool:
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                await pool.fetchval("SELECT 1")


async def test_an_unknown_argument_is_named(make_pool):
    """A misspelt argument is an error at once, not at the first connect."""
    with pytest.raises((TypeError, ValueError), match="max_sise"):
        make_pool(max_sise=3)


@pytest.fixture(scope="module")
def standby(postgres):
    """A hot standby of the shared server, for this module."""

    async def start():
        return await postgres.standby("tests_standby")

    server = asyncio.run(start())
    yield server
    asyncio.run(server.close())


@both_loops
async def test_a_pool_reads_from_a_standby(standby):
    """A pool on a hot standby serves many readers, in transactions and cursors too."""
    async with ResilientPool(standby.dsn(), min_size=2, max_size=4) as pool:
        rows = await asyncio.gather(*(pool.fetchrow("SELECT $1::int, pg_is_in_recovery()", n) for n in range(20)))
        assert [tuple(row) for row in rows] == [(number, True) for number in range(20)]
        async with pool.acquire() as connection, connection.transaction(readonly=True):
            cursor = await connection.cursor("SELECT generate_series(1, 3)")
            assert [row[0] for row in await cursor.fetch(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("wanted", "in_recovery"),
    [("primary", False), ("read-write", False), ("standby", True), ("read-only", True), ("prefer-standby", True)],
)
async def test_a_pool_finds_the_kind_of_server_it_wants(postgres, standby, wanted, in_recovery):
    """With two hosts, `target_session_attrs` decides which is used, on every connection."""
    for hosts in ((postgres, standby), (standby, postgres)):
        dsn = "postgresql://postgres@" + ",".join(f"{server.host}:{server.port}" for server in hosts) + "/postgres"
        async with ResilientPool(dsn, max_size=2, target_session_attrs=wanted) as pool:
            answers = await asyncio.gather(*(pool.fetchval("SELECT pg_is_in_recovery()") for _ in range(4)))
        assert set(answers) == {in_recovery}


async def test_a_write_on_a_standby_is_refused_in_the_end(standby):
    """When there is no primary to be found, the write's own error is raised within the deadline."""
    async with ResilientPool(standby.dsn(), max_size=1, deadline=0.5) as pool:
        async with asyncio.timeout(5):
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await pool.execute("CREATE TABLE not_here (id int)")
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("source", ["argument", "environment", "DSN"])
async def test_a_port_without_a_host_is_this_machines(postgres, make_pool, monkeypatch, source):
    """The driver looks for a socket's directory first, and then at localhost, as libpq's programs do."""
    monkeypatch.delenv("PGHOST", raising=False)
    if source == "environment":
        monkeypatch.setenv("PGPORT", str(postgres.port))
    dsn = f"postgresql:///postgres?port={postgres.port}" if source == "DSN" else None
    arguments = {"port": postgres.port} if source == "argument" else {}
    async with make_pool(dsn, user="postgres", database="postgres", **arguments) as pool:
        assert await pool.fetchval("SELECT current_setting('port')::int") == postgres.port


def test_several_ports_without_hosts_are_refused():
    """Which of them belongs to which place nothing says."""
    with pytest.raises(
        ConfigurationError, match="port must be one number, or one for each of the 1 hosts, not 2 numbers"
    ):
        ResilientPool(port=[5432, 5433])


@both_loops
async def test_a_silence_longer_than_the_kernel_counts_is_as_long_as_it_can(make_pool):
    """No connection fails for that, and the options that come after it are set too."""
    async with make_pool(ssl=False, tcp_user_timeout=1e308) as pool, pool.acquire() as connection:
        sock = connection._con._transport.get_extra_info("socket")
        found = [
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPCNT)
        ]
        assert found == [2**31 - 1, 32_767, 3]
