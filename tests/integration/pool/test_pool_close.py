"""Opening and closing: races while opening, what close waits for, and what is refused before and after."""

from __future__ import annotations

import asyncio
import threading
import uuid

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError, create_pool

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

USES = [
    lambda pool: pool.fetch("SELECT 1"),
    lambda pool: pool.fetchrow("SELECT 1"),
    lambda pool: pool.fetchval("SELECT 1"),
    lambda pool: pool.execute("SELECT 1"),
    lambda pool: pool.executemany("SELECT $1::int", [(1,)]),
    lambda pool: pool.fetchmany("SELECT $1::int", [(1,)]),
    lambda pool: pool.copy_records_to_table("t", records=[]),
    lambda pool: pool.acquire(),
]


@pytest.mark.parametrize("use", USES)
async def test_a_pool_that_was_not_opened_refuses(make_pool, use):
    """Use before `await pool` says what is missing."""
    with pytest.raises(asyncpg.InterfaceError, match="not initialized"):
        await use(make_pool())


@pytest.mark.parametrize("use", USES)
async def test_a_closed_pool_refuses(make_pool, use):
    """Use after `close()` says why."""
    pool = make_pool()
    async with pool:
        await pool.execute("SELECT 1")
    with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
        await use(pool)


@pytest.mark.parametrize("use", USES)
async def test_a_terminated_pool_refuses(make_pool, use):
    """Use after `terminate()` says why."""
    pool = await make_pool()
    pool.terminate()
    with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
        await use(pool)


async def test_a_closed_pool_is_not_opened_again(make_pool):
    """`close()` is final: entering the pool a second time leaves it closed."""
    pool = await make_pool()
    await pool.close()
    try:
        await pool
    except asyncpg.InterfaceError as error:
        assert "closed" in str(error)
    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        await pool.fetchval("SELECT 1")


async def test_opening_twice_in_turn_is_harmless(make_pool):
    """`await pool` on an open pool returns the same pool."""
    pool = make_pool(min_size=1)
    assert await pool is pool
    assert await pool is pool
    assert await pool.fetchval("SELECT 1") == 1
    assert pool.get_size() == 1


async def test_create_pool_is_the_same_thing(dsn):
    """`await create_pool(...)` and `async with create_pool(...)` give an open pool."""
    pool = await create_pool(dsn, min_size=1, max_size=2)
    assert (pool.get_min_size(), pool.get_max_size()) == (1, 2)
    await pool.close()
    async with create_pool(dsn) as pool:
        assert await pool.fetchval("SELECT 1") == 1


@both_loops
async def test_two_tasks_do_not_open_one_pool(make_pool):
    """The second of two concurrent openings is told of the first, which succeeds."""
    pool = make_pool(min_size=1, max_size=1)
    first, second = asyncio.ensure_future(pool), asyncio.ensure_future(pool)
    assert await first is pool
    with pytest.raises(asyncpg.InterfaceError, match="being initialized"):
        await second
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


@both_loops
async def test_a_pool_being_opened_is_not_ready(make_pool):
    """A caller that comes while the first connections are made is told of the race."""
    pool = make_pool(min_size=1, max_size=1)
    opening = asyncio.ensure_future(pool)
    await asyncio.sleep(0)
    with pytest.raises(asyncpg.InterfaceError, match="being initialized, but not yet ready"):
        await pool.fetchval("SELECT 1")
    await opening
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


@both_loops
async def test_opening_that_fails_leaves_nothing_open(make_pool, sessions_named, eventually):
    """When one of the first connections cannot be made its error is raised and the others are closed."""
    name, calls = "opening fails", 0

    async def init(_connection):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("the third")

    pool = make_pool(min_size=4, max_size=4, init=init, server_settings={"application_name": name})
    with pytest.raises(ValueError, match="the third"):
        await pool

    async def none_left():
        return await sessions_named(name) == 0

    await eventually(none_left)
    with pytest.raises(asyncpg.InterfaceError):
        await pool.fetchval("SELECT 1")


async def test_opening_a_database_that_does_not_exist_raises_at_once(make_pool):
    """A pool with connections to be made first finds a permanent error while it is opened."""
    async with asyncio.timeout(5):
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await make_pool(min_size=1, database="no_such_database")


@both_loops
async def test_opening_that_is_cancelled_leaves_nothing_open(make_pool, sessions_named, eventually):
    """Cancelled while its first connections are initialized, a pool closes them."""
    name, entered = "opening cancelled", asyncio.Event()

    async def init(_connection):
        entered.set()
        await asyncio.sleep(60)

    opening = asyncio.ensure_future(
        make_pool(min_size=2, max_size=2, init=init, server_settings={"application_name": name})
    )
    await entered.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening

    async def none_left():
        return await sessions_named(name) == 0

    await eventually(none_left)


@pytest.mark.parametrize("way", ["close", "terminate"])
async def test_a_pool_tells_whether_it_is_closing(make_pool, way):
    """`is_closing()` turns with `close()` and with `terminate()`, inside of the pool's own block too."""
    async with make_pool() as pool:
        assert not pool.is_closing()
        if way == "close":
            await pool.close()
        else:
            pool.terminate()
        assert pool.is_closing()


async def test_ending_twice_is_harmless(make_pool):
    """`close()` and `terminate()` may follow each other in any order."""
    for ends in (("close", "close"), ("terminate", "terminate"), ("close", "terminate"), ("terminate", "close")):
        pool = await make_pool(min_size=1)
        for end in ends:
            answer = getattr(pool, end)()
            if answer is not None:
                await answer
        assert pool.get_size() == 0


@both_loops
async def test_closing_ends_every_session(make_pool, sessions_named, eventually):
    """After `close()` the server holds no session of the pool, idle ones and used ones alike."""
    name = "closing ends"
    async with make_pool(min_size=3, max_size=5, server_settings={"application_name": name}) as pool:
        leases = [await pool.acquire() for _ in range(5)]
        await asyncio.gather(*(lease.fetchval("SELECT 1") for lease in leases[:4]))
        for lease in leases:
            await pool.release(lease)
        assert await sessions_named(name) == 5

    async def none_left():
        return await sessions_named(name) == 0

    await eventually(none_left)


@both_loops
async def test_closing_waits_for_leases(make_pool):
    """`close()` returns after the last lease ended, which is not disturbed."""
    pool = await make_pool(max_size=1)
    started, ended = asyncio.Event(), False

    async def work():
        nonlocal ended
        async with pool.acquire() as connection, connection.transaction():
            started.set()
            await asyncio.sleep(0.1)
            assert await connection.fetchval("SELECT 1") == 1
        ended = True

    worker = asyncio.create_task(work())
    await started.wait()
    await pool.close()
    await worker
    assert ended
    assert pool.get_size() == 0


@both_loops
async def test_closing_waits_for_one_shot_calls(make_pool):
    """A query that runs when `close()` is called gets its answer."""
    pool = await make_pool(init_size=2, max_size=2)
    queries = [asyncio.create_task(pool.fetchval("SELECT $1::int FROM pg_sleep(0.1)", n)) for n in range(2)]
    await asyncio.sleep(0.05)
    await pool.close()
    assert await asyncio.gather(*queries) == [0, 1]


async def test_a_closing_pool_refuses_newcomers(make_pool):
    """While `close()` waits for a lease, nobody else gets one."""
    pool = await make_pool(max_size=2)
    connection = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    assert pool.is_closing()
    with pytest.raises(asyncpg.InterfaceError, match="closing"):
        await pool.fetchval("SELECT 1")
    await pool.release(connection)
    await closing


async def test_a_waiter_of_a_closing_pool_is_not_forgotten(make_pool):
    """Whoever waited in line when `close()` was called gets a connection or an error, but never waits for ever."""
    pool = await make_pool(max_size=1)
    connection = await pool.acquire()
    waiter = asyncio.create_task(pool.fetchval("SELECT 1"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    await pool.release(connection)
    async with asyncio.timeout(10):
        (outcome,) = await asyncio.gather(waiter, return_exceptions=True)
        await closing
    assert outcome == 1 or isinstance(outcome, asyncpg.InterfaceError)
    assert pool.get_size() == 0


@both_loops
@pytest.mark.parametrize("way", ["wait_for", "cancel"])
async def test_closing_that_is_cut_short_terminates(make_pool, way, sessions_named, eventually):
    """When `close()` times out or is cancelled while a lease lasts, all connections are ended at once."""
    name = f"cut short by {way}"
    pool = await make_pool(max_size=2, server_settings={"application_name": name})
    await asyncio.gather(*(pool.fetchval("SELECT 1 FROM pg_sleep(0.02)") for _ in range(2)))
    connection = await pool.acquire()
    if way == "wait_for":
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.close(), 0.05)
    else:
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    async def none_left():
        return await sessions_named(name) == 0

    await eventually(none_left)
    assert pool.is_closing()
    assert pool.get_size() == 0
    with pytest.raises(asyncpg.InterfaceError):
        await connection.fetchval("SELECT 1")


async def test_a_lease_may_end_after_its_pool_was_cut_short(make_pool):
    """The holder of a lease leaves its block in peace although the pool was terminated under it."""
    pool = await make_pool(max_size=1)
    async with pool.acquire() as connection:
        await connection.fetchval("SELECT 1")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.close(), 0.02)


@both_loops
async def test_terminating_ends_running_queries(make_pool, bystander, sessions_named, eventually):
    """`terminate()` does not wait: who waits for an answer, and who waits in line, gets an error soon."""
    name = "terminating"
    pool = await make_pool(init_size=1, max_size=1, server_settings={"application_name": name})
    await bystander.execute("SELECT pg_advisory_lock(717)")
    running = asyncio.create_task(pool.fetchval("SELECT pg_advisory_lock(717)"))
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(pool.fetchval("SELECT 1"))
    await asyncio.sleep(0)
    pool.terminate()
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(running, waiting, return_exceptions=True)
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    await bystander.execute("SELECT pg_advisory_unlock(717)")  # its session on the server notices its end then

    async def none_left():
        return await sessions_named(name) == 0

    await eventually(none_left)


async def test_an_error_in_the_block_closes_the_pool(make_pool):
    """An exception leaves `async with pool` as it is, and the pool closed."""
    pool = make_pool(min_size=1)
    with pytest.raises(LookupError):
        async with pool:
            raise LookupError
    assert pool.is_closing()
    assert pool.get_size() == 0


async def test_another_event_loop_is_refused(make_pool):
    """A pool opened in one loop says so when it is used in another, and goes on working in its own."""
    pool = await make_pool(min_size=1)
    outcome = []

    def elsewhere():
        try:
            outcome.append(asyncio.run(pool.fetchval("SELECT 1")))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join, 10)
    assert isinstance(outcome[0], asyncpg.InterfaceError)
    assert "loop" in str(outcome[0])
    assert await pool.fetchval("SELECT 1") == 1
    await pool.close()


def test_a_pool_can_be_opened_by_run_until_complete(dsn):
    """The old way works: `loop.run_until_complete(create_pool(...))`, with everything else in the same loop."""
    loop = asyncio.new_event_loop()
    try:

        async def open_it():
            return await create_pool(dsn, min_size=1)

        pool = loop.run_until_complete(open_it())
        assert loop.run_until_complete(pool.fetchval("SELECT 1")) == 1
        loop.run_until_complete(pool.close())
    finally:
        loop.close()


@both_loops
async def test_a_pool_that_is_terminated_hides_no_unknown_outcome(make_pool):
    """A SELECT may write: one that was cut off on its way is not said to have met a closed pool."""
    pool = await make_pool()
    sql = f"SELECT pg_sleep(3), pg_advisory_lock(1) -- {uuid.uuid4()}"
    call = asyncio.create_task(pool.fetchval(sql))
    asked = "SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND wait_event = 'PgSleep'"
    async with asyncio.timeout(10):
        while not await pool.fetchval(asked, sql):
            await asyncio.sleep(0.01)
    pool.terminate()
    with pytest.raises(OutcomeUnknownError):
        await call


@both_loops
@pytest.mark.parametrize(
    "use", [lambda pool: pool.fetchval("SELECT 1"), lambda pool: pool.fetch("SELECT 1", timeout=9)]
)
async def test_a_pool_that_is_terminated_after_a_statement_was_prepared_says_that_the_connection_is_closed(
    make_pool, use
):
    """The driver itself falls over the connection that it has let go of."""

    class Terminates(asyncpg.Connection):
        async def _get_statement(self, *args, **options):
            statement = await super()._get_statement(*args, **options)
            if is_open:
                pool.terminate()
            return statement

    is_open = False
    pool = await make_pool(connection_class=Terminates)
    await pool.fetchval("SELECT 2")
    is_open = True
    with pytest.raises((asyncpg.ConnectionDoesNotExistError, OutcomeUnknownError)):
        await use(pool)
