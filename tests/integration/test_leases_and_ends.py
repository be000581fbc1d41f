"""What two tasks do to one lease or to one pool at once, and what a callback that fails leaves behind: no place is lost."""

from __future__ import annotations

import asyncio
import time
import warnings

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture
async def pool_of_one(postgres: EmbeddedPostgres):
    async with ResilientPool(postgres.dsn(), max_size=1, deadline=3.0) as pool:
        yield pool


async def works(pool: ResilientPool) -> bool:
    async with asyncio.timeout(5):
        return await pool.fetchval("SELECT 1") == 1


async def test_a_lease_released_while_its_connection_is_replaced_gives_the_place_back(pool_of_one):
    """Whoever replaces it finds the loan ended, gives back what was opened, and tells the caller."""
    lease = await pool_of_one.acquire()
    lease._driver.terminate()
    running = asyncio.create_task(lease.fetch("SELECT 1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await pool_of_one.release(lease)
    with pytest.raises(asyncpg.InterfaceError, match="released"):
        await running
    assert await works(pool_of_one)
    assert pool_of_one._resources.size == 1


async def test_a_lease_released_between_two_attempts_takes_no_other_connection(pool_of_one):
    """An attempt after the release would hold a place that nobody gives back."""
    lease = await pool_of_one.acquire()

    async def lost(_connection):
        lease._driver.terminate()
        await pool_of_one.release(lease)
        raise asyncpg.ConnectionDoesNotExistError("lost")

    with pytest.raises(asyncpg.InterfaceError, match="released"):
        await lease._run("fetch", "SELECT 1", {"idempotent": True}, lost)
    assert await works(pool_of_one)


async def test_a_lease_released_during_setup_runs_nothing_on_what_it_gave_back(postgres):
    """The connection may be somebody else's by then."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def setup(_connection):
        if not first:
            started.set()
            await go_on.wait()

    first = True
    async with ResilientPool(postgres.dsn(), max_size=1, setup=setup) as pool:
        lease = await pool.acquire()
        first = False
        lease._driver.terminate()
        running = asyncio.create_task(lease.fetchval("SELECT 1"))
        await started.wait()
        await pool.release(lease)
        first = True
        async with pool.acquire() as other:
            go_on.set()
            with pytest.raises(asyncpg.InterfaceError, match="released"):
                await running
            assert await other.fetchval("SELECT 1") == 1


async def test_two_operations_at_once_on_a_fresh_lease_are_refused_and_harm_neither_it_nor_the_pool(postgres):
    """The first goes on undisturbed, though its connection is idle for long enough to be asked."""
    async with ResilientPool(postgres.dsn(), max_size=2, ping_after=0.05) as pool, postgres.admin() as admin:
        await admin.execute("SELECT pg_advisory_lock(716)")
        async with pool.acquire() as lease:
            running = asyncio.create_task(
                lease.fetchval("SELECT pg_backend_pid() FROM (SELECT pg_advisory_lock_shared(716)) AS waited")
            )
            await asyncio.sleep(0.15)
            with pytest.raises(asyncpg.InterfaceError, match="another operation"):
                await lease.fetchval("SELECT 1")
            await admin.execute("SELECT pg_advisory_unlock(716)")
            assert await running == lease.get_server_pid()
        assert pool.stats().pings_failed == 0
        assert pool._resources.size == 1


async def test_two_operations_at_once_on_a_lease_that_is_checked_take_one_place(postgres):
    """A second one must not fetch a second connection while the first one's is asked."""
    async with ResilientPool(postgres.dsn(), max_size=2, ping_after=0.0) as pool:
        async with pool.acquire() as lease:
            answers = await asyncio.gather(*(lease.fetchval("SELECT 1") for _ in range(2)), return_exceptions=True)
            assert sorted(map(type, answers), key=str) == [asyncpg.InterfaceError, int]
        while pool.stats().resetting:
            await asyncio.sleep(0)
        assert (pool._resources.size, pool.get_idle_size()) == (1, 1)


async def test_a_replacement_that_could_not_be_set_up_is_not_used(postgres):
    """The next operation on the lease gets yet another one, and that is set up."""
    seen = []

    async def setup(connection):
        seen.append(connection.get_server_pid())
        if len(seen) == 2:
            raise ValueError("not this time")

    async with ResilientPool(postgres.dsn(), max_size=1, setup=setup) as pool, pool.acquire() as lease:
        lease._driver.terminate()
        with pytest.raises(ValueError, match="not this time"):
            await lease.fetch("SELECT 1")
        statement = await lease.prepare("SELECT pg_backend_pid()")
        assert await statement.fetchval() == seen[2]


async def test_a_warning_that_is_an_error_costs_no_place(pool_of_one):
    """The driver warns of a listener left behind; an application may have made errors of warnings."""
    lease = await pool_of_one.acquire()
    await lease.add_listener("news", print)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(asyncpg.InterfaceWarning):
            await pool_of_one.release(lease)
    assert await works(pool_of_one)


async def test_two_tasks_may_close_one_pool(postgres):
    """Both wait until it is closed."""
    pool = await ResilientPool(postgres.dsn())
    lease = await pool.acquire()
    closers = [asyncio.create_task(pool.close()) for _ in range(2)]
    await asyncio.sleep(0)
    await pool.release(lease)
    async with asyncio.timeout(5):
        await asyncio.gather(*closers)


async def test_closing_ends_when_the_pool_is_terminated_meanwhile(postgres):
    """Somebody has lost patience with a lease that does not come back."""
    pool = await ResilientPool(postgres.dsn())
    lease = await pool.acquire()
    closing = asyncio.create_task(pool.close())
    await asyncio.sleep(0)
    pool.terminate()
    async with asyncio.timeout(5):
        await closing
    await pool.release(lease)


@pytest.mark.parametrize("way", ["release", "call", "call with setup"])
async def test_terminating_does_not_look_like_a_cancellation_to_who_waits_for_a_reset(postgres, way):
    """It ends the reset, and nobody asked for the task that waits for it to be cancelled."""
    resetting = asyncio.Event()

    async def reset(_connection):
        resetting.set()
        await asyncio.sleep(60)

    async def nothing(_connection):
        pass

    setup = nothing if way == "call with setup" else None
    pool = await ResilientPool(postgres.dsn(), session_reset="on_release", reset=reset, setup=setup)
    work = pool.release(await pool.acquire()) if way == "release" else pool.execute("SELECT 1")
    waiting = asyncio.create_task(work)
    await resetting.wait()
    pool.terminate()
    async with asyncio.timeout(5):
        assert await waiting == (None if way == "release" else "SELECT 1")


def test_a_pool_can_be_terminated_when_its_loop_has_stopped(postgres):
    """As asyncpg's can: at the end of a program, for example."""
    loop = asyncio.new_event_loop()
    pool = ResilientPool(postgres.dsn())
    loop.run_until_complete(pool._open())
    loop.run_until_complete(pool.fetch("SELECT 1"))
    pool.terminate()
    assert pool.get_size() == 0
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


async def test_opening_that_fails_leaves_no_task_behind(postgres):
    """The others are not waited for any more, so they must not go on trying."""
    opened = 0

    async def init(_connection):
        nonlocal opened
        opened += 1
        if opened == 2:
            raise ValueError("the second")
        if opened > 2:
            await asyncio.sleep(60)

    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="the second"):
        await ResilientPool(postgres.dsn(), init_size=3, max_size=3, init=init)
    async with asyncio.timeout(5):
        while not asyncio.all_tasks() <= before:
            await asyncio.sleep(0.01)


async def test_a_server_that_falls_silent_after_the_handshake_holds_nobody_longer_than_the_deadline(postgres):
    """The first connection's question what stands there is bounded as well."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.lose_next_request("hang", matching=b"pg_is_in_recovery")
        async with ResilientPool(proxy.dsn(postgres.dsn())) as pool:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.fetch("SELECT 1", deadline=1.0), 10)
            assert time.monotonic() - started < 5
            assert proxy.fired == 1
            assert await works(pool)


async def test_a_connection_doomed_while_it_is_idle_is_not_handed_out(pool_of_one):
    """A verdict may come after the connection was given back."""
    pid = await pool_of_one.fetchval("SELECT pg_backend_pid()")
    while not pool_of_one.get_idle_size():
        await asyncio.sleep(0)
    pool_of_one._maintenance.connections()[0].invalidated = True
    assert await pool_of_one.fetchval("SELECT pg_backend_pid()") != pid


async def test_a_doomed_connection_is_closed_as_soon_as_it_is_given_back(pool_of_one):
    """It does not wait for its next use to be found out."""
    async with pool_of_one.acquire() as lease:
        lease._driver.invalidated = True
    assert pool_of_one.get_size() == 0
    assert pool_of_one.stats().resets == 0


async def test_a_lost_connection_is_closed_by_the_driver_without_harm_to_its_lease(pool_of_one):
    """Drivers up to 0.31 tell the pool behind a lease that its connection ends."""
    async with pool_of_one.acquire() as lease:
        lease._driver.terminate()
        assert await lease.fetchval("SELECT 1") == 1
        lease.terminate()
    assert await works(pool_of_one)


async def test_a_connection_that_is_ready_only_after_the_pool_was_terminated_is_used_for_nothing(postgres):
    """The caller is refused, and the connection is closed at once."""
    started, go_on, made = asyncio.Event(), asyncio.Event(), []

    async def init(connection):
        made.append(connection)
        started.set()
        await go_on.wait()

    pool = await ResilientPool(postgres.dsn(), init=init)
    caller = asyncio.create_task(pool.fetch("SELECT 1"))
    await started.wait()
    pool.terminate()
    go_on.set()
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
        await caller
    await asyncio.sleep(0)
    assert made[0].is_closed()
    assert pool._resources.size == 0
