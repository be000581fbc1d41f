"""The reset after a use: in one query where that is the driver's way, as the application's class says elsewhere, and never for ever."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool.events import DiscardReason
from resilient_pool.pooling import acquire
from resilient_pool.testing import ScriptedClock

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

LEAVE = "SELECT set_config('application.mark', 'yes', false)"
LOOK = "SELECT current_setting('application.mark', true)"


@both_loops
async def test_a_reset_that_is_not_answered_ends_at_its_time_limit(make_pool, dsn, proxy, eventually):
    """The connection is given up, and its place is free again."""
    async with make_pool(proxy.dsn(dsn), max_size=1, reset_timeout=0.1) as pool:
        await pool.execute(LEAVE)
        proxy.blackhole()
        await eventually(lambda: pool.stats().discarded.get(DiscardReason.RESET_FAILED) == 1)
        assert pool.stats().resetting == 0
        proxy.restore()
        assert not await pool.fetchval(LOOK)


@both_loops
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_reset_that_is_cancelled_gives_its_place_back(make_pool, turns):
    """Before its first step, once it is sent, and when it may have been answered: the session is not handed on."""
    async with make_pool(max_size=1) as pool:
        await pool.execute(LEAVE)
        (reset,) = pool._maintenance._background
        for _ in range(turns):
            await asyncio.sleep(0)
        reset.cancel()
        async with asyncio.timeout(3):
            assert not await pool.fetchval(LOOK)
        assert (pool.stats().resetting, pool.get_size()) == (0, 1)
        assert not pool._maintenance.returning


@pytest.mark.parametrize(("reset_timeout", "timeout"), [(0.1, None), (30.0, 0.1)])
async def test_whoever_waits_for_a_reset_learns_that_it_took_too_long(make_pool, dsn, proxy, reset_timeout, timeout):
    """With `session_reset="on_release"`, within the pool's time limit or the release's own."""
    async with make_pool(proxy.dsn(dsn), max_size=1, session_reset="on_release", reset_timeout=reset_timeout) as pool:
        connection = await pool.acquire()
        await connection.execute(LEAVE)
        proxy.blackhole()
        with pytest.raises(TimeoutError):
            await pool.release(connection, timeout=timeout)
        proxy.restore()


async def test_a_loss_that_the_reset_on_release_meets_reaches_the_releaser(make_pool, dsn, proxy, eventually):
    """As with asyncpg's pool: the reset's error is raised, and a connection that is known to be lost is not reset."""
    async with make_pool(proxy.dsn(dsn), max_size=1, session_reset="on_release") as pool:
        connection = await pool.acquire()
        await connection.execute(LEAVE)
        proxy.blackhole()
        release = asyncio.ensure_future(pool.release(connection))
        await eventually(lambda: pool.stats().resetting == 1)
        proxy.fin()
        proxy.restore()
        with pytest.raises((asyncpg.ConnectionDoesNotExistError, ConnectionResetError)):
            await release
        connection = await pool.acquire()
        await connection.execute(LEAVE)
        proxy.fin()
        await eventually(connection.is_closed)
        await pool.release(connection)
        assert not await pool.fetchval(LOOK)


async def test_a_pool_that_was_closed_leaves_no_timer_of_its_resets(make_pool, dsn):
    """However it ends."""
    for end in ("close", "terminate"):
        clock = ScriptedClock()
        pool = await make_pool(max_size=1, clock=clock, max_inactive_connection_lifetime=0)
        await pool.execute(LEAVE)
        assert 5.0 in clock.pending
        ended = getattr(pool, end)()
        if ended is not None:
            await ended
        assert clock.pending == []


@both_loops
async def test_a_caller_that_waits_for_a_reset_is_served_when_it_is_answered(make_pool):
    """The same connection, and nothing of the use before."""
    async with make_pool(max_size=1) as pool:
        await pool.execute(LEAVE)
        assert pool.stats().resetting == 1
        assert not await pool.fetchval(LOOK)
        stats = pool.stats()
        assert (stats.opened, stats.resets, stats.waits) == (1, 1, 2)  # for the first connection, too
        assert not pool._maintenance._watched.waiting


@both_loops
async def test_a_transaction_left_open_by_one_call_is_rolled_back(make_pool, bystander):
    """What takes more than one query to reset gets it."""
    async with make_pool(max_size=1) as pool:
        said = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
        await pool.execute("BEGIN")
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()
        assert pool.stats().opened == 1
    assert ["active transaction" in text for text in said] == [True]


async def test_an_unanswered_rollback_is_bounded_as_well(make_pool, dsn, proxy, eventually):
    """The time limit is one for all that a reset sends."""
    async with make_pool(proxy.dsn(dsn), max_size=1, reset_timeout=0.1) as pool:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
        await pool.execute("BEGIN")
        proxy.blackhole()
        await eventually(lambda: pool.stats().discarded.get(DiscardReason.RESET_FAILED) == 1)
        proxy.restore()


async def test_a_class_that_resets_in_its_own_way_is_asked_to(make_pool):
    """It is the application's word what stays in a session."""

    class Keeping(asyncpg.Connection):
        async def reset(self, *, timeout=None):
            assert timeout == 7.0

    async with make_pool(max_size=1, connection_class=Keeping, reset_timeout=7.0) as pool:
        await pool.execute(LEAVE)
        assert await pool.fetchval(LOOK) == "yes"


@pytest.mark.parametrize(("query", "left"), [("", "yes"), ("SET application.mark = 'asked'", "asked")])
async def test_a_class_that_resets_with_a_query_of_its_own_is_heard(make_pool, query, left):
    """Also when that query is none at all."""

    class Asking(asyncpg.Connection):
        def get_reset_query(self):
            return query

    async with make_pool(max_size=1, connection_class=Asking) as pool:
        await pool.execute(LEAVE)
        assert await pool.fetchval(LOOK) == left
        assert pool.stats().opened == 1


async def test_a_reset_that_fails_costs_the_connection(make_pool):
    """What could not be reset is not handed on."""

    class Failing(asyncpg.Connection):
        def get_reset_query(self):
            return "SELECT 1 / 0"

    async with make_pool(max_size=1, connection_class=Failing) as pool:
        await pool.execute(LEAVE)
        assert not await pool.fetchval(LOOK)
        assert pool.stats().discarded == {DiscardReason.RESET_FAILED: 1}


@both_loops
@pytest.mark.parametrize("writers", [1, 3, 10])
async def test_busy_writers_get_a_connection_each_and_one_to_spare_between_them(make_pool, monkeypatch, writers):
    """They wait for each other's resets rather than open one connection for each write that is being reset."""
    monkeypatch.setattr(acquire, "_PROMPT", 10.0)  # a busy machine may take longer for a reset than a caller waits

    async def work():
        for _ in range(30):
            await pool.execute(LEAVE)

    async with make_pool(max_size=30) as pool:
        await asyncio.gather(*(work() for _ in range(writers)))
        assert writers <= pool.get_size() <= writers + 1
