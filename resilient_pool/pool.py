"""`ResilientPool`: takes a connection for each call, executes, gives it back; opens and closes everything below."""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Coroutine, Generator
from enum import Enum
from types import TracebackType
from typing import Any, ClassVar, Generic, Never, Self, TypeVar, Unpack, cast
from weakref import WeakSet

import asyncpg

from resilient_pool._validation import names_nearest, require_call, require_known, require_seconds
from resilient_pool.clock import Clock, SystemClock, deadline_scope
from resilient_pool.config.arguments import ConnectArguments, RecordT, TypedPoolArguments
from resilient_pool.config.pool_config import PoolConfig, SealedDsn, seal
from resilient_pool.execution.commit_resolver import CommitResolver
from resilient_pool.execution.connection import LeaseManager, ResilientConnection
from resilient_pool.execution.listener import Listener, Listeners
from resilient_pool.execution.query_methods import CallOptions, Queries
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.execution.retry_strategy import Execution, RetryStrategy
from resilient_pool.execution.transaction import Isolation, RetriedTransaction, TransactionOptions, Transactions, run
from resilient_pool.observability.stats import Counters, PoolStats
from resilient_pool.pooling.acquire import Acquirer
from resilient_pool.pooling.circuit_breaker import CircuitBreaker
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import Dispatcher, PoolContext
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.pooling.metering import MeteredAcquirer, MeteredMaintenance
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool
from resilient_pool.sql.read_only import StatementReader

T = TypeVar("T")

_LONG_CLOSE = 60.0
# What is kept back of the time: for cancelling a statement that still runs, and for resetting its connection.
_KEPT_BACK, _LONGEST_KEPT_BACK = 0.1, 1.0
# So much earlier than the block itself end those who only wait: their own error says more than that time is up.
_EARLIER = 0.1


class _State(Enum):
    NEW = "is not initialized: write `await pool` or `async with pool` first"
    OPENING = "is being initialized, but not yet ready: likely there is a race between creating it and using it"
    OPEN = "is open"
    CLOSING = "is closing"
    CLOSED = "is closed"
    FORKED = (
        "was opened in the process that this one was forked from, and its connections belong there: "
        "open a pool in each process; see docs/symptoms.md#forked"
    )


# Looking a member up in its enumeration takes as long as everything else that is asked before a call (Python 3.11).
_OPEN = _State.OPEN


# What is asked of the operating system once, for all pools: it keeps such callbacks for ever.
_OPENED: WeakSet[ResilientPool[Any]] = WeakSet()


def _disown_all() -> None:
    for pool in _OPENED:
        pool._disown()  # noqa: SLF001


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


class ResilientPool(Queries[RecordT]):
    """A pool of connections to one PostgreSQL database, for one event loop.

    It takes what `asyncpg.create_pool` takes, with the same meaning, and the further arguments listed in the documentation. Use
    it as `async with ResilientPool(dsn) as pool`, or `await` it and `close()` it.

    The query methods (`fetch`, `execute`, ...) take what asyncpg's take, and these further arguments:

    * `deadline`: seconds to spend on getting a healthy connection and on starting another attempt. Default: the pool's. It
      never cuts a running statement: `timeout=` does.
    * `fail_fast`: whether to fail at once while the server is known to be away. Default: as the pool was made.
    * `idempotent`: whether the statement may run twice without harm, and so is repeated when its outcome is unknown.
      Default `False`; what is shown to only read is repeated anyway.
    * `exactly_once`: whether to run it as a transaction whose lost COMMIT is resolved, for three round trips more.
      Default `False`.

    They raise the driver's own error when repeating does not help, `AcquireTimeoutError` when no connection became free in
    time, and `OutcomeUnknownError` when a statement that may write was lost on its way and must not be repeated.

    Args:
        dsn: `postgresql://user:password@host:port/database?option=value`. It is parsed once and not kept.
        **arguments: See the table of arguments in the documentation, or `resilient_pool.config.pool_config.ARGUMENTS`.

    Raises:
        ConfigurationError: An argument or an option of the DSN is unknown or out of range.
    """

    _lease_type: ClassVar[type[ResilientConnection[Any]]] = ResilientConnection

    def __init__(self, dsn: str | SealedDsn = None, /, **arguments: Unpack[TypedPoolArguments[RecordT]]) -> None:
        self._state = _State.NEW
        sealed, settled = seal(dsn, arguments)
        del dsn, arguments  # a report that shows this frame must not show them
        config = PoolConfig.from_arguments(sealed, **settled)
        for reason in config.keeps_awake():
            warnings.warn(f"the database will not pause: {reason}; see docs/symptoms.md#will-not-pause", stacklevel=2)
        clock: Clock = config.clock or SystemClock()
        self._config = config
        self._clock = clock
        self._counters = Counters()
        context = PoolContext(config=config, clock=clock, counters=self._counters, events=Dispatcher(config.observers))
        self._resources: ResourcePool[DriverConnection] = ResourcePool(config.max_size, clock, min_size=config.min_size)
        self._reader = StatementReader(config.pure_functions)
        self._keeps_session = self._reader.keeps_session
        self._connector = Connector(context)
        instruments = context.events.instruments
        maintenance = (MeteredMaintenance if instruments else Maintenance)(context, self._resources, self._connector)
        self._maintenance = maintenance
        self._circuit_breaker = CircuitBreaker(context, self._resources, maintenance, self._connector)
        self._acquirer = (
            MeteredAcquirer(context, self._resources, maintenance, self._circuit_breaker)
            if isinstance(maintenance, MeteredMaintenance)
            else Acquirer(context, self._resources, maintenance, self._circuit_breaker)
        )
        self._retry_strategy = RetryStrategy(
            context, ReadCheck(self._reader, clock.monotonic), self._maintenance, self._connector
        )
        self._retry_budget = config.retry_budget
        self._monotonic = clock.monotonic
        self._leases = LeaseManager(context, self._acquirer, self._retry_strategy, self._lease_type)
        commit_resolver = CommitResolver(context, self._acquirer, self._maintenance, self._retry_strategy.read_check)
        self._transactions = Transactions(context, self._leases, commit_resolver, self._require_open)
        self._listeners = Listeners(context, self._leases, self._require_open)
        self._sets_up = config.setup is not None
        self._waits_for_reset = config.session_reset == "on_release"
        self._never_resets = config.session_reset == "off"
        # The application's own callbacks and statements may leave anything behind, so with them every use is followed by a reset.
        self._trusts_texts = config.session_reset == "auto" and self._leases.trusts_texts
        self._loop: asyncio.AbstractEventLoop | None = None
        for instrument in instruments:
            instrument.attach(self.stats)

    def __repr__(self) -> str:
        # Also of a pool whose arguments are being refused: a report of that may show it.
        return f"<{type(self).__name__} {self._state.name.lower()} {getattr(self, '_resources', None)!r}>"

    # Running

    async def _run(  # noqa: C901, PLR0912 - the road of a call, whole
        self,
        operation: str,
        sql: str | None,
        options: CallOptions,
        execute: Callable[..., Awaitable[T]],
        *arguments: object,
        replayable: bool = True,
    ) -> T:
        if options and self._takes_exactly_once(options, sql):
            return await self._run_exactly_once(options, execute, arguments)
        started = now = self._monotonic()
        self._retry_budget.calls += 1
        # What has not failed, and needs no setup, need not be remembered.
        execution: Execution[T] | None = None
        if self._sets_up:
            execution = self._retry_strategy.new_execution(
                operation, sql, execute, arguments, options, replayable, started
            )
        while True:
            entry = lease = failure = reset = None
            answered = False
            try:
                try:
                    # A pool that was closed since must not hide what became of an earlier attempt: that is judged, too.
                    if self._state is not _OPEN or get_running_loop() is not self._loop:
                        self._require_open()
                    entry = self._acquirer.try_acquire(now)
                    if entry is None:
                        ends, fails_fast = self._retry_strategy.limits(started, options)
                        entry = await self._acquirer.acquire(ends, fail_fast=fails_fast)
                    driver: Any = entry.resource
                    queries = driver.queries if driver.is_customized else 0
                    if execution is None:
                        result = await execute(driver.connection, *arguments)
                    else:
                        if self._sets_up:
                            lease = self._leases.new_lease(entry)
                            await self._leases.attach(lease, execution)
                        result = await self._retry_strategy.run_on(execution, driver)
                    answered = True
                except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                    failure = error
                if failure is not None:
                    if execution is None:
                        execution = self._retry_strategy.new_execution(
                            operation, sql, execute, arguments, options, replayable, started
                        )
                        if entry is not None:
                            execution.attempt.execute_on(driver, queries)
                    # What is decided concerns the connection, too, which is still held.
                    delay = await self._retry_strategy.judge(execution, failure)
            finally:
                if lease is not None:
                    reset = self._leases.release(lease)
                elif answered and (self._never_resets or (self._trusts_texts and self._keeps_session[sql])):
                    self._acquirer.release(entry)  # type: ignore[arg-type]
                elif entry is not None:
                    reset = self._maintenance.reset_and_release(entry)
            if execution is None or failure is None:
                if self._waits_for_reset:
                    await _end_of(reset)
                return result
            await self._clock.sleep(delay)
            execution.begin_attempt()
            now = self._monotonic()

    def _takes_exactly_once(self, options: CallOptions, sql: str | None) -> bool:
        """Check the options of a call, and say whether it is to be a transaction of its own."""
        require_seconds("deadline", options.get("deadline"))
        exactly_once = options.pop("exactly_once", False)  # type: ignore[typeddict-item]
        return bool(exactly_once) and not (options.get("idempotent") or self._is_plain_read(sql))

    async def _run_exactly_once(
        self, options: CallOptions, execute: Callable[..., Awaitable[T]], arguments: tuple[object, ...]
    ) -> T:
        limits = TransactionOptions(deadline=options.get("deadline"), fail_fast=options.get("fail_fast"))
        return await run(self._transactions, _on_lease, (execute, *arguments), limits, exactly_once=True)

    def _is_plain_read(self, sql: str | None) -> bool:
        return sql is not None and self._reader.is_plain_read(sql)

    # Transactions

    @names_nearest
    def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        readonly: bool = False,
        deferrable: bool = False,
        resolve_commit: bool = True,
        deadline: float | None = None,
        fail_fast: bool | None = None,
    ) -> RetriedTransaction[RecordT]:
        """Make a transaction that is repeated as a whole when it fails in a curable way.

            async for attempt in pool.transaction():
                async with attempt as connection:
                    await connection.execute(...)

        Args:
            isolation: As asyncpg's `Connection.transaction()` takes it.
            readonly: Likewise.
            deferrable: Likewise.
            resolve_commit: Whether to ask the server what became of a COMMIT whose answer was lost. It costs one round trip
                for each transaction in which anything was sent that is not plainly a read.
            deadline: How many seconds further attempts may begin, and the server may be asked. Default: the pool's.
            fail_fast: Whether to fail at once while the server is known to be away. Default: as the pool was made.

        Raises:
            OutcomeUnknownError: The answer to COMMIT was lost, and no server can tell what became of it.
            asyncpg.InterfaceError: The block released, closed or reset its own connection.
            Exception: The driver's own error, when repeating does not help or is not allowed any longer.
        """
        self._require_open()
        require_seconds("deadline", deadline)
        options = TransactionOptions(
            isolation=isolation,
            readonly=readonly,
            deferrable=deferrable,
            resolve_commit=resolve_commit,
            deadline=deadline,
            fail_fast=fail_fast,
        )
        return RetriedTransaction(self._transactions, options)

    async def run_in_transaction(
        self, function: Callable[..., Awaitable[T]], *args: object, **options: Unpack[TransactionOptions]
    ) -> T:
        """Call `function(connection, *args)` in a transaction that is repeated as `transaction()` says.

        Args:
            function: It may be called more than once.
            *args: What to call it with, after the connection.
            **options: What `transaction()` takes.

        Returns:
            What the function returned in the attempt that committed.

        Raises:
            UnknownArgumentError: An option is unknown. The function's own arguments are passed by position; one that it
                takes by name only needs `functools.partial`.
        """
        known = TransactionOptions.__annotations__
        if not options.keys() <= known.keys():
            names = list(options)
            del args, options  # what stands under an unknown name may be a secret, and a report may show this frame
            require_known(names, known, of="run_in_transaction", but="the function's own arguments go by position")
        require_seconds("deadline", options.get("deadline"))
        self._require_open()
        return await run(self._transactions, function, args, options)

    @names_nearest
    def invocation(self, *, deadline: float | None = None) -> Invocation:
        """Bound what one invocation of a function does, where the process is frozen afterwards: an AWS Lambda, say.

            async with pool.invocation(deadline=context.get_remaining_time_in_millis() / 1000):
                ...

        No call within gets a later deadline, and a statement that still runs when the time is up is cancelled. On leaving,
        everything that the pool does in the background (a reset, a goodbye, an attempt to connect) has ended: what was in
        flight when a process is frozen comes to its end an hour later, if at all. A tenth of the time, a second at most, is
        kept back for that. It is for processes that serve one request at a time.

        Args:
            deadline: The seconds left. Default: no limit, only a proper end.

        Raises:
            TimeoutError: The time was up before the block had ended.
        """
        self._require_open()
        return Invocation(self._circuit_breaker, self._maintenance, self._clock, deadline)

    # Leasing

    def acquire(
        self, *, timeout: float | None = None, fail_fast: bool | None = None, **unknown: Never
    ) -> Acquisition[RecordT]:
        """Acquire a connection: `async with pool.acquire() as connection`, or `await` it and `release()` it.

        Args:
            timeout: How many seconds to wait for a healthy connection. Default: the pool's `deadline`.
            fail_fast: Whether to fail at once while the server is known to be away. Default: as the pool was made.
            **unknown: Nothing: what is misspelt is refused, with the nearest name.

        Raises:
            AcquireTimeoutError: None became free in time.
            Exception: The driver's own error, when no connection could be opened in time.
        """
        if unknown or timeout is not None:
            require_call(ResilientPool.acquire, timeout, unknown)
        return Acquisition(self, timeout, fail_fast)

    @names_nearest
    async def release(self, connection: ResilientConnection[RecordT], *, timeout: float | None = None) -> None:
        """Release an acquired connection. Releasing it twice does no harm.

        The session is reset in the background, unless the pool was made with `session_reset="on_release"`: then the
        reset is waited for, and what it raises is raised here, also that it found the connection lost. One that is known to
        be lost is not reset. It is as with asyncpg's own pool.

        Args:
            connection: What `acquire()` returned.
            timeout: How many seconds the reset may take. Default: the pool's `reset_timeout`.

        Raises:
            asyncpg.InterfaceError: The connection was not acquired from this pool.
        """
        require_seconds("timeout", timeout)
        if not isinstance(connection, ResilientConnection) or not self._leases.owns(connection):
            raise asyncpg.InterfaceError(
                f"ResilientPool.release() received invalid connection: {connection!r} is not a member of this pool"
            )
        reset = self._give_back(connection, timeout)
        if reset is not None:
            await _success_of(reset)

    def _give_back(
        self, connection: ResilientConnection[RecordT], timeout: float | None = None
    ) -> asyncio.Task[None] | None:
        """End a lease, and return its reset if that is to be waited for."""
        if connection.is_released:
            return None
        if get_running_loop() is not self._loop:
            self._require_loop()
        reset = self._leases.release(connection, timeout)
        return reset if self._waits_for_reset else None

    # Notifications

    @names_nearest
    def listen(
        self, *channels: str, queue_size: int = 10_000, ping_after: float = 30.0, deadline: float | None = None
    ) -> Listener:
        """Listen to channels, again after each loss: what this returns gives out what NOTIFY sends.

            async with pool.listen("jobs") as listener:
                await work_off(pool)
                async for item in listener:
                    ...  # a Notification, or a Gap: then look for what may have been missed

        It has a connection of its own, beside the `max_size` others. When that is lost another one is opened by the pool's rules,
        for as long as waiting may help, and a `Gap` stands where notifications may be missing. A database that pauses when it has
        no connections does not pause while it is listened to.

        Args:
            *channels: Their names, exactly: an unquoted name in SQL is folded to small letters.
            queue_size: How many notifications wait for the application at most. Further ones are dropped and counted, and one `Gap`
                stands for them. Default 10,000.
            ping_after: After how many seconds without a notification the session is asked whether it still listens; then it has
                `ping_timeout` seconds to answer. Default 30.
            deadline: For how many seconds to try to listen for the first time. Default: the pool's.

        Raises:
            ConfigurationError: An argument is out of its range.
            asyncpg.InterfaceError: The pool is not open.
        """
        self._require_open()
        if self._config.may_pause:
            warnings.warn("the database will not pause: listen() keeps a connection open", stacklevel=3)
        return self._listeners.make(channels, queue_size, ping_after, deadline)

    # Opening and closing

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self) -> Self:
        if self._state is _State.OPEN:
            return self
        if self._state is _State.OPENING:
            raise asyncpg.InterfaceError("pool is being initialized in another task")
        if self._state is not _State.NEW:
            raise self._refusal()
        self._loop = self._maintenance.loop = _running_loop()
        _OPENED.add(self)
        self._state = _State.OPENING
        opened, self._circuit_breaker.is_opening = False, True
        try:
            await self._open_connections(self._config.init_size)
            opened = self._state is _State.OPENING  # or terminate() was called meanwhile
        finally:
            self._circuit_breaker.is_opening = False
            if opened:
                self._state = _State.OPEN
            else:
                self._state = _State.CLOSED
                self._terminate_all()
        if not opened:
            raise self._refusal()
        if self._resources.is_connection_needed:
            self._circuit_breaker.maintain()
        return self

    async def _open_connections(self, number: int) -> None:
        # Each holds an entry until all have one, so that none gets what another one has opened.
        openings = [asyncio.ensure_future(self._open_connection()) for _ in range(number)]
        try:
            await asyncio.gather(*openings)
        finally:
            for opening in openings:
                if opening.done() and not opening.cancelled() and opening.exception() is None:
                    self._maintenance.release(opening.result())
                opening.cancel()

    async def _open_connection(self) -> PoolEntry[DriverConnection]:
        execution: Execution[None] = self._retry_strategy.new_execution("open", options={"idempotent": True})
        self._retry_budget.calls += 1
        while True:
            try:
                return await self._acquirer.acquire(
                    execution.operation.deadline, fail_fast=execution.operation.fail_fast
                )
            except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                failure = error
            await self._retry_strategy.wait_for_retry(execution, failure)

    @names_nearest
    async def close(self, *, timeout: float | None = None) -> None:
        """Wait until every connection is released, close them all, and with them the pool.

        Callers who wait for a connection are refused at once. What the pool does itself (resets, attempts to connect,
        goodbyes) is cut short after some seconds; only connections that the application holds can make it wait longer. If
        closing is cancelled, the pool is terminated.

        Args:
            timeout: For how many seconds to wait for connections that the application holds. Then the pool is terminated: it
                is closed in any case when this returns, and a warning in the log says how many were cut off. Default: no
                limit, and a warning in the log after 60 s.

        Raises:
            asyncpg.InterfaceError: The pool was never opened, or is used from another event loop.
        """
        require_seconds("timeout", timeout)
        if self._state in (_State.CLOSED, _State.FORKED):
            self._state = _State.CLOSED
            return
        self._require_usable()
        self._require_loop()
        self._state = _State.CLOSING
        self._resources.fail_waiters(self._refusal)
        self._listeners.stop()
        self._circuit_breaker.stop()
        self._maintenance.begin_closing()
        warning = self._clock.call_later(_LONG_CLOSE, self._warn_of_long_close)
        closed = False
        try:
            closed = await self._maintenance.finish(timeout)
        finally:
            warning.cancel()
            if not closed:
                self._terminate_all()
            self._state = _State.CLOSED

    def terminate(self) -> None:
        """Close every connection without waiting, also those in use, and with them the pool.

        It may be called in any state, and while no event loop runs: then, too, every connection is cut off.
        """
        state, self._state = self._state, _State.CLOSED
        if state in (_State.NEW, _State.CLOSED, _State.FORKED):
            return
        self._listeners.stop()
        if self._loop is not None and self._loop.is_closed():
            self._maintenance.cut_off()  # what waited in that loop cannot be told any more
            return
        self._resources.fail_waiters(self._refusal)
        self._terminate_all()

    def _terminate_all(self) -> None:
        self._circuit_breaker.stop()
        self._maintenance.terminate()

    def _warn_of_long_close(self) -> None:
        self._maintenance.report_long_close(_LONG_CLOSE)

    def _refusal(self) -> Exception:
        return asyncpg.InterfaceError(f"pool {self._state.value}")

    def _disown(self) -> None:
        if self._state not in (_State.NEW, _State.CLOSED):
            self._state = _State.FORKED
            self._maintenance.disown()
            self._listeners.disown()

    def _require_open(self) -> None:
        if self._state is not _OPEN:
            raise self._refusal()
        if asyncio.get_running_loop() is not self._loop:
            self._require_loop()

    def _require_usable(self) -> None:
        if self._state in (_State.NEW, _State.OPENING):
            raise self._refusal()

    def _require_loop(self) -> None:
        if _running_loop() is not self._loop:
            raise asyncpg.InterfaceError(
                "pool is used from another event loop than the one it was opened in; make one pool for each loop; "
                "see docs/symptoms.md#other-loop"
            )

    # What else asyncpg's pool has

    async def expire_connections(self) -> None:
        """Replace every connection that is open now before its next use.

        Raises:
            asyncpg.InterfaceError: The pool is used from another event loop.
        """
        if self._state in (_State.NEW, _State.CLOSED, _State.FORKED):
            return
        self._require_loop()
        self._maintenance.expire()
        self._listeners.expire()

    def set_connect_args(self, dsn: str | None = None, /, **connect_kwargs: Unpack[ConnectArguments]) -> None:
        """Use other connection arguments for every connection opened from now on.

        Args:
            dsn: As in the constructor.
            **connect_kwargs: What `asyncpg.connect` takes, as in the constructor; what a `connect=` function takes, if the pool
                was made with one.

        Raises:
            ConfigurationError: An argument is unknown or out of range.
        """
        sealed, settled = seal(dsn, connect_kwargs, passes_on=self._config.connect is not None)
        del dsn, connect_kwargs
        self._connector.redirect(self._config.redirected(sealed, settled))
        self._retry_strategy.read_check.forget()
        if self._state is not _State.NEW:
            self._circuit_breaker.restart()

    def is_closing(self) -> bool:
        """Whether the pool is closing or closed."""
        return self._state in (_State.CLOSING, _State.CLOSED)

    @property
    def is_closed(self) -> bool:
        """Whether the pool is closed, by whatever way."""
        return self._state is _State.CLOSED

    def get_size(self) -> int:
        """How many connections are open."""
        return len(self._maintenance.connections())

    def get_idle_size(self) -> int:
        """How many open connections could be handed out at once."""
        return sum(not driver.connection.is_closed() for driver in self._resources.idle_resources())

    def get_min_size(self) -> int:
        """Return `min_size`."""
        return self._config.min_size

    def get_max_size(self) -> int:
        """Return `max_size`."""
        return self._config.max_size

    def get_init_size(self) -> int:
        """Return `init_size`."""
        return self._config.init_size

    def stats(self) -> PoolStats:
        """Take a snapshot of the pool and of what it has done so far."""
        size, idle, resetting = self.get_size(), self.get_idle_size(), self._maintenance.resetting
        return self._counters.snapshot(
            size=size,
            idle=idle,
            in_use=max(size - idle - resetting, 0),
            resetting=resetting,
            waiting=self._resources.waiting,
            min_size=self._config.min_size,
            max_size=self._config.max_size,
            circuit_open=self._circuit_breaker.is_open,
        )


async def _end_of(reset: asyncio.Task[None] | None) -> BaseException | None:
    # Not by shield: a reset that terminate() cuts short would look like a cancellation of the caller that waits for it.
    if reset is None:
        return None
    await asyncio.wait([reset])
    return None if reset.cancelled() else reset.exception()


async def _success_of(reset: asyncio.Task[None]) -> None:
    error = await _end_of(reset)
    if error is not None:
        raise error


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise asyncpg.InterfaceError(
            "resilient_pool is asyncio only: no asyncio event loop runs here (trio, for one, is not supported)"
        ) from None


class Acquisition(Generic[RecordT]):
    """What `acquire()` returns: await it, or enter it."""

    __slots__ = ("_connection", "_fail_fast", "_pool", "_timeout", "_used")

    def __init__(self, pool: ResilientPool[RecordT], timeout: float | None, fail_fast: bool | None) -> None:
        self._pool = pool
        self._timeout = timeout
        self._fail_fast = fail_fast
        self._connection: ResilientConnection[RecordT] | None = None
        self._used = False

    def __await__(self) -> Generator[Any, None, ResilientConnection[RecordT]]:
        self._used = True
        return self._acquire().__await__()

    async def __aenter__(self) -> ResilientConnection[RecordT]:
        if self._used:
            raise asyncpg.InterfaceError("a connection is already acquired")
        self._used = True
        self._connection = await self._acquire()
        return self._connection

    def _acquire(self) -> Coroutine[Any, Any, ResilientConnection[RecordT]]:
        pool = self._pool
        if pool._state is not _OPEN or get_running_loop() is not pool._loop:  # noqa: SLF001
            pool._require_open()  # noqa: SLF001
        return pool._leases.lease(self._timeout, fail_fast=self._fail_fast)  # noqa: SLF001

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        reset = None if connection is None else self._pool._give_back(connection)  # noqa: SLF001
        if reset is not None:
            await _success_of(reset)


class Invocation:
    """Enter it with `async with` around what one invocation does; see `ResilientPool.invocation`.

    Args:
        circuit_breaker: Whose prober must not go on.
        maintenance: Whose background work is ended.
        clock: Counts the time.
        seconds: The time left; `None` for no limit.
    """

    def __init__(
        self, circuit_breaker: CircuitBreaker, maintenance: Maintenance, clock: Clock, seconds: float | None
    ) -> None:
        require_seconds("deadline", seconds)
        self._circuit_breaker = circuit_breaker
        self._maintenance = maintenance
        self._clock = clock
        self._seconds = seconds
        self._ends: float | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        limit = block = None
        if self._seconds is not None:
            now = self._clock.monotonic()
            self._ends = now + self._seconds
            block = self._seconds - min(self._seconds * _KEPT_BACK, _LONGEST_KEPT_BACK)
            limit = now + max(block - _EARLIER, block / 2)
        self._stack.push_async_callback(self._rest)
        self._timeout = await self._stack.enter_async_context(asyncio.timeout(block))
        self._stack.enter_context(deadline_scope(limit))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._stack.__aexit__(kind, error, traceback)  # which swallows nothing: its parts do not
        except TimeoutError as timeout:
            if not self._timeout.expired() or timeout.args:
                raise
            raise TimeoutError(
                f"the invocation did not end within its {self._seconds:g} s, less what is kept back for leaving no "
                "statement and no reset in flight"
            ) from error

    async def _rest(self) -> None:
        await self._circuit_breaker.wait_until_stopped()
        left = None if self._ends is None else max(self._ends - self._clock.monotonic(), 0.0)
        await self._maintenance.wait_for_background(left)


def create_pool(dsn: str | None = None, /, **arguments: Unpack[TypedPoolArguments[RecordT]]) -> ResilientPool[RecordT]:
    """Make a `ResilientPool`; `await` it or enter it to open it. It takes what the class takes."""
    sealed, settled = seal(dsn, arguments)
    del dsn, arguments
    return ResilientPool(sealed, **cast("TypedPoolArguments[RecordT]", settled))


async def _on_lease(
    connection: ResilientConnection[Any], execute: Callable[..., Awaitable[T]], *arguments: object
) -> T:
    return await execute(connection, *arguments)
