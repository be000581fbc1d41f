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
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


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


@pytest.mark.parametrize("way", ["call", "lease", "first use", "transaction", "rollback", "cursor", "attempt"])
async def test_a_request_to_cancel_that_overtakes_its_statement_is_sent_again(postgres, proxy, way):
    """The server takes no notice of the first one: the statement would run to its end, and cost the pool its connection."""
    asleep = f"SELECT pg_sleep($1) /* {uuid.uuid4().hex} */"
    async with postgres.admin() as admin, ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1) as pool:
        await pool.fetchval(asleep, 0)
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        held, accepted = asyncio.Event(), proxy.accepted

        def hold() -> None:
            proxy.connection(pid).blackhole()
            held.set()

        calling = asyncio.ensure_future(OVERTAKEN[way](pool, asleep, hold))
        await held.wait()
        await asyncio.sleep(0.02)
        if way not in ("first use", "attempt"):
            calling.cancel()
        await eventually(lambda: proxy.accepted > accepted and len(proxy.connections) == 1)
        proxy.connection(pid).restore()
        await eventually(calling.done)
        assert calling.cancelled() or calling.result() == pid
        await eventually(lambda: pool.get_idle_size() == 1)
        assert not await admin.fetchval(RUNNING, asleep)
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


RUNNING = "SELECT count(*) FROM pg_stat_activity WHERE query = $1 AND state = 'active'"


async def overtaken_call(pool, asleep, hold):
    hold()
    await pool.fetchval(asleep, 60)


async def overtaken_on_a_lease(pool, asleep, hold):
    async with pool.acquire() as lease:
        await lease.fetchval(asleep, 0)
        hold()
        with contextlib.suppress(asyncio.CancelledError):
            await lease.fetchval(asleep, 60)
        return await lease.fetchval("SELECT pg_backend_pid()")


async def overtaken_first_use(pool, asleep, hold):
    async with pool.acquire() as lease:
        hold()
        with pytest.raises(TimeoutError):
            await lease.fetchval(asleep, 60, timeout=0.02)
        return await lease.fetchval("SELECT pg_backend_pid()")


async def overtaken_transaction(pool, asleep, hold):
    async with pool.acquire() as lease, lease.transaction():
        await lease.fetchval(asleep, 0)
        hold()
        await lease.fetchval(asleep, 60)


async def overtaken_before_a_rollback(pool, asleep, hold):
    async with pool.acquire() as lease:
        transaction = lease.transaction()
        await transaction.start()
        hold()
        with contextlib.suppress(asyncio.CancelledError):
            await lease.fetchval(asleep, 60)
        await transaction.rollback()
        return await lease.fetchval("SELECT pg_backend_pid()")


async def overtaken_cursor(pool, asleep, hold):
    async with pool.acquire() as lease, lease.transaction():
        statement = await lease.prepare(asleep)
        hold()
        async for _ in statement.cursor(60):
            pass


async def overtaken_attempt(pool, asleep, hold):
    with pytest.raises(TimeoutError):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.fetchval(asleep, 0)
                hold()
                await connection.fetchval(asleep, 60, timeout=0.02)
    return await pool.fetchval("SELECT pg_backend_pid()")


OVERTAKEN = {
    "call": overtaken_call,
    "lease": overtaken_on_a_lease,
    "first use": overtaken_first_use,
    "transaction": overtaken_transaction,
    "rollback": overtaken_before_a_rollback,
    "cursor": overtaken_cursor,
    "attempt": overtaken_attempt,
}

# It goes on until it is cancelled while the lock is free.
STUBBORN = """
    DO $$ BEGIN
        LOOP
            BEGIN
                PERFORM pg_sleep(60);
            EXCEPTION WHEN query_canceled THEN
                EXIT WHEN pg_try_advisory_xact_lock_shared(5701);
            END;
        END LOOP;
    END $$
"""


class Resent:
    """A statement on a lease was cancelled, and the request that was sent again is held back; the statement has ended."""

    def __init__(self, pool, lease, prepared, waiting, late) -> None:
        self.pool, self.lease, self.prepared, self.waiting, self.late = pool, lease, prepared, waiting, late


@pytest.fixture
async def resent(postgres, proxy):
    async with contextlib.AsyncExitStack() as stack:
        late = stack.enter_context(FaultProxy(postgres.host, postgres.port))
        admin = await stack.enter_async_context(postgres.admin())
        pool = await stack.enter_async_context(ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1))
        await admin.execute("SELECT pg_advisory_lock(5701)")
        lease = await pool.acquire()
        pid = await lease.fetchval("SELECT pg_backend_pid()")
        prepared = await lease.prepare(ASLEEP)
        calling = asyncio.ensure_future(lease.execute(STUBBORN))
        await eventually(lambda: admin.fetchval(RUNNING, STUBBORN))
        proxy.retarget(late.host, late.port)
        calling.cancel()
        waiting = asyncio.ensure_future(lease.fetchval("SELECT 1"))
        await eventually(lambda: late.accepted >= 2 and not late.connections)
        late.blackhole()
        await eventually(lambda: any(not held.bytes_to_server for held in late.connections))
        proxy.retarget(postgres.host, postgres.port)
        await admin.execute("SELECT pg_advisory_unlock(5701)")
        await admin.fetchval("SELECT pg_cancel_backend($1)", pid)
        await eventually(lambda: admin.fetchval("SELECT state = 'idle' FROM pg_stat_activity WHERE pid = $1", pid))
        yield Resent(pool, lease, prepared, waiting, late)
        pool.terminate()  # a test that fails leaves the lease


ASLEEP = "SELECT pg_sleep($1), 'after a request that was sent again'"


async def test_a_request_sent_again_for_a_caller_who_was_cancelled_cancels_no_later_statement(resent):
    """It cannot be waited for by what goes to the driver directly, so the connection is closed."""
    resent.waiting.cancel()
    await asyncio.wait([resent.waiting])
    asyncio.get_running_loop().call_later(0.1, resent.late.restore)
    with pytest.raises(asyncpg.InterfaceError, match="closed"):
        await resent.prepared.fetchval(0.3)
    await resent.pool.release(resent.lease)
    assert await resent.pool.fetchval("SELECT 1") == 1


async def test_a_request_sent_again_on_a_lease_that_was_ended_meanwhile_cancels_neither_the_reset_nor_the_next_caller(
    resent, postgres
):
    """The reset waits for it, though the server has confirmed the cancellation already."""
    releasing = asyncio.ensure_future(resent.pool.release(resent.lease))
    following = asyncio.ensure_future(resent.pool.fetchval(ASLEEP, 0.3))
    async with postgres.admin() as admin:
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: admin.fetchval(RUNNING, ASLEEP), 0.3)
    resent.late.restore()
    await following
    await releasing
    assert resent.pool.stats().discarded == {}
    with pytest.raises(asyncpg.InterfaceError, match="released"):
        await resent.waiting


async def test_a_lease_whose_user_is_cancelled_again_while_a_cancellation_is_confirmed_works_on(postgres, proxy):
    """Also with asyncpg before 0.32, which then raises CancelledError to a task that was not cancelled."""
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1) as pool:
        async with pool.acquire() as lease:
            pid = await lease.fetchval("SELECT pg_backend_pid()")
            proxy.delay(0.2)
            for statement in ("SELECT pg_sleep(60)", "SELECT 1", "SELECT 2"):
                calling = asyncio.ensure_future(lease.fetchval(statement))
                await asyncio.sleep(0.03)
                calling.cancel()
                await asyncio.wait([calling])
                assert calling.cancelled()
            proxy.restore()
            assert await lease.fetchval("SELECT pg_backend_pid()") == pid
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


async def test_a_lease_whose_request_to_cancel_is_refused_ends(postgres, proxy):
    """What the statement still does is not known."""
    async with ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1) as pool:
        async with pool.acquire() as lease:
            await lease.fetchval("SELECT 1")
            calling = asyncio.ensure_future(lease.fetchval("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
            proxy.refuse()
            calling.cancel()
            await asyncio.wait([calling])
            for _ in range(2):
                with pytest.raises(asyncpg.InterfaceError, match="closed"):
                    await lease.fetchval("SELECT 1")
            proxy.accept()
        assert await pool.fetchval("SELECT 1") == 1


async def run_out_of_time(lease):
    with pytest.raises(TimeoutError):
        await lease.fetchval("SELECT pg_sleep(60)", timeout=0.05)


async def cancel_preparing(lease):
    await lease.fetchval("SELECT 1")
    preparing = asyncio.ensure_future(lease.prepare("SELECT * FROM locked_for_long"))
    await asyncio.sleep(0.05)
    preparing.cancel()
    await asyncio.wait([preparing])


@pytest.mark.parametrize("leave_unfinished", [run_out_of_time, cancel_preparing])
async def test_a_lease_waits_for_the_end_of_what_was_not_finished_within_the_limit_of_resets(
    postgres, proxy, leave_unfinished
):
    """The driver would wait for ever when no request to cancel gets through."""
    async with contextlib.AsyncExitStack() as stack:
        admin = await stack.enter_async_context(postgres.admin())
        pool = await stack.enter_async_context(
            ResilientPool(proxy.dsn(postgres.dsn()), ssl=False, max_size=1, reset_timeout=0.3)
        )
        await admin.execute("CREATE TABLE locked_for_long (id int)")
        stack.push_async_callback(admin.execute, "DROP TABLE locked_for_long")
        await stack.enter_async_context(admin.transaction())
        await admin.execute("LOCK TABLE locked_for_long")
        async with pool.acquire() as lease, asyncio.timeout(10):
            proxy.hang()
            await leave_unfinished(lease)
            with pytest.raises(asyncpg.InterfaceError, match="closed"):
                await lease.fetchval("SELECT 1")
        proxy.restore()
        assert await pool.fetchval("SELECT 1") == 1
