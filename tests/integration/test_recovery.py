"""A database that sleeps, and a pool in front of which a crowd waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import AcquireTimeoutError, OutcomeUnknownError, ResilientPool
from resilient_pool.events import CircuitClosed, CircuitOpened, DiscardReason
from resilient_pool.testing import PausingServer

WAYS = ["hang", "refuse", "reset", "57P03", "28000"]
MIX = tuple(WAYS)
RESUME = 5.0


def asleep(postgres, **arguments):
    """A database that sleeps, until the first attempt to connect and `RESUME` seconds more."""
    defaults = {"pause_after": None, "resume_seconds": RESUME}
    return PausingServer(postgres.host, postgres.port, **{**defaults, **arguments})


async def test_a_crowd_meets_a_sleeping_database(postgres):
    """All succeed soon after it woke, however it behaves meanwhile, and it is spared the crowd."""
    figures = await asyncio.gather(*(_crowd(postgres, way) for way in [*WAYS, MIX]))
    for way, (late, attempts, at_once, connections) in zip([*WAYS, "mix"], figures, strict=True):
        assert late < 3.0, (way, figures)  # a second is the longest wait between two attempts
        assert attempts <= 9, (way, figures)
        # What is admitted doubles with each round: at most half of what the pool may have, and as many again.
        assert at_once <= 2 * connections, (way, figures)


async def _crowd(postgres, away):
    with asleep(postgres, away=away, seed=7) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, max_size=8) as pool:

            async def call():
                assert await pool.fetchval("SELECT 42") == 42
                return time.monotonic()

            ended = await asyncio.gather(*(call() for _ in range(100)))
            resumed = next(entry.at for entry in server.log if entry.event == "resumed")
            stats = pool.stats()  # the server counts no attempt that the kernel refused
            attempts = max(len(server.outage_attempts), stats.connect_failures)
            return max(ended) - resumed, attempts, server.peak_in_flight, stats.opened


@pytest.mark.parametrize("capacity", [1, 3])
async def test_a_small_server_that_just_woke_is_not_overrun(postgres, capacity):
    """It takes few connections at first; the callers share those there are, none fails, and more are asked for at a pace."""
    with asleep(postgres, resume_seconds=0.5, capacity=capacity, capacity_seconds=1.0) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, max_size=8) as pool:
            await asyncio.gather(*(pool.fetchval("SELECT 1 FROM pg_sleep(0.05)") for _ in range(60)))
        refused = [attempt.at for attempt in server.attempts if attempt.outcome == "53300"]
        # As many at once as were let in before, and one more; then one at a time, at the shortest distances of `reconnect`.
        paced = [0.75 * sum((0.25, 0.5, *[1.0] * 60)[:number]) for number in range(1, 60)]
        assert len(refused) <= capacity + 1 + sum(distance <= refused[-1] - refused[0] for distance in paced)


async def test_the_gate_tells_what_it_does(postgres):
    """It closes once, opens once, and is seen in the statistics."""
    events = []
    with asleep(postgres, away="57P03", resume_seconds=60.0) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, observers=[events.append]) as pool:
            call = asyncio.create_task(pool.fetchval("SELECT 1"))
            await server.until("resuming", 5)
            while not pool.stats().circuit_open:
                await asyncio.sleep(0.01)
            server.resume()
            assert await call == 1
            stats = pool.stats()
    assert (stats.circuit_open, stats.exhausted) == (False, 0)
    assert [event.sqlstate for event in events if isinstance(event, CircuitOpened)] == ["57P03"]
    assert [event.attempts for event in events if isinstance(event, CircuitClosed)] == [stats.connect_failures]


@pytest.mark.parametrize(
    ("away", "error"),
    [
        ("hang", AcquireTimeoutError),
        ("refuse", ConnectionRefusedError),
        ("reset", (ConnectionResetError, asyncpg.ConnectionDoesNotExistError)),
        ("57P03", asyncpg.CannotConnectNowError),
        ("28000", asyncpg.InvalidAuthorizationSpecificationError),
    ],
)
async def test_a_deadline_ends_with_the_original_error(postgres, away, error):
    """After the deadline, not after the connect time-out, and with the history in a note."""
    with asleep(postgres, away=away) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, deadline=1.0) as pool:
            began = time.monotonic()
            with pytest.raises(error) as caught:
                await pool.fetchval("SELECT 1")
            assert 0.99 < time.monotonic() - began < 10
            if away != "hang":
                assert "attempts to connect" in caught.value.__notes__[0]


async def test_fail_fast_ends_at_once(postgres):
    """Once the server is known to be away nobody who says so waits for it, and it is found all the same when it is back."""
    with asleep(postgres, away="57P03", resume_seconds=60.0) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, fail_fast=True) as pool:
            async with asyncio.timeout(10):
                for _ in range(20):
                    with pytest.raises(asyncpg.CannotConnectNowError):
                        await pool.fetchval("SELECT 1")
            assert len(server.outage_attempts) <= 5
            server.resume()

            async def served():
                with contextlib.suppress(asyncpg.CannotConnectNowError):
                    return await pool.fetchval("SELECT 1") == 1

            await eventually(served)


@pytest.mark.parametrize("way", ["fetch", "acquire", "transaction", "exactly once", "lease"])
async def test_fail_fast_may_be_said_for_one_call(postgres, way):
    """While others wait."""
    with asleep(postgres, away="57P03", resume_seconds=60.0) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False) as pool:
            await pool.execute("CREATE TEMP TABLE IF NOT EXISTS hasty ()")
            lease = await pool.acquire()
            while pool.stats().resetting:
                await asyncio.sleep(0)
            server.pause()
            patient = asyncio.create_task(pool.fetchval("SELECT 1", fail_fast=False))
            while not pool.stats().circuit_open:
                await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                with pytest.raises(asyncpg.CannotConnectNowError):
                    if way == "fetch":
                        await pool.fetch("SELECT 1", fail_fast=True)
                    elif way == "acquire":
                        await pool.acquire(fail_fast=True)
                    elif way == "transaction":
                        async for attempt in pool.transaction(fail_fast=True):
                            async with attempt:
                                pass
                    elif way == "exactly once":
                        await pool.execute("CREATE TEMP TABLE t ()", exactly_once=True, fail_fast=True)
                    else:
                        await lease.fetch("SELECT 1", fail_fast=True)
            assert not patient.done()
            server.resume()
            await pool.release(lease)
            assert await patient == 1


async def test_an_idle_application_lets_the_database_sleep(postgres):
    """After a burst no connection is left once the idle lifetime is over, and then nothing at all is sent."""
    with asleep(postgres, pause_after=0.5, resume_seconds=0.2) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, max_inactive_connection_lifetime=0.5) as pool:
            await asyncio.gather(*(pool.execute("CREATE TEMP TABLE IF NOT EXISTS t ()") for _ in range(50)))
            await server.until("paused", 10)
            assert server.open_connections == 0
            moment, attempts = time.monotonic(), len(server.attempts)
            await asyncio.sleep(1.5)
            assert (server.bytes_since(moment), len(server.attempts), server.phase) == (0, attempts, "paused")
            assert pool.get_size() == 0


async def test_a_prober_nobody_waits_for_stops(postgres):
    """Callers that gave up do not leave somebody behind who keeps the database awake."""
    with asleep(postgres, away="57P03", resume_seconds=60.0) as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, deadline=0.5) as pool:
            with pytest.raises(asyncpg.CannotConnectNowError):
                await pool.fetchval("SELECT 1")
            attempts = len(server.attempts)
            await asyncio.sleep(1.5)
            assert len(server.attempts) == attempts


async def test_the_servers_own_patience_bounds_the_pools(postgres):
    """A pool that was told to keep connections for longer than the server does is wiser than that."""
    with asleep(postgres, idle_session_timeout=3.0) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False) as pool:
            await pool.fetchval("SELECT 1")
            began = time.monotonic()
            await eventually(lambda: not pool.get_size())
            assert time.monotonic() - began > 2.0
            stats = pool.stats()
            assert (stats.discarded, stats.stale_found) == ({DiscardReason.IDLE: stats.opened}, 0)


async def test_a_wrong_password_ends_at_once(postgres):
    """For everybody who waits, after one attempt for each answer of the server's."""
    await postgres.create_role("sleepy", "right")
    with asleep(postgres) as server:
        dsn = server.dsn(postgres.dsn(user="sleepy", password="wrong"))
        async with ResilientPool(dsn, ssl=False) as pool:
            errors = await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(20)), return_exceptions=True)
        assert {type(error) for error in errors} == {asyncpg.InvalidPasswordError}
        assert len(server.attempts) == 1


@pytest.mark.parametrize("way", ["close", "terminate", "cancel"])
async def test_a_pool_is_closed_while_it_waits(postgres, way):
    """The prober goes with it, and whoever waits is told."""
    with asleep(postgres, resume_seconds=60.0) as server:
        server.pause()
        pool = await ResilientPool(server.dsn(postgres.dsn()), ssl=False)
        call = asyncio.create_task(pool.fetchval("SELECT 1"))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        if way == "cancel":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        elif way == "close":
            await asyncio.wait_for(pool.close(), 10)
        else:
            pool.terminate()
        while server.in_flight:
            await asyncio.sleep(0.01)
        if way == "cancel":
            await asyncio.wait_for(pool.close(), 10)
        else:
            with pytest.raises(asyncpg.InterfaceError, match="pool is clos"):
                await call


async def test_a_pool_that_nobody_uses_connects_to_nothing(postgres):
    """Opening it is not using it."""
    with asleep(postgres) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False):
            await asyncio.sleep(0.2)
        assert server.attempts == ()


async def test_closing_ends_an_opening_that_is_under_way(postgres, proxy):
    """Also one in a caller's own time; the caller is told why."""
    pool = await ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, deadline=20.0, max_size=3)
    async with pool.acquire() as held:
        await held.fetchval("SELECT 1")
        proxy.hang()
        caller = asyncio.create_task(pool.fetchval("SELECT 1"))
        while not pool._maintenance._openings:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(pool.close())
        with pytest.raises(asyncpg.InterfaceError, match="closing"):
            await asyncio.wait_for(caller, 10)
        proxy.restore()
    await asyncio.wait_for(closing, 5)


async def test_other_connect_arguments_are_heeded_at_once(postgres, proxy):
    """An attempt that hangs at the old place keeps nobody from the new one."""
    proxy.hang()
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, deadline=30.0) as pool:
        call = asyncio.create_task(pool.fetchval("SELECT 1"))
        while not pool._circuit_breaker._attempts:
            await asyncio.sleep(0.01)
        pool.set_connect_args(postgres.dsn(), ssl=False)
        assert await asyncio.wait_for(call, 10) == 1


async def test_a_lost_commit_is_not_asked_about_for_ever_when_the_pool_closes(postgres, proxy):
    """Whoever waits for the answer is told that nobody knows."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE TABLE IF NOT EXISTS closed_early (id int)")
    pool = await ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1, deadline=20.0)

    async def insert(connection):
        await connection.execute("INSERT INTO closed_early VALUES (1)")
        proxy.refuse()

    proxy.swallow_next_answer(matching=b"COMMIT")
    writing = asyncio.create_task(pool.run_in_transaction(insert))
    while not pool.stats().circuit_open:
        await asyncio.sleep(0.01)
    pool.terminate()
    with pytest.raises(OutcomeUnknownError):
        await asyncio.wait_for(writing, 10)
    async with postgres.admin() as admin:
        await admin.execute("DROP TABLE closed_early")


async def test_an_init_that_hangs_is_bounded(postgres):
    """The connect time-out is for all that opening a connection takes."""
    async with ResilientPool(postgres.dsn(), init=lambda _: asyncio.sleep(60), timeout=0.3, deadline=2.0) as pool:
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT 1")
        assert pool.stats().connect_failures >= 2


async def test_an_invocation_ends_although_min_size_is_lacking(postgres):
    """Nobody waits for what the prober does, and the process is about to be frozen."""
    with asleep(postgres, away="57P03", resume_seconds=60.0) as server:
        server.pause()
        pool = ResilientPool(server.dsn(postgres.dsn()), ssl=False, min_size=1, init_size=1, deadline=1.0)
        with pytest.raises(asyncpg.CannotConnectNowError):
            await pool
        server.resume()
        pool = await ResilientPool(server.dsn(postgres.dsn()), ssl=False, min_size=1)
        server.pause()
        async with asyncio.timeout(20):
            async with pool.invocation():
                with pytest.raises(asyncpg.CannotConnectNowError):
                    await pool.fetchval("SELECT 1", deadline=1.0)
        pool.terminate()
