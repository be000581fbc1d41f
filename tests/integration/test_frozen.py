"""A process that is frozen between two requests, for longer than every time-out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from pathlib import Path

import asyncpg
import pytest
from jumping_clock import JumpingClock

import resilient_pool.pool
from resilient_pool import ResilientPool, profiles
from resilient_pool.events import DiscardReason
from resilient_pool.testing import PausingServer

FUNCTION = Path(__file__).with_name("frozen_function.py")
PATIENCE = 0.15
"""Seconds after which the server closes an idle session."""


@contextlib.asynccontextmanager
async def function(dsn, how):
    """Run the function of `frozen_function.py` in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FUNCTION), dsn, how, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 10)


async def request(process, number):
    process.stdin.write(f"{number}\n".encode())
    return (await asyncio.wait_for(process.stdout.readline(), 10)).decode().strip()


@pytest.mark.parametrize(("how", "in_flight"), [("hooked", "0"), ("bare", "1")])
async def test_the_first_call_after_a_thaw_works(postgres, how, in_flight):
    """Fifty times in a row with one connection, though the server has closed it meanwhile, and nothing is written twice.

    With the hook no reset is left in flight; without it there is, and it does no harm either.
    """
    async with postgres.admin() as admin:
        await admin.execute("CREATE TABLE requests (id int)")
    try:
        with PausingServer(postgres.host, postgres.port, pause_after=None, idle_session_timeout=PATIENCE) as server:
            async with function(server.dsn(postgres.dsn()), how) as process:
                for number in range(50):
                    assert await request(process, number) == f"1 {in_flight}", number
                    process.send_signal(signal.SIGSTOP)
                    await _until_nobody_is_connected(server)
                    process.send_signal(signal.SIGCONT)
        async with postgres.admin() as admin:
            assert await admin.fetch("SELECT id FROM requests GROUP BY id HAVING count(*) <> 1") == []
            assert await admin.fetchval("SELECT count(*) FROM requests") == 50
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP TABLE requests")


FROZEN_WITH_A_RESET_IN_FLIGHT = """
import asyncio, sys
from resilient_pool import ResilientPool

async def main():
    async with ResilientPool(sys.argv[1], ssl=False, max_size=1, ping_after=0.5, ping_timeout=0.5) as pool:
        while line := sys.stdin.readline():
            try:
                await pool.execute("INSERT INTO thawed VALUES ($1)", int(line))
                await pool.execute("SET application_name TO 'left behind'")
                for _ in range(3):  # so that the reset is sent; its answer is read when the loop runs again
                    await asyncio.sleep(0)
                answer = f"{pool.stats().resetting} {pool.stats().pings_failed}"
            except Exception as error:
                answer = repr(error)
            print(answer, flush=True)

asyncio.run(main())
"""


async def test_a_reset_that_was_in_flight_during_a_freeze_vouches_for_nothing(postgres, proxy, dsn):
    """Its answer had come, and the network has forgotten the connection since: the first write after the thaw is not lost."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE TABLE thawed (id int)")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FROZEN_WITH_A_RESET_IN_FLIGHT, proxy.dsn(dsn)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        for number in range(3):
            assert await request(process, number) == f"1 {number}"
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.7)  # longer than an answer vouches for a connection; the reset's has come meanwhile
            proxy.connections[-1].forget()
            process.send_signal(signal.SIGCONT)
        assert await request(process, 3) == "1 3"
        async with postgres.admin() as admin:
            assert [row["id"] for row in await admin.fetch("SELECT id FROM thawed ORDER BY id")] == [0, 1, 2, 3]
    finally:
        process.kill()
        await process.wait()
        async with postgres.admin() as admin:
            await admin.execute("DROP TABLE thawed")


async def _until_nobody_is_connected(server):
    ends = time.monotonic() + 10
    while server.open_connections:
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


async def test_after_a_jump_of_the_clock_overdue_connections_are_closed_first(dsn):
    """Before one is handed out, and without asking it: the timer that should have closed it did not run."""
    clock = JumpingClock()
    async with ResilientPool(dsn, clock=clock) as pool:
        before = await pool.fetchval("SELECT pg_backend_pid()")
        clock.frozen = 40.0
        assert await pool.fetchval("SELECT pg_backend_pid()") == before
        assert pool.stats().pings == 1
        clock.frozen += 60.0
        assert await pool.fetchval("SELECT pg_backend_pid()") != before
        assert (pool.stats().pings, dict(pool.stats().discarded)) == (1, {DiscardReason.IDLE: 1})


async def test_an_invocation_leaves_nobody_who_tries_to_connect(postgres):
    """Somebody who fails fast lets the pool find out meanwhile whether the server is back."""
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=60, away="57P03") as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, fail_fast=True) as pool:
            while len(server.attempts) < 4:
                with pytest.raises(asyncpg.CannotConnectNowError):
                    await pool.fetchval("SELECT 1")
                await asyncio.sleep(0.01)
            began = time.monotonic()
            async with pool.invocation(deadline=5.0):
                with pytest.raises(asyncpg.CannotConnectNowError):
                    await pool.fetchval("SELECT 1")
            assert time.monotonic() - began < 3
            assert not pool._maintenance._background


async def test_an_invocation_leaves_nothing_in_flight(dsn):
    """A reset, a goodbye: whatever the pool does in the background has ended when the block has."""
    async with ResilientPool(dsn, max_queries=1) as pool:
        async with pool.invocation(deadline=5.0):
            await asyncio.gather(*(pool.execute("SET work_mem TO '4MB'") for _ in range(5)))
            assert pool._maintenance._background
        assert not pool._maintenance._background
        assert pool.stats().resetting == 0


async def test_an_invocation_without_a_deadline_ends_properly_too(dsn):
    """There is no limit, but nothing is left behind."""
    async with ResilientPool(dsn) as pool:
        async with pool.invocation():
            await pool.execute("SET work_mem TO '4MB'")
        assert pool.stats().resetting == 0
        assert pool.stats().idle == 1


async def test_no_call_within_an_invocation_has_a_later_deadline(postgres, monkeypatch):
    """The original error comes first, before the block itself is out of time; tasks started within are bound as well."""
    monkeypatch.setattr(resilient_pool.pool, "_EARLIER", 0.9)  # by more than the machine may stand still
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=60, away="57P03") as server:
        server.pause()
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, **profiles.LAMBDA) as pool:
            began = time.monotonic()
            async with pool.invocation(deadline=2.0):
                with pytest.raises(asyncpg.CannotConnectNowError):
                    await asyncio.create_task(pool.fetchval("SELECT 1", deadline=30))
                assert time.monotonic() - began > 0.5
            attempts = len(server.attempts)
            await asyncio.sleep(1.2)
            assert len(server.attempts) == attempts


async def test_a_statement_that_runs_too_long_is_cancelled(postgres, dsn):
    """At the server too, and in time; the connection is fit for the next invocation."""
    name = uuid.uuid4().hex
    async with ResilientPool(dsn, max_size=1, server_settings={"application_name": name}) as pool:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"did not end within its 0\.5 s"):
            async with pool.invocation(deadline=0.5):
                await pool.execute("SELECT pg_sleep(60)")
        assert time.monotonic() - began < 5
        assert not pool._maintenance._background
        async with postgres.admin() as admin:
            running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'"
            ends = time.monotonic() + 5
            while await admin.fetchval(running, name):
                assert time.monotonic() < ends
        async with pool.invocation(deadline=5):
            assert await pool.fetchval("SELECT 1") == 1


async def test_what_the_application_raises_passes_through(dsn):
    """Also a TimeoutError of its own."""
    async with ResilientPool(dsn) as pool:
        mine = TimeoutError("mine")
        with pytest.raises(TimeoutError) as caught:
            async with pool.invocation(deadline=5):
                raise mine
        assert caught.value is mine


async def test_background_work_that_does_not_end_is_cut_short(postgres, proxy, dsn):
    """A reset whose answer never comes costs what was kept back, and its connection."""
    async with ResilientPool(proxy.dsn(dsn), ssl=False, max_size=1) as pool:
        began = time.monotonic()
        async with pool.invocation(deadline=2.0):
            await pool.fetchval("SELECT 1")
            proxy.swallow_next_answer("hang", matching=b"UNLISTEN")
            await pool.execute("SET work_mem TO '4MB'")
        assert 1.9 < time.monotonic() - began < 4
        assert pool.get_size() == 0
        assert not pool._maintenance._background
        assert await pool.fetchval("SELECT 1") == 1


async def test_leaving_an_invocation_can_be_cancelled(proxy, dsn):
    """Then the background work is cut short at once."""
    async with ResilientPool(proxy.dsn(dsn), ssl=False, max_size=1) as pool:
        left = asyncio.Event()

        async def invoke():
            async with pool.invocation(deadline=30.0):
                await pool.fetchval("SELECT 1")
                proxy.swallow_next_answer("hang", matching=b"UNLISTEN")
                await pool.execute("SET work_mem TO '4MB'")
                left.set()

        task = asyncio.create_task(invoke())
        await left.wait()
        while not proxy.fired:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while pool._maintenance._background:
            await asyncio.sleep(0)
        assert pool.get_size() == 0
