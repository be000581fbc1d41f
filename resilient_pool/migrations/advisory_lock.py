"""The advisory lock under which one migration runs at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator

from resilient_pool.clock import Clock
from resilient_pool.errors import MigrationLockedError
from resilient_pool.events import MigrationLockLost, MigrationLockWaited
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.observability.dispatcher import Dispatcher
from resilient_pool.pool import ResilientPool

_POLL = 0.5
_TO_RELEASE = 5.0
_LONGEST_NAME = 63

_TRY = "SELECT pg_catalog.pg_try_advisory_xact_lock($1)"
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
_SET = """
    SELECT pg_catalog.set_config(new.name, new.value, true)
    FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS new(name, value)
    WHERE new.name IN (SELECT name FROM pg_catalog.pg_settings)
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

    Args:
        pool: Lends the connection.
        name: What the lock is called; the same for everybody who must not run together.
        clock: Waits.
        dispatcher: Who is told whom it waits for, and that it was lost.

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

        Should its connection be lost meanwhile, that is told, and the lock is taken again as soon as it can be; what runs
        under it goes on, since to end a migration half-way would do more harm.

        Args:
            seconds: How long to wait for it; `None` for ever.

        Raises:
            MigrationLockedError: Another migration held it all that time.
        """
        watch: asyncio.Task[None] | None = None
        try:
            await self._take(seconds)
            watch = asyncio.ensure_future(self._watch())
            yield
        finally:
            if watch is not None:
                watch.cancel()
                await asyncio.wait({watch})
            await self._release()

    async def _take(self, seconds: float | None) -> None:
        started = self._clock.monotonic()
        told: str | None = None
        while True:
            left = None if seconds is None else max(0.001, started + seconds - self._clock.monotonic())
            holder = await self._try(left)
            if holder is None:
                return
            elapsed = self._clock.monotonic() - started
            if seconds is not None and elapsed >= seconds:
                raise MigrationLockedError(self._name, holder, elapsed)
            if holder != told:
                self._dispatcher.emit(MigrationLockWaited(holder=holder, elapsed=elapsed))
                told = holder
            await self._clock.sleep(_POLL)

    async def _try(self, seconds: float | None) -> str | None:
        """Try to take the lock; return who has it instead."""
        connection = await self._pool.acquire(timeout=seconds)
        taken = False
        try:
            await connection.execute("BEGIN")
            if await connection.fetchval(_TRY, self._key):
                await self._settle_in(connection)
                taken = True
                return None
            return await self._holder(connection)
        except Exception:
            if not connection.is_closed():
                raise
            return "nobody, as far as is known: the connection was lost while asking"
        finally:
            if not taken:
                await self._give_back(connection)

    async def _settle_in(self, connection: ResilientConnection) -> None:
        name = f"resilient-pool migrate on {socket.gethostname()} (process {os.getpid()})"
        settings = {**_SETTINGS, "application_name": name[:_LONGEST_NAME]}
        await connection.fetch(_SET, list(settings), list(settings.values()))
        # The driver leaves the portal of its last query open, and that has a snapshot for as long as the transaction
        # lasts; a query by the simple protocol takes its place, and leaves none.
        await connection.execute("SELECT 1")
        self._connection = connection

    async def _holder(self, connection: ResilientConnection) -> str:
        row = await connection.fetchrow(_HOLDER, *divmod(self._key % 2**64, 2**32))
        if row is None:
            return "a session that has just released it"
        return f"{row['application_name'] or 'an application without a name'}, server process {row['pid']}"

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(_POLL)
            connection = self._connection
            if connection is not None and connection.is_closed():
                self.losses += 1
                self._connection = None
                self._dispatcher.emit(MigrationLockLost(losses=self.losses))
                await self._give_back(connection)
                await self._take_again()

    async def _take_again(self) -> None:
        while self._connection is None:
            try:
                await self._take(None)
            except Exception:  # noqa: BLE001 - the migration goes on without the lock, and tells its own trouble
                await self._clock.sleep(_POLL)

    async def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._give_back(connection)

    async def _give_back(self, connection: ResilientConnection) -> None:
        if not connection.is_closed():
            with contextlib.suppress(Exception):
                await connection.execute("ROLLBACK", timeout=_TO_RELEASE)
        await self._pool.release(connection)
