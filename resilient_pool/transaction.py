"""The retried transaction: a loop of attempts, each of which commits, is repeated as a whole, or ends in an error."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from enum import Enum
from types import TracebackType
from typing import Literal, NoReturn, Self, TypedDict, TypeVar

import asyncpg

from resilient_pool.config import PoolConfig
from resilient_pool.connection import Lender, ResilientConnection
from resilient_pool.core import wire
from resilient_pool.core.clock import Clock
from resilient_pool.core.continuation import Place
from resilient_pool.core.judgement import unwrap
from resilient_pool.core.resolution import Answer, Mark
from resilient_pool.core.runner import Call
from resilient_pool.core.wire import AnyConnection, Link
from resilient_pool.inquiry import Inquiry
from resilient_pool.policy.atomicity import ends_transaction
from resilient_pool.policy.classifier import refuses_commit
from resilient_pool.policy.statements import StatementReader
from resilient_pool.policy.verdict import Outcome, Phase

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


class Witness:
    """Sees every text that is sent inside one transaction.

    Attributes:
        may_write: Whether anything was sent that is not proven read-only.
        may_notify: Whether it may have an effect without having an id.
        may_have_ended: Whether a statement of the application's may have ended the transaction.
    """

    __slots__ = ("_reader", "may_have_ended", "may_notify", "may_write")

    def __init__(self, reader: StatementReader) -> None:
        self._reader = reader
        self.may_write = self.may_notify = self.may_have_ended = False

    def __call__(self, sql: str | None) -> None:
        """Take note of a text, or of something that has none."""
        if sql is not None and self._reader.is_plain_read(sql):
            return
        self.may_write = True
        self.may_notify = self.may_notify or sql is None or "notify" in sql.lower()
        self.may_have_ended = self.may_have_ended or (sql is not None and ends_transaction(sql))


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
    """What the transactions of one pool have in common.

    Args:
        config: The pool's.
        lender: Lends their connections.
        reader: Tells which statements are read-only.
        inquiry: Asks what became of them.
        clock: Waits.
        require_open: Raises if the pool cannot be used.
    """

    __slots__ = ("clock", "config", "inquiry", "lender", "reader", "require_open")

    def __init__(
        self,
        config: PoolConfig,
        lender: Lender,
        reader: StatementReader,
        inquiry: Inquiry,
        clock: Clock,
        require_open: Callable[[], None],
    ) -> None:
        self.config = config
        self.lender = lender
        self.reader = reader
        self.inquiry = inquiry
        self.clock = clock
        self.require_open = require_open


class RetriedTransaction:
    """The attempts of one transaction, one after the other, until one has committed.

        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(...)

    The block may run more than once, so it should have no other effect than on the database. It commits when it ends, also
    by `return`, `break` or `continue`; it is rolled back when it is left by an exception. A curable fault is waited for and
    the block is run again, provided that nothing follows it inside the loop and that it was not left by `return` or `break`:
    the fault is raised then, after the transaction was rolled back. `run_in_transaction()` knows no such condition.
    """

    def __init__(self, shared: Transactions, options: TransactionOptions, *, always_goes_on: bool = False) -> None:
        self._shared = shared
        self._options = options
        self._always_goes_on = always_goes_on
        self._call: Call[None] = shared.lender.call(
            "transaction",
            None,
            _nothing,
            idempotent=False,
            deadline=options.get("deadline"),
            fail_fast=options.get("fail_fast"),
        )
        self._runner = shared.lender.runner
        self._call.read_only = options.get("readonly", False)
        self._memory = self._runner.begin_transaction(self._call)
        self._state = _State.READY
        self._head: Place | None = None
        self._delay = 0.0
        self._number = 0

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Attempt]:
        # Not a coroutine function: its body has to run while the loop's own frame stands right behind it.
        if self._head is None and not self._always_goes_on:
            self._head = Place.of(sys._getframe(1))  # noqa: SLF001 - there is no public way to look back
        return self._next()

    async def _next(self) -> Attempt:
        if self._state is _State.FINISHED:
            raise StopAsyncIteration
        if self._state is _State.RUNNING:
            raise asyncpg.InterfaceError("the attempt before was not entered: write `async with attempt as connection`")
        self._state = _State.RUNNING
        if self._delay:
            await self._shared.clock.sleep(self._delay)
        self._number += 1
        return Attempt(self, self._shared, self._options, self._call, self._number)

    @property
    def is_finished(self) -> bool:
        """Whether no further attempt follows."""
        return self._state is _State.FINISHED

    def finish(self) -> None:
        """Make no further attempt."""
        self._state = _State.FINISHED

    def weigh(self, error: Exception, *, hindrance: str | None = None) -> float:
        """Return how long to wait before the next attempt, in seconds, or raise what the application is to see."""
        return self._runner.next_delay(self._call, self._memory, error, hindrance=hindrance)

    def go_on(self, delay: float) -> None:
        """Make another attempt after that many seconds."""
        self._delay = delay
        self._state = _State.READY

    def is_certain_to_go_on(self, place: Place, *, swallowing: bool) -> bool:
        """Whether the loop asks for the next attempt next, if `__aexit__`, awaited at `place`, ends without an error."""
        if self._always_goes_on:
            return True
        return self._head is not None and place.leads_to(self._head, swallowing=swallowing)


class Attempt:
    """One attempt of a transaction: enter it for a connection on which the transaction is open.

    Attributes:
        number: Which attempt this is; the first is 1.
    """

    def __init__(
        self,
        loop: RetriedTransaction,
        shared: Transactions,
        options: TransactionOptions,
        call: Call[None],
        number: int,
    ) -> None:
        self.number = number
        self._loop = loop
        self._shared = shared
        self._options = options
        self._call = call
        self._lease: ResilientConnection | None = None
        self._witness = Witness(shared.reader)
        self._entered = False

    # Beginning

    async def __aenter__(self) -> ResilientConnection:
        if self._entered:
            raise asyncpg.InterfaceError("an attempt can be entered once only")
        self._entered = True
        begun = False
        try:
            while self._lease is None:
                self._shared.require_open()
                self._call.begin_attempt()
                self._call.settled = Outcome.NOT_EXECUTED
                try:
                    self._lease = await self._begin()
                except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
                    delay = self._loop.weigh(error)
                    await self._shared.clock.sleep(delay)
            begun = True
        finally:
            if not begun:
                self._loop.finish()
        return self._lease

    async def _begin(self) -> ResilientConnection:
        lease = await self._shared.lender.lend_once(self._call)
        begun = False
        try:
            await self._begin_on(_link(self._call))
            self._shared.lender.bind(lease, self._witness)
            begun = True
        finally:
            if not begun:
                self._shared.lender.take_back(lease)
        return lease

    async def _begin_on(self, link: Link) -> None:
        options = self._options
        if self._asks:
            await self._shared.inquiry.learn(link)
        self._call.phase, self._call.link = Phase.EXECUTE, link
        await link.begin(
            isolation=options.get("isolation"),
            readonly=options.get("readonly", False),
            deferrable=options.get("deferrable", False),
        )
        self._call.began = self._shared.clock.monotonic()

    @property
    def _asks(self) -> bool:
        return self._options.get("resolve_commit", True) and not self._options.get("readonly", False)

    # Ending

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # Noted before anything else: a frame that is resumed by an error stands elsewhere.
        place = Place.of(sys._getframe(1))  # noqa: SLF001 - there is no public way to look back
        decided = False
        try:
            failure = await (self._commit() if error is None else self._roll_back(error))
            swallow = failure is not None and self._leave(failure, error, place)
            decided = True
        finally:
            if not decided or not swallow:
                self._loop.finish()
            await self._release()
        return swallow

    def _leave(self, failure: Exception, error: BaseException | None, place: Place) -> bool:
        """Decide whether another attempt follows `failure`; what was raised in the block, `error`, is then swallowed."""
        goes_on = self._loop.is_certain_to_go_on(place, swallowing=error is not None)
        try:
            delay = self._loop.weigh(failure, hindrance=None if goes_on else _UNCERTAIN)
        except Exception as farewell:
            if farewell is not error:
                raise
            return False
        self._loop.go_on(delay)
        return True

    async def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None or lease.is_released:
            return
        reset = self._shared.lender.take_back(lease)
        if reset is not None and self._shared.config.session_reset == "on_release":
            await asyncio.wait(
                [reset]
            )  # not by shield: one that terminate() cuts short is no cancellation of this task

    # Rolling back

    async def _roll_back(self, error: BaseException) -> Exception | None:
        """Undo the block, and return `error` if another attempt may cure it; whatever it is, it passes otherwise."""
        link = _link(self._call)
        if not isinstance(error, Exception):
            return None  # there is no time; the connection's reset, in the background, does it
        await self._undo(link)
        unwrapped = unwrap(self._shared.config, error)
        if self._witness.may_have_ended or not _is_the_drivers(unwrapped, link):
            return None
        if isinstance(unwrapped, asyncpg.ReadOnlySQLTransactionError):
            await link.learn_why_read_only()
        self._call.settled = Outcome.ROLLED_BACK
        return error

    async def _undo(self, link: Link) -> None:
        with contextlib.suppress(Exception):  # the connection's reset does it then, or the server, when it is closed
            if not link.connection.is_closed():
                await link.end_transaction("ROLLBACK", timeout=self._shared.config.reset_timeout)

    # Committing

    async def _commit(self) -> Exception | None:
        """Commit, and return the error if it is certain, or said in the call, what became of it."""
        link = _link(self._call)
        self._call.settled = Outcome.ROLLED_BACK  # as long as COMMIT was not sent
        try:
            mark = await self._mark(link)
        except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
            await self._undo(link)
            if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                await link.learn_why_read_only()
            return self._unless_ended(error)
        self._call.xid = mark.xid
        self._call.phase = Phase.COMMIT
        try:
            done = await link.end_transaction("COMMIT")
        except Exception as error:  # noqa: BLE001 - every error is classified, none is swallowed
            return None if await self._is_committed(error, link, mark) else self._unless_ended(error)
        if done != "COMMIT" and not self._witness.may_have_ended:
            _refuse_to_call_it_committed()
        if mark.token is not None:
            self._shared.inquiry.prune()
        return None

    def _unless_ended(self, error: Exception) -> Exception:
        # What the application committed by itself must not be repeated, whatever became of the rest.
        if self._witness.may_have_ended and self._call.settled is not Outcome.UNKNOWN:
            raise error
        return error

    async def _mark(self, link: Link) -> Mark:
        if not self._witness.may_write or self._options.get("readonly", False):
            return Mark(nothing_written=True)
        if not self._asks:
            return Mark()
        return await self._shared.inquiry.mark(link, notifies=self._witness.may_notify)

    async def _is_committed(self, error: Exception, link: Link, mark: Mark) -> bool:
        """Say whether a COMMIT that failed took effect nevertheless; what else is known goes into the call."""
        if _is_refusal(error, link):
            return False
        if mark.nothing_written:
            # Only a serializable transaction's COMMIT says something about what was read.
            return not self._is_serializable
        answer = Answer.UNKNOWN
        if mark.epoch is not None or mark.token is not None:
            slot = None if self._lease is None else self._shared.lender.detach(self._lease)
            answer = await self._shared.inquiry.resolve(slot, mark, self._call.deadline)
        self._call.settled = Outcome.ROLLED_BACK if answer is Answer.ABORTED else Outcome.UNKNOWN
        return answer is Answer.COMMITTED

    @property
    def _is_serializable(self) -> bool:
        default = self._shared.config.server_settings.get("default_transaction_isolation")
        return (self._options.get("isolation") or default) == "serializable"


async def run(
    shared: Transactions,
    function: Callable[..., Awaitable[T]],
    args: tuple[object, ...],
    options: TransactionOptions,
) -> T:
    """Call `function(connection, *args)` in a retried transaction, and return what it returned when that committed."""
    loop = RetriedTransaction(shared, options, always_goes_on=True)
    while True:
        async with await loop.__anext__() as connection:
            result = await function(connection, *args)
        if loop.is_finished:
            return result


def _link(call: Call[None]) -> Link:
    if call.link is None:
        raise asyncpg.InternalClientError("a transaction without a connection")
    return call.link


def _is_the_drivers(error: BaseException, link: Link) -> bool:
    """Whether an error that left the block, once it is unwrapped, can be this connection's."""
    if isinstance(error, TimeoutError) or wire.is_of_another_connection(error, link):
        return False
    return isinstance(error, OSError | asyncpg.PostgresError | asyncpg.InterfaceError | asyncpg.InternalClientError)


def _is_refusal(error: Exception, link: Link) -> bool:
    """Whether a failed COMMIT is known to have been refused, or never sent."""
    return wire.nothing_sent(error, link) or (refuses_commit(error) and not link.connection.is_closed())


def _refuse_to_call_it_committed() -> NoReturn:
    raise asyncpg.InFailedSQLTransactionError(
        "the transaction was rolled back at its end, because a statement in it had failed and the error was caught"
    )


async def _nothing(_connection: AnyConnection) -> None:
    return None
