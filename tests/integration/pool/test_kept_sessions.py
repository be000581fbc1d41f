"""No reset follows a lease or a transaction that left its session as it was; one follows everything else."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from jumping_clock import JumpingClock

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

NUMBERS = "CREATE TABLE IF NOT EXISTS kept_sessions (id int); CREATE SEQUENCE IF NOT EXISTS kept_numbers"


async def fetch(connection):
    assert await connection.fetchval("SELECT 1") == 1


async def write(connection):
    await connection.execute("INSERT INTO kept_sessions VALUES ($1)", 1)
    await connection.executemany("UPDATE kept_sessions SET id = $1", [(2,), (3,)])


async def open_and_commit(connection):
    async with connection.transaction():
        await connection.fetch("SELECT id FROM kept_sessions")
        async with connection.transaction():
            await connection.execute("DELETE FROM kept_sessions")


async def roll_back(connection):
    transaction = connection.transaction(isolation="serializable", readonly=True)
    await transaction.start()
    await connection.fetchval("SELECT count(*) FROM kept_sessions")
    await transaction.rollback()


async def look_around(connection):
    assert not connection.is_in_transaction()
    assert connection.get_server_pid()
    assert connection.get_settings().client_encoding == "UTF8"
    assert not connection.is_closed()


async def act_outside_of_the_session(connection):
    await connection.execute("INSERT INTO kept_sessions VALUES (nextval('kept_numbers'))")
    await connection.fetchval("SELECT nextval('kept_numbers')")
    await connection.fetchval("SELECT pg_notify('kept_sessions', 'hello')")
    async with connection.transaction():
        await connection.fetchval("SELECT pg_advisory_xact_lock(4711)")


async def nothing(_connection):
    pass


@pytest.mark.parametrize(
    "use", [nothing, fetch, write, act_outside_of_the_session, open_and_commit, roll_back, look_around]
)
@both_loops
async def test_no_reset_follows_a_lease_that_left_its_session_alone(make_pool, eventually, use):
    """Its connection is free again at once, and no task is made for it."""
    pool = await make_pool()
    await pool.execute(NUMBERS)
    await eventually(lambda: pool.get_idle_size() == 1)
    for _ in range(3):
        async with pool.acquire() as connection:
            await use(connection)
        assert pool.get_idle_size() == pool.get_size() == 1
    assert pool.stats().resets == 1  # after CREATE


async def change_a_setting(connection):
    await connection.execute("SET work_mem = '4MB'")


async def call_set_config(connection):
    await connection.fetchval("SELECT set_config('work_mem', '4MB', false)")


async def lock(connection):
    await connection.fetchval("SELECT pg_advisory_lock(11)")


async def call_something_unknown(connection):
    await connection.execute("INSERT INTO kept_sessions VALUES (hides_a_lock())")


async def select_from_something_unknown(connection):
    await connection.execute("INSERT INTO kept_sessions SELECT hides_a_lock()")


async def send_a_script(connection):
    await connection.execute("SELECT 1; SET work_mem = '4MB'")


async def make_a_temporary_table(connection):
    await connection.execute("CREATE TEMP TABLE passing (id int)")
    await connection.execute("DROP TABLE passing")


async def prepare(connection):
    await (await connection.prepare("SELECT 1")).fetchval()


async def move_a_cursor(connection):
    async with connection.transaction():
        assert [row[0] async for row in connection.cursor("SELECT 1")] == [1]


async def copy(connection):
    await connection.copy_records_to_table("kept_sessions", records=[(1,)])


async def fail(connection):
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.fetchval("SELECT 1 / 0")


async def succeed_and_fail(connection):
    await connection.fetchval("SELECT 1")
    await fail(connection)
    await connection.fetchval("SELECT 1")


async def time_out(connection):
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(5)", timeout=0.05)


async def cancel(connection):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await connection.fetchval("SELECT pg_sleep(5)")


async def begin_by_text(connection):
    await connection.execute("BEGIN")


async def leave_a_transaction_open(connection):
    await connection.transaction().start()
    await connection.execute("INSERT INTO kept_sessions VALUES (666)")


async def reset(connection):
    await connection.reset()


async def listen(connection):
    def heard(*_):
        """Nothing is to be heard."""

    await connection.add_listener("channel", heard)
    await connection.remove_listener("channel", heard)


async def hear_of_its_end(connection):
    connection.add_termination_listener(lambda _: None)


async def send_past_the_lease(connection):
    await connection._con.execute("SET work_mem = '4MB'")


async def reach_through(connection):
    await connection._protocol.query("SET work_mem = '4MB'", None)


OTHERS = [
    change_a_setting,
    call_set_config,
    lock,
    call_something_unknown,
    select_from_something_unknown,
    send_a_script,
    make_a_temporary_table,
    prepare,
    move_a_cursor,
    copy,
    fail,
    succeed_and_fail,
    time_out,
    cancel,
    begin_by_text,
    leave_a_transaction_open,
    reset,
    listen,
    hear_of_its_end,
    send_past_the_lease,
    reach_through,
]


@pytest.mark.parametrize("before", [nothing, fetch])
@pytest.mark.parametrize("use", OTHERS)
@both_loops
async def test_a_reset_follows_a_lease_on_which_anything_else_was_done(make_pool, use, before):
    """Whatever may be left behind is gone for the next caller, who gets the same session."""
    pool = await make_pool(max_size=1)
    await pool.execute(NUMBERS)
    await pool.execute(
        "CREATE OR REPLACE FUNCTION hides_a_lock() RETURNS int LANGUAGE sql AS 'SELECT pg_advisory_lock(11); SELECT 1'"
    )
    await pool.fetchval("SELECT 1")
    resets = pool.stats().resets
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the driver complains of an open transaction
    async with pool.acquire() as connection:
        await before(connection)
        pid = connection.get_server_pid()
        await use(connection)
    async with pool.acquire() as connection:
        assert connection.get_server_pid() == pid
        assert await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
        assert await connection.fetchval("SELECT reset_val = setting FROM pg_settings WHERE name = 'work_mem'")
        assert await connection.fetchval("SELECT count(*) FROM kept_sessions WHERE id = 666") == 0
    assert pool.stats().resets == resets + 1


@both_loops
async def test_a_lease_that_is_released_in_use_is_not_lent_again_as_it_is(make_pool, proxy, dsn):
    """The statement that another task still runs on it never meets the next caller's."""
    pool = await make_pool(proxy.dsn(dsn), max_size=1)
    connection = await pool.acquire()
    await connection.fetchval("SELECT 1")
    proxy.delay(0.1)
    running = asyncio.create_task(connection.fetchval("SELECT 2"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await pool.release(connection)
    assert await pool.fetchval("SELECT 3") == 3
    await asyncio.wait([running])
    assert running.exception() is not None or running.result() == 2


@pytest.mark.parametrize("command", ["commit", "rollback", "start"])
@both_loops
async def test_a_transaction_that_is_about_to_end_when_its_lease_is_released_meets_no_other_caller(
    make_pool, proxy, dsn, command
):
    """Its COMMIT or ROLLBACK, or BEGIN, may still be under way."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    pool = await make_pool(proxy.dsn(dsn), max_size=1)
    connection = await pool.acquire()
    await connection.fetchval("SELECT 1")
    transaction = connection.transaction()
    if command != "start":
        await transaction.start()
    proxy.delay(0.1)
    running = asyncio.create_task(getattr(transaction, command)())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await pool.release(connection)
    async with pool.acquire() as other:
        assert not other.is_in_transaction()
        assert await other.fetchval("SELECT 3") == 3
    await asyncio.wait([running])
    running.exception()


async def test_a_lease_that_lasted_long_is_asked_in_its_reset(make_pool):
    """What was answered before it proves nothing now; the reset does, and no caller waits for that."""
    clock = JumpingClock()
    pool = await make_pool(ping_after=20.0, clock=clock)
    await pool.fetchval("SELECT 1")
    async with pool.acquire() as connection:
        await connection.fetchval("SELECT 1")
        clock.passed += 25.0
    assert pool.stats().resetting == 1
    assert await pool.fetchval("SELECT 1") == 1
    assert (pool.stats().resets, pool.stats().pings) == (1, 0)


class Own(asyncpg.Connection):
    """What it sends is its own affair."""

    async def fetchval(self, query, *args, **options):
        """Take a lock before."""
        await super().execute("SELECT pg_advisory_lock(12)")
        return await super().fetchval(query, *args, **options)


async def passing(_connection):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        {"session_reset": "background"},
        {"session_reset": "on_release"},
        {"connection_class": Own},
        {"setup": passing},
        {"reset": passing},
    ],
)
async def test_texts_are_trusted_only_where_nothing_else_may_have_been_done(make_pool, arguments):
    """A connection class, `setup=` and `reset=` are the application's own; the other ways to reset do so after every lease."""
    pool = await make_pool(**arguments)
    async with pool.acquire() as connection:
        await connection.fetchval("SELECT 1")
    async with pool.acquire() as connection:
        assert await connection.fetchval("SELECT 1") == 1
    assert pool.stats().resets >= 1


async def test_where_calls_are_not_reset_a_lease_is_if_it_may_have_changed_its_session(make_pool, eventually):
    """`session_reset="off"` is no reason to reset more than by default."""
    pool = await make_pool(session_reset="off")
    for _ in range(3):
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
    await pool.execute("SET application_name = 'left'")
    assert pool.stats().resets == 0
    async with pool.acquire() as connection:
        await connection.execute("SET application_name = 'left'")
    await eventually(lambda: pool.stats().resets == 1)


@pytest.mark.parametrize("options", [{}, {"readonly": True}, {"resolve_commit": False}, {"isolation": "serializable"}])
@both_loops
async def test_no_reset_follows_a_transaction_that_left_its_session_alone(make_pool, eventually, options):
    """It committed, or was rolled back for a reason of the application's."""
    pool = await make_pool()
    await pool.execute(NUMBERS)
    await eventually(lambda: pool.get_idle_size() == 1)
    for _ in range(2):
        async for attempt in pool.transaction(**options):
            async with attempt as connection:
                await connection.fetch("SELECT id FROM kept_sessions")
                if "readonly" not in options:
                    await connection.execute("INSERT INTO kept_sessions VALUES (1)")
        assert pool.get_idle_size() == pool.get_size() == 1
        with pytest.raises(KeyError):
            async for attempt in pool.transaction(**options):
                async with attempt as connection:
                    await connection.fetch("SELECT id FROM kept_sessions")
                    raise KeyError
        assert pool.get_idle_size() == pool.get_size() == 1
    assert pool.stats().resets == 1


@pytest.mark.parametrize("use", [change_a_setting, call_set_config, lock, call_something_unknown, prepare, copy, fail])
async def test_a_reset_follows_a_transaction_in_which_anything_else_was_done(make_pool, use):
    """Whether it is committed or not: a lock is not undone by a rollback."""
    pool = await make_pool(max_size=1)
    await pool.execute(NUMBERS)
    await pool.execute(
        "CREATE OR REPLACE FUNCTION hides_a_lock() RETURNS int LANGUAGE sql AS 'SELECT pg_advisory_lock(11); SELECT 1'"
    )
    await pool.fetchval("SELECT 1")
    resets = pool.stats().resets
    with pytest.raises(KeyError):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await use(connection)
                raise KeyError
    assert await pool.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    assert pool.stats().resets == resets + 1


@pytest.mark.parametrize("turns", range(12))
@both_loops
async def test_a_transaction_that_is_cancelled_anywhere_leaves_no_trace(make_pool, turns):
    """At whatever turn of the event loop that is, the next caller finds no transaction, and no statement under way."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    pool = await make_pool(max_size=1)
    await pool.execute(NUMBERS)
    await pool.execute("DELETE FROM kept_sessions")

    async def work():
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute("INSERT INTO kept_sessions VALUES (1)")

    task = asyncio.create_task(work())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    async with pool.acquire() as connection:
        assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT 5") == 5


class Sets(asyncpg.Connection):
    """An application's class whose every statement is preceded by one of its own."""

    async def fetchval(self, *args, **options):
        await super().execute("SET work_mem = '5MB'")
        return await super().fetchval(*args, **options)


async def test_a_reset_follows_a_call_that_an_applications_class_makes_more_of(make_pool):
    """What its own statements leave behind is not in the text of the call."""
    pool = await make_pool(max_size=1, connection_class=Sets)
    assert await pool.fetchval("SHOW work_mem") == "5MB"
    assert (await pool.fetchrow("SHOW work_mem"))[0] == "4MB"


@pytest.mark.parametrize("before", [nothing, fetch])
@both_loops
async def test_a_reset_follows_what_another_task_did_past_the_lease_while_a_statement_ran(make_pool, before):
    """The end of that statement says nothing of what was begun beside it."""
    pool = await make_pool(max_size=1)
    await pool.fetchval("SELECT 1")
    async with pool.acquire() as connection:
        await before(connection)
        reading = asyncio.create_task(connection.fetchval("SELECT 1 FROM pg_sleep(0.05)"))
        await asyncio.sleep(0.01)
        inner = connection._con
        await reading
        await inner.execute("SET work_mem = '9MB'")
    assert await pool.fetchval("SHOW work_mem") == "4MB"
