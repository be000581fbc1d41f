"""Closing ends in time whatever is under way, and ending works from any state: no loop, a fork, another library's loop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import subprocess
import sys
import textwrap
import time
from typing import ClassVar

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.events import ConnectionDiscarded, DiscardReason

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@both_loops
async def test_closing_waits_for_a_lease_at_most_as_long_as_it_was_told(make_pool, caplog):
    """Then everything is cut off: the pool is closed in any case, and the log says how much was lost."""
    pool = await make_pool()
    held = await pool.acquire()
    running = asyncio.create_task(held.execute("SELECT pg_sleep(60)"))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await pool.close(timeout=0.2)
    assert 0.15 < time.monotonic() - began < 10
    assert pool.is_closed
    assert pool.get_size() == 0
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await running
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "1 connection(s) not released within 0.2 s" in caplog.text
    await pool.release(held)


@both_loops
@pytest.mark.parametrize("end", ["close", "terminate"])
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
async def test_a_lease_that_was_cut_off_has_ended(make_pool, end, used):
    """Whether it was used or not: it says so, and a use of it is refused as of one that is closed."""
    pool = await make_pool()
    held = await pool.acquire()
    if used:
        await held.execute("SELECT 1")
    if end == "close":
        await pool.close(timeout=0.1)
    else:
        pool.terminate()
        await asyncio.sleep(0.05)
    assert held.is_released
    with pytest.raises(asyncpg.InterfaceError, match="connection is closed and has been released back to the pool"):
        await held.fetchval("SELECT 1")
    await held.close()
    await pool.release(held)


@both_loops
async def test_a_lease_that_comes_back_in_time_is_closed_in_good_order(make_pool, caplog):
    """`timeout=` is an upper limit, not a time to wait."""
    pool = await make_pool()
    held = await pool.acquire()
    asyncio.get_running_loop().call_later(0.1, lambda: asyncio.ensure_future(pool.release(held)))
    began = time.monotonic()
    await pool.close(timeout=30)
    assert time.monotonic() - began < 10
    assert (pool.is_closed, caplog.records) == (True, [])


@pytest.mark.parametrize("wrong", [-1, float("nan"), "5"])
async def test_a_time_limit_that_is_none_is_refused(make_pool, wrong):
    """Before anything is closed."""
    pool = await make_pool()
    with pytest.raises((ValueError, TypeError)):
        await pool.close(timeout=wrong)
    assert await pool.fetchval("SELECT 1") == 1


async def test_closing_does_not_wait_for_a_prune_that_waits_for_a_lock(make_pool, postgres):
    """What the pool does for itself is given up when it is closed."""
    pool = await make_pool(commit_log="public.log_of_closing")

    async def write(connection):
        await connection.execute("CREATE TABLE IF NOT EXISTS written_by_closing (id int)")

    try:
        await pool.run_in_transaction(write)
        async with postgres.admin() as admin:
            await admin.execute("BEGIN")
            await admin.execute("LOCK TABLE log_of_closing IN SHARE MODE")
            pool._transactions.commit_resolver._pruned = None  # as if an hour had passed
            pool._transactions.commit_resolver.prune()
            while not await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            began = time.monotonic()
            await pool.close()
            assert time.monotonic() - began < 3.0
            await admin.execute("ROLLBACK")
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP TABLE IF EXISTS log_of_closing, written_by_closing")


@both_loops
async def test_closing_does_not_wait_for_a_reset_that_never_ends(make_pool):
    """Not even for one that swallows its cancellation: what is the pool's own has a limit."""

    async def stubborn(*_):
        ends = time.monotonic() + 12
        while not over and time.monotonic() < ends:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)

    over = []
    pool = await make_pool(reset=stubborn, reset_timeout=0.2)
    await pool.execute("SELECT 1")
    await asyncio.sleep(0)
    began = time.monotonic()
    await pool.close()
    over.append(True)
    assert time.monotonic() - began < 9.0
    assert pool.is_closed


async def test_terminating_a_pool_that_was_never_opened_closes_it(make_pool):
    """`terminate()` can be called in any state."""
    pool = make_pool()
    pool.terminate()
    pool.terminate()
    assert (pool.is_closed, pool.is_closing()) == (True, True)
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
        await pool


@both_loops
async def test_terminating_a_pool_that_is_being_opened_ends_the_opening(make_pool, proxy, dsn):
    """Opening raises, and nothing is left open."""
    proxy.hang()
    pool = make_pool(proxy.dsn(dsn), ssl=False, init_size=2, min_size=2)

    async def open_pool():
        await pool

    opening = asyncio.create_task(open_pool())
    await asyncio.sleep(0.1)
    pool.terminate()
    with pytest.raises(asyncpg.InterfaceError, match="clos"):
        await asyncio.wait_for(opening, 10)
    assert (pool.is_closed, pool._resources.size) == (True, 0)


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # In development mode asyncio also reports steps that took long, which says something of the machine only.
    said = [
        line for line in done.stderr.strip().splitlines() if not re.match(r"Executing <.* took [\d.]+ seconds$", line)
    ]
    return done.stdout.strip(), "\n".join(said)


CLOSED_LOOP = """
    import asyncio, sys
    from resilient_pool import ResilientPool
    if sys.argv[2] == "uvloop":
        import uvloop
        loop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    async def begin():
        pool = await ResilientPool(sys.argv[1], max_size=1, server_settings={"application_name": "closed_loop"})
        return pool, await pool.acquire()
    pool, lease = loop.run_until_complete(begin())
    if sys.argv[3] == "closed":
        loop.close()
    pool.terminate()
    print(pool.is_closed, pool.get_size())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("state", ["stopped", "closed"])
def test_terminating_needs_no_running_loop(dsn, loop, state):
    """A finalizer calls it, or a program that has closed its loop already."""
    assert run(CLOSED_LOOP, dsn, loop, state) == ("True 0", "")


FORK = """
    import asyncio, os, sys
    import asyncpg
    from resilient_pool import ResilientPool
    loop = asyncio.new_event_loop()
    async def begin():
        pool = await ResilientPool(sys.argv[1], max_size=2)
        await pool.fetchval("SELECT 1")
        return pool, await pool.acquire()
    pool, lease = loop.run_until_complete(begin())
    child = os.fork()
    if child == 0:
        for use in (lambda: pool.fetchval("SELECT 2"), lambda: pool.acquire(), lambda: lease.fetchval("SELECT 2")):
            async def attempt():
                await use()
            try:
                loop.run_until_complete(attempt())
                print("used")
            except asyncpg.InterfaceError as error:
                print("refused" if "process" in str(error) or "closed" in str(error) else error)
        async def end():
            await pool.release(lease)
            await pool.close()
        try:
            loop.run_until_complete(end())
        except asyncpg.InterfaceError as error:
            print(error)
        pool.terminate()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    async def go_on():
        print(await lease.fetchval("SELECT 3"), await pool.fetchval("SELECT 4"))
        await pool.release(lease)
        await pool.close()
        print(pool.stats().opened)
    loop.run_until_complete(go_on())
"""


def test_a_pool_is_refused_in_a_forked_process_and_goes_on_in_its_parent(dsn):
    """Also in the very same event loop: two processes on one connection would read each other's answers."""
    out, err = run(FORK, dsn)
    assert (out.split("\n"), err) == (["refused"] * 3 + ["3 4", "2"], "")


def test_another_librarys_loop_is_told_that_only_asyncio_is_supported(dsn):
    """Under trio, say, where no asyncio event loop runs."""

    async def use():
        async with ResilientPool(dsn):
            pass

    opening = use()
    with pytest.raises(asyncpg.InterfaceError, match="asyncio only"):
        opening.send(None)


FORGOTTEN = """
    import asyncio, sys
    from resilient_pool import ResilientPool
    async def main():
        pool = await ResilientPool(sys.argv[1], min_size=int(sys.argv[2]), max_size=4)
        await asyncio.gather(*(pool.execute("SET work_mem = '4MB'") for _ in range(3)))
        if sys.argv[3] == "away":
            pool.set_connect_args(sys.argv[1], port=1)
            await pool.expire_connections()
            await asyncio.sleep(0.1)
            asyncio.ensure_future(pool.fetchval("SELECT 1"))
            await asyncio.sleep(0.1)
    asyncio.run(main())
    print("end")
"""


@pytest.mark.parametrize("min_size", ["0", "1", "2"])
@pytest.mark.parametrize("server", ["there", "away"])
def test_a_forgotten_pool_opens_nothing_while_its_loop_ends(dsn, min_size, server):
    """A script that never closes its pool ends without noise."""
    out, err = run(FORGOTTEN, dsn, min_size, server)
    noise = [line for line in err.split("\n") if "server is away" not in line and line]
    assert (out, noise) == ("end", [])


async def test_idle_connections_that_died_are_not_counted_as_idle(make_pool, postgres, eventually):
    """`get_idle_size()` never exceeds `get_size()`."""
    pool = await make_pool(server_settings={"application_name": "idle_and_dead"})
    leases = await asyncio.gather(*(pool.acquire() for _ in range(4)))
    for lease in leases:
        await pool.release(lease)
    await eventually(lambda: pool.get_idle_size() == 4)
    await postgres.terminate_backends("application_name = 'idle_and_dead'")
    await eventually(lambda: pool.get_size() == 0)
    assert pool.get_idle_size() == 0
    assert (pool.stats().idle, pool.stats().size) == (0, 0)


REQUEST = contextvars.ContextVar("request", default="none")


class Traced(asyncpg.Connection):
    """A connection whose methods an agent has wrapped: it notes in which request each was called."""

    seen: ClassVar[list[tuple[str, str]]] = []

    async def execute(self, query, *args, **options):
        self.seen.append(("execute", REQUEST.get()))
        return await super().execute(query, *args, **options)

    async def reset(self, **options):
        self.seen.append(("reset", REQUEST.get()))
        return await super().reset(**options)

    async def close(self, **options):
        self.seen.append(("close", REQUEST.get()))
        await super().close(**options)

    def terminate(self):
        self.seen.append(("terminate", REQUEST.get()))
        super().terminate()


@both_loops
async def test_background_work_belongs_to_no_request(make_pool, eventually):
    """Resets, the application's own too, closes and attempts to connect are in no caller's trace."""
    Traced.seen.clear()
    contexts = []

    async def reset(connection):
        contexts.append(("reset=", REQUEST.get()))

    async def init(connection):
        contexts.append(("init=", REQUEST.get()))

    pool = await make_pool(connection_class=Traced, reset=reset, init=init, max_inactive_connection_lifetime=0.2)

    async def request():
        REQUEST.set("request 1")
        await pool.execute("SET work_mem = '4MB'")

    await asyncio.create_task(request())
    await eventually(lambda: pool.get_size() == 0 and not pool._maintenance._background)
    assert Traced.seen[0] == ("execute", "request 1")
    assert {where for _, where in Traced.seen[1:] + contexts} == {"none"}


async def test_a_reset_of_the_applications_that_fails_is_told(make_pool, eventually, caplog, postgres):
    """By an event and a line in the log, with the reason and without the password; and it is counted."""
    await postgres.create_role("resetting", "s3cretPassword")
    events = []

    async def reset(connection):
        raise RuntimeError("bug in the reset with s3cretPassword")

    try:
        pool = make_pool(
            postgres.dsn(user="resetting", password="s3cretPassword"), reset=reset, observers=[events.append]
        )
        async with pool:
            for number in range(1, 4):
                await pool.fetchval("SELECT 1")
                await eventually(lambda number=number: pool.stats().discarded.get(DiscardReason.RESET_FAILED) == number)
        told = [event.error for event in events if isinstance(event, ConnectionDiscarded)]
        assert told == ["RuntimeError: bug in the reset with ****"] * 3
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "bug in the reset" in caplog.text
        assert "s3cret" not in caplog.text
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP ROLE resetting")
