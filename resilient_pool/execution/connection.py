"""What `acquire()` hands out: a leased connection, which replaces itself as long as nothing has happened on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Generator
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

import anyio
import asyncpg
from asyncpg import Record

from resilient_pool._validation import names_nearest, require_seconds
from resilient_pool.config.arguments import RecordT
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.execution.connection_class import lease_class
from resilient_pool.execution.lease_resources import LeaseCursors, LeaseTransaction
from resilient_pool.execution.query_methods import CallOptions, OtherRecord, Queries
from resilient_pool.execution.retry_strategy import Asked, Execution, RetryStrategy, do_nothing
from resilient_pool.pooling.acquire import Acquirer
from resilient_pool.pooling.callbacks import answer_of
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import (
    AnyConnection,
    ConnectionProxy,
    DriverConnection,
    comes_from_the_transport,
    overrides_statements,
)
from resilient_pool.pooling.resource_pool import PoolEntry
from resilient_pool.retry.verdict import Phase
from resilient_pool.sql.session_state import SessionState, session_state

if TYPE_CHECKING:
    from asyncpg.connection import LoggedQuery
    from asyncpg.cursor import CursorFactory
    from asyncpg.prepared_stmt import PreparedStatement
    from asyncpg.protocol.protocol import ConnectionSettings
    from asyncpg.transaction import Transaction
    from asyncpg.types import ServerVersion

T = TypeVar("T")

# Functions or coroutine functions that the driver calls. The connection they are called with is the lease.
Listener: TypeAlias = Callable[[Any, int, str, Any], Any]
LogListener: TypeAlias = Callable[[Any, asyncpg.PostgresLogMessage], Any]
TerminationListener: TypeAlias = Callable[[Any], Any]
QueryLogger: TypeAlias = "Callable[[LoggedQuery], Any]"


class LeaseState(Enum):
    """What has been done on a lease."""

    FRESH = "nothing has succeeded on it yet: its connection may be replaced"
    TRYING = "fresh, and an operation is under way, which replaces the connection"
    SETTING_UP = "fresh, and the application sets it up"
    USED = "bound to its connection"
    RELEASED = "given back"
    CLOSED = "ended with its connection"


# Looking a member up in its enumeration takes long (Python 3.11).
_FRESH, _TRYING, _SETTING_UP, _USED = LeaseState.FRESH, LeaseState.TRYING, LeaseState.SETTING_UP, LeaseState.USED
_RELEASED, _CLOSED = LeaseState.RELEASED, LeaseState.CLOSED


# In seconds.
_A_MOMENT = 0.001


class _Attachments:
    """What an application has attached to a lease rather than to its session: it goes along to a replacement.

    Attributes:
        codecs: Set codecs on a connection.
        logs: Listeners to the server's messages.
        loggers: Loggers of queries, which the connection did not have before.
        ends: Listeners to the end of the lease's connection.
        replacements: What an adapter does with a connection before it is used.
    """

    __slots__ = ("codecs", "ends", "loggers", "logs", "replacements")

    def __init__(self) -> None:
        self.codecs: list[Callable[[AnyConnection], Awaitable[None]]] = []
        self.logs: list[LogListener] = []
        self.loggers: list[QueryLogger] = []
        self.ends: list[TerminationListener] = []
        self.replacements: list[Callable[[], Awaitable[None]]] = []

    @property
    def leaves_session_alone(self) -> bool:
        """Whether nothing is attached that a reset takes away. Codecs are the driver's, and stay."""
        return not (self.logs or self.loggers or self.ends)

    async def attach_to(self, driver: DriverConnection) -> None:
        """Attach everything to another connection."""
        for callback in self.logs:
            driver.connection.add_log_listener(callback)
        self.loggers = [callback for callback in self.loggers if driver.add_query_logger(callback)]
        for set_codec in self.codecs:
            await set_codec(driver.connection)
        for prepare in self.replacements:
            await prepare()

    def detach_from(self, driver: DriverConnection) -> None:
        """Take the loggers of queries away: the driver would leave them to the next caller."""
        for callback in self.loggers:
            driver.connection.remove_query_logger(callback)


class ResilientConnection(Queries[RecordT], ConnectionProxy):
    """A connection that belongs to the application until it is released. It has all methods of `asyncpg.Connection`.

    Until the first operation on it has succeeded, an operation that fails in a curable way is repeated on a replacement:
    no session state can be lost yet. That holds for every statement, and for the beginning of a transaction, `prepare()`,
    `add_listener()` and codecs. From then on errors are raised as they are. Looking at anything is no operation, and
    neither is a read that the server refused.

    The lease ends when the connection is released or closed, or when it is lost after its first use. Its place in the pool is
    free then, and a later release does nothing. A use after that raises `asyncpg.InterfaceError`, also of what was made on it:
    transactions, cursors, prepared statements.
    """

    __slots__ = ("_attached", "_driver", "_entry", "_interrupted", "_keeps_session", "_leases", "_state", "_tracker")

    def __init__(self, leases: LeaseManager, entry: PoolEntry[DriverConnection]) -> None:
        self._state = _FRESH
        self._leases = leases
        self._entry: PoolEntry[DriverConnection] | None = entry
        # The connection of this moment, or, of a lease that lost it and may replace it, the last one: to look at.
        self._driver: DriverConnection | None = None
        self._interrupted = False
        self._attached: _Attachments | None = None
        self._tracker: Callable[[str | None], None] | None = None
        # Whether all that was done on it left its session as it was; `None` while one thing is being done, and not two.
        self._keeps_session: bool | None = leases.trusts_texts

    def __repr__(self) -> str:
        inner = f"[{self._state.name.lower()}]" if self.is_released else repr(self._driver)
        return f"<{type(self).__name__} {inner} {id(self):#x}>"

    @property
    def is_released(self) -> bool:
        """Whether the lease has ended: by release, by `close()` or `terminate()`, or with its connection."""
        return self._state is _RELEASED or self._state is _CLOSED

    # What the driver's connection has beside, and what an application's own class adds

    def _attribute(self, name: str) -> Any:
        """Return an attribute of the connection that a lease does not have. It is the `__getattr__` of leases of other classes."""
        if name.startswith("__") or name in ResilientConnection.__slots__:
            raise AttributeError(name)
        if self._driver is not None:
            self._keeps_session = False
            found = getattr(self._driver.connection, name)
            return self._guard(name, found) if inspect.ismethod(found) else found
        found = getattr(self._leases.connection_class, name, None)
        if inspect.isfunction(found) and not name.startswith("_"):
            return self._guard(name, found)  # it says why it cannot be called any more
        raise AttributeError(f"{name!r} of a connection that has been released back to the pool")

    def _guard(self, name: str, found: Any) -> Any:
        """Make a method of which nothing is known count as a use when it is called, not when it is looked at."""

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._pin_and_get(name), name)(*args, **kwargs)

        @functools.wraps(found)
        async def call_on_a_checked_connection(*args: Any, **kwargs: Any) -> Any:
            # Not repeated: it is not known of how many statements it is made.
            await self._first(name, None, do_nothing, keeps=True)
            return await getattr(self._pin_and_get(name), name)(*args, **kwargs)

        return call_on_a_checked_connection if inspect.iscoroutinefunction(found) else call

    # What asyncpg asks of a connection that belongs to a pool

    @property
    def _con(self) -> AnyConnection | None:
        # What is sent on the driver's own connection passes by.
        self._keeps_session = False
        if self._tracker is not None:
            self._tracker(None)
        return None if self._driver is None else self._driver.connection

    @property
    def _holder(self) -> ResilientConnection[RecordT]:
        return self

    @property
    def _pool(self) -> LeaseManager:
        return self._leases

    def _release_on_close(self) -> None:
        """The connection was closed, by whatever side: its place is free, except while a transaction's block needs it."""
        if self._driver is not None:
            self._driver.drop_proxy(self)
        if self._tracker is not None and self._state is _USED:
            return
        irreplaceable = self._has_termination_listeners or self._leases.is_closing
        if self._state is _USED or (self._state is _FRESH and irreplaceable) or self.is_released:
            self._end_with_connection()
            return
        entry, self._entry = self._entry, None
        if entry is not None:
            self._leases.reset_and_release(entry)

    @property
    def _has_termination_listeners(self) -> bool:
        return self._attached is not None and bool(self._attached.ends)

    # The lease

    def _require_active(self, method: str) -> None:
        if self._state is _RELEASED:
            raise asyncpg.InterfaceError(
                f"cannot call Connection.{method}(): connection has been released back to the pool"
            )
        if self._state is _CLOSED:
            raise asyncpg.InterfaceError(
                f"cannot call Connection.{method}(): connection is closed and has been released back to the pool"
            )

    def _peek(self, method: str) -> AnyConnection:
        """Return the connection of this moment for something that leaves no trace in its session."""
        self._require_active(method)
        return self._current_driver.connection

    @property
    def _current_driver(self) -> DriverConnection:
        if self._driver is None:
            raise asyncpg.InternalClientError("a lease without a connection")
        return self._driver

    def _pin_and_get(self, method: str, sql: str | None = None) -> AnyConnection:
        """Return the connection for something that ties itself to it: it is not replaced any more."""
        self._require_active(method)
        self._keeps_session = False
        if self._state is _FRESH:
            self._state = _USED
        if self._tracker is not None:
            self._tracker(sql)
        return self._current_driver.connection

    @property
    def _left_session_alone(self) -> bool:
        """Whether the session is as it was when it was leased, as far as can be seen, and nothing is under way in it."""
        driver, attached = self._driver, self._attached
        is_alone = attached is None or attached.leaves_session_alone
        return bool(self._keeps_session) and is_alone and driver is not None and driver.is_at_rest

    def _pin(self, sent: Callable[[str | None], None]) -> None:
        self._state = _USED
        self._tracker = sent

    def _end_lease(self) -> PoolEntry[DriverConnection] | None:
        """End the lease and return its entry; `None` if that came back before. The driver is still to be detached."""
        entry, self._entry = self._entry, None
        if self._state is not _CLOSED:
            self._state = _RELEASED
        return entry

    def _detach_driver(self) -> None:
        """Be the proxy of no connection any more. Raises the driver's warning of listeners where warnings are errors."""
        driver, self._driver = self._driver, None
        if driver is not None:
            if self._attached is not None:
                self._attached.detach_from(driver)
            driver.detach_proxy(self)

    def _end_with_connection(self) -> None:
        """End the lease with its connection, which is closed."""
        self._state = _CLOSED
        driver, self._driver = self._driver, None
        entry, self._entry = self._entry, None
        if driver is not None:
            driver.drop_proxy(self)
        if entry is not None:
            self._leases.reset_and_release(entry)
        if driver is not None and self._attached is not None:
            driver.call_soon(self._attached.ends, self)
            self._attached = None

    # Operations

    async def _run(
        self,
        operation: str,
        sql: str | None,
        options: CallOptions,
        execute: Callable[..., Awaitable[T]],
        *arguments: object,
        replayable: bool = True,
    ) -> T:
        if options:
            _check(options)
        if self._state is not _USED and self._state is not _SETTING_UP:
            if self._state is not _FRESH:
                self._require_active(operation)
            return await self._try((operation, sql, execute, arguments, options, replayable))
        keeps_session, self._keeps_session = self._keeps_session, None if self._keeps_session else False
        if self._tracker is not None:
            self._tracker("COPY" if sql is None else sql)
        if self._interrupted:
            await self._end_of_interruption(operation)
        try:
            result = await execute(self._driver.connection, *arguments)  # type: ignore[union-attr]
        except (asyncio.CancelledError, TimeoutError):
            self._interrupted = True
            raise
        except AttributeError as error:
            self._explain(operation, error)
            raise
        if keeps_session and sql is not None and self._keeps_session is None:
            self._keeps_session = self._leases.keeps_session[sql]
        return result

    async def _first(
        self,
        operation: str,
        sql: str | None,
        execute: Callable[[AnyConnection], Awaitable[T]],
        *,
        keeps: bool = False,
        keeps_session: bool = False,
    ) -> T:
        """Do something that leaves nothing behind when it fails, and may be repeated when it was lost.

        Args:
            operation: What the application calls it.
            sql: What a transaction is to know of it; `None` if it need not know.
            execute: Does it.
            keeps: Whether it leaves nothing behind when it succeeds either.
            keeps_session: Whether what it leaves in the session, if anything, ends with the transaction that it begins.
        """
        if self._state is _USED or self._state is _SETTING_UP:
            kept = keeps_session and self._keeps_session
            self._keeps_session = None if kept else False
            if self._tracker is not None and sql is not None:
                self._tracker(sql)
            if self._interrupted:
                await self._end_of_interruption(operation)
            try:
                result = await execute(self._current_driver.connection)
            except (asyncio.CancelledError, TimeoutError):
                self._interrupted = True
                raise
            if kept and self._keeps_session is None:
                self._keeps_session = True
            return result
        self._require_active(operation)
        asked: Asked[T] = (operation, None, execute, (), {"idempotent": True}, True)
        return await self._try(asked, harmless=True, keeps=keeps, keeps_session=keeps_session)

    async def _begin(self, method: str, execute: Callable[[AnyConnection], Awaitable[Any]]) -> Any:
        if self.is_released:
            raise asyncpg.InterfaceError(
                f"cannot call {method}(): the underlying connection has been released back to the pool"
            )
        return await self._first("transaction", None, execute, keeps_session=True)

    async def _try(  # noqa: C901, PLR0912 - the loop of a lease's first use, whole
        self, asked: Asked[T], *, harmless: bool = False, keeps: bool = False, keeps_session: bool = False
    ) -> T:
        """Do something on a connection that is replaced until this has succeeded."""
        if self._state is _TRYING:
            # The driver would say the same, but the connection would be checked and replaced under the other operation.
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        self._state = _TRYING
        operation, sql, execute, arguments, *_ = asked
        kept, self._keeps_session = self._keeps_session, None if self._keeps_session else False
        leases = self._leases
        started, execution, fresh, timed_out = leases.begin_call(), None, None, False
        try:
            while True:
                failure, driver, queries = None, self._driver, 0
                try:
                    if execution is None and driver is not None and leases.is_ready(self._entry, driver, started):
                        queries = driver.queries if driver.is_customized else 0
                        result = await execute(driver.connection, *arguments)
                    else:
                        execution = execution or self._leases.retry_strategy.new_execution(*asked, started)
                        result = await self._attempt(execution)
                except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                    failure = error
                if failure is None:
                    break
                if execution is None:
                    execution = self._leases.retry_strategy.new_execution(*asked, started)
                    if driver is not None:
                        execution.attempt.execute_on(driver, queries)
                # Another task may have ended the lease: the connection is another caller's then.
                await self._leases.retry_strategy.wait_for_retry(execution, failure, holds=self._state is _TRYING)
            fresh = keeps
            if self._driver is not None:
                self._driver.has_served = True  # it may be lost before it is released
            if kept and self._keeps_session is None:
                self._keeps_session = keeps_session or (sql is not None and self._leases.keeps_session[sql])
        except Exception as error:
            fresh = self._leases.is_untouched(execution, error, harmless=harmless)
            timed_out = isinstance(error, TimeoutError)
            self._explain(operation, error)
            raise
        finally:
            self._interrupted = timed_out or fresh is None
            if fresh is False and self._state is _TRYING and self._entry is not None:
                self._state = _USED
            elif self._state is _TRYING:
                self._end_trying(fresh=self._has_nothing_to_lose(execution) if fresh is None else fresh)
        return result

    def _has_nothing_to_lose(self, execution: Execution[Any] | None) -> bool:
        """Whether what was cancelled had not begun to execute, or its connection is lost."""
        if execution is None:
            return self._driver is None or not self._driver.is_usable
        return self._leases.is_untouched(execution)

    async def _end_of_interruption(self, operation: str) -> None:
        """Wait for the end of a statement that was cancelled, which the driver does too, but for ever."""
        await self._current_driver.end_of_cancellation(self._leases.reset_timeout)
        self._interrupted = False
        self._require_active(operation)

    def _explain(self, operation: str, error: Exception) -> None:
        """Raise what stands behind an error of the driver, if it fell over a lease that was ended under it."""
        if self.is_released and comes_from_the_transport(error):
            try:
                self._require_active(operation)
            except asyncpg.InterfaceError as ended:
                raise ended from error

    def _end_trying(self, *, fresh: bool) -> None:
        self._state = _FRESH if fresh else _USED
        # The connection may have been lost as soon as it had answered.
        if self._entry is None and (not fresh or self._has_termination_listeners):
            self._end_with_connection()

    async def _attempt(self, execution: Execution[T]) -> T:
        self._require_active(execution.operation.name)
        entry, self._entry = self._entry, None  # while it is checked or replaced it may be lost
        self._entry = await self._leases.acquirer.keep_or_acquire(
            entry, execution.operation.deadline, fail_fast=execution.operation.fail_fast
        )
        if self._state is not _TRYING:  # the lease was ended by another task, which found no entry to give back
            self._leases.release(self)
            self._require_active(execution.operation.name)
        driver = await self._attach(execution)
        self._require_active(execution.operation.name)
        return await self._leases.retry_strategy.run_on(execution, driver)

    async def _attach(self, execution: Execution[T]) -> DriverConnection:
        """Become the proxy of the connection in this lease's entry, set it up if it is new here, and return it."""
        driver = None if self._entry is None else self._entry.resource
        if driver is None:
            raise asyncpg.ConnectionDoesNotExistError("connection was closed while it was being set up")
        if driver is not self._driver:
            self._detach_driver()
            driver.attach_proxy(self)
            self._driver = driver
            execution.attempt.phase, execution.attempt.driver = Phase.CHECKOUT, driver
            if self._leases.sets_up or self._attached is not None:
                await self._set_up(driver, execution)
        return driver

    async def _set_up(self, driver: DriverConnection, execution: Execution[T]) -> None:
        # What `setup` does is part of getting the connection: it fails as a whole, and is repeated as a whole.
        before, self._state = self._state, _SETTING_UP
        ready = False
        try:
            await self._leases.set_up(self, execution.operation.deadline)
            if self._attached is not None:
                await self._attached.attach_to(driver)
            if self._state is _RELEASED:
                # It may be another caller's by now.
                raise asyncpg.InterfaceError(
                    "the connection was released while it was being set up: it has been released back to the pool; "
                    "leave it to the pool in setup="
                )
            ready = True
        finally:
            if self._state is _SETTING_UP:
                self._state = before
            if not ready and self._state is not _RELEASED:
                driver.invalidated = True
                driver.detach_proxy(self)

    # asyncpg's other methods

    @overload
    async def prepare(
        self, query: str, *, name: str | None = None, timeout: float | None = None, record_class: None = None
    ) -> PreparedStatement[RecordT]: ...
    @overload
    async def prepare(
        self, query: str, *, name: str | None = None, timeout: float | None = None, record_class: type[OtherRecord]
    ) -> PreparedStatement[OtherRecord]: ...
    @names_nearest
    async def prepare(
        self,
        query: str,
        *,
        name: str | None = None,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
    ) -> PreparedStatement[Any]:
        """Prepare a statement, for use on this connection until it is released."""
        require_seconds("timeout", timeout)
        return await self._first(
            "prepare",
            query,
            lambda connection: connection.prepare(query, name=name, timeout=timeout, record_class=record_class),
        )

    @overload
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: None = None,
    ) -> CursorFactory[RecordT]: ...
    @overload
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: type[OtherRecord],
    ) -> CursorFactory[OtherRecord]: ...
    @names_nearest
    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
    ) -> CursorFactory[Any]:
        """Make a cursor, for use in a transaction on this connection, until it is released."""
        require_seconds("timeout", timeout)

        def make(connection: AnyConnection) -> CursorFactory[Any]:
            return connection.cursor(query, *args, prefetch=prefetch, timeout=timeout, record_class=record_class)

        return self._cursors(query, make)

    def _cursors(self, query: str, make: Callable[[AnyConnection], CursorFactory[Any]]) -> CursorFactory[Any]:
        if self._state is not _FRESH:
            return make(self._pin_and_get("cursor", query))

        def current() -> AnyConnection:
            if self._state is _FRESH:
                raise asyncpg.NoActiveSQLTransactionError("cursor cannot be created outside of a transaction")
            return self._pin_and_get("cursor", query)

        return LeaseCursors(current, self._current_driver.connection, query, make)

    @names_nearest
    def transaction(self, *, isolation: Any = None, readonly: bool = False, deferrable: bool = False) -> Transaction:
        """Make a transaction, or inside one a savepoint; nothing in it is repeated, only its beginning.

        It is used as asyncpg's: `async with connection.transaction()`, or `start()`, `commit()` and `rollback()`. A rollback
        that is not answered within the pool's `reset_timeout` ends the connection.
        """
        connection = self._peek("transaction")
        if self._state is not _FRESH and connection.is_closed():
            raise asyncpg.InterfaceError("connection is closed")
        limit = self._leases.reset_timeout
        return LeaseTransaction(
            self._begin, connection, limit, isolation=isolation, readonly=readonly, deferrable=deferrable
        )

    def _transaction(self, made: Transaction) -> Transaction:
        return LeaseTransaction.like(made, self._begin, self._leases.reset_timeout)

    @names_nearest
    async def add_listener(self, channel: str, callback: Listener) -> None:
        """Listen to a channel until the connection is released.

        Args:
            channel: Its name.
            callback: Called with this connection, the sender's process id, the channel and the payload.
        """
        await self._first("add_listener", "LISTEN", lambda connection: connection.add_listener(channel, callback))

    @names_nearest
    async def remove_listener(self, channel: str, callback: Listener) -> None:
        """Stop listening to a channel."""
        await self._first(
            "remove_listener", "UNLISTEN", lambda connection: connection.remove_listener(channel, callback)
        )

    def add_log_listener(self, callback: LogListener) -> None:
        """Call `callback` with this connection and each message (`NOTICE`, `WARNING`) that the server sends."""
        connection = self._peek("add_log_listener")
        if self._state is not _FRESH or not connection.is_closed():
            connection.add_log_listener(callback)
        _add(self._attachments().logs, callback)

    def remove_log_listener(self, callback: LogListener) -> None:
        """Do not call `callback` with the server's messages any more."""
        self._peek("remove_log_listener").remove_log_listener(callback)
        _remove(self._attachments().logs, callback)

    def add_termination_listener(self, callback: TerminationListener) -> None:
        """Call `callback` with this connection when its connection ends before it is released.

        A connection that is lost before its first use is replaced only by an operation that is under way then: otherwise
        `callback` is called, and the lease has ended.
        """
        self._peek("add_termination_listener")
        if not callable(callback):
            raise asyncpg.InterfaceError(f"expected a callable or an `async def` function, got {callback!r}")
        _add(self._attachments().ends, callback)

    def remove_termination_listener(self, callback: TerminationListener) -> None:
        """Do not call `callback` at the connection's end any more."""
        self._peek("remove_termination_listener")
        _remove(self._attachments().ends, callback)

    def add_query_logger(self, callback: QueryLogger) -> None:
        """Call `callback` with an `asyncpg.connection.LoggedQuery` after every query, until the connection is released."""
        self._require_active("add_query_logger")
        if self._current_driver.add_query_logger(callback):
            _add(self._attachments().loggers, callback)

    def remove_query_logger(self, callback: QueryLogger) -> None:
        """Do not call `callback` after queries any more."""
        self._peek("remove_query_logger").remove_query_logger(callback)
        _remove(self._attachments().loggers, callback)

    @contextlib.contextmanager
    def query_logger(self, callback: QueryLogger) -> Generator[None, None, None]:
        """Call `callback` after every query within the context."""
        self.add_query_logger(callback)
        try:
            yield
        finally:
            if not self.is_released:
                self.remove_query_logger(callback)

    def _attachments(self) -> _Attachments:
        if self._attached is None:
            self._attached = _Attachments()
        return self._attached

    @names_nearest
    async def set_type_codec(
        self,
        typename: str,
        *,
        schema: str = "public",
        encoder: Callable[[Any], Any],
        decoder: Callable[[Any], Any],
        format: str = "text",  # noqa: A002 - asyncpg's name
    ) -> None:
        """Set how values of a type are encoded and decoded, on the connection of this moment and on a replacement."""
        await self._set_codec(
            "set_type_codec",
            lambda connection: connection.set_type_codec(
                typename, schema=schema, encoder=encoder, decoder=decoder, format=format
            ),
        )

    @names_nearest
    async def set_builtin_type_codec(
        self,
        typename: str,
        *,
        schema: str = "public",
        codec_name: str,
        format: str | None = None,  # noqa: A002 - asyncpg's name
    ) -> None:
        """Let values of a type be encoded and decoded as those of a type that the driver knows."""
        await self._set_codec(
            "set_builtin_type_codec",
            lambda connection: connection.set_builtin_type_codec(
                typename, schema=schema, codec_name=codec_name, format=format
            ),
        )

    @names_nearest
    async def reset_type_codec(self, typename: str, *, schema: str = "public") -> None:
        """Let values of a type be encoded and decoded as the driver does by itself."""
        await self._set_codec(
            "reset_type_codec", lambda connection: connection.reset_type_codec(typename, schema=schema)
        )

    async def _set_codec(self, operation: str, execute: Callable[[AnyConnection], Awaitable[None]]) -> None:
        # Codecs belong to the driver, not to the session.
        await self._first(operation, None, execute, keeps=True, keeps_session=True)
        if self._state is _FRESH:
            self._attachments().codecs.append(execute)

    async def reload_schema_state(self) -> None:
        """Forget what all connections of the pool know of types and statements: the schema has changed."""
        self._require_active("reload_schema_state")
        self._leases._drop_type_cache()  # noqa: SLF001
        self._leases._drop_statement_cache()  # noqa: SLF001

    @names_nearest
    async def reset(self, *, timeout: float | None = None) -> None:
        """Reset the session: roll back, stop listening, release locks, and return to the role and settings of the login."""
        require_seconds("timeout", timeout)
        if self._tracker is not None:
            self._tracker(None)  # it rolls a transaction back
        if self._driver is not None:
            self._driver.session_info.clear()
        await self._first("reset", None, lambda connection: connection.reset(timeout=timeout))

    def get_reset_query(self) -> str:
        """Return what is sent to reset the session."""
        return self._peek("get_reset_query").get_reset_query()

    @names_nearest
    async def close(self, *, timeout: float | None = None) -> None:
        """Close the connection and end the lease; the pool replaces it. One that is closed, or was lost, stays so.

        Args:
            timeout: How many seconds the goodbye may take. Default: the pool's `reset_timeout`; what takes longer is cut off.

        Raises:
            TimeoutError: It took longer than `timeout`. The connection is closed all the same.
        """
        require_seconds("timeout", timeout)
        if self._state is _CLOSED:
            return
        if timeout is None:
            await self._close(self._say_goodbye)
        else:
            await self._close(lambda _: self._current_driver.close(timeout))

    async def _say_goodbye(self, _connection: AnyConnection) -> None:
        with contextlib.suppress(TimeoutError):  # it was cut off
            await self._current_driver.close(self._leases.reset_timeout)

    async def _close(self, execute: Callable[[AnyConnection], Awaitable[None]]) -> None:
        connection = self._peek("close")
        self._current_driver.end()
        self._state = _CLOSED  # nothing may be sent on it while it says goodbye
        try:
            await execute(connection)
        finally:
            self._end_with_connection()

    def terminate(self) -> None:
        """Close the connection without a goodbye and end the lease; the pool replaces it. It needs no running event loop.

        One that is closed, or was lost, stays so.
        """
        if self._state is _CLOSED:
            return
        self._peek("terminate")
        link = self._current_driver
        link.end()
        self._state = _CLOSED
        try:
            link.terminate()
        finally:
            self._end_with_connection()

    def is_closed(self) -> bool:
        """Whether the connection is closed, or was lost and is not replaced yet."""
        return self._state is _CLOSED or self._peek("is_closed").is_closed()

    def is_in_transaction(self) -> bool:
        """Whether a transaction is open."""
        connection = self._peek("is_in_transaction")
        return not connection.is_closed() and connection.is_in_transaction()

    def get_server_pid(self) -> int:
        """Return the process id of the server's process for this connection."""
        connection = self._peek("get_server_pid")
        return self._current_driver.pid if connection.is_closed() else connection.get_server_pid()

    def get_server_version(self) -> ServerVersion:
        """Return the server's version, as a named tuple like `sys.version_info`."""
        return self._peek("get_server_version").get_server_version()

    def get_settings(self) -> ConnectionSettings:
        """Return the connection's settings: those that the server reports, and what the driver knows of types."""
        self._peek("get_settings")
        # Not of the driver's connection: one that was lost has let go of what knows them.
        settings: ConnectionSettings = self._current_driver.protocol.get_settings()
        return settings


class _Forwarded:
    """An attribute of asyncpg's connection that a lease does not have.

    With `__getattr__` in its place, each attribute of the lease itself would take much longer to read.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, lease: ResilientConnection[Any] | None, owner: object) -> Any:
        return self if lease is None else lease._attribute(self._name)  # noqa: SLF001


for _name in dir(asyncpg.Connection):
    if not _name.startswith("__") and not hasattr(ResilientConnection, _name):
        setattr(ResilientConnection, _name, _Forwarded(_name))


def _check(options: CallOptions) -> None:
    if options.pop("exactly_once", False):  # type: ignore[typeddict-item]
        raise asyncpg.InterfaceError(
            "exactly_once=True is for the pool's methods, which make a transaction of their own; on a connection use "
            "`async for attempt in pool.transaction()` around the block"
        )
    require_seconds("deadline", options.get("deadline"))


def _add(callbacks: list[T], callback: T) -> None:
    if callback not in callbacks:
        callbacks.append(callback)


def _remove(callbacks: list[T], callback: T) -> None:
    if callback in callbacks:
        callbacks.remove(callback)


class _OfSharedSessions(ResilientConnection[RecordT]):
    """A lease of a connection that a pooler may give another session for every transaction."""

    __slots__ = ()

    async def _run(
        self,
        operation: str,
        sql: str | None,
        options: CallOptions,
        execute: Callable[..., Awaitable[T]],
        *arguments: object,
        replayable: bool = True,
    ) -> T:
        await self._require_session_for(sql)
        return await super()._run(operation, sql, options, execute, *arguments, replayable=replayable)

    async def _first(
        self,
        operation: str,
        sql: str | None,
        execute: Callable[[AnyConnection], Awaitable[T]],
        *,
        keeps: bool = False,
        keeps_session: bool = False,
    ) -> T:
        await self._require_session_for(sql)
        return await super()._first(operation, sql, execute, keeps=keeps, keeps_session=keeps_session)

    async def _require_session_for(self, sql: str | None) -> None:
        state = None if sql is None or self.is_released or self._leases.keeps_session[sql] else session_state(sql)
        if state is not None and not (state.serves_transaction and self.is_in_transaction()):
            await self._leases.require_session(state)


def _of_shared_sessions(lease_type: type[ResilientConnection[Any]]) -> type[ResilientConnection[Any]]:
    if lease_type is ResilientConnection:
        return _OfSharedSessions
    return types.new_class(
        lease_type.__name__, (_OfSharedSessions, lease_type), exec_body=lambda body: body.update({"__slots__": ()})
    )


class LeaseManager:
    """Leases connections and takes them back.

    Attributes:
        acquirer: The same.
        maintenance: Makes connections fit for the next lease.
        connector: Knows whether a pooler keeps what is left in a session.
        reset_timeout: How many seconds a rollback may take.
        sets_up: Whether the application prepares connections.
        connection_class: What the driver makes.
        read_check: Knows what a text may do. What it remembers of the server's catalog ends with the driver's caches.
        trusts_texts: Whether no reset follows a lease in which nothing was done but what leaves the session as it was.
        keeps_session: Whether a text leaves its session as it was.

    Args:
        context: The application's `setup`, and the pool's deadline.
        acquirer: Finds healthy connections.
        retry_strategy: Repeats what fails, on connections that its maintenance makes fit for the next one.
        lease_type: What leases are, but for what `connection_class` overrides.
    """

    def __init__(
        self,
        context: PoolContext,
        acquirer: Acquirer,
        retry_strategy: RetryStrategy,
        lease_type: type[ResilientConnection[Any]] = ResilientConnection,
    ) -> None:
        config = context.config
        # What the application's own function opens may be of any class.
        is_known = config.connect is None and config.connection_class is asyncpg.Connection
        self._lease_class, self._pooled_lease_class = (
            base if is_known else lease_class(base, config.connection_class)
            for base in (lease_type, _of_shared_sessions(lease_type))
        )
        self.connector = retry_strategy.connector
        self._config = config
        self.acquirer = acquirer
        self.maintenance = retry_strategy.maintenance
        self._clock = context.clock
        self.reset_timeout = config.reset_timeout
        self.sets_up = config.setup is not None
        self.connection_class = config.connection_class
        self.retry_strategy = retry_strategy
        self._retry_budget = config.retry_budget
        self._monotonic = context.clock.monotonic
        self._ping_after = config.ping_after
        self.read_check = retry_strategy.read_check
        # The application's own callbacks and statements may leave anything behind.
        self.trusts_texts = (
            config.session_reset in ("auto", "off")
            and config.setup is None
            and config.reset is None
            and not overrides_statements(config.connection_class)
        )
        self.keeps_session = self.read_check.reader.keeps_session

    @property
    def is_closing(self) -> bool:
        """Whether nothing is leased any more."""
        return self.maintenance.closing

    def reset_and_release(self, entry: PoolEntry[DriverConnection]) -> None:
        """Take back an entry whose lease has ended or did not begin, in whatever thread or event loop."""
        self.maintenance.reset_and_release_anywhere(entry)

    def begin_call(self) -> float:
        """Count an operation, and return when it began."""
        self._retry_budget.calls += 1
        return self._monotonic()

    async def lease(self, seconds: float | None, *, fail_fast: bool | None = None) -> ResilientConnection[Any]:
        """Lease a healthy connection within `seconds`."""
        started = self.begin_call()
        execution: Execution[None] | None = None
        options: CallOptions = {"idempotent": True, "deadline": seconds, "fail_fast": fail_fast}
        if self.sets_up:
            execution = self.retry_strategy.new_execution("acquire", options=options, started=started)
        while True:
            try:
                if execution is not None:
                    return await self.lease_for(execution)
                entry = self.acquirer.try_acquire(started)
                if entry is None:
                    ends, fails_fast = self.retry_strategy.limits(started, options)
                    entry = await self.acquirer.acquire(ends, fail_fast=fails_fast)
                return self.new_lease(entry, entry.resource)
            except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                failure = error
            execution = execution or self.retry_strategy.new_execution("acquire", options=options, started=started)
            await self.retry_strategy.wait_for_retry(execution, failure)

    async def lease_for(self, execution: Execution[Any]) -> ResilientConnection[Any]:
        """Lease a connection for one attempt of an operation, set up for the application. If that fails it is closed."""
        entry = self.acquirer.try_acquire(self._monotonic())
        if entry is None:
            asked = execution.operation
            entry = await self.acquirer.acquire(asked.deadline, fail_fast=asked.fail_fast)
        lease = self.new_lease(entry)
        leased = False
        try:
            await lease._attach(execution)  # noqa: SLF001
            leased = True
        finally:
            if not leased:
                self.release(lease)
        return lease

    def new_lease(
        self, entry: PoolEntry[DriverConnection], driver: DriverConnection | None = None
    ) -> ResilientConnection[Any]:
        """Make a lease of an entry; unless it is given its connection, it is still to be attached to that, and set up."""
        pooled = entry.resource is not None and entry.resource.is_pooled
        lease = (self._pooled_lease_class if pooled else self._lease_class)(self, entry)
        if driver is not None:
            driver.attach_proxy(lease)
            lease._driver = driver  # noqa: SLF001
        return lease

    async def attach(self, lease: ResilientConnection[Any], execution: Execution[Any]) -> None:
        """Attach a new lease to its connection, and let the application set it up."""
        await lease._attach(execution)  # noqa: SLF001

    def is_ready(self, entry: PoolEntry[DriverConnection] | None, driver: DriverConnection, now: float) -> bool:
        """Whether the connection of a lease can be used as it is, at an instant on the line of `Clock.monotonic()`."""
        if entry is None or entry.resource is not driver:
            return False
        # What was looked at when it was leased, a moment ago, is not looked at again.
        is_known = now - entry.taken_at_monotonic < _A_MOMENT and driver.is_usable
        return is_known or self.acquirer.is_ready(entry, now)

    async def set_up(self, lease: ResilientConnection[Any], deadline: float | None) -> None:
        """Let the application prepare a connection until `deadline`."""
        if self._config.setup is None:
            return
        left = None if deadline is None else max(deadline - self._clock.monotonic(), 0.0)
        with anyio.move_on_after(left) as scope:
            await answer_of(self._config.setup(lease), "setup")
        if scope.cancelled_caught:
            raise AcquireTimeoutError(
                f"setup= did not end within the {left:.3g} s that were left of the time to acquire a connection; "
                "raise timeout or deadline, or bound what it does"
            )

    async def require_session(self, state: SessionState) -> None:
        """Refuse what a pooler would leave in a session that is another client's next.

        Raises:
            asyncpg.InterfaceError: It was seen that the pooler gives sessions away with every transaction.
        """
        if not await self.connector.keeps_session_state():
            raise asyncpg.InterfaceError(
                f"{state.name} was not sent: a pooler in transaction mode gives this connection another session for every "
                f"transaction, and its next client would have what this leaves behind; {state.instead}or connect to the "
                "server, or to a pooler in session mode, with a pool of its own"
            )

    def is_untouched(
        self, execution: Execution[T] | None, error: Exception | None = None, *, harmless: bool = False
    ) -> bool:
        """Whether an operation that did not succeed cannot have left anything in the session of its last attempt.

        Args:
            execution: The operation and its last attempt.
            error: What it raised; `None` if it was cancelled.
            harmless: Whether it leaves nothing behind when it fails, whatever its text.
        """
        if (
            execution is None
            or execution.attempt.phase is not Phase.EXECUTE
            or execution.attempt.driver is None
            or not execution.attempt.driver.is_usable
        ):
            return True  # a connection that was lost has nothing to lose any more
        if error is None or isinstance(error, TimeoutError) or execution.attempt.driver.connection.is_in_transaction():
            return False
        # An error undoes a whole statement, but not what its functions did outside of the transaction: a lock.
        refused = isinstance(error, asyncpg.PostgresError)
        return harmless or (
            refused
            and execution.operation.sql is not None
            and self.read_check.reader.is_plain_read(execution.operation.sql)
        )

    def owns(self, lease: ResilientConnection[Any]) -> bool:
        """Whether a connection was leased here."""
        return lease._leases is self  # noqa: SLF001

    def pin(self, lease: ResilientConnection[Any], sent: Callable[[str | None], None]) -> None:
        """Keep the present connection of a lease to the end, and its place in the pool, also when the connection is lost.

        Args:
            lease: The lease.
            sent: Called with the text of everything that is sent on it; `None` stands for what may be anything.
        """
        lease._pin(sent)  # noqa: SLF001

    def end_lease(self, lease: ResilientConnection[Any]) -> PoolEntry[DriverConnection] | None:
        """End a lease and return its entry; `None` if that came back before. `release` is still to be called."""
        return lease._end_lease()  # noqa: SLF001

    def release(
        self, lease: ResilientConnection[Any], seconds: float | None = None, *, keeps: bool = True
    ) -> asyncio.Task[None] | None:
        """End a lease; unless its session is as it was, the connection is reset in the background: that can be waited for.

        Args:
            lease: The lease.
            seconds: How long the reset may take; by default the pool's `reset_timeout`.
            keeps: Whether the lease knows of all that was done on its connection.
        """
        entry = lease._end_lease()  # noqa: SLF001
        reset, keeps = None, keeps and lease._left_session_alone  # noqa: SLF001
        try:
            lease._detach_driver()  # noqa: SLF001
        finally:
            # What was asked long ago vouches for nothing: the reset asks again, and no caller waits for that.
            if entry is not None and keeps and self._monotonic() - entry.taken_at_monotonic < self._ping_after:
                self.acquirer.release(entry)
            elif entry is not None:
                reset = self.maintenance.reset_and_release(entry, seconds)
        return reset

    # What asyncpg asks of the pool behind a connection when the schema has changed.

    def _drop_statement_cache(self) -> None:
        self.read_check.forget()
        for driver in self.maintenance.connections():
            driver.drop_statement_cache()

    def _drop_type_cache(self) -> None:
        self.read_check.forget()
        for driver in self.maintenance.connections():
            driver.drop_type_cache()
