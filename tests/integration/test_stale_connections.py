"""A connection that died while the process was frozen is never handed to the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import asyncpg
import pytest
import uvloop

from resilient_pool import ResilientPool
from resilient_pool.events import DiscardReason
from resilient_pool.testing import EmbeddedPostgres, FaultProxy, TlsCertificates

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
CERTIFICATES = TlsCertificates()

Kill = Callable[[EmbeddedPostgres, FaultProxy], object]


def time_out(_server: EmbeddedPostgres, _proxy: FaultProxy) -> None:
    """Leave it to the server's idle_session_timeout."""


def terminate(server: EmbeddedPostgres, _proxy: FaultProxy) -> None:
    asyncio.run(server.terminate_backends())


def close(_server: EmbeddedPostgres, proxy: FaultProxy) -> None:
    proxy.fin()


def reset(_server: EmbeddedPostgres, proxy: FaultProxy) -> None:
    proxy.rst()


def forget(_server: EmbeddedPostgres, proxy: FaultProxy) -> None:
    proxy.forget()


def run(loop: str, main: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


def freeze(seconds: float) -> None:
    """Stand still as a paused process does: the event loop does not run."""
    time.sleep(seconds)


def in_a_thread(work: Callable[[], object]) -> None:
    """Do something outside while this process is frozen: another event loop must not run in this thread."""
    import threading

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("kill", [time_out, terminate, close, reset, forget], ids=lambda kill: kill.__name__)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_first_fetch_and_the_first_insert_after_a_freeze_succeed(
    postgres: EmbeddedPostgres, loop: str, tls: bool, kill: Kill
) -> None:
    """Whatever ended the sessions meanwhile, the application notices nothing, and the row is there once."""

    async def main() -> None:
        with FaultProxy(postgres.host, postgres.port, tls=CERTIFICATES if tls else None) as proxy:
            arguments = {
                "host": proxy.host,
                "port": proxy.port,
                "user": "postgres",
                "database": "postgres",
                "ssl": CERTIFICATES.client_context() if tls else False,
                "server_settings": {"idle_session_timeout": "250ms"} if kill is time_out else {},
            }
            async with ResilientPool(**arguments) as reader, ResilientPool(**arguments) as writer:
                await writer.execute("CREATE TABLE IF NOT EXISTS frozen (id int)")
                await writer.execute("TRUNCATE frozen")
                await reader.fetch("SELECT 1")
                while writer.stats().resetting or reader.stats().resetting:
                    await asyncio.sleep(0)
                in_a_thread(lambda: kill(postgres, proxy))
                freeze(1.1 if kill is forget else 0.6)
                while kill is not forget and proxy.connections:  # what happened behind it has not reached this side yet
                    freeze(0.01)
                assert await reader.fetchval("SELECT 41 + 1") == 42
                assert await writer.execute("INSERT INTO frozen VALUES ($1)", 7) == "INSERT 0 1"
                assert await reader.fetchval("SELECT count(*) FROM frozen") == 1
                for stats in (reader.stats(), writer.stats()):
                    # Where it knows the server's patience, the pool has closed the connection before.
                    closed = stats.discarded.get(DiscardReason.IDLE, 0) if kill is time_out else 0
                    assert stats.stale_found + stats.pings_failed + closed >= 1

    run(loop, main)


async def test_a_freeze_while_a_connection_is_opened_costs_another_one(postgres: EmbeddedPostgres) -> None:
    """The server has ended the new session for idling when the process goes on: no caller sees it."""
    opened = []

    async def connect(*arguments: object, **options: object) -> asyncpg.Connection:
        opened.append(await asyncpg.connect(*arguments, **options))
        if len(opened) == 1:
            in_a_thread(lambda: asyncio.run(_end_of(opened[0].get_server_pid(), postgres.dsn())))
        return opened[-1]

    settings = {"idle_session_timeout": "250ms"}
    async with ResilientPool(postgres.dsn(), connect=connect, server_settings=settings) as pool:
        assert await pool.fetchval("SELECT 1") == 1
    assert len(opened) >= 2


async def _end_of(pid: int, dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    async with asyncio.timeout(20):
        while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
            await asyncio.sleep(0.01)
    await connection.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_notification_that_waits_in_the_socket_is_not_taken_for_a_loss(postgres: EmbeddedPostgres, loop: str) -> None:
    """Something to read is no reason to close a healthy connection."""

    async def main() -> None:
        async with ResilientPool(postgres.dsn(), session_reset="off") as pool:
            await pool.execute("LISTEN news")
            pid = await pool.fetchval("SELECT pg_backend_pid()")
            notify = asyncio.create_task(asyncio.to_thread(asyncio.run, _notify(postgres.dsn())))
            await notify
            freeze(0.05)
            assert await pool.fetchval("SELECT pg_backend_pid()") == pid

    run(loop, main)


async def _notify(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("NOTIFY news, 'hello'")
    await connection.close()


async def test_one_unanswered_ping_condemns_every_connection_idle_as_long(postgres: EmbeddedPostgres) -> None:
    """Four silent connections cost one ping's time limit, not four."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        dsn = f"postgresql://postgres@{proxy.host}:{proxy.port}/postgres"
        async with ResilientPool(dsn, ping_after=0.05, ping_timeout=1.0) as pool:
            leases = [await pool.acquire() for _ in range(4)]
            for lease in leases:
                await pool.release(lease)
            while pool.get_idle_size() < 4:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            proxy.forget()
            started = time.monotonic()
            assert await asyncio.gather(*(pool.fetchval("SELECT 1") for _ in range(4))) == [1] * 4
            assert time.monotonic() - started < 3.0
            assert pool.stats().pings_failed <= 4


async def test_a_connection_used_a_moment_ago_is_not_pinged(postgres: EmbeddedPostgres) -> None:
    """Within `ping_after` the socket alone is asked, which costs no round trip."""
    async with ResilientPool(postgres.dsn()) as pool:
        for _ in range(20):
            await pool.fetchval("SELECT 1")
        assert pool.stats().pings == 0
        assert pool.stats().opened == 1
