"""One operation on its way through its attempts: what was asked, how far the present attempt has come, what earlier ones left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from resilient_pool.events import RetryScheduled
from resilient_pool.pooling.driver import AnyConnection, DriverConnection
from resilient_pool.retry.verdict import Fault, Outcome, Phase

T = TypeVar("T")


async def do_nothing(_connection: AnyConnection) -> Any:
    """Execute nothing: the operation is over once it has a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[T]):
    """What the application asked for.

    Attributes:
        name: Its kind, as the application calls it: `"fetch"`.
        sql: Its text, or `None` if it has none that could be judged.
        execute: Does it, on a connection.
        idempotent: Whether the caller said that it may run twice.
        replayable: Whether its arguments can be read twice. Those of a COPY from a file cannot.
        fail_fast: Whether not to wait for a server that is known to be away.
        exactly_once: Whether an unknown outcome is no reason to repeat it, also where the pool repeats unknown outcomes.
        readonly: Whether the caller asked for a read-only transaction.
        started: When it began, on the line of `Clock.monotonic()`.
        deadline: Until when attempts may begin, on the same line; `None` for ever.
    """

    name: str
    sql: str | None = None
    execute: Callable[[AnyConnection], Awaitable[T]] = do_nothing
    idempotent: bool = False
    replayable: bool = True
    fail_fast: bool = False
    exactly_once: bool = False
    readonly: bool = False
    started: float
    deadline: float | None


class AttemptState:
    """How far one attempt has come.

    Attributes:
        phase: What it is doing.
        driver: Its connection, once there is one.
        queries_before: How many queries had been sent on that connection before.
        transaction_began: When its transaction began, on the line of `Clock.monotonic()`; `None` if there is none.
        xid: The id of that transaction, where it is known.
        known_outcome: What is known of its outcome from elsewhere; it overrules what an error alone says.
    """

    __slots__ = ("driver", "known_outcome", "phase", "queries_before", "transaction_began", "xid")

    def __init__(self) -> None:
        self.phase = Phase.CONNECT
        self.driver: DriverConnection | None = None
        self.queries_before = 0
        self.transaction_began: float | None = None
        self.xid: int | None = None
        self.known_outcome: Outcome | None = None

    def execute_on(self, driver: DriverConnection) -> None:
        """Note that the attempt executes on a connection from now on."""
        self.phase, self.driver, self.queries_before = Phase.EXECUTE, driver, driver.queries


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAttempt:
    """How an attempt ended whose outcome is unknown.

    Attributes:
        error: What was raised.
        fault: What is known about it.
        sqlstate: The server's code, if there was any.
    """

    error: Exception
    fault: Fault
    sqlstate: str | None


class Execution(Generic[T]):
    """One operation with its attempts, one after the other. The retry loop owns it: it begins attempts and judges them.

    Attributes:
        operation: What was asked.
        attempt: How far the present attempt has come.
        last_error: The last error that says more than that time ran out.
        lost: How the first attempt ended whose outcome is unknown, if the operation may be repeated only because it looks
            like a read. Every later attempt is guarded then.
        is_harmless: Whether the server's catalog said that it calls nothing that may write.
        scheduled: The retry that is counted once the guard allows it.
        outlasted: How many attempts were lost when they had lasted longer than the server lets a transaction be idle.
    """

    __slots__ = ("attempt", "is_harmless", "last_error", "lost", "operation", "outlasted", "scheduled")

    def __init__(self, operation: Operation[T]) -> None:
        self.operation = operation
        self.attempt = AttemptState()
        self.last_error: Exception | None = None
        self.lost: LostAttempt | None = None
        self.is_harmless = False
        self.scheduled: RetryScheduled | None = None
        self.outlasted = 0

    def begin_attempt(self) -> AttemptState:
        """Begin another attempt."""
        self.attempt = AttemptState()
        return self.attempt

    def remember(self, error: Exception) -> None:
        """Keep an error for the end, if it says more than that time ran out."""
        if self.last_error is None or not isinstance(error, TimeoutError):
            self.last_error = error

    def error_for_caller(self, error: Exception) -> Exception:
        """Choose what the caller sees in the end: not that time ran out, if it is known what it ran out with."""
        return self.last_error if self.last_error is not None and isinstance(error, TimeoutError) else error
