"""Proxies that make the handshake in the server's place: those that keep a session for each client, and those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Self

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.events import PoolerDetected


class Proxy:
    """Speaks for PostgreSQL with a process id of its own, and counts the round trips of its clients.

    Args:
        host: Where the server is.
        port: Likewise.
        sessions: How many server sessions it shares among all clients, one transaction at a time; 0 for one each.
        room: How many clients it has room for.
        sticky: Whether a client keeps the session that it has been given.
    """

    def __init__(self, host: str, port: int, *, sessions: int = 0, room: int = 100, sticky: bool = False) -> None:
        self._target = (host, port)
        self._shares = sessions
        self._room = room
        self._sticky = sticky
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._opened = 0
        self._freed = asyncio.Condition()
        self._greeting = b""
        self.clients = 0
        self.requests = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, writer in self._idle:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._session(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        startup = await self._packet(reader)
        self.clients += 1
        number = self.clients
        if number > self._room:
            return
        server = await self._take(startup)
        try:
            greeting = self._greeting
            at = greeting.index(b"K\x00\x00\x00\x0c") + 5
            writer.write(greeting[:at] + struct.pack("!I", 900_000 + number) + greeting[at + 4 :])
            if self._shares and not self._sticky:
                server = await self._give_back(server)
            while True:
                request = await self._request(reader)
                self.requests += 1
                server = server or await self._take(startup)
                server[1].write(request)
                last = await self._answer(server[0], writer, flushed=request[-5:] == b"H\x00\x00\x00\x04")
                if self._shares and not self._sticky and last == b"Z\x00\x00\x00\x05I":
                    server = await self._give_back(server)
        finally:
            if server is not None:
                server[1].close()

    async def _take(self, startup: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with self._freed:
            await self._freed.wait_for(lambda: self._idle or not self._shares or self._opened < self._shares)
            if self._idle:
                return self._idle.pop()
            self._opened += 1
        server = await asyncio.open_connection(*self._target)
        server[1].write(startup)
        ready = False
        try:
            self._greeting = await self._until_ready(server[0])
            ready = True
        finally:
            if not ready:
                server[1].close()
        return server

    async def _give_back(self, server: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        async with self._freed:
            self._idle.append(server)
            self._freed.notify()

    @staticmethod
    async def _packet(reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(4)
        return head + await reader.readexactly(struct.unpack("!I", head)[0] - 4)

    async def _message(self, reader: asyncio.StreamReader) -> bytes:
        return await reader.readexactly(1) + await self._packet(reader)

    async def _request(self, reader: asyncio.StreamReader) -> bytes:
        """Read up to where the client waits for an answer: Query, Sync or Flush."""
        held = b""
        while True:
            message = await self._message(reader)
            held += message
            if message[:1] in b"QSH":
                return held
            if message[:1] == b"X":
                raise ConnectionError

    async def _until_ready(self, reader: asyncio.StreamReader) -> bytes:
        held, message = b"", b""
        while message[:1] != b"Z":
            message = await self._message(reader)
            held += message
        return held

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, flushed: bool) -> bytes:
        """Pass the answer on, and return its last message: ReadyForQuery, or what ends the description of a statement."""
        message = b""
        while message[:1] not in (b"Z", *((b"n", b"T", b"E") if flushed else ())):
            message = await self._message(reader)
            writer.write(message)
        return message


@contextlib.asynccontextmanager
async def pool_through(postgres, *, sessions=0, **arguments):
    events = []
    async with Proxy(postgres.host, postgres.port, sessions=sessions) as proxy:
        where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres", "ssl": False}
        async with ResilientPool(**where, **arguments, observers=[events.append]) as pool:
            yield proxy, pool, events


def poolers(events):
    return [event for event in events if isinstance(event, PoolerDetected)]


async def test_a_proxy_that_keeps_a_session_for_each_client_costs_one_round_trip_a_query(postgres):
    """As Neon's direct endpoint: statements stay prepared, and there is no warning of a pooler."""
    async with pool_through(postgres) as (proxy, pool, events):
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT $1::int", 1)
            before = proxy.requests
            for _ in range(20):
                await connection.fetchval("SELECT $1::int", 1)
            assert proxy.requests - before == 20
        assert poolers(events) == []
        assert pool.stats().pooler is False


@pytest.mark.parametrize("sessions", [1, 2, 5])
async def test_a_pooler_in_transaction_mode_is_recognised(postgres, sessions, caplog):
    """Also one that had no server session before: the second client is given the first one's. The log says what to do."""
    async with pool_through(postgres, sessions=sessions) as (_, pool, events):
        assert await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(20))) == list(range(20))
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements") == 0
        assert len(poolers(events)) == 1
        assert pool.stats().pooler is True
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "resilient_pool"]
    assert "another client was given the same session" in warning
    assert "pass statement_cache_size=100" in warning


async def test_a_pooler_that_is_busy_is_recognised_too(postgres):
    """Its sessions began before the client that is given one."""
    async with Proxy(postgres.host, postgres.port, sessions=4) as proxy:
        where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres", "ssl": False}
        others = [await asyncpg.connect(**where, statement_cache_size=0) for _ in range(3)]
        held = [other.transaction() for other in others]
        for transaction in held:
            await transaction.start()
        await held[0].rollback()
        await held[1].rollback()
        async with ResilientPool(**where) as pool:
            await pool.fetchval("SELECT 1")
            assert pool.stats().pooler is True
        for other in others:
            other.terminate()


async def test_a_proxy_without_room_for_a_second_client_is_taken_for_a_pooler(postgres):
    """What cannot be found out is no reason to trust it; an explicit size is."""
    for arguments, requests in (({}, 2), ({"statement_cache_size": 100}, 1)):
        async with Proxy(postgres.host, postgres.port, room=1) as proxy:
            where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres", "ssl": False}
            async with ResilientPool(**where, **arguments, max_size=1) as pool:
                async with pool.acquire() as connection:
                    await connection.fetchval("SELECT $1::int", 1)
                    before = proxy.requests
                    await connection.fetchval("SELECT $1::int", 1)
                    assert proxy.requests - before == requests
                assert pool.stats().pooler is True


async def test_a_proxy_that_begins_to_share_sessions_is_a_pooler_from_then_on(postgres):
    """A prepared statement that is not there is an error before anything runs: it is run again, and no other is prepared."""
    async with pool_through(postgres, max_size=2) as (proxy, pool, events):
        async with pool.acquire() as first, pool.acquire() as second:
            for connection in (first, second):
                await connection.fetchval("SELECT $1::int", 1)
        assert pool.stats().pooler is False
        proxy._shares = 3
        for _ in range(5):
            assert await asyncio.gather(*(pool.fetchval("SELECT $1::int", n) for n in range(4))) == list(range(4))
        assert pool.stats().pooler is True
        assert len(poolers(events)) == 1


async def test_a_second_client_that_has_to_wait_for_the_first_costs_two_seconds_and_no_connection(postgres):
    """As behind a pooler in session mode that has one session left."""
    async with Proxy(postgres.host, postgres.port, sessions=1, sticky=True) as proxy:
        where = {"host": "127.0.0.1", "port": proxy.port, "user": "postgres", "database": "postgres", "ssl": False}
        async with asyncio.timeout(10), ResilientPool(**where, max_size=1) as pool:
            assert await pool.fetchval("SELECT 42") == 42
            assert pool.stats().pooler is True


async def test_no_statement_of_another_process_goes_by_the_same_name(postgres):
    """Behind a pooler its statement would run instead: the names of each pool begin with a number drawn by lot."""
    names = set()
    for _ in range(2):
        async with ResilientPool(postgres.dsn()) as pool, pool.acquire() as connection:
            await connection.fetch("SELECT 42")
            names.add(
                await connection.fetchval("SELECT max(name) FROM pg_prepared_statements WHERE statement LIKE '%42'")
            )
    assert len(names) == 2
    assert all(len(name) > len("__asyncpg_stmt_ff__") + 6 for name in names)


@pytest.mark.parametrize("arguments", [{}, {"statement_cache_size": 100}])
async def test_listening_through_a_pooler_that_shares_sessions_is_refused(postgres, arguments):
    """LISTEN would be another client's as soon as its transaction ends: the error says so, and the pool goes on."""
    async with pool_through(postgres, sessions=2, **arguments) as (_, pool, _):
        with pytest.raises(asyncpg.InterfaceError, match="LISTEN was not sent: a pooler in transaction mode"):
            async with pool.listen("work"):
                pass
        assert await pool.fetchval("SELECT 1") == 1
        with pytest.raises(asyncpg.InterfaceError, match="with a pool of its own"):
            await anext(pool.listen("work"))


@pytest.mark.parametrize("arguments", [{}, {"statement_cache_size": 100}])
async def test_listening_through_a_proxy_that_keeps_a_session_for_each_client_works(postgres, arguments):
    """Also where the application's own statement_cache_size says that there is a pooler."""
    # This proxy passes on what the server says unasked with the next answer.
    async with pool_through(postgres, **arguments) as (_, pool, _), pool.listen("work", ping_after=0.1) as listener:
        await pool.execute("NOTIFY work, 'one'")
        async with asyncio.timeout(10):
            assert (await anext(listener)).payload == "one"
