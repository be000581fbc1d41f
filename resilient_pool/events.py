"""The events that an application can observe."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

from resilient_pool.retry.verdict import Fault, Outcome


class DiscardReason(StrEnum):
    """Why a connection was closed by the pool.

    Attributes:
        STALE: It had died unnoticed: the socket said so before it was used.
        PING_FAILED: It was idle for long and did not answer a ping.
        EXPIRED_LIFETIME: It was open for longer than `max_lifetime`.
        IDLE: It was unused for longer than `max_inactive_connection_lifetime`.
        MAX_QUERIES: It had served as many operations as `max_queries` allows.
        GENERATION: It was opened before `expire_connections()`, or before a failure that condemned all older
            connections.
        FAILED: An operation failed on it in a way that leaves it unfit.
        RESET_FAILED: Its session could not be reset in time after use.
        CLOSED: The application closed it itself.
        CLOSING: The pool is closing.
    """

    STALE = "stale"
    PING_FAILED = "ping_failed"
    EXPIRED_LIFETIME = "expired_lifetime"
    IDLE = "idle"
    MAX_QUERIES = "max_queries"
    GENERATION = "generation"
    FAILED = "failed"
    RESET_FAILED = "reset_failed"
    CLOSED = "closed"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. It never carries SQL text, arguments or secrets.

    Attributes:
        name: The dotted name of this kind of event, the same in every version.
    """

    name: ClassVar[str] = "pool.event"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(Event):
    """A connection was opened and is ready for use.

    Attributes:
        elapsed: What opening took, in seconds.
        server_pid: The process id the server gave in its handshake.
        size: How many connections the pool has now, this one included.
    """

    name: ClassVar[str] = "pool.connection.opened"
    elapsed: float
    server_pid: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionDiscarded(Event):
    """A connection was closed by the pool, or found closed.

    Attributes:
        reason: Why.
        age: How long it had been open, in seconds.
        server_pid: The process id the server gave in its handshake.
        error: What its reset raised, the application's own `reset=` for one: type and message, without secrets. `None` with
            any other reason.
    """

    name: ClassVar[str] = "pool.connection.discarded"
    reason: DiscardReason
    age: float
    server_pid: int
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(Event):
    """What every event about a failed attempt says.

    Attributes:
        operation: The kind of operation, such as `"fetch"`.
        fault: The kind of trouble.
        outcome: What the attempt is known to have done.
        sqlstate: The nearest SQLSTATE, or `None` if the server sent none.
        attempt: Which attempt failed; the first is 1.
        elapsed: Seconds since the operation began.
    """

    operation: str
    fault: Fault
    outcome: Outcome
    sqlstate: str | None
    attempt: int
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(AttemptFailed):
    """An attempt failed, and another one follows.

    Attributes:
        delay: How long the pool waits before the next attempt, in seconds.
    """

    name: ClassVar[str] = "pool.retry.scheduled"
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryExhausted(AttemptFailed):
    """An attempt failed in a way that waiting cures, but no further attempt is allowed.

    Attributes:
        reason: What forbade it: `"attempts"`, `"deadline"`, `"budget"` (the retry budget is spent), or `"absent"` (no
            connection could be opened for as long as one was waited for).
    """

    name: ClassVar[str] = "pool.retry.exhausted"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeUnknown(AttemptFailed):
    """A statement that may write was lost on the way, and it was not repeated. `outcome` is always `Outcome.UNKNOWN`."""

    name: ClassVar[str] = "pool.outcome.unknown"
    outcome: Outcome = Outcome.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeResolved(Event):
    """The answer to a COMMIT was lost, and what became of the transaction is known nevertheless.

    Attributes:
        operation: Always `"transaction"`.
        answer: `"committed"` or `"aborted"`.
        xid: The transaction's id, or `None` if it had none.
        elapsed: What finding out took, in seconds.
    """

    name: ClassVar[str] = "pool.outcome.resolved"
    operation: str
    answer: str
    xid: int | None
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """The server cannot be reached: one prober tries, and every other caller waits.

    Attributes:
        fault: The kind of trouble.
        sqlstate: The nearest SQLSTATE, or `None` if the server sent none.
    """

    name: ClassVar[str] = "pool.circuit.opened"
    fault: Fault
    sqlstate: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """The server was reached again.

    Attributes:
        attempts: How many attempts had failed.
        elapsed: Seconds since the first of them.
    """

    name: ClassVar[str] = "pool.circuit.closed"
    attempts: int
    elapsed: float


class WaitReason(StrEnum):
    """Why a caller did not get a connection at once.

    Attributes:
        BUSY: All connections were in use.
        RESETTING: The one connection in use had just been given back, and its session was being reset.
        CONNECTING: No connection was open, and the first one was being opened.
        AWAY: The server was away, for some of the time at least.
    """

    BUSY = "busy"
    RESETTING = "resetting"
    CONNECTING = "connecting"
    AWAY = "away"


class WaitEnd(StrEnum):
    """How a caller's wait for a connection ended.

    Attributes:
        SERVED: With a connection, or the right to open one.
        TIMEOUT: Its time was up.
        FAILED: With an error: the server refuses connections for good, say, or the pool was closed.
        CANCELLED: The caller was cancelled.
    """

    SERVED = "served"
    TIMEOUT = "timeout"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerWaited(Event):
    """A caller did not get a connection at once. Emitted when its wait has ended, in its own task and context.

    One operation may wait more than once: a connection that it waited for can turn out to be dead.

    Attributes:
        reason: Why it had to wait.
        end: How that ended.
        elapsed: How long it waited, in seconds.
        fault: If the server was away meanwhile, the kind of trouble; else `None`.
        outage: How long the server had been away by then, in seconds, or in all if it came back meanwhile; else `None`.
        attempts: How many attempts to connect had failed in that outage; else 0.
    """

    name: ClassVar[str] = "pool.caller.waited"
    reason: WaitReason
    end: WaitEnd
    elapsed: float
    fault: Fault | None = None
    outage: float | None = None
    attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolerDetected(Event):
    """A pooler stands between this process and PostgreSQL. Emitted once per pool.

    Attributes:
        handshake_pid: The process id given in the handshake.
        backend_pid: What `pg_backend_pid()` answered on the same connection.
        statement_cache_size: The size that this pool's connections use from now on; 0 is none.
    """

    name: ClassVar[str] = "pool.pooler.detected"
    handshake_pid: int
    backend_pid: int
    statement_cache_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStarted(Event):
    """A migration begins to run.

    Attributes:
        migration: The command without secrets, the directory, or the function's name.
        attempt: Which attempt this is; the first is 1.
        elapsed: Seconds since `run_migration` was called.
    """

    name: ClassVar[str] = "migration.started"
    migration: str
    attempt: int
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRepeated(Event):
    """A migration could not connect, and is run again.

    Attributes:
        reason: What it said, without secrets.
        attempt: Which attempt failed; the first is 1.
        delay: Seconds until the next attempt.
        elapsed: Seconds since `run_migration` was called.
    """

    name: ClassVar[str] = "migration.repeated"
    reason: str
    attempt: int
    delay: float
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLockWaited(Event):
    """A migration waits for another one to end. Emitted once for each other one.

    Attributes:
        holder: What it waits for, as far as the server says.
        elapsed: How long it has waited so far, in seconds.
    """

    name: ClassVar[str] = "migration.lock.waited"
    holder: str
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationLockLost(Event):
    """The connection that holds the lock was lost while a migration ran; another one may have begun.

    Attributes:
        losses: How often that has happened to this migration.
    """

    name: ClassVar[str] = "migration.lock.lost"
    losses: int


class Observer(Protocol):
    """What receives events. It is called in the event loop, between two steps of an operation: it must not block.

    It is a plain function: a coroutine function is refused, since it is not awaited.
    """

    def __call__(self, event: Event, /) -> None:
        """Take note of `event`."""
        ...


def is_observer(value: object) -> bool:
    """Whether something can be called with an event, and need not be awaited."""
    return callable(value) and not any(
        inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)
        for call in (value, getattr(value, "__call__", None))  # noqa: B004 - what `callable` looks for may be asynchronous
    )
