"""Whatever is cancelled, at whichever of its awaits: no place is lost, no session is left, and the pool works on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import uuid

import asyncpg
import pytest
from cut import Cut
from waiting import eventually

from resilient_pool import BackoffPolicy, OutcomeUnknownError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres


async def write(pool: ResilientPool) -> None:
    await pool.execute("SELECT set_config('application.kept', 'yes', false)")


async def read(pool: ResilientPool) -> None:
    await pool.fetch("SELECT 1")


async def lease(pool: ResilientPool) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT set_config('application.kept', 'yes', false)")


async def wait(pool: ResilientPool) -> None:
    holder = await pool.acquire()
    asyncio.get_running_loop().call_later(0.02, lambda: pool._leases.release(holder))
    await pool.fetch("SELECT 1")


async def replace(pool: ResilientPool) -> None:
    async with pool.acquire() as connection:
        connection._driver.terminate()
        await connection.fetch("SELECT 1")


async def be_refused(pool: ResilientPool) -> None:
    with contextlib.suppress(asyncpg.ReadOnlySQLTransactionError):
        await pool.execute("BEGIN READ ONLY; CREATE TABLE never (id int)")


async def be_refused_on_a_lease(pool: ResilientPool) -> None:
    async with pool.acquire() as connection:
        with contextlib.suppress(asyncpg.ReadOnlySQLTransactionError):
            await connection.execute("BEGIN READ ONLY; CREATE TABLE never (id int)")


async def lose(pool: ResilientPool) -> None:
    with contextlib.suppress(OutcomeUnknownError):
        await pool.execute("SELECT pg_terminate_backend(pg_backend_pid())")


async def lose_and_repeat(pool: ResilientPool) -> None:
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError):
        await pool.execute("SELECT pg_terminate_backend(pg_backend_pid())", idempotent=True)


async def prepare_session(connection) -> None:
    await connection.execute("SET search_path TO public")


WAYS = {
    "cold": (write, {}, True),
    "warm": (write, {}, False),
    "read": (read, {}, False),
    "ping": (read, {"ping_after": 0.0}, False),
    "setup": (write, {"setup": prepare_session}, False),
    "lease with setup": (lease, {"setup": prepare_session}, False),
    "init": (read, {"init": prepare_session}, True),
    "on_release": (write, {"session_reset": "on_release"}, False),
    "lease": (lease, {}, False),
    "lease on_release": (lease, {"session_reset": "on_release"}, False),
    "wait": (wait, {}, False),
    "refused": (be_refused, {}, False),
    "refused on a lease": (be_refused_on_a_lease, {}, False),
    "lost": (lose, {}, False),
    "lost and repeated": (lose_and_repeat, {"backoff": BackoffPolicy(base=0.001, max_attempts=2)}, False),
    "replace": (replace, {"setup": prepare_session}, False),
    "minimum": (replace, {"min_size": 1}, False),
}


@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_cancellation_at_any_await_leaves_a_pool_of_one_whole(postgres: EmbeddedPostgres, way, late):
    """Every await is tried in turn, until the work ends before it is cancelled."""
    work, arguments, cold = WAYS[way]
    name = f"cut_{uuid.uuid4().hex}"
    settings = {"application_name": name}
    async with postgres.admin() as admin:
        async with ResilientPool(
            postgres.dsn(), max_size=1, deadline=5.0, server_settings=settings, **arguments
        ) as pool:
            for at in range(100):
                if not await cut_once(pool, work, at=at, late=late, cold=cold):
                    break
                await check(pool, admin, name)
            assert at > 0, "nothing was awaited"
        await sessions_come_down_to(0, admin, name)


async def cut_once(pool: ResilientPool, work, *, at: int, late: bool, cold: bool) -> bool:
    if cold:
        await pool.expire_connections()
        pool._connector.server_info = None
    else:
        await pool.fetch("SELECT 1")
    cut = Cut(work(pool), at=at, late=late)

    async def main() -> None:
        await cut

    (ended,) = await asyncio.gather(asyncio.create_task(main()), return_exceptions=True)
    assert ended is None or isinstance(ended, asyncio.CancelledError)
    return cut.happened


async def check(pool: ResilientPool, admin, name: str) -> None:
    async with asyncio.timeout(5):
        assert await pool.fetchval("SELECT coalesce(current_setting('application.kept', true), '')") == ""
        while pool.stats().in_use or pool.stats().resetting:
            await asyncio.sleep(0)
    slots = pool._resources
    assert (slots.size, len(pool._maintenance.connections()), slots.idle, slots.waiting) == (1, 1, 1, 0)
    await sessions_come_down_to(1, admin, name)


async def sessions_come_down_to(number: int, admin, name: str) -> None:
    async with asyncio.timeout(5):
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name) > number:
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
async def test_closing_cancelled_at_any_await_leaves_no_session(postgres: EmbeddedPostgres, late):
    """What is not closed in order is hung up, and no task is left behind."""
    name = f"cut_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        for at in range(100):
            pool = await ResilientPool(postgres.dsn(), server_settings={"application_name": name})
            await asyncio.gather(*(pool.execute("SELECT pg_sleep(0.01)") for _ in range(3)))
            if not await cut_once_closing(pool, at=at, late=late):
                break
            await sessions_come_down_to(0, admin, name)
            assert pool.is_closing()
        assert at > 0


async def cut_once_closing(pool: ResilientPool, *, at: int, late: bool) -> bool:
    cut = Cut(pool.close(), at=at, late=late)

    async def main() -> None:
        await cut

    before = asyncio.all_tasks()
    (ended,) = await asyncio.gather(asyncio.create_task(main()), return_exceptions=True)
    assert ended is None or isinstance(ended, asyncio.CancelledError)
    async with asyncio.timeout(5):
        while not asyncio.all_tasks() <= before:
            await asyncio.sleep(0)
    return cut.happened


@pytest.mark.parametrize("late", [False, True])
async def test_a_connect_that_is_cancelled_leaves_no_exception_that_was_never_retrieved(postgres, late):
    """At each of its awaits, also before the server has answered the request for TLS."""
    complaints = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
    async with ResilientPool(postgres.dsn()) as pool:
        for at in range(100):
            cut = Cut(pool._connector.open(None), at=at, late=late)
            opening = asyncio.ensure_future(wait_for(cut))
            await asyncio.wait([opening])
            if not opening.cancelled():
                opening.result().terminate()
            await asyncio.sleep(0)  # what was closed is told of its end
            await asyncio.sleep(0)
            gc.collect()
            assert complaints == [], at
            if not cut.happened:
                break
    assert at > 3


async def wait_for(work):
    return await work


@pytest.mark.parametrize("leased", [False, True], ids=["call", "lease"])
async def test_a_request_to_cancel_that_overtakes_its_statement_is_sent_again(postgres, proxy, leased):
    """The server takes no notice of the first one: the statement would run to its end, and cost the pool its connection."""
    asleep = f"SELECT pg_sleep($1) /* {uuid.uuid4().hex} */"
    running = "SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND state = 'active'"
    async with postgres.admin() as admin, ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1) as pool:
        async with pool.acquire() as lease:
            pid = lease.get_server_pid()
            await lease.fetchval(asleep, 0)
            proxy.connection(pid).delay(0.2)
            if not leased:
                await pool.release(lease)
            calling = asyncio.ensure_future((lease if leased else pool).fetchval(asleep, 60))
            await asyncio.sleep(0.02)
            calling.cancel()
            await eventually(lambda: admin.fetchval(running, asleep))
            proxy.connection(pid).restore()
            if leased:
                assert await lease.fetchval("SELECT pg_backend_pid()") == pid
            await eventually(lambda: pool.get_idle_size() == (not leased))
            assert not await admin.fetchval(running, asleep)
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid
