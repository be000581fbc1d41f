"""`pool.listen()` on a real server that is restarted, frozen, full or gone: nothing is missed without a gap."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import AcquireTimeoutError, ConfigurationError, Gap, GapReason, Notification, ResilientPool

NAME = "listening"
SETTINGS = {"server_settings": {"application_name": NAME}}


@pytest.fixture
async def sender(dsn):
    """A connection that is no pool's."""
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def notify(sender, *payloads, channel="work"):
    for payload in payloads:
        await sender.execute("SELECT pg_notify($1, $2)", channel, str(payload))


async def taken(listener, count):
    """Take that many items; a notification is its payload."""
    items = []
    async with asyncio.timeout(10):
        while len(items) < count:
            item = await anext(listener)
            items.append(item.payload if isinstance(item, Notification) else item)
    return items


async def end_sessions(sender):
    """End every session of the pool's, and wait until none is left."""
    where = "application_name = $1 AND backend_type = 'client backend'"
    await sender.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {where}", NAME)


async def sessions(sender):
    return await sender.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", NAME)


def listening_connection(pool):
    """The connection of the pool's only listener."""
    (subscription,) = pool._listeners.subscriptions
    return subscription._entry.resource.connection


async def test_it_listens_when_the_block_begins(dsn, sender):
    """What is sent right after that is received, with its channel and its sender; several channels, whatever their names."""
    async with ResilientPool(dsn) as pool, pool.listen("work", "Capital", 'quo"te', "work") as listener:
        await notify(sender, "one", "")
        await notify(sender, "two", channel="Capital")
        await notify(sender, "three", channel='quo"te')
        await notify(sender, "other", channel="capital")
        await notify(sender, "last")
        received = [await anext(listener) for _ in range(5)]
        pid = sender.get_server_pid()
        assert received == [
            Notification(channel="work", payload="one", pid=pid),
            Notification(channel="work", payload="", pid=pid),
            Notification(channel="Capital", payload="two", pid=pid),
            Notification(channel='quo"te', payload="three", pid=pid),
            Notification(channel="work", payload="last", pid=pid),
        ]


async def test_a_loop_alone_begins_to_listen_too(dsn, sender):
    """Without a block, when its first item is asked for; leaving the loop closes the connection."""

    async def listening():
        return await sender.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_listening_channels%' "
                                     "AND application_name = $1", NAME)  # fmt: skip

    async with ResilientPool(dsn, **SETTINGS) as pool:

        async def first():
            async for item in pool.listen("work"):
                return item.payload

        running = asyncio.ensure_future(first())
        await eventually(listening)
        await notify(sender, "one")
        assert await running == "one"
        gc.collect()
        await eventually(lambda: _none(sessions(sender)))
        assert not pool._listeners.subscriptions


async def _none(number):
    return not await number


async def test_ten_thousand_notifications_come_in_order(dsn, sender):
    """In one transaction, with payloads; none is missing, and none is a gap."""
    async with ResilientPool(dsn) as pool, pool.listen("work") as listener:
        await sender.execute("SELECT pg_notify('work', n::text) FROM generate_series(0, 9999) AS n")
        assert await taken(listener, 10_000) == [str(number) for number in range(10_000)]


async def test_it_is_beside_the_pools_connections(dsn):
    """It takes none of `max_size`, and the pool's figures do not count it."""
    async with ResilientPool(dsn, max_size=1, deadline=2) as pool, pool.listen("work"), pool.listen("more"):
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
            assert (pool.get_size(), pool.stats().in_use) == (1, 1)


async def test_a_killed_session_is_replaced_behind_a_gap(dsn, proxy, sender):
    """What was sent in between is missing, and the gap says so in its place, with the time that nothing was listened to."""
    async with ResilientPool(proxy.dsn(dsn), **SETTINGS) as pool, pool.listen("work") as listener:
        await notify(sender, "before")
        # A session that is ended has no time for what it has not sent yet.
        assert await taken(listener, 1) == ["before"]
        before = listening_connection(pool)
        proxy.refuse()
        await end_sessions(sender)
        while not before.is_closed():
            await asyncio.sleep(0)
        await notify(sender, "missed")
        proxy.accept()
        (gap,) = await taken(listener, 1)
        assert (gap.reason, gap.missed) == (GapReason.CONNECTION_LOST, None)
        assert 0 < gap.seconds < 10
        await notify(sender, "after")
        assert await taken(listener, 1) == ["after"]
        assert listening_connection(pool) is not before


async def test_a_server_that_is_away_is_waited_for(postgres, proxy, sender):
    """Longer than any deadline: through the circuit breaker, which other callers see too."""
    async with ResilientPool(proxy.dsn(postgres.dsn()), deadline=0.2) as pool, pool.listen("work") as listener:
        proxy.refuse()
        proxy.rst()
        for _ in range(2):
            with pytest.raises((OSError, AcquireTimeoutError)):
                await pool.fetchval("SELECT 1")
        assert pool.stats().circuit_open
        proxy.accept()
        (gap,) = await taken(listener, 1)
        assert gap.reason is GapReason.CONNECTION_LOST
        assert gap.seconds >= 0.4
        await notify(sender, "after")
        assert await taken(listener, 1) == ["after"]


async def test_a_dead_network_is_noticed_in_bounded_time(postgres, proxy, sender):
    """Without a word from either side: the session is asked after `ping_after`, and given `ping_timeout` to answer."""
    async with ResilientPool(proxy.dsn(postgres.dsn()), ping_timeout=1.0) as pool:
        async with pool.listen("work", ping_after=0.2) as listener:
            await asyncio.sleep(0.5)  # a living one is asked, and answers
            assert pool.stats().pings >= 1
            for connection in proxy.connections:
                connection.forget()
            started = asyncio.get_running_loop().time()
            (gap,) = await taken(listener, 1)
            assert gap.reason is GapReason.NO_ANSWER
            assert asyncio.get_running_loop().time() - started < 5
            await notify(sender, "after")
            assert await taken(listener, 1) == ["after"]


async def test_a_session_that_does_not_listen_any_more_is_noticed(dsn, sender):
    """As when something in between resets it, or gives the client another one."""
    # Late enough that no ping is under way when the session is used behind the listener's back.
    async with ResilientPool(dsn) as pool, pool.listen("work", ping_after=1.0) as listener:
        await listening_connection(pool).execute("UNLISTEN *")
        await pool.fetchval("SELECT 1")  # an idle connection, which is listened on at once
        (gap,) = await taken(listener, 1)
        assert gap.reason is GapReason.SESSION_CHANGED
        await notify(sender, "after")
        assert await taken(listener, 1) == ["after"]


async def test_a_slow_application_gets_one_gap_and_blocks_nothing(dsn, sender):
    """The server's queue is read all the time, the memory is bounded, and the number of what was dropped is known."""
    async with ResilientPool(dsn) as pool, pool.listen("work", queue_size=10) as listener:
        payload = "x" * 7000
        for _ in range(20):
            await sender.execute("SELECT pg_notify('work', n || $1) FROM generate_series(1, 100) AS n", payload)
        await eventually(lambda: _dropped(pool, 1990))
        assert await sender.fetchval("SELECT pg_notification_queue_usage()") < 0.01
        items = await taken(listener, 11)
        gap = items.pop()
        assert [item[:-7000] for item in items] == [str(number) for number in range(1, 11)]
        assert (gap.reason, gap.missed) == (GapReason.QUEUE_FULL, 1990)
        await notify(sender, "after")
        assert await taken(listener, 1) == ["after"]


async def _dropped(pool, number):
    (subscription,) = pool._listeners.subscriptions
    overflow = subscription._queue._overflow
    return overflow is not None and overflow.missed == number


async def test_expired_connections_are_replaced(dsn, sender):
    """As the pool's others are: the application may have moved to another server."""
    async with ResilientPool(dsn) as pool, pool.listen("work") as listener:
        await pool.expire_connections()
        assert [gap.reason for gap in await taken(listener, 1)] == [GapReason.EXPIRED]
        await notify(sender, "after")
        assert await taken(listener, 1) == ["after"]


@pytest.mark.parametrize("end", ["close", "terminate"])
async def test_the_loop_ends_with_the_pool(dsn, sender, end):
    """After what has come already; closing waits for no listener."""
    async with asyncio.timeout(10):
        pool = await ResilientPool(dsn, **SETTINGS)
        received = []

        async def read():
            async for item in pool.listen("work"):
                received.append(item.payload)

        reading = asyncio.ensure_future(read())
        while not pool._listeners.subscriptions or not listening(pool):
            await asyncio.sleep(0.005)
        await notify(sender, "one")
        while not received:
            await asyncio.sleep(0.005)
        if end == "close":
            await pool.close()
        else:
            pool.terminate()
        await reading
        assert received == ["one"]
        await eventually(lambda: _none(sessions(sender)))


def listening(pool):
    return all(subscription.has_listened for subscription in pool._listeners.subscriptions)


async def test_what_has_come_is_given_out_after_the_pool_was_closed(dsn, sender):
    """Then the loop ends. A listener that was closed itself gives nothing out any more."""
    pool = await ResilientPool(dsn)
    async with pool.listen("work") as listener, pool.listen("work") as closed:
        (first, second) = pool._listeners.subscriptions
        await notify(sender, "one")
        while not (first._queue and second._queue):
            await asyncio.sleep(0.005)
        await closed.aclose()
        await closed.aclose()
        await pool.close()
        assert [item.payload async for item in listener] == ["one"]
        assert [item async for item in closed] == []
    with pytest.raises(asyncpg.InterfaceError, match="pool is closed"):
        pool.listen("work")


async def test_a_pool_that_closes_while_the_server_is_away_is_not_held_up(postgres, proxy):
    """By a listener that waits for the server."""
    async with asyncio.timeout(10):
        pool = await ResilientPool(proxy.dsn(postgres.dsn()))
        async with pool.listen("work") as listener:
            proxy.refuse()
            proxy.rst()
            reading = asyncio.ensure_future(anext(listener))
            while not pool.stats().circuit_open:
                await asyncio.sleep(0.005)
            await pool.close()
            with pytest.raises(StopAsyncIteration):
                await reading


async def test_a_loop_that_was_left_can_be_gone_on_with(dsn, sender):
    """What came in between is not lost, nor is it when the wait for it is cancelled."""
    async with ResilientPool(dsn) as pool, pool.listen("work") as listener:
        await notify(sender, 1, 2)
        async for item in listener:
            assert item.payload == "1"
            break
        assert await taken(listener, 1) == ["2"]
        waiting = asyncio.ensure_future(anext(listener))
        await asyncio.sleep(0)
        with pytest.raises(asyncpg.InterfaceError, match="one task reads a listener"):
            await anext(listener)
        waiting.cancel()
        await asyncio.wait([waiting])
        await notify(sender, 3)
        assert await taken(listener, 1) == ["3"]


async def test_a_beginning_that_is_cancelled_anywhere_leaves_nothing(dsn, sender):
    """Neither a connection nor a task, and the pool is as it was."""
    async with ResilientPool(dsn, **SETTINGS, max_size=2) as pool:
        tasks = len(asyncio.all_tasks())
        turns, beginning = 0, None
        while beginning is None or beginning.cancelled():
            beginning = asyncio.ensure_future(pool.listen("work", "more").__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            turns += 1 + turns // 8
            beginning.cancel()
            await asyncio.wait([beginning])
        await beginning.result().aclose()
        del beginning
        await eventually(lambda: _none(_listening_sessions(sender)))
        assert not pool._listeners.subscriptions
        while len(asyncio.all_tasks()) > tasks:
            await asyncio.sleep(0.005)
        assert await pool.fetchval("SELECT 1") == 1
        assert pool.get_size() <= 2


async def _listening_sessions(sender):
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND query ~ 'LISTEN|pg_listening_channels'"
    )
    return await sender.fetchval(query, NAME)


async def test_a_first_attempt_has_the_pools_deadline(postgres, proxy):
    """Or its own. The error says what a caller of the pool would see."""
    proxy.refuse()
    pool = ResilientPool(proxy.dsn(postgres.dsn()), deadline=0.3)
    async with pool:
        with pytest.raises(OSError):
            async with pool.listen("work"):
                pass
        with pytest.raises(OSError):
            await anext(pool.listen("work", deadline=0.1))


async def test_what_waiting_does_not_cure_ends_the_loop_with_its_error(dsn, sender):
    """A role that may not log in any more, say; what came before is still given out."""
    await sender.execute("CREATE ROLE listens LOGIN PASSWORD 'secret'")
    try:
        async with (
            ResilientPool(dsn, user="listens", password="secret", **SETTINGS) as pool,
            pool.listen("work") as listener,
        ):
            await notify(sender, "before")

            async def has_come():
                (subscription,) = pool._listeners.subscriptions
                return bool(subscription._queue)

            await eventually(has_come)
            await sender.execute("ALTER ROLE listens NOLOGIN")
            await end_sessions(sender)
            assert await taken(listener, 1) == ["before"]
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await taken(listener, 1)
            assert [item async for item in listener] == []
    finally:
        await sender.execute("DROP ROLE listens")


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((), {}, "needs the name of a channel"),
        (("",), {}, "1 to 63 bytes without NUL, not ''"),
        (("x" * 64,), {}, "1 to 63 bytes"),
        ((5,), {}, "not 5"),
        (("\ud800",), {}, "1 to 63 bytes"),
        (("work",), {"queue_size": 0}, "queue_size must be a number of notifications, a whole number of at least 1"),
        (("work",), {"ping_after": 0}, "ping_after must be a number of seconds, more than 0"),
        (("work",), {"deadline": -1}, "deadline must be a number of seconds or None"),
        (("work",), {"quue_size": 1}, "did you mean 'queue_size'"),
    ],
)
async def test_arguments_out_of_range_are_refused(dsn, channels, options, message):
    """At once, with what would be right."""
    async with ResilientPool(dsn) as pool:
        with pytest.raises(ConfigurationError, match=message):
            pool.listen(*channels, **options)


async def test_a_listener_on_a_database_that_may_pause_is_warned_of(dsn):
    """The warning stands at the caller's line."""
    async with ResilientPool(dsn, may_pause=True) as pool:
        with pytest.warns(UserWarning, match="will not pause: listen") as warned:
            pool.listen("work")
    assert warned[0].filename == __file__


async def test_nothing_is_missed_without_a_gap(postgres, proxy):
    """A ledger: numbers are sent while sessions are killed, the network is cut and frozen, and the server is restarted."""
    received, sent, done = [], [], asyncio.Event()
    through = ResilientPool(proxy.dsn(postgres.dsn()), ping_timeout=0.2, **SETTINGS)
    async with ResilientPool(postgres.dsn()) as direct, through as pool:

        async def send():
            while not done.is_set():
                await direct.execute("SELECT pg_notify('work', $1)", str(len(sent)), exactly_once=True)
                sent.append(len(sent))
                await asyncio.sleep(0.001)

        async def read(listener):
            async for item in listener:
                received.append(item if isinstance(item, Gap) else int(item.payload))

        def gaps():
            return sum(isinstance(item, Gap) for item in received)

        async def read_on(known):
            """Wait for one more gap, and for what is sent after that."""
            await eventually(lambda: gaps() > known, 20)
            number = len(sent)
            await eventually(lambda: not isinstance(received[-1], Gap) and received[-1] >= number, 20)

        async with pool.listen("work", "more", ping_after=0.3) as listener, asyncio.TaskGroup() as group:
            reading = group.create_task(read(listener))
            sending = group.create_task(send())
            faults = [
                proxy.rst,
                proxy.fin,
                lambda: end_sessions(direct),
                forget(proxy),
                pool.expire_connections,
                postgres.restart,
            ]
            for fault in faults:
                await asyncio.sleep(0.05)
                known = gaps()
                trouble = fault()
                if trouble is not None:
                    await trouble
                await read_on(known)
            done.set()
            await sending
            async with asyncio.timeout(10):
                while received[-1] != sent[-1]:
                    await asyncio.sleep(0.005)
            reading.cancel()
    expected, excused = 0, False
    for item in received:
        if isinstance(item, Gap):
            excused = True
        else:
            assert item == expected or (excused and item > expected)
            expected, excused = item + 1, False
    assert len(received) > len(faults) * 2


def forget(proxy):
    def fault():
        for connection in proxy.connections:
            connection.forget()

    return fault


def test_a_pool_that_is_terminated_while_no_loop_runs_ends_its_listeners(dsn):
    """Their connections are cut off, and the one who waits is told when the loop goes on."""
    with asyncio.Runner() as runner:
        pool = ResilientPool(dsn, **SETTINGS)

        async def begin():
            await pool
            listener = await pool.listen("work").__aenter__()
            waiting = asyncio.ensure_future(anext(listener))
            await asyncio.sleep(0)
            return listener, waiting

        async def go_on(waiting):
            async with asyncio.timeout(10):
                await asyncio.wait([waiting])
            bystander = await asyncpg.connect(dsn)
            await eventually(lambda: _none(sessions(bystander)))
            await bystander.close()

        listener, waiting = runner.run(begin())
        pool.terminate()
        runner.run(go_on(waiting))
        assert isinstance(waiting.exception(), StopAsyncIteration)
        del listener


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this operating system does not fork")
async def test_a_forked_process_leaves_the_connection_alone(dsn, sender):
    """It is the parent's, which goes on listening."""
    async with ResilientPool(dsn) as pool, pool.listen("work") as listener:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                del listener
                gc.collect()
            os._exit(0)
        await asyncio.to_thread(os.waitpid, child, 0)
        await notify(sender, "one")
        assert await taken(listener, 1) == ["one"]
