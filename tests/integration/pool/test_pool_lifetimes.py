"""How many connections there are, and when one of them is replaced."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from jumping_clock import JumpingClock

from resilient_pool.pooling import acquire

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


async def _pid(pool):
    return await pool.fetchval("SELECT pg_backend_pid()")


async def _pids(pool, count):
    leases = [await pool.acquire() for _ in range(count)]
    pids = {lease.get_server_pid() for lease in leases}
    for lease in leases:
        await pool.release(lease)
    return pids


async def test_a_pool_opens_nothing_until_it_is_asked(make_pool):
    """By default no connection is made before the first call, and at most ten after it."""
    async with make_pool() as pool:
        figures = (
            pool.get_size(),
            pool.get_idle_size(),
            pool.get_init_size(),
            pool.get_min_size(),
            pool.get_max_size(),
        )
        assert figures == (0, 0, 0, 0, 10)
        await pool.fetchval("SELECT 1")
        assert pool.get_size() == 1


async def test_the_figures_follow_the_leases(make_pool, eventually):
    """`get_size()` counts connections, `get_idle_size()` those that nobody holds."""
    async with make_pool(min_size=2, max_size=3) as pool:
        assert (pool.get_init_size(), pool.get_min_size(), pool.get_max_size()) == (2, 2, 3)
        assert (pool.get_size(), pool.get_idle_size()) == (2, 2)
        async with pool.acquire():
            assert (pool.get_size(), pool.get_idle_size()) == (2, 1)
            async with pool.acquire():
                assert (pool.get_size(), pool.get_idle_size()) == (2, 0)
                async with pool.acquire():
                    assert (pool.get_size(), pool.get_idle_size()) == (3, 0)
        await eventually(lambda: (pool.get_size(), pool.get_idle_size()) == (3, 3))
    assert (pool.get_size(), pool.get_idle_size()) == (0, 0)


@both_loops
async def test_init_size_connections_are_there_from_the_start(make_pool, sessions_named):
    """`init_size` says how many are opened first, however small `min_size` is."""
    name = "from the start"
    async with make_pool(init_size=4, max_size=5, server_settings={"application_name": name}) as pool:
        assert (pool.get_init_size(), pool.get_min_size()) == (4, 0)
        assert pool.get_size() == pool.get_idle_size() == await sessions_named(name) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_size": 0},
        {"min_size": -1},
        {"min_size": 11},
        {"min_size": 3, "max_size": 2},
        {"init_size": -1},
        {"init_size": 11},
        {"init_size": 1, "min_size": 2},
        {"max_queries": 0},
        {"max_inactive_connection_lifetime": -1},
    ],
)
async def test_sizes_out_of_range_are_refused(make_pool, arguments):
    """A size that makes no sense is named in a `ValueError` when the pool is made."""
    with pytest.raises(ValueError, match="|".join(arguments)):
        make_pool(**arguments)


@pytest.mark.parametrize("arguments", [{"connection_class": dict}, {"record_class": tuple}])
async def test_classes_of_another_kind_are_refused(make_pool, arguments):
    """A connection class or record class that is no subclass of asyncpg's is an error when the pool is made."""
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        make_pool(**arguments)


@both_loops
async def test_an_idle_connection_is_closed(make_pool, eventually, sessions_named):
    """After `max_inactive_connection_lifetime` without use nothing is left, here and on the server."""
    name = "idle is closed"
    async with make_pool(
        max_size=3, max_inactive_connection_lifetime=0.1, server_settings={"application_name": name}
    ) as pool:
        before = await _pids(pool, 3)
        await eventually(lambda: pool.get_size() == 0)

        async def none_left():
            return await sessions_named(name) == 0

        await eventually(none_left)
        assert await _pid(pool) not in before


async def test_a_connection_never_used_is_closed_as_well(make_pool, eventually):
    """Connections opened at the start and never asked for age like the others."""
    async with make_pool(init_size=2, max_inactive_connection_lifetime=0.1) as pool:
        assert pool.stats().opened == 2
        await eventually(lambda: pool.get_size() == 0)


@both_loops
async def test_min_size_connections_stay(make_pool, eventually):
    """Idle connections are closed down to `min_size`; those that stay are not replaced for idleness."""
    async with make_pool(min_size=2, max_size=5, max_inactive_connection_lifetime=0.1) as pool:
        first = await _pids(pool, 5)
        assert len(first) == 5
        await eventually(lambda: pool.get_size() == 2)
        await asyncio.sleep(0.25)
        assert pool.get_size() == 2
        assert await _pids(pool, 2) < first


async def test_a_long_query_is_not_idle(make_pool):
    """A query may last longer than idle connections live."""
    async with make_pool(max_size=1, max_inactive_connection_lifetime=0.1) as pool:
        pid = await _pid(pool)
        for _ in range(2):
            assert await pool.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.25)") == pid
        async with pool.acquire() as connection:
            await asyncio.sleep(0.25)
            assert await connection.fetchval("SELECT pg_backend_pid()") == pid


async def test_idleness_counts_from_the_last_use(make_pool):
    """Each use starts the time anew, so a connection in regular use stays."""
    clock = JumpingClock()
    async with make_pool(max_size=1, max_inactive_connection_lifetime=40.0, clock=clock) as pool:
        pid = await _pid(pool)
        for _ in range(6):
            clock.frozen += 15.0
            assert await _pid(pool) == pid


async def test_idle_connections_may_live_for_ever(make_pool):
    """`max_inactive_connection_lifetime=0` turns ageing by idleness off."""
    async with make_pool(max_size=2, max_inactive_connection_lifetime=0) as pool:
        before = await _pids(pool, 2)
        await asyncio.sleep(0.2)
        assert await _pids(pool, 2) == before


@both_loops
async def test_idle_connections_end_under_load_without_harm(make_pool):
    """While connections come and go at the limit of their idle life, every caller gets its answer."""
    async with make_pool(min_size=2, max_size=8, max_inactive_connection_lifetime=0.03) as pool:

        async def work(number):
            for step in range(8):
                await asyncio.sleep(0.01 * ((number * 7 + step * 3) % 9))
                async with pool.acquire() as connection:
                    if (number + step) % 2:
                        await connection.execute("SELECT pg_sleep(0.01)")
                    assert await connection.fetchval("SELECT $1::int", number) == number
                assert await pool.fetchval("SELECT $1::int", step) == step
            return True

        async with asyncio.timeout(20):
            assert all(await asyncio.gather(*map(work, range(25))))


async def test_max_queries_ends_a_connection(make_pool):
    """A connection is replaced after so many queries, and not before."""
    async with make_pool(max_size=1, max_queries=1) as pool:
        pids = [await _pid(pool) for _ in range(4)]
        assert len(set(pids)) == 4
    async with make_pool(max_size=1, max_queries=1000) as pool:
        assert len({await _pid(pool) for _ in range(4)}) == 1


async def test_max_queries_does_not_cut_a_lease(make_pool):
    """A lease may run more queries than that; its connection ends with it."""
    async with make_pool(max_size=1, max_queries=2) as pool:
        async with pool.acquire() as connection:
            pids = {await connection.fetchval("SELECT pg_backend_pid()") for _ in range(5)}
            assert len(pids) == 1
        assert await _pid(pool) not in pids


async def test_max_lifetime_ends_a_connection_between_uses(make_pool):
    """A connection older than `max_lifetime` is replaced at its next use; a lease outlives it."""
    async with make_pool(max_size=1, max_lifetime=0.1) as pool:
        async with pool.acquire() as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await asyncio.sleep(0.15)
            assert await connection.fetchval("SELECT pg_backend_pid()") == pid
        assert await _pid(pool) != pid


@both_loops
async def test_expired_connections_are_replaced_before_their_next_use(make_pool):
    """`expire_connections()` replaces idle connections, at the latest when they are asked for."""
    async with make_pool(min_size=2, max_size=2) as pool:
        before = await _pids(pool, 2)
        await pool.expire_connections()
        after = await _pids(pool, 2)
        assert not before & after
        assert await _pids(pool, 2) == after


@both_loops
async def test_expiring_does_not_disturb_a_lease(make_pool, eventually):
    """A lease goes on after `expire_connections()`; its connection ends when it is released."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            await pool.expire_connections()
            assert await connection.fetchval("SELECT pg_backend_pid()") == pid
        await eventually(lambda: pool.get_size() == 0)
        assert await _pid(pool) != pid


async def test_min_size_is_restored_after_a_loss(make_pool, eventually):
    """When connections of the minimum are closed by their holder, others are opened without anybody asking."""
    async with make_pool(min_size=2, max_size=3) as pool:
        leases = [await pool.acquire() for _ in range(2)]
        before = {lease.get_server_pid() for lease in leases}
        leases[0].terminate()
        for lease in leases:
            await pool.release(lease)
        await eventually(lambda: pool.get_size() == pool.get_idle_size() == 2)
        assert len(await _pids(pool, 2) - before) == 1


async def test_a_worn_out_connection_of_the_minimum_is_replaced_unasked(make_pool, eventually):
    """The same after `max_queries` and after `expire_connections()`."""
    async with make_pool(min_size=1, max_size=1, max_queries=1) as pool:
        await _pid(pool)
        await eventually(lambda: pool.get_idle_size() == 1)
    async with make_pool(min_size=1, max_size=1) as pool:
        async with pool.acquire():
            await pool.expire_connections()
        await eventually(lambda: pool.get_idle_size() == 1)


@both_loops
async def test_the_connection_used_last_is_used_next(make_pool):
    """Idle connections are taken last in, first out, so that those not needed can age."""
    async with make_pool(min_size=3, max_size=3) as pool:
        await _pids(pool, 3)
        pid = await _pid(pool)
        assert {await _pid(pool) for _ in range(5)} == {pid}


async def test_a_closed_connection_is_not_counted(make_pool, eventually):
    """A connection that its holder closed is no part of `get_size()`."""
    async with make_pool(max_size=2) as pool:
        async with pool.acquire() as connection:
            await connection.close()
            assert pool.get_size() == 0
        await eventually(lambda: pool.get_size() == 0)
        assert isinstance(await pool.fetchrow("SELECT 1"), asyncpg.Record)


@pytest.mark.parametrize("callers", [1, 5])
async def test_as_many_connections_are_opened_as_callers_need_at_once(make_pool, monkeypatch, callers):
    """One connection to spare bridges the resets; apart from it one that is being reset is waited for."""

    async def write(pool):
        for _ in range(50):
            await pool.execute("SELECT set_config('a.b', 'c', false)")

    monkeypatch.setattr(acquire, "_PROMPT", 10.0)  # a busy machine may take longer for a reset than a caller waits
    async with make_pool(max_size=10) as pool:
        await asyncio.gather(*(write(pool) for _ in range(callers)))
        assert pool.stats().opened <= callers + 1
