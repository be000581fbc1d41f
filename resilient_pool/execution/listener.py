"""A session of its own that listens, listens again after a loss, and says where notifications may be missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import asyncpg

from resilient_pool._validation import is_sendable, require_count, require_number, require_seconds, shown
from resilient_pool.errors import AcquireTimeoutError, ConfigurationError
from resilient_pool.events import DiscardReason
from resilient_pool.execution.connection import LeaseManager
from resilient_pool.execution.notifications import Gap, GapReason, Notification, NotificationQueue
from resilient_pool.execution.retry_strategy import Execution
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.resource_pool import PoolEntry
from resilient_pool.retry.backoff import OPERATION_BACKOFF
from resilient_pool.retry.verdict import Failure, Fault
from resilient_pool.sql.session_state import LISTENER

# The server cuts a longer name off, and pg_notify() refuses it.
_LONGEST_NAME = 63


class Subscription:
    """Keeps a session listening until it is stopped.

    Its connection is acquired from the pool like any caller's, through the circuit breaker, and then leaves the pool: it is none
    of its `max_size`.

    Attributes:
        has_listened: Whether it has listened at least once.
        is_over: Whether nothing will be added to what waits.
    """

    def __init__(
        self,
        listeners: Listeners,
        *,
        channels: tuple[str, ...],
        queue_size: int,
        ping_after: float,
        deadline: float | None,
    ) -> None:
        self._listeners = listeners
        self._context = listeners.context
        self._clock = listeners.context.clock
        self._leases = listeners.leases
        self._maintenance = listeners.leases.maintenance
        self._connector = listeners.leases.connector
        self._channels = channels
        self._ping_after = ping_after
        self._deadline = deadline
        self._queue = NotificationQueue(queue_size, self._clock.now)
        # What comes while LISTEN is under way stands behind the gap before it.
        self._early: list[Notification] | None = None
        self._entry: PoolEntry[DriverConnection] | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._connection: object = None
        self._interruption: GapReason | None = None
        self._wake = asyncio.Event()
        self._heard_at = 0.0
        self.has_listened = False
        self.is_over = False

    # For the consumer

    @property
    def is_begun(self) -> bool:
        """Whether it was begun, or stopped before."""
        return self._task is not None or self.is_over

    def begin(self) -> None:
        """Begin to listen, unless the pool cannot be used."""
        self._listeners.require_open()
        self._listeners.subscriptions.add(self)
        self._loop = asyncio.get_running_loop()
        self._task = self._context.begin(self._run())

    async def until_listening(self) -> None:
        """Wait until the session listens for the first time.

        Raises:
            Exception: Why it never will.
        """
        while not (self.has_listened or self.is_over):
            await self._change()
        self._raise_error()

    async def take(self) -> Notification | Gap | None:
        """Wait for the next item, and take it. `None` if there will be none."""
        while not self._queue:
            self._raise_error()
            if self.is_over:
                return None
            await self._change()
        return self._queue.take()

    def forget(self) -> None:
        """Give out nothing any more."""
        self._queue.clear()
        self._error = None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def _change(self) -> None:
        if self._waiter is not None:
            raise asyncpg.InterfaceError(
                "another task waits for this listener's next notification: one task reads a listener"
            )
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The end

    def stop(self) -> None:
        """Listen no more: close the connection, with a goodbye that is not waited for here."""
        if self.is_over:
            return
        self.is_over = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._hang_up(DiscardReason.CLOSING)
        self._listeners.subscriptions.discard(self)
        self._notify()

    def _hang_up(self, reason: DiscardReason) -> None:
        self._connection = None
        entry, self._entry = self._entry, None
        if entry is not None:
            self._maintenance.close_connection(entry, reason)

    def stop_anywhere(self) -> None:
        """Do that, in whatever thread, with or without an event loop."""
        if self._loop is None or self.is_over or not self._loop.is_running():
            self.cut_off()
        elif self._maintenance.is_in_own_loop:
            self.stop()
        else:
            self._loop.call_soon_threadsafe(self.stop)

    def cut_off(self) -> None:
        """Close the connection at once, and do nothing that needs an event loop."""
        self.is_over = True
        if self._entry is not None and self._entry.resource is not None:
            self._entry.resource.terminate()
        self._listeners.subscriptions.discard(self)

    def disown(self) -> None:
        """Touch nothing any more: in a forked process the connection is the parent's."""
        self.is_over = True
        if self._entry is not None and self._entry.resource is not None:
            self._entry.resource.disown()

    async def wait_until_over(self) -> None:
        """Wait until the task has ended that keeps the session listening."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def interrupt(self, reason: GapReason) -> None:
        """Listen again on another connection."""
        self._interruption = self._interruption or reason
        self._wake.set()

    # The task

    async def _run(self) -> None:
        interrupted_by = None
        try:
            while True:
                self._entry = await self._listen()
                self._listening(interrupted_by)
                interrupted_by = await self._until_interrupted(self._entry)
                expired = interrupted_by is GapReason.EXPIRED
                self._hang_up(DiscardReason.GENERATION if expired else DiscardReason.FAILED)
        except Exception as error:  # noqa: BLE001 - it is the consumer's
            self._error = None if self.is_over else error
        finally:
            self.stop()
            self._notify()  # it may have been cut off while the loop did not run

    async def _listen(self) -> PoolEntry[DriverConnection]:
        """Listen on a new connection: for the first time within the deadline, after a loss for as long as waiting may help."""
        delays = OPERATION_BACKOFF.delays()
        while True:
            deadline = None if self.has_listened else self._deadline
            fail_fast = False if self.has_listened else None
            execution: Execution[None] = self._leases.retry_strategy.new_execution(
                "listen", options={"idempotent": True, "deadline": deadline, "fail_fast": fail_fast}
            )
            self._context.config.retry_budget.calls += 1
            try:
                return await self._attempt_until_final(execution)
            except Exception as error:
                if not (self.has_listened and self._may_be_cured(execution, error)):
                    raise
            await self._clock.sleep(next(delays))

    async def _attempt_until_final(self, execution: Execution[None]) -> PoolEntry[DriverConnection]:
        while True:
            try:
                return await self._attempt(execution)
            except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                failure = error
            await self._leases.retry_strategy.wait_for_retry(execution, failure)

    def _may_be_cured(self, execution: Execution[None], error: Exception) -> bool:
        if isinstance(error, AcquireTimeoutError):
            return True
        writable = self._connector.expects_writes
        failure = Failure(error=error, phase=execution.attempt.phase, sent=False, writable=writable)
        return not self._maintenance.closing and self._context.classify(failure).fault is not Fault.PERMANENT

    async def _attempt(self, execution: Execution[None]) -> PoolEntry[DriverConnection]:
        operation = execution.operation
        entry = await self._leases.acquirer.acquire(operation.deadline, fail_fast=operation.fail_fast, is_begun=True)
        listens = False
        try:
            if entry.resource is None:
                raise asyncpg.ConnectionDoesNotExistError("connection was closed before it could listen")
            execution.attempt.execute_on(entry.resource, entry.resource.queries)
            await self._listen_on(entry.resource, self._leases.retry_strategy.time_limit(execution))
            listens = True
        finally:
            if listens:
                self._maintenance.detach(entry)
            else:
                self._maintenance.discard(entry, DiscardReason.FAILED)
        return entry

    async def _listen_on(self, driver: DriverConnection, limit: float | None) -> None:
        if driver.is_pooled:
            await self._leases.require_session(LISTENER)
        seconds = self._context.config.timeout if limit is None else limit
        self._connection, self._interruption = driver.connection, None
        self._wake.clear()
        asyncpg.Connection.add_termination_listener(driver.connection, self._lost)
        self._early = []
        try:
            await driver.listen(self._channels, self._notified, timeout=seconds)
        except asyncpg.ReadOnlySQLTransactionError:
            await driver.learn_why_read_only()
            raise
        if not await driver.listens_to(self._channels, timeout=seconds):
            raise asyncpg.InterfaceError(
                "the session that answered after LISTEN does not listen: a pooler stands between, which gives this connection "
                "another session for every transaction; connect to the server, or to a pooler in session mode, with a pool of its own"
            )

    def _listening(self, interrupted_by: GapReason | None) -> None:
        """Give out what came since LISTEN, behind the gap that an interruption has left."""
        if interrupted_by is not None:
            self._queue.put_gap(interrupted_by, self._heard_at)
        self.has_listened = True
        self._heard_at = self._clock.now()
        early, self._early = self._early or [], None
        for notification in early:
            self._queue.put(notification)
        self._notify()

    async def _until_interrupted(self, entry: PoolEntry[DriverConnection]) -> GapReason:
        while self._interruption is None:
            left = self._ping_after - (self._clock.now() - self._heard_at)
            if left > 0:
                timer = self._clock.call_later(left, self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    timer.cancel()
                if self._interruption is None:
                    self._wake.clear()
            else:
                await self._ask(entry)
        return self._interruption

    async def _ask(self, entry: PoolEntry[DriverConnection]) -> None:
        """Ask a session that has been silent whether it still listens."""
        began = self._clock.now()
        self._context.counters.pings += 1
        reason = None
        try:
            listens = entry.resource is not None and await entry.resource.listens_to(
                self._channels, timeout=self._context.config.ping_timeout
            )
            if listens:
                self._heard_at = began
            else:
                reason = GapReason.SESSION_CHANGED
        except TimeoutError:
            reason = GapReason.NO_ANSWER
        except Exception:  # noqa: BLE001 - whatever it is, there was no answer
            reason = GapReason.CONNECTION_LOST
        if reason is not None:
            self._context.counters.pings_failed += 1
            self.interrupt(reason)

    # What the driver calls

    def _notified(self, connection: object, pid: int, channel: str, payload: str) -> None:
        if connection is not self._connection:
            return  # a gap stands for what it may still say
        notification = Notification(channel=channel, payload=payload, pid=pid)
        if self._early is not None:
            self._early.append(notification)
            return
        self._heard_at = self._clock.now()
        self._queue.put(notification)
        self._notify()

    def _lost(self, connection: object) -> None:
        if connection is self._connection:
            self.interrupt(GapReason.CONNECTION_LOST)


class Listener:
    """What `pool.listen()` returns: an asynchronous iterator of `Notification` and `Gap`.

    Entered with `async with`, it listens when the block begins: what is committed from then on is notified. Otherwise it
    begins when the first item is asked for. It ends, after what has come already, when the pool is closed or terminated.
    One task reads it at a time; a loop that was left can be gone on with by another loop. Its connection is closed by `aclose()`,
    at the end of the block, and when the listener is not referred to any more.
    """

    __slots__ = ("_subscription",)

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription

    def _begin(self) -> None:
        if not self._subscription.is_begun:
            self._subscription.begin()

    async def __aenter__(self) -> Self:
        self._begin()
        listening = False
        try:
            await self._subscription.until_listening()
            listening = True
        finally:
            if not listening:
                self._subscription.stop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notification | Gap:
        """Wait for the next item. Cancelling that loses none.

        Raises:
            StopAsyncIteration: The listener or the pool was closed.
            asyncpg.InterfaceError: A pooler that shares sessions stands between; the pool is not open; another task waits.
            AcquireTimeoutError: It could not listen for the first time within the deadline.
            Exception: The driver's own error, when waiting does not cure it: later, too, a changed password for one.
        """
        self._begin()
        item = await self._subscription.take()
        if item is None:
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Listen no more, and give nothing out any more. Closing it twice does no harm."""
        self._subscription.stop()
        self._subscription.forget()
        await self._subscription.wait_until_over()

    def __del__(self) -> None:
        self._subscription.stop_anywhere()


class Listeners:
    """The listeners of one pool.

    Attributes:
        subscriptions: Those that have begun and are not over.
    """

    def __init__(
        self,
        context: PoolContext,
        leases: LeaseManager,
        require_open: Callable[[], None],
    ) -> None:
        self.context = context
        self.leases = leases
        self.require_open = require_open
        self.subscriptions: set[Subscription] = set()

    def make(self, channels: tuple[str, ...], queue_size: int, ping_after: float, deadline: float | None) -> Listener:
        """Make a listener, which begins when it is entered or read; the arguments are those of `pool.listen()`.

        Raises:
            ConfigurationError: One of them is out of its range.
        """
        require_count("queue_size", queue_size, unit="a number of notifications")
        require_number("ping_after", ping_after, unit="a number of seconds", least=0, above=True)
        require_seconds("deadline", deadline)
        return Listener(
            Subscription(
                self,
                channels=_checked(channels),
                queue_size=queue_size,
                ping_after=ping_after,
                deadline=deadline,
            )
        )

    def stop(self) -> None:
        """Let all of them end after what has come already. It needs no event loop."""
        for subscription in tuple(self.subscriptions):
            subscription.stop_anywhere()

    def expire(self) -> None:
        """Let all of them listen again on new connections."""
        for subscription in self.subscriptions:
            subscription.interrupt(GapReason.EXPIRED)

    def disown(self) -> None:
        """Touch nothing any more: in a forked process all connections are the parent's."""
        for subscription in self.subscriptions:
            subscription.disown()


def _checked(channels: tuple[str, ...]) -> tuple[str, ...]:
    """Return the channels, each once. Raises `ConfigurationError` if one is no name that a channel can have, or there is none."""
    if not channels:
        raise ConfigurationError("listen() needs the name of a channel")
    for channel in channels:
        if not is_sendable(channel) or not 1 <= len(channel.encode()) <= _LONGEST_NAME:
            raise ConfigurationError(
                f"a channel must be a str of 1 to {_LONGEST_NAME} bytes without NUL, not {shown(channel, lambda _: True)}"
            )
    return tuple(dict.fromkeys(channels))
