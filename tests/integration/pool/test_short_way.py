"""A statement that the driver has cached is given to the protocol directly, and everything is as with the driver's methods."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import itertools
import json
import subprocess
import sys
import types

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.pooling import driver
from resilient_pool.testing import FaultProxy, TlsCertificates

TABLE = """
    DROP TABLE IF EXISTS short_way; DROP TYPE IF EXISTS short_way_pair; DROP TYPE IF EXISTS short_way_mood;
    CREATE TYPE short_way_mood AS ENUM ('sad', 'glad');
    CREATE TYPE short_way_pair AS (a int, b text);
    CREATE TABLE short_way (id int PRIMARY KEY, name text, mood short_way_mood, pair short_way_pair, data jsonb);
    INSERT INTO short_way SELECT n, 'n' || n, 'glad', (n, 'x')::short_way_pair, '{"n": 1}' FROM generate_series(1, 5) n;
"""
both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


class Ways:
    """One connection for each way, and the number of times that the driver's own way was taken on the first."""

    def __init__(self, short, public):
        self.short, self.public = short, public

    async def both(self, method, query, *args, **options):
        """Call a method on both ways, and return what each did."""
        return [
            await outcome(call_short(self.short, method, query, args, **options)),
            await outcome(getattr(self.public, method)(query, *args, **options)),
        ]


def call_short(connection, method, query, args, *, timeout=None, record_class=None, column=0):
    """Call one of the functions that may take the short way."""
    if method == "execute":
        return driver.execute(connection, query, args, timeout)
    if method == "fetchval":
        return driver.fetchval(connection, query, args, timeout, column)
    return getattr(driver, method)(connection, query, args, timeout, record_class)


async def outcome(work):
    """Return what was returned or raised, in a form that can be compared."""
    try:
        result = await work
    except Exception as error:
        return type(error), str(error), {k: v for k, v in vars(error).items() if k != "server_source_line"}
    rows = result if isinstance(result, list) else [result]
    return (
        type(result),
        result,
        [type(row) for row in rows],
        [list(r.items()) for r in rows if isinstance(r, asyncpg.Record)],
    )


@pytest.fixture
async def ways(dsn):
    """Two connections, and a table."""
    short, public = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await short.execute(TABLE)
    await public.fetchval("SELECT 1")
    yield Ways(short, public)
    for connection in (short, public):
        await connection.close(timeout=5)


@pytest.fixture
def directly(monkeypatch):
    """Count what takes the short way."""
    taken = []
    original = driver._execute_cached

    def count(*args, **options):
        taken.append(args[2])
        return original(*args, **options)

    monkeypatch.setattr(driver, "_execute_cached", count)
    return taken


CALLS = [
    ("fetch", "SELECT * FROM short_way ORDER BY id", (), {}),
    ("fetch", "SELECT * FROM short_way WHERE id = $1", (2,), {}),
    ("fetch", "SELECT * FROM short_way WHERE id = $1", (99,), {}),
    ("fetch", "UPDATE short_way SET name = $2 WHERE id = $1 RETURNING id, name", (2, "two"), {}),
    ("fetch", "UPDATE short_way SET name = 'three' WHERE id = $1", (3,), {}),
    ("fetchrow", "SELECT * FROM short_way ORDER BY id", (), {}),
    ("fetchrow", "SELECT * FROM short_way WHERE id = $1", (99,), {}),
    ("fetchval", "SELECT id, name FROM short_way ORDER BY id", (), {"column": 1}),
    ("fetchval", "SELECT id, name FROM short_way ORDER BY id", (), {"column": 7}),
    ("fetchval", "SELECT id FROM short_way WHERE id = $1", (99,), {}),
    ("fetchval", "SELECT $1::timestamptz", (dt.datetime(2026, 1, 1, tzinfo=dt.UTC),), {}),
    ("fetchval", "SELECT array_agg(id) FROM short_way", (), {}),
    ("execute", "UPDATE short_way SET name = 'x' WHERE id < $1", (4,), {}),
    ("execute", "INSERT INTO short_way (id) VALUES ($1) ON CONFLICT DO NOTHING", (1,), {}),
    ("execute", "SELECT * FROM short_way WHERE id = $1", (1,), {}),
    ("execute", "SELECT 1", (), {}),
    ("fetch", "SELECT 1 / $1::int", (0,), {}),
    ("execute", "INSERT INTO short_way (id) VALUES ($1)", (1,), {}),
    ("fetch", "SELECT * FROM short_way WHERE id = $1", ("no number",), {}),
    ("fetch", "SELECT * FROM short_way WHERE id = $1", (), {}),
    ("fetch", "SELECT * FROM short_way WHERE id = $1", (1, 2), {}),
    ("fetch", "SELECT * FROM nothing_of_this_name", (), {}),
    ("fetch", "SELECT 1", (), {"timeout": 0}),
    ("fetch", "SELECT 1", (), {"record_class": type("Mine", (asyncpg.Record,), {})}),
    ("fetch", "SELECT 1", (), {"record_class": int}),
]


@pytest.mark.parametrize(("method", "query", "args", "options"), CALLS)
@both_loops
async def test_both_ways_give_the_same(ways, directly, method, query, args, options):
    """Rows, records, statuses and errors with all their attributes, time after time."""
    for _ in range(4):
        short, public = await ways.both(method, query, *args, **options)
        assert short == public
    refused = options.keys() & {"timeout", "record_class"} or query == "SELECT 1" or "nothing_of" in query
    assert len(directly) == (0 if refused else 3)


@both_loops
async def test_a_time_limit_is_heeded(ways, directly):
    """The driver's own method is asked, also when the statement is cached."""
    for query, args, options in (("SELECT pg_sleep($1)", (0,), {}), ("SELECT pg_sleep($1)", (5,), {"timeout": 0.05})):
        short, public = await ways.both("fetchval", query, *args, **options)
        assert short == public
    assert short[0] is TimeoutError
    assert directly == []


@both_loops
async def test_both_ways_give_the_same_over_tls(postgres, directly):
    """Whatever is between the protocol and the server."""
    certificates = TlsCertificates()
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy:
        opened = [await asyncpg.connect(proxy.dsn(postgres.dsn()), ssl=certificates.client_context()) for _ in range(2)]
        ways = Ways(*opened)
        await ways.short.execute(TABLE)
        await ways.public.fetchval("SELECT 1")
        for method, query, args, options in CALLS:
            for _ in range(2):
                short, public = await ways.both(method, query, *args, **options)
                assert short == public
        assert len(directly) > 10
        for connection in opened:
            await connection.close(timeout=5)


@both_loops
async def test_codecs_are_heeded(ways, directly):
    """Also those that are set after a statement was cached."""
    query = "SELECT data, mood, pair FROM short_way WHERE id = $1"
    for _ in range(2):
        short, public = await ways.both("fetchrow", query, 1)
        assert short == public
    for connection in (ways.short, ways.public):
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
    for _ in range(2):
        short, public = await ways.both("fetchrow", query, 1)
        assert short == public
        assert short[1]["data"] == {"n": 1}
    assert directly == [query] * 2


@pytest.mark.parametrize("in_transaction", [False, True])
@both_loops
async def test_a_table_that_changes_in_between_is_noticed_alike(ways, directly, in_transaction):
    """The statement is prepared anew, unless a transaction is open."""
    query, connections = "SELECT * FROM short_way WHERE id = $1", (ways.short, ways.public)
    for _ in range(2):
        short, public = await ways.both("fetch", query, 1)
        assert short == public
    await ways.short.execute("ALTER TABLE short_way ADD COLUMN more int")
    if in_transaction:
        for connection in connections:
            await connection.execute("BEGIN")
        short, public = await ways.both("fetch", query, 1)
        assert short == public
        assert short[0] is asyncpg.InvalidCachedStatementError
        for connection in connections:
            await connection.execute("ROLLBACK")
    short, public = await ways.both("fetch", query, 1)
    assert short == public
    assert short[0] is list
    assert "more" in short[1][0].keys()  # noqa: SIM118 - a record's `in` looks among its values
    assert len(ways.short._stmt_cache) == len(ways.public._stmt_cache)
    assert len(directly) == 2


@both_loops
async def test_a_type_that_changes_in_between_is_noticed_alike(ways):
    """The driver's error is raised once, and what was known of types is forgotten."""
    query = "SELECT pair FROM short_way WHERE id = $1"
    for _ in range(2):
        short, public = await ways.both("fetchrow", query, 1)
        assert short == public
    await ways.short.execute("ALTER TYPE short_way_pair ADD ATTRIBUTE c int")
    short, public = await ways.both("fetchrow", query, 1)
    assert short == public
    assert short[0] is asyncpg.OutdatedSchemaCacheError
    short, public = await ways.both("fetchrow", query, 1)
    assert short == public
    assert short[1]["pair"]["c"] is None


@both_loops
async def test_the_least_recently_used_statement_leaves_the_cache_on_both_ways(dsn, directly):
    """What takes the short way counts as used."""
    caches = []
    for short in (True, False):
        connection = await asyncpg.connect(dsn, statement_cache_size=3)
        for number in (1, 2, 3, 1, 1, 4, 1, 5, 2):
            query = f"SELECT {number} + $1::int"
            value = await (
                driver.fetchval(connection, query, (1,), None, 0) if short else connection.fetchval(query, 1)
            )
            assert value == number + 1
        caches.append([key[0] for key in connection._stmt_cache._entries])
        await connection.close()
    assert caches[0] == caches[1] == [f"SELECT {number} + $1::int" for number in (1, 5, 2)]
    assert len(directly) == 3


@pytest.mark.parametrize("method", ["fetch", "fetchrow", "fetchval", "execute"])
@both_loops
async def test_a_second_operation_is_refused_alike(ways, method):
    """Whichever way the first took, and the connection goes on working."""
    slow = "SELECT pg_sleep($1)"
    for connection in (ways.short, ways.public):
        await connection.fetch(slow, 0)
        first = asyncio.ensure_future(driver.fetch(connection, slow, (0.1,), None, None))
        await asyncio.sleep(0)  # no answer can have come before the next ones are refused
        with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
            await call_short(connection, method, slow, (0,))
        with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
            await getattr(connection, method)(slow, 0)
        assert len(await first) == 1
    both = [driver.fetch(ways.short, slow, (0,), None, None) for _ in range(2)]
    results = await asyncio.gather(*both, return_exceptions=True)
    assert [type(result) for result in results] == [list, asyncpg.InterfaceError]
    assert await ways.short.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize(
    "query", ["SELECT pg_sleep($1)", "UPDATE short_way SET name = pg_sleep($1)::text WHERE id = 1"]
)
@both_loops
async def test_a_cancellation_at_any_turn_leaves_the_connection_as_it_would(ways, turns, query):
    """The statement is cancelled on the server, and the next one waits for that."""
    for short in (True, False):
        connection = ways.short if short else ways.public
        await connection.fetch(query, 0)
        # A request to cancel that comes before the statement has begun has no effect.
        work = driver.fetch(connection, query, (0.2,), None, None) if short else connection.fetch(query, 0.2)
        task = asyncio.ensure_future(work)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            assert await driver.fetchval(connection, "SELECT $1::int", (turns,), None, 0) == turns
        assert not connection._stmt_exclusive_section._acquired


@both_loops
async def test_a_connection_that_is_lost_or_closed_says_so_alike(ways, dsn, eventually):
    """With the same errors, whether it is lost under the statement, or was closed before."""
    slow, errors = "SELECT pg_sleep($1)", []
    killer = await asyncpg.connect(dsn)
    for short in (True, False):
        connection = ways.short if short else ways.public
        await connection.fetch(slow, 0)
        work = driver.fetch(connection, slow, (5,), None, None) if short else connection.fetch(slow, 5)
        task = asyncio.ensure_future(outcome(work))
        await asyncio.sleep(0.05)
        await killer.execute(f"SELECT pg_terminate_backend({connection.get_server_pid()})")
        lost = await task
        await eventually(connection.is_closed)
        after = await outcome(driver.fetch(connection, slow, (0,), None, None) if short else connection.fetch(slow, 0))
        errors.append((lost, after))
    await killer.close()
    for lost, after in errors:
        assert lost[0] in (asyncpg.AdminShutdownError, asyncpg.ConnectionDoesNotExistError)
        assert after[:2] == (asyncpg.InterfaceError, "connection is closed")


def _replace(owner, name, monkeypatch, calls):
    original = getattr(owner, name)

    async def replaced(self, *args, **options):
        calls.append(name)
        return await original(self, *args, **options)

    monkeypatch.setattr(owner, name, replaced)


class _Wrapper:
    """Stands in a class for a method that it calls, as wrapt's wrappers do, and passes for it."""

    def __init__(self, wrapped, calls):
        self._wrapped, self._calls = wrapped, calls

    def __getattr__(self, name):
        return getattr(self._wrapped, name)

    def __get__(self, instance, owner):
        return self if instance is None else functools.partial(self, instance)

    def __eq__(self, other):
        return self._wrapped == other

    def __hash__(self):
        return hash(self._wrapped)

    def __call__(self, *args, **options):
        self._calls.append(1)
        return self._wrapped(*args, **options)


def _wrap(owner, name, monkeypatch, calls):
    monkeypatch.setattr(owner, name, _Wrapper(getattr(owner, name), calls))


WRAPPED = [
    "fetch",
    "fetchrow",
    "fetchval",
    "execute",
    "_execute",
    "_Connection__execute",
    "_do_execute",
    "_get_statement",
]


@pytest.mark.parametrize("replace", [_replace, _wrap])
@pytest.mark.parametrize("name", WRAPPED)
async def test_a_method_that_an_instrumentation_has_replaced_is_called(dsn, directly, monkeypatch, replace, name):
    """As OpenTelemetry and Sentry do, also while the pool is open; and when it is put back, the short way is taken again."""
    calls = []
    async with ResilientPool(dsn) as pool:

        async def use():
            await pool.fetch("SELECT $1::int", 1)
            await pool.fetchrow("SELECT $1::int", 1)
            await pool.fetchval("SELECT $1::int", 1)
            await pool.execute("SELECT $1::int", 1)

        await use()
        assert len(directly) == 3
        with monkeypatch.context() as patch:
            replace(asyncpg.Connection, name, patch, calls)
            await use()
            # The others do not come by a method that is an application's to call.
            is_public = not name.startswith("_")
            assert len(calls) == (1 if is_public else 4)
            assert len(directly) == (6 if is_public else 3)
        before = len(directly)
        await use()
        assert len(directly) == before + 4


@pytest.mark.parametrize("name", ["bind_execute"])
async def test_a_method_of_the_protocol_that_an_instrumentation_has_replaced_is_called(dsn, monkeypatch, name):
    """As ddtrace does: it is called as the driver calls it, by the same names."""
    calls = []
    original = getattr(asyncpg.protocol.Protocol, name)

    async def replaced(self, *args, **options):
        calls.append((args, sorted(options)))
        return await original(self, *args, **options)

    monkeypatch.setattr(asyncpg.protocol.Protocol, name, replaced)
    async with ResilientPool(dsn) as pool:
        for _ in range(3):
            await pool.fetch("SELECT $1::int", 1)
    assert len(calls) >= 3
    assert len({str(call) for call in calls}) == 1


async def test_a_logger_of_queries_hears_of_every_query(dsn, directly):
    """Also of those whose statement is cached."""
    heard = []
    async with ResilientPool(dsn, max_size=1) as pool:
        async with pool.acquire() as connection:
            await connection.fetch("SELECT $1::int", 1)
            with connection.query_logger(lambda record: heard.append(record.query)):
                for method in ("fetch", "fetchrow", "fetchval", "execute"):
                    await getattr(connection, method)("SELECT $1::int", 1)
            await asyncio.sleep(0)
    assert heard == ["SELECT $1::int"] * 4
    assert directly == []


OPENTELEMETRY = """
import asyncio, sys
if sys.argv[2] == "later":
    import resilient_pool
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
AsyncPGInstrumentor().instrument(tracer_provider=provider)
import resilient_pool

def spans():
    return sum(span.attributes.get("db.statement", "") == "SELECT $1::int" for span in exporter.get_finished_spans())
"""
SENTRY = """
import asyncio, sys
if sys.argv[2] == "later":
    import resilient_pool
import sentry_sdk
from sentry_sdk.integrations.asyncpg import AsyncPGIntegration
from sentry_sdk.transport import Transport

class Dropped(Transport):
    def capture_envelope(self, envelope):
        pass

sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", transport=Dropped, traces_sample_rate=1.0,
                integrations=[AsyncPGIntegration()], default_integrations=False, auto_enabling_integrations=False)
transaction = sentry_sdk.start_transaction(name="test")
transaction.__enter__()
import resilient_pool

def spans():
    return sum(span.description == "SELECT $1::int" for span in transaction._span_recorder.spans)
"""
USE = """
async def main():
    async with resilient_pool.ResilientPool(sys.argv[1]) as pool:
        for _ in range(3):
            for method in ("fetch", "fetchrow", "fetchval", "execute"):
                await getattr(pool, method)("SELECT $1::int", 1)
    print(spans())

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["before", "later"])
@pytest.mark.parametrize("tool", [OPENTELEMETRY, SENTRY], ids=["opentelemetry", "sentry"])
def test_the_spans_of_an_instrumentation_are_made_for_every_call(dsn, tool, when):
    """With the real packages, whether they instrument the driver before this package is imported or after it."""
    command = [sys.executable, "-c", tool + USE, dsn, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("12", 0), done.stderr


async def test_a_command_timeout_is_kept(dsn, directly):
    """Also for a statement that is cached."""
    async with ResilientPool(dsn, command_timeout=1.0) as pool:
        for _ in range(2):
            await pool.fetch("SELECT pg_sleep($1)", 0)
        with pytest.raises(TimeoutError):
            await pool.fetch("SELECT pg_sleep($1)", 30)
    assert directly == []


def test_a_version_that_was_not_tested_has_no_short_way(monkeypatch):
    """What it does inside is not known."""
    assert driver._has_short_way()
    monkeypatch.setattr(asyncpg, "__version__", "0.33.0")
    assert not driver._has_short_way()


def test_what_is_taken_for_asyncpgs_own_is(monkeypatch):
    """Every method on the way is a plain function from asyncpg's module."""
    assert all(isinstance(method, types.FunctionType) for method in driver._ORIGINALS)
    assert len(set(itertools.chain(driver._ORIGINALS))) == len(driver._ORIGINALS)
    monkeypatch.setattr(asyncpg.Connection, "fetch", lambda *_: None)
    assert driver._plain("fetch") is None
