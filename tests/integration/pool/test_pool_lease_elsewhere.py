"""Leases that are ended elsewhere: in another thread's event loop, after their own has ended, or by a program that forgets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import asyncpg
import pytest

from resilient_pool import BackoffPolicy, ResilientPool

FORGETFUL = """
import asyncio, sys
from resilient_pool import ResilientPool

async def main():
    pool = await ResilientPool(sys.argv[1], max_size=3)
    begun = []
    async def work():
        async with pool.acquire() as connection, connection.transaction():
            begun.append(connection)
            await connection.fetchval("SELECT pg_sleep(20)")
    tasks = [asyncio.create_task(work()) for _ in range(5)]
    while len(begun) < 3:
        await asyncio.sleep(0.01)

asyncio.run(main())
"""

LATE = """
import asyncio, atexit, sys
from resilient_pool import ResilientPool

async def main():
    global pool, lease
    pool = await ResilientPool(sys.argv[1])
    lease = await pool.acquire()

asyncio.run(main())
atexit.register(lambda: print(lease.is_closed()))
atexit.register(lambda: lease.terminate())
"""


def in_another_loop(function) -> None:
    """Call a function in an event loop of another thread."""

    async def call() -> None:
        function()
        await asyncio.sleep(0)

    thread = threading.Thread(target=lambda: asyncio.run(call()))
    thread.start()
    thread.join()


async def works(pool: ResilientPool) -> bool:
    async with asyncio.timeout(5):
        return await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("min_size", [0, 1])
@pytest.mark.parametrize("waits", [False, True])
async def test_a_lease_terminated_in_another_threads_loop_leaves_a_pool_that_works(dsn, min_size, waits):
    """What replaces its connection belongs to the pool's own loop: a finalizer may run anywhere."""
    async with ResilientPool(dsn, min_size=min_size, max_size=1) as pool:
        lease = await pool.acquire()
        waiting = asyncio.create_task(pool.fetchval("SELECT 1")) if waits else None
        await asyncio.sleep(0)
        in_another_loop(lease.terminate)
        if waiting is not None:
            assert await asyncio.wait_for(waiting, 5) == 1
        assert await works(pool)
        assert await works(pool)


def test_a_lease_can_be_terminated_when_its_loop_is_closed(dsn):
    """As a finalizer does at the end of a program."""
    command = [sys.executable, "-c", LATE, dsn]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_a_program_that_ends_with_connections_on_loan_says_nothing(dsn):
    """Its tasks give them back while their loop ends, and what the pool does then comes to no end."""
    command = [sys.executable, "-c", FORGETFUL, dsn]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""


async def test_other_arguments_for_a_pool_that_is_not_open_open_nothing(dsn):
    """And they are taken while no event loop runs, as asyncpg's pool takes them."""
    pool = ResilientPool("postgresql://nobody@127.0.0.1:1/", min_size=1, max_size=1)
    await asyncio.to_thread(pool.set_connect_args, dsn)
    pool.set_connect_args(dsn)
    await asyncio.sleep(0)
    assert pool._resources.size == 0
    async with pool:
        assert await works(pool)


async def test_connections_are_expired_in_the_pools_own_loop_only(dsn):
    """Their goodbyes are said there."""
    async with ResilientPool(dsn, min_size=1) as pool:
        refused = []

        def expire() -> None:
            with pytest.raises(asyncpg.InterfaceError, match="another event loop") as caught:
                pool.expire_connections().send(None)
            refused.append(caught.value)

        in_another_loop(expire)
        assert len(refused) == 1
        assert await works(pool)
    await pool.expire_connections()


async def test_after_a_lease_that_worked_was_lost_the_next_one_does_not_wait(postgres, dsn):
    """A connection that has answered proves that the server lets one in; the distance between attempts is for others."""
    distant = BackoffPolicy(base=20.0, max_attempts=None)
    async with ResilientPool(dsn, max_size=1, reconnect=distant) as pool, postgres.admin() as admin:
        for _ in range(3):
            lease = await pool.acquire()
            pid = await lease.fetchval("SELECT pg_backend_pid()")
            await admin.execute("SELECT pg_terminate_backend($1)", pid)
            while not lease.is_closed():
                await asyncio.sleep(0.01)
            assert await works(pool)
            await pool.expire_connections()


async def test_closing_a_lease_ends_when_the_server_does_not_answer(postgres, proxy):
    """What takes longer than the pool's `reset_timeout` is cut off; with a time limit of its own that is an error."""
    async with ResilientPool(proxy.dsn(postgres.dsn()), max_size=1, reset_timeout=0.2) as pool:
        for limit, error in ((None, None), (0.1, TimeoutError)):
            lease = await pool.acquire()
            await lease.fetchval("SELECT 1")
            running = asyncio.create_task(lease.execute("SELECT pg_sleep(20)"))
            await asyncio.sleep(0)
            proxy.blackhole()
            closing = asyncio.gather(lease.close(timeout=limit), return_exceptions=True)
            (outcome,) = await asyncio.wait_for(closing, 5)
            assert outcome is None if error is None else isinstance(outcome, error)
            proxy.restore()
            assert await works(pool)
            await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(
    ("method", "arguments", "misspelt", "meant"),
    [
        ("transaction", (), "isolaton", "isolation"),
        ("prepare", ("SELECT 1",), "timout", "timeout"),
        ("cursor", ("SELECT 1",), "prefech", "prefetch"),
        ("close", (), "timout", "timeout"),
        ("reset", (), "timout", "timeout"),
        ("set_type_codec", ("json",), "encodr", "encoder"),
        ("add_listener", (), "chanel", "channel"),
    ],
)
async def test_a_misspelt_argument_of_a_leases_method_names_the_nearest_known(dsn, method, arguments, misspelt, meant):
    """As those of the pool's own methods do, and before anything is sent."""
    async with ResilientPool(dsn) as pool, pool.acquire() as lease:
        with pytest.raises(TypeError, match=f"unknown argument '{misspelt}' of {method}.*did you mean '{meant}'"):
            call = getattr(lease, method)(*arguments, **{misspelt: 1})
            await call
        assert await lease.fetchval("SELECT 1") == 1


async def test_what_is_no_time_limit_is_refused_by_a_lease_too(dsn):
    """A comparison with nan is never true, so nothing would ever be over."""
    async with ResilientPool(dsn) as pool, pool.acquire() as lease:
        for value in (float("nan"), float("inf"), -1, "5", True):
            for call in (
                lambda value=value: lease.fetch("SELECT 1", deadline=value),
                lambda value=value: lease.prepare("SELECT 1", timeout=value),
                lambda value=value: lease.reset(timeout=value),
                lambda value=value: lease.close(timeout=value),
            ):
                with pytest.raises(ValueError, match="must be a number of seconds"):
                    await call()
        assert await lease.fetchval("SELECT 1") == 1
