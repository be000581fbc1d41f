"""Whatever comes back passes one function: cancelled hand-overs, closing under load, idle lifetimes, closed leases."""

from __future__ import annotations

import asyncio
import random
import time

import asyncpg
import pytest
from jumping_clock import JumpingClock

from resilient_pool import AcquireTimeoutError, BackoffPolicy, PostgresClassifier
from resilient_pool.events import DiscardReason
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.resource_pool import ResourcePool

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

STORMS = 20


@pytest.mark.parametrize("sql", ["SELECT 1", "SET work_mem = '4MB'"])
@both_loops
async def test_closing_after_a_storm_of_cancellations_ends(make_pool, sql):
    """A busy application shuts down: it cancels its workers and closes the pool, wherever each of them stands."""
    chance = random.Random(sql)
    for _ in range(STORMS):
        pool = await make_pool(max_size=3)

        async def work(pool=pool):
            while True:
                await pool.execute(sql)

        workers = [asyncio.create_task(work()) for _ in range(30)]
        await asyncio.sleep(0.02 + chance.random() * 0.03)
        for worker in workers:
            worker.cancel()
        async with asyncio.timeout(10):
            await pool.close()
        await asyncio.wait(workers)
        assert (pool.get_size(), pool._resources.size) == (0, 0)


@both_loops
async def test_a_connection_handed_to_a_cancelled_caller_is_not_forgotten_by_the_reaper(make_pool, eventually):
    """The first answer was enough, so the second caller is cancelled as it gets the connection: it still goes in time."""
    pool = await make_pool(max_size=1, max_inactive_connection_lifetime=0.3, session_reset="off")

    async def first():
        # Longer than the idle lifetime, so that no timer is left from before.
        await pool.fetchval("SELECT pg_sleep(0.4)")
        second.cancel()

    task = asyncio.create_task(first())
    second = asyncio.create_task(pool.fetchval("SELECT 2"))
    await asyncio.wait([task, second])
    assert second.cancelled()
    await eventually(lambda: pool.get_size() == 0)
    assert pool.stats().discarded[DiscardReason.IDLE] == 1


@pytest.mark.parametrize("ending", ["close", "terminate"])
@both_loops
async def test_after_a_lease_was_closed_by_its_user_the_next_comes_at_once(make_pool, ending):
    """The server has done nothing wrong, so it is not kept at a distance; and the event says who closed it."""
    distant = BackoffPolicy(base=20.0, max_attempts=None)
    pool = await make_pool(max_size=1, reconnect=distant)
    began = time.monotonic()
    for _ in range(5):
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            await getattr(connection, ending)() if ending == "close" else connection.terminate()
    assert time.monotonic() - began < 10
    assert dict(pool.stats().discarded) == {DiscardReason.CLOSED: 5}


@pytest.mark.parametrize("sql", ["SELECT 1", "SET work_mem = '4MB'"])
async def test_an_answer_that_was_read_late_vouches_for_nothing(make_pool, eventually, sql):
    """Frozen while a statement or a reset was in flight: the answer was there already, the connection may be gone since."""
    clock = JumpingClock()
    pool = await make_pool(max_size=1, clock=clock, ping_after=20.0)
    await pool.fetchval("SELECT 1")
    call = asyncio.create_task(pool.execute(sql))
    if sql == "SELECT 1":
        await asyncio.sleep(0)
    else:
        await call
    clock.frozen = 40.0
    await call
    await eventually(lambda: pool.get_idle_size() == 1)
    await pool.fetchval("SELECT 1")
    assert pool.stats().pings == 1


class WithoutReset(asyncpg.Connection):
    """A class as it is used behind some poolers."""

    def get_reset_query(self):
        return ""


async def test_a_lease_on_which_nothing_was_asked_does_not_make_its_connection_look_fresh(make_pool, eventually):
    """Acquired and released over and over, without a reset that would ask something: its last answer gets older."""
    clock = JumpingClock()
    pool = await make_pool(
        max_size=1, clock=clock, connection_class=WithoutReset, ping_after=100.0, max_inactive_connection_lifetime=0
    )
    await pool.fetchval("SELECT 1")
    for pings in (0, 0, 1):
        clock.frozen += 40.0
        async with pool.acquire():
            pass
        await eventually(lambda: pool.get_idle_size() == 1)
        assert pool.stats().pings == pings
    clock.frozen += 80.0
    async with pool.acquire() as connection:
        assert await connection.fetchval("SELECT 1") == 1
    assert pool.stats().pings == 1


async def test_a_call_whose_ping_is_not_answered_ends_with_its_own_deadline(dsn, proxy, make_pool):
    """And its error says what was waited for."""
    clock = JumpingClock()
    pool = await make_pool(proxy.dsn(dsn), ssl=False, clock=clock, ping_timeout=5.0)
    for use in (lambda: pool.fetchval("SELECT 1", deadline=0.2), lambda: _lease(pool, 0.2)):
        await pool.fetchval("SELECT 1")
        clock.frozen += 2.0
        proxy.connections[-1].forget()
        began = time.monotonic()
        with pytest.raises(AcquireTimeoutError, match=r"was pinged, and did not answer within the 0\.2 s"):
            await use()
        assert time.monotonic() - began < 4
        assert pool.stats().discarded[DiscardReason.PING_FAILED] == pool.stats().pings_failed


async def _lease(pool, seconds):
    return await pool.acquire(timeout=seconds)


@pytest.mark.parametrize("setup", [None, lambda _: asyncio.sleep(0)], ids=["plain", "set up"])
async def test_a_failure_is_judged_while_its_connection_is_held_and_that_is_given_back_once(
    make_pool, eventually, monkeypatch, setup
):
    """What is decided concerns the connection, too: it may be closed, and must not be another caller's by then."""
    held, returned = [], []

    class Judge(PostgresClassifier):
        def classify(self, failure):
            held.append(pool.stats().in_use)
            return super().classify(failure)

    pool = await make_pool(max_size=1, setup=setup, classifier=Judge())
    assert await pool.fetchval("SELECT 1") == 1
    await eventually(lambda: pool.get_idle_size() == 1)
    put = ResourcePool.put
    monkeypatch.setattr(ResourcePool, "put", lambda resources, entry: (returned.append(entry), put(resources, entry)))
    with pytest.raises(asyncpg.DivisionByZeroError):
        await pool.fetchval("SELECT 1 / 0")
    await eventually(lambda: pool.get_idle_size() == 1)
    assert (held, len(returned)) == ([1], 1)


async def test_a_connection_whose_check_took_long_is_idle_from_when_it_is_given_back(make_pool, monkeypatch):
    """Not from later, by the time that the check took: it would be kept for longer than it may be idle."""
    pool = await make_pool(max_size=1, ping_after=0.0)
    await pool.fetchval("SELECT 1")
    (driver,) = pool._maintenance.connections()
    ping = driver.ping

    async def slow(seconds):
        await asyncio.sleep(0.1)
        return await ping(seconds)

    monkeypatch.setattr(DriverConnection, "ping", lambda _, seconds: slow(seconds))
    await pool.fetchval("SELECT 1")
    entry, now = pool._resources.last_used, pool._clock.now()
    assert pool.stats().pings > 0
    assert entry.idle_since <= now
