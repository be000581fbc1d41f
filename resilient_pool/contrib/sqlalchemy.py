"""SQLAlchemy over resilient_pool: the dialect `postgresql+resilient`, and units of work that are repeated as a whole.

    engine = create_async_engine("postgresql+resilient://user@host/database")

    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(...))

Needs the extra `sqlalchemy`. `docs/sqlalchemy.md` says what is mapped to what.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias, TypeVar, Unpack, cast

import asyncpg
from sqlalchemy import event, exc
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import (
    AsyncAdapt_asyncpg_connection,
    AsyncAdapt_asyncpg_dbapi,
    PGDialect_asyncpg,
)
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from resilient_pool._validation import is_number, nearest, require_known, require_number, shown
from resilient_pool.config.dsn import arguments_of_dsn
from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.config.secrets import Secret
from resilient_pool.errors import AcquireTimeoutError, ConfigurationError, UnknownArgumentError
from resilient_pool.execution import adapting
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.execution.loop_control import FramePosition
from resilient_pool.execution.transaction import Attempt, RetriedTransaction, TransactionOptions
from resilient_pool.pool import ResilientPool
from resilient_pool.pooling.driver import AnyConnection, DriverConnection
from resilient_pool.single_connection import connect

T = TypeVar("T")

Lease: TypeAlias = ResilientConnection[Any]
Source: TypeAlias = "AsyncEngine | async_sessionmaker[AsyncSession] | ResilientPool[Any]"
"""Where a unit of work gets its session: what SQLAlchemy's sessions are made with, or a pool."""

_DRIVER = "postgresql+resilient"
# What SQLAlchemy's own pool allows by default.
_POOL_SIZE, _MAX_OVERFLOW = 5, 10
# How long `engine.dispose()` waits for goodbyes.
_GOODBYE = 10.0
_STATEMENT_OPTIONS = ("prepared_statement_cache_size", "prepared_statement_name_func")
_NUMBERS = {"seconds": float, "connections": int, "operations": int, "statements": int, "bytes": int}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_UNITS = {
    **{argument.name: argument.unit for argument in ARGUMENTS},
    "prepared_statement_cache_size": "statements",
    "prepared_statement_name_func": "function",
}
_AS_TEXT = frozenset(
    name
    for name, unit in _UNITS.items()
    if unit in ("str", "path", "'schema.table'") or name in ("host", "port", "ssl")
) | {"target_session_attrs", "gsslib", "session_reset"}
_SECRETS = ("password", "sslpassword", "credentials")


# Public


def engine_on(pool: ResilientPool[Any], **options: Any) -> AsyncEngine:
    """Make an engine whose connections are leases of a pool that the application has. Disposing of it leaves the pool open.

    Args:
        pool: The pool. It must be open when the engine connects, and of the event loop that uses the engine.
        **options: What `create_async_engine` takes; nothing that says how to connect or how many connections to keep.
    """
    return create_async_engine(f"{_DRIVER}://", resilient_pool=pool, **options)


def pool_of(engine: AsyncEngine) -> ResilientPool[Any]:
    """Return the pool behind an engine, for the running event loop: for its `stats()`, or to be used beside SQLAlchemy.

    Raises:
        ConfigurationError: The engine is none of `postgresql+resilient`, or was made with another `poolclass`.
    """
    return _lease_pool(engine).current()


def retry_session(source: Source, **options: Unpack[TransactionOptions]) -> RetriedSession:
    """Make a unit of work that is repeated as a whole when it fails in a curable way, as `pool.transaction()` is.

        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(...))

    The session's transaction has begun. It commits when the block ends, and an answer to COMMIT that was lost is resolved. Until
    then nothing is certain: the block may run more than once, so it should have no other effect than on the database.
    Inside it `flush()`, `begin_nested()` and `rollback()` do as they always do. A `commit()` there is the unit's own: it may
    be repeated up to it, and nothing can follow it.

    Args:
        source: An engine of `postgresql+resilient`, an `async_sessionmaker` bound to one, or a pool. Sessions are made by the
            sessionmaker, else with `expire_on_commit=False`, so that what was loaded can be used afterwards.
        **options: What `pool.transaction()` takes. `isolation` is by default the engine's.

    Raises:
        OutcomeUnknownError: The answer to COMMIT was lost, and no server can tell what became of it.
        sqlalchemy.exc.DBAPIError: What a statement raised, when repeating does not help or is not allowed any longer.
        Exception: What the driver raised when there was no connection, likewise.
    """
    return RetriedSession(source, options)


async def run_in_session(
    source: Source,
    function: Callable[..., Awaitable[T]],
    *args: object,
    **options: Unpack[TransactionOptions],
) -> T:
    """Call `function(session, *args)` in a unit of work that is repeated as `retry_session()` says.

    Args:
        source: As for `retry_session()`.
        function: It may be called more than once.
        *args: What to call it with, after the session.
        **options: As for `retry_session()`.

    Returns:
        What the function returned in the attempt that committed.
    """
    loop = RetriedSession(source, options, always_goes_on=True)
    while True:
        async with await loop.next_attempt() as session:
            result = await function(session, *args)
        if loop.is_finished:
            return result


# The dialect


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Recipe:
    """What an engine was given to connect with. It is not shown: there are secrets in it."""

    arguments: Mapping[str, Any]
    statements: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], given: dict[str, Any]) -> Self:
        """Sort what a DBAPI's `connect()` was given; with an `async_creator`, the rest is for that to know."""
        statements = {name: given.pop(name) for name in _STATEMENT_OPTIONS if name in given}
        create = given.pop("async_creator_fn", None)
        if create is not None:
            connect_arguments = given
            given = {"connect": lambda *_args, **_options: create(*args, **connect_arguments)}
        elif args:
            given["dsn"] = args[0]
        return cls(arguments=given, statements=statements)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigurationError(_CONNECTS_ITSELF)

    def pool(self, **sizes: object) -> ResilientPool[Any]:
        """Make a pool, not yet opened."""
        _require_statement_options(**self.statements)
        for name in sizes.keys() & self.arguments.keys():
            raise ConfigurationError(f"{name} is given twice: leave it out, or {_SAME[name]}")
        return ResilientPool(**{**self.arguments, **sizes})


def _require_statement_options(
    prepared_statement_cache_size: object = 0, prepared_statement_name_func: object = None
) -> None:
    # SQLAlchemy takes every value, and empties a cache of less than none for ever.
    if not (prepared_statement_cache_size is None or is_number(prepared_statement_cache_size, least=0, whole=True)):
        raise ConfigurationError(
            "prepared_statement_cache_size must be a whole number of statements, at least 0, not "
            + shown(prepared_statement_cache_size)
        )
    if not (prepared_statement_name_func is None or callable(prepared_statement_name_func)):
        raise ConfigurationError(
            f"prepared_statement_name_func must be a function, not {shown(prepared_statement_name_func)}"
        )


_CONNECTS_ITSELF = (
    'creator= and a "do_connect" listener must not connect by themselves, since the pool does: a function that connects goes into '
    "connect_args={'connect': ...}, and what is to be done with a new connection into a \"connect\" listener"
)
# SQLAlchemy's arguments that say the same as the pool's.
_SAME = {"max_size": "pool_size= and max_overflow=", "deadline": "pool_timeout=", "max_lifetime": "pool_recycle="}


class ResilientDBAPI(AsyncAdapt_asyncpg_dbapi):
    """The DBAPI that SQLAlchemy sees."""

    def connect(self, *arg: Any, **kw: Any) -> Any:
        """Open one connection, which is kept by no pool of SQLAlchemy's or by another than a `LeasePool`."""
        recipe = _Recipe.of(arg, kw)
        if _DESCRIBING.get():
            return recipe
        return await_only(self._connect_alone(recipe))

    async def _connect_alone(self, recipe: _Recipe) -> AdaptedLease:
        _require_statement_options(**recipe.statements)
        try:
            connection = await connect(**recipe.arguments)
        except Exception as error:  # noqa: BLE001 - it is raised again, as SQLAlchemy words it
            raise_translated(self, error)
        return AdaptedLease(self, connection, **recipe.statements)


def raise_translated(dbapi: ResilientDBAPI, error: Exception) -> NoReturn:
    """Raise what SQLAlchemy's asyncpg dialect raises for an error in getting a connection."""
    if isinstance(error, AcquireTimeoutError):
        raise exc.TimeoutError(str(error)) from error
    translate = getattr(AdaptedLease, "_handle_exception_no_connection", None)  # SQLAlchemy 2.1
    if translate is not None:
        translate(dbapi, error)
    raise error


class ResilientDialect(PGDialect_asyncpg):
    """SQLAlchemy's asyncpg dialect on leases of a `ResilientPool`."""

    driver = "resilient"
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> Any:
        """Return the DBAPI of one engine."""
        return ResilientDBAPI(asyncpg)  # type: ignore[no-untyped-call]

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:  # noqa: ARG003 - SQLAlchemy calls it so
        """Return the pool class of engines that were given none."""
        return LeasePool

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Take note of what SQLAlchemy itself listens to."""
        if isinstance(engine.pool, LeasePool):
            engine.pool.count_own_listeners()

    def create_connect_args(self, url: URL) -> Any:
        """Return what the URL says, in the types that the pool's arguments have.

        Raises:
            ConfigurationError: An option is unknown or out of range, or would show a secret.
        """
        for name in _SECRETS:
            if name in url.query:
                raise ConfigurationError(
                    f"the URL's option {name!r} would be shown wherever the URL is: a password stands before the host, "
                    "everything else goes into connect_args="
                )
        # Before the password is in a variable: what is refused shows all of this frame to those who collect frames.
        options = {name: value for name, value in url.query.items() if name not in ("host", "port")}
        typed = dict(_typed(options))
        args, given = super().create_connect_args(url.difference_update_query(options))  # type: ignore[no-untyped-call]
        return args, {**given, **typed}

    def detect_autocommit_setting(self, dbapi_conn: Any) -> bool:
        """Say whether each statement commits by itself, which it never does in a unit of work."""
        return not dbapi_conn.is_in_unit and bool(super().detect_autocommit_setting(dbapi_conn))

    def set_readonly(self, connection: Any, value: Any) -> None:
        """Let the next transactions be read-only or not."""
        connection.require_no_unit("readonly")
        super().set_readonly(connection, value)  # type: ignore[no-untyped-call]

    def set_deferrable(self, connection: Any, value: Any) -> None:
        """Let the next transactions be deferrable or not."""
        connection.require_no_unit("deferrable")
        super().set_deferrable(connection, value)  # type: ignore[no-untyped-call]


# engine_on() works, too, where no installed distribution names the dialect.
registry.register("postgresql.resilient", __name__, "ResilientDialect")


def _typed(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the arguments that a URL's options stand for; what only a DSN knows goes into one."""
    rest: list[str] = []
    for name, value in options.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"the URL's option {name!r} is given twice")
        if name in _AS_TEXT:
            yield name, value
        elif name in _UNITS:
            yield name, _converted(name, value)
        else:
            _require_option_of_dsn(name, value)
            rest.append(_option(name, value))
    if rest:
        yield "dsn", f"postgresql://?{'&'.join(rest)}"


def _converted(name: str, value: str) -> object:
    unit = _UNITS[name]
    if unit == "bool":
        return _WORDS.get(value.lower(), value)  # another word is refused as the argument's value
    if unit not in _NUMBERS:
        raise ConfigurationError(f"the URL's option {name!r} takes no text: it goes into connect_args=")
    try:
        return None if value.lower() == "none" else _NUMBERS[unit](value)
    except ValueError:
        raise ConfigurationError(f"the URL's option {name!r} must be a number of {unit}, not {value!r}") from None


def _option(name: str, value: str) -> str:
    return str(URL.create("postgresql", query={name: value})).partition("?")[2]


def _require_option_of_dsn(name: str, value: str) -> None:
    try:
        arguments_of_dsn(Secret(f"postgresql://?{_option(name, value)}"))
    except ConfigurationError as error:
        hint = nearest(name, _UNITS)
        if "unknown option" in str(error) and "did you mean" not in str(error) and hint:
            raise UnknownArgumentError(f"in the URL: unknown option {name!r}{hint}") from None
        raise


# The pool


@dataclasses.dataclass(slots=True, eq=False)
class _Home:
    """One event loop's pool."""

    pool: ResilientPool[Any]
    opening: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    is_open: bool = False


class LoopPools:
    """One `ResilientPool` for each event loop that an engine is used in.

    Engines are made at import, and tests, for one, use them in several loops. What was open in a loop that is closed is cut off
    when another loop asks for its pool.
    """

    def __init__(self, make: Callable[[], ResilientPool[Any]]) -> None:
        self._make = make
        self._homes: dict[asyncio.AbstractEventLoop, _Home] = {}
        self._mutex = threading.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    def here(self) -> _Home:
        """Return the running loop's pool."""
        loop = asyncio.get_running_loop()
        home = self._homes.get(loop)
        if home is None or home.pool.is_closing():
            with self._mutex:
                for closed in [each for each in self._homes if each.is_closed()]:
                    self._homes.pop(closed).pool.terminate()
            home = self._homes[loop] = _Home(self._make())
        return home

    async def opened(self) -> ResilientPool[Any]:
        """Return the running loop's pool, opened."""
        while not (home := self.here()).is_open:
            async with home.opening:
                if not home.pool.is_closing():  # else another task has failed to open it, or has closed it
                    await home.pool
                    home.is_open = True
        return home.pool

    def close(self) -> None:
        """Close every pool, each in its own loop. Connections in use go on, and are closed when they are given back.

        In a greenlet of SQLAlchemy's, this waits for the goodbyes of the others, for 10 s at most.
        """
        with self._mutex:
            homes, self._homes = self._homes, {}
        here = _running_loop()
        for loop, home in homes.items():
            if home.is_open and loop is here and in_greenlet():
                await_only(self._close(home.pool))
            elif home.is_open and loop is here:
                self._begin_closing(home.pool)
            elif home.is_open and loop.is_running():
                loop.call_soon_threadsafe(self._begin_closing, home.pool)
            else:
                home.pool.terminate()

    async def _close(self, pool: ResilientPool[Any]) -> None:
        closing = self._begin_closing(pool)
        # A caller that holds a connection may be the one that waits here.
        await asyncio.wait([closing], timeout=0 if pool.stats().in_use else _GOODBYE)

    def _begin_closing(self, pool: ResilientPool[Any]) -> asyncio.Task[None]:
        closing = asyncio.get_running_loop().create_task(pool.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Record(_ConnectionRecord):
    """SQLAlchemy's record of one connection, kept with it for as long as that lives.

    Attributes:
        lease: Its lease, until that is adapted.
        is_lent: Whether the lease is a unit of work's, which releases it.
    """

    dbapi_connection: Any

    def __init__(self, pool: LeasePool, lease: Lease) -> None:
        super().__init__(pool, connect=False)
        self.lease: Lease | None = lease
        self.is_lent = False


# Whether what opens a connection is to say only what it would connect with.
_DESCRIBING: ContextVar[bool] = ContextVar("resilient_pool_describing", default=False)
# The lease that a unit of work has, for the one checkout that it makes: tasks that begin meanwhile have this context, too.
_LENT: ContextVar[list[Lease] | None] = ContextVar("resilient_pool_lent", default=None)


class LeasePool(Pool):
    """SQLAlchemy's view of a pool: each checkout is a lease, each checkin its release.

    SQLAlchemy's own connection, with its prepared statements and its `info`, stays with the driver's connection for as long as
    that lives. A "connect" listener is called for each of these, and again after the pool has reset the session.

    Args:
        creator: SQLAlchemy's, which returns what to connect with.
        pool_size: Together with `max_overflow` the pool's `max_size`. Default: 5.
        max_overflow: Default: 10.
        timeout: The pool's `deadline`, in seconds. Default: the pool's own.
        recycle: The pool's `max_lifetime`, in seconds; -1 is never. Default: the pool's own.
        pre_ping: Nothing: every connection is checked before its use in any case.
        use_lifo: Nothing: the connection used last is always the first to be used again.
        resilient_pool: The application's own pool, in place of one for each event loop.
        **options: What every pool of SQLAlchemy's takes.

    Raises:
        ConfigurationError: An argument is unknown, out of range, or at odds with another one.
    """

    _is_asyncio = True

    def __init__(
        self,
        creator: Any,
        pool_size: int | None = None,
        max_overflow: int | None = None,
        timeout: float | None = None,
        recycle: float | None = None,
        pre_ping: bool = False,  # noqa: ARG002 - see above
        use_lifo: bool = True,  # noqa: ARG002
        resilient_pool: ResilientPool[Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(creator, **options)
        self._given = resilient_pool
        self._sizing: dict[str, Any] = {
            "pool_size": pool_size,
            "max_overflow": max_overflow,
            "timeout": timeout,
            "recycle": recycle,
        }
        self._sizes = _sizes(**self._sizing)
        if resilient_pool is not None and self._sizes:
            raise ConfigurationError("the size and the times of a pool that the application made are that pool's own")
        self._describe = self._invoke_creator
        self._invoke_creator = cast("Any", self._adapt)
        _ = self._dbapi  # it is for no other
        self._pools = LoopPools(self._make)
        self._is_disposed = False
        self._statements: Mapping[str, Any] = {}
        self._listeners_before = len(self.dispatch.connect)
        self._own_listeners = 0
        is_new = "_dispatch" not in options
        if is_new and resilient_pool is None and "connection_record" in inspect.signature(creator).parameters:
            self._make()  # so that a wrong argument is refused now

    @property
    def _dbapi(self) -> ResilientDBAPI:
        dbapi = getattr(self._dialect, "loaded_dbapi", None)
        if not isinstance(dbapi, ResilientDBAPI):
            raise ConfigurationError(f"LeasePool is for engines of {_DRIVER}")
        return dbapi

    def count_own_listeners(self) -> None:
        """Take what was registered since this was made for SQLAlchemy's own."""
        self._own_listeners = len(self.dispatch.connect) - self._listeners_before

    # Pools

    def _make(self) -> ResilientPool[Any]:
        recipe = self._recipe()
        self._statements = recipe.statements
        if not getattr(self._dialect.dispatch, "do_connect", ()):  # type: ignore[union-attr]
            return recipe.pool(**self._sizes)
        arguments = {**recipe.arguments, "password": self._password}
        return dataclasses.replace(recipe, arguments=arguments).pool(**self._sizes)

    def _recipe(self) -> _Recipe:
        token = _DESCRIBING.set(True)
        try:
            recipe: object = self._describe(_ConnectionRecord(self, connect=False))
        finally:
            _DESCRIBING.reset(token)
        if not isinstance(recipe, _Recipe):
            raise ConfigurationError(_CONNECTS_ITSELF)
        return recipe

    async def _password(self) -> Any:
        """Ask the application's "do_connect" listeners for a new connection's password, which may be a token."""
        password = (await greenlet_spawn(self._recipe)).arguments.get("password")
        password = password() if callable(password) else password
        return await password if inspect.isawaitable(password) else password

    def current(self) -> ResilientPool[Any]:
        """Return the running event loop's pool; it may be still to be opened."""
        return self._given or self._pools.here().pool

    async def opened(self) -> ResilientPool[Any]:
        """Return the running event loop's pool, opened."""
        return self._given or await self._pools.opened()

    # Checkouts

    async def _lease(self) -> Lease:
        while True:
            pool = None
            try:
                pool = await self.opened()
                return await pool.acquire()
            except Exception as error:  # noqa: BLE001 - it is raised again, as SQLAlchemy words it
                if self._given is None and pool is not None and pool.is_closing():
                    continue  # the engine was disposed of meanwhile
                raise_translated(self._dbapi, error)

    def _do_get(self) -> ConnectionPoolEntry:
        lending = _LENT.get()
        lent = lending.pop() if lending else None
        lease = await_only(self._lease()) if lent is None else lent
        kept = False
        try:
            record = self.record_of(lease)
            kept = True
        finally:
            if not (kept or lent is lease or lease.is_released):
                lease.terminate()
        record.is_lent = lent is lease
        record.dbapi_connection.follow()
        return record

    def record_of(self, lease: Lease) -> _Record:
        """Return the record of a lease's connection: the one kept with it, or a new one, for which listeners are called."""
        record: _Record | None = adapting.connection_info(lease).get(self)
        if record is None or record.dbapi_connection is None:
            record = _Record(self, lease)
        else:
            record.dbapi_connection.take(lease)
            if self not in adapting.session_info(lease) and len(self.dispatch.connect) > self._own_listeners:
                self.dispatch.connect(record.dbapi_connection, record)
        record.get_connection()
        if self not in adapting.session_info(lease):
            adapting.session_info(lease)[self] = True
            # Others may use the application's pool, and expect nothing of what a listener has set.
            if self._given is None:
                adapting.count_session_as(lease, untouched=True)
        return record

    def _adapt(self, record: Any) -> Any:
        lease, record.lease = record.lease, None
        if lease is None:
            lease = await_only(self._lease())
            record.is_lent = False
        adapted = AdaptedLease(self._dbapi, lease, self.current(), record_of=self.record_of, **self._statements)
        adapting.connection_info(lease)[self] = record
        return adapted

    def _do_return_conn(self, record: Any) -> None:
        adapted = record.dbapi_connection
        if adapted is not None:
            adapted.give_back(is_lent=record.is_lent)

    def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
        # This one only: the others are checked before they are used.
        if _checkin and getattr(connection, "is_valid", False):
            connection.invalidate(exception)

    # Ends

    def recreate(self) -> LeasePool:
        """Return a pool like this one."""
        self.logger.info("Pool recreating")
        made = LeasePool(
            self._creator,
            **self._sizing,
            resilient_pool=self._given,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        made._own_listeners = self._own_listeners
        if self._is_disposed:  # else the connections are another process's, and this pool must not be used
            made._pools = self._pools
        return made

    def dispose(self) -> None:
        """Close the pool of each event loop; connections in use are closed when they are given back."""
        self._is_disposed = True
        self._pools.close()

    def size(self) -> int:
        """Return how many connections may be open, in the running event loop."""
        return self.current().get_max_size()

    def checkedin(self) -> int:
        """Return how many connections are idle, in the running event loop."""
        return self.current().stats().idle

    def checkedout(self) -> int:
        """Return how many connections are in use, in the running event loop."""
        return self.current().stats().in_use

    def overflow(self) -> int:
        """Return 0: the size is the limit."""
        return 0

    def status(self) -> str:
        """Say how many connections there are, in the running event loop."""
        if _running_loop() is None:
            return "LeasePool"
        stats = self.current().stats()
        return f"LeasePool max_size: {stats.max_size}, size: {stats.size}, in use: {stats.in_use}, waiting: {stats.waiting}"


def _sizes(
    *, pool_size: int | None, max_overflow: int | None, timeout: float | None, recycle: float | None
) -> dict[str, Any]:
    """Return the pool's arguments that SQLAlchemy's stand for."""
    sizes: dict[str, Any] = {}
    for name, value, unit, least in (
        ("pool_size", pool_size, "a number of connections, which is limited here", 1),
        ("max_overflow", max_overflow, "a number of connections, which is limited here", 0),
        ("pool_timeout", timeout, "a number of seconds", 0),
        ("pool_recycle", recycle, "a number of seconds, or -1 for never", -1),
    ):
        if value is not None:
            require_number(name, value, unit=unit, least=least)
    if (pool_size, max_overflow) != (None, None):
        sizes["max_size"] = (_POOL_SIZE if pool_size is None else pool_size) + (
            _MAX_OVERFLOW if max_overflow is None else max_overflow
        )
    if timeout is not None:
        sizes["deadline"] = timeout
    if recycle is not None:
        sizes["max_lifetime"] = max(recycle, 0)
    return sizes


def _lease_pool(engine: AsyncEngine) -> LeasePool:
    pool = engine.sync_engine.pool
    if not isinstance(pool, LeasePool):
        raise ConfigurationError(
            f"the engine must be one of {_DRIVER}, made without poolclass=, not {engine.dialect.name}+{engine.driver} "
            f"with a {type(pool).__name__}"
        )
    return pool


# Connections


class _Ended:
    """Stands where a connection's lease was."""

    __slots__ = ()

    is_released = True

    def is_closed(self) -> bool:
        return True

    async def close(self, *, timeout: float | None = None) -> None:
        pass

    def terminate(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise asyncpg.InterfaceError(f"cannot use {name}: the connection has been released back to the pool")


_ENDED = _Ended()


class AdaptedLease(AsyncAdapt_asyncpg_connection):
    """What SQLAlchemy takes for a DBAPI connection: a lease, and what was prepared on its connection.

    Args:
        pool: Where it is released to; `None` for a connection that no pool keeps.
        record_of: Returns the record of a lease's connection, for a connection that is replaced.
    """

    __slots__ = ("_loop", "_pool", "_record_of", "_unit")

    _connection: Any

    def __init__(
        self,
        dbapi: ResilientDBAPI,
        lease: Lease,
        pool: ResilientPool[Any] | None = None,
        *,
        record_of: Callable[[Lease], _Record] | None = None,
        **statements: Any,
    ) -> None:
        super().__init__(dbapi, lease, **statements)  # type: ignore[no-untyped-call]
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._record_of = record_of
        self._unit: _Unit | None = None

    # Leases

    def take(self, lease: Lease) -> None:
        """Be the adapter of the next lease of the same connection."""
        self._connection = lease

    def follow(self) -> None:
        """Go along to a connection that replaces this one."""
        adapting.prepare_replacements(self._connection, self._move)

    async def _move(self) -> None:
        if self._record_of is not None:
            record = await greenlet_spawn(self._record_of, self._connection)
            self._prepared_statement_cache = record.dbapi_connection._prepared_statement_cache  # noqa: SLF001

    def give_back(self, *, is_lent: bool) -> None:
        """Release the lease, unless a unit of work does that."""
        lease, self._connection = self._connection, _ENDED
        if is_lent or lease.is_released:
            return
        if in_greenlet() and self._pool is not None:
            await_only(self._pool.release(lease))
        else:
            lease.terminate()

    def close(self) -> None:
        """Close the connection: a detached one, or one that no pool keeps."""
        if self._unit is None:
            super().close()  # type: ignore[no-untyped-call]

    async def _terminate_graceful_close(self) -> None:
        if asyncio.get_running_loop() is not self._loop or self._unit is not None:
            self._terminate_force_close()
        elif not self._connection.is_released:
            await super()._terminate_graceful_close()

    def _terminate_force_close(self) -> None:
        if self._unit is not None:
            self._unit.invalidated()
        elif not self._connection.is_released:
            super()._terminate_force_close()

    def _handle_exception(self, error: Exception) -> NoReturn:
        if self._connection.is_released:
            self._connection = _ENDED  # a lease that has ended answers no question
        super()._handle_exception(error)
        raise error

    # Transactions

    def join(self, unit: _Unit) -> None:
        """Belong to a unit of work, whose transaction is about to begin."""
        self._unit = unit

    @property
    def is_in_unit(self) -> bool:
        """Whether it belongs to a unit of work."""
        return self._unit is not None

    def set_transaction(self, transaction: object) -> None:
        """Take a transaction for the one that is open; `None` if none is."""
        self._transaction = cast("Any", transaction)
        if hasattr(type(self), "_started"):  # SQLAlchemy 2.0
            cast("Any", self)._started = transaction is not None  # noqa: SLF001

    def leave(self) -> None:
        """Belong to no unit of work any more, and send nothing for it: it ends its transaction."""
        self._unit = None
        self.set_transaction(None)

    async def _start_transaction(self) -> None:
        if self._unit is None:
            await super()._start_transaction()  # type: ignore[no-untyped-call]
            return
        await self._unit.begin_again()
        self.set_transaction(self._unit)

    def require_no_unit(self, what: str) -> None:
        """Raise if the transaction is a unit of work's, which cannot be changed inside."""
        if self._unit is not None:
            raise exc.InvalidRequestError(
                f"{what} cannot be changed inside a unit of work, whose transaction has begun: retry_session({what}=...)"
            )

    def set_isolation_level(self, level: Any) -> None:
        """Set the isolation of the next transactions."""
        self.require_no_unit("isolation")
        super().set_isolation_level(level)  # type: ignore[no-untyped-call]

    # Statements

    async def _prepare(self, operation: str, invalidate_timestamp: float) -> tuple[_Statement, Any]:
        await self._check_type_cache_invalidation(invalidate_timestamp)  # type: ignore[no-untyped-call]
        cache = self._prepared_statement_cache
        found: _Prepared | None = None if cache is None else cache.get(operation)
        if found is None or found.made_at <= invalidate_timestamp:
            found = await adapting.prepare(self._connection, operation, partial(self.prepare_on, operation))
        return _Statement(self, operation, found), found.attributes

    async def prepare_on(self, operation: str, connection: AnyConnection) -> _Prepared:
        """Prepare a statement on the driver's connection, and keep it there unless a pooler stands in between."""
        name = self._prepared_statement_name_func()
        # Behind a pooler under none, as asyncpg does by itself from 0.31 on; it then prepares again with each execution.
        is_kept = connection._stmt_cache_enabled  # type: ignore[attr-defined] # noqa: SLF001
        made = await connection.prepare(operation, name="" if name is None and not is_kept else name)
        prepared = _Prepared(statement=made, attributes=made.get_attributes(), made_at=time.time())
        if is_kept and self._prepared_statement_cache is not None:
            self._prepared_statement_cache[operation] = prepared
        return prepared


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A prepared statement, which is kept with its connection."""

    statement: Any
    attributes: Any
    made_at: float


class _Statement:
    """What SQLAlchemy takes for asyncpg's prepared statement: it is executed as a lease executes what it is given."""

    __slots__ = ("_adapted", "_operation", "_prepared")

    def __init__(self, adapted: AdaptedLease, operation: str, prepared: _Prepared) -> None:
        self._adapted = adapted
        self._operation = operation
        self._prepared = prepared

    async def fetch(self, *parameters: Any) -> list[Any]:
        """Fetch every row."""
        return await self._run("fetch", lambda statement: statement.fetch(*parameters))

    async def cursor(self, *parameters: Any) -> _Cursor:
        """Open a cursor."""
        cursor = await self._run("cursor", lambda statement: statement.cursor(*parameters))
        return _Cursor(self._adapted, cursor)

    def get_statusmsg(self) -> str:
        """Return what the server said that it did."""
        return str(self._prepared.statement.get_statusmsg())

    async def _run(self, name: str, execute: Callable[[Any], Awaitable[T]]) -> T:
        async def execute_on(connection: AnyConnection) -> T:
            statement: Any = self._prepared.statement
            if statement._connection is not connection:  # noqa: SLF001 - the lease has replaced it
                self._prepared = await self._adapted.prepare_on(self._operation, connection)
                statement = self._prepared.statement
            # It was made in an earlier lease of this connection, and is as good in this one.
            statement._con_release_ctr = connection._pool_release_ctr  # type: ignore[attr-defined] # noqa: SLF001
            return await execute(statement)

        return await adapting.run(self._adapted._connection, name, self._operation, execute_on)  # noqa: SLF001


class _Cursor:
    """A cursor on the server, whose errors SQLAlchemy sees as a statement's: its own dialect translates none of a cursor's."""

    __slots__ = ("_adapted", "_cursor")

    def __init__(self, adapted: AdaptedLease, cursor: Any) -> None:
        self._adapted = adapted
        self._cursor = cursor

    async def fetch(self, count: int) -> list[Any]:
        """Fetch the next rows."""
        try:
            return list(await self._cursor.fetch(count))
        except Exception as error:  # noqa: BLE001 - it is raised again, as SQLAlchemy words it
            self._adapted._handle_exception(error)  # noqa: SLF001


# Units of work


class _Unit(Attempt[Any]):
    """One attempt of a unit of work: a transaction of the pool's, in which a session of SQLAlchemy's works."""

    def __init__(self, engine: AsyncEngine, make_session: Callable[..., AsyncSession], *shared: Any) -> None:
        super().__init__(*shared)
        self._engine = engine
        self._make_session = make_session
        self._connection: AsyncConnection | None = None
        self._adapted: AdaptedLease | None = None
        self._session: AsyncSession | None = None
        self._failure: Exception | None = None
        self._is_tried = self._has_committed = self._is_rolled_back = self._is_invalidated = False

    # Beginning

    async def _prepare(self, lease: Lease) -> None:
        token = _LENT.set([lease])
        try:
            self._connection = connection = await AsyncConnection(self._engine).start()
        finally:
            _LENT.reset(token)
        adapted: Any = (await connection.get_raw_connection()).dbapi_connection
        if adapted.driver_connection is not lease:
            raise exc.InvalidRequestError('a "checkout" listener has replaced the connection of a unit of work')
        self._adapted = adapted
        adapted.join(self)
        self._execution.attempt.driver = lease._driver  # noqa: SLF001 - a listener may have met its loss
        if self._options.get("isolation") is None and adapted.isolation_level not in (None, "autocommit"):
            self._options = {**self._options, "isolation": adapted.isolation_level}
        if adapted.deferrable:
            self._options = {**self._options, "deferrable": True}

    async def _begin(self) -> Lease:
        begun = False
        try:
            lease = await super()._begin()
            begun = True
        finally:
            if not begun:
                await self._close()
        if self._adapted is not None:
            self._adapted.set_transaction(self)
        return lease

    @property
    def _is_read_only(self) -> bool:
        return super()._is_read_only or (self._adapted is not None and bool(self._adapted.readonly))

    def open_session(self) -> AsyncSession:
        """Return the session, on the connection on which the transaction has begun."""
        self._session = session = self._make_session(bind=self._connection)
        event.listen(session.sync_session, "after_begin", self._require_own_connection)
        return session

    def _require_own_connection(self, _session: object, _transaction: object, connection: Connection) -> None:
        """Let the session work on no other connection: a commit there would neither be resolved nor wait for this one."""
        chosen: object = connection.connection.dbapi_connection
        if chosen is self._adapted:
            return
        driver = self._execution.attempt.driver
        if driver is None or driver.connection.is_closed():
            raise asyncpg.ConnectionDoesNotExistError("the connection of the unit of work was lost")
        raise exc.InvalidRequestError(
            "the session of a unit of work works on the unit's own connection only: it was invalidated, or get_bind() or "
            "bind_arguments= of the session chose another one"
        )

    # What SQLAlchemy does with its transaction

    async def begin_again(self) -> None:
        """Begin a transaction after a rollback.

        Raises:
            sqlalchemy.exc.InvalidRequestError: There was no rollback, but a commit.
        """
        if self._is_tried:
            raise exc.InvalidRequestError(
                "the unit of work was committed, or could not be: what follows its commit stands behind the block that "
                "retry_session() repeats, or in another unit"
            )
        if self._adapted is not None and self._execution.attempt.driver is not None:
            await self._begin_on(self._execution.attempt.driver)
            self._is_rolled_back = False

    async def commit(self) -> None:
        """Commit, and find out what became of it."""
        self._is_tried = True
        self._failure = await self._commit()
        if self._failure is not None:
            raise self._failure
        self._has_committed = True

    async def rollback(self) -> None:
        """Roll back, so that another transaction may begin."""
        if self._execution.attempt.driver is not None:
            await self._undo(self._execution.attempt.driver)
        self._is_rolled_back = True

    def invalidated(self) -> None:
        """Take note that SQLAlchemy uses the connection no more: it was lost, or the application has had enough of it."""
        self._is_invalidated = True

    async def _undo(self, driver: DriverConnection) -> None:
        if not self._is_rolled_back:
            await super()._undo(driver)

    # Ending

    async def _end(self, error: BaseException | None) -> Exception | None:
        raised = None
        try:
            if error is None:
                raised = await self._commit_session()
        finally:
            await self._close()
        if self._is_tried:
            return self._after_commit(error, raised)
        if raised is not None:
            failure = await super()._end(raised)
            if failure is None:
                raise raised
            return failure
        if error is None and self._is_rolled_back:
            return None
        driver = self._execution.attempt.driver
        if error is None and self._is_invalidated and driver is not None and not driver.connection.is_closed():
            await self._undo(driver)
            raise asyncpg.InterfaceError(
                "the connection was invalidated inside the block of retry_session(), which is rolled back: nothing is committed"
            )
        return await super()._end(error)

    async def _commit_session(self) -> Exception | None:
        """Let the session write what it holds, and commit; return what it raised."""
        driver = self._execution.attempt.driver
        if self._session is None or driver is None:
            return None
        if driver.connection.is_closed() and not self._is_rolled_back:
            return None  # a loss that the block did not let through is found by the pool's own COMMIT
        session = self._session.sync_session
        if not (session.autobegin or session.in_transaction()):
            return None  # it holds nothing, and refuses to commit
        try:
            await self._session.commit()
        except Exception as error:  # noqa: BLE001 - it is decided on, not swallowed
            return error
        return None

    def _after_commit(self, error: BaseException | None, raised: Exception | None) -> Exception | None:
        """Return the failure of the commit, as the application saw it, if another attempt may cure it.

        What was raised after a commit that succeeded, or in place of its failure, is the application's own.

        Args:
            error: What was raised in the block.
            raised: What was raised when the session was committed at its end.
        """
        if self._failure is None:
            if raised is not None:
                raise raised
            if error is None and not self._has_committed:
                raise asyncpg.InterfaceError(
                    "the commit inside the block failed, and its error was caught there: nothing is known to be committed"
                )
            return None
        seen = error if raised is None else raised
        if isinstance(seen, Exception) and self._shared.context.unwrap(seen) is self._failure:
            return seen
        return self._failure if error is None else None

    async def _close(self) -> None:
        """Close the session and its connection. Nothing is sent."""
        session, self._session = self._session, None
        connection, self._connection = self._connection, None
        if self._adapted is not None:
            self._adapted.leave()
        if session is not None:
            await session.close()
        if connection is not None:
            await connection.close()


class SessionAttempt:
    """One attempt of a unit of work: enter it for a session whose transaction has begun.

    Attributes:
        number: Which attempt this is; the first is 1.
    """

    def __init__(self, unit: _Unit) -> None:
        self.number = unit.number
        self._unit = unit

    async def __aenter__(self) -> AsyncSession:
        await self._unit.__aenter__()
        return self._unit.open_session()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # Noted before anything else: a frame that is resumed by an error stands elsewhere.
        return await self._unit.leave(error, FramePosition.of(sys._getframe(1)))  # noqa: SLF001 - there is no public way to look back


class RetriedSession:
    """The attempts of one unit of work, one after the other, until one has committed. `retry_session()` makes it."""

    def __init__(self, source: Source, options: TransactionOptions, *, always_goes_on: bool = False) -> None:
        require_known(list(options), TransactionOptions.__annotations__, of="retry_session")
        self._engine, self._make_session = _session_maker(source)
        self._options = options
        self._always_goes_on = always_goes_on
        self._loop: RetriedTransaction[Any] | None = None
        self._head: FramePosition | None = None

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[SessionAttempt]:
        # Not a coroutine function: its body has to run while the loop's own frame stands right behind it.
        self._head = self._head or FramePosition.of(sys._getframe(1))  # noqa: SLF001 - there is no public way to look back
        return self.next_attempt()

    async def next_attempt(self) -> SessionAttempt:
        """Return the next attempt."""
        if self._loop is None:
            pool = await _lease_pool(self._engine).opened()
            self._loop = RetriedTransaction(
                pool._transactions,  # noqa: SLF001
                self._options,
                always_goes_on=self._always_goes_on,
                make_attempt=partial(_Unit, self._engine, self._make_session),
            )
        return SessionAttempt(cast("_Unit", await self._loop.next_attempt(self._head)))

    if not TYPE_CHECKING:  # type checkers refuse it by themselves

        def __aenter__(self) -> NoReturn:
            raise TypeError(
                "a unit of work is a loop of attempts: write `async for attempt in retry_session(engine):` and in it "
                "`async with attempt as session:`"
            )

        __aexit__ = __aenter__

    @property
    def is_finished(self) -> bool:
        """Whether no further attempt follows."""
        return self._loop is not None and self._loop.is_finished


def _session_maker(source: Source) -> tuple[AsyncEngine, Callable[..., AsyncSession]]:
    if isinstance(source, ResilientPool):
        # Kept with the pool: an engine asks its first connection what server it is, and remembers what it has compiled.
        kept = vars(source)
        source = kept["_sqlalchemy_engine"] = kept.get("_sqlalchemy_engine") or engine_on(source)
    if isinstance(source, AsyncEngine):
        return source, partial(AsyncSession, expire_on_commit=False)
    if not isinstance(source, async_sessionmaker):
        raise ConfigurationError(f"source must be an AsyncEngine, an async_sessionmaker or a pool, not {source!r}")
    engine = source.kw.get("bind")
    if not isinstance(engine, AsyncEngine) or source.kw.get("binds"):
        raise ConfigurationError("the async_sessionmaker must be bound to one AsyncEngine: async_sessionmaker(engine)")
    return engine, source
