"""The application's own callbacks: setup, init, reset and connect; also those that raise."""

from __future__ import annotations

import asyncio
import contextlib
import json

import asyncpg
import pytest

from resilient_pool.events import ConnectionDiscarded, DiscardReason

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


class Refusal(Exception):
    """What a callback raises."""


async def test_setup_gets_the_connection_that_acquire_returns(make_pool):
    """`setup` is awaited with the very object that the application gets."""
    seen = []

    async def setup(connection):
        assert await connection.fetchval("SELECT 1") == 1
        seen.append(connection)

    async with make_pool(min_size=2, max_size=2, setup=setup) as pool, pool.acquire() as connection:
        assert len(seen) == 1
        assert seen[0] is connection


async def test_setup_runs_each_time(make_pool):
    """Leases and one-shot calls alike are preceded by one `setup`."""
    calls = 0

    async def setup(_connection):
        nonlocal calls
        calls += 1

    async with make_pool(max_size=1, setup=setup) as pool:
        async with pool.acquire():
            pass
        await pool.acquire()
        assert calls == 2
        pool.terminate()


async def test_setup_precedes_a_call_on_an_idle_connection(make_pool, eventually):
    """A connection that could be used at once without it could not with it."""
    seen = []

    async def setup(connection):
        seen.append(connection.get_server_pid())

    async with make_pool(max_size=1, setup=setup) as pool:
        for calls in (1, 2, 3):
            await pool.fetchval("SELECT 1")
            assert len(seen) == calls
            await eventually(lambda: pool.get_idle_size() == 1)


async def test_setup_precedes_a_one_shot_call(make_pool):
    """What `setup` sets is in force for `pool.fetchval`."""

    async def setup(connection):
        await connection.execute("SET lock_timeout = '3s'")

    async with make_pool(max_size=1, setup=setup) as pool:
        for _ in range(3):
            assert await pool.fetchval("SHOW lock_timeout") == "3s"
            async with pool.acquire() as connection:
                assert await connection.fetchval("SHOW lock_timeout") == "3s"


@both_loops
async def test_init_runs_once_per_connection_and_before_setup(make_pool):
    """However many callers there are, each connection is initialized once, before its first `setup`."""
    initialized, events = set(), []

    async def init(connection):
        events.append(("init", connection.get_server_pid()))
        assert connection.get_server_pid() not in initialized
        initialized.add(connection.get_server_pid())

    async def setup(connection):
        assert connection.get_server_pid() in initialized

    async with make_pool(min_size=2, max_size=5, init=init, setup=setup) as pool:
        together = asyncio.Barrier(5)

        async def use():
            async with pool.acquire() as connection:
                await together.wait()
                await connection.execute("SELECT 1")

        await asyncio.gather(*(use() for _ in range(20)))
        assert len(initialized) == pool.get_size() == 5
    assert len(events) == 5


async def test_what_init_registers_lasts(make_pool):
    """A type codec set in `init` is there for every lease and one-shot call on every connection."""

    async def init(connection):
        await connection.set_type_codec("json", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")

    async with make_pool(max_size=3, init=init) as pool:

        async def use(number):
            async with pool.acquire() as connection:
                return await connection.fetchval("SELECT $1::json FROM pg_sleep(0.01)", {"n": number})

        assert await asyncio.gather(*map(use, range(6))) == [{"n": number} for number in range(6)]
        assert await pool.fetchval("SELECT '[1]'::json") == [1]


@both_loops
@pytest.mark.parametrize("callback", ["setup", "init"])
async def test_a_callback_that_raises_reaches_the_caller_and_costs_the_connection(
    make_pool, callback, sessions_named, eventually
):
    """The caller sees the error itself, the connection is closed, and the next caller gets another."""
    name, seen = f"{callback} raises", []

    async def refuse_once(connection):
        seen.append(connection.get_server_pid())
        if len(seen) == 1:
            raise Refusal

    arguments = {callback: refuse_once, "server_settings": {"application_name": name}}
    async with make_pool(max_size=1, **arguments) as pool:
        with pytest.raises(Refusal):
            await pool.acquire()
        async with pool.acquire(timeout=5) as connection:
            assert connection.get_server_pid() == seen[1] != seen[0]
            assert await connection.fetchval("SELECT 1") == 1

        async def one_left():
            return await sessions_named(name) == 1

        await eventually(one_left)


@pytest.mark.parametrize("callback", ["setup", "init"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (Refusal(), Refusal),
        (ValueError("no"), ValueError),
        (asyncpg.UniqueViolationError("no"), asyncpg.UniqueViolationError),
        # A task that the callback waits for was cancelled: the pool's own work was not.
        (asyncio.CancelledError(), asyncpg.InterfaceError),
    ],
)
async def test_a_callback_that_always_raises_is_not_repeated(make_pool, eventually, callback, error, seen):
    """An error that waiting does not cure is raised after one attempt, from leases and one-shot calls."""
    calls = 0

    async def refuse(_connection):
        nonlocal calls
        calls += 1
        raise error

    async with make_pool(max_size=1, **{callback: refuse}) as pool:
        with pytest.raises(seen):
            await pool.acquire()
        with pytest.raises(seen):
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1")
        assert calls == 2
        await eventually(lambda: pool.get_size() == 0)


@both_loops
@pytest.mark.parametrize("callback", ["setup", "init", "connect"])
async def test_a_caller_cancelled_in_a_callback_leaves_no_session_behind(
    make_pool, dsn, callback, sessions_named, eventually
):
    """Cancellation passes through `setup`, `init` and `connect`; place and connection are free again."""
    name, entered, blocked = f"cancelled in {callback}", asyncio.Event(), True

    async def block(*arguments, **keywords):
        if callback == "connect":
            connection = await asyncpg.connect(*arguments, **keywords)
        entered.set()
        if blocked:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if callback == "connect":
                    await connection.close()
                raise
        return connection if callback == "connect" else None

    arguments = {callback: block, "server_settings": {"application_name": name}}
    async with make_pool(max_size=1, **arguments) as pool:
        caller = asyncio.create_task(pool.fetchval("SELECT 1"))
        await entered.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller

        async def none_left():
            return await sessions_named(name) == 0

        await eventually(none_left)
        blocked = False
        async with pool.acquire(timeout=5) as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_reset_runs_after_each_lease(make_pool, eventually):
    """`reset` is awaited with a connection when a lease ends, before the connection is lent again."""
    seen = []

    async def reset(connection):
        assert isinstance(connection, asyncpg.Connection)
        seen.append(await connection.fetchval("SELECT pg_backend_pid()"))

    async with make_pool(max_size=1, reset=reset) as pool:
        for number in range(1, 4):
            async with pool.acquire() as connection:
                assert len(seen) == number - 1
                pid = connection.get_server_pid()
        await eventually(lambda: len(seen) == 3)
        assert set(seen) == {pid}


async def test_reset_replaces_the_usual_reset(make_pool):
    """With a `reset` of its own an application decides what stays: a setting does, an open transaction does not."""

    async def reset(_connection):
        pass

    async with make_pool(max_size=1, reset=reset) as pool:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
        async with pool.acquire() as connection:
            await connection.execute("SET lock_timeout = '3s'")
            await connection.transaction().start()
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()
            assert await connection.fetchval("SHOW lock_timeout") == "3s"


@both_loops
async def test_a_reset_that_raises_costs_the_connection(make_pool):
    """A connection whose reset failed is not lent again."""
    calls = 0

    async def reset(_connection):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Refusal

    async with make_pool(max_size=1, reset=reset) as pool:
        connection = await pool.acquire()
        pid = connection.get_server_pid()
        with contextlib.suppress(Refusal):  # depends on whether the reset runs inside of release()
            await pool.release(connection)
        for _ in range(2):
            async with pool.acquire(timeout=5) as connection:
                assert connection.get_server_pid() != pid
                last = connection.get_server_pid()
        async with pool.acquire(timeout=5) as connection:
            assert connection.get_server_pid() == last


@pytest.mark.parametrize("error", [Refusal(), asyncio.CancelledError()])
async def test_observers_learn_of_a_reset_that_raised(make_pool, eventually, error):
    """The releaser is not bothered with a background reset; observers are told why the connection ended."""
    events = []

    async def reset(_connection):
        raise error

    async with make_pool(max_size=1, reset=reset, observers=[events.append]) as pool:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
        await eventually(lambda: pool.get_size() == 0)
    discarded = [event for event in events if isinstance(event, ConnectionDiscarded)]
    assert not pool._maintenance.loop_is_ending
    assert [(event.reason, event.server_pid) for event in discarded] == [(DiscardReason.RESET_FAILED, pid)]


async def test_a_reset_on_release_that_raises_reaches_the_releaser(make_pool):
    """With `session_reset="on_release"` the error comes out of `release()`, as in asyncpg."""

    async def reset(_connection):
        raise Refusal

    async with make_pool(max_size=1, reset=reset, session_reset="on_release") as pool:
        connection = await pool.acquire()
        with pytest.raises(Refusal):
            await pool.release(connection)
        assert pool.get_size() == 0


async def test_setup_may_use_a_transaction(make_pool):
    """A `setup` that runs a transaction leaves a lease that is in none."""

    async def setup(connection):
        async with connection.transaction():
            await connection.execute("SELECT 1")

    async with make_pool(max_size=1, setup=setup) as pool:
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()
        assert await pool.fetchval("SELECT 1") == 1


async def call_once(pool):
    await pool.execute("SELECT 1 FOR UPDATE")


async def lease(pool):
    async with pool.acquire():
        pytest.fail("it was leased")


async def call_in_a_transaction(pool):
    await pool.run_in_transaction(lambda _: pytest.fail("it has begun"))


@pytest.mark.parametrize("use", [call_once, lease, call_in_a_transaction], ids=lambda use: use.__name__)
async def test_a_setup_that_releases_its_connection_is_refused(make_pool, use):
    """Nothing more is sent on it: another caller may have it by then, and keeps it."""
    calls = 0

    async def setup(connection):
        nonlocal calls
        calls += 1
        if calls == 1:
            await pool.release(connection)

    async with make_pool(max_size=1, deadline=10, setup=setup) as pool:
        with pytest.raises(asyncpg.InterfaceError, match="released while it was being set up"):
            await use(pool)
        assert calls == 1
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.stats().opened == 1
