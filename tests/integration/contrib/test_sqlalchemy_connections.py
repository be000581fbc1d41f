"""Checkouts of an engine of `postgresql+resilient`: what is kept between them, what they are given, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, insert, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError, NotSupportedError, SAWarning
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool
from waiting import eventually

from resilient_pool import ResilientPool
from resilient_pool.contrib.sqlalchemy import engine_on, pool_of

PID = text("SELECT pg_backend_pid()")


def url_of(dsn):
    """The same as a URL of SQLAlchemy's."""
    return dsn.replace("postgresql://", "postgresql+resilient://", 1)


@pytest.fixture
async def make_engine(dsn):
    """Make engines on the server; all are disposed of in the end."""
    engines = []

    def make(where=dsn, **options):
        engines.append(create_async_engine(url_of(where), **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


@pytest.fixture
async def engine(make_engine):
    return make_engine(pool_size=2, max_overflow=0)


async def ask(engine, statement=PID):
    async with engine.connect() as connection:
        return (await connection.execute(statement)).scalar()


# What is kept


async def test_a_statement_is_prepared_once_for_each_connection(engine):
    """And codecs are set once: a later checkout sends BEGIN, the statement and ROLLBACK, and nothing else."""
    statement = select(literal(17))
    prepared = text("SELECT prepare_time FROM pg_prepared_statements WHERE statement = 'SELECT $1::INTEGER AS anon_1'")
    pid = await ask(engine)
    assert await ask(engine, statement) == 17
    before = await ask(engine, prepared)
    for _ in range(5):
        assert await ask(engine, statement) == 17
    assert before is not None
    assert (await ask(engine, prepared), await ask(engine)) == (before, pid)


async def test_listeners_to_connect_are_called_once_for_each_connection(engine):
    """Not for each checkout; and what a record is given as info stays with it."""
    calls = []

    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection, record):
        record.info["number"] = len(calls)
        calls.append(connection)

    for _ in range(3):
        async with engine.connect() as connection:
            assert (await connection.get_raw_connection()).info == {"number": 0}
    assert len(calls) == 1


async def test_what_a_connect_listener_sets_outlasts_a_reset(engine):
    """The listener is called again after the pool has reset the session, so no statement runs without its settings."""
    calls = []

    @event.listens_for(engine.sync_engine, "connect")
    def set_path(connection, record):
        calls.append(1)
        cursor = connection.cursor()
        cursor.execute("SET search_path TO pg_catalog")
        cursor.close()
        connection.commit()

    path = text("SELECT current_setting('search_path') || current_setting('application_name')")
    assert [await ask(engine, path) for _ in range(3)] == ["pg_catalog"] * 3
    assert len(calls) == 1
    async with engine.connect() as connection:
        await connection.execute(text("SET application_name TO left_behind"))
        await connection.commit()
    assert [await ask(engine, path) for _ in range(3)] == ["pg_catalog"] * 3
    assert len(calls) == 2


async def test_on_a_pool_that_others_use_a_listeners_settings_are_not_left_to_them(dsn):
    """Each checkout has them, and the pool's own calls do not."""
    async with ResilientPool(dsn, max_size=1) as pool:
        engine = engine_on(pool)

        @event.listens_for(engine.sync_engine, "connect")
        def set_path(connection, record):
            cursor = connection.cursor()
            cursor.execute("SET search_path TO pg_catalog")
            cursor.close()
            connection.commit()

        for _ in range(3):
            assert await ask(engine, text("SHOW search_path")) == "pg_catalog"
            assert await pool.fetchval("SHOW search_path") == '"$user", public'
        await engine.dispose()
        assert not pool.is_closed


async def test_codecs_of_a_connect_listener_are_set_on_each_connection(engine, postgres):
    """By `run_async`, as SQLAlchemy's documentation shows; a connection that replaces another one has them, too."""

    @event.listens_for(engine.sync_engine, "connect")
    def set_codec(connection, record):
        connection.run_async(
            lambda driver: driver.set_type_codec(
                "point", schema="pg_catalog", encoder=str, decoder=lambda value: f"point {value}", format="text"
            )
        )

    point = text("SELECT '(1,2)'::point")
    assert await ask(engine, point) == "point (1,2)"
    for _ in range(2):
        async with engine.connect() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            await postgres.terminate_backends(f"pid = {raw.get_server_pid()}")
            assert (await connection.execute(point)).scalar() == "point (1,2)"


async def test_a_transaction_that_cannot_begin_begins_on_another_connection(engine, postgres):
    """Also with isolation levels, and for AUTOCOMMIT its first statement; nothing was done on the lost one."""
    for options in ({}, {"isolation_level": "SERIALIZABLE"}, {"isolation_level": "AUTOCOMMIT"}):
        await asyncio.gather(ask(engine), ask(engine))
        async with engine.execution_options(**options).connect() as connection:
            await postgres.terminate_backends("application_name = '' AND backend_type = 'client backend'")
            level = (await connection.execute(text("SHOW transaction_isolation"))).scalar()
            assert level == ("serializable" if options.get("isolation_level") == "SERIALIZABLE" else "read committed")


async def test_a_changed_table_is_seen_by_kept_statements(engine):
    """After a text that SQLAlchemy does not know for a change, one fails once, as on its own pool, and all are prepared anew."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE altered (a int)"))
        await connection.execute(text("INSERT INTO altered VALUES (1)"))
    try:
        everything = text("SELECT * FROM altered")
        async with engine.connect() as connection:
            assert (await connection.execute(everything)).all() == [(1,)]
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE altered ADD b int DEFAULT 2"))
        with pytest.raises(NotSupportedError):
            await ask(engine, everything)
        async with engine.connect() as connection:
            assert (await connection.execute(everything)).all() == [(1, 2)]
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE altered"))


# What works as on SQLAlchemy's own pool


async def test_isolation_levels_and_autocommit_are_those_of_the_checkout(engine):
    """The next one has the engine's again."""
    level = text("SHOW transaction_isolation")
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        assert (await connection.execute(level)).scalar() == "repeatable read"
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(text("VACUUM pg_am"))
    async with engine.connect() as connection:
        assert (await connection.execute(level)).scalar() == "read committed"
        await connection.rollback()
        await connection.execution_options(postgresql_readonly=True, postgresql_deferrable=True)
        assert (await connection.execute(text("SHOW transaction_read_only"))).scalar() == "on"
    async with engine.connect() as connection:
        assert (await connection.execute(text("SHOW transaction_read_only"))).scalar() == "off"


async def test_results_are_streamed_from_a_cursor_of_the_servers(engine):
    """All of them, in order; and a stream that is left early leaves nothing behind."""
    many = text("SELECT generate_series(1, 1234)")
    async with engine.connect() as connection:
        result = await connection.stream(many)
        assert [row[0] async for row in result] == list(range(1, 1235))
        async for row in (await connection.stream(many)).scalars():
            assert row == 1
            break
    assert await ask(engine, text("SELECT count(*) FROM pg_cursors WHERE name <> ''")) == 0


@pytest.mark.parametrize("trouble", ["refusal", "loss"])
async def test_what_ends_a_stream_half_way_is_raised_as_sqlalchemy_words_it(make_engine, proxy, dsn, trouble):
    """And not what the rollback of a lost connection said, or an error of the driver's own."""
    engine = make_engine(proxy.dsn(dsn))
    many = text("SELECT 1 / (200 - i) FROM generate_series(1, 1000) i")
    with pytest.raises(DBAPIError) as caught:
        async with engine.connect() as connection:
            async for _ in await connection.stream(many):
                if trouble == "loss" and proxy.connections:
                    proxy.rst()
    found = "division by zero" if trouble == "refusal" else "connection was closed"
    assert (found in str(caught.value), caught.value.connection_invalidated) == (True, trouble == "loss")
    assert pool_of(engine).stats().in_use == 0
    assert await ask(engine, text("SELECT 1")) == 1


async def test_json_passes_through_the_engines_own_functions(make_engine):
    """In both directions."""
    engine = make_engine(json_serializer=lambda value: f'["{value}"]', json_deserializer=lambda value: f"<{value}>")
    async with engine.connect() as connection:
        assert (await connection.execute(select(literal("x", JSONB)))).scalar() == '<["x"]>'
        await connection.rollback()
        assert (await connection.execute(select(literal("y", JSONB)))).scalar() == '<["y"]>'


async def test_many_rows_are_inserted_and_counted(engine):
    """`executemany` and `RETURNING`, by way of SQLAlchemy's own batches."""
    table = Table("counted", MetaData(), Column("id", Integer, primary_key=True))
    async with engine.begin() as connection:
        await connection.run_sync(table.create)
    try:
        async with engine.begin() as connection:
            rows = [{"id": number} for number in range(2500)]
            await connection.execute(insert(table), rows[:1000])
            returned = await connection.execute(insert(table).returning(table.c.id), rows[1000:])
            assert len(returned.all()) == 1500
            assert (await connection.execute(table.update().values(id=table.c.id + 10000))).rowcount == 2500
        with pytest.raises(IntegrityError) as raised:
            async with engine.begin() as connection:
                await connection.execute(insert(table), [{"id": 10000}])
        assert raised.value.orig.pgcode == "23505"
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(table.drop)


async def test_notifications_are_listened_to_on_the_drivers_connection(engine):
    """`get_raw_connection().driver_connection` has asyncpg's methods."""
    heard = asyncio.Queue()
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection

        def hear(_connection, _pid, _channel, payload):
            heard.put_nowait(payload)

        await driver.add_listener("news", hear)
        async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as other:
            await other.execute(text("NOTIFY news, 'one'"))
        async with asyncio.timeout(5):
            assert await heard.get() == "one"
        await driver.remove_listener("news", hear)


async def test_what_the_pool_is_asked_for_is_answered(engine):
    """By the names that SQLAlchemy's own pool has, which dashboards read."""
    async with engine.connect() as connection:
        await connection.execute(PID)
        pool = engine.pool
        assert (pool.size(), pool.checkedout(), pool.checkedin(), pool.overflow()) == (2, 1, 0, 0)
        assert pool.status() == "LeasePool max_size: 2, size: 1, in use: 1, waiting: 0"


async def test_another_pool_can_be_made_of_what_opens_connections(engine):
    """SQLAlchemy's own ones take it, and its connections are then their own."""
    other = create_async_engine("postgresql+resilient://", pool=NullPool(engine.pool._creator, dialect=engine.dialect))
    assert await ask(other) != await ask(other)


async def test_events_of_the_pool_are_seen(engine):
    """Each checkout and checkin, and an invalidation."""
    seen = []
    for name in ("checkout", "checkin", "invalidate", "reset", "close"):
        event.listen(engine.sync_engine, name, lambda *_, name=name: seen.append(name))
    await ask(engine)
    async with engine.connect() as connection:
        await connection.invalidate()
    assert seen == ["checkout", "reset", "checkin", "checkout", "invalidate", "close", "checkin"]


async def test_tokens_come_from_a_listener_to_do_connect(make_engine, postgres):
    """For each new connection of the pool's, as SQLAlchemy's documentation has it for passwords that expire."""
    await postgres.create_role("token", password="first")
    passwords = ["first", "second"]
    engine = make_engine(postgres.dsn(user="token", password="wrong"), max_overflow=0)

    @event.listens_for(engine.sync_engine, "do_connect")
    def provide_token(dialect, record, arguments, options):
        options["password"] = passwords[0]

    try:
        first = await ask(engine)
        async with postgres.admin() as admin:
            await admin.execute("ALTER ROLE token PASSWORD 'second'")
        del passwords[0]
        await pool_of(engine).expire_connections()
        assert await ask(engine) != first
    finally:
        await engine.dispose()
        async with postgres.admin() as admin:
            await admin.execute("DROP ROLE token")


# Ends


async def test_a_checkout_that_waits_too_long_is_sqlalchemys_timeout(make_engine):
    """As with its own pool; and the one that was held is none the worse."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=1.0)
    async with engine.connect() as connection:
        with pytest.raises(PoolTimeoutError):
            await engine.connect()
        assert (await connection.execute(PID)).scalar() > 0


async def test_what_was_lost_in_use_is_an_invalidated_connection(engine, postgres):
    """A `DBAPIError` that says so; the next checkout is another connection."""
    async with engine.connect() as connection:
        pid = (await connection.execute(PID)).scalar()
        await postgres.terminate_backends(f"pid = {pid}")
        with pytest.raises(DBAPIError) as raised:
            await connection.execute(PID)
        assert raised.value.connection_invalidated
        await connection.rollback()
        assert (await connection.execute(PID)).scalar() != pid
    await eventually(lambda: pool_of(engine).stats().in_use == 0)


@pytest.mark.parametrize("at", ["checkout", "use", "commit", "checkin"])
async def test_a_cancelled_task_leaves_no_connection_behind(make_engine, at):
    """Wherever it was cancelled: the place in the pool is free again, and the connection, if it is kept, works."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=5)
    await ask(engine)
    for turns in range(12):
        holder = await engine.connect() if at == "checkout" else None

        async def work():
            async with engine.connect() as connection:
                if at == "use":
                    await connection.execute(text("SELECT pg_sleep(1)"))
                await connection.execute(text("SELECT 1"))
                if at == "commit":
                    await connection.commit()

        task = asyncio.create_task(work())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if holder is not None:
            await holder.close()
        async with asyncio.timeout(10):
            assert await ask(engine, text("SELECT 1")) == 1
    await eventually(lambda: pool_of(engine).stats().in_use == 0)


async def test_a_detached_connection_lives_on_by_itself(engine):
    """It is closed when it is closed, and its place is free then."""
    async with engine.connect() as connection:
        pid = (await connection.execute(PID)).scalar()
        raw = await connection.get_raw_connection()
        raw.detach()
        assert (await connection.execute(PID)).scalar() == pid
    await eventually(lambda: pool_of(engine).stats().in_use == 0)
    assert await ask(engine) != pid


async def test_a_forgotten_checkout_is_found_by_the_garbage_collector(make_engine):
    """SQLAlchemy warns, and the place is free again."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=5)
    connection = await engine.connect()
    await connection.execute(PID)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del connection
        gc.collect()
    assert any(issubclass(warning.category, SAWarning) for warning in caught)
    assert await ask(engine) > 0


async def test_disposing_closes_what_is_idle_and_leaves_what_is_in_use(engine):
    """Which goes on, and is closed when it is given back; the engine works again at once."""
    async with engine.connect() as connection:
        pid = (await connection.execute(PID)).scalar()
        pool = pool_of(engine)
        async with asyncio.timeout(10):
            await engine.dispose()
        assert (await connection.execute(PID)).scalar() == pid
        assert await ask(engine) != pid
    await eventually(lambda: pool.is_closed)
    assert pool_of(engine) is not pool


async def test_disposing_of_an_engine_whose_server_is_frozen_takes_no_longer(make_engine, proxy, dsn):
    """Goodbyes have a limit."""
    engine = make_engine(proxy.dsn(dsn))
    await ask(engine)
    pool = pool_of(engine)
    proxy.blackhole()
    async with asyncio.timeout(12):
        await engine.dispose()
    await eventually(lambda: pool.is_closed)


async def test_callers_that_wait_while_the_engine_is_disposed_of_are_served(make_engine):
    """By the pool that takes the place of the one they waited for."""
    engine = make_engine(pool_size=1, max_overflow=0)
    async with engine.connect():
        waiting = [asyncio.create_task(ask(engine)) for _ in range(3)]
        await eventually(lambda: pool_of(engine).stats().waiting == 3)
        await engine.dispose()
        assert len(await asyncio.gather(*waiting)) == 3


async def test_one_connection_without_a_pool_is_closed_with_its_checkout(make_engine, postgres):
    """With `NullPool`, as Alembic's template has it; each waits for its server, and none is left."""
    engine = make_engine(poolclass=NullPool)
    pids = [await ask(engine) for _ in range(3)]
    assert len(set(pids)) == 3
    async with postgres.admin() as admin:
        async with asyncio.timeout(5):
            while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", pids):
                await asyncio.sleep(0.01)
    async with engine.connect() as connection:
        await connection.invalidate()


# Loops


@pytest.fixture
def forgetting():
    """Collects what the test leaves in loops that are closed: asyncio complains of it, as of any program's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.mark.usefixtures("forgetting")
def test_each_loop_has_a_pool_of_its_own(dsn):
    """Of one engine, made in none; what was left in a loop that is closed is cut off when the next one connects."""
    engine = create_async_engine(url_of(dsn))
    pools = []

    async def use():
        pools.append(pool_of(engine))
        return await ask(engine)

    assert asyncio.run(use()) != asyncio.run(use())
    assert [pool.is_closed for pool in pools] == [True, False]
    engine.sync_engine.dispose()
    assert pools[1].is_closed


@pytest.mark.usefixtures("forgetting")
def test_a_connection_whose_loop_is_gone_is_given_up_quietly(dsn, caplog):
    """Invalidated from another loop, or found by the garbage collector."""
    engine = create_async_engine(url_of(dsn))
    held = []

    async def hold():
        for _ in range(2):
            held.append(await engine.connect())
            await held[-1].execute(PID)

    async def give_up():
        await held.pop().invalidate()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            held.pop()
            gc.collect()
        return await ask(engine)

    asyncio.run(hold())
    assert asyncio.run(give_up()) > 0
    engine.sync_engine.dispose()
    assert [record.getMessage()[:21] for record in caplog.records] == ["The garbage collector"]
    caplog.clear()  # what it refers to


async def test_loops_of_other_threads_are_disposed_of_in_their_own(dsn):
    """A pool whose loop runs elsewhere is closed there."""
    engine = create_async_engine(url_of(dsn))
    ready, over = asyncio.Event(), asyncio.Event()
    here = asyncio.get_running_loop()
    pools = []

    async def elsewhere():
        await ask(engine)
        pools.append(pool_of(engine))
        here.call_soon_threadsafe(ready.set)
        await eventually(lambda: pools[0].is_closed)
        here.call_soon_threadsafe(over.set)

    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    async with asyncio.timeout(20):
        await ready.wait()
        await ask(engine)
        await engine.dispose()
        await over.wait()
        await thread


async def test_a_session_sees_its_own_pool_under_load(make_engine):
    """A hundred sessions on five connections: every row is there, and no place is lost."""
    engine = make_engine(pool_size=5, max_overflow=0)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE loaded (i int)"))
    try:

        async def work(number):
            async with AsyncSession(engine) as session:
                await session.execute(text("INSERT INTO loaded VALUES (:i)"), {"i": number})
                await session.commit()

        await asyncio.gather(*map(work, range(100)))
        assert await ask(engine, text("SELECT count(DISTINCT i) FROM loaded")) == 100
        stats = pool_of(engine).stats()
        assert (stats.in_use, stats.size <= 5) == (0, True)
    finally:
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE loaded"))


async def test_asyncpgs_errors_reach_a_handler_written_for_sqlalchemy(make_engine):
    """Where there is no server."""
    engine = make_engine("postgresql://postgres@127.0.0.1:1/x", pool_timeout=0.3)
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await engine.connect()
