"""A loan ends with its connection: the place is free at once, a later release does nothing, and what outlives it is of no use."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError, ResilientPool

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
RELEASED = "released back to the pool"


async def closed(connection, bystander):
    await connection.close()


async def closed_hastily(connection, bystander):
    await connection.close(timeout=3)


async def terminated(connection, bystander):
    connection.terminate()


async def terminated_below(connection, bystander):
    connection._con.terminate()


async def closed_below(connection, bystander):
    await connection._con.close()


async def lost(connection, bystander):
    link, ended = connection._con, asyncio.Event()
    link.add_termination_listener(lambda _: ended.set())
    await bystander.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    await ended.wait()


async def lost_in_an_operation(connection, bystander):
    pid = connection.get_server_pid()
    running = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0)
    while not await bystander.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = $1 AND state = 'active'", pid
    ):
        await asyncio.sleep(0.01)
    await bystander.execute("SELECT pg_terminate_backend($1)", pid)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
        await running


BY_THE_APPLICATION = [closed, closed_hastily, terminated]
BELOW = [terminated_below, closed_below, lost, lost_in_an_operation]


@both_loops
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("end", [*BY_THE_APPLICATION, *BELOW[:-1]])
async def test_the_place_is_free_as_soon_as_the_connection_is_closed(make_pool, bystander, end, used):
    """By whichever way: before it is released, and releasing it then does no harm."""
    async with make_pool(max_size=1, deadline=5) as pool:
        for _ in range(4):
            connection = await pool.acquire()
            if used:
                assert await connection.fetchval("SELECT 1") == 1
            await end(connection, bystander)
            async with pool.acquire() as next_one:
                await pool.release(connection)
                assert await next_one.fetchval("SELECT 1") == 1
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.get_size() == 1


@both_loops
@pytest.mark.parametrize("end", [*BY_THE_APPLICATION, *BELOW])
async def test_a_used_lease_ends_with_its_connection(make_pool, bystander, end):
    """Nothing can be sent on it, and what it is can still be asked."""
    async with make_pool(max_size=2, deadline=5) as pool, pool.acquire() as connection:
        await connection.execute("SET application.mark = 'here'")
        await end(connection, bystander)
        assert connection.is_released
        assert connection.is_closed()
        assert "closed" in repr(connection)
        opened = pool.stats().opened
        for use in (
            lambda: connection.fetchval("SELECT 1"),
            lambda: connection.prepare("SELECT 1"),
            lambda: connection.add_listener("news", print),
            lambda: connection.reset(),
            lambda: asyncio.to_thread(connection.transaction),
            lambda: asyncio.to_thread(connection.get_server_pid),
        ):
            with pytest.raises(asyncpg.InterfaceError, match="closed"):
                await use()
        await pool.release(connection)
        assert pool.stats().opened == opened


@both_loops
@pytest.mark.parametrize("end", [*BY_THE_APPLICATION, *BELOW])
async def test_closing_what_is_closed_does_nothing(make_pool, bystander, end):
    """As with a connection of the driver's: a framework closes what it lost. After a release it is an error."""
    async with make_pool(max_size=1, deadline=5) as pool:
        connection = await pool.acquire()
        await connection.execute("SET application.mark = 'here'")
        await end(connection, bystander)
        await connection.close()
        await connection.close(timeout=1)
        connection.terminate()
        async with pool.acquire() as next_one:
            connection.terminate()
            assert await next_one.fetchval("SELECT 1") == 1
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            await next_one.close()
        with pytest.raises(asyncpg.InterfaceError, match=RELEASED):
            next_one.terminate()


@both_loops
@pytest.mark.parametrize("end", [*BY_THE_APPLICATION, terminated_below, closed_below, lost])
async def test_waiters_get_the_place_of_a_lease_that_was_closed(make_pool, bystander, end):
    """They need not wait for its release."""
    async with make_pool(max_size=1, deadline=5) as pool:
        connection = await pool.acquire()
        await connection.execute("SET application.mark = 'here'")
        waiting = asyncio.create_task(pool.fetchval("SELECT 1"))
        await asyncio.sleep(0)
        await end(connection, bystander)
        async with asyncio.timeout(3):
            assert await waiting == 1


@pytest.mark.parametrize("end", [*BY_THE_APPLICATION, *BELOW])
async def test_closing_the_pool_does_not_wait_for_a_lease_that_was_closed(make_pool, bystander, end):
    """Also when nobody releases it any more."""
    pool = await make_pool(max_size=2)
    connection = await pool.acquire()
    await connection.execute("SET application.mark = 'here'")
    await end(connection, bystander)
    async with asyncio.timeout(3):
        await pool.close()


@pytest.mark.parametrize("idle", [0, 1])
@pytest.mark.parametrize("min_size", [0, 2])
def test_a_lease_can_be_terminated_while_no_loop_runs(postgres, min_size, idle):
    """By a finalizer, say: its place is free, and the pool is as good as before."""
    with asyncio.Runner() as runner:

        async def lend():
            others = [await pool.acquire() for _ in range(idle)]
            connection = await pool.acquire()
            for other in others:
                await pool.release(other)
            return connection

        async def work():
            async with asyncio.timeout(5):
                leases = [await pool.acquire() for _ in range(2)]
                answers = [await lease.fetchval("SELECT 1") for lease in leases]
                for lease in leases:
                    await pool.release(lease)
                await pool.close()
            return answers

        pool = ResilientPool(postgres.dsn(), min_size=min_size, max_size=2)
        runner.run(pool._open())
        connection = runner.run(lend())
        connection.terminate()
        assert connection.is_closed()
        assert runner.run(work()) == [1, 1]


@both_loops
async def test_an_unused_lease_that_was_lost_is_repaired_by_its_next_operation(make_pool, bystander):
    """Its place was free meanwhile: it takes another one, and waits for it if it must."""
    async with make_pool(max_size=1, deadline=5) as pool:
        connection = await pool.acquire()
        await lost(connection, bystander)
        assert not connection.is_released
        assert connection.is_closed()
        assert not connection.is_in_transaction()
        assert connection.get_server_pid() > 0
        other = await pool.acquire()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", deadline=0.1)
        running = asyncio.create_task(connection.fetchval("SELECT 1"))
        await asyncio.sleep(0)
        await pool.release(other)
        assert await running == 1
        assert not connection.is_closed()
        await pool.release(connection)
        assert (await pool.fetchval("SELECT 1"), pool.get_size()) == (1, 1)


async def test_a_lease_that_was_lost_with_its_answer_is_not_repaired(make_pool):
    """What its first operation left in the session is gone, however soon after the answer that was."""

    class Leaving(asyncpg.Connection):
        async def execute(self, query):
            status = await super().execute(query)
            self.terminate()
            return status

    async with make_pool(max_size=1, connection_class=Leaving) as pool, pool.acquire() as connection:
        assert await connection.execute("SET application.mark = 'here'") == "SET"
        assert connection.is_released
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            await connection.fetchval("SELECT current_setting('application.mark', true)")


async def made_on(connection):
    """Make one of everything that is bound to a connection."""
    statement = await connection.prepare("SELECT 1")
    unfinished = await connection.prepare("SELECT generate_series(1, 100)")
    fresh = connection.transaction()
    begun = connection.transaction()
    await begun.start()
    inner = connection.transaction()
    await inner.start()
    rows = connection.cursor("SELECT generate_series(1, 100)", prefetch=2)
    iterator = rows.__aiter__()
    await iterator.__anext__()
    cursor = await connection.cursor("SELECT generate_series(1, 100)")
    factory = statement.cursor()
    return {
        "a transaction's start": fresh.start,
        "a transaction's commit": begun.commit,
        "a transaction's rollback": begun.rollback,
        "a savepoint's commit": inner.commit,
        "a savepoint's rollback": inner.rollback,
        "the next row": iterator.__anext__,
        "rows": lambda: rows.__aiter__().__anext__(),
        "a cursor's fetch": lambda: cursor.fetch(1),
        "a cursor's fetchrow": cursor.fetchrow,
        "a cursor's forward": lambda: cursor.forward(1),
        "a cursor of a statement": lambda: factory.__aiter__().__anext__(),
        "a statement's fetch": statement.fetch,
        "a statement's explain": unfinished.explain,
        "a statement's executemany": lambda: statement.executemany([()]),
        "a listener's end": lambda: connection.remove_listener("news", print),
    }


USES = [
    "a transaction's start",
    "a transaction's commit",
    "a transaction's rollback",
    "a savepoint's commit",
    "a savepoint's rollback",
    "the next row",
    "rows",
    "a cursor's fetch",
    "a cursor's fetchrow",
    "a cursor's forward",
    "a cursor of a statement",
    "a statement's fetch",
    "a statement's explain",
    "a statement's executemany",
    "a listener's end",
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("end", ["released", "closed"])
async def test_what_was_made_on_a_lease_is_of_no_use_after_it(make_pool, use, end):
    """Nothing of it is sent on what is the next caller's connection by then, who has a transaction of its own open."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)  # of the open transaction
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        made = await made_on(connection)
        assert list(made) == USES
        await (pool.release(connection) if end == "released" else connection.close())
        async with pool.acquire() as other, other.transaction():
            await other.execute("CREATE TEMPORARY TABLE mine (x int) ON COMMIT DROP")
            # A session that has ended needs no rollback, which must not hide the error that it follows.
            harmless = end == "closed" and use.endswith("rollback")
            with contextlib.nullcontext() if harmless else pytest.raises(asyncpg.InterfaceError):
                await made[use]()
            assert await other.fetchval("SELECT count(*) FROM mine") == 0
            assert other.is_in_transaction()


async def test_the_end_of_a_block_sends_nothing_after_the_lease_was_released_inside_it(make_pool, bystander):
    """Neither COMMIT nor ROLLBACK: the next caller's transaction goes on."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
    async with make_pool(max_size=1) as pool:
        for error in (None, KeyError("mine")):
            connection = await pool.acquire()
            with pytest.raises(asyncpg.InterfaceError if error is None else KeyError):
                async with connection.transaction():
                    await pool.release(connection)
                    other = await pool.acquire()
                    begun = other.transaction()
                    await begun.start()
                    if error is not None:
                        raise error
            assert other.is_in_transaction()
            await begun.commit()
            await pool.release(other)


async def test_a_release_while_an_operation_runs_hands_on_no_connection_that_is_busy(make_pool):
    """The operation is told, and the next caller gets another connection, or this one when it is idle."""
    async with make_pool(max_size=1, deadline=5) as pool:
        for sql, expected in (("SELECT pg_sleep(60)", asyncpg.InterfaceError), ("SELECT 1", None)):
            connection = await pool.acquire()
            running = asyncio.ensure_future(connection.fetchval(sql))
            await asyncio.sleep(0.05 if expected else 0)
            await pool.release(connection)
            await pool.release(connection)
            assert await pool.fetchval("SELECT 2") == 2
            with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError, OutcomeUnknownError)):
                await running


async def test_a_lease_may_be_released_by_another_task_and_only_into_its_own_pool(make_pool):
    """Also after it has ended: another pool knows nothing of it."""
    async with make_pool(max_size=1) as one, make_pool(max_size=1) as other:
        connection = await one.acquire()
        with pytest.raises(asyncpg.InterfaceError, match="not a member"):
            await other.release(connection)
        await asyncio.create_task(one.release(connection))
        with pytest.raises(asyncpg.InterfaceError, match="not a member"):
            await other.release(connection)
        assert (await one.fetchval("SELECT 1"), one.get_size(), other.get_size()) == (1, 1, 0)


@both_loops
async def test_a_termination_listener_hears_the_end_of_its_lease_and_of_no_other(make_pool, bystander):
    """Once, with the lease; not when it was released, and not when an operation has repaired it."""
    heard = []

    async def hear(connection):
        heard.append(connection)

    async with make_pool(max_size=2, deadline=5) as pool:
        for end in (lost, closed, terminated, terminated_below):
            for used in (False, True):
                connection = await pool.acquire()
                connection.add_termination_listener(hear)
                connection.add_termination_listener(hear)
                if used:
                    await connection.fetchval("SELECT 1")
                await end(connection, bystander)
                await asyncio.sleep(0.01)
                assert heard == [connection]
                assert connection.is_released
                heard.clear()
        connection = await pool.acquire()
        connection.add_termination_listener(hear)
        await pool.release(connection)
        await pool.expire_connections()
        connection = await pool.acquire()
        connection.add_termination_listener(hear)
        connection.remove_termination_listener(hear)
        await lost(connection, bystander)
        await asyncio.sleep(0.01)
        assert heard == []


async def test_a_listener_that_borrows_again_hears_everything_through_five_restarts(make_pool, postgres):
    """Every notification that is sent while it listens; its old leases are never released."""
    async with make_pool(min_size=0, max_size=2, deadline=30) as pool:
        heard: list[int] = []
        listening = asyncio.Event()

        async def listen():
            while True:
                ended = asyncio.Event()
                connection = await pool.acquire()
                connection.add_termination_listener(lambda _, ended=ended: ended.set())
                await connection.add_listener("restarts", lambda *news: heard.append(int(news[-1])))
                listening.set()
                await ended.wait()

        task = asyncio.create_task(listen())
        for number in range(6):
            async with asyncio.timeout(30):
                await listening.wait()
                await pool.execute(f"NOTIFY restarts, '{number}'")
                while number not in heard:
                    await asyncio.sleep(0.01)
                if number < 5:
                    listening.clear()
                    await postgres.restart("immediate" if number % 2 else "fast")
        assert heard == list(range(6))
        task.cancel()
        pool.terminate()


@both_loops
async def test_what_follows_a_cancelled_beginning_on_a_lease_is_not_part_of_its_transaction(make_pool, table):
    """The server may have begun it all the same: a row that is acknowledged afterwards would go with it at the release."""
    heard = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
    cancelled = 0
    async with make_pool(max_size=1) as pool:
        for turns in range(80):
            async with pool.acquire() as connection:
                await connection.execute("SELECT 1")
                beginning = asyncio.ensure_future(connection.transaction().__aenter__())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not beginning.done():
                    beginning.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await beginning
                    cancelled += 1
                    assert not connection.is_in_transaction()
                    await connection.execute(f"INSERT INTO {table} VALUES ($1)", turns)
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == cancelled > 2
    assert heard == []
