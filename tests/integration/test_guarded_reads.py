"""What the pool does with a lost answer to something that looks like a read: repeated behind a guard, or unknown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import runpy
from pathlib import Path

import asyncpg
import pytest
from cut import Cut

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.events import OutcomeUnknown, RetryScheduled
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.sql.read_only import StatementReader
from resilient_pool.testing import FaultProxy

TEXTS = runpy.run_path(str(Path(__file__).parents[1] / "disguises.py"))
STATE = """
SELECT (SELECT last_value + is_called::int FROM numbers) + (SELECT count(*) FROM journal)
       + (SELECT count(*) FROM pg_largeobject_metadata)
"""


class Database:
    """A database full of disguises, seen by an observer, and behind a proxy."""

    def __init__(self, observer: asyncpg.Connection, proxy: FaultProxy, dsn: str) -> None:
        self.observer, self.proxy, self.dsn = observer, proxy, dsn
        self.told = []

    async def effects(self) -> int:
        """How many effects there were so far: rows, numbers, large objects and notifications."""
        return await self.observer.fetchval(STATE) + len(self.told)


@pytest.fixture(params=["postgres", "postgres16"])
async def database(request):
    server = request.getfixturevalue(request.param)
    await server.create_database("disguises")
    try:
        async with server.admin("disguises") as observer:
            await observer.execute(TEXTS["SCHEMA"])
            with FaultProxy(server.host, server.port) as proxy:
                database = Database(observer, proxy, proxy.dsn(server.dsn(database="disguises")))
                await observer.add_listener("effects", lambda *told: database.told.append(told))
                yield database
    finally:
        async with server.admin() as admin:
            await admin.execute("DROP DATABASE disguises WITH (FORCE)")


@pytest.fixture
async def pool(database):
    events = []
    async with ResilientPool(database.dsn, ssl=False, max_size=2, deadline=10, observers=[events.append]) as pool:
        pool.events = events
        yield pool


async def lose(database, sql):
    """Lose the answer to a text that is sent next."""
    database.proxy.swallow_next_answer(matching=sql.encode())


async def test_no_disguise_is_applied_twice(database, pool):
    """Every one of them is reported as unknown, and has had its effect once."""
    wrong = {}
    for sql in TEXTS["DISGUISED"]:
        before = await database.effects()
        await lose(database, sql)
        try:
            outcome = await pool.fetch(sql)
        except OutcomeUnknownError as error:
            outcome = None if isinstance(error.__cause__, asyncpg.ConnectionDoesNotExistError) else error
        except asyncpg.PostgresError as error:
            outcome = error
        async with pool.acquire() as connection:
            await connection.execute("SELECT 2")
        once = await repeated_effects(database, sql, before)
        if outcome is not None or not once:
            wrong[sql] = outcome, await database.effects() - before
    assert wrong == {}
    assert database.proxy.fired == len(TEXTS["DISGUISED"])
    assert not any(isinstance(event, RetryScheduled) for event in pool.events)


async def repeated_effects(database, sql, before):
    """Whether a text has had no more effects than one execution of it has."""
    after = await database.effects()
    try:
        await database.observer.fetch(sql)
    except asyncpg.PostgresError:
        return after == before
    await database.observer.execute("SELECT pg_advisory_unlock_all(), set_config('application_name', '', false)")
    return after - before <= await database.effects() - after


async def test_no_disguise_is_applied_twice_on_a_lease(database, pool):
    """A pristine connection repairs itself by the same rules."""
    wrong = {}
    for sql in TEXTS["DISGUISED"][::3]:
        before = await database.effects()
        async with pool.acquire() as connection:
            await lose(database, sql)
            with pytest.raises(OutcomeUnknownError):
                await connection.fetch(sql)
        if not await repeated_effects(database, sql, before):
            wrong[sql] = await database.effects() - before
    assert wrong == {}


async def test_an_honest_read_is_repeated(database, pool):
    """Without a promise: PostgreSQL itself says that everything it calls is stable."""
    for sql in TEXTS["HONEST"]:
        expected = len(await database.observer.fetch(sql))
        await lose(database, sql)
        result = await pool.fetch(sql)
        assert len(result) == expected or "random" in sql or "TABLESAMPLE" in sql or "pg_locks" in sql, sql
    assert pool.stats().retries_total == database.proxy.fired == len(TEXTS["HONEST"])
    assert not any(isinstance(event, OutcomeUnknown) for event in pool.events)


async def test_a_row_policy_that_writes_is_found(database):
    """Also by a user whom it does not bind."""
    check, link = ReadCheck(StatementReader()), DriverConnection(database.observer)
    assert not await check.allows(link, ["SELECT * FROM guarded"])
    await database.observer.execute("ALTER TABLE guarded DISABLE ROW LEVEL SECURITY")
    check.forget()
    assert await check.allows(link, ["SELECT * FROM guarded"])


async def test_a_default_operator_class_for_a_built_in_type_counts_everywhere(database):
    """It is what DISTINCT and ORDER BY use for that type, and neither need name the type."""
    check, link = ReadCheck(StatementReader()), DriverConnection(database.observer)
    assert await check.allows(link, ["SELECT DISTINCT j FROM json_array_elements('[1, 1]') AS j"])
    await database.observer.execute(
        "CREATE FUNCTION j_less(json, json) RETURNS bool LANGUAGE sql IMMUTABLE AS 'SELECT $1::text < $2::text';"
        "CREATE FUNCTION j_order(json, json) RETURNS int LANGUAGE sql AS 'SELECT tell($1::text)';"
        "CREATE OPERATOR <<%< (LEFTARG = json, RIGHTARG = json, FUNCTION = j_less);"
        "CREATE OPERATOR CLASS js DEFAULT FOR TYPE json USING btree AS OPERATOR 1 <<%<, FUNCTION 1 j_order(json, json)"
    )
    check.forget()
    assert not await check.allows(link, ["SELECT DISTINCT j FROM json_array_elements('[1, 1]') AS j"])


async def test_a_foreign_table_is_not_trusted(database):
    """A partition of what is read may be one, too."""
    check, link = ReadCheck(StatementReader()), DriverConnection(database.observer)
    await database.observer.execute(
        "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
        "CREATE FOREIGN TABLE parted_2 PARTITION OF parted FOR VALUES IN (2) SERVER s"
    )
    assert not await check.allows(link, ["SELECT * FROM parted_2"])
    assert not await check.allows(link, ["SELECT * FROM parted"])
    assert await check.allows(link, ["SELECT * FROM parted_1"])


async def test_the_server_is_asked_once_for_each_text(database):
    """Until the schema is known to have changed."""
    check, link = ReadCheck(StatementReader()), DriverConnection(database.observer)
    asked = link.queries
    assert await check.allows(link, ["SELECT steady(1)", "SELECT fixed(2)"])
    asked, first = link.queries, link.queries - asked
    assert await check.allows(link, ["SELECT steady(1)", "SELECT fixed(3)"])
    assert link.queries == asked
    await database.observer.execute("ALTER FUNCTION steady VOLATILE")
    check.forget()
    asked = link.queries
    assert not await check.allows(link, ["SELECT steady(1)", "SELECT fixed(2)"])
    assert link.queries - asked == first


async def test_what_was_remembered_of_the_catalog_is_forgotten_with_the_server_it_was_asked_of(database, pool):
    """The function of that name in another database may be another one."""
    sql = "SELECT steady(1)"
    await lose(database, sql)
    assert await pool.fetchval(sql) is not None
    await database.observer.execute("ALTER FUNCTION steady VOLATILE")
    pool.set_connect_args(database.dsn, ssl=False)
    await lose(database, sql)
    with pytest.raises(OutcomeUnknownError):
        await pool.fetchval(sql)


async def test_what_was_remembered_of_the_catalog_is_asked_again_soon(database):
    """A migration may change what a view does without the pool's knowledge."""
    now = 0.0
    check, link = ReadCheck(StatementReader(), lambda: now), DriverConnection(database.observer)
    assert await check.allows(link, ["SELECT * FROM plain"])
    await database.observer.execute("ALTER FUNCTION fixed VOLATILE")
    asked = link.queries
    now = 9.0
    assert await check.allows(link, ["SELECT * FROM plain"])
    assert link.queries == asked
    now = 10.0
    assert not await check.allows(link, ["SELECT * FROM plain"])


@pytest.mark.parametrize("transaction", [False, True], ids=["one shot", "transaction"])
async def test_what_is_dropped_before_the_repeat_leaves_the_outcome_unknown(database, pool, transaction):
    """The catalog cannot say any more what it did: an undefined function is no news of the lost attempt."""

    async def read(connection):
        await connection.fetch("SELECT audit(3)")

    await pool.fetch("SELECT 1")
    if transaction:
        database.proxy.swallow_next_answer(matching=b"COMMIT")
        call = asyncio.create_task(pool.run_in_transaction(read, resolve_commit=False))
    else:
        await lose(database, "SELECT audit(3)")
        call = asyncio.create_task(pool.fetch("SELECT audit(3)"))
    database.proxy.reject()
    async with asyncio.timeout(10):
        while not await database.observer.fetchval("SELECT count(*) FROM journal WHERE t = '3'"):
            await asyncio.sleep(0.01)
        await database.observer.execute("DROP FUNCTION audit(int), audit(bigint)")
        database.proxy.accept()
        database.proxy.restore()
        with pytest.raises(OutcomeUnknownError):
            await call
    assert await database.observer.fetchval("SELECT count(*) FROM journal WHERE t = '3'") == 1


class Tenant(asyncpg.Connection):
    """An application's class that runs every command in a transaction of its own."""

    async def execute(self, query, *args, timeout=None):
        async with self.transaction():
            await super().execute("SET LOCAL application_name = 'tenant'")
            return await super().execute(query, *args, timeout=timeout)


async def test_a_class_that_makes_transactions_of_its_own_does_not_get_in_the_way_of_the_guard(database):
    """What PostgreSQL was told is stable may write none the less."""
    await database.observer.execute(
        "CREATE FUNCTION liar() RETURNS int STABLE LANGUAGE plpgsql AS $$ BEGIN RETURN write('liar'); END $$"
    )
    async with ResilientPool(database.dsn, ssl=False, connection_class=Tenant, deadline=10) as pool:
        await pool.fetch("SELECT 1")
        await lose(database, "SELECT steady(1)")
        assert await pool.fetchval("SELECT steady(1)") == 2
        await lose(database, "SELECT liar()")
        with pytest.raises(OutcomeUnknownError):
            await pool.fetch("SELECT liar()")
    assert await database.observer.fetchval("SELECT count(*) FROM journal WHERE t = 'liar'") == 1


async def test_a_declared_function_is_not_asked_about(database):
    """`pure_functions=` is the way round the catalog, for that function in that schema or in every one."""
    for pure, sql, expected in (
        (("audit", "write", "tell"), "SELECT audit(1)", True),
        (("elsewhere.hidden",), "SELECT elsewhere.hidden(1)", True),
        (("public.hidden",), "SELECT elsewhere.hidden(1)", False),
        (("tell",), "SELECT * FROM over_telling", True),
        (("write",), "SELECT audit(1)", False),
        (("nextval",), "SELECT nextval('numbers')", False),
    ):
        assert await ReadCheck(StatementReader(pure)).allows(DriverConnection(database.observer), [sql]) is expected, (
            sql
        )


async def test_a_text_that_writes_is_never_allowed(database):
    """One among several is enough."""
    check, link = ReadCheck(StatementReader()), DriverConnection(database.observer)
    assert not await check.allows(link, ["SELECT 1", "INSERT INTO journal VALUES ('x')"])
    assert await check.allows(link, [])


async def test_the_guard_overrules_what_a_session_prefers(database):
    """A default of the session neither makes the repeat wait nor writable."""
    settings = {"default_transaction_isolation": "serializable", "default_transaction_deferrable": "on"}
    async with ResilientPool(database.dsn, ssl=False, server_settings=settings, deadline=10) as pool:
        await database.observer.execute("BEGIN ISOLATION LEVEL SERIALIZABLE; INSERT INTO journal VALUES ('open')")
        await lose(database, "SELECT steady(5)")
        assert await asyncio.wait_for(pool.fetchval("SELECT steady(5)"), 5) == 6
        await database.observer.execute("ROLLBACK")
        assert await pool.execute("INSERT INTO journal VALUES ('after')") == "INSERT 0 1"


@pytest.mark.parametrize("lost", ["BEGIN READ ONLY", "steady(1)", "pg_proc"])
async def test_a_guard_that_is_lost_itself_is_tried_again(database, pool, lost):
    """Whatever was on its way, the next attempt is guarded as well."""
    await lose(database, "SELECT steady(1)")
    async with pool.acquire() as first:
        database.proxy.swallow_next_answer(matching=lost.encode())
        assert await first.fetchval("SELECT steady(1)") == 2
    assert database.proxy.fired == 2
    assert await pool.execute("INSERT INTO journal VALUES ('x')") == "INSERT 0 1"


async def test_a_lost_answer_to_the_guards_commit_loses_no_result(database, pool):
    """The rows were there; the connection is not used again."""
    await pool.fetch("SELECT 1")
    await lose(database, "SELECT steady(1)")
    database.proxy.swallow_next_answer(matching=b"COMMIT")
    assert await pool.fetchval("SELECT steady(1)") == 2
    assert database.proxy.fired == 2
    assert await pool.fetchval("SELECT steady(2)") == 3


async def test_a_copy_out_of_a_query_is_guarded_too(database, pool, tmp_path):
    """To a path, which is written anew."""
    path = tmp_path / "out"
    for sql, repeated in (("SELECT steady(1)", True), ("SELECT audit(1)", False)):
        await pool.fetch("SELECT 1")
        await lose(database, sql)
        if repeated:
            assert await pool.copy_from_query(sql, output=path) == "COPY 1"
            assert path.read_text() == "2\n"
            continue
        with pytest.raises(OutcomeUnknownError):
            await pool.copy_from_query(sql, output=path)
    assert await database.observer.fetchval("SELECT count(*) FROM journal") == 1


async def test_a_copy_into_a_pipe_is_not_begun_anew(database, pool, tmp_path):
    """What has gone into it cannot be taken back: its reader would have the first rows twice."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        await pool.fetch("SELECT 1")
        database.proxy.cut_next_answer(24, matching=b"steady")
        with pytest.raises(OutcomeUnknownError):
            await pool.copy_from_query("SELECT steady(n) FROM generate_series(1, 9) AS n", output=path)
        assert b"2\n3\n".startswith(os.read(pipe, 100))
    finally:
        os.close(pipe)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("leased", [False, True], ids=["one shot", "lease"])
async def test_a_cancelled_guard_leaves_no_transaction_behind(database, leased, late):
    """Wherever it is cancelled, the next one to use a connection can write, and nothing stays open."""
    at = 0
    while True:
        async with ResilientPool(database.dsn, ssl=False, max_size=1, deadline=10) as pool:
            await pool.fetch("SELECT 1")
            await lose(database, "SELECT steady(1)")
            happened = await cancel_at(pool, at, leased=leased, late=late)
            assert await pool.execute("INSERT INTO journal VALUES ('x')") == "INSERT 0 1"
            assert not await pool.fetchval("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
        if not happened:
            break
        at += 1
    assert at > 8


async def cancel_at(pool, at, *, leased, late):
    async def read(connection):
        cut = Cut(connection.fetchval("SELECT steady(1)"), at=at, late=late)
        try:
            await cut
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
        await asyncio.sleep(0)
        return cut.happened

    try:
        if not leased:
            return await read(pool)
        async with pool.acquire() as connection:
            happened = await read(connection)
            with contextlib.suppress(asyncpg.InterfaceError):  # one that was lost is not replaced after a use
                await connection.execute("INSERT INTO journal VALUES ('same lease')")
            return happened
    except asyncio.CancelledError:
        asyncio.current_task().uncancel()
        return True
