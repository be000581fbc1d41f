"""Giving a connection back: nothing that was left behind reaches the next caller, and nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

RELEASED = "released back to the pool"


class SlowReset(asyncpg.Connection):
    """A connection whose reset takes its time."""

    async def reset(self, *, timeout=None):
        await asyncio.sleep(0.1)
        await super().reset(timeout=timeout)


class SlowCancel(asyncpg.Connection):
    """A connection whose request to cancel takes its time."""

    async def _cancel(self, *waiters):
        await asyncio.sleep(0.1)
        await super()._cancel(*waiters)


class Interruption(Exception):
    """What the application throws in the middle."""


async def test_releasing_twice_is_harmless(make_pool):
    """A second release of the same lease does nothing."""
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        await pool.release(connection)
        await pool.release(connection)
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_second_release_does_not_end_the_next_lease(make_pool):
    """Whoever holds the connection now keeps it, although its last holder releases again."""
    async with make_pool(max_size=1) as pool:
        former = await pool.acquire()
        await pool.release(former)
        async with pool.acquire() as present:
            await pool.release(former)
            with pytest.raises(asyncio.TimeoutError):
                await pool.acquire(timeout=0.01)
            assert await present.fetchval("SELECT 1") == 1


async def test_a_connection_released_by_hand_may_leave_its_context(make_pool):
    """A release inside of `async with pool.acquire()` is enough; the end of the block does no harm."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            await pool.release(connection)
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_another_pools_connection_is_refused(make_pool):
    """Releasing into the wrong pool raises, and the lease goes on."""
    async with make_pool() as one, make_pool() as other, one.acquire() as connection:
        with pytest.raises(asyncpg.InterfaceError, match="is not a member"):
            await other.release(connection)
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_bare_connection_is_refused(make_pool, bystander):
    """A connection that no pool made cannot be released into one."""
    async with make_pool() as pool:
        with pytest.raises(asyncpg.InterfaceError, match="is not a member"):
            await pool.release(bystander)


@pytest.mark.parametrize("thing", [None, 1, "connection"])
async def test_a_thing_that_is_no_connection_is_refused(make_pool, thing):
    """Releasing anything else raises the same error."""
    async with make_pool() as pool:
        with pytest.raises(asyncpg.InterfaceError, match="is not a member"):
            await pool.release(thing)


@pytest.mark.parametrize(
    "use",
    [
        lambda connection: connection.execute("SELECT 1"),
        lambda connection: connection.fetch("SELECT 1"),
        lambda connection: connection.fetchval("SELECT 1"),
        lambda connection: connection.fetchrow("SELECT 1"),
        lambda connection: connection.executemany("SELECT $1::int", [(1,)]),
        lambda connection: connection.prepare("SELECT 1"),
        lambda connection: connection.copy_records_to_table("t", records=[(1,)]),
        lambda connection: connection.add_listener("channel", print),
        lambda connection: connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog"),
        lambda connection: connection.reset(),
        lambda connection: connection.close(),
        lambda connection: connection.terminate(),
        lambda connection: connection.cursor("SELECT 1"),
        lambda connection: connection.transaction(),
        lambda connection: connection.get_server_pid(),
        lambda connection: connection.get_settings(),
        lambda connection: connection.is_in_transaction(),
    ],
)
async def test_a_released_connection_is_of_no_use(make_pool, use):
    """Each method of a lease that ended raises `InterfaceError`, and the connection is as good as before."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            assert "released" not in repr(connection)
        assert "released" in repr(connection)
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            answer = use(connection)
            if asyncio.iscoroutine(answer):
                await answer
        assert await pool.fetchval("SELECT 1") == 1


async def test_prepared_statements_end_with_their_lease(make_pool):
    """A statement prepared in a lease raises in each of its methods afterwards."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            statement = await connection.prepare("SELECT $1::int")
            assert await statement.fetchval(3) == 3
        for use in (
            lambda: statement.fetch(1),
            lambda: statement.fetchval(1),
            lambda: statement.fetchrow(1),
            lambda: statement.explain(1),
            lambda: statement.cursor(1),
            statement.get_query,
            statement.get_statusmsg,
            statement.get_parameters,
            statement.get_attributes,
        ):
            with pytest.raises(asyncpg.InterfaceError, match=f"PreparedStatement.*{RELEASED}"):
                answer = use()
                if asyncio.iscoroutine(answer):
                    await answer


async def test_cursors_end_with_their_lease(make_pool):
    """A cursor, made on the connection or from a prepared statement, raises afterwards."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            statement = await connection.prepare("SELECT generate_series(1, 9)")
            async with connection.transaction():
                cursors = [await connection.cursor("SELECT generate_series(1, 9)"), await statement.cursor()]
                assert [(await cursor.fetchrow())[0] for cursor in cursors] == [1, 1]
        for cursor in cursors:
            for use, arguments in ((cursor.fetch, (1,)), (cursor.fetchrow, ()), (cursor.forward, (1,))):
                with pytest.raises(asyncpg.InterfaceError, match=f"Cursor.*{RELEASED}"):
                    await use(*arguments)


async def test_transactions_end_with_their_lease(make_pool):
    """A transaction object raises afterwards, so that it cannot end the next caller's transaction."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            async with connection.transaction():
                pass
        for use in (transaction.start, transaction.commit, transaction.rollback):
            with pytest.raises(asyncpg.InterfaceError, match=f"Transaction.*{RELEASED}"):
                await use()


@both_loops
async def test_what_a_former_lease_left_does_not_reach_the_next(make_pool):
    """A prepared statement of the lease before stays unusable while the same connection is lent again."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
            statement = await connection.prepare("SELECT 1")
        async with pool.acquire() as connection:
            assert connection.get_server_pid() == pid
            with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
                await statement.fetchval()


@both_loops
async def test_an_open_transaction_is_rolled_back(make_pool, bystander):
    """Released in the middle of a transaction, a connection is rolled back, said to be so, and used again."""
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    await bystander.execute("CREATE TABLE half_done (id int)")
    try:
        async with make_pool(max_size=1) as pool:
            async with pool.acquire() as connection:
                pid = connection.get_server_pid()
                await connection.transaction().start()
                await connection.execute("INSERT INTO half_done VALUES (1)")
            async with pool.acquire() as connection:
                assert connection.get_server_pid() == pid
                assert not connection.is_in_transaction()
                assert await connection.fetchval("SELECT count(*) FROM half_done") == 0
                async with connection.transaction():
                    await connection.execute("INSERT INTO half_done VALUES (2)")
        assert [row["id"] for row in await bystander.fetch("SELECT id FROM half_done")] == [2]
        assert ["active transaction" in complaint for complaint in complaints] == [True]
    finally:
        await bystander.execute("DROP TABLE half_done")


@pytest.mark.parametrize(
    ("leave", "look", "clean"),
    [
        ("SET lock_timeout = '7s'", "SHOW lock_timeout", "0"),
        ("SELECT pg_advisory_lock(77)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", 0),
        ("LISTEN left_behind", "SELECT count(*) FROM pg_listening_channels()", 0),
        (
            "DECLARE left_behind CURSOR WITH HOLD FOR SELECT 1",
            "SELECT count(*) FROM pg_cursors WHERE name = 'left_behind'",
            0,
        ),
    ],
)
@pytest.mark.parametrize("through", ["lease", "one-shot"])
async def test_session_state_does_not_reach_the_next_caller(make_pool, leave, look, clean, through):
    """What was set, locked, listened to or declared is gone when the same connection is used again."""
    async with make_pool(max_size=1) as pool:
        if through == "lease":
            async with pool.acquire() as connection:
                await connection.execute(leave)
        else:
            await pool.execute(leave)
        async with pool.acquire() as connection:
            assert await connection.fetchval(look) == clean


async def test_notification_listeners_left_behind_are_warned_of_and_removed(make_pool, bystander):
    """Releasing with a listener still there warns, and it hears nothing any more."""
    heard = []

    def listener(*arguments):
        heard.append(arguments)

    async with make_pool(max_size=1) as pool:
        with pytest.warns(asyncpg.InterfaceWarning, match="active notification listener"):
            async with pool.acquire() as connection:
                await connection.add_listener("channel", listener)
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM pg_listening_channels()") == 0
            await bystander.execute("NOTIFY channel")
            await connection.execute("SELECT 1")
    assert heard == []


async def test_log_listeners_left_behind_are_warned_of_and_removed(make_pool):
    """The same for listeners to the server's messages."""
    heard = []

    def listener(*arguments):
        heard.append(arguments)

    async with make_pool(max_size=1) as pool:
        with pytest.warns(asyncpg.InterfaceWarning, match="active log listener"):
            async with pool.acquire() as connection:
                connection.add_log_listener(listener)
        async with pool.acquire() as connection:
            await connection.execute("DO $$ BEGIN RAISE WARNING 'listen'; END $$")
    assert heard == []


async def test_listeners_that_were_removed_are_not_warned_of(make_pool, recwarn):
    """A lease that tidied up is released in silence, and its listener had heard what was to be heard."""
    heard = asyncio.get_running_loop().create_future()

    def listener(connection, _pid, channel, payload):
        heard.set_result((isinstance(connection, asyncpg.Connection), channel, payload))

    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        await connection.add_listener("channel", listener)
        await connection.execute("NOTIFY channel, 'payload'")
        assert await heard == (True, "channel", "payload")
        await connection.remove_listener("channel", listener)
    assert not recwarn.list


@both_loops
async def test_a_release_that_is_cancelled_still_releases(make_pool):
    """Cancelled while its connection is being reset, a caller's place becomes free all the same."""
    async with make_pool(max_size=1, connection_class=SlowReset) as pool:

        async def work():
            async with pool.acquire():
                pass
            await asyncio.sleep(60)

        for delay in (0, 0.05, 0.15):
            task = asyncio.create_task(work())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with pool.acquire(timeout=10) as connection:
                assert await connection.fetchval("SELECT 1") == 1


@both_loops
async def test_a_query_cancelled_in_the_middle_ends_on_the_server(make_pool, bystander, eventually):
    """A cancelled statement does not go on, and the next caller gets its own answer."""
    async with make_pool(max_size=1) as pool:

        async def work():
            async with pool.acquire() as connection:
                await connection.execute("SELECT pg_sleep(60), 'cancelled in the middle'")

        async def running():
            return await bystander.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%cancelled in the mid%'"
                " AND pid <> pg_backend_pid()"
            )

        task = asyncio.create_task(work())
        await eventually(running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            assert await pool.fetchval("SELECT 'next'") == "next"
        assert not await running()


@both_loops
@pytest.mark.parametrize("through", ["lease", "one-shot"])
async def test_a_slow_request_to_cancel_is_awaited(make_pool, through):
    """While the request to cancel is on its way the connection is nobody's, so it never hits the next statement."""
    async with make_pool(max_size=1, connection_class=SlowCancel) as pool:

        async def work():
            if through == "one-shot":
                return await pool.execute("SELECT pg_sleep(60)")
            async with pool.acquire() as connection:
                return await connection.execute("SELECT pg_sleep(60)")

        task = asyncio.create_task(work())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(10):
            assert await pool.fetchval("SELECT 1 FROM pg_sleep(0.3)") == 1


@both_loops
@pytest.mark.parametrize("through", ["lease", "one-shot"])
async def test_a_query_that_took_too_long_does_not_harm_the_next(make_pool, through):
    """After `timeout=` ran out the caller gets a `TimeoutError`, and the next caller its own answer."""
    async with make_pool(max_size=1) as pool:
        for number in range(5):
            with pytest.raises(asyncio.TimeoutError):
                if through == "one-shot":
                    await pool.fetchval("SELECT 'late' FROM pg_sleep(60)", timeout=0.02)
                else:
                    async with pool.acquire() as connection:
                        await connection.fetchval("SELECT 'late' FROM pg_sleep(60)", timeout=0.02)
            assert await pool.fetchval("SELECT $1::int", number) == number


@both_loops
async def test_a_query_cut_short_from_outside_does_not_harm_the_next(make_pool):
    """The same when `asyncio.timeout()` or `asyncio.wait_for()` around the call ends it."""
    async with make_pool(max_size=1) as pool:
        for number in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await pool.fetchval("SELECT 'late' FROM pg_sleep(60)")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.fetchval("SELECT 'late' FROM pg_sleep(60)"), 0.02)
            assert await pool.fetchval("SELECT $1::int", number) == number


async def test_values_that_cannot_be_sent_leave_no_lock_behind(make_pool, bystander):
    """An argument of the wrong type raises before sending, and the table can be altered at once."""
    await bystander.execute("CREATE TABLE typed (id int)")
    try:
        async with make_pool(max_size=1) as pool:
            with pytest.raises(asyncpg.DataError):
                await pool.execute("INSERT INTO typed VALUES ($1)", "not a number")
            await bystander.execute("SET lock_timeout = '5s'")
            await bystander.execute("ALTER TABLE typed ADD COLUMN more int")
            assert await pool.fetchval("SELECT count(*) FROM typed") == 0
    finally:
        await bystander.execute("DROP TABLE typed")


@pytest.mark.parametrize("way", ["close", "terminate"])
async def test_a_connection_closed_by_its_holder_is_replaced(make_pool, way):
    """`close()` or `terminate()` on a lease is allowed; releasing it does no harm and the next caller gets a new one."""
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        pid = connection.get_server_pid()
        if way == "close":
            await connection.close()
        else:
            connection.terminate()
        await pool.release(connection)
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") != pid


@both_loops
async def test_a_connection_lost_during_its_lease_is_replaced_after_it(make_pool, bystander):
    """When the server ends the session of a lease in use, its holder learns of it and the next caller does not."""
    async with make_pool(max_size=1) as pool:
        # The third is what the driver raises when it has seen half of the end.
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)):
            async with pool.acquire() as connection:
                pid = await connection.fetchval("SELECT pg_backend_pid()")
                await bystander.execute("SELECT pg_terminate_backend($1, 5000)", pid)
                await connection.execute("SELECT set_config('a.b', 'c', false)")
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") != pid


async def test_a_connection_lost_unnoticed_during_its_lease_is_released_in_silence(make_pool, bystander):
    """A lease whose session ended after its last use is released without an error."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await bystander.execute("SELECT pg_terminate_backend($1, 5000)", pid)
            await asyncio.sleep(0.05)
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") != pid


async def test_a_connection_released_while_in_use_is_not_handed_on(make_pool):
    """A release under a running query ends that query one way or another; nobody gets its answer."""
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        query = asyncio.create_task(connection.fetchval("SELECT 'old' FROM pg_sleep(0.2)"))
        await asyncio.sleep(0.05)
        with contextlib.suppress(asyncpg.InterfaceError):
            await pool.release(connection)
        async with asyncio.timeout(10):
            assert await pool.fetchval("SELECT 'new'") == "new"
            (outcome,) = await asyncio.gather(query, return_exceptions=True)
        assert outcome == "old" or isinstance(outcome, Exception)


async def test_an_error_in_the_block_releases(make_pool):
    """An exception that leaves the block passes unchanged and the connection is free again."""
    async with make_pool(max_size=1) as pool:
        with pytest.raises(Interruption):
            async with pool.acquire():
                raise Interruption
        with pytest.raises(asyncpg.SyntaxOrAccessError):
            async with pool.acquire(timeout=5) as connection:
                await connection.execute("SELEKT")
        assert await pool.fetchval("SELECT 1") == 1


async def _rows_in_a_transaction(connection):
    async with connection.transaction():
        for record in await connection.fetch("SELECT generate_series(1, 3)"):
            yield record


async def _rows(connection):
    for record in await connection.fetch("SELECT generate_series(1, 3)"):
        yield record


@both_loops
@pytest.mark.parametrize("kept", [False, True])
async def test_a_generator_left_in_its_transaction_may_be_finalized_late(make_pool, kept):
    """A transaction inside of an asynchronous generator that was not run to its end does not disturb the release."""
    async with make_pool(max_size=1) as pool:
        with pytest.raises(Interruption):
            async with pool.acquire() as connection:
                generator = _rows_in_a_transaction(connection)
                iterator = generator if kept else _rows_in_a_transaction(connection)
                async for _ in iterator:
                    if not kept:
                        del iterator, generator
                    raise Interruption
        async with pool.acquire(timeout=10) as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SELECT 1") == 1
        if kept:
            with contextlib.suppress(asyncpg.InterfaceError):
                await generator.aclose()


async def test_a_generator_left_inside_a_transaction_is_finalized(make_pool):
    """The exception that ends the outer transaction passes through, and the next lease is clean."""
    async with make_pool(max_size=1) as pool:
        with pytest.raises(Interruption):
            async with pool.acquire() as connection, connection.transaction():
                async for _ in _rows(connection):
                    raise Interruption
        async with pool.acquire(timeout=10) as connection:
            assert not connection.is_in_transaction()


async def test_release_takes_a_time_limit(make_pool):
    """`release(connection, timeout=)` is understood, and a reset that lasts longer does not block the pool."""

    class EndlessReset(asyncpg.Connection):
        async def reset(self, *, timeout=None):
            async with asyncio.timeout(timeout):
                await asyncio.sleep(60)

    async with make_pool(max_size=1, connection_class=EndlessReset) as pool:
        connection = await pool.acquire()
        with contextlib.suppress(TimeoutError):
            await pool.release(connection, timeout=0.05)
        connection = await pool.acquire(timeout=10)
        assert await connection.fetchval("SELECT 1") == 1
        connection.terminate()
        await pool.release(connection)
