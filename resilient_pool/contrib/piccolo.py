"""Piccolo over resilient_pool: `ResilientEngine` in the place of `PostgresEngine`.

    DB = ResilientEngine(config={"host": "localhost", "user": "app", "password": "...", "database": "app"})

    await DB.start_connection_pool(max_size=10, deadline=30)

Needs the extra `piccolo`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, cast

from piccolo.engine.postgres import PostgresEngine, PostgresTransaction

from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pool import ResilientPool, create_pool
from resilient_pool.single_connection import connect

# How long closing waits for connections that are in use.
_CLOSE_LIMIT = 10.0


class _Transaction(PostgresTransaction):
    """Piccolo's transaction, which gives its connection back also when it cannot begin or end.

    Otherwise the task that it ran in would be left with a lost connection for good.
    """

    async def __aenter__(self) -> PostgresTransaction:
        begun = False
        try:
            entered = await super().__aenter__()
            begun = True
        finally:
            if not begun and getattr(self, "connection", None) is not None:
                await self._give_back()
        return entered

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        ended = False
        try:
            swallowed = await super().__aexit__(exception_type, exception, traceback)
            ended = True
        finally:
            if not ended and self._parent is None:
                self.engine.current_transaction.reset(self.context)
                await self._give_back()
        return swallowed

    async def _give_back(self) -> None:
        if self.engine.pool:
            await self.engine.pool.release(self.connection)
        else:
            await self.connection.close()


class ResilientEngine(PostgresEngine):
    """Piccolo's engine for asyncpg, with a `ResilientPool`; single connections, too, wait for a server that is away.

    Args:
        config: What `asyncpg.connect` takes, and any argument of `ResilientPool`.
        **options: What `PostgresEngine` takes.
    """

    __slots__ = ()

    async def start_connection_pool(self, **kwargs: Any) -> None:
        """Open the pool.

        Args:
            **kwargs: Any argument of `ResilientPool`; they win over those of `config`.
        """
        if self.pool:
            await super().start_connection_pool()  # it warns that there is one
        else:
            self.pool = cast("Any", await create_pool(**{**self.config, **kwargs}))

    async def close_connection_pool(self) -> None:
        """Close the pool; what is still in use 10 s later is cut off."""
        pool = cast("ResilientPool[Any] | None", self.pool)
        if pool is None:
            await super().close_connection_pool()  # it warns that there is none
        else:
            self.pool = None
            await pool.close(timeout=_CLOSE_LIMIT)

    async def get_new_connection(self) -> Any:
        """Open a connection outside of the pool."""
        return await connect(**self.config)

    def transaction(self, allow_nested: bool = True) -> PostgresTransaction:
        """Make a transaction, as Piccolo's own method does."""
        return _Transaction(engine=self, allow_nested=allow_nested)

    @contextlib.contextmanager
    def within(self, connection: ResilientConnection[Any]) -> Iterator[None]:
        """Let every query of this task run in the transaction that is open on a connection, as in `pool.transaction()`.

            async for attempt in DB.pool.transaction():
                async with attempt as connection:
                    with DB.within(connection):
                        await Order(name="...").save()

        `DB.transaction()` inside is a part of it, as a nested transaction is with Piccolo.
        """
        transaction = PostgresTransaction(engine=self)
        transaction.connection = cast("Any", connection)
        token = self.current_transaction.set(transaction)
        try:
            yield
        finally:
            self.current_transaction.reset(token)
