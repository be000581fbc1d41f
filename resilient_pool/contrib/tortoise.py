"""Tortoise ORM over resilient_pool: name this module as the engine, and pass the pool's arguments among the credentials.

    await Tortoise.init(config={
        "connections": {"default": {"engine": "resilient_pool.contrib.tortoise", "credentials": {
            "host": "localhost", "user": "app", "password": "...", "database": "app", "maxsize": 10, "deadline": 30,
        }}},
        "apps": {"models": {"models": ["app.models"], "default_connection": "default"}},
    })

Needs the extra `tortoise`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from tortoise.backends.asyncpg.client import AsyncpgDBClient, TransactionWrapper
from tortoise.backends.base.client import TransactionalDBClient, TransactionContext, TransactionContextPooled
from tortoise.connection import get_connections

from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pool import ResilientPool, create_pool


class ResilientDBClient(AsyncpgDBClient):
    """Tortoise's client for asyncpg, with a `ResilientPool`.

    Args:
        **credentials: What Tortoise takes, and any argument of `ResilientPool`. `minsize` is 0 by default: an idle application
            holds nothing open, so that a serverless database can pause.
    """

    def __init__(self, **credentials: Any) -> None:
        super().__init__(**{"minsize": 0, **credentials})

    async def create_pool(self, **kwargs: Any) -> Any:
        """Open the pool."""
        return await create_pool(**kwargs)

    @property
    def pool(self) -> ResilientPool[Any]:
        """The pool, for its `transaction()` and `stats()`. There is one once anything was asked, in this event loop."""
        if self._pool is None:
            raise RuntimeError(
                "there is no pool yet: await Tortoise.init(), then ask anything, or client.create_connection(True)"
            )
        return cast("ResilientPool[Any]", self._pool)

    @contextlib.contextmanager
    def within(self, connection: ResilientConnection[Any]) -> Iterator[TransactionalDBClient]:
        """Let every query of this task run in the transaction that is open on a connection, as in `pool.transaction()`.

            async for attempt in client.pool.transaction():
                async with attempt as connection:
                    with client.within(connection):
                        await Order.create(name="...")

        `in_transaction()` inside makes a savepoint.
        """
        wrapper = TransactionWrapper(self)
        wrapper._connection = cast("Any", connection)  # noqa: SLF001
        token = get_connections().set(self.connection_name, wrapper)
        try:
            yield wrapper
        finally:
            get_connections().reset(token)

    def _in_transaction(self) -> TransactionContext:
        return _PooledTransaction(TransactionWrapper(self), self._pool_init_lock)


class _PooledTransaction(TransactionContextPooled):
    """Tortoise's transaction, which gives its connection back also when it cannot begin."""

    __slots__ = ()

    async def __aenter__(self) -> TransactionalDBClient:
        begun = False
        self.client._connection = None  # noqa: SLF001
        try:
            client = await super().__aenter__()
            begun = True
        finally:
            if not begun and self.client._connection is not None:  # noqa: SLF001
                await self.client._parent._pool.release(self.client._connection)  # noqa: SLF001
                get_connections().reset(self.token)
        return client


client_class = ResilientDBClient
