"""The retried transaction: a loop of attempts, each of which commits, is repeated as a whole, or ends in an error."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, NoReturn, Self, TypedDict, TypeVar

import asyncpg

from resilient_pool.config.arguments import RecordT
from resilient_pool.execution.commit_resolver import CommitResolver, is_fault_of_our_query
from resilient_pool.execution.connection import LeaseManager, ResilientConnection
from resilient_pool.execution.loop_control import FramePosition
from resilient_pool.execution.retry_strategy import REFUSALS_OF_A_GUARD, Execution, RepeatRefusedError
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import (
    DriverConnection,
    is_of_another_connection,
    nothing_sent,
)
from resilient_pool.retry.classifier import refuses_commit
from resilient_pool.retry.commit_status import CommitStatus, CommitToken
from resilient_pool.retry.verdict import Outcome, Phase
from resilient_pool.sql.statement_tracker import StatementTracker

T = TypeVar("T")

Isolation = Literal["serializable", "repeatable_read", "read_committed", "read_uncommitted"]


class TransactionOptions(TypedDict, total=False):
    """What `pool.transaction()` takes."""

    isolation: Isolation | None
    readonly: bool
    deferrable: bool
    resolve_commit: bool
    deadline: float | None
    fail_fast: bool | None


_UNCERTAIN = (
    "resilient_pool: the transaction was rolled back, and not repeated, because the program was not certain to go on with the loop: the "
    "block was left by return or break, something follows it inside the loop, a generator yields inside the loop, or the "
    "attempt was not entered by the loop's own `async with`. pool.run_in_transaction(function) has no such condition"
)


class _State(Enum):
    READY = "ready for an attempt"
    RUNNING = "in an attempt"
    FINISHED = "finished"


class Transactions:
    """What the transactions of one pool have in common."""

    __slots__ = ("commit_resolver", "context", "leases", "require_open")

    def __init__(
        self,
        context: PoolContext,
        leases: LeaseManager,
        commit_resolver: CommitResolver,
        require_open: Callable[[], None],
    ) -> None:
        self.context = context
        self.leases = leases
        self.commit_resolver = commit_resolver
        self.require_open = require_open


class RetriedTransaction(Generic[RecordT]):
    """The attempts of one transaction, one after the other, until one has committed.

        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(...)

    The block may run more than once, so it should have no other effect than on the database. It commits when it ends, also
    by `return`, `break` or `continue`; it is rolled back when it is left by an exception. A curable fault is waited for and
    the block is run again, provided that the program is certain to go on with the loop: nothing follows the block inside the
    loop, it was not left by `return` or `break`, nothing in the loop yields, and the loop's own `async with` entered the
    attempt. Otherwise the fault is raised, after the transaction was rolled back. `run_in_transaction()` knows no such
    condition.
    """

    def __init__(
        self,
        shared: Transactions,
        options: TransactionOptions,
        *,
        always_goes_on: bool = False,
        exactly_once: bool = False,
        make_attempt: Callable[..., Attempt[RecordT]] | None = None,
    ) -> None:
        self._shared = shared
        self._options = options
        self._always_goes_on = always_goes_on
        self._make_attempt = make_attempt or Attempt
        self._retry_strategy = shared.leases.retry_strategy
        self._execution: Execution[None] = self._retry_strategy.new_execution(
            "transaction",
            options={"deadline": options.get("deadline"), "fail_fast": options.get("fail_fast")},
            is_transaction=True,
            exactly_once=exactly_once,
            readonly=options.get("readonly", False),
        )
        shared.context.config.retry_budget.calls += 1
        self._state = _State.READY
        self._head: FramePosition | None = None
        self._delay = 0.0
        self._number = 0
        self._reads: tuple[str, ...] = ()
        self._is_guarded = False

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Attempt[RecordT]]:
        # Not a coroutine function: its body has to run while the loop's own frame stands right behind it.
        is_known = self._head is not None or self._always_goes_on
        return self.next_attempt(None if is_known else FramePosition.of(sys._getframe(1)))  # noqa: SLF001 - there is no public way to look back

    async def next_attempt(self, head: FramePosition | None = None) -> Attempt[RecordT]:
        """Return the next attempt, for the loop whose head is at `head`; `None` if it is where it was."""
        self._head = head or self._head
        if self._state is _State.FINISHED:
            raise StopAsyncIteration
        if self._state is _State.RUNNING:
            raise asyncpg.InterfaceError("the attempt before was not entered: write `async with attempt as connection`")
        self._state = _State.RUNNING
        if self._delay:
            await self._shared.context.clock.sleep(self._delay)
        self._number += 1
        return self._make_attempt(self, self._shared, self._options, self._execution, self._number)

    if not TYPE_CHECKING:  # type checkers refuse it by themselves

        def __aenter__(self) -> NoReturn:
            raise TypeError(
                "a transaction of the pool is a loop of attempts: write `async for attempt in pool.transaction():` and in "
                "it `async with attempt as connection:`"
            )

        __aexit__ = __aenter__

    @property
    def is_finished(self) -> bool:
        """Whether no further attempt follows."""
        return self._state is _State.FINISHED

    def finish(self) -> None:
        """Make no further attempt."""
        self._state = _State.FINISHED

    def next_delay(self, error: Exception, *, hindrance: str | None = None) -> float:
        """Return how long to wait before the next attempt, in seconds, or raise what the application is to see."""
        return self._retry_strategy.next_delay(self._execution, error, hindrance=hindrance)

    def schedule_retry(self, delay: float) -> None:
        """Make another attempt after that many seconds."""
        self._delay = delay
        self._state = _State.READY

    def guard(self, reads: tuple[str, ...]) -> None:
        """Let every further attempt be read-only: an attempt that sent nothing but `reads` may have taken effect.

        Not on a pool that repeats what is unknown in any case.
        """
        if self._retry_strategy.may_run_twice(self._execution):
            return
        self._execution.is_harmless = self._is_guarded = True
        self._reads = tuple(dict.fromkeys((*self._reads, *reads)))

    @property
    def is_guarded(self) -> bool:
        """Whether every further attempt is read-only."""
        return self._is_guarded

    @property
    def reads(self) -> tuple[str, ...]:
        """What was sent in attempts whose outcome is unknown."""
        return self._reads

    def is_certain_to_go_on(self, position: FramePosition, *, swallowing: bool) -> bool:
        """Whether the loop asks for the next attempt next, if `__aexit__`, awaited at `position`, ends without an error."""
        if self._always_goes_on:
            return True
        return self._head is not None and position.leads_to(self._head, swallowing=swallowing)


class Attempt(Generic[RecordT]):
    """One attempt of a transaction: enter it for a connection on which the transaction is open.

    Attributes:
        number: Which attempt this is; the first is 1.
    """

    def __init__(
        self,
        loop: RetriedTransaction[RecordT],
        shared: Transactions,
        options: TransactionOptions,
        execution: Execution[None],
        number: int,
    ) -> None:
        self.number = number
        self._loop = loop
        self._shared = shared
        self._options = options
        self._execution = execution
        self._lease: ResilientConnection[RecordT] | None = None
        self._sent = StatementTracker(shared.leases.read_check.reader)
        self._entered = self._failed_for_the_token = False

    # Beginning

    async def __aenter__(self) -> ResilientConnection[RecordT]:
        if self._entered:
            raise asyncpg.InterfaceError("an attempt can be entered once only")
        self._entered = True
        begun = False
        try:
            while self._lease is None:
                self._shared.require_open()
                self._execution.begin_attempt().known_outcome = Outcome.NOT_EXECUTED
                try:
                    self._lease = await self._begin()
                except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                    delay = self._loop.next_delay(error)
                    await self._shared.context.clock.sleep(delay)
            begun = True
        finally:
            if not begun:
                self._loop.finish()
        return self._lease

    async def _begin(self) -> ResilientConnection[RecordT]:
        lease = await self._shared.leases.lease_for(self._execution)
        begun = False
        try:
            await self._prepare(lease)
            await self._begin_on(_driver_of(self._execution))
            self._shared.leases.pin(lease, self._sent.sent)
            begun = True
        finally:
            if not begun:
                # Past the lease: what the pool asks by itself, cut off between two messages, is still open on the server.
                self._shared.leases.release(lease, keeps=False)
        return lease

    async def _prepare(self, lease: ResilientConnection[RecordT]) -> None:
        """Do what an adapter does with a connection before a transaction begins on it."""

    async def _begin_on(self, driver: DriverConnection) -> None:
        options, leases = self._options, self._shared.leases
        await self._shared.commit_resolver.detect_capabilities(driver)
        if self._loop.is_guarded:
            limit = leases.retry_strategy.time_limit(self._execution)
            if not await leases.read_check.allows(driver, self._loop.reads, timeout=limit):
                raise RepeatRefusedError
        self._execution.attempt.execute_on(driver, driver.queries)
        await driver.begin(
            isolation=options.get("isolation"),
            readonly=self._is_read_only,
            deferrable=options.get("deferrable", False),
        )
        self._execution.attempt.transaction_began = self._shared.context.clock.monotonic()
        self._execution.attempt.queries_before = driver.queries

    @property
    def _is_read_only(self) -> bool:
        return self._execution.operation.readonly or self._loop.is_guarded

    # Ending

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # Noted before anything else: a frame that is resumed by an error stands elsewhere.
        return await self.leave(error, FramePosition.of(sys._getframe(1)))  # noqa: SLF001 - there is no public way to look back

    async def leave(self, error: BaseException | None, position: FramePosition) -> bool:
        """End the attempt, and say whether another one follows.

        Args:
            error: What was raised in the block, if anything. When another attempt follows, it is to be swallowed.
            position: Where the `__aexit__` of the block is awaited.
        """
        swallow = False
        try:
            failure = await self._end(error)
            swallow = failure is not None and self._decide_retry(failure, error, position)
        finally:
            if not swallow:
                self._loop.finish()
            await self._release()
        return swallow

    async def _end(self, error: BaseException | None) -> Exception | None:
        """Commit, or roll back after `error`, and return what another attempt may cure."""
        if not self._is_leased:
            self._require_error(error)
            return None
        return await (self._commit() if error is None else self._roll_back(error))

    def _decide_retry(self, failure: Exception, error: BaseException | None, position: FramePosition) -> bool:
        """Decide whether another attempt follows `failure`; what was raised in the block, `error`, is then swallowed."""
        goes_on = self._loop.is_certain_to_go_on(position, swallowing=error is not None)
        try:
            # What failed for the pool's own question alone is run again with a question that cannot fail so.
            is_free = self._failed_for_the_token and goes_on
            delay = 0.0 if is_free else self._loop.next_delay(failure, hindrance=None if goes_on else _UNCERTAIN)
        except Exception as raised:
            if raised is not error:
                raise
            return False
        self._loop.schedule_retry(delay)
        return True

    async def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        reset = self._shared.leases.release(lease)
        if reset is not None and self._shared.context.config.session_reset == "on_release":
            await asyncio.wait(
                [reset]
            )  # not by shield: one that terminate() cuts short is no cancellation of this task

    @property
    def _is_leased(self) -> bool:
        """Whether the connection is still this transaction's. When it is not, nothing may be sent on it."""
        return self._lease is not None and not self._lease.is_released

    @staticmethod
    def _require_error(error: BaseException | None) -> None:
        """Let no block end well in which the application gave the connection away."""
        if error is not None:
            return
        raise asyncpg.InterfaceError(
            "the connection of pool.transaction() was released or closed inside the block, so there was nothing left to "
            "commit: what the block had not committed by itself was rolled back. Leave the connection to the transaction"
        )

    # Rolling back

    async def _roll_back(self, error: BaseException) -> Exception | None:
        """Undo the block, and return `error` if another attempt may cure it; whatever it is, it passes otherwise."""
        driver = _driver_of(self._execution)
        if not isinstance(error, Exception):
            return None  # there is no time; the connection's reset, in the background, does it
        await self._undo(driver)
        unwrapped = self._shared.context.unwrap(error)
        if self._sent.may_have_ended or not _is_the_drivers(unwrapped, driver):
            return None
        self._execution.attempt.known_outcome = Outcome.ROLLED_BACK
        if self._loop.is_guarded and isinstance(unwrapped, REFUSALS_OF_A_GUARD):
            return RepeatRefusedError()
        if isinstance(unwrapped, asyncpg.ReadOnlySQLTransactionError):
            await self._learn_why_read_only(driver)
        return error

    async def _learn_why_read_only(self, driver: DriverConnection) -> None:
        if self._is_leased:
            await driver.learn_why_read_only()

    async def _undo(self, driver: DriverConnection) -> None:
        with contextlib.suppress(Exception):  # the connection's reset does it then, or the server, when it is closed
            if self._is_leased and not driver.connection.is_closed():
                await driver.end_transaction("ROLLBACK", timeout=self._shared.context.config.reset_timeout)

    # Committing

    async def _commit(self) -> Exception | None:
        """Commit, and return the error if it is certain, or noted in the attempt's state, what became of it."""
        driver = _driver_of(self._execution)
        self._execution.attempt.known_outcome = Outcome.ROLLED_BACK  # as long as COMMIT was not sent
        if not driver.connection.is_closed() and not driver.connection.is_in_transaction():
            self._require_ended_by_text()
            return None
        if driver.queries != self._execution.attempt.queries_before and self._sent.reads == ():
            self._sent.sent(None)  # past the lease, on the driver's own connection; the driver does not count a COPY
        try:
            commit_token = await self._prepare_commit(driver)
        except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
            return await self._give_up_before_commit(error, driver)
        if not self._is_leased:
            self._require_error(None)
        self._execution.attempt.xid = commit_token.xid
        self._execution.attempt.phase = Phase.COMMIT
        try:
            done = await driver.end_transaction("COMMIT")
        except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
            return None if await self._is_committed(error, driver, commit_token) else self._unless_ended(error)
        if done != "COMMIT":
            if self._loop.is_guarded:
                return RepeatRefusedError()
            raise asyncpg.InFailedSQLTransactionError(
                "the transaction was rolled back at its end, because a statement in it had failed and the error was caught"
            )
        if commit_token.token is not None:
            self._shared.commit_resolver.prune()
        return None

    def _require_ended_by_text(self) -> None:
        # The application's own COMMIT, ROLLBACK or PREPARE TRANSACTION is its own affair.
        if not self._sent.ended_by_text or self._sent.may_be_anything:
            raise asyncpg.InterfaceError(
                "the transaction was ended inside its block, by a reset of the session or in another way that is not "
                "visible: it is not known to be committed"
            )

    async def _give_up_before_commit(self, error: Exception, driver: DriverConnection) -> Exception | None:
        if not self._is_leased:
            self._require_error(None)
        await self._undo(driver)
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await self._learn_why_read_only(driver)
        self._failed_for_the_token = is_fault_of_our_query(error, driver)
        return self._unless_ended(error)

    def _unless_ended(self, error: Exception) -> Exception:
        # What the application committed by itself must not be repeated, whatever became of the rest.
        if self._sent.may_have_ended and self._execution.attempt.known_outcome is not Outcome.UNKNOWN:
            raise error
        return error

    async def _prepare_commit(self, driver: DriverConnection) -> CommitToken:
        sent, readonly = self._sent, self._is_read_only
        only_reads = not sent.may_write or (readonly and sent.reads is not None)
        if only_reads or not self._options.get("resolve_commit", True):
            return CommitToken()
        return await self._shared.commit_resolver.prepare(
            driver, readonly=readonly, may_change_session=sent.may_change_session
        )

    async def _is_committed(self, error: Exception, driver: DriverConnection, commit_token: CommitToken) -> bool:
        """Say whether a COMMIT that failed took effect nevertheless; what else is known goes into the attempt's state."""
        if _is_refusal(error, driver):
            return False
        if commit_token.nothing_written:
            return True
        self._execution.attempt.known_outcome = Outcome.UNKNOWN
        is_known, reads = commit_token.xid is not None or commit_token.token is not None, self._sent.reads
        if self._lease is None or not (is_known or reads is not None):
            return False
        entry, commit_resolver, deadline = (
            self._shared.leases.end_lease(self._lease),
            self._shared.commit_resolver,
            self._execution.operation.deadline,
        )
        if is_known:
            status = await commit_resolver.resolve(entry, commit_token, deadline)
            if status is CommitStatus.ABORTED:
                self._execution.attempt.known_outcome = Outcome.ROLLED_BACK
        else:
            status = await commit_resolver.check_reads(entry, reads or (), deadline, decides=self._commit_decides)
            if status is CommitStatus.ABORTED:
                self._loop.guard(reads or ())
        return status is CommitStatus.COMMITTED

    @property
    def _commit_decides(self) -> bool | None:
        """Whether COMMIT can still refuse what was read; `None` if the server's default decides that."""
        if not self._execution.operation.readonly:
            return True  # that nothing was written is not certain, so it is to be run again in any case
        isolation = self._options.get("isolation")
        return isolation == "serializable" if isolation is not None else None


async def run(
    shared: Transactions,
    function: Callable[..., Awaitable[T]],
    args: tuple[object, ...],
    options: TransactionOptions,
    *,
    exactly_once: bool = False,
) -> T:
    """Call `function(connection, *args)` in a retried transaction, and return what it returned when that committed."""
    loop = RetriedTransaction(shared, options, always_goes_on=True, exactly_once=exactly_once)
    while True:
        async with await loop.__anext__() as connection:
            result = await function(connection, *args)
        if loop.is_finished:
            return result


def _driver_of(execution: Execution[None]) -> DriverConnection:
    if execution.attempt.driver is None:
        raise asyncpg.InternalClientError("a transaction without a connection")
    return execution.attempt.driver


def _is_the_drivers(error: BaseException, driver: DriverConnection) -> bool:
    """Whether an error that left the block, once it is unwrapped, can be this connection's."""
    if isinstance(error, TimeoutError) or is_of_another_connection(error, driver):
        return False
    return isinstance(error, OSError | asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError)


def _is_refusal(error: Exception, driver: DriverConnection) -> bool:
    """Whether a failed COMMIT is known to have been refused, or never sent."""
    return nothing_sent(error, driver) or (refuses_commit(error) and not driver.connection.is_closed())
