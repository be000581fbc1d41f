"""The one retry loop: run, classify, decide, wait."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import asyncpg

from resilient_pool.errors import OutcomeUnknownError
from resilient_pool.events import DiscardReason, OutcomeUnknown, RetryExhausted, RetryScheduled
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.pooling import driver as wire
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import PoolContext, nearest_sqlstate
from resilient_pool.pooling.driver import AnyConnection, DriverConnection
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """How an attempt ended whose outcome is unknown.

    Attributes:
        error: What was raised.
        fault: What is known about it.
        sqlstate: The server's code, if there was any.
    """

    error: Exception
    fault: Fault
    sqlstate: str | None


class RefusedError(Exception):
    """A guard does not let a call be repeated: it may write."""


class Call(Generic[T]):
    """One thing the application asked for, through all its attempts.

    Attributes:
        operation: Its kind, as the application calls it: `"fetch"`.
        execute: Does it, on a connection.
        sql: Its text, or `None` if it has none that could be judged.
        idempotent: Whether the caller said that it may run twice.
        replayable: Whether its arguments can be read twice. Those of a COPY from a file cannot.
        fail_fast: Whether not to wait for a server that is known to be away.
        started: When it began, on the line of `Clock.monotonic()`.
        deadline: Until when attempts may begin, on the same line; `None` for ever.
        phase: How far the present attempt has come.
        link: The connection of the present attempt, once there is one.
        telling: The last error that says more than that time ran out.
        loss: How the first attempt ended whose outcome is unknown, if the call may be repeated only because it looks like a
            read. Every later attempt is guarded then.
        harmless: Whether the server's catalog said that it calls nothing that may write.
        scheduled: The retry that is told once the guard allows it.
        settled: What is known of the present attempt's outcome from elsewhere; it overrules what the error alone tells.
        xid: The id of the present attempt's transaction, where it is known.
        exactly_once: Whether an unknown outcome is no reason to repeat it, whatever the pool was told of its statements.
        read_only: Whether the caller asked for a read-only transaction.
        began: When the present attempt's transaction began, on the line of `Clock.monotonic()`; `None` if there is none.
        asked: How many queries had been sent on the connection before the present attempt.
        outlasted: How many attempts were lost when they had lasted longer than the server lets a transaction be idle.
    """

    __slots__ = (
        "asked",
        "began",
        "deadline",
        "exactly_once",
        "execute",
        "fail_fast",
        "harmless",
        "idempotent",
        "link",
        "loss",
        "operation",
        "outlasted",
        "phase",
        "read_only",
        "replayable",
        "scheduled",
        "settled",
        "sql",
        "started",
        "telling",
        "xid",
    )

    def __init__(
        self,
        operation: str,
        sql: str | None,
        execute: Callable[[AnyConnection], Awaitable[T]],
        started: float,
        deadline: float | None,
        *,
        idempotent: bool = False,
        replayable: bool = True,
        fail_fast: bool = False,
    ) -> None:
        self.operation = operation
        self.sql = sql
        self.execute = execute
        self.idempotent = idempotent
        self.replayable = replayable
        self.fail_fast = fail_fast
        self.started = started
        self.deadline = deadline
        self.phase = Phase.CONNECT
        self.link: DriverConnection | None = None
        self.telling: Exception | None = None
        self.loss: Loss | None = None
        self.harmless = False
        self.scheduled: RetryScheduled | None = None
        self.settled: Outcome | None = None
        self.xid: int | None = None
        self.exactly_once = False
        self.read_only = False
        self.began: float | None = None
        self.asked = self.outlasted = 0

    def begin_attempt(self) -> None:
        """Forget how far the attempt before came."""
        self.phase, self.link = Phase.CONNECT, None
        self.settled = self.xid = self.began = None

    def remember(self, error: Exception) -> None:
        """Keep an error for the end, if it tells anything."""
        if self.telling is None or not isinstance(error, TimeoutError):
            self.telling = error

    def most_telling(self, last: Exception) -> Exception:
        """Choose what the caller sees in the end: not that time ran out, if it is known what it ran out with."""
        return self.telling if self.telling is not None and isinstance(last, TimeoutError) else last

    def reach(self, link: DriverConnection) -> None:
        """Remember that the present attempt has come to execute on a connection."""
        self.phase, self.link, self.asked = Phase.EXECUTE, link, link.queries


class RetryLoop:
    """Runs calls until they succeed or must not be tried again.

    Args:
        context: Policies, budget and classifier.
        read_check: Knows which statements look like reads, and asks the server whether they are.
        maintenance: Expires connections when a verdict says so.
        connector: Knows whether writes are expected to work.

    Attributes:
        read_check: The same.
    """

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
        self._maintenance = maintenance
        self._connector = connector
        self._deposit = context.config.retry_budget.deposit

    def begin_transaction(self, call: Call[T]) -> RetryState:
        """Count a call whose attempts somebody else makes, and return what is remembered of its failures.

        Unless the application chose a policy of its own, conflicts are limited by the deadline only: under contention
        somebody always gets through, but nobody can say after how many attempts.
        """
        self._deposit()
        operations = self._config.backoff
        contention = None
        if operations is OPERATION_BACKOFF and call.deadline is not None:
            contention = replace(operations, max_attempts=None)
        return RetryState(
            operations=operations, reconnect=self._config.reconnect, contention=contention, started=call.started
        )

    async def run(
        self, call: Call[T], attempt: Callable[[Call[T]], Awaitable[T]], failure: Exception | None = None
    ) -> T:
        """Make attempts until one succeeds.

        Args:
            call: What to do.
            attempt: Makes one attempt of it.
            failure: How the first attempt ended, if it was made and counted before.

        Raises:
            OutcomeUnknownError: The call may have taken effect, and may not be repeated.
            Exception: The driver's own error, when repeating does not help or is not allowed any longer.
        """
        if failure is None:
            self._deposit()
            try:
                return await attempt(call)
            except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                failure = error
        return await self._try_again(call, attempt, failure)

    async def _try_again(self, call: Call[T], attempt: Callable[[Call[T]], Awaitable[T]], error: Exception) -> T:
        state = RetryState(operations=self._config.backoff, reconnect=self._config.reconnect, started=call.started)
        while True:
            await self._clock.sleep(self.next_delay(call, state, error))
            call.begin_attempt()
            try:
                return await attempt(call)
            except Exception as failure:  # noqa: BLE001 - every error is classified, none is swallowed
                error = failure

    async def run_on(self, call: Call[T], link: DriverConnection) -> T:
        """Execute a call on a connection; guarded, if an earlier attempt of it may have taken effect.

        A guarded attempt runs in a read-only transaction, after the server's catalog has said that the text calls nothing
        that may write. Whatever goes wrong in it, the connection is not used again: the transaction may be open.
        """
        call.reach(link)
        if call.loss is not None and call.sql is not None:
            return await self._run_guarded(call, call.sql, link)
        try:
            return await call.execute(link.connection)
        except asyncpg.ReadOnlySQLTransactionError:
            await link.learn_why_read_only()
            raise

    async def _run_guarded(self, call: Call[T], sql: str, link: DriverConnection) -> T:
        call.phase = Phase.CHECKOUT  # what comes before the statement is part of getting the connection
        if not await self.read_check.allows(link, (sql,), timeout=self._limit(call)):
            raise RefusedError
        call.harmless = True
        self._tell_scheduled(call)
        ended = False
        try:
            await link.execute(_BEGIN_GUARD, timeout=self._limit(call))
            call.phase = Phase.EXECUTE
            try:
                result = await call.execute(link.connection)
            except REFUSALS_OF_A_GUARD as error:
                raise RefusedError from error
            ended = await self._end_guard(call, link)
        finally:
            if not ended:
                link.invalidated = True
        return result

    async def _end_guard(self, call: Call[T], link: DriverConnection) -> bool:
        """Commit what only read, and say whether the connection can be used again."""
        try:
            await link.execute("COMMIT", timeout=self._limit(call))
        except Exception as error:
            # A refusal says that a serializable transaction must not have read this. Without an answer, the result stands.
            if isinstance(error, asyncpg.PostgresError) and not link.connection.is_closed():
                raise
            return False
        return True

    def _limit(self, call: Call[T]) -> float | None:
        return None if call.deadline is None else max(call.deadline - self._clock.monotonic(), _SHORTEST_LIMIT)

    def next_delay(self, call: Call[T], state: RetryState, error: Exception, *, hindrance: str | None = None) -> float:
        """Say how long to wait before the next attempt.

        Args:
            call: What failed.
            state: What is remembered of its failures. It is changed.
            error: How it failed this time.
            hindrance: Why no further attempt can be made although another might succeed. It becomes a note of an error
                after which nothing is left of the call.

        Returns:
            Seconds.

        Raises:
            OutcomeUnknownError: The call may have taken effect, and may not be repeated.
            Exception: `error`, or the last one that told more, when no further attempt may be made.
        """
        if isinstance(error, RefusedError) and call.loss is not None:
            raise self._unknown(call, state, call.loss)
        failure = self._build_failure(call, error)
        verdict = self._heed_limits(call, failure, self._judge(call, failure))
        verdict = self._override_outcome(call, failure, verdict)
        self._invalidate_connections(call, failure, verdict)
        if call.loss is None and self._needs_guard(call, verdict):
            call.loss = Loss(error=error, fault=verdict.fault, sqlstate=nearest_sqlstate(failure))
        now = self._clock.monotonic()
        if hindrance is None or verdict.fault is Fault.PERMANENT:
            decision = self._decide(call, state, failure, verdict, now)
        else:
            state.note(verdict.fault, failure.phase, now)
            decision = GiveUp(reason=GiveUpReason.PERMANENT)
            if verdict.outcome is Outcome.UNKNOWN:
                decision = GiveUp(reason=GiveUpReason.OUTCOME_UNKNOWN)
            else:
                error.add_note(hindrance)
        if isinstance(decision, GiveUp):
            raise self._final_error(call, state, failure, verdict, decision.reason)
        call.remember(error)
        call.scheduled = RetryScheduled(
            operation=call.operation,
            fault=verdict.fault,
            outcome=verdict.outcome,
            sqlstate=nearest_sqlstate(failure),
            attempt=state.attempts,
            delay=decision.delay,
            elapsed=state.elapsed(now),
        )
        if call.loss is None or call.harmless:
            self._tell_scheduled(call)
        return decision.delay

    def _tell_scheduled(self, call: Call[T]) -> None:
        scheduled, call.scheduled = call.scheduled, None
        if scheduled is not None:
            self._context.retry_scheduled(scheduled)

    def _decide(
        self, call: Call[T], state: RetryState, failure: Failure, verdict: Verdict, now: float
    ) -> Retry | GiveUp:
        if failure.phase is Phase.CONNECT and verdict.fault is not Fault.PERMANENT:
            # The circuit breaker has waited already, for as long as there was sense in it.
            state.note(verdict.fault, failure.phase, now)
            return GiveUp(reason=GiveUpReason.ABSENT)
        unknown = verdict.outcome is Outcome.UNKNOWN
        decision = decide(
            verdict,
            state,
            phase=failure.phase,
            repeatable=not unknown or self._is_repeatable(call),
            now=now,
            deadline=call.deadline,
            budget=self._config.retry_budget,
            had_served=call.link is None or call.link.has_served,
        )
        if isinstance(decision, Retry) and failure.sent and not call.replayable and failure.phase is Phase.EXECUTE:
            return GiveUp(reason=GiveUpReason.OUTCOME_UNKNOWN if unknown else GiveUpReason.PERMANENT)
        return decision

    def _build_failure(self, call: Call[T], error: Exception) -> Failure:
        link, inner = call.link, self._context.unwrap(error)
        refused = call.phase is Phase.EXECUTE and link is not None and wire.nothing_sent(inner, link)
        why = None
        if link is not None and isinstance(inner, asyncpg.ReadOnlySQLTransactionError):
            why = link.read_only
        return Failure(
            error=error,
            phase=call.phase,
            sent=call.phase is Phase.COMMIT or (call.phase is Phase.EXECUTE and not refused),
            writable=self._connector.expects_writes,
            read_only_asked=call.read_only or (why is not None and why.asked),
            in_recovery=None if why is None else why.in_recovery,
        )

    def _judge(self, call: Call[T], failure: Failure) -> Verdict:
        inner = self._context.unwrap(failure.error)
        executing = call.link is not None and call.phase is Phase.EXECUTE
        if executing and call.link is not None and wire.is_of_another_connection(inner, call.link):
            # The application's own affair, such as what a COPY's source reads from: another attempt here does not cure it.
            return Verdict(fault=Fault.PERMANENT, outcome=Outcome.UNKNOWN)
        return self._context.classify(failure)

    def _heed_limits(self, call: Call[T], failure: Failure, verdict: Verdict) -> Verdict:
        """Make final what the server's limits on a transaction have ended, or most likely have, and say so in a note.

        A driver that reads a FATAL while nothing is asked keeps no word of it. Then it is known only that the connection was
        lost, for how long the transaction had lasted, and which limits the server has. A limit on the whole must have been
        met by then, and is met again; one on being idle only if the same happens twice.
        """
        inner = self._context.unwrap(failure.error)
        told = {getattr(error, "sqlstate", None) for error in (inner, inner.__cause__)} - {None, "08003"}
        if call.began is None and told.isdisjoint({sqlstate for sqlstate, _, _ in _LIMITS}):
            return verdict
        lasted = 0.0 if call.began is None else self._clock.monotonic() - call.began
        for sqlstate, setting, kind in _LIMITS:
            seconds = None if self._connector.server_info is None else getattr(self._connector.server_info, setting)
            limit = f"{setting}{f' ({seconds:g} s)' if seconds else ''}"
            if sqlstate in told and verdict.fault is Fault.PERMANENT:
                failure.error.add_note(
                    f"resilient_pool: the server ended the session, because it ends a transaction that {kind} {limit}, "
                    f"{sqlstate}; it was not repeated: make it shorter, or raise that setting"
                )
                return verdict
            if told or not seconds or lasted < seconds or verdict.fault not in _LOSSES:
                continue
            call.outlasted += 1
            if sqlstate == "25P04" or call.outlasted > 1:
                failure.error.add_note(
                    f"resilient_pool: the connection was lost {lasted:.2f} s after the transaction began, and the server ends "
                    f"one that {kind} {limit}, {sqlstate}; it was not repeated, because that is the likely reason: make it "
                    "shorter, or raise that setting"
                )
                return replace(verdict, fault=Fault.PERMANENT)
        return verdict

    def _override_outcome(self, call: Call[T], failure: Failure, verdict: Verdict) -> Verdict:
        if call.settled is not None:
            # One whose fate nobody could tell is not the application's own time-out any more.
            lost = call.settled is Outcome.UNKNOWN and verdict.fault is Fault.PERMANENT
            return replace(verdict, outcome=call.settled, fault=Fault.DISCONNECTED if lost else verdict.fault)
        # The classifier sees no text, and so cannot see that a part of it may have been committed before the error.
        partly = call.sql is not None and not self._reader.read(call.sql).is_atomic
        partly = (partly and failure.sent) or self._is_about_the_last_of_several(call, verdict)
        if partly and verdict.outcome is not Outcome.UNKNOWN:
            return replace(verdict, outcome=Outcome.UNKNOWN)
        return verdict

    @staticmethod
    def _is_about_the_last_of_several(call: Call[T], verdict: Verdict) -> bool:
        # An application's class may send several statements for one: an error is about the last, and says nothing of others.
        if call.link is None or not call.link.is_customized or call.phase is not Phase.EXECUTE:
            return False
        return call.link.queries - call.asked > (verdict.outcome is Outcome.ROLLED_BACK)

    def _invalidate_connections(self, call: Call[T], failure: Failure, verdict: Verdict) -> None:
        # The connection is on its way back already; it is looked at again before anyone gets it.
        # After an error of the application's own making a reset is enough, and it has begun.
        discard = verdict.connection is Disposition.DISCARD and verdict.fault is not Fault.PERMANENT
        if call.link is not None and discard:
            call.link.invalidated = True
        if verdict.others is Disposition.EXPIRE and not self._concerns_one_connection(call, verdict):
            self._maintenance.expire()
        elif verdict.fault is Fault.POISONED and not failure.sent:
            # Its server said goodbye while it was idle, and no socket shows that yet: others may be in the same state, and
            # trying them in turn would use up the attempts.
            self._maintenance.discard_idle_since(self._clock.now(), DiscardReason.STALE)
        if verdict.fault is Fault.STATEMENT_CACHE and "26000" in failure.sqlstates and self._connector.distrust_proxy():
            self._maintenance.expire()

    @staticmethod
    def _concerns_one_connection(call: Call[T], verdict: Verdict) -> bool:
        # What a connection remembers is out of date only after an earlier use: one that was opened for this call has another
        # trouble.
        return verdict.fault is Fault.STATEMENT_CACHE and call.link is not None and call.link.opened_at >= call.started

    def _needs_guard(self, call: Call[T], verdict: Verdict) -> bool:
        lost = verdict.outcome is Outcome.UNKNOWN and verdict.fault is not Fault.PERMANENT
        return lost and not self.may_run_twice(call) and self._is_repeatable(call)

    def may_run_twice(self, call: Call[T]) -> bool:
        """Whether the application said that the call may take effect twice."""
        return call.idempotent or (self._config.retry_unknown and not call.exactly_once)

    def _is_repeatable(self, call: Call[T]) -> bool:
        return (
            self.may_run_twice(call)
            or call.harmless
            or (call.sql is not None and self._reader.looks_like_read(call.sql))
        )

    def _final_error(
        self, call: Call[T], state: RetryState, failure: Failure, verdict: Verdict, reason: GiveUpReason
    ) -> Exception:
        # What the statement itself met is told as it is, also that the time it was given has run out.
        error = failure.error if failure.phase is Phase.EXECUTE else call.most_telling(failure.error)
        # And whatever ended the call later says nothing about an attempt that was lost.
        doubt = None if call.harmless else call.loss
        if doubt is not None:
            error = doubt.error
        elapsed = state.elapsed(self._clock.monotonic())
        if state.attempts > 1:
            error.add_note(
                f"resilient_pool: gave up after {state.attempts} attempts in {elapsed:.2f} s ({reason.value}); "
                f"the last fault was {verdict.fault.value}"
            )
        sqlstate = nearest_sqlstate(failure)
        if reason is GiveUpReason.OUTCOME_UNKNOWN:
            return self._unknown(call, state, Loss(error=error, fault=verdict.fault, sqlstate=sqlstate))
        if doubt is not None and not (call.sql is not None and self._reader.is_plain_read(call.sql)):
            return self._unknown(call, state, doubt)
        if reason is GiveUpReason.PERMANENT:
            return error
        self._context.counters.exhausted += 1
        self._context.events.emit(
            RetryExhausted(
                operation=call.operation,
                reason=reason.value,
                fault=verdict.fault,
                outcome=verdict.outcome,
                sqlstate=sqlstate,
                attempt=state.attempts,
                elapsed=elapsed,
            )
        )
        return error

    def _unknown(self, call: Call[T], state: RetryState, loss: Loss) -> Exception:
        self._context.counters.outcomes_unknown += 1
        self._context.events.emit(
            OutcomeUnknown(
                operation=call.operation,
                fault=loss.fault,
                sqlstate=loss.sqlstate,
                attempt=state.attempts,
                elapsed=state.elapsed(self._clock.monotonic()),
            )
        )
        unknown = OutcomeUnknownError(call.operation, xid=call.xid)
        unknown.__cause__ = loss.error
        return unknown
