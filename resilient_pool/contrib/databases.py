"""The package `databases` over resilient_pool: this module's `Database` in the place of its own.

    from resilient_pool.contrib.databases import Database

    database = Database("postgresql://localhost/app", max_size=10, deadline=30)

Needs the extra `databases`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import databases
from databases.backends.postgres import PostgresBackend, PostgresConnection

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
