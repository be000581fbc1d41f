"""`connect()`: one connection with a pool's care, which replaces itself as long as its session is as it was opened."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar, Unpack, cast

import asyncpg

from resilient_pool.config.arguments import RecordT, TypedPoolArguments
from resilient_pool.config.pool_config import seal
from resilient_pool.errors import ConfigurationError
from resilient_pool.execution.connection import LeaseManager, LeaseState, ResilientConnection
from resilient_pool.execution.query_methods import CallOptions
from resilient_pool.pool import ResilientPool
from resilient_pool.pooling.driver import AnyConnection, DriverConnection
from resilient_pool.pooling.resource_pool import PoolEntry

T = TypeVar("T")

# What a pool does between two leases, and for its own transactions: there are none here.
_OF_POOLS_ONLY = ("setup", "reset", "session_reset", "commit_log")
_LOST = "its session was lost, and with it what had been set there: connect again"


class SingleConnection(ResilientConnection[RecordT]):
    """What `connect()` opens: a lease for life of the only connection of a pool of its own.

    As long as the session is as it was when it was opened, a lost connection is replaced, and the query methods repeat what
    the pool's would repeat: reads, what never reached the server, and what the caller said may run twice. Plain reads, and single
    statements that change rows, leave a session as it was; transactions do when they have ended, and so do codecs, which
    go along to the replacement.

    What may have set something in the session (SET, a temporary table, LISTEN, a lock, `prepare()`, a function of which nothing
    is known, a transaction that is open) would be missing in another one: from then on, a loss ends this connection. The
    statement that meets it fails with the driver's error, every later one with `asyncpg.InterfaceError`; termination
    listeners are called. What every session is to have is set by `init=` or `server_settings=`.

    What a statement does out of sight is not seen: a trigger, a rule, a default, a check or a view of the application's own that
    changes the session (`set_config`, session locks) is lost with the connection, without an error.
    """

    __slots__ = ("_owner",)

    def __init__(self, leases: LeaseManager, entry: PoolEntry[DriverConnection]) -> None:
        super().__init__(leases, entry)
        self._owner: ResilientPool[RecordT] | None = None

    def _is_as_opened(self) -> bool:
        """Whether nothing can have been set in the session, nor is under way in it: then it may be replaced again."""
        driver = self._driver
        if self._state is LeaseState.USED and self._keeps_session and driver is not None and driver.is_at_rest:
            self._state = LeaseState.FRESH
        return self._state is LeaseState.FRESH

    def _release_on_close(self) -> None:
        self._is_as_opened()
        super()._release_on_close()

    async def _run(
        self,
        operation: str,
        sql: str | None,
        options: CallOptions,
        execute: Callable[..., Awaitable[T]],
        *arguments: object,
        replayable: bool = True,
    ) -> T:
        work = super()._run(operation, sql, options, execute, *arguments, replayable=replayable)
        return await self._watch(work, keeps=self._leases.keeps_session[sql])

    async def _first(
        self, operation: str, sql: str | None, execute: Callable[[AnyConnection], Awaitable[T]], **options: Any
    ) -> T:
        keeps = options.get("keeps", False) or options.get("keeps_session", False)
        return await self._watch(super()._first(operation, sql, execute, **options), keeps=keeps)

    async def _watch(self, work: Awaitable[T], *, keeps: bool) -> T:
        """Await an operation, and take note of whether the session is as it was opened afterwards.

        Args:
            work: The operation, not yet begun.
            keeps: Whether it leaves the session as it was, wherever it stops.
        """
        self._is_as_opened()
        driver, kept, was_lost = self._driver, self._keeps_session, self._is_lost
        try:
            return await work
        except Exception as error:
            if self._is_lost and not was_lost:  # else the error says so itself
                error.add_note(f"resilient_pool: {_LOST}")
            raise
        finally:
            is_new = self._driver is not driver
            self._keeps_session = (kept or is_new) and (keeps or self._state is LeaseState.FRESH)

    @property
    def _is_lost(self) -> bool:
        return self._state is LeaseState.CLOSED and self._owner is not None and not self._owner.is_closing()

    def _require_active(self, method: str) -> None:
        if self._is_lost:
            raise asyncpg.InterfaceError(f"cannot call Connection.{method}(): connection is closed: {_LOST}")
        if self.is_released:
            raise asyncpg.InterfaceError(f"cannot call Connection.{method}(): connection is closed")

    async def _close(self, execute: Callable[[AnyConnection], Awaitable[None]]) -> None:
        try:
            await super()._close(execute)
        finally:
            self._terminate_owner()

    def terminate(self) -> None:
        """Close the connection without a goodbye. It needs no running event loop. One that is closed, or was lost, stays so."""
        super().terminate()
        self._terminate_owner()

    def _terminate_owner(self) -> None:
        if self._owner is not None:
            self._owner.terminate()


class _PoolOfOne(ResilientPool[RecordT]):
    _lease_type = SingleConnection


class Connecting(Generic[RecordT]):
    """What `connect()` returns: await it, or enter it."""

    __slots__ = ("_connection", "_pool", "_used")

    def __init__(self, pool: ResilientPool[RecordT]) -> None:
        self._pool = pool
        self._used = False
        self._connection: SingleConnection[RecordT] | None = None

    def __await__(self) -> Generator[Any, None, SingleConnection[RecordT]]:
        return self._open().__await__()

    async def __aenter__(self) -> SingleConnection[RecordT]:
        self._connection = await self._open()
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def _open(self) -> SingleConnection[RecordT]:
        pool = self._pool
        if self._used:
            raise asyncpg.InterfaceError("a connection is opened once only: call connect() again for another one")
        self._used = True
        connection = None
        try:
            await pool
            connection = cast("SingleConnection[RecordT]", await pool.acquire())
            connection._owner = pool  # noqa: SLF001
        finally:
            if connection is None:
                pool.terminate()
        return connection


def connect(dsn: str | None = None, /, **arguments: Unpack[TypedPoolArguments[RecordT]]) -> Connecting[RecordT]:
    """Open one connection with the care of a pool: await what this returns, or enter it with `async with`.

    It is opened by the pool's rules for hosts, credentials and a server that is away, within `deadline` seconds, and is closed by
    `close()`, `terminate()` or the end of the block. It has all methods of `asyncpg.Connection`; see `SingleConnection` for
    what becomes of it when it is lost. An open connection keeps a database awake that pauses when it has none.

    Args:
        dsn: As `ResilientPool` takes it.
        **arguments: What `ResilientPool` takes. What says how many connections there are and how long they live has no
            meaning here (`min_size`, `max_size`, `init_size`, `max_queries`, `max_lifetime`, `max_inactive_connection_lifetime`);
            it is ignored, so that a profile can be passed.

    Raises:
        ConfigurationError: An argument is unknown or out of range, or is for pools only: `setup`, `reset`, `session_reset`,
            `commit_log`. (When it is called; all others when it is awaited.)
        AcquireTimeoutError: The server did not answer within `deadline`.
        Exception: The driver's own error, when no connection could be opened in time.
    """
    sealed, settled = seal(dsn, arguments)
    del dsn, arguments
    for name in _OF_POOLS_ONLY:
        if settled.get(name) is not None:
            raise ConfigurationError(
                f"{name}= is for pools: connect() opens one connection; init= prepares its session"
            )
    ignored = dict.fromkeys(("min_size", "init_size", "max_queries", "max_inactive_connection_lifetime"))
    settled = {name: value for name, value in settled.items() if name not in ignored}
    settled |= {"max_size": 1, "max_lifetime": 0}
    return Connecting(_PoolOfOne(sealed, **cast("TypedPoolArguments[RecordT]", settled)))
