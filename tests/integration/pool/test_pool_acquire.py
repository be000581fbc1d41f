"""Getting a connection: in turn, within time, and without a trace when the caller goes away."""

from __future__ import annotations

import asyncio
import inspect

import asyncpg
import pytest

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


def _public_methods():
    return [
        name for name, method in inspect.getmembers(asyncpg.Connection, inspect.isfunction) if not name.startswith("_")
    ]


@both_loops
@pytest.mark.parametrize("callers", [1, 5, 20, 100])
async def test_more_callers_than_connections_are_all_served(make_pool, callers):
    """Every one of many callers gets its answer from at most five connections."""
    async with make_pool(max_size=5) as pool:

        async def ask(number):
            async with pool.acquire() as connection:
                return await connection.fetchval("SELECT $1::int", number)

        assert await asyncio.gather(*map(ask, range(callers))) == list(range(callers))
        assert pool.get_size() <= 5


@both_loops
async def test_an_awaited_acquire_is_ended_by_release(make_pool):
    """`await pool.acquire()` hands out a connection that stays taken until it is released."""
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        assert await connection.fetchval("SELECT 1") == 1
        assert pool.get_idle_size() == 0
        await pool.release(connection)
        assert await pool.fetchval("SELECT 2") == 2


async def test_an_acquire_context_is_entered_once(make_pool):
    """Entering the same context again is refused, whether or not the first use is over."""
    async with make_pool(max_size=2) as pool:
        context = pool.acquire()
        async with context:
            with pytest.raises(asyncpg.InterfaceError, match="already acquired"):
                await context.__aenter__()
        with pytest.raises(asyncpg.InterfaceError, match="already acquired"):
            await context.__aenter__()


async def test_a_lease_is_an_asyncpg_connection(make_pool):
    """`isinstance` takes what is handed out for an `asyncpg.Connection`, and for nothing else."""
    async with make_pool() as pool, pool.acquire() as connection:
        assert isinstance(connection, asyncpg.Connection)
        assert not isinstance(connection, list)


@pytest.mark.parametrize("method", _public_methods())
async def test_a_lease_takes_what_asyncpg_takes(make_pool, method):
    """Each public method of `asyncpg.Connection` is there, with its parameters in their order."""
    async with make_pool() as pool, pool.acquire() as connection:
        theirs = list(inspect.signature(getattr(asyncpg.Connection, method)).parameters.values())[1:]
        ours = inspect.signature(getattr(connection, method)).parameters
        takes_any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values())
        for parameter in theirs:
            assert parameter.name in ours or (takes_any_keyword and parameter.kind is parameter.KEYWORD_ONLY)
        in_order = [parameter.name for parameter in theirs if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(in_order)] == in_order


async def test_waiting_for_a_connection_ends_in_time(make_pool):
    """When every connection stays taken, `acquire(timeout=)` raises a `TimeoutError`, and later callers are served."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire(timeout=5):
            with pytest.raises(asyncio.TimeoutError):
                await pool.acquire(timeout=0.03)
        assert await pool.fetchval("SELECT 1") == 1


async def test_a_connection_freed_too_late_is_not_lost(make_pool):
    """A caller whose time ran out takes nothing: what is released afterwards is idle."""
    async with make_pool(max_size=1, min_size=1) as pool:
        async with pool.acquire():
            with pytest.raises(asyncio.TimeoutError):
                await pool.acquire(timeout=0.01)
        async with pool.acquire(timeout=5):
            assert pool.get_size() == 1


@both_loops
async def test_callers_are_served_in_the_order_they_came(make_pool):
    """Whoever asked first gets the connection first, while each holds it a moment."""
    served = []
    async with make_pool(max_size=1) as pool:

        async def queue_up(number):
            async with pool.acquire():
                served.append(number)
                await asyncio.sleep(0)

        async with pool.acquire():
            waiting = [asyncio.create_task(queue_up(number)) for number in range(20)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
    assert served == list(range(20))


async def test_a_newcomer_does_not_overtake(make_pool):
    """A caller that asks in the moment of a release stands behind one that waits already."""
    served = []
    async with make_pool(max_size=1) as pool:

        async def serve(name):
            async with pool.acquire():
                served.append(name)

        connection = await pool.acquire()
        patient = asyncio.create_task(serve("patient"))
        await asyncio.sleep(0)
        release = asyncio.create_task(pool.release(connection))
        await asyncio.gather(release, serve("newcomer"), patient)
    assert served == ["patient", "newcomer"]


@both_loops
async def test_a_cancelled_waiter_leaves_nobody_behind(make_pool):
    """When the first in line is cancelled, the next in line is served."""
    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        first, second = (asyncio.create_task(pool.fetchval("SELECT 1")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await pool.release(connection)
        async with asyncio.timeout(5):
            assert await second == 1


@both_loops
@pytest.mark.parametrize("session_reset", ["auto", "off"])
async def test_a_waiter_cancelled_while_being_served_passes_the_connection_on(make_pool, session_reset):
    """Cancelled after it was handed the connection and before it could run, a waiter keeps nothing."""
    async with make_pool(max_size=1, session_reset=session_reset) as pool:

        async def hold():
            async with pool.acquire():
                await asyncio.sleep(60)

        for turns in range(12):
            connection = await pool.acquire()
            unlucky = asyncio.create_task(hold())
            await asyncio.sleep(0)
            release = asyncio.create_task(pool.release(connection))
            for _ in range(turns):
                await asyncio.sleep(0)
            unlucky.cancel()
            await asyncio.gather(release, unlucky, return_exceptions=True)
            async with asyncio.timeout(5):
                assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("timeout", [None, 100])
async def test_a_caller_cancelled_at_once_leaves_the_pool_whole(make_pool, timeout):
    """A task that is cancelled after its first step, with a time-out or without, takes no connection with it."""
    async with make_pool(min_size=1, max_size=1) as pool:

        async def work():
            async with pool.acquire(timeout=timeout):
                await asyncio.sleep(60)

        for _ in range(3):
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT 1") == 1


@both_loops
async def test_callers_cancelled_while_connecting_leave_no_session_behind(make_pool, sessions_named, eventually):
    """Connections that were being made for cancelled callers end, and places in the pool become free again."""
    name = "cancelled while connecting"
    pool = make_pool(max_size=5, server_settings={"application_name": name})
    async with pool:
        for turns in range(0, 30, 2):
            callers = [asyncio.create_task(pool.fetchval("SELECT pg_sleep(60)")) for _ in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0.0002)
            for caller in callers:
                caller.cancel()
            results = await asyncio.gather(*callers, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
        async with asyncio.timeout(10):
            assert await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(5))) == list(range(5))
        assert pool.get_size() <= 5

    async def gone():
        return await sessions_named(name) == 0

    await eventually(gone)


@both_loops
async def test_fifty_cancelled_callers_do_not_block_one_connection(make_pool):
    """With a single connection and callers cancelled at every stage, whoever is left is served."""
    async with make_pool(max_size=1) as pool:

        async def call(number):
            async with pool.acquire() as connection:
                await connection.execute("SELECT pg_sleep(0.002)")
                return number

        for _ in range(3):
            invalidated = [asyncio.create_task(call(number)) for number in range(50)]
            survivor = asyncio.create_task(call(50))
            for position, task in enumerate(invalidated):
                if position % 5 == 0:
                    await asyncio.sleep(0.001)
                task.cancel()
            outcomes = await asyncio.gather(*invalidated, return_exceptions=True)
            assert all(isinstance(outcome, int | asyncio.CancelledError) for outcome in outcomes)
            async with asyncio.timeout(10):
                assert await survivor == 50
        assert pool.get_size() <= 1


async def test_a_connection_worn_out_while_others_wait_is_replaced_for_them(make_pool):
    """With one place and `max_queries=1`, a waiter gets a new connection instead of waiting for ever."""
    async with make_pool(max_size=1, max_queries=1) as pool:

        async def pid():
            async with pool.acquire() as connection:
                return await connection.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.02)")

        async with asyncio.timeout(10):
            pids = await asyncio.gather(*(pid() for _ in range(4)))
        assert len(set(pids)) == 4


@both_loops
async def test_an_idle_connection_that_the_server_ended_is_not_handed_out(make_pool, bystander):
    """After the sessions of idle connections were terminated, each caller gets a healthy one at once."""
    async with make_pool(min_size=3, max_size=3) as pool:
        pids = [await pool.fetchval("SELECT pg_backend_pid()")]
        await bystander.execute("SELECT pg_terminate_backend($1, 5000)", pids[0])
        assert await pool.fetchval("SELECT pg_backend_pid()") != pids[0]


async def test_a_failing_connect_gives_its_place_back(make_pool):
    """A connection that cannot be made for a reason that stays raises it to each caller, and blocks no place."""
    async with make_pool(max_size=1, database="no_such_database") as pool:
        for _ in range(3):
            with pytest.raises(asyncpg.InvalidCatalogNameError):
                await pool.fetchval("SELECT 1")
        assert pool.get_size() == 0
