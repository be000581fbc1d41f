"""`connect()`: one connection that is opened like a pool's, replaced while nothing can be lost, and ended when something was."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

import resilient_pool
from resilient_pool import AcquireTimeoutError, ConfigurationError, OutcomeUnknownError, connect, profiles

INSERT = "INSERT INTO kept VALUES ($1)"


async def _set(connection):
    await connection.execute("SET work_mem = '1MB'")


async def _temporary_table(connection):
    await connection.execute("CREATE TEMPORARY TABLE mine (id int)")


async def _listen(connection):
    await connection.add_listener("changes", lambda *_: None)


async def _lock(connection):
    await connection.fetchval("SELECT pg_advisory_lock(1)")


async def _prepare(connection):
    await connection.prepare("SELECT 1")


async def _begin(connection):
    await connection.transaction().start()


async def _read(connection):
    assert await connection.fetchval("SELECT 1") == 1


async def _write(connection):
    await connection.execute(INSERT, 0)


async def _refused_write(connection):
    with pytest.raises(asyncpg.NotNullViolationError):
        await connection.execute(INSERT, None)


async def _slow_read(connection):
    with pytest.raises(TimeoutError):
        await connection.fetch("SELECT count(*) FROM generate_series(1, 100000000)", timeout=0.05)
    await _read(connection)  # the statement's end is confirmed now


async def _transaction(connection):
    async with connection.transaction():
        await connection.execute(INSERT, 0)
        await connection.fetch("SELECT * FROM kept")


async def _codec(connection):
    await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda _: "decoded")


LEAVES_SOMETHING = [_set, _temporary_table, _listen, _lock, _prepare, _begin]
LEAVES_NOTHING = [_read, _write, _refused_write, _slow_read, _transaction, _codec]


@pytest.fixture
async def table(dsn):
    """A table, and a connection that is no pool's."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE kept (id int NOT NULL)")
    yield connection
    await connection.execute("DROP TABLE kept")
    await connection.close()


async def _end_session(bystander, connection):
    pid = connection.get_server_pid()
    await bystander.execute("SELECT pg_terminate_backend($1)", pid)
    async with asyncio.timeout(10):
        while await bystander.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
            await asyncio.sleep(0.005)
        while not connection.is_closed():
            await asyncio.sleep(0.005)
    return pid


async def test_it_is_awaited_or_entered(dsn):
    """Both open it; the end of the block closes it."""
    connection = await connect(dsn)
    assert await connection.fetchval("SELECT 1") == 1
    assert isinstance(connection, asyncpg.Connection)
    await connection.close()
    assert connection.is_closed()
    async with connect(dsn) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    with pytest.raises(asyncpg.InterfaceError, match=r"Connection.fetchval\(\): connection is closed$"):
        await connection.fetchval("SELECT 1")


async def test_nothing_is_left_of_it(dsn, table):
    """Neither of one that was closed, nor of one whose opening was cancelled or failed, nor a task."""
    tasks = asyncio.all_tasks()
    settings = {"application_name": "one"}
    async with connect(dsn, server_settings=settings) as connection:
        assert await table.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'one'") == 1
        assert await connection.fetchval("SHOW application_name") == "one"
    (await connect(dsn, server_settings=settings)).terminate()
    for turns in range(12):
        opening = asyncio.ensure_future(connect(dsn, server_settings=settings)._open())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await connect(dsn, database="nowhere", server_settings=settings)
    async with asyncio.timeout(10):
        while await table.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'one'"):
            await asyncio.sleep(0.005)
        while asyncio.all_tasks() != tasks:
            await asyncio.sleep(0.005)


async def test_it_is_opened_once_only(dsn):
    """What `connect()` returns is no factory."""
    opening = connect(dsn)
    await (await opening).close()
    with pytest.raises(asyncpg.InterfaceError, match="opened once only"):
        await opening


async def test_a_server_that_is_away_is_waited_for(postgres, proxy):
    """Within the deadline, as a pool's caller waits."""
    proxy.refuse()
    asyncio.get_running_loop().call_later(0.4, proxy.accept)
    async with connect(proxy.dsn(postgres.dsn())) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    proxy.refuse()
    with pytest.raises(OSError) as caught:
        await connect(proxy.dsn(postgres.dsn()), deadline=0.3)
    assert "gave up after" in caught.value.__notes__[0]
    proxy.accept()
    proxy.blackhole()
    with pytest.raises(AcquireTimeoutError, match="raise deadline"):
        await connect(proxy.dsn(postgres.dsn()), deadline=0.3)


@pytest.mark.parametrize("use", LEAVES_NOTHING)
async def test_a_lost_session_that_was_as_it_was_opened_is_replaced(dsn, table, use):
    """After reads, single writes, refused ones, those that ran out of time, transactions that ended, and codecs."""
    inits = []

    async def init(connection):
        inits.append(connection)

    async with connect(dsn, init=init) as connection:
        await use(connection)
        pid = await _end_session(table, connection)
        if use is _codec:
            assert await connection.fetchval("SELECT '1'::json") == "decoded"
        async with connection.transaction():
            await connection.execute(INSERT, 7)
        assert connection.get_server_pid() != pid
        await _end_session(table, connection)
        await connection.execute(INSERT, 7)
        assert len(inits) == 3
    assert await table.fetchval("SELECT count(*) FROM kept WHERE id = 7") == 2


@pytest.mark.parametrize("use", LEAVES_SOMETHING)
async def test_what_was_set_in_a_session_is_said_to_be_lost_with_it(dsn, table, use):
    """It is not replaced by a session in which that is missing."""
    connection = await connect(dsn)
    await _read(connection)
    await use(connection)
    await _end_session(table, connection)
    for _ in range(2):
        with pytest.raises(asyncpg.InterfaceError, match="what had been set there: connect again") as caught:
            await connection.fetchval("SELECT 1")
        assert not hasattr(caught.value, "__notes__")  # which would only say it again
    await connection.close()


async def test_termination_listeners_are_called_at_a_loss(dsn, table):
    """With one of them an idle connection is not replaced: its end is what the application wants to know."""
    ended = []
    connection = await connect(dsn)
    connection.add_termination_listener(ended.append)
    await _read(connection)
    await _end_session(table, connection)
    await asyncio.sleep(0)
    assert ended == [connection]


async def test_a_loss_under_a_statement_says_what_else_was_lost(postgres, proxy, table):
    """The driver's own error, with a note; nothing is repeated, not even a read."""
    connection = await connect(proxy.dsn(postgres.dsn()))
    await _set(connection)
    proxy.swallow_next_answer()
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await connection.fetch("SELECT * FROM kept")
    assert "connect again" in caught.value.__notes__[0]
    assert connection.is_closed()


async def test_reads_are_repeated_and_writes_are_not(postgres, proxy, table):
    """As the pool's methods do, also after many other statements; a lost write is reported, and the next one finds a new session."""
    async with connect(proxy.dsn(postgres.dsn())) as connection:
        for number in range(3):
            await connection.execute(INSERT, number)
            proxy.swallow_next_answer()
            assert len(await connection.fetch("SELECT * FROM kept")) == number + 1
        proxy.swallow_next_answer(matching=b"INSERT")
        with pytest.raises(OutcomeUnknownError):
            await connection.execute(INSERT, 3)
        proxy.swallow_next_answer(matching=b"DELETE")
        assert await connection.execute("DELETE FROM kept WHERE id = 0", idempotent=True) == "DELETE 0"
    assert await table.fetchval("SELECT array_agg(id ORDER BY id) FROM kept") == [1, 2, 3]


@pytest.mark.parametrize("name", ["setup", "reset", "session_reset", "commit_log"])
async def test_arguments_that_only_a_pool_can_honour_are_refused(dsn, name):
    """By name, at once."""
    value = {"session_reset": "off", "commit_log": "log"}.get(name, lambda *_: None)
    with pytest.raises(ConfigurationError, match=f"^{name}= is for pools"):
        connect(dsn, **{name: value})


async def test_a_profile_can_be_passed(dsn):
    """What it says of sizes and lifetimes has no meaning for one connection."""
    arguments = {**profiles.AURORA_SERVERLESS, "min_size": 3, "max_size": 5, "max_queries": 1}
    async with connect(dsn, **arguments) as connection:
        for _ in range(3):
            await _read(connection)
    assert resilient_pool.connect is connect
    with pytest.raises(TypeError, match="did you mean 'deadline'"):
        connect(dsn, dedline=1)
