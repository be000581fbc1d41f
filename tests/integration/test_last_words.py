"""A server's last word that arrives while a connection is idle, long before the connection's end: a FATAL, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres


def last_word(sqlstate: str, message: str, severity: str = "FATAL") -> bytes:
    body = f"S{severity}\0V{severity}\0C{sqlstate}\0M{message}\0\0".encode()
    return b"E" + struct.pack("!I", len(body) + 4) + body


READY = b"Z" + struct.pack("!I", 5) + b"I"
GOODBYE = last_word("57P01", "terminating connection due to administrator command")


class Relay:
    """Passes bytes on, and may say something in the server's place."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._target = (postgres.host, postgres.port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits = 0
        self.instead_of_commit: bytes | None = None

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        self._writers.append(writer)
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        try:
            await asyncio.gather(
                self._pump(reader, up_writer, self._asked), self._pump(up_reader, writer, self._answered)
            )
        finally:
            up_writer.close()
            writer.close()

    @staticmethod
    async def _pump(reader, writer, see):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(see(data))
        writer.close()

    def _asked(self, data: bytes) -> bytes:
        self._commits += data.startswith(b"Q") and b"COMMIT" in data
        return data

    def _answered(self, data: bytes) -> bytes:
        if not self._commits:
            return data
        self._commits = 0
        words, self.instead_of_commit = self.instead_of_commit, None
        return data if words is None else words

    def say(self, words: bytes) -> None:
        """Send something to every client that is connected now, and leave the connections as they are."""
        for writer in self._writers:
            writer.write(words)
        self._writers.clear()


@pytest.fixture
async def relay(postgres: EmbeddedPostgres):
    async with Relay(postgres) as relay:
        yield relay


@pytest.fixture
async def pool(relay: Relay):
    async with ResilientPool(
        host="127.0.0.1", port=relay.port, user="postgres", database="postgres", ssl=False, deadline=10.0
    ) as pool:
        yield pool


async def idle_connections(pool, number):
    """Open that many, and wait until all are idle."""
    leases = [await pool.acquire() for _ in range(number)]
    for lease in leases:
        await lease.fetchval("SELECT 1")
        await pool.release(lease)
    async with asyncio.timeout(10):
        while pool.get_idle_size() < number:
            await asyncio.sleep(0.01)


async def hears(relay, words):
    """The driver reads the words while nothing is asked."""
    relay.say(words)
    await asyncio.sleep(0.05)


async def twice_on_one_connection(connection, table):
    await connection.execute(f"INSERT INTO {table} VALUES (1)")


WRITES = {
    "a simple query": lambda pool, table: pool.execute(f"INSERT INTO {table} VALUES (1)"),
    "with arguments": lambda pool, table: pool.execute(f"INSERT INTO {table} VALUES ($1)", 1),
    "many": lambda pool, table: pool.executemany(f"INSERT INTO {table} VALUES ($1)", [(1,)]),
    "a copy": lambda pool, table: pool.copy_records_to_table(table, records=[(1,)]),
    "a transaction": lambda pool, table: pool.run_in_transaction(twice_on_one_connection, table),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("connections", [1, 8])
async def test_a_write_that_the_driver_refuses_to_send_is_made_on_another_connection(
    pool, relay, table, write, connections
):
    """Nothing of it was sent, so it is not unknown, however many connections were told goodbye."""
    await idle_connections(pool, connections)
    await hears(relay, GOODBYE)
    async with asyncio.timeout(10):
        await write(pool, table)
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_a_transaction_whose_commit_the_driver_refuses_to_send_is_repeated(pool, relay, table):
    """The goodbye came between the last statement and COMMIT: the server has rolled back."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        await connection.execute(f"INSERT INTO {table} VALUES (1)")
        if attempts == 1:
            await hears(relay, GOODBYE)

    async with asyncio.timeout(10):
        await pool.run_in_transaction(work)
    assert attempts == 2
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_a_refused_reset_says_nothing_about_the_statement_before_it(relay, table):
    """The INSERT had its answer; that the session could not be reset afterwards does not bring it back."""

    class Committed(asyncpg.Connection):
        async def execute(self, query, *args, timeout=None):
            result = await super().execute(query, *args, timeout=timeout)
            if query.startswith("INSERT"):
                await hears(relay, GOODBYE)
            return result

    async with ResilientPool(
        host="127.0.0.1",
        port=relay.port,
        user="postgres",
        database="postgres",
        ssl=False,
        connection_class=Committed,
        session_reset="on_release",
    ) as pool:
        await pool.execute(f"INSERT INTO {table} VALUES (1)")
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


NO_ANSWERS = {
    "PgCat, which goes on": last_word("58000", "error receiving data from server") + READY,
    "CockroachDB": last_word("XXA00", "transaction committed but schema change aborted with error: (23505)", "ERROR")
    + READY,
    "YugabyteDB": last_word("XX000", "Timed out: Perform RPC (request call id 1)", "ERROR") + READY,
    "a server that shuts down": last_word("57P01", "server is shutting down", "ERROR") + READY,
}


@pytest.mark.parametrize("words", NO_ANSWERS.values(), ids=NO_ANSWERS)
async def test_a_pooler_that_cannot_tell_what_became_of_a_commit_has_not_refused_it(pool, relay, table, words):
    """The server has committed: it is asked, and the block is not run again."""
    attempts = 0

    async def work(connection):
        nonlocal attempts
        attempts += 1
        await connection.execute(f"INSERT INTO {table} VALUES (1)")
        relay.instead_of_commit = words

    async with asyncio.timeout(10):
        await pool.run_in_transaction(work)
    assert attempts == 1
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1
