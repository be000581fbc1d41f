"""One driver connection, and all that needs asyncpg's internals: socket, options, liveness, listeners."""

from __future__ import annotations

import asyncio
import asyncio.trsock
import contextlib
import inspect
import itertools
import os
import re
import secrets
import select
import socket
import traceback
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import anyio
import asyncpg
from asyncpg.connection import _ConnectionProxy

from resilient_pool.pooling import reset_text
from resilient_pool.pooling.callbacks import answer_of
from resilient_pool.retry.classifier import reports_closed_connection
from resilient_pool.retry.commit_status import Capabilities

ConnectionProxy = _ConnectionProxy
"""The base that makes `isinstance(lease, asyncpg.Connection)` true."""

AnyConnection: TypeAlias = "asyncpg.Connection[Any]"
T = TypeVar("T")

# Turns of the event loop granted to a socket that has something to read. At most 5 were needed to see a loss through
# to its end (asyncio with TLS; 3 on uvloop).
_TURNS = 32
# How long an operation that was cancelled may take to end.
_CUT = 0.5
# What Linux takes: milliseconds in a C int, and seconds. One that it refuses would leave the options after it unset.
_LONGEST_USER_TIMEOUT, _LONGEST_PROBE = 2**31 - 1, 32_767
# So much later than the driver's own time limit an operation is ended that does not end by itself.
_LATER = 0.1
# macOS and Windows know no POLLRDHUP; there an orderly close shows as readable, and is found by letting the loop read.
_RDHUP: int = getattr(select, "POLLRDHUP", 0)
_DEAD = _RDHUP | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)
_WATCHED = getattr(select, "POLLIN", 0) | _RDHUP
# A server takes no notice of a request to cancel that overtakes its statement. So long after it is sent again.
_CANCEL_AGAIN = 0.5

_ROLES = "SELECT session_user::text, current_user::text"

_BACKEND_PID = "SELECT pg_catalog.pg_backend_pid()"
_IN_RECOVERY = "SELECT pg_catalog.pg_is_in_recovery()"
_LIMITS = """
    SELECT EXTRACT(epoch FROM pg_catalog.current_setting('idle_session_timeout', true)::interval)::float8,
           EXTRACT(epoch FROM pg_catalog.current_setting('idle_in_transaction_session_timeout', true)::interval)::float8,
           EXTRACT(epoch FROM pg_catalog.current_setting('transaction_timeout', true)::interval)::float8
"""
_SERVER_INFO = ", ".join((_BACKEND_PID, _IN_RECOVERY.removeprefix("SELECT "), _LIMITS.strip().removeprefix("SELECT ")))
_LISTENED_TO = """
    SELECT pg_catalog.count(*) FROM pg_catalog.pg_listening_channels() AS channel
    WHERE channel OPERATOR(pg_catalog.=) ANY($1::pg_catalog.text[])
"""
# Whether read-only is the default, and whether by what every server has alike: the session, the role or the database.
_READ_ONLY = """
    SELECT pg_catalog.pg_is_in_recovery(), setting = 'on',
           setting = 'on' AND source NOT IN ('default', 'environment variable', 'configuration file', 'command line')
    FROM pg_catalog.pg_settings WHERE name = 'default_transaction_read_only'
"""
_STATEMENTS = (
    "_execute",
    "_executemany",
    "copy_from_query",
    "copy_from_table",
    "copy_records_to_table",
    "copy_to_table",
    "execute",
    "executemany",
    "fetch",
    "fetchmany",
    "fetchrow",
    "fetchval",
)
# For how many seconds a server that has refused a write is asked why.
_ASK_LIMIT = 2.0

_BACKEND = """
    SELECT pg_catalog.pg_backend_pid(), EXTRACT(epoch FROM pg_catalog.clock_timestamp() - backend_start)::float8
    FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What stands at the other end, asked once per pool.

    Attributes:
        version: The server's major version.
        in_recovery: Whether it is a standby.
        idle_session_timeout: After how many idle seconds it closes a session; `None` or 0 for never.
        idle_in_transaction_session_timeout: Likewise, for a session that is idle in a transaction.
        transaction_timeout: After how many seconds it ends a transaction, and the session; `None` or 0 for never.
        handshake_pid: The process id given in the handshake.
        backend_pid: The process id of the process that answered.
        keeps_session: Whether what made the handshake in the server's place was seen to keep one server session for each of
            its clients, as Neon's proxy does.
        refused_by: The address, as it was dialled, of a server that has refused to say some of it; another one may say it.
    """

    version: int
    in_recovery: bool
    idle_session_timeout: float | None
    idle_in_transaction_session_timeout: float | None = None
    transaction_timeout: float | None = None
    handshake_pid: int
    backend_pid: int
    keeps_session: bool = False
    refused_by: object = None

    @property
    def has_proxy(self) -> bool:
        """Whether something else than the backend made the handshake."""
        return self.handshake_pid != self.backend_pid

    @property
    def has_pooler(self) -> bool:
        """Whether the next transaction may be another server session's."""
        return self.has_proxy and not self.keeps_session


class LeaseProxy(Protocol):
    """The proxy that an application holds in place of a leased connection."""

    def _release_on_close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOnly:
    """Why a server has refused to write.

    Attributes:
        in_recovery: Whether it was a standby; `None` if that is not certain.
        asked: Whether read-only is the default of the session, the role or the database, as on any other server.
    """

    in_recovery: bool | None = None
    asked: bool = False


def _always_readable(_timeout: int) -> list[tuple[int, int]]:
    return [(-1, 0)]


class DriverConnection:
    """One open connection, seen from below.

    Attributes:
        connection: The driver's connection.
        invalidated: Whether it must not be used again; it is closed when it is given back.
        is_customized: Whether an application's class may send more than one statement where one is asked for.
        is_pooled: Whether a pooler may let another server answer from one query to the next.
        read_only: Why it has refused to write, if it was asked.
        numbers_transactions: Whether ids of transactions mean something on its server.
        has_catalog: Whether its server has not refused to be asked, from its catalog, what a text can do.
        has_served: Whether it has answered anything since it was opened, or was closed by the application itself.
        ended: Whether the application closed it itself.
        capabilities: What can be asked about transactions on it; `None` until that was found out.
        opened_at: When it was opened, on the line of `Clock.monotonic()`.
        pid: The process id the server gave in the handshake.
        protocol: The driver's protocol. The driver itself lets go of it when the connection is closed.
        connection_info: What adapters keep with it.
        session_info: What adapters keep with it until its session is reset.
    """

    __slots__ = (
        "__weakref__",
        "_asks_its_class",
        "_forgotten",
        "_is_resettable",
        "_poll",
        "_proxy",
        "_reset_roles",
        "_reset_session",
        "_was_standby",
        "capabilities",
        "connection",
        "connection_info",
        "ended",
        "has_catalog",
        "has_served",
        "invalidated",
        "is_customized",
        "is_pooled",
        "numbers_transactions",
        "opened_at",
        "pid",
        "protocol",
        "read_only",
        "session_info",
    )

    def __init__(self, connection: AnyConnection) -> None:
        self.connection = connection
        self.invalidated = False
        self.has_served = False
        self.has_catalog = True
        self.numbers_transactions = numbers_transactions(connection)
        self.ended = False
        self.opened_at = 0.0
        self.capabilities: Capabilities | None = None
        self.is_pooled = False
        self.read_only: ReadOnly | None = None
        self._was_standby = getattr(connection.get_settings(), "in_hot_standby", None) == "on"
        self.connection_info: dict[object, Any] = {}
        self.session_info: dict[object, Any] = {}
        self.pid = connection.get_server_pid()
        self.is_customized = overrides_statements(type(connection))
        self._asks_its_class = type(connection).is_closed is not asyncpg.Connection.is_closed
        self.protocol: Any = connection._protocol  # type: ignore[attr-defined] # noqa: SLF001
        self._poll = self._watch()
        self._proxy: LeaseProxy | None = None
        self._forgotten: list[Any] = []
        inside: Any = connection
        if hasattr(connection, "_pool_holder"):
            # From asyncpg 0.32 on a connection that is closed reports it here; before, to what holds its proxy.
            inside._pool_holder = weakref.ref(self)  # noqa: SLF001
        let_go = partial(_let_go, inside._protocol, inside._stmt_cache, inside._loop)  # noqa: SLF001
        asyncpg.Connection.add_termination_listener(connection, let_go)
        self._reset_roles: tuple[str, ...] = ()
        self._reset_session: tuple[str, ...] = ()
        self._is_resettable = True
        capabilities: Any = connection._server_caps  # type: ignore[attr-defined] # noqa: SLF001
        # Redshift and CrateDB lack one of the two. CockroachDB has what asyncpg does not ask it for.
        if capabilities.sql_reset and capabilities.plpgsql:
            query: str = asyncpg.Connection.get_reset_query(connection)
            self._reset_with(reset_text.ROLES, reset_text.statements_of(query))
        elif hasattr(connection.get_settings(), "crdb_version"):
            self._reset_with(reset_text.ROLES, reset_text.POSTGRESQL)

    def _reset_with(self, roles: tuple[str, ...], session: tuple[str, ...]) -> None:
        # In the query that asyncpg keeps, so that the driver's own reset() sends it too, in one round trip.
        connection: Any = self.connection
        connection._reset_query = reset_text.as_text((*roles, *session))  # noqa: SLF001
        self._reset_roles, self._reset_session = roles, session

    def __repr__(self) -> str:
        state = "closed" if self.connection.is_closed() else "open"
        return f"<DriverConnection pid={self.pid} {state}{' invalidated' if self.invalidated else ''}>"

    def _watch(self) -> Callable[[int], list[tuple[int, int]]]:
        fd = self._fd()
        if fd is None or not hasattr(select, "poll"):
            return _always_readable
        poll = select.poll()
        poll.register(fd, _WATCHED)
        return poll.poll

    def _fd(self) -> int | None:
        transport = getattr(self.connection, "_transport", None)
        sock = None if transport is None else transport.get_extra_info("socket")
        return None if sock is None else int(sock.fileno())

    @property
    def queries(self) -> int:
        """How many queries were sent on this connection."""
        return int(self.protocol.queries_count)

    @property
    def is_usable(self) -> bool:
        """Whether the connection is open and wanted."""
        connection: Any = self.connection
        if self.invalidated or self._asks_its_class:
            return not (self.invalidated or connection.is_closed())
        return self.protocol.is_connected() and not connection._aborted  # noqa: SLF001

    @property
    def is_cancelling(self) -> bool:
        """Whether the driver waits for the server to cancel a statement."""
        return self.is_usable and bool(self.protocol._is_cancelling() or self.connection._cancellations)  # type: ignore[attr-defined] # noqa: SLF001

    @property
    def is_at_rest(self) -> bool:
        """Whether no transaction is open, no cancellation is waited for, and the class sends what it is asked to send."""
        connection: Any = self.connection
        protocol = self.protocol
        return not (
            self.is_customized
            or connection._top_xact is not None  # noqa: SLF001
            or protocol.is_in_transaction()
            or protocol._is_cancelling()  # noqa: SLF001
            or connection._cancellations  # noqa: SLF001
        )

    def socket_is_idle(self) -> bool:
        """Whether the connection is open and wanted and nothing at all has happened to its socket. About a microsecond."""
        connection: Any = self.connection
        if self.invalidated or self._asks_its_class:  # the driver's own `is_closed` is asked in one step less
            return not (self.invalidated or connection.is_closed() or self._poll(0))
        return not (connection._aborted or not self.protocol.is_connected() or self._poll(0))  # noqa: SLF001

    async def drain_socket(self) -> bool:
        """Let the loop read until the socket is quiet or the connection closed, and say whether it can be used.

        Something to read is not a loss: a notification, a setting that changed, a record of TLS. No operation may be
        started in between: it would fail half-way.
        """
        for _ in range(_TURNS):
            if self.connection.is_closed():
                return False
            events = self._poll(0)
            if not events:
                return True
            if events[0][1] & _DEAD:
                return False
            await asyncio.sleep(0)
        return self._poll is _always_readable

    async def ping(self, seconds: float) -> bool:
        """Make one round trip, and say whether it was answered in time."""
        try:
            # The driver's own time limit leaves out, before asyncpg 0.32, the wait for an earlier cancellation.
            async with asyncio.timeout(seconds):
                # Not an empty statement: asyncpg 0.32 raises AttributeError on its answer.
                await asyncpg.Connection.execute(self.connection, "SELECT 1")
        except Exception:  # noqa: BLE001 - whatever it is, there was no answer
            return False
        return True

    async def end_of_cancellation(self, seconds: float) -> None:
        """Wait until the server has confirmed a cancellation; hang up if that takes longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await wait_for_cancellation(self.connection)
        except TimeoutError:
            self.terminate()

    async def restore(
        self, reset: Callable[[AnyConnection], Awaitable[None]] | None, seconds: float, *, watched: bool
    ) -> None:
        """Wait for a pending cancellation, then reset the session, all within a time limit.

        Args:
            reset: The application's own reset; `None` for the driver's.
            seconds: The limit.
            watched: Whether the caller cancels what takes longer. Then a reset in one query is spared the limit's cost.

        Raises:
            TimeoutError: It took longer.
            Exception: Whatever the driver or the application's reset raises. The session is then in an unknown state.
        """
        connection: Any = self.connection
        protocol = connection._protocol  # noqa: SLF001
        self.session_info.clear()
        if not self._is_resettable:
            raise asyncpg.InterfaceError("the server does not say which role init= has left the session with")
        is_cancelling = protocol._is_cancelling() or connection._cancellations  # noqa: SLF001
        if reset is None and not is_cancelling and self._resets_in_one_query():
            # What follows every write: the same, without a time limit of the driver's kind around it.
            await connection._reset()  # noqa: SLF001
            await self._send_reset(timeout=None if watched else seconds)
            return
        with anyio.fail_after(seconds):
            await wait_for_cancellation(connection)
            if reset is None and type(connection).reset is not asyncpg.Connection.reset:
                await connection.reset(timeout=seconds)
                return
            await connection._reset()  # noqa: SLF001
            await self._send_reset(only_roles=reset is not None)
            if reset is not None:
                await answer_of(reset(connection), "reset")

    def _reset_query(self) -> str:
        query: str = self.connection.get_reset_query()
        roles = reset_text.as_text(self._reset_roles)
        # An application's class may have a query of its own, or none.
        return query if not query or query.startswith(roles) else f"{roles}\n{query}"

    async def _send_reset(self, *, only_roles: bool = False, timeout: float | None = None) -> None:
        """Reset the session, from now on without what the server refuses, of our own text, because it has no such thing."""
        connection: Any = self.connection
        execute = partial(asyncpg.Connection.execute, connection)
        text = reset_text.as_text(self._reset_roles) if only_roles else self._reset_query()
        try:
            if text:
                await execute(text, timeout=timeout)
        except asyncpg.PostgresError as error:
            if (
                connection.is_closed()
                or not self._reset_roles + self._reset_session
                or not reset_text.is_lacking(error)
            ):
                raise
        else:
            return
        with anyio.fail_after(timeout):
            self._reset_with(await reset_text.execute_each(execute, self._reset_roles), self._reset_session)
            if only_roles:
                return
            if type(connection).get_reset_query is not asyncpg.Connection.get_reset_query:
                await execute(connection.get_reset_query())
            else:
                self._reset_with(self._reset_roles, await reset_text.execute_each(execute, self._reset_session))

    async def keep_roles(self) -> None:
        """Take the role that the session has now, rather than the one it logged in with, for the one to return to.

        An application's `init` may have set it, and a reset must not give back what it took away.
        """
        if not self._reset_roles:
            return
        try:
            with self._uncached():
                user, role = await asyncpg.Connection.fetchrow(self.connection, _ROLES)  # type: ignore[misc]
        except asyncpg.PostgresError as error:
            if self.connection.is_closed() or not reset_text.is_lacking(error):
                raise
            self._is_resettable = False
            return
        if role != user or user != self.connection._params.user:  # type: ignore[attr-defined] # noqa: SLF001
            role = "NONE" if role == user else _quoted(role)
            roles = (f"SET SESSION AUTHORIZATION {_quoted(user)}", f"SET ROLE {role}")
            self._reset_with(roles, self._reset_session)

    def _resets_in_one_query(self) -> bool:
        # In a transaction there is a ROLLBACK before. And what an application's class does instead is not to be guessed.
        connection: Any = self.connection
        return (
            type(connection).reset is asyncpg.Connection.reset
            and connection._top_xact is None  # noqa: SLF001
            and not connection.is_in_transaction()
            and bool(connection.get_reset_query())
        )

    def end(self) -> None:
        """Take note that the application closes the connection itself: nothing is wrong with the server then."""
        if self.is_usable:
            self.ended = self.has_served = True

    async def close(self, seconds: float) -> None:
        """Say goodbye to the server; after `seconds` without an end, hang up.

        Raises:
            TimeoutError: It took longer, also for an earlier cancellation.
            Exception: Whatever the driver raises. The connection is closed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self.connection.close(timeout=seconds)
        except Exception:
            self.terminate()
            raise

    def terminate(self) -> None:
        """Hang up at once, unless that was done already. It needs no event loop."""
        inside: Any = self.connection
        if inside._aborted:  # noqa: SLF001
            return
        transport: Any = getattr(inside, "_transport", None)
        try:
            if inside.is_closed():
                # By what the server said last: the socket's end is still to come, if it ever does, and when it comes the
                # driver does not find a connection any more to let go of its statements, whose timers last for minutes.
                inside._abort()  # noqa: SLF001
                asyncpg.Connection.terminate(inside)
            else:
                inside.terminate()
        except RuntimeError:
            # Its event loop is closed. asyncio's own leaves sockets open then; uvloop's has closed them.
            sock = transport.get_extra_info("socket")
            if isinstance(sock, asyncio.trsock.TransportSocket):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def disown(self) -> None:
        """Never touch the connection again: in a forked process it is the parent's, and so is what the loop polls."""
        self.invalidated = True
        self.connection._aborted = True  # type: ignore[attr-defined] # noqa: SLF001

    @property
    def address(self) -> object:
        """Where the connection leads, as it was dialled: a host's name and port, or a socket's path."""
        return self.connection._addr  # type: ignore[attr-defined] # noqa: SLF001

    async def fetch_server_info(self, seconds: float | None) -> ServerInfo:
        """Ask, in one query that is safe behind any pooler and within `seconds`, what stands at the other end."""
        refused_by = None
        try:
            with self._uncached():
                row = await asyncpg.Connection.fetchrow(self.connection, _SERVER_INFO, timeout=seconds)
        except asyncpg.PostgresError:
            # Databases that only speak PostgreSQL's protocol lack some of these functions, but not the same ones.
            if self.connection.is_closed():
                raise
            row, refused_by = await self._fetch_what_there_is(seconds), self.address
        backend_pid, in_recovery, idle, idle_in_transaction, transaction = row or (self.pid, False, None, None, None)
        return ServerInfo(
            version=self.connection.get_server_version().major,
            in_recovery=in_recovery,
            idle_session_timeout=idle,
            idle_in_transaction_session_timeout=idle_in_transaction,
            transaction_timeout=transaction,
            handshake_pid=self.pid,
            backend_pid=backend_pid,
            refused_by=refused_by,
        )

    async def _fetch_what_there_is(self, seconds: float | None) -> tuple[Any, ...]:
        found: list[Any] = []
        for query, absent in ((_BACKEND_PID, (self.pid,)), (_IN_RECOVERY, (False,)), (_LIMITS, (None, None, None))):
            try:
                with self._uncached():
                    row = await asyncpg.Connection.fetchrow(self.connection, query, timeout=seconds)
            except asyncpg.PostgresError:
                if self.connection.is_closed():
                    raise
                row = None
            found.extend(row or absent)
        return tuple(found)

    async def learn_why_read_only(self) -> None:
        """Find out, after the server has refused a write (25006), whether it was a standby, or was asked to be read-only.

        A server from 14 on reports with each answer whether it is a standby: one that says it is not needs no question. What
        it answers later is certain only if it explains the refusal: it may have been promoted meanwhile, which a transaction that
        was begun before does not notice, and behind a pooler another server may answer.
        """
        self.read_only = ReadOnly()
        reported = None
        try:
            if not self.is_pooled:
                reported = getattr(self.connection.get_settings(), "in_hot_standby", None)
            if reported == "off" and not self._was_standby:
                self.read_only = ReadOnly(in_recovery=False)
                return
            with self._uncached():
                row = await self.connection.fetchrow(_READ_ONLY, timeout=_ASK_LIMIT)
        except Exception:  # noqa: BLE001 - whatever it is, there was no answer
            row = None
        in_recovery, is_default, asked = row or (None, False, False)
        if reported == "on":
            in_recovery = True
        elif in_recovery is False and not is_default:
            in_recovery = None
        self.read_only = ReadOnly(in_recovery=in_recovery, asked=asked)

    async def execute(self, command: str, *, timeout: float | None = None) -> None:
        """Send a command of the pool's own, past what an application's connection class makes of `execute()`."""
        await asyncpg.Connection.execute(self.connection, command, timeout=timeout)

    async def fetchval_uncached(self, query: str, *args: object, timeout: float | None = None) -> Any:
        """Ask for one value in a query that is safe behind any pooler."""
        with self._uncached():
            return await self.connection.fetchval(query, *args, timeout=timeout)

    async def backend(self, seconds: float) -> tuple[int, float] | None:
        """Ask which server process answers now, and how many seconds ago it began; `None` if that cannot be known."""
        try:
            with self._uncached():
                row = await self.connection.fetchrow(_BACKEND, timeout=seconds)
        except asyncpg.PostgresError:
            return None
        return None if row is None or row[1] is None else (row[0], row[1])

    @contextlib.contextmanager
    def _uncached(self) -> Iterator[None]:
        # Without its cache the driver prepares under no name and in the same message as it executes: all that a pooler
        # in transaction mode allows.
        connection: Any = self.connection
        enabled = connection._stmt_cache_enabled  # noqa: SLF001
        connection._stmt_cache_enabled = False  # noqa: SLF001
        try:
            yield
        finally:
            connection._stmt_cache_enabled = enabled  # noqa: SLF001

    def disable_statement_cache(self) -> None:
        """Prepare under no name from now on."""
        self.connection._stmt_cache_enabled = False  # type: ignore[attr-defined] # noqa: SLF001

    def drop_statement_cache(self) -> None:
        """Forget the prepared statements; what a lease is just about to use is not closed before the lease has ended.

        A statement that is not used by anything yet is closed by the driver as soon as it leaves the cache: also while the
        driver is still preparing it for a cursor, which then finds it closed.
        """
        connection: Any = self.connection
        if self._proxy is not None:
            for statement in connection._stmt_cache.iter_statements():  # noqa: SLF001
                statement.attach()
                self._forgotten.append(statement)
        connection._drop_local_statement_cache()  # noqa: SLF001

    def _close_forgotten(self) -> None:
        # As the driver's `_maybe_gc_stmt`, but also where a younger statement of the same text is in the cache by now.
        connection: Any = self.connection
        while self._forgotten:
            statement = self._forgotten.pop()
            statement.detach()
            if not statement.refs and statement.name:
                statement.mark_closed()
                connection._stmts_to_close.add(statement)  # noqa: SLF001

    def drop_type_cache(self) -> None:
        """Forget what is known of types."""
        self.connection._drop_local_type_cache()  # type: ignore[attr-defined] # noqa: SLF001

    def attach_proxy(self, proxy: LeaseProxy) -> None:
        """Make `proxy` this connection's: listeners are called with it, and it is notified when the connection is closed."""
        connection: Any = self.connection
        if connection._proxy is not None:  # noqa: SLF001
            connection._set_proxy(proxy)  # noqa: SLF001 - it says what is wrong
        self._proxy = connection._proxy = proxy  # noqa: SLF001

    def detach_proxy(self, proxy: LeaseProxy) -> None:
        """End a lease: what was made in it becomes invalid, listeners left behind are warned of. Nothing, if it has ended."""
        connection: Any = self.connection
        if self._proxy is not proxy:
            return
        self._proxy = connection._proxy = None  # noqa: SLF001
        if self._forgotten:
            self._close_forgotten()
        if connection._listeners or connection._log_listeners:  # noqa: SLF001
            connection._on_release()  # noqa: SLF001
        else:
            connection._pool_release_ctr += 1  # noqa: SLF001 - all that it does then

    def drop_proxy(self, proxy: LeaseProxy) -> None:
        """End a lease of a connection that is closed. Nothing, if it has ended."""
        if self._proxy is proxy:
            self._proxy = None
            self._close_forgotten()
            self.connection._set_proxy(None)  # type: ignore[attr-defined] # noqa: SLF001

    @property
    def _con(self) -> AnyConnection:
        return self.connection

    def _release_on_close(self) -> None:
        if self._proxy is not None:
            self._proxy._release_on_close()  # noqa: SLF001

    async def listen(
        self, channels: Iterable[str], callback: Callable[[Any, int, str, Any], None], *, timeout: float
    ) -> None:
        """Listen to channels, one after the other, all within a time limit."""
        async with asyncio.timeout(timeout):
            for channel in channels:
                await asyncpg.Connection.add_listener(self.connection, channel, callback)

    async def listens_to(self, channels: Collection[str], *, timeout: float | None) -> bool:
        """Ask whether the session listens to all channels. A server that answers, but does not know, is believed to."""
        try:
            number = await self.fetchval_uncached(_LISTENED_TO, list(channels), timeout=timeout)
        except asyncpg.PostgresError:
            if self.connection.is_closed():
                raise
            return True
        return bool(number == len(channels))

    def add_query_logger(self, callback: Any) -> bool:
        """Log queries to `callback`, and say whether they were not logged to it already."""
        connection: Any = self.connection
        before = len(connection._query_loggers)  # noqa: SLF001
        connection.add_query_logger(callback)
        return len(connection._query_loggers) > before  # noqa: SLF001

    def call_soon(self, callbacks: list[Any], argument: object) -> None:
        """Call functions and coroutine functions in the connection's event loop, unless it is closed."""
        loop: asyncio.AbstractEventLoop = self.connection._loop  # type: ignore[attr-defined] # noqa: SLF001
        if loop.is_closed():
            return
        for callback in callbacks:
            if inspect.iscoroutinefunction(callback):
                loop.create_task(callback(argument))
            else:
                loop.call_soon(callback, argument)

    async def begin(self, *, isolation: str | None, readonly: bool, deferrable: bool) -> None:
        """Begin a transaction, within which the driver's own `transaction()` makes savepoints."""
        transaction: Any = asyncpg.Connection.transaction(
            self.connection,
            isolation=isolation,  # type: ignore[arg-type]
            readonly=readonly,
            deferrable=deferrable,
        )
        transaction._managed = True  # noqa: SLF001 - otherwise a reset that finds it open complains to the event loop
        await transaction.start()

    async def end_transaction(self, command: str, *, timeout: float | None = None) -> str:
        """Send COMMIT or ROLLBACK for what `begin()` began, and return what the server says that it did.

        Raises:
            TimeoutError: It took longer than `timeout` seconds, also for an earlier cancellation. The connection is closed.
        """
        self.connection._top_xact = None  # type: ignore[attr-defined] # noqa: SLF001
        if timeout is None:
            return await asyncpg.Connection.execute(self.connection, command)
        try:
            async with asyncio.timeout(timeout):
                await wait_for_cancellation(self.connection)
                return await asyncpg.Connection.execute(self.connection, command)
        except TimeoutError:
            self.terminate()
            raise

    def set_socket_options(self, *, keepalive: bool, user_timeout: float | None) -> None:
        """Let the kernel notice a peer that vanished. asyncpg sets neither option; unix sockets need none.

        Args:
            keepalive: Whether to probe an idle peer: after half of `user_timeout`, three times within the other half.
            user_timeout: After how many seconds unacknowledged data ends the connection; `None` for the kernel's own.
        """
        fd = self._fd()
        if fd is None:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                return
            for option, value in _socket_options(keepalive=keepalive, user_timeout=user_timeout):
                sock.setsockopt(*option, value)


def _socket_options(*, keepalive: bool, user_timeout: float | None) -> Iterator[tuple[tuple[int, int], int]]:
    # Names that the operating system does not have are left out.
    def tcp(name: str, value: float, most: int = _LONGEST_PROBE) -> Iterator[tuple[tuple[int, int], int]]:
        if hasattr(socket, name):
            yield (socket.IPPROTO_TCP, getattr(socket, name)), max(1, int(min(value, most)))

    if user_timeout is not None:
        yield from tcp("TCP_USER_TIMEOUT", user_timeout * 1000, _LONGEST_USER_TIMEOUT)
    if keepalive:
        whole = 30.0 if user_timeout is None else user_timeout
        yield (socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1
        yield from tcp("TCP_KEEPIDLE", whole / 2)
        yield from tcp("TCP_KEEPINTVL", whole / 6)
        yield from tcp("TCP_KEEPCNT", 3)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


# Where asyncpg 0.30 to 0.32 looks before it writes: `_check_state` and `_check_open`, `_ensure_connected`, and `_set_state` for
# a state in which an operation begins. The other states are entered by an answer.
_CLOSED = r"connection is closed$"
_NOT_BEGUN = r"^(not connected$|cannot switch to state (1[1-8]|21); )"


def _let_go(protocol: Any, statements: Any, loop: asyncio.AbstractEventLoop, _connection: object) -> None:
    # Later, for what can be cut short is better off: on asyncio's loop all that is left would be written to nowhere.
    def let_go() -> None:
        # The driver leaves those waiting for ever who wait until they may write: `executemany()` of a prepared statement, say.
        protocol.resume_writing()
        # A statement that was prepared in the turn in which the connection was lost has come into the cache since it was
        # emptied, with a timer that would keep the connection's memory for minutes.
        statements.clear()

    loop.call_later(_CUT, let_go)


# The versions of asyncpg on which both ways were seen to do the same.
_VERSIONS_WITH_A_SHORT_WAY = ("0.30", "0.31", "0.32")
_ON_THE_WAY = (
    "fetch",
    "fetchrow",
    "fetchval",
    "execute",
    "_execute",
    "_Connection__execute",
    "_do_execute",
    "_get_statement",
)


def _plain(name: str) -> Any:
    """Return a method of asyncpg's connection, or `None` if something has taken its place: an instrumentation, say."""
    method = vars(_Connection).get(name)
    return method if type(method) is type(_plain) and method.__module__ == "asyncpg.connection" else None


def _has_short_way() -> bool:
    tested = asyncpg.__version__.startswith(tuple(f"{version}." for version in _VERSIONS_WITH_A_SHORT_WAY))
    return tested and None not in _ORIGINALS


_Connection: Any = asyncpg.connection.Connection
_ORIGINALS = tuple(map(_plain, _ON_THE_WAY))
# What takes the place of a method may well be equal to it, but is not the same.
_FETCH, _FETCHROW, _FETCHVAL, _EXECUTE, _INNER_EXECUTE, _INNERMOST_EXECUTE, _DO_EXECUTE, _GET_STATEMENT = _ORIGINALS
_HAS_SHORT_WAY = _has_short_way()


def _cached_statement(connection: Any, query: str, timeout: float | None, record_class: Any) -> Any:
    """Return the statement that the driver has cached, if giving it to the protocol is certain to mean the same as asking.

    It is where the connection, and each of its methods on the way, is asyncpg's own of a known version, nothing else is under
    way, and no time limit and no logger of queries is to be heeded. What replaces methods of the protocol is met on both ways.
    The first method on the way is the caller's to compare.
    """
    kind = _Connection
    if (
        timeout is not None
        or record_class is not None
        or not _HAS_SHORT_WAY
        or type(connection) is not kind
        or connection._query_loggers  # noqa: SLF001
        or connection._stmt_exclusive_section._acquired  # noqa: SLF001
        or connection._config.command_timeout is not None  # noqa: SLF001
        or kind._execute is not _INNER_EXECUTE  # noqa: SLF001
        or kind._Connection__execute is not _INNERMOST_EXECUTE  # noqa: SLF001
        or kind._do_execute is not _DO_EXECUTE  # noqa: SLF001
        or kind._get_statement is not _GET_STATEMENT  # noqa: SLF001
        or connection._aborted  # noqa: SLF001 - and what follows: what `is_closed` asks, in one step less
        or not connection._protocol.is_connected()  # noqa: SLF001
    ):
        return None
    return connection._stmt_cache.get((query, connection._protocol.get_record_class(), False))  # noqa: SLF001


async def _execute_cached(
    connection: Any, statement: Any, query: str, args: tuple[Any, ...], limit: int, *, return_extra: bool
) -> Any:
    """Do what `Connection._execute` does with a statement that is in the cache, in fewer steps."""
    section, protocol = connection._stmt_exclusive_section, connection._protocol  # noqa: SLF001
    if section._acquired or protocol is None:  # noqa: SLF001 - since this was called, and before it was awaited
        connection._check_open()  # noqa: SLF001
        with section:
            pass  # one of the two raises
    section._acquired = 1  # noqa: SLF001
    try:
        return await protocol.bind_execute(
            state=statement, args=args, portal_name="", limit=limit, return_extra=return_extra, timeout=None
        )
    except asyncpg.OutdatedSchemaCacheError:
        await connection.reload_schema_state()
        raise
    except asyncpg.InvalidCachedStatementError:
        connection._drop_global_statement_cache()  # noqa: SLF001
        if protocol.is_in_transaction():
            raise

        def again(statement: Any, timeout: float | None) -> Any:
            return protocol.bind_execute(
                state=statement, args=args, portal_name="", limit=limit, return_extra=return_extra, timeout=timeout
            )

        result, _ = await connection._do_execute(query, again, None, retry=False)  # noqa: SLF001
        return result
    finally:
        section._acquired = 0  # noqa: SLF001


def fetch(
    connection: AnyConnection, query: str, args: tuple[Any, ...], timeout: float | None, record_class: Any
) -> Awaitable[list[Any]]:
    """Do what `connection.fetch` does."""
    statement = _cached_statement(connection, query, timeout, record_class) if _Connection.fetch is _FETCH else None
    if statement is None:
        return connection.fetch(query, *args, timeout=timeout, record_class=record_class)
    return _execute_cached(connection, statement, query, args, 0, return_extra=False)


async def fetchrow(
    connection: AnyConnection, query: str, args: tuple[Any, ...], timeout: float | None, record_class: Any
) -> Any:
    """Do what `connection.fetchrow` does."""
    statement = (
        _cached_statement(connection, query, timeout, record_class) if _Connection.fetchrow is _FETCHROW else None
    )
    if statement is None:
        return await connection.fetchrow(query, *args, timeout=timeout, record_class=record_class)
    rows = await _execute_cached(connection, statement, query, args, 1, return_extra=False)
    return rows[0] if rows else None


async def fetchval(
    connection: AnyConnection, query: str, args: tuple[Any, ...], timeout: float | None, column: int
) -> Any:
    """Do what `connection.fetchval` does."""
    statement = _cached_statement(connection, query, timeout, None) if _Connection.fetchval is _FETCHVAL else None
    if statement is None:
        return await connection.fetchval(query, *args, column=column, timeout=timeout)
    rows = await _execute_cached(connection, statement, query, args, 1, return_extra=False)
    return rows[0][column] if rows else None


async def execute(connection: AnyConnection, query: str, args: tuple[Any, ...], timeout: float | None) -> str:
    """Do what `connection.execute` does."""
    is_short = args and _Connection.execute is _EXECUTE
    statement = _cached_statement(connection, query, timeout, None) if is_short else None
    if statement is None:
        return await connection.execute(query, *args, timeout=timeout)
    _, status, _ = await _execute_cached(connection, statement, query, args, 0, return_extra=True)
    return status.decode()  # type: ignore[no-any-return]


async def until_lost(connection: AnyConnection, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
    """Run an operation that sends much, and end it when the connection ends, its time is up or the caller is cancelled.

    The driver itself may wait for ever until it may write to a connection that is lost or to a peer that reads no more, or for
    the next piece of data to send to it; neither its time limit nor a cancellation ends that wait, and an error of uvloop's
    transport may hide it.

    Args:
        connection: Where it runs.
        work: The operation.
        timeout: The time limit that the driver was given; `None` for the connection's `command_timeout`.

    Raises:
        asyncpg.ConnectionDoesNotExistError: The connection was lost, and the driver did not notice.
        TimeoutError: The time was up, and the driver did not notice.
    """
    limit = connection._config.command_timeout if timeout is None else timeout  # type: ignore[attr-defined] # noqa: SLF001
    lost = asyncio.get_running_loop().create_future()
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(
        lambda task: task.cancelled() or task.exception()
    )  # no caller asks for that of one that was cut short

    def end(_: object) -> None:
        if not lost.done():
            lost.set_result(None)

    asyncpg.Connection.add_termination_listener(connection, end)
    try:
        left = None if limit is None else limit + _LATER
        ended, _ = await asyncio.wait((task, lost), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(_TURNS):  # what the driver notices by itself, it knows the reason of
            if not task.done():
                await asyncio.sleep(0)
    finally:
        asyncpg.Connection.remove_termination_listener(connection, end)
        cut_short = not task.done()
        if cut_short:
            await _cut_short(connection, task)
    error = None if task.cancelled() else task.exception()
    if cut_short and not ended:
        raise TimeoutError(f"it did not end within {limit:g} s") from error
    fell = error is not None and connection.is_closed() and comes_from_the_transport(error)
    if isinstance(error, asyncpg.PostgresError) or not (cut_short or fell):
        return task.result()
    raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation") from error


def comes_from_the_transport(error: BaseException) -> bool:
    """Whether the driver fell over a connection that was closed under it: it has let go of the transport, or uvloop has."""
    if not isinstance(error, RuntimeError | AttributeError):
        return False
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__", "")).startswith(("asyncpg.", "uvloop."))


async def _cut_short(connection: AnyConnection, task: asyncio.Task[Any]) -> None:
    """Cancel an operation and wait for its end; when it does not come, the connection is closed."""
    task.cancel()
    ended = False
    try:
        await asyncio.wait((task,), timeout=_CUT)
        ended = task.done() and not connection.is_closed()
    finally:
        if not ended:
            connection.terminate()
    if not task.done():
        await asyncio.wait((task,), timeout=_CUT)


class _HasSettings(Protocol):
    def get_settings(self) -> Any: ...


def numbers_transactions(connection: _HasSettings) -> bool:
    """Whether transactions have the ids that PostgreSQL's functions speak of; where they have others, those must not be asked.

    YugabyteDB has the functions, since its servers are made of PostgreSQL's, but its transactions are distributed: what a server
    says of its own ids says nothing of them, and an older one ends the session of a client that asks. CockroachDB may get them.
    """
    settings = connection.get_settings()
    return not (hasattr(settings, "crdb_version") or "-YB-" in getattr(settings, "server_version", ""))


def overrides_statements(connection_class: type[AnyConnection]) -> bool:
    """Whether a class makes something of its own of the methods that send statements."""
    return any(getattr(connection_class, name) is not getattr(asyncpg.Connection, name) for name in _STATEMENTS)


def draw_statement_names() -> None:
    """Let the driver count its names for statements on from a number that no other process has.

    The driver of each process begins with 1. Behind a pooler, in a session that had prepared the same name for another
    client, that client's statement would run; a name that no other client has is an error before anything runs.
    """
    asyncpg.connection._uid = secrets.randbits(60)  # type: ignore[attr-defined] # noqa: SLF001


async def wait_for_cancellation(connection: AnyConnection) -> None:
    """Wait until the server has confirmed the cancellation that is pending, if one is, and ask again while it does not.

    No request is under way afterwards: one that arrives late would cancel the next statement. So the connection is closed
    if this is cancelled while one is, and if the cancellation cannot be confirmed any more.
    """
    inside: Any = connection
    requests: set[asyncio.Future[None]] = inside._cancellations  # noqa: SLF001
    if connection.is_closed() or not (inside._protocol._is_cancelling() or requests):  # noqa: SLF001
        return
    confirmed = asyncio.ensure_future(inside._protocol._wait_for_cancellation())  # noqa: SLF001
    # It is not cancelled with this wait: before asyncpg 0.32 that cancels what all later operations wait for as well. Here
    # it ends with the connection.
    requests.add(confirmed)
    confirmed.add_done_callback(requests.discard)
    confirmed.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # if none waits for it any more
    while not (await asyncio.wait([confirmed], timeout=_CANCEL_AGAIN))[0]:
        if connection.is_closed():  # before asyncpg 0.32 a lost connection confirms nothing
            return
        sent = asyncio.get_running_loop().create_future()
        inside._cancel_current_command(sent)  # noqa: SLF001
        try:
            with contextlib.suppress(OSError):
                await sent
        except asyncio.CancelledError:
            connection.terminate()
            raise
    if confirmed.cancelled() or confirmed.exception() is not None:
        connection.terminate()
    # Another task may have asked as well, on a lease that was ended meanwhile.
    while left := [request for request in requests if not request.done()]:
        await asyncio.wait(left)


def nothing_sent(error: BaseException, driver: DriverConnection) -> bool:
    """Whether `error` proves that no byte of an operation left this process.

    It proves that of the one operation which raised it: nothing of what was done on the connection before, and nothing
    if it comes from within the application's own code that the driver was running, a COPY's source, say.

    asyncpg refuses to begin on a connection that is closed (measured cases B01 to B04 and C24), and on one whose server has
    spoken its last word while the socket's end is still to come (measured cases B02, B20 and D08b, executed in none).

    Args:
        error: What the operation raised, unwrapped.
        driver: The connection that it was to run on.
    """
    if type(error) is asyncpg.InterfaceError:
        refused = driver.connection.is_closed() and re.search(_CLOSED, str(error)) is not None
    else:
        refused = type(error) is asyncpg.InternalClientError and re.search(_NOT_BEGUN, str(error)) is not None
    return refused and _comes_from_the_driver(error)


def is_of_another_connection(error: BaseException, driver: DriverConnection) -> bool:
    """Whether `error` means a lost connection while this one is open: one that a COPY's source reads from, say.

    Args:
        error: What was raised while this connection was in use, unwrapped.
        driver: This connection.
    """
    if driver.connection.is_closed() or isinstance(error, TimeoutError):
        return False
    return isinstance(error, OSError) or reports_closed_connection(error)


def _comes_from_the_driver(error: BaseException) -> bool:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    within = itertools.dropwhile(lambda module: not module.startswith("asyncpg."), modules)
    return all(module.startswith("asyncpg.") for module in within)


def forget_locals(error: BaseException | None) -> None:
    """Clear the local variables of every finished frame behind `error`, along its whole chain.

    The driver's frames hold the password while a connection is being made; a report with captured locals would show it.

    What still waits there for the server's answer to the request for TLS is cancelled: a connect that is cancelled before it
    asked leaves it behind, and the event loop would complain of an exception that was never retrieved.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        each = queue.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if each.__traceback__ is not None:
            for frame, _ in traceback.walk_tb(each.__traceback__):
                answer = getattr(frame.f_locals.get("protocol"), "on_data", None)
                if isinstance(answer, asyncio.Future):
                    answer.cancel()
            traceback.clear_frames(each.__traceback__)
        queue += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            queue += each.exceptions
