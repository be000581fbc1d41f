"""What is asked of the server around a migration: the lock under which one runs at a time, and what else happened meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from resilient_pool.clock import Clock
from resilient_pool.errors import ConfigurationError, MigrationLockedError
from resilient_pool.events import MigrationLockLost, MigrationLockWaited
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pool import ResilientPool
from resilient_pool.pooling.context import Dispatcher
from resilient_pool.pooling.driver import numbers_transactions
from resilient_pool.retry.classifier import refuses_question

_POLL_SECONDS = 0.5
_RELEASE_TIMEOUT = 5.0
_MAX_NAME_BYTES = 63

_TRY_LOCK = "SELECT pg_catalog.pg_try_advisory_xact_lock($1)"
_HOLDER = """
    SELECT a.pid, a.application_name
    FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.classid = $1 AND l.objid = $2 AND l.objsubid = 1
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
"""
# For as long as the lock is held. Which of them a server knows depends on its version.
_SETTINGS = {
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_SET_CONFIG = """
    SELECT pg_catalog.set_config(new.name, new.value, true)
    FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS new(name, value)
    WHERE new.name IN (SELECT name FROM pg_catalog.pg_settings)
"""
# Sessions are counted in every database since PostgreSQL 14, each before its first statement can run; the count survives
# a clean restart, and a crash or a fail-over to another server shows in `stats_reset`, as it does in the epoch of a COMMIT.
# A pooler hides sessions, but no write: the ids of transactions are numbered without a gap, for the whole server.
# The connected sessions are read first: a session that ends in between has been counted when its row disappears.
_CONNECTED = "SELECT pg_catalog.array_agg(pid) FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL"
_COUNTED = """
    SELECT (SELECT stats_reset FROM pg_catalog.pg_stat_bgwriter) AS since,
           (SELECT array_agg((datid, stats_reset)::text ORDER BY datid) FROM pg_catalog.pg_stat_database
            WHERE stats_reset IS NOT NULL) AS resets,
           (SELECT sum(sessions)::bigint FROM pg_catalog.pg_stat_database) AS sessions,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.pg_current_xact_id()::text::bigint END AS xid
"""


def lock_key(name: str) -> int:
    """Return the advisory lock's key. PostgreSQL itself keeps the locks of different databases apart."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


class MigrationLock:
    """An advisory lock on a connection of its own.

    It is a lock of a transaction that stays open, not of a session: behind a pooler in transaction mode a session's lock
    would stay behind on a server connection that others get. The transaction has no snapshot, so that it holds back
    neither VACUUM nor CREATE INDEX CONCURRENTLY. The lock is asked for again and again, never waited for inside the
    server: a waiting statement does have a snapshot, CREATE INDEX CONCURRENTLY would wait for that, and the two deadlock.

    When this process dies, the server releases the lock as soon as it sees the connection's end.

    Attributes:
        losses: How often it was lost while it was held.
    """

    def __init__(self, pool: ResilientPool, name: str, clock: Clock, dispatcher: Dispatcher) -> None:
        self._pool = pool
        self._name = name
        self._key = lock_key(name)
        self._clock = clock
        self._dispatcher = dispatcher
        self._connection: ResilientConnection | None = None
        self.losses = 0

    @contextlib.asynccontextmanager
    async def held(self, seconds: float | None) -> AsyncIterator[None]:
        """Hold the lock.

        When its connection is lost meanwhile, an event says so, and the lock is acquired again as soon as possible. The
        migration goes on, since to end it half-way would do more harm.

        Args:
            seconds: How long to wait for it; `None` for ever.

        Raises:
            MigrationLockedError: Another migration held it all that time.
            ConfigurationError: The server has no such lock, or not for our role.
        """
        watch: asyncio.Task[None] | None = None
        try:
            await self._acquire(seconds)
            watch = asyncio.ensure_future(self._watch())
            yield
        finally:
            # Cancelled at whatever point, it gives the connection back: the pool would wait for it when it is closed.
            try:
                if watch is not None:
                    watch.cancel()
                    await asyncio.wait({watch})
            finally:
                connection, self._connection = self._connection, None
                if connection is not None:
                    await self._release(connection)

    async def _acquire(self, seconds: float | None) -> None:
        started = self._clock.monotonic()
        reported: str | None = None
        while True:
            left = None if seconds is None else max(0.001, started + seconds - self._clock.monotonic())
            holder = await self._try(left)
            if holder is None:
                return
            elapsed = self._clock.monotonic() - started
            if seconds is not None and elapsed >= seconds:
                raise MigrationLockedError(self._name, holder, elapsed)
            if holder != reported:
                self._dispatcher.emit(MigrationLockWaited(holder=holder, elapsed=elapsed))
                reported = holder
            await self._clock.sleep(_POLL_SECONDS)

    async def _try(self, seconds: float | None) -> str | None:
        """Try to acquire the lock; return a description of the holder if that fails, else `None`."""
        connection = await self._pool.acquire(timeout=seconds)
        try:
            await connection.execute("BEGIN")
            if not await self._ask_for_lock(connection):
                return await self._holder(connection)
            await self._hold_on(connection)
        except Exception:
            if not connection.is_closed():
                raise
            return "unknown: the connection was lost during the query"
        finally:
            if connection is not self._connection:
                await self._release(connection)
        return None

    async def _ask_for_lock(self, connection: ResilientConnection) -> bool:
        answer = await _ask(connection, _TRY_LOCK, self._key)
        if isinstance(answer, asyncpg.PostgresError):
            raise ConfigurationError(
                f"the server has no advisory lock for this role to take ({answer}), so nothing was run: let only one migration "
                "run at a time yourself, and pass lock=None, or --no-lock"
            ) from answer
        return answer is not None and bool(answer[0])

    async def _hold_on(self, connection: ResilientConnection) -> None:
        name = f"resilient-pool migrate on {socket.gethostname()} (process {os.getpid()})"
        settings = {**_SETTINGS, "application_name": name[:_MAX_NAME_BYTES]}
        await connection.execute("SAVEPOINT settings")
        if isinstance(
            await _ask(connection, _SET_CONFIG, list(settings), list(settings.values())), asyncpg.PostgresError
        ):
            await connection.execute("ROLLBACK TO SAVEPOINT settings")  # the lock is as good without them
        # The driver leaves the portal of its last query open, and that has a snapshot for as long as the transaction
        # lasts; a query by the simple protocol takes its place, and leaves none.
        await connection.execute("SELECT 1")
        self._connection = connection

    async def _holder(self, connection: ResilientConnection) -> str:
        row = await _ask(connection, _HOLDER, *divmod(self._key % 2**64, 2**32))
        if isinstance(row, asyncpg.PostgresError):
            return "a session that the server does not name"
        if row is None:
            return "a session that has just released it"
        return f"{row['application_name'] or 'an application without a name'}, server process {row['pid']}"

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_POLL_SECONDS)
            connection = self._connection
            if connection is not None and connection.is_closed():
                self.losses += 1
                self._connection = None
                self._dispatcher.emit(MigrationLockLost(losses=self.losses))
                await self._release(connection)
            if self._connection is None:
                # The migration goes on without the lock, and reports its own errors.
                with contextlib.suppress(Exception):
                    await self._acquire(None)

    async def _release(self, connection: ResilientConnection) -> None:
        try:
            if not connection.is_closed():
                with contextlib.suppress(Exception):
                    await connection.execute("ROLLBACK", timeout=_RELEASE_TIMEOUT)
        finally:
            await self._pool.release(connection)


async def _ask(
    connection: ResilientConnection, query: str, *arguments: object
) -> asyncpg.Record | asyncpg.PostgresError | None:
    """Return the first row, or the error by which the server refuses the question itself."""
    try:
        return await connection.fetchrow(query, *arguments)
    except asyncpg.PostgresError as error:
        if connection.is_closed() or not refuses_question(error):
            raise
        return error


# What else happened


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerActivity:
    """Counters of a server at one moment.

    Attributes:
        server: An identity that differs for another server, and after a crash or a reset of the statistics.
        connected: The process ids of the sessions that are there.
        sessions: How many sessions there have been.
        xid: A transaction id, taken for this question.
        opened: How many connections our own pool had opened by then.
    """

    server: tuple[object, ...]
    connected: frozenset[int]
    sessions: int
    xid: int
    opened: int


async def read_activity(pool: ResilientPool, deadline: float | None) -> ServerActivity | None:
    """Return the server's counters; `None` if it has none (an older server, a standby) or does not answer."""
    try:
        async with pool.acquire(timeout=deadline) as connection:
            if not numbers_transactions(connection):
                return None  # and its counters are one node's
        connected = await pool.fetchval(_CONNECTED, deadline=deadline)
        counted = await pool.fetchrow(_COUNTED, deadline=deadline)
    except Exception:  # noqa: BLE001 - without an answer there is no evidence; the migration itself does not depend on it
        return None
    if counted is None or counted["sessions"] is None or counted["xid"] is None:
        return None
    return ServerActivity(
        server=(counted["since"], tuple(counted["resets"] or ())),
        connected=frozenset(connected or ()),
        sessions=counted["sessions"],
        xid=counted["xid"],
        opened=pool.stats().opened,
    )


def reason_for_doubt(before: ServerActivity | None, after: ServerActivity | None) -> str | None:
    """Say why something may have happened in between, or `None`: then no one but this process began a session or wrote."""
    if before is None or after is None:
        return "the server could not be asked (that takes PostgreSQL 14 or newer, and no standby)"
    if before.server != after.server:
        return "the server crashed, is another one, or its statistics were reset meanwhile"
    own = after.opened - before.opened
    others = after.sessions - before.sessions - own
    if others:
        return f"the server counted {max(others, 1)} other session(s) meanwhile, which may have been the migration's"
    if len(after.connected - before.connected) > own:
        return "another session is connected that was not there before, and may be the migration's"
    if after.xid - before.xid != 1:
        return "something was written on the server meanwhile, which may have been the migration"
    return None
