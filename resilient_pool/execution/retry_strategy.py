"""An operation on its way through its attempts, and what follows from each failure: classify, decide, wait or give up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypedDict, TypeVar, Unpack

import asyncpg

from resilient_pool.clock import deadline_after
from resilient_pool.errors import OutcomeUnknownError
from resilient_pool.events import DiscardReason, OutcomeUnknown, RetryExhausted, RetryScheduled
from resilient_pool.execution.query_methods import CallOptions
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import PoolContext, nearest_sqlstate
from resilient_pool.pooling.driver import (
    AnyConnection,
    DriverConnection,
    comes_from_the_transport,
    is_of_another_connection,
    nothing_sent,
)
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.retry.backoff import OPERATION_BACKOFF
from resilient_pool.retry.decision import GiveUp, GiveUpReason, Retry, RetryState, decide
from resilient_pool.retry.verdict import Disposition, Failure, Fault, Outcome, Phase, Verdict

T = TypeVar("T")

# The server's limits on a transaction: what it says, which setting that is, and of what kind of transaction.
_LIMITS = (
    ("25P04", "transaction_timeout", "lasts longer than"),
    ("25P03", "idle_in_transaction_session_timeout", "is idle for longer than"),
)
_ANY_HOST = (
    "resilient_pool: this server accepts no writes, and of several hosts the first that answers is used: "
    'target_session_attrs="primary" finds the one that accepts them'
)
_LOSSES = frozenset({Fault.STALE, Fault.DISCONNECTED, Fault.POISONED})


# A guarded attempt that meets one of these says nothing good of the lost attempt before it: the text writes, or what it names
# is not there any more, and the catalog cannot say what it was.
REFUSALS_OF_A_GUARD = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.UndefinedFunctionError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedObjectError,
    asyncpg.InvalidSchemaNameError,
)
_BEGIN_GUARD = "BEGIN READ ONLY, NOT DEFERRABLE"
_SHORTEST_LIMIT = 1.0
"""Of a guard's own statements, in seconds: what is left of a deadline can be nothing."""

_UNTIL_THE_DEADLINE = replace(OPERATION_BACKOFF, max_attempts=None)


async def do_nothing(_connection: AnyConnection) -> Any:
    """Execute nothing: the operation is over once it has a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[T]):
    """What the application asked for.

    Attributes:
        name: Its kind, as the application calls it: `"fetch"`.
        sql: Its text, or `None` if it has none that could be judged.
        execute: Does it, on a connection.
        arguments: What `execute` is called with, after the connection.
        idempotent: Whether the caller said that it may run twice.
        replayable: Whether its arguments can be read twice. Those of a COPY from a file cannot.
        fail_fast: Whether not to wait for a server that is known to be away.
        is_transaction: Whether it is a transaction.
        exactly_once: Whether an unknown outcome is no reason to repeat it, also where the pool repeats unknown outcomes.
        readonly: Whether the caller asked for a read-only transaction.
        started: When it began, on the line of `Clock.monotonic()`.
        deadline: Until when attempts may begin, on the same line; `None` for ever.
    """

    name: str
    sql: str | None = None
    execute: Callable[..., Awaitable[T]] = do_nothing
    arguments: tuple[Any, ...] = ()
    idempotent: bool = False
    replayable: bool = True
    fail_fast: bool = False
    is_transaction: bool = False
    exactly_once: bool = False
    readonly: bool = False
    started: float
    deadline: float | None

    @property
    def is_the_pools_own(self) -> bool:
        """Whether nothing of the application's is executed: a connection is opened, leased or made to listen."""
        return self.execute is do_nothing and not self.is_transaction


Asked: TypeAlias = tuple[str, str | None, Callable[..., Awaitable[T]], tuple[Any, ...], "CallOptions", bool]
"""What was asked, in the order in which `RetryStrategy.new_execution` takes it: kept until it is known whether that is needed."""


class TransactionTraits(TypedDict, total=False):
    """What only transactions have of an `Operation`."""

    is_transaction: bool
    exactly_once: bool
    readonly: bool


@dataclass(slots=True, kw_only=True, eq=False)
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

    phase: Phase = Phase.CONNECT
    driver: DriverConnection | None = None
    queries_before: int = 0
    transaction_began: float | None = None
    xid: int | None = None
    known_outcome: Outcome | None = None

    def execute_on(self, driver: DriverConnection, queries_before: int) -> None:
        """Note that the attempt executes on a connection."""
        self.phase, self.driver, self.queries_before = Phase.EXECUTE, driver, queries_before


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAttempt:
    """How an attempt ended whose outcome is unknown."""

    error: Exception
    fault: Fault
    sqlstate: str | None


class Execution(Generic[T]):
    """One operation with its attempts, one after the other. Made when the first one has failed, or before it if that is to be noted.

    Attributes:
        operation: What was asked.
        retries: What is remembered of its failures.
        attempt: How far the present attempt has come.
        last_error: The last error that says more than that time ran out.
        lost: How the first attempt ended whose outcome is unknown, if the operation may be repeated. Every later attempt is
            guarded then, if that is only because it looks like a read.
        is_harmless: Whether the server's catalog said that it calls nothing that may write.
        scheduled: The retry that is counted once the guard allows it.
        outlasted: How many attempts were lost when they had lasted longer than the server lets a transaction be idle.
    """

    __slots__ = ("attempt", "is_harmless", "last_error", "lost", "operation", "outlasted", "retries", "scheduled")

    def __init__(self, operation: Operation[T], retries: RetryState) -> None:
        self.operation = operation
        self.retries = retries
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


class RepeatRefusedError(Exception):
    """A guarded attempt must not go on: the operation may write."""


class RetryStrategy:
    """Decides after each failure of an operation whether and when it is tried again, and what its caller sees if it is not."""

    def __init__(
        self,
        context: PoolContext,
        read_check: ReadCheck,
        maintenance: Maintenance,
        connector: Connector,
    ) -> None:
        self._context = context
        self._config = context.config
        self._clock = context.clock
        self._reader = read_check.reader
        self.read_check = read_check
        self.maintenance = maintenance
        self.connector = connector

    def limits(self, started: float, options: CallOptions) -> tuple[float | None, bool]:
        """Return until when an operation that `started` then waits for a connection, and whether it fails fast."""
        seconds, fail_fast = options.get("deadline"), options.get("fail_fast")
        ends = deadline_after(started, self._config.deadline if seconds is None else seconds)
        return ends, self._config.fail_fast if fail_fast is None else fail_fast

    def new_execution(
        self,
        name: str,
        sql: str | None = None,
        execute: Callable[..., Awaitable[T]] = do_nothing,
        arguments: tuple[Any, ...] = (),
        options: CallOptions | None = None,
        replayable: bool = True,
        started: float | None = None,
        **transaction: Unpack[TransactionTraits],
    ) -> Execution[T]:
        """Remember an operation. Its deadline is counted from when it `started`, by default now."""
        if started is None:
            started = self._clock.monotonic()
        options = options or {}
        ends, fails_fast = self.limits(started, options)
        operation = Operation(
            name=name,
            sql=sql,
            execute=execute,
            arguments=arguments,
            idempotent=options.get("idempotent", False),
            replayable=replayable,
            fail_fast=fails_fast,
            started=started,
            deadline=ends,
            **transaction,
        )
        return Execution(operation, self._new_state(operation))

    def _new_state(self, operation: Operation[T]) -> RetryState:
        contention = None
        if operation.is_transaction and operation.deadline is not None and self._config.backoff is OPERATION_BACKOFF:
            # By the deadline only: under contention one transaction always gets through, after some number of attempts.
            contention = _UNTIL_THE_DEADLINE
        return RetryState(
            operations=self._config.backoff,
            reconnect=self._config.reconnect,
            contention=contention,
            started=operation.started,
        )

    async def wait_for_retry(self, execution: Execution[T], error: Exception, *, holds: bool = False) -> None:
        """Wait before the next attempt, and begin it; raises as `next_delay` does.

        `holds` says that the connection of the failed attempt is still the caller's: see `judge`.
        """
        delay = await self.judge(execution, error) if holds else self.next_delay(execution, error)
        await self._clock.sleep(delay)
        execution.begin_attempt()

    async def judge(self, execution: Execution[T], error: Exception) -> float:
        """Do what `next_delay` does, while the connection of the attempt, if it has one, is still the caller's.

        A server that has refused a write is asked before why: what it says decides what the refusal means.
        """
        attempt = execution.attempt
        is_refusal = isinstance(self._context.unwrap(error), asyncpg.ReadOnlySQLTransactionError)
        if is_refusal and attempt.driver is not None and attempt.phase is Phase.EXECUTE:
            await attempt.driver.learn_why_read_only()
        return self.next_delay(execution, error)

    async def run_on(self, execution: Execution[T], driver: DriverConnection) -> T:
        """Execute an operation on a connection; guarded, if an earlier attempt of it may have taken effect.

        A guarded attempt runs in a read-only transaction, after the server's catalog has said that the text calls nothing
        that may write. Whatever goes wrong in it, the connection is not used again: the transaction may be open.
        """
        operation = execution.operation
        execution.attempt.execute_on(driver, driver.queries)
        if operation.sql is not None and self.needs_guard(execution):
            return await self._run_guarded(execution, operation.sql, driver)
        return await operation.execute(driver.connection, *operation.arguments)

    async def _run_guarded(self, execution: Execution[T], sql: str, driver: DriverConnection) -> T:
        execution.attempt.phase = Phase.CHECKOUT  # what comes before the statement is part of getting the connection
        if not await self.read_check.allows(driver, (sql,), timeout=self.time_limit(execution)):
            raise RepeatRefusedError
        execution.is_harmless = True
        self._emit_scheduled(execution)
        ended = False
        try:
            await driver.execute(_BEGIN_GUARD, timeout=self.time_limit(execution))
            execution.attempt.phase = Phase.EXECUTE
            try:
                result = await execution.operation.execute(driver.connection, *execution.operation.arguments)
            except REFUSALS_OF_A_GUARD as error:
                raise RepeatRefusedError from error
            ended = await self._end_guard(execution, driver)
        finally:
            if not ended:
                driver.invalidated = True
        return result

    async def _end_guard(self, execution: Execution[T], driver: DriverConnection) -> bool:
        """Commit what only read, and say whether the connection can be used again."""
        try:
            await driver.execute("COMMIT", timeout=self.time_limit(execution))
        except Exception as error:
            # A refusal says that a serializable transaction must not have read this. Without an answer, the result stands.
            if isinstance(error, asyncpg.PostgresError) and not driver.connection.is_closed():
                raise
            return False
        return True

    def time_limit(self, execution: Execution[T]) -> float | None:
        """Return how many seconds a statement of the pool's own may take."""
        deadline = execution.operation.deadline
        return None if deadline is None else max(deadline - self._clock.monotonic(), _SHORTEST_LIMIT)

    def next_delay(self, execution: Execution[T], error: Exception, *, hindrance: str | None = None) -> float:
        """Return how long to wait before the next attempt.

        Args:
            execution: What failed. What is remembered of its failures is changed.
            error: How it failed this time.
            hindrance: Why no further attempt can be made although another might succeed. It becomes a note of an error
                after which nothing is left of the operation.

        Returns:
            Seconds.

        Raises:
            OutcomeUnknownError: The operation may have taken effect, and may not be repeated.
            Exception: `error`, or an earlier one that says more, when no further attempt may be made.
        """
        state, driver = execution.retries, execution.attempt.driver
        if isinstance(error, RepeatRefusedError) and execution.lost is not None:
            raise self._outcome_unknown(execution, execution.lost)
        if driver is not None and comes_from_the_transport(error) and self.maintenance.closing:
            # terminate() has closed the connection under the driver, which does not say so itself.
            error = _as_loss(error)
        failure = self._build_failure(execution, error)
        verdict = self._heed_limits(execution, failure, self._classify(execution, failure))
        verdict = self._override_outcome(execution, failure, verdict)
        if verdict.fault is Fault.WRONG_SERVER and self.connector.takes_any_host:
            error.add_note(_ANY_HOST)
        self._invalidate_connections(execution, failure, verdict)
        if execution.lost is None and self._is_lost_and_repeatable(execution, verdict):
            execution.lost = LostAttempt(error=error, fault=verdict.fault, sqlstate=nearest_sqlstate(failure))
        now = self._clock.monotonic()
        if hindrance is None or verdict.fault is Fault.PERMANENT:
            decision = self._decide(execution, failure, verdict, now)
        else:
            state.note(verdict.fault, failure.phase, now)
            decision = GiveUp(reason=GiveUpReason.PERMANENT)
            if verdict.outcome is Outcome.UNKNOWN:
                decision = GiveUp(reason=GiveUpReason.OUTCOME_UNKNOWN)
            else:
                error.add_note(hindrance)
        if isinstance(decision, GiveUp):
            raise self._final_error(execution, failure, verdict, decision.reason)
        execution.remember(error)
        execution.scheduled = RetryScheduled(
            operation=execution.operation.name,
            fault=verdict.fault,
            outcome=verdict.outcome,
            sqlstate=nearest_sqlstate(failure),
            attempt=state.attempts,
            delay=decision.delay,
            elapsed=state.elapsed(now),
        )
        if execution.is_harmless or not self.needs_guard(execution):
            self._emit_scheduled(execution)
        return decision.delay

    def _emit_scheduled(self, execution: Execution[T]) -> None:
        scheduled, execution.scheduled = execution.scheduled, None
        if scheduled is not None:
            self._context.retry_scheduled(scheduled)

    def _decide(self, execution: Execution[T], failure: Failure, verdict: Verdict, now: float) -> Retry | GiveUp:
        state = execution.retries
        if failure.phase is Phase.CONNECT and verdict.fault is not Fault.PERMANENT:
            # The circuit breaker has waited already, for as long as there was sense in it.
            state.note(verdict.fault, failure.phase, now)
            return GiveUp(reason=GiveUpReason.ABSENT)
        operation, driver, unknown = execution.operation, execution.attempt.driver, verdict.outcome is Outcome.UNKNOWN
        decision = decide(
            verdict,
            state,
            phase=failure.phase,
            repeatable=not unknown or self._is_repeatable(execution),
            now=now,
            deadline=operation.deadline,
            budget=self._config.retry_budget,
            had_served=driver is None or driver.has_served,
        )
        was_read = failure.sent and failure.phase is Phase.EXECUTE and not operation.replayable
        if isinstance(decision, Retry) and was_read:
            return GiveUp(reason=GiveUpReason.OUTCOME_UNKNOWN if unknown else GiveUpReason.PERMANENT)
        return decision

    def _build_failure(self, execution: Execution[T], error: Exception) -> Failure:
        phase, driver, inner = execution.attempt.phase, execution.attempt.driver, self._context.unwrap(error)
        refused = phase is Phase.EXECUTE and driver is not None and nothing_sent(inner, driver)
        why = None
        if driver is not None and isinstance(inner, asyncpg.ReadOnlySQLTransactionError):
            why = driver.read_only
        return Failure(
            error=error,
            phase=phase,
            sent=phase is Phase.COMMIT or (phase is Phase.EXECUTE and not refused),
            writable=self.connector.expects_writes,
            read_only_asked=execution.operation.readonly or (why is not None and why.asked),
            in_recovery=None if why is None else why.in_recovery,
        )

    def _classify(self, execution: Execution[T], failure: Failure) -> Verdict:
        attempt, inner = execution.attempt, self._context.unwrap(failure.error)
        executing = attempt.driver is not None and attempt.phase is Phase.EXECUTE
        if executing and attempt.driver is not None and is_of_another_connection(inner, attempt.driver):
            # The application's own affair, such as what a COPY's source reads from: another attempt here does not cure it.
            return Verdict(fault=Fault.PERMANENT, outcome=Outcome.UNKNOWN)
        return self._context.classify(failure)

    def _heed_limits(self, execution: Execution[T], failure: Failure, verdict: Verdict) -> Verdict:
        """Make final what the server's limits on a transaction have ended, or most likely have, and say so in a note.

        A driver that reads a FATAL while nothing is asked keeps no word of it. Then it is known only that the connection was
        lost, for how long the transaction had lasted, and which limits the server has. A limit on the whole must have been
        met by then, and is met again; one on being idle only if the same happens twice.
        """
        began, inner = execution.attempt.transaction_began, self._context.unwrap(failure.error)
        states = {getattr(error, "sqlstate", None) for error in (inner, inner.__cause__)} - {None, "08003"}
        if began is None and states.isdisjoint({sqlstate for sqlstate, _, _ in _LIMITS}):
            return verdict
        lasted = 0.0 if began is None else self._clock.monotonic() - began
        for sqlstate, setting, kind in _LIMITS:
            seconds = None if self.connector.server_info is None else getattr(self.connector.server_info, setting)
            limit = f"{setting}{f' ({seconds:g} s)' if seconds else ''}"
            if sqlstate in states and verdict.fault is Fault.PERMANENT:
                failure.error.add_note(
                    f"resilient_pool: the server ended the session, because it ends a transaction that {kind} {limit}, "
                    f"{sqlstate}; it was not repeated: make it shorter, or raise that setting"
                )
                return verdict
            if states or not seconds or lasted < seconds or verdict.fault not in _LOSSES:
                continue
            execution.outlasted += 1
            if sqlstate == "25P04" or execution.outlasted > 1:
                failure.error.add_note(
                    f"resilient_pool: the connection was lost {lasted:.2f} s after the transaction began, and the server ends "
                    f"one that {kind} {limit}, {sqlstate}; it was not repeated, because that is the likely reason: make it "
                    "shorter, or raise that setting"
                )
                return replace(verdict, fault=Fault.PERMANENT)
        return verdict

    def _override_outcome(self, execution: Execution[T], failure: Failure, verdict: Verdict) -> Verdict:
        known, sql = execution.attempt.known_outcome, execution.operation.sql
        if known is not None:
            # One of which it is not known what became of it is not the application's own time-out any more.
            lost = known is Outcome.UNKNOWN and verdict.fault is Fault.PERMANENT
            return replace(verdict, outcome=known, fault=Fault.DISCONNECTED if lost else verdict.fault)
        # The classifier sees no text, and so cannot see that a part of it may have been committed before the error.
        partly = sql is not None and not self._reader.read(sql).is_atomic
        partly = (partly and failure.sent) or self._is_about_the_last_of_several(execution, verdict)
        if partly and verdict.outcome is not Outcome.UNKNOWN:
            return replace(verdict, outcome=Outcome.UNKNOWN)
        return verdict

    @staticmethod
    def _is_about_the_last_of_several(execution: Execution[T], verdict: Verdict) -> bool:
        # An application's class may send several statements for one: an error is about the last, and says nothing of others.
        attempt = execution.attempt
        if attempt.driver is None or not attempt.driver.is_customized or attempt.phase is not Phase.EXECUTE:
            return False
        return attempt.driver.queries - attempt.queries_before > (verdict.outcome is Outcome.ROLLED_BACK)

    def _invalidate_connections(self, execution: Execution[T], failure: Failure, verdict: Verdict) -> None:
        # It is given back later, and closed then. After an error of the application's own making a reset is enough.
        discard = verdict.connection is Disposition.DISCARD and verdict.fault is not Fault.PERMANENT
        if execution.attempt.driver is not None and discard:
            execution.attempt.driver.invalidated = True
        if verdict.others is Disposition.EXPIRE and not self._concerns_one_connection(execution, verdict):
            self.maintenance.expire()
        elif verdict.fault is Fault.POISONED and not failure.sent:
            # Its server said goodbye while it was idle, and no socket shows that yet: others may be in the same state, and
            # trying them in turn would use up the attempts.
            self.maintenance.discard_idle_since(self._clock.now(), DiscardReason.STALE)
        if verdict.fault is Fault.STATEMENT_CACHE and "26000" in failure.sqlstates and self.connector.distrust_proxy():
            self.maintenance.expire()

    @staticmethod
    def _concerns_one_connection(execution: Execution[T], verdict: Verdict) -> bool:
        # What a connection remembers is out of date only after an earlier use: one that was opened for this operation has
        # another trouble.
        driver = execution.attempt.driver
        is_new = driver is not None and driver.opened_at >= execution.operation.started
        return verdict.fault is Fault.STATEMENT_CACHE and is_new

    def _is_lost_and_repeatable(self, execution: Execution[T], verdict: Verdict) -> bool:
        lost = verdict.outcome is Outcome.UNKNOWN and verdict.fault is not Fault.PERMANENT
        return lost and self._is_repeatable(execution) and not execution.operation.is_the_pools_own

    def may_run_twice(self, execution: Execution[T]) -> bool:
        """Whether the application said that the operation may take effect twice."""
        return execution.operation.idempotent or (self._config.retry_unknown and not execution.operation.exactly_once)

    def needs_guard(self, execution: Execution[T]) -> bool:
        """Whether every further attempt must be seen to write nothing: an earlier one was lost that must not take effect twice."""
        return execution.lost is not None and not self.may_run_twice(execution)

    def _is_repeatable(self, execution: Execution[T]) -> bool:
        sql = execution.operation.sql
        looks_like_read = sql is not None and self._reader.looks_like_read(sql)
        return looks_like_read or execution.is_harmless or self.may_run_twice(execution)

    def _final_error(
        self, execution: Execution[T], failure: Failure, verdict: Verdict, reason: GiveUpReason
    ) -> Exception:
        # What the statement itself met is raised as it is, also that the time it was given has run out.
        error = failure.error if failure.phase is Phase.EXECUTE else execution.error_for_caller(failure.error)
        sql = execution.operation.sql
        only_reads = sql is not None and self._reader.is_plain_read(sql)
        # And what ended the operation later says nothing about an attempt that was lost, unless the application said that it may
        # run twice, and it only reads, or the server has answered the second one.
        answered = reason is GiveUpReason.PERMANENT and failure.phase is Phase.EXECUTE
        says_all = execution.is_harmless or (self.may_run_twice(execution) and (only_reads or answered))
        lost = None if says_all else execution.lost
        if lost is not None:
            error = lost.error
        elapsed, sqlstate = execution.retries.elapsed(self._clock.monotonic()), nearest_sqlstate(failure)
        if reason is GiveUpReason.OUTCOME_UNKNOWN:
            lost = LostAttempt(error=error, fault=verdict.fault, sqlstate=sqlstate)
            error = self._outcome_unknown(execution, lost)
        elif lost is not None and not only_reads:
            error = self._outcome_unknown(execution, lost)
        elif reason is not GiveUpReason.PERMANENT:
            self._context.counters.exhausted += 1
            self._context.events.emit(
                RetryExhausted(
                    operation=execution.operation.name,
                    reason=reason.value,
                    fault=verdict.fault,
                    outcome=verdict.outcome,
                    sqlstate=sqlstate,
                    attempt=execution.retries.attempts,
                    elapsed=elapsed,
                )
            )
        _note_the_end(error, verdict, reason, execution.retries.attempts, elapsed)
        return error

    def _outcome_unknown(self, execution: Execution[T], lost: LostAttempt) -> Exception:
        state = execution.retries
        self._context.counters.outcomes_unknown += 1
        self._context.events.emit(
            OutcomeUnknown(
                operation=execution.operation.name,
                fault=lost.fault,
                sqlstate=lost.sqlstate,
                attempt=state.attempts,
                elapsed=state.elapsed(self._clock.monotonic()),
            )
        )
        unknown = OutcomeUnknownError(
            execution.operation.name, xid=execution.attempt.xid, repeated=self.may_run_twice(execution)
        )
        unknown.__cause__ = lost.error
        return unknown


def _as_loss(error: Exception) -> asyncpg.ConnectionDoesNotExistError:
    loss = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    loss.__cause__ = error
    return loss


def _note_the_end(error: Exception, verdict: Verdict, reason: GiveUpReason, attempts: int, elapsed: float) -> None:
    if attempts > 1:
        error.add_note(
            f"resilient_pool: gave up after {attempts} attempts in {elapsed:.2f} s ({reason.value}); "
            f"the last fault was {verdict.fault.value}"
        )
    if reason is GiveUpReason.DEADLINE and verdict.not_before is not None:
        error.add_note(f"resilient_pool: another attempt makes sense in {verdict.not_before:g} s, and not before")
