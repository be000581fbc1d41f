"""The circuit breaker: who tries to reach an absent server, who waits, who is admitted afterwards, and what they are told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import asyncpg
import pytest

from resilient_pool import BackoffPolicy
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.events import CircuitClosed, CircuitOpened, RetryScheduled
from resilient_pool.observability.stats import Counters
from resilient_pool.pooling.acquire import Acquirer
from resilient_pool.pooling.circuit_breaker import CircuitBreaker
from resilient_pool.pooling.context import Dispatcher, PoolContext
from resilient_pool.pooling.resource_pool import ResourcePool
from resilient_pool.retry.verdict import Failure, Fault, Phase
from resilient_pool.testing import ScriptedClock


def exactly(value: float) -> float:
    """A jitter that is none."""
    return value


def describe(error, *, waking=False):
    return Failure(error=error, phase=Phase.CONNECT, sent=False, waking=waking)


class FakeConnection:
    """A connection that is well until somebody breaks it."""

    invalidated = False
    broken = False
    has_served = False

    def socket_is_idle(self):
        return not self.broken

    async def drain_socket(self):
        return not self.broken

    async def ping(self, seconds):
        return True


class FakeMaintenance:
    """Opens connections as a script says: each takes `takes` seconds, then fails with the next error or succeeds."""

    is_in_own_loop = True

    def __init__(self, resources, clock, errors, takes) -> None:
        self.resources = resources
        self.clock = clock
        self.errors = iter(errors)
        self.takes = takes
        self.closing = self.loop_is_ending = False
        self.returning = self.generation = 0
        self.began = []
        self.at_once = self.most_at_once = 0

    async def open_into(self, entry, seconds):
        self.began.append(round(self.clock.monotonic(), 3))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            takes = self.takes if seconds is None else min(self.takes, seconds)
            await (self.clock.sleep(takes) if takes else asyncio.sleep(0))
        finally:
            self.at_once -= 1
        if seconds is not None and seconds < self.takes:
            raise TimeoutError
        error = next(self.errors, None)
        if error is not None:
            raise error
        now = self.clock.now()
        entry.fill(FakeConnection(), now=now, expires_at=1e9, generation=0)

    def release(self, entry):
        entry.idle_since = self.clock.now()
        self.resources.put(entry)

    def close_connection(self, entry, reason):
        entry.empty()

    def discard(self, entry, reason):
        entry.empty()
        self.resources.put(entry)

    def connections(self):
        return [entry.resource for entry in self.resources if entry.resource is not None and not entry.resource.broken]

    def is_outdated(self, entry):
        return False

    def close_if_idle_too_long(self, entry):
        """Nothing is ever too old here."""

    def require_open(self):
        """It is open."""


class Bench:
    """A circuit breaker in front of a scripted server, and callers who take connections through it."""

    def __init__(self, *errors, takes=0.0, **arguments) -> None:
        defaults = {
            "max_size": 10,
            "reconnect": BackoffPolicy(
                base=0.25, factor=2, max_value=1.0, jitter=exactly, max_attempts=None, max_elapsed=60.0
            ),
        }
        config = PoolConfig.from_arguments(None, **{**defaults, **arguments})
        self.clock = ScriptedClock(auto=False)
        self.events = []
        self.counters = Counters()
        self.resources = ResourcePool(config.max_size, self.clock, min_size=config.min_size)
        self.maintenance = FakeMaintenance(self.resources, self.clock, errors, takes)
        connector = SimpleNamespace(describe=describe)
        context = PoolContext(
            config=config, clock=self.clock, counters=self.counters, events=Dispatcher([self.events.append])
        )
        self.circuit_breaker = CircuitBreaker(context, self.resources, self.maintenance, connector)
        self.acquirer = Acquirer(context, self.resources, self.maintenance, self.circuit_breaker)

    def call(self, deadline=60.0, *, fail_fast=False, holds=0.0):
        """Begin a call that takes a connection, keeps it for a while and gives it back."""

        async def use():
            ends = None if deadline is None else self.clock.monotonic() + deadline
            entry = await self.acquirer.acquire(ends, fail_fast=fail_fast)
            try:
                if holds:
                    await self.clock.sleep(holds)
            finally:
                self.maintenance.release(entry)
            return round(self.clock.monotonic(), 3)

        return asyncio.ensure_future(use())

    def told(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def refused() -> Exception:
    return ConnectionRefusedError(111, "Connect call failed")


def away(attempts: int) -> list[Exception]:
    return [refused() for _ in range(attempts)]


async def test_a_cold_pool_meets_the_server_with_one_attempt():
    """Nobody else opens before it has got through; what it opened serves whoever waits."""
    bench = Bench(takes=5.0)
    calls = [bench.call() for _ in range(100)]
    await bench.clock.run(4.9)
    assert bench.maintenance.began == [0.0]
    assert bench.resources.size == 1  # nobody who waits holds an entry
    for _ in range(20):
        await bench.clock.run(1.0)
    assert [call.exception() for call in calls] == [None] * 100


async def test_the_prober_tries_under_the_reconnect_policy_and_nobody_else_does():
    """A hundred callers, one attempt at a time, at the policy's distances."""
    bench = Bench(*away(5))
    calls = [bench.call() for _ in range(100)]
    await bench.clock.run(3.7)
    assert bench.maintenance.began == [0.0, 0.25, 0.75, 1.75, 2.75]
    assert bench.maintenance.most_at_once == 1
    assert bench.resources.size == 0
    await bench.clock.run(0.05)
    assert await asyncio.gather(*calls) == [3.75] * 100
    assert [(event.operation, event.attempt, event.delay) for event in bench.told(RetryScheduled)] == [
        ("connect", 1, 0.25),
        ("connect", 2, 0.5),
        ("connect", 3, 1.0),
        ("connect", 4, 1.0),
        ("connect", 5, 1.0),
    ]
    assert bench.told(CircuitOpened) == [CircuitOpened(fault=Fault.UNREACHABLE, sqlstate=None)]
    assert bench.told(CircuitClosed) == [CircuitClosed(attempts=5, elapsed=3.75)]
    assert bench.counters.connect_failures == 5


async def test_after_the_prober_waiters_are_admitted_one_then_two_then_four():
    """Each step when an opening has succeeded, so that a server that just woke is not overrun."""
    bench = Bench(takes=1.0, max_size=20)
    calls = [bench.call(holds=30.0) for _ in range(20)]
    most = []
    for _ in range(7):
        await bench.clock.run(0.5)
        most.append(bench.maintenance.at_once)
        await bench.clock.run(0.5)
    assert most == [1, 1, 2, 4, 8, 4, 0]
    await bench.clock.run(60.0)
    assert all(call.done() for call in calls)


async def test_an_admitted_waiter_that_fails_closes_the_gate_again():
    """It goes back into the queue, and one prober goes on."""
    bench = Bench(None, refused(), None)
    calls = [bench.call(holds=1.0) for _ in range(3)]
    await bench.clock.run(10.0)
    assert [call.exception() for call in calls] == [None] * 3
    assert bench.maintenance.most_at_once == 1
    assert len(bench.told(CircuitOpened)) == len(bench.told(CircuitClosed)) == 1


async def test_a_deadline_ends_the_waiting_with_the_original_error():
    """Each under its own deadline, with the error of the last attempt and its history in a note."""
    errors = away(20)
    bench = Bench(*errors)
    patient, hasty, hasty_too = bench.call(60.0), bench.call(2.0), bench.call(2.0)
    await bench.clock.run(1.9)
    assert not hasty.done()
    await bench.clock.run(0.1)
    assert hasty.exception() is errors[3]
    twin = hasty_too.exception()
    assert (type(twin), twin.args, twin.errno) == (ConnectionRefusedError, errors[3].args, 111)
    assert twin is not errors[3]
    for error in (hasty.exception(), twin):
        assert error.__notes__ == [
            "resilient_pool: gave up after 4 attempts to connect in 2.00 s; the last fault was unreachable"
        ]
    patient.cancel()


async def test_a_deadline_that_ends_while_the_first_attempt_hangs_says_so():
    """There is no error to show yet; the caller does not wait for the connect time-out."""
    bench = Bench(takes=30.0)
    call = bench.call(2.0)
    await bench.clock.run(2.0)
    with pytest.raises(AcquireTimeoutError, match=r"began 2\.00 s ago, and the server did not answer"):
        call.result()


async def test_whoever_comes_late_waits_for_as_long_as_the_first():
    """The policy's longest absence counts from each caller's own beginning."""
    bench = Bench(*away(200))
    first = bench.call(None)
    await bench.clock.run(59.0)
    second = bench.call(None)
    await bench.clock.run(2.0)  # it is looked at when an attempt has failed
    assert isinstance(first.exception(), ConnectionRefusedError)
    await bench.clock.run(57.0)
    assert not second.done()
    await bench.clock.run(2.0)
    assert isinstance(second.exception(), ConnectionRefusedError)


async def test_the_prober_stops_when_nobody_waits_any_more():
    """An idle application must not keep a serverless database awake."""
    bench = Bench(*away(50))
    call, other = bench.call(2.0), bench.call(60.0)
    await bench.clock.run(3.0)
    assert call.done()
    other.cancel()
    await bench.clock.run(0.0)
    attempts = len(bench.maintenance.began)
    await bench.clock.run(100.0)
    assert len(bench.maintenance.began) == attempts


async def test_an_attempt_under_way_is_given_up_when_nobody_waits_any_more():
    """And whoever comes next does not hammer on the door: attempts keep their distance."""
    bench = Bench(takes=30.0)
    for _ in range(20):
        call = bench.call(0.05)
        await bench.clock.run(0.05)
        assert isinstance(call.exception(), AcquireTimeoutError)
    assert bench.maintenance.began == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert bench.maintenance.at_once == 0
    assert bench.resources.size == 0


async def test_a_caller_that_comes_as_the_last_one_leaves_is_not_forgotten():
    """The prober that is being stopped is not the one the newcomer waits for."""
    bench = Bench(takes=1.0)
    first = bench.call()
    await bench.clock.run(0.5)
    first.cancel()
    second = bench.call()  # it begins to wait in the very turn in which the first leaves
    await bench.clock.run(5.0)
    assert second.done()
    assert second.exception() is None


async def test_what_waiting_does_not_cure_ends_everybodys_waiting_at_once():
    """Each has the error, untouched; the next caller tries again."""
    error = asyncpg.InvalidPasswordError("password authentication failed")
    bench = Bench(error, None)
    calls = [bench.call() for _ in range(3)]
    await bench.clock.run(0.0)
    assert calls[0].exception() is error
    assert [str(call.exception()) for call in calls] == [str(error)] * 3
    assert len({id(call.exception()) for call in calls}) == 3
    assert not getattr(error, "__notes__", [])
    again = bench.call()
    await bench.clock.run(0.0)
    assert again.exception() is None
    assert bench.told(CircuitOpened) == []


async def test_a_policy_of_few_attempts_is_kept():
    """After the last one everybody who waits has the error."""
    bench = Bench(*away(9), reconnect=BackoffPolicy(base=1.0, factor=2, jitter=exactly, max_attempts=3))
    call = bench.call()
    await bench.clock.run(3.0)
    assert bench.maintenance.began == [0.0, 1.0, 3.0]
    assert "after 3 attempts" in call.exception().__notes__[0]


async def test_fail_fast_does_not_wait_for_a_server_known_to_be_away():
    """But it takes part in finding out, or a pool of such callers would never recover."""
    bench = Bench(*away(2))
    first = bench.call(fail_fast=True)
    await bench.clock.run(0.0)
    assert isinstance(first.exception(), ConnectionRefusedError)
    second = bench.call(fail_fast=True)
    await bench.clock.run(0.0)
    assert isinstance(second.exception(), ConnectionRefusedError)
    assert bench.maintenance.began == [0.0]
    await bench.clock.run(0.25)
    assert bench.maintenance.began == [0.0, 0.25]
    await bench.clock.run(100.0)
    assert bench.maintenance.began == [0.0, 0.25]  # nobody waits
    third = bench.call(fail_fast=True)
    await bench.clock.run(0.0)
    assert isinstance(third.exception(), ConnectionRefusedError)
    await bench.clock.run(0.0)
    fourth = bench.call(fail_fast=True)
    await bench.clock.run(0.0)
    assert fourth.exception() is None


def unlisted() -> Exception:
    return asyncpg.InvalidAuthorizationSpecificationError('no pg_hba.conf entry for host "10.0.0.1"')


async def test_a_refusal_that_a_waking_server_may_give_is_waited_for():
    """Inside the wake window it is no verdict."""
    bench = Bench(*(unlisted() for _ in range(4)))
    call = bench.call()
    await bench.clock.run(10.0)
    assert call.exception() is None


async def test_a_genuine_refusal_is_final_after_the_wake_window():
    """And its note says why it was waited for. The next caller does not pay again."""
    bench = Bench(
        *(unlisted() for _ in range(100)),
        reconnect=BackoffPolicy(base=1.0, factor=1, jitter=exactly, max_attempts=None),
    )
    call = bench.call(200.0)
    await bench.clock.run(59.0)
    assert not call.done()
    await bench.clock.run(1.0)
    assert isinstance(call.exception(), asyncpg.InvalidAuthorizationSpecificationError)
    assert "waking up" in call.exception().__notes__[1]
    again = bench.call(200.0)
    await bench.clock.run(1.0)
    assert again.done()


async def test_a_server_left_alone_for_long_may_have_gone_to_sleep_again():
    """Then its refusals are waited for anew."""
    bench = Bench(
        *(unlisted() for _ in range(100)),
        reconnect=BackoffPolicy(base=1.0, factor=1, jitter=exactly, max_attempts=None),
    )
    call = bench.call(200.0)
    await bench.clock.run(60.0)
    assert call.done()
    await bench.clock.run(61.0)
    again = bench.call(200.0)
    await bench.clock.run(30.0)
    assert not again.done()
    again.cancel()


async def test_a_server_that_was_up_meanwhile_may_be_waking_up_anew():
    """The window counts from the first failure after it was reached last."""
    policy = BackoffPolicy(base=10.0, factor=1, max_value=None, jitter=exactly, max_attempts=None)
    bench = Bench(unlisted(), unlisted(), None, unlisted(), None, max_size=1, reconnect=policy)
    assert await _after(bench, bench.call(), 20.0) is None
    bench.maintenance.discard(bench.resources.take(), None)
    await bench.clock.run(45.0)
    assert await _after(bench, bench.call(), 10.0) is None


async def _after(bench, call, seconds):
    await bench.clock.run(seconds)
    return call.exception()


async def _open_three(bench):
    """Let the circuit breaker close, and leave three idle connections."""
    calls = [bench.call(holds=1.0) for _ in range(3)]
    await bench.clock.run(10.0)
    assert [call.exception() for call in calls] == [None] * 3
    assert (bench.resources.idle, bench.resources.connect_limit) == (3, 3)
    bench.maintenance.began.clear()
    bench.maintenance.most_at_once = 0


async def test_when_no_connection_is_left_the_server_is_not_known_to_be_up():
    """It may have gone to sleep, so the next crowd is met by one again."""
    bench = Bench(max_size=3)
    await _open_three(bench)
    for entry in bench.resources.withdraw(lambda _: True):
        bench.maintenance.discard(entry, None)
    bench.maintenance.takes = 1.0
    calls = [bench.call() for _ in range(10)]
    await bench.clock.run(0.9)
    assert (len(bench.maintenance.began), bench.resources.size) == (1, 1)
    await bench.clock.run(20.0)
    assert [call.exception() for call in calls] == [None] * 10


async def test_whoever_finds_a_dead_connection_waits_for_the_prober_as_well():
    """It gives its place up, rather than to knock at the server's door beside the prober."""
    bench = Bench(*[None] * 3, *away(2), max_size=3)
    await _open_three(bench)
    for entry in bench.resources:
        entry.resource.broken = True
    bench.circuit_breaker.half_open()
    calls = [bench.call() for _ in range(3)]
    await bench.clock.run(0.3)
    assert (bench.maintenance.most_at_once, bench.resources.size) == (1, 0)
    await bench.clock.run(20.0)
    assert [call.exception() for call in calls] == [None] * 3
    assert bench.maintenance.most_at_once == 1


async def test_an_attempt_cut_short_by_its_callers_deadline_makes_the_next_ones_careful():
    """It tells nothing about the server, and so nobody knows any more that it is up."""
    bench = Bench(max_size=3)
    await _open_three(bench)
    held = bench.resources.take()
    for entry in bench.resources.withdraw(lambda _: True):
        bench.maintenance.discard(entry, None)
    bench.maintenance.takes = 30.0
    hasty = bench.call(1.0)
    await bench.clock.run(1.0)
    assert isinstance(hasty.exception(), TimeoutError)
    assert not bench.circuit_breaker.is_open
    calls = [bench.call() for _ in range(3)]
    await bench.clock.run(1.0)
    assert bench.maintenance.at_once == 1
    bench.maintenance.release(held)
    await bench.clock.run(1.0)
    assert [call.exception() for call in calls] == [None] * 3


async def test_failures_at_the_same_moment_count_once():
    """Three callers that fail together have not waited three times as long."""
    policy = BackoffPolicy(base=1.0, factor=2, max_value=None, jitter=exactly, max_attempts=3)
    bench = Bench(None, None, None, *away(3), max_size=5, reconnect=policy)
    calls = [bench.call(holds=1.0) for _ in range(3)]
    await bench.clock.run(10.0)
    held = [bench.resources.take() for _ in range(3)]
    bench.resources.set_connect_limit(5)
    bench.maintenance.discard(held.pop(), None)
    bench.maintenance.discard(held.pop(), None)
    calls = [bench.call() for _ in range(3)]
    await bench.clock.run(5.0)
    assert [call.exception() for call in calls] == [None] * 3
    assert [event.delay for event in bench.told(RetryScheduled)] == [1.0]


async def test_live_connections_serve_waiters_while_the_gate_is_closed():
    """A server that takes no further connection still answers on those it has."""
    full = [asyncpg.TooManyConnectionsError("sorry, too many clients already") for _ in range(100)]
    bench = Bench(None, *full, max_size=5)
    calls = [bench.call(holds=1.0) for _ in range(10)]
    await bench.clock.run(9.9)
    assert sum(call.done() for call in calls) == 9
    await bench.clock.run(0.1)
    assert [call.exception() for call in calls] == [None] * 10


async def test_a_place_given_up_while_the_gate_is_closed_calls_the_prober():
    """When every place is taken there is nothing to probe for; when one is lost, somebody must."""
    bench = Bench(None, refused(), None, max_size=1)
    holder = await bench.acquirer.acquire(None)
    bench.circuit_breaker.half_open()
    waiter = bench.call()
    await bench.clock.run(1.0)
    assert bench.maintenance.began == [0.0]
    bench.maintenance.discard(holder, None)
    await bench.clock.run(1.0)
    assert waiter.exception() is None


async def test_the_minimum_is_filled_and_refilled_one_after_the_other():
    """Without anybody waiting, also after losses and failures."""
    bench = Bench(None, refused(), min_size=2, init_size=2)
    bench.circuit_breaker.ensure_prober()
    for _ in range(4):
        await bench.clock.run(0.5)
    assert (bench.resources.size, bench.resources.idle) == (2, 2)
    bench.maintenance.discard(bench.resources.take(), None)
    await bench.clock.run(0.0)
    assert bench.resources.idle == 2


@pytest.mark.parametrize("waiters", [0, 1, 3, 8])
async def test_the_minimum_is_filled_after_an_outage_however_many_wait(waiters):
    """Those who wait open for themselves; the rest is filled when they have been served."""
    bench = Bench(refused(), None, min_size=9, init_size=9)
    calls = [bench.call() for _ in range(waiters)]
    bench.circuit_breaker.ensure_prober()
    for _ in range(10):
        await bench.clock.run(0.5)
    assert [call.exception() for call in calls] == [None] * waiters
    assert bench.resources.size == 9


async def test_the_minimum_does_not_hammer_at_a_door_that_stays_closed():
    """A final refusal is no reason to try again at once; but whoever comes is told the news."""
    bench = Bench(*(asyncpg.InvalidPasswordError("no") for _ in range(1000)), min_size=1, init_size=1)
    bench.circuit_breaker.ensure_prober()
    for _ in range(20):
        await bench.clock.run(0.5)
    assert len(bench.maintenance.began) <= 12
    call = bench.call()
    await bench.clock.run(1.0)
    assert isinstance(call.exception(), asyncpg.InvalidPasswordError)


async def test_an_opening_that_never_waits_for_anything_leaves_the_loop_to_others():
    """A missing socket is refused at once."""
    bench = Bench(reconnect=BackoffPolicy(base=0, jitter=None, max_attempts=None))

    async def fail(entry, seconds):
        raise refused()

    bench.maintenance.open_into = fail
    call = bench.call(1.0)
    await bench.clock.run(1.0)
    assert isinstance(call.exception(), ConnectionRefusedError)


async def test_an_attempt_that_is_not_answered_gets_a_second_one_beside_it():
    """The server may be up, and only that attempt be lost; two at most are under way."""
    bench = Bench(max_size=5)
    began = []

    async def hang_at_first(entry, seconds):
        began.append(bench.clock.monotonic())
        if len(began) < 3:
            await bench.clock.sleep(1000.0)
        entry.fill(FakeConnection(), now=bench.clock.now(), expires_at=1e9, generation=0)

    bench.maintenance.open_into = hang_at_first
    calls = [bench.call(60.0) for _ in range(3)]
    await bench.clock.run(12.0)
    assert began == [0.0, 5.0]
    (attempt,) = [task for task in bench.circuit_breaker._attempts if task is not None][:1]
    attempt.cancel()
    await bench.clock.run(6.0)
    assert [call.exception() for call in calls] == [None] * 3
    assert not bench.circuit_breaker._attempts
    assert bench.resources.opening == 0


async def test_a_connection_that_dies_as_soon_as_it_is_opened_is_not_opened_without_end():
    """Success is what serves."""
    bench = Bench(max_size=1)
    call = bench.call(2.0)
    for _ in range(400):
        await bench.clock.run(0.005)
        for entry in bench.resources:
            if entry.resource is not None:
                entry.resource.broken = True
        for entry in bench.resources.withdraw(lambda _: True):
            bench.maintenance.discard(entry, None)
        if not call.done() and not bench.resources.waiting:
            call.cancel()
        if call.done():
            call = bench.call(2.0)
    assert len(bench.maintenance.began) <= 10
    call.cancel()


async def test_a_jitter_that_raises_ends_the_waiting():
    """Nobody waits for a prober that is no more."""

    def broken(value):
        raise RuntimeError("bug")

    bench = Bench(*away(3), reconnect=BackoffPolicy(jitter=broken, max_attempts=None))
    call = bench.call()
    await bench.clock.run(1.0)
    assert isinstance(call.exception(), RuntimeError)


async def test_whoever_waited_before_the_outage_began_is_bounded_as_well():
    """And a busy pool is no outage: the policy's longest absence says nothing of it."""
    policy = BackoffPolicy(base=0.25, jitter=exactly, max_value=0.25, max_attempts=None, max_elapsed=1.0)
    bench = Bench(None, *away(100), max_size=1, reconnect=policy)
    holder = await bench.acquirer.acquire(None)
    calls = [bench.call(None) for _ in range(3)]
    await bench.clock.run(5.0)
    assert not any(call.done() for call in calls)
    bench.maintenance.discard(holder, None)
    await bench.clock.run(3.0)
    assert {type(call.exception()) for call in calls} == {ConnectionRefusedError}


async def test_no_caller_sees_what_another_one_was_handling():
    """An error that is raised while another one is handled belongs to that caller from then on."""
    bench = Bench(*away(20))

    async def inside_a_handler():
        try:
            raise KeyError("the first caller's own")
        except KeyError:
            await bench.call(1.0)

    first = asyncio.ensure_future(inside_a_handler())
    second = bench.call(1.2)
    await bench.clock.run(1.0)
    assert isinstance(first.exception(), ConnectionRefusedError)
    await bench.clock.run(0.3)
    assert isinstance(second.exception(), ConnectionRefusedError)
    assert second.exception().__context__ is None


@pytest.mark.parametrize("turns", range(12))
async def test_a_caller_cancelled_at_any_point_leaves_nothing_behind(turns):
    """Waiting, being served, opening: neither an entry nor the neighbour is lost."""
    bench = Bench(refused(), None, refused(), takes=0.0, max_size=2)
    victim, neighbour = bench.call(holds=0.01), bench.call(holds=0.01)
    for _ in range(turns):
        await asyncio.sleep(0)
        if turns % 2:
            bench.clock.advance(0.2)
    victim.cancel()
    await bench.clock.run(10.0)
    assert neighbour.exception() is None
    assert bench.resources.opening == 0
    assert bench.resources.idle == bench.resources.size
    assert bench.resources.waiting == 0


async def test_an_error_that_cannot_be_copied_is_shared():
    """An application's own, raised by its `init`."""

    class Uncopyable(ConnectionResetError):
        def __init__(self, one, two):
            super().__init__(one, two)

        def __reduce__(self):
            raise TypeError("no")

    error = Uncopyable(104, "reset")
    bench = Bench(*[error] * 50)
    calls = [bench.call(1.0), bench.call(1.0)]
    await bench.clock.run(1.0)
    assert [call.exception() for call in calls] == [error, error]


async def test_a_connection_given_up_as_soon_as_it_was_handed_over_is_given_up_once():
    """Its entry is in one pair of hands at a time, also when the first caller has no use for it."""
    bench = Bench(max_size=1)

    async def refuse():
        entry = await bench.acquirer.acquire(None)
        bench.maintenance.discard(entry, None)

    first = asyncio.ensure_future(refuse())
    second = bench.call(holds=1.0)
    await bench.clock.run(0.5)
    assert first.done()
    assert (bench.resources.size, bench.resources.idle) == (1, 0)
    await bench.clock.run(1.0)
    assert second.exception() is None
    assert (bench.resources.size, bench.resources.idle) == (1, 1)


def no_room() -> Exception:
    return asyncpg.TooManyConnectionsError("too many connections for role")


@pytest.mark.parametrize(
    "how",
    [{}, {"reconnect": BackoffPolicy(base=0.25, jitter=exactly, max_attempts=2)}, {"fail_fast": True}],
    ids=["patient", "few attempts", "fail_fast"],
)
async def test_no_room_for_one_more_is_no_outage_while_a_connection_works(how):
    """Everybody is served by what is open, nobody is told that the server is away, and one task asks for more room."""
    hastily = how.pop("fail_fast", False)
    bench = Bench(None, *(no_room() for _ in range(500)), **how)
    await bench.call()
    calls = [bench.call(fail_fast=hastily, holds=0.5) for _ in range(20)]
    await bench.clock.run(10.5)
    assert [call.exception() for call in calls] == [None] * 20
    assert (bench.told(CircuitOpened), bench.circuit_breaker.is_open) == ([], False)
    assert bench.maintenance.most_at_once == 1
    assert len(bench.maintenance.began) <= 45  # every quarter of a second


async def test_when_there_is_room_again_it_is_used():
    """The prober finds out, and those who wait open as many as they need."""
    bench = Bench(None, *(no_room() for _ in range(4)))
    await bench.call()
    calls = [bench.call(holds=100.0) for _ in range(6)]
    await bench.clock.run(20.0)
    assert (bench.resources.size, bench.resources.waiting) == (6, 0)
    for call in calls:
        call.cancel()


async def test_no_room_and_no_connection_that_works_is_waited_for():
    """Then it is as if the server were away: who fails fast does so, others wait."""
    bench = Bench(*(no_room() for _ in range(3)))
    patient, hasty = bench.call(), bench.call(fail_fast=True)
    await bench.clock.run(0.1)
    assert isinstance(hasty.exception(), asyncpg.TooManyConnectionsError)
    await bench.clock.run(5.0)
    assert patient.exception() is None
    assert len(bench.told(CircuitOpened)) == len(bench.told(CircuitClosed)) == 1


async def test_a_connection_that_was_lost_is_replaced_at_once_where_there_was_room_for_it():
    """Only more than there were must wait for the prober."""
    bench = Bench(None, no_room(), None, *(no_room() for _ in range(50)))
    await bench.call()
    calls = [bench.call(holds=0.1) for _ in range(2)]
    await bench.clock.run(1.0)
    began = len(bench.maintenance.began)
    for entry in bench.resources:
        entry.resource.broken = True
    again = bench.call()
    await bench.clock.run(0.0)
    assert again.exception() is None
    assert len(bench.maintenance.began) == began + 1
    assert [call.exception() for call in calls] == [None] * 2


async def test_a_deadline_that_ends_for_want_of_room_says_so():
    """And what the server said is behind it."""
    bench = Bench(None, *(no_room() for _ in range(50)), max_size=3)
    await bench.call()
    first, second = bench.call(holds=100.0), bench.call(2.0)
    await bench.clock.run(2.5)
    with pytest.raises(AcquireTimeoutError, match="all 1 that are open are in use, and the server has no room"):
        second.result()
    assert isinstance(second.exception().__cause__, asyncpg.TooManyConnectionsError)
    first.cancel()


def wrong_password() -> Exception:
    return asyncpg.InvalidPasswordError("password authentication failed")


@pytest.mark.parametrize("fail_fast", [False, True])
async def test_a_final_refusal_of_one_more_connection_fails_no_caller_while_one_works(caplog, fail_fast):
    """The open connection serves all, one task asks again at the policy's pace, and the log has one line."""
    bench = Bench(None, *(wrong_password() for _ in range(500)))
    await bench.call()
    calls = [bench.call(fail_fast=fail_fast, holds=0.5) for _ in range(20)]
    await bench.clock.run(10.5)
    assert [call.exception() for call in calls] == [None] * 20
    assert (bench.told(CircuitOpened), bench.circuit_breaker.is_open) == ([], False)
    assert bench.maintenance.most_at_once == 1
    assert len(bench.maintenance.began) <= 14  # after 0.25, 0.5 and then every 1 s
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the database server refuses another connection")
    assert "password authentication failed" in line


async def test_after_a_final_refusal_an_idle_pool_asks_no_more():
    """Not for `min_size` either: an account would be locked."""
    bench = Bench(None, *(wrong_password() for _ in range(500)), min_size=3)
    await bench.call()
    await bench.clock.run(100.0)
    assert len(bench.maintenance.began) == 2
    assert (await bench.call(), bench.resources.idle) == (100.0, 1)


async def test_when_another_connection_is_accepted_again_callers_open_as_many_as_they_need(caplog):
    """The task that asks finds out, and the log says it."""
    bench = Bench(None, *(wrong_password() for _ in range(4)))
    await bench.call()
    calls = [bench.call(holds=100.0) for _ in range(6)]
    await bench.clock.run(20.0)
    assert (bench.resources.size, bench.resources.waiting) == (6, 0)
    assert [record.getMessage() for record in caplog.records][1:] == [
        "the database server accepts new connections again"
    ]
    for call in calls:
        call.cancel()


async def test_a_deadline_that_ends_because_another_connection_is_refused_says_so():
    """The refusal is the cause."""
    bench = Bench(None, *(wrong_password() for _ in range(50)), max_size=3)
    await bench.call()
    first, second = bench.call(holds=100.0), bench.call(2.0)
    await bench.clock.run(2.5)
    with pytest.raises(AcquireTimeoutError, match="all 1 that are open are in use, and the server refuses another one"):
        second.result()
    assert isinstance(second.exception().__cause__, asyncpg.InvalidPasswordError)
    first.cancel()


async def test_a_final_refusal_is_final_at_once_when_the_last_connection_is_gone():
    """Callers who waited for it fail with the refusal after one more attempt; so does each who comes."""
    bench = Bench(None, *(wrong_password() for _ in range(50)))
    await bench.call()
    holder = await bench.acquirer.acquire(None)
    waiting = [bench.call() for _ in range(3)]
    await bench.clock.run(5.0)
    assert not any(call.done() for call in waiting)
    holder.resource.broken = True
    bench.maintenance.discard(holder, None)
    await bench.clock.run(1.0)
    assert [type(call.exception()) for call in waiting] == [asyncpg.InvalidPasswordError] * 3
    late = bench.call()
    await bench.clock.run(0.0)
    assert isinstance(late.exception(), asyncpg.InvalidPasswordError)


async def test_while_the_pool_is_being_opened_a_final_refusal_is_final():
    """Its first connections serve no callers before all are there."""
    bench = Bench(None, wrong_password())
    bench.circuit_breaker.is_opening = True
    first = await bench.acquirer.acquire(None)
    second = bench.call()
    await bench.clock.run(0.0)
    assert isinstance(second.exception(), asyncpg.InvalidPasswordError)
    bench.maintenance.release(first)


async def test_an_idle_pool_that_is_refused_for_good_asks_once(caplog):
    """`min_size` is no reason to lock an account: it is asked again when a caller wants something. The log says it."""
    wrong = asyncpg.InvalidPasswordError("password authentication failed")
    bench = Bench(*([wrong] * 1000), min_size=2)
    bench.circuit_breaker.maintain()
    await bench.clock.run(1000.0)
    assert len(bench.maintenance.began) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "password authentication failed" in caplog.text
    for number in range(2, 6):
        call = bench.call()
        await bench.clock.run(100.0)
        assert isinstance(call.exception(), asyncpg.InvalidPasswordError)
        assert len(bench.maintenance.began) == number
    assert len(caplog.records) == 1


async def test_an_idle_pool_tries_a_server_that_is_away_at_the_policys_pace():
    """What waiting cures is tried again for `min_size`, at the distances of `reconnect`."""
    bench = Bench(*away(5), min_size=1)
    bench.circuit_breaker.maintain()
    await bench.clock.run(20.0)
    assert bench.maintenance.began == [0.0, 0.25, 0.75, 1.75, 2.75, 3.75]
    assert bench.resources.idle == 1


async def test_the_log_has_one_line_when_the_server_is_away_and_one_when_it_is_back(caplog):
    """Without any observer, and however many attempts and callers there are."""
    bench = Bench(*away(8))
    calls = [bench.call() for _ in range(10)]
    await bench.clock.run(20.0)
    assert [call.exception() for call in calls] == [None] * 10
    assert [(record.name, record.levelname) for record in caplog.records] == [("resilient_pool", "WARNING")] * 2
    away_line, back_line = (record.getMessage() for record in caplog.records)
    assert away_line.startswith("the database server is away")
    assert "ConnectionRefusedError" in away_line
    assert back_line.startswith("the database server is back")


# What a service says of the time


def blocked() -> Exception:
    fields = {"S": "FATAL", "V": "FATAL", "C": "XX000"}
    return asyncpg.PostgresError.new(
        fields
        | {"M": "(ECIRCUITBREAKER) too many failed attempts to connect to the database, new connections are blocked"}
    )


def in_doubt() -> Exception:
    fields = {"S": "ERROR", "C": "XX000"}
    return asyncpg.PostgresError.new(
        fields | {"M": "Control plane request failed: endpoint is temporarily unavailable. Check your quotas"}
    )


async def test_a_service_that_lets_no_client_in_for_some_time_is_left_alone_for_so_long(caplog):
    """One prober waits, and so does every caller that can; then all are served."""
    bench = Bench(blocked(), max_size=5)
    calls = [bench.call() for _ in range(20)]
    await bench.clock.run(29.9)
    assert bench.maintenance.began == [0.0]
    assert [(event.attempt, event.delay) for event in bench.told(RetryScheduled)] == [(1, 30.0)]
    await bench.clock.run(0.2)
    assert [call.exception() for call in calls] == [None] * 20
    assert bench.maintenance.began[1] == 30.0
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [
        "no new connection is let in for 30 s",
        "the database server is back",
    ]


async def test_a_caller_whose_time_is_up_sooner_is_told_at_once_when_to_call_again():
    """With one error: how long that is, and what the service said behind it. So is one who comes later."""
    bench = Bench(blocked())
    patient, hasty = bench.call(45.0), bench.call(20.0)
    await bench.clock.run(0.1)
    assert not patient.done()
    with pytest.raises(AcquireTimeoutError, match=r"before 30\.0 s from now") as told:
        hasty.result()
    assert told.value.retry_after == 30.0
    assert told.value.__cause__.args[0].startswith("(ECIRCUITBREAKER) too many failed attempts")
    await bench.clock.run(10.0)
    late = bench.call(15.0)
    await bench.clock.run(0.0)
    with pytest.raises(
        AcquireTimeoutError, match=r"before 19\.9 s from now, .* call again after that, or raise deadline"
    ):
        late.result()
    await bench.clock.run(20.0)
    assert (patient.exception(), bench.maintenance.began[:2]) == (None, [0.0, 30.0])


async def test_who_does_not_wait_for_an_absent_server_is_told_as_well():
    """With the service's own error, as ever, and a note of when another attempt makes sense."""
    bench = Bench(blocked())
    patient, hasty = bench.call(), bench.call(fail_fast=True)
    await bench.clock.run(0.0)
    assert isinstance(hasty.exception(), asyncpg.InternalServerError)
    assert (
        "resilient_pool: another attempt makes sense 30 s after the last one, not before" in hasty.exception().__notes__
    )
    await bench.clock.run(31.0)
    assert patient.exception() is None


async def test_callers_share_what_is_open_while_no_more_clients_are_let_in(caplog):
    """The service lets no new one in, and serves those that it has; also those callers wait whose time is short."""
    bench = Bench(None, blocked(), max_size=5)
    await bench.call()
    calls = [bench.call(10.0, holds=0.5) for _ in range(10)]
    await bench.clock.run(6.0)
    assert [call.exception() for call in calls] == [None] * 10
    assert len(bench.maintenance.began) == 2
    assert (bench.told(CircuitOpened), bench.circuit_breaker.is_open) == ([], False)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "no new connection is let in for 30 s: callers share those that are open (InternalServerError: "
    )


async def test_a_connection_that_is_lost_meanwhile_is_not_replaced_before_that_time():
    """Who can wait does; who cannot is told."""
    bench = Bench(None, blocked(), max_size=5)
    await bench.call()
    first, second = bench.call(holds=0.5), bench.call(holds=0.5)
    await bench.clock.run(5.0)
    assert (first.exception(), second.exception()) == (None, None)
    for entry in bench.resources:
        entry.resource.broken = True
    patient = bench.call()
    await bench.clock.run(1.0)
    hasty = bench.call(10.0)
    await bench.clock.run(0.0)
    with pytest.raises(AcquireTimeoutError, match=r"before 24\.0 s from now") as told:
        hasty.result()
    assert isinstance(told.value.__cause__, asyncpg.InternalServerError)
    await bench.clock.run(23.9)
    assert (patient.done(), len(bench.maintenance.began)) == (False, 2)
    await bench.clock.run(0.2)
    assert patient.exception() is None


async def test_one_of_several_that_is_lost_meanwhile_is_not_replaced_before_that_time_either():
    """The others serve its callers."""
    bench = Bench(None, None, blocked(), max_size=5)
    await asyncio.gather(*(bench.call() for _ in range(2)), bench.clock.run(1.0))
    calls = [bench.call(holds=0.5) for _ in range(3)]
    await bench.clock.run(5.0)
    assert (len(bench.maintenance.began), len(bench.maintenance.connections())) == (3, 2)
    next(iter(bench.resources)).resource.broken = True
    calls += [bench.call(holds=0.5) for _ in range(3)]
    await bench.clock.run(5.0)
    assert [call.exception() for call in calls] == [None] * 6
    assert len(bench.maintenance.began) == 3


async def test_another_server_is_asked_at_once_also_by_a_pool_that_was_blocked():
    """What was said was said by the one before."""
    bench = Bench(blocked())
    call = bench.call()
    await bench.clock.run(0.0)
    bench.circuit_breaker.restart()
    await bench.clock.run(0.0)
    assert call.exception() is None


async def test_a_policy_that_waits_for_less_than_the_service_asks_for_waits_for_nothing():
    """The longest absence counts like a deadline."""
    reconnect = BackoffPolicy(base=0.25, max_value=1.0, jitter=exactly, max_attempts=None, max_elapsed=10.0)
    bench = Bench(blocked(), reconnect=reconnect)
    call = bench.call(None)
    await bench.clock.run(0.0)
    assert isinstance(call.exception(), AcquireTimeoutError)


async def test_what_may_pass_is_waited_for_and_then_believed():
    """A maintenance or a quota, in the same words: for 15 s, with a last attempt at their end, and one clear error."""
    bench = Bench(*(in_doubt() for _ in range(100)))
    calls = [bench.call() for _ in range(20)]
    await bench.clock.run(14.9)
    assert not any(call.done() for call in calls)
    await bench.clock.run(0.1)
    assert {type(call.exception()) for call in calls} == {asyncpg.InternalServerError}
    assert bench.maintenance.began[-1] == 15.0
    assert calls[0].exception().__notes__ == [
        "resilient_pool: gave up after 18 attempts to connect in 15.00 s; the last fault was permanent",
        "resilient_pool: it was believed after 15 s: something that passes is said in the same words",
    ]
    again = bench.call()
    await bench.clock.run(0.0)
    assert isinstance(again.exception(), asyncpg.InternalServerError)  # and at once from then on


async def test_what_passes_within_that_time_fails_no_caller():
    """It was a maintenance; the next time it is waited for anew."""
    bench = Bench(*(in_doubt() for _ in range(10)), None, *(in_doubt() for _ in range(10)))
    call = bench.call()
    await bench.clock.run(12.0)
    assert call.exception() is None
    for entry in bench.resources:
        entry.resource.broken = True
    again = bench.call()
    await bench.clock.run(12.0)
    assert again.exception() is None
