"""asyncpg's transaction and cursors, for a lease that may still replace its connection. It touches asyncpg's internals, as driver.py does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any, TypeAlias

import asyncpg
from asyncpg.cursor import Cursor, CursorFactory, CursorIterator
from asyncpg.transaction import Transaction, TransactionState

from resilient_pool.pooling.driver import AnyConnection, wait_for_cancellation

# What was cancelled is waited for by a caller whose time is up.
_HASTE = 2.0

Begin: TypeAlias = Callable[[str, Callable[[AnyConnection], Awaitable[Any]]], Awaitable[Any]]
"""Does something on the lease's connection, as an operation that is repaired while nothing has succeeded on the lease.

It is given the name of the method that asks for it. Raises `asyncpg.InterfaceError` when the lease has ended.
"""


class LeaseTransaction(Transaction):
    """A transaction or savepoint that begins on the connection its lease has when it begins.

    Differs from asyncpg's in two things. An error that leaves the block is the one that the caller sees, also when the
    connection was lost or released inside the block: there is nothing left to roll back on it then, and `rollback()` of a
    transaction whose connection was lost does nothing. And a ROLLBACK that is
    not answered within a limit, or that waits as long for an earlier statement's cancellation, ends the connection.
    """

    __slots__ = ("_begin", "_limit")

    _connection: Any
    _con_release_ctr: int
    _state: TransactionState

    def __init__(
        self,
        begin: Begin,
        connection: AnyConnection,
        limit: float,
        *,
        isolation: Any,
        readonly: bool,
        deferrable: bool,
    ) -> None:
        super().__init__(connection, isolation, readonly, deferrable)
        self._begin = begin
        self._limit = limit

    @classmethod
    def like(cls, made: Any, begin: Begin, limit: float) -> LeaseTransaction:
        """Make one like the one that the driver made."""
        return cls(
            begin,
            made._connection,  # noqa: SLF001
            limit,
            isolation=made._isolation,  # noqa: SLF001
            readonly=made._readonly,  # noqa: SLF001
            deferrable=made._deferrable,  # noqa: SLF001
        )

    async def start(self) -> None:
        """Enter the transaction or savepoint block."""
        if self._state is not TransactionState.NEW:
            await super().start()  # it says what is wrong
            return
        await self._begin("Transaction.start", self._start_on)

    async def _start_on(self, connection: Any) -> None:
        self._connection = connection
        self._con_release_ctr = connection._pool_release_ctr  # noqa: SLF001
        self._state = TransactionState.NEW  # an attempt before may have failed
        try:
            await super().start()
        except BaseException as error:
            if connection._top_xact is self:  # noqa: SLF001
                if not self._is_over:
                    # It may have been begun all the same, and what follows on this lease is not to be part of it.
                    await self._roll_back(partial(self._undo_start, connection), error)
                # The driver would take the next one for a savepoint.
                connection._top_xact = None  # noqa: SLF001
            raise

    async def _undo_start(self, connection: Any) -> None:
        if not self._is_over and connection.is_in_transaction():
            await asyncpg.Connection.execute(connection, "ROLLBACK")

    async def __aexit__(self, extype: object, ex: object, tb: object) -> None:
        if not isinstance(ex, BaseException):
            await super().__aexit__(extype, ex, tb)
        elif self._is_over:
            self._managed = False
        else:
            await self._roll_back(partial(super().__aexit__, extype, ex, tb), ex)

    async def rollback(self) -> None:
        """Exit the transaction or savepoint block and roll back changes. With a connection that was lost, that has happened.

        Raises:
            TimeoutError: It was not answered within the pool's `reset_timeout`. The connection is closed.
        """
        if self._state is TransactionState.STARTED and not self._managed and self._connection.is_closed():
            # Raising would hide from `except: await transaction.rollback(); raise` what had been raised.
            self._state = TransactionState.ROLLEDBACK
            return
        await self._roll_back(super().rollback, None)

    @property
    def _is_over(self) -> bool:
        """Whether the lease in which the transaction was begun, or its connection, has ended."""
        released = self._connection._pool_release_ctr != self._con_release_ctr  # noqa: SLF001
        return released or bool(self._connection.is_closed())

    async def _roll_back(self, rollback: Callable[[], Awaitable[None]], error: BaseException | None) -> None:
        answered = False
        limit = min(self._limit, _HASTE) if _is_cancellation(error) else self._limit
        try:
            async with asyncio.timeout(limit):
                if not self._is_over:  # it is another caller's then
                    await wait_for_cancellation(self._connection)
                await rollback()
            answered = True
        except Exception as trouble:
            # A refusal leaves the connection as it is. After a time-out it is not known what state it is in.
            answered = not isinstance(trouble, TimeoutError)
            if error is None or not (_is_cancellation(error) or self._connection.is_closed() or not answered):
                raise
        finally:
            if not (answered or self._is_over):
                self._connection.terminate()


def _is_cancellation(error: BaseException | None) -> bool:
    return error is not None and not isinstance(error, Exception)


class LeaseCursors(CursorFactory):
    """A factory of cursors that looks for its lease's connection when it is used.

    Args:
        current: Returns that connection, or raises when it can have no transaction open, which a cursor needs.
        make: Makes the driver's own factory on a connection.
    """

    __slots__ = ("_current", "_make")

    def __init__(
        self,
        current: Callable[[], AnyConnection],
        connection: AnyConnection,
        query: str,
        make: Callable[[AnyConnection], CursorFactory[Any]],
    ) -> None:
        super().__init__(connection, query, None, (), None, None, None)
        self._current = current
        self._make = make

    def __aiter__(self) -> CursorIterator[Any]:
        return self._make(self._current()).__aiter__()

    def __await__(self) -> Generator[Any, None, Cursor[Any]]:
        return self._make(self._current()).__await__()
