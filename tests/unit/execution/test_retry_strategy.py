"""The retry strategy: what is tried again, after which waits, and what the caller sees in the end."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import asyncpg
import pytest

from resilient_pool import BackoffPolicy, Fault, OutcomeUnknownError
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.events import DiscardReason, OutcomeUnknown, RetryExhausted, RetryScheduled
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.execution.retry_strategy import RetryStrategy
from resilient_pool.observability.stats import Counters
from resilient_pool.pooling.context import Dispatcher, PoolContext
from resilient_pool.pooling.driver import ReadOnly
from resilient_pool.retry.verdict import Phase
from resilient_pool.sql.read_only import StatementReader
from resilient_pool.testing import ScriptedClock

READ, WRITE = "SELECT 1", "INSERT INTO t VALUES (1)"


def exactly(value: float) -> float:
    """A jitter that is none."""
    return value


class FakeDriver:
    """A connection that notes what it is sent, to a server on which every function is stable, or none is."""

    def __init__(self, *, stable: bool = True, opened_at=None, read_only=None) -> None:
        self.invalidated, self.has_served, self.has_catalog, self.sent, self.asked = False, True, True, [], 0
        self.opened_at, self.read_only, self.queries, self.is_customized = opened_at, read_only, 0, False
        self.connection = SimpleNamespace(is_closed=lambda: True, execute=self.execute)
        self.stable = stable

    async def execute(self, query, timeout=None):
        self.sent.append(query)

    async def learn_why_read_only(self):
        pass

    async def fetchval_uncached(self, query, *args, timeout=None):
        self.asked += 1
        return self.stable


class Bench:
    """A strategy whose attempts end as a script says, on a clock that moves by itself."""

    def __init__(self, *, opened_at=-1.0, read_only=None, observer=None, **arguments) -> None:
        self.opened_at, self.read_only = opened_at, read_only
        self.events = []
        self.clock = ScriptedClock()
        self.expired = 0
        self.discarded: list[tuple[float, DiscardReason]] = []
        self.counters = Counters()
        defaults = {
            "backoff": BackoffPolicy(base=0.05, factor=2, max_value=2.0, jitter=exactly, max_attempts=5),
            "reconnect": BackoffPolicy(
                base=0.25, factor=2, max_value=1.0, jitter=exactly, max_attempts=None, max_elapsed=60.0
            ),
        }
        config = PoolConfig.from_arguments(None, **{**defaults, **arguments})
        observers = [self.events.append] if observer is None else [observer]
        self.retry_strategy = RetryStrategy(
            PoolContext(config=config, clock=self.clock, counters=self.counters, events=Dispatcher(observers)),
            ReadCheck(StatementReader()),
            SimpleNamespace(expire=self.expire, discard_idle_since=self.discard_idle_since),
            SimpleNamespace(expects_writes=True, takes_any_host=False, server_info=None),
        )

    def expire(self) -> None:
        self.expired += 1

    def discard_idle_since(self, asked_at: float, reason: DiscardReason) -> None:
        self.discarded.append((asked_at, reason))

    async def run(self, script, sql=READ, *, deadline=60.0, idempotent=False, replayable=True, stable=True):
        self.attempts = 0
        self.drivers = []
        outcomes = iter(script)

        async def attempt(execution):
            self.attempts += 1
            phase, self.outcome = next(outcomes)
            self.driver = FakeDriver(stable=stable, opened_at=self.opened_at, read_only=self.read_only)
            self.drivers.append(self.driver)
            if phase is Phase.EXECUTE:
                return await self.retry_strategy.run_on(execution, self.driver)
            execution.attempt.phase, execution.attempt.driver = phase, self.driver
            return await execute(None)

        async def execute(connection):
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

        options = {"idempotent": idempotent, "deadline": deadline}
        execution = self.retry_strategy.new_execution("execute", sql, execute, (), options, replayable, 0.0)
        while True:
            try:
                return await attempt(execution)
            except Exception as error:
                failure = error
            await self.retry_strategy.wait_for_retry(execution, failure, holds=True)

    @property
    def waits(self):
        return [round(seconds, 3) for seconds in self.clock.sleeps]


def lost() -> Exception:
    return asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")


def refused() -> Exception:
    return ConnectionRefusedError(111, "Connect call failed")


CONNECT, EXECUTE = Phase.CONNECT, Phase.EXECUTE


async def test_success_costs_one_attempt_and_no_wait():
    """The happy path neither sleeps nor tells anything."""
    bench = Bench()
    assert await bench.run([(EXECUTE, 42)]) == 42
    assert (bench.attempts, bench.waits, bench.events) == (1, [], [])


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.UniqueViolationError("duplicate key"),
        asyncpg.PostgresSyntaxError("syntax error"),
        asyncpg.InvalidPasswordError("no"),
        asyncpg.InterfaceError("another operation is in progress"),
        ValueError("the application's own"),
        TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_permanent_error_is_raised_after_one_attempt_untouched(error):
    """The very exception, without a note and without another exception around it."""
    bench = Bench()
    if type(error) is asyncpg.InterfaceError:
        error = asyncpg.UndefinedTableError("no such table")
    with pytest.raises(type(error)) as caught:
        await bench.run([(EXECUTE, error)])
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert (bench.attempts, bench.waits) == (1, [])


async def test_a_read_that_was_lost_is_repeated_at_once_and_then_with_growing_waits():
    """The first retry needs no wait, since a fresh connection is the cure."""
    bench = Bench()
    assert await bench.run([(EXECUTE, lost())] * 4 + [(EXECUTE, 1)]) == 1
    assert bench.waits == [0.0, 0.05, 0.1, 0.2]
    assert bench.counters.retries[Fault.DISCONNECTED] == 4
    assert [event.attempt for event in bench.events if isinstance(event, RetryScheduled)] == [1, 2, 3, 4]


async def test_a_read_is_given_up_after_as_many_attempts_as_the_policy_allows():
    """The original error comes out, with one note that tells the history."""
    bench = Bench()
    errors = [lost() for _ in range(5)]
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await bench.run([(EXECUTE, error) for error in errors])
    assert caught.value is errors[-1]
    assert len(caught.value.__notes__) == 1
    assert "after 5 attempts" in caught.value.__notes__[0]
    assert "disconnected" in caught.value.__notes__[0]
    assert isinstance(bench.events[-1], RetryExhausted)


async def test_a_write_that_was_lost_is_not_repeated():
    """Nobody knows whether it took effect, and the error says so, with the driver's as its cause."""
    bench = Bench()
    error = lost()
    with pytest.raises(OutcomeUnknownError) as caught:
        await bench.run([(EXECUTE, error)], WRITE)
    assert caught.value.__cause__ is error
    assert caught.value.operation == "execute"
    assert bench.attempts == 1
    assert isinstance(bench.events[-1], OutcomeUnknown)
    assert bench.counters.outcomes_unknown == 1


@pytest.mark.parametrize(
    ("arguments", "promise"), [({}, {"idempotent": True}), ({"retry_unknown": True}, {})], ids=["call", "pool"]
)
async def test_a_write_declared_repeatable_is_repeated(arguments, promise):
    """Per call, or for the whole pool."""
    bench = Bench(**arguments)
    assert await bench.run([(EXECUTE, lost()), (EXECUTE, "INSERT 0 1")], WRITE, **promise) == "INSERT 0 1"


@pytest.mark.parametrize(
    ("arguments", "promise"), [({}, {"idempotent": True}), ({"retry_unknown": True}, {})], ids=["call", "pool"]
)
@pytest.mark.parametrize("end", ["lost again", "refused", "a password"])
async def test_a_write_declared_repeatable_that_is_given_up_may_have_taken_effect(arguments, promise, end):
    """Whatever ends it in the end, the attempt that was lost may have been applied."""
    bench = Bench(**arguments)
    error = lost()
    last = {
        "lost again": [(EXECUTE, lost()) for _ in range(4)],
        "refused": [(CONNECT, refused())],
        "a password": [(CONNECT, asyncpg.InvalidPasswordError("no"))],
    }[end]
    with pytest.raises(OutcomeUnknownError, match="declared to be repeatable") as caught:
        await bench.run([(EXECUTE, error), *last], WRITE, **promise)
    assert caught.value.__cause__ is error
    assert [f"gave up after {1 + len(last)} attempts" in note for note in caught.value.__notes__] == [True]
    assert not hasattr(error, "__notes__")
    assert caught.value.repeated
    assert pickle.loads(pickle.dumps(caught.value)).repeated


async def test_what_the_server_answers_to_a_repeated_write_is_the_callers():
    """A unique constraint turns the second one into an error, which says that the first one was applied."""
    bench = Bench()
    answer = asyncpg.UniqueViolationError("duplicate key")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await bench.run([(EXECUTE, lost()), (EXECUTE, answer)], WRITE, idempotent=True)
    assert caught.value is answer


async def test_a_write_that_found_its_connection_closed_is_repeated():
    """Not one byte of it was sent."""
    bench = Bench()
    closed = asyncpg.InterfaceError("connection is closed")
    assert await bench.run([(EXECUTE, closed), (EXECUTE, "INSERT 0 1")], WRITE) == "INSERT 0 1"
    assert bench.driver.invalidated is False


async def test_a_server_that_stays_away_ends_the_call():
    """Getting a connection includes all the waiting there was sense in."""
    bench = Bench()
    error = refused()
    with pytest.raises(ConnectionRefusedError) as caught:
        await bench.run([(CONNECT, error)], WRITE)
    assert caught.value is error
    assert bench.waits == []
    assert [event.reason for event in bench.events] == ["absent"]


async def test_the_original_error_wins_over_the_time_out_that_came_last():
    """Not that time ran out, but what it ran out with."""
    bench = Bench()
    first = lost()
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await bench.run([(EXECUTE, first), (CONNECT, AcquireTimeoutError("none free"))])
    assert caught.value is first


async def test_a_time_out_of_the_statement_itself_is_told_as_such():
    """The caller limited it and waits for that error, whatever an earlier attempt met."""
    bench = Bench()
    limit = TimeoutError()
    with pytest.raises(TimeoutError) as caught:
        await bench.run([(EXECUTE, lost()), (EXECUTE, limit)])
    assert caught.value is limit


async def test_each_fault_goes_by_its_own_policy():
    """A fail-over met half-way: lost, then the old primary for a while, then the new one."""
    bench = Bench()
    old = asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction")
    script = [(EXECUTE, lost()), (EXECUTE, old), (EXECUTE, old), (EXECUTE, 1)]
    assert await bench.run(script, WRITE, idempotent=True) == 1
    assert bench.waits == [0.0, 0.25, 0.5]


async def test_the_wrong_server_expires_every_connection():
    """After a fail-over the old primary must not be asked again."""
    bench = Bench()
    error = asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction")
    assert await bench.run([(EXECUTE, error), (EXECUTE, "INSERT 0 1")], WRITE) == "INSERT 0 1"
    assert bench.expired == 1


async def test_a_classifier_that_raises_leaves_the_original_error_and_is_noted():
    """A bug in the application's classifier must not hide what happened."""

    class Broken:
        def classify(self, failure):
            raise RuntimeError("bug")

    bench = Bench(classifier=Broken())
    error = lost()
    with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
        await bench.run([(EXECUTE, error)])
    assert caught.value is error
    assert "RuntimeError: bug" in caught.value.__notes__[0]


async def test_an_observer_that_raises_breaks_no_call():
    """It is told of, and forgotten."""

    def broken(event):
        raise RuntimeError("bug")

    bench = Bench(observer=broken)
    assert await bench.run([(EXECUTE, lost()), (EXECUTE, 1)]) == 1


async def test_a_source_that_was_read_is_not_read_again():
    """A COPY from a file is not repeated once it began, whatever the server says of it."""
    bench = Bench()
    error = asyncpg.DiskFullError("no space left")
    with pytest.raises(asyncpg.DiskFullError) as caught:
        await bench.run([(EXECUTE, error)], None, replayable=False)
    assert caught.value is error
    assert bench.attempts == 1


async def test_a_source_that_was_not_read_yet_is_read_later():
    """As long as the connection was still being set up, nothing was read."""
    bench = Bench()
    assert await bench.run([(Phase.CHECKOUT, lost()), (EXECUTE, "COPY 1")], None, replayable=False) == "COPY 1"


def idle_and_refused() -> Exception:
    return asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")


async def test_what_the_driver_refuses_to_send_is_repeated_and_idle_connections_are_given_up():
    """Nothing was sent, and others may have heard the same last word."""
    bench = Bench()
    assert await bench.run([(EXECUTE, idle_and_refused()), (EXECUTE, 42)], WRITE) == 42
    assert bench.discarded == [(0.0, DiscardReason.STALE)]


async def test_a_stale_type_expires_every_connection_unless_it_was_met_on_a_new_one():
    """One that was opened for this call has another trouble."""
    stale = asyncpg.PostgresError.new({"S": "ERROR", "V": "ERROR", "C": "XX000", "M": "cache lookup failed for type 1"})
    bench = Bench()
    await bench.run([(EXECUTE, stale), (EXECUTE, 42)], WRITE)
    assert bench.expired == 1
    bench = Bench(opened_at=0.0)
    await bench.run([(EXECUTE, stale), (EXECUTE, 42)], WRITE)
    assert bench.expired == 0


@pytest.mark.parametrize(
    ("why", "attempts"),
    [(None, 2), (ReadOnly(in_recovery=True), 2), (ReadOnly(in_recovery=False), 1), (ReadOnly(asked=True), 1)],
)
async def test_a_refused_write_is_repeated_only_where_the_server_may_have_been_demoted(why, attempts):
    """What the connection has learnt about the refusal decides."""
    bench = Bench(read_only=why)
    script = [(EXECUTE, asyncpg.ReadOnlySQLTransactionError("read-only")), (EXECUTE, 42)]
    if attempts == 1:
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await bench.run(script, WRITE)
    else:
        assert await bench.run(script, WRITE) == 42
    assert (bench.attempts, bench.expired) == (attempts, attempts - 1)


BEGIN = "BEGIN READ ONLY, NOT DEFERRABLE"
LOOKING = "SELECT total(1)"


async def test_what_looks_like_a_read_is_repeated_behind_a_guard_only():
    """The server's catalog is asked once, and every later attempt runs in a read-only transaction."""
    bench = Bench()
    assert await bench.run([(EXECUTE, lost()), (EXECUTE, lost()), (EXECUTE, 1)], LOOKING) == 1
    assert [driver.sent for driver in bench.drivers] == [[], [BEGIN], [BEGIN, "COMMIT"]]
    assert [driver.asked for driver in bench.drivers] == [0, 1, 0]
    assert [driver.invalidated for driver in bench.drivers] == [True, True, False]
    assert [type(event) for event in bench.events] == [RetryScheduled, RetryScheduled]


async def test_what_calls_something_volatile_is_not_repeated_and_no_retry_is_told():
    """The error is that of the attempt that was lost, and nothing of the statement was sent again."""
    bench = Bench()
    error = lost()
    with pytest.raises(OutcomeUnknownError) as caught:
        await bench.run([(EXECUTE, error), (EXECUTE, 1)], LOOKING, stable=False)
    assert caught.value.__cause__ is error
    assert bench.driver.sent == []
    assert [type(event) for event in bench.events] == [OutcomeUnknown]
    assert (sum(bench.counters.retries.values()), bench.counters.outcomes_unknown) == (0, 1)
    assert not bench.driver.invalidated


async def test_a_write_that_the_guard_stops_is_unknown():
    """25006 in the repeat says that the statement writes: the first attempt may have, and the old primary is no topic."""
    bench = Bench()
    error = lost()
    stopped = asyncpg.ReadOnlySQLTransactionError("cannot execute INSERT in a read-only transaction")
    with pytest.raises(OutcomeUnknownError) as caught:
        await bench.run([(EXECUTE, error), (EXECUTE, stopped)], LOOKING)
    assert caught.value.__cause__ is error
    assert bench.expired == 0
    assert bench.driver.invalidated


@pytest.mark.parametrize("promise", ["idempotent", "retry_unknown"])
async def test_a_promise_needs_no_guard(promise):
    """What the application declared repeatable is repeated as it is."""
    bench = Bench(**({"retry_unknown": True} if promise == "retry_unknown" else {}))
    assert await bench.run([(EXECUTE, lost()), (EXECUTE, 1)], LOOKING, idempotent=promise == "idempotent") == 1
    assert [driver.sent for driver in bench.drivers] == [[], []]


async def test_a_failure_that_left_no_doubt_needs_no_guard():
    """What the server rolled back was not done."""
    bench = Bench()
    conflict = asyncpg.SerializationError("could not serialize access")
    assert await bench.run([(EXECUTE, conflict), (EXECUTE, 1)], LOOKING) == 1
    assert bench.driver.sent == []


@pytest.mark.parametrize("last", [refused(), asyncpg.InvalidPasswordError("no"), AcquireTimeoutError("none free")])
async def test_what_ends_a_call_later_does_not_hide_that_its_outcome_is_unknown(last):
    """A server that cannot be reached says nothing about the attempt that was lost before."""
    bench = Bench()
    error = lost()
    with pytest.raises(OutcomeUnknownError) as caught:
        await bench.run([(EXECUTE, error), (CONNECT, last)], LOOKING)
    assert caught.value.__cause__ is error
    assert not any(isinstance(event, RetryScheduled) for event in bench.events)


async def test_a_read_whose_own_error_comes_in_the_guard_ends_with_it():
    """The repeat was allowed, so the lost attempt did nothing."""
    bench = Bench()
    error = asyncpg.DivisionByZeroError("division by zero")
    with pytest.raises(asyncpg.DivisionByZeroError) as caught:
        await bench.run([(EXECUTE, lost()), (EXECUTE, error)], LOOKING)
    assert caught.value is error
    assert bench.driver.invalidated


@pytest.mark.parametrize(
    "error", [asyncpg.UndefinedFunctionError, asyncpg.UndefinedTableError, asyncpg.UndefinedObjectError]
)
async def test_a_repeat_that_misses_what_its_text_names_is_unknown(error):
    """It was dropped after the lost attempt, so the catalog did not say what that did."""
    bench = Bench()
    with pytest.raises(OutcomeUnknownError):
        await bench.run([(EXECUTE, lost()), (EXECUTE, error("it does not exist"))], LOOKING)


async def test_the_answer_to_the_guards_commit_is_not_needed(monkeypatch):
    """The result is there; only the connection is given up."""
    bench = Bench()

    async def execute(self, query, timeout=None):
        self.sent.append(query)
        if query == "COMMIT":
            raise lost()

    monkeypatch.setattr(FakeDriver, "execute", execute)
    assert await bench.run([(EXECUTE, lost()), (EXECUTE, 7)], LOOKING) == 7
    assert bench.driver.invalidated


async def test_a_guard_whose_catalog_cannot_be_asked_does_not_repeat(monkeypatch):
    """A database that only speaks the protocol has no such catalog."""
    bench = Bench()

    async def fetchval_uncached(self, query, *args, timeout=None):
        self.connection.is_closed = lambda: False
        raise asyncpg.UndefinedTableError("no pg_rewrite here")

    monkeypatch.setattr(FakeDriver, "fetchval_uncached", fetchval_uncached)
    with pytest.raises(OutcomeUnknownError):
        await bench.run([(EXECUTE, lost()), (EXECUTE, 7)], LOOKING)


async def test_a_call_that_is_given_up_at_once_is_unknown_unless_it_is_a_plain_read():
    """One attempt is all that was allowed: for a function of the user's that means that it may have run."""
    for sql, expected in ((LOOKING, OutcomeUnknownError), (READ, asyncpg.ConnectionDoesNotExistError)):
        with pytest.raises(expected):
            await Bench(backoff=BackoffPolicy(max_attempts=1)).run([(EXECUTE, lost())], sql)


async def test_an_error_that_was_being_handled_lends_no_sqlstate():
    """What is told of a retry is about what failed."""
    bench, failed = Bench(), lost()
    failed.__context__ = asyncpg.UniqueViolationError("handled by the application")
    reset = ConnectionResetError()
    reset.__context__ = failed.__context__
    await bench.run([(EXECUTE, failed), (EXECUTE, reset), (EXECUTE, 42)], idempotent=True)
    told = [event.sqlstate for event in bench.events if isinstance(event, RetryScheduled)]
    assert told == ["08003", None]
