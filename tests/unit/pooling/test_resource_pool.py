"""ResourcePool: last in first out for the idle, first come first served for those who wait, and nobody left behind."""

from __future__ import annotations

import asyncio

import pytest

from resilient_pool.clock import SystemClock
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool
from resilient_pool.testing import ScriptedClock


@pytest.fixture
def clock() -> ScriptedClock:
    return ScriptedClock()


def filled(resources: ResourcePool[str], name: str, idle_since: float = 0.0) -> PoolEntry[str]:
    entry = resources.reserve()
    assert entry is not None
    entry.fill(name, now=idle_since, expires_at=1e9, generation=0)
    return entry


async def queued(resources, seconds, *, fail_fast=False):
    """What a caller does who finds no entry."""
    ticket, entry = resources.enqueue(seconds, resources._limits._clock.monotonic(), fail_fast=fail_fast), None
    try:
        entry = await ticket
    finally:
        if entry is None:
            resources.give_up(ticket)
    return entry


async def start(*coroutines):
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def timers_set(clock):
    # The clock numbers its timers.
    return next(clock._order)


async def test_the_slot_used_last_is_taken_first(clock):
    """An idle stack keeps the busy connections busy, so that the others can age and go."""
    resources = ResourcePool[str](3, clock)
    a, b = filled(resources, "a"), filled(resources, "b")
    resources.put(a)
    resources.put(b)
    assert [resources.take().resource, resources.take().resource] == ["b", "a"]


async def test_a_slot_is_made_when_none_is_idle_and_there_is_room(clock):
    """Whoever gets an empty entry has the right to open a connection."""
    resources = ResourcePool[str](1, clock)
    assert resources.take().resource is None
    assert resources.take() is None
    assert repr(resources) == "<ResourcePool size=1 idle=0 waiting=0 max_size=1>"


async def test_waiters_are_served_in_the_order_in_which_they_came(clock):
    """An entry that comes back goes to whoever waits longest, and is never idle in between."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    served = []

    async def wait(name):
        got = await queued(resources, None)
        served.append(name)
        resources.put(got)

    tasks = await start(wait(1), wait(2), wait(3))
    assert resources.waiting == 3
    resources.put(entry)
    assert resources.idle == 0
    await asyncio.gather(*tasks)
    assert served == [1, 2, 3]
    assert resources.idle == 1


async def test_a_waiter_cancelled_while_it_waits_leaves_no_trace(clock):
    """The next in line is served as if the cancelled one had never come."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    first, second = await start(queued(resources, None), queued(resources, None))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    resources.put(entry)
    assert await second is entry
    assert resources.waiting == 0


async def test_a_waiter_cancelled_as_it_is_served_passes_the_slot_on(clock):
    """An entry handed over in the same turn of the loop as a cancellation is not lost."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    first, second = await start(queued(resources, None), queued(resources, None))
    resources.put(entry)
    first.cancel()
    assert await asyncio.wait_for(second, 1) is entry
    assert first.cancelled() or first.exception() is None


async def test_the_last_waiter_cancelled_as_it_is_served_returns_the_slot(clock):
    """With nobody else in line the entry is idle again."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    (only,) = await start(queued(resources, None))
    resources.put(entry)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    assert resources.idle == 1


async def test_waiting_ends_at_its_time_limit_with_an_error_that_says_what_to_do(clock):
    """The error names the figures and the arguments that would help."""
    resources = ResourcePool[str](1, clock)
    filled(resources, "a")
    (waiter,) = await start(queued(resources, 2.5))
    clock.advance(2.4)
    assert not waiter.done()
    clock.advance(0.2)
    with pytest.raises(AcquireTimeoutError, match=r"within 2\.5 s: all 1 of max_size=1 .* raise max_size or deadline"):
        await waiter
    assert resources.waiting == 0


async def test_all_who_wait_share_one_timer(clock):
    """A timer for each would cost more than all the rest of waiting; the one that was set ends by itself."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    waiters = await start(*(queued(resources, 60.0) for _ in range(100)))
    assert clock.pending == [60.0]
    for waiter in waiters:
        resources.put(entry)
        await waiter
    clock.advance(60.0)
    assert clock.pending == []


async def test_each_who_waits_is_told_soon_after_the_own_time_is_up(clock):
    """The timer comes again for those who are left, and sooner for those who came later but wait for less."""
    resources = ResourcePool[str](1, clock)
    filled(resources, "a")
    limits = [60.0, 2.0, 0.01, 2.03, 2.0001, 0.5, 30.0, 0.0, -1.0, 59.99]
    waiters = await start(*(queued(resources, limit) for limit in limits))
    ended = {}
    while clock.pending:
        await clock.run(clock.pending[0])
        for limit, waiter in zip(limits, waiters, strict=True):
            if waiter.done():
                assert isinstance(waiter.exception(), AcquireTimeoutError)
                ended.setdefault(limit, clock.monotonic())
    assert sorted(ended) == sorted(limits)
    late = {limit: at - max(limit, 0.0) for limit, at in ended.items()}
    assert {limit: by for limit, by in late.items() if not -0.002 < by < min(0.05, max(limit, 0) * 0.02) + 0.003} == {}
    assert resources.waiting == 0


async def test_limits_that_end_close_together_are_noticed_together(clock):
    """A crowd that came one after the other does not set the timer once for each."""
    resources = ResourcePool[str](1, clock)
    filled(resources, "a")
    waiters = await start(*(queued(resources, 60.0 + number / 1000) for number in range(1000)))
    set_before = timers_set(clock)
    await clock.run(62.0)
    assert all(isinstance(waiter.exception(), AcquireTimeoutError) for waiter in waiters)
    assert timers_set(clock) - set_before < 40


async def test_a_waiter_whose_time_is_up_as_it_is_cancelled_takes_no_slot_along(clock):
    """The cancelled one, its neighbour whose time is up and the next in line each end as they must."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    cancelled, late, third = await start(queued(resources, 1.0), queued(resources, 1.0), queued(resources, 9.0))
    cancelled.cancel()
    clock.advance(1.0)
    resources.put(entry)
    assert await asyncio.wait_for(third, 1) is entry
    await asyncio.gather(cancelled, late, return_exceptions=True)
    assert cancelled.cancelled()
    assert isinstance(late.exception(), AcquireTimeoutError)
    assert resources.waiting == 0


async def test_a_waiter_cancelled_as_its_time_is_up_leaves_no_trace(clock):
    """An error set in the same turn as the cancellation is no entry, and is not passed on."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    waiter, second = await start(queued(resources, 1.0), queued(resources, None))
    clock.advance(1.0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert waiter.cancelled()
    resources.put(entry)
    assert await second is entry


async def test_a_waiting_coroutine_that_is_closed_gives_its_slot_back(clock):
    """An event loop that ends closes what is left, without a cancellation."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    served, unserved = queued(resources, 1.0), queued(resources, 1.0)
    served.send(None)
    unserved.send(None)
    resources.put(entry)
    unserved.close()
    served.close()
    assert (resources.waiting, resources.idle) == (0, 1)


async def test_a_short_limit_is_kept_on_real_clocks():
    """Behind somebody who waits for a minute, fifty milliseconds are fifty milliseconds."""
    resources = ResourcePool[str](1, SystemClock())
    filled(resources, "a")
    (patient,) = await start(queued(resources, 60.0))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(AcquireTimeoutError):
        await asyncio.wait_for(queued(resources, 0.05), 5)
    assert loop.time() - began > 0.04
    patient.cancel()


async def test_an_empty_slot_goes_to_a_waiter_who_may_then_open(clock):
    """A connection that was lost leaves its place to the next in line."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    (waiter,) = await start(queued(resources, None))
    entry.empty()
    resources.put(entry)
    assert (await waiter).resource is None


async def test_an_empty_slot_nobody_waits_for_is_gone(clock):
    """Only places with a connection, or with somebody opening one, count."""
    resources = ResourcePool[str](1, clock)
    entry = filled(resources, "a")
    entry.empty()
    resources.put(entry)
    assert resources.size == 0


async def test_withdrawing_takes_the_longest_unused_and_keeps_the_minimum(clock):
    """Lifetimes take from the bottom of the stack."""
    resources = ResourcePool[str](4, clock)
    for name, since in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)):
        resources.put(filled(resources, name, since))
    assert [entry.resource for entry in resources.withdraw(lambda entry: entry.idle_since < 4, keep=2)] == ["a", "b"]
    assert resources.idle == 2
    assert resources.oldest_idle_since == 3.0


async def test_everybody_who_waits_can_be_dismissed(clock):
    """Each gets an error of its own: shared ones would collect each other's tracebacks."""
    resources = ResourcePool[str](1, clock)
    filled(resources, "a")
    waiters = await start(queued(resources, None), queued(resources, 9.0))
    resources.fail_waiters(lambda: RuntimeError("closing"))
    assert clock.pending == []
    errors = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(error) for error in errors] == ["closing", "closing"]
    assert errors[0] is not errors[1]


async def test_draining_ends_when_the_last_slot_is_gone(clock):
    """Closing a pool waits for what is in use."""
    resources = ResourcePool[str](2, clock)
    a, b = filled(resources, "a"), filled(resources, "b")
    (drained,) = await start(resources.drained())
    for entry in (a, b):
        assert not drained.done()
        entry.empty()
        resources.put(entry)
    await asyncio.wait_for(drained, 1)


async def test_a_hundred_waiters_of_whom_half_give_up_all_end(clock):
    """No wake-up is lost, whatever the order of cancellations and returns."""
    resources = ResourcePool[str](3, clock)
    held = [filled(resources, str(number)) for number in range(3)]

    async def use():
        entry = resources.take() or await queued(resources, None)
        await asyncio.sleep(0)
        resources.put(entry)

    tasks = await start(*(use() for _ in range(100)))
    for task in tasks[::2]:
        task.cancel()
    for entry in held:
        resources.put(entry)
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert (resources.size, resources.idle, resources.waiting) == (3, 3, 0)
