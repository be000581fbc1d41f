"""The package `databases` over resilient_pool: this module's `Database` in the place of its own.

    from resilient_pool.contrib.databases import Database

    database = Database("postgresql://localhost/app", max_size=10, deadline=30)

Needs the extra `databases`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import databases
from databases.backends.postgres import PostgresBackend, PostgresConnection
from databases.core import Connection, Transaction

from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pool import ResilientPool, create_pool

# How long disconnecting waits for connections that are in use.
_CLOSE_LIMIT = 10.0


class ResilientBackend(PostgresBackend):
    """The backend for asyncpg, with a `ResilientPool`."""

    _pool: Any

    async def connect(self) -> None:
        """Open the pool."""
        if self._pool is not None:
            await super().connect()  # it says what is wrong
        url = self._database_url
        where = {
            "host": url.hostname,
            "port": url.port,
            "user": url.username,
            "password": url.password,
            "database": url.database,
        }
        self._pool = await create_pool(**{**where, **self._get_connection_kwargs()})

    async def disconnect(self) -> None:
        """Close the pool; what is still in use 10 s later is cut off."""
        pool, self._pool = self._pool, None
        if pool is None:
            await super().disconnect()  # it says what is wrong
        else:
            await pool.close(timeout=_CLOSE_LIMIT)


class _Transaction(Transaction):
    """The package's transaction, which gives its connection back also when it cannot begin or end.

    Otherwise the task that it ran in would be left with a lost connection for good.
    """

    async def start(self) -> Transaction:
        async with self._giving_back(0):
            return await super().start()

    async def commit(self) -> None:
        async with self._giving_back(1):
            await super().commit()

    async def rollback(self) -> None:
        async with self._giving_back(1):
            await super().rollback()

    @contextlib.asynccontextmanager
    async def _giving_back(self, uses: int) -> AsyncIterator[None]:
        connection = self._connection
        left = connection._connection_counter - uses  # noqa: SLF001
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not is_done and connection._connection_counter > left:  # noqa: SLF001
                await connection.__aexit__()


class _Connection(Connection):
    """The package's connection, with such transactions: its `iterate()` runs in one, too."""

    def transaction(self, *, force_rollback: bool = False, **kwargs: Any) -> Transaction:
        return _Transaction(lambda: self, force_rollback, **kwargs)


class Database(databases.Database):
    """A database; PostgreSQL's are reached through a `ResilientPool`.

    Args:
        url: As the package takes it.
        **options: As the package takes them, and any argument of `ResilientPool`.
    """

    SUPPORTED_BACKENDS = {  # noqa: RUF012 - as the base class has it
        **databases.Database.SUPPORTED_BACKENDS,
        "postgresql": f"{__name__}:ResilientBackend",
        "postgres": f"{__name__}:ResilientBackend",
    }

    def connection(self) -> Connection:
        """Return this task's connection, as the package's own method does."""
        if self._global_connection is None and self._connection is None:
            self._connection = _Connection(self, self._backend)
        return super().connection()

    def transaction(self, *, force_rollback: bool = False, **kwargs: Any) -> Transaction:
        """Make a transaction, as the package's own method does."""
        return _Transaction(self.connection, force_rollback=force_rollback, **kwargs)

    @property
    def pool(self) -> ResilientPool[Any]:
        """The pool, for its `transaction()` and `stats()`. There is one while the database is connected."""
        pool = getattr(self._backend, "_pool", None)
        if pool is None:
            raise RuntimeError("there is no pool: await database.connect() first")
        return cast("ResilientPool[Any]", pool)

    @contextlib.contextmanager
    def within(self, connection: ResilientConnection[Any]) -> Iterator[None]:
        """Let every query of this task run in the transaction that is open on a connection, as in `pool.transaction()`.

            async for attempt in database.pool.transaction():
                async with attempt as connection:
                    with database.within(connection):
                        await database.execute("INSERT ...")

        `database.transaction()` inside makes a savepoint.

        Raises:
            RuntimeError: This task uses a connection of the database's already.
        """
        used = self.connection()
        backend = cast("PostgresConnection", used._connection)  # noqa: SLF001
        if used._connection_counter:  # noqa: SLF001
            raise RuntimeError("this task uses a connection of the database's already: leave its block first")
        backend._connection = cast("Any", connection)  # noqa: SLF001
        used._connection_counter = 1  # noqa: SLF001 - so that it acquires none
        try:
            yield
        finally:
            used._connection_counter = 0  # noqa: SLF001
            backend._connection = None  # noqa: SLF001
