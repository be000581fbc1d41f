"""Slots: last in first out for the idle, first come first served for those who wait, and nobody left behind."""

from __future__ import annotations

import asyncio

import pytest

from resilient_pool.clock import SystemClock
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.pooling.resource_pool import Slot, Slots
from resilient_pool.testing import ScriptedClock


@pytest.fixture
def clock() -> ScriptedClock:
    return ScriptedClock()


def filled(slots: Slots[str], name: str, idle_since: float = 0.0) -> Slot[str]:
    slot = slots.reserve()
    assert slot is not None
    slot.fill(name, now=idle_since, expires_at=1e9, generation=0)
    return slot


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
    slots = Slots[str](3, clock)
    a, b = filled(slots, "a"), filled(slots, "b")
    slots.put(a)
    slots.put(b)
    assert [slots.take().resource, slots.take().resource] == ["b", "a"]


async def test_a_slot_is_made_when_none_is_idle_and_there_is_room(clock):
    """Whoever gets an empty slot has the right to open a connection."""
    slots = Slots[str](1, clock)
    assert slots.take().resource is None
    assert slots.take() is None
    assert repr(slots) == "<Slots size=1 idle=0 waiting=0 max_size=1>"


async def test_waiters_are_served_in_the_order_in_which_they_came(clock):
    """A slot that comes back goes to whoever waits longest, and is never idle in between."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    served = []

    async def wait(name):
        got = await slots.wait(None)
        served.append(name)
        slots.put(got)

    tasks = await start(wait(1), wait(2), wait(3))
    assert slots.waiting == 3
    slots.put(slot)
    assert slots.idle == 0
    await asyncio.gather(*tasks)
    assert served == [1, 2, 3]
    assert slots.idle == 1


async def test_a_waiter_cancelled_while_it_waits_leaves_no_trace(clock):
    """The next in line is served as if the cancelled one had never come."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    first, second = await start(slots.wait(None), slots.wait(None))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    slots.put(slot)
    assert await second is slot
    assert slots.waiting == 0


async def test_a_waiter_cancelled_as_it_is_served_passes_the_slot_on(clock):
    """A slot handed over in the same turn of the loop as a cancellation is not lost."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    first, second = await start(slots.wait(None), slots.wait(None))
    slots.put(slot)
    first.cancel()
    assert await asyncio.wait_for(second, 1) is slot
    assert first.cancelled() or first.exception() is None


async def test_the_last_waiter_cancelled_as_it_is_served_returns_the_slot(clock):
    """With nobody else in line the slot is idle again."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    (only,) = await start(slots.wait(None))
    slots.put(slot)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    assert slots.idle == 1


async def test_waiting_ends_at_its_time_limit_with_an_error_that_says_what_to_do(clock):
    """The error names the figures and the arguments that would help."""
    slots = Slots[str](1, clock)
    filled(slots, "a")
    (waiter,) = await start(slots.wait(2.5))
    clock.advance(2.4)
    assert not waiter.done()
    clock.advance(0.2)
    with pytest.raises(AcquireTimeoutError, match=r"within 2\.5 s: all 1 of max_size=1 .* raise max_size or deadline"):
        await waiter
    assert slots.waiting == 0


async def test_all_who_wait_share_one_timer(clock):
    """A timer for each would cost more than all the rest of waiting; the one that was set ends by itself."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    waiters = await start(*(slots.wait(60.0) for _ in range(100)))
    assert clock.pending == [60.0]
    for waiter in waiters:
        slots.put(slot)
        await waiter
    clock.advance(60.0)
    assert clock.pending == []


async def test_each_who_waits_is_told_soon_after_the_own_time_is_up(clock):
    """The timer comes again for those who are left, and sooner for those who came later but wait for less."""
    slots = Slots[str](1, clock)
    filled(slots, "a")
    limits = [60.0, 2.0, 0.01, 2.03, 2.0001, 0.5, 30.0, 0.0, -1.0, 59.99]
    waiters = await start(*(slots.wait(limit) for limit in limits))
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
    assert slots.waiting == 0


async def test_limits_that_end_close_together_are_noticed_together(clock):
    """A crowd that came one after the other does not set the timer once for each."""
    slots = Slots[str](1, clock)
    filled(slots, "a")
    waiters = await start(*(slots.wait(60.0 + number / 1000) for number in range(1000)))
    set_before = timers_set(clock)
    await clock.run(62.0)
    assert all(isinstance(waiter.exception(), AcquireTimeoutError) for waiter in waiters)
    assert timers_set(clock) - set_before < 40


async def test_a_waiter_whose_time_is_up_as_it_is_cancelled_takes_no_slot_along(clock):
    """The cancelled one, its neighbour whose time is up and the next in line each end as they must."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    cancelled, late, third = await start(slots.wait(1.0), slots.wait(1.0), slots.wait(9.0))
    cancelled.cancel()
    clock.advance(1.0)
    slots.put(slot)
    assert await asyncio.wait_for(third, 1) is slot
    await asyncio.gather(cancelled, late, return_exceptions=True)
    assert cancelled.cancelled()
    assert isinstance(late.exception(), AcquireTimeoutError)
    assert slots.waiting == 0


async def test_a_waiter_cancelled_as_its_time_is_up_leaves_no_trace(clock):
    """An error set in the same turn as the cancellation is no slot, and is not passed on."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    waiter, second = await start(slots.wait(1.0), slots.wait(None))
    clock.advance(1.0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    assert waiter.cancelled()
    slots.put(slot)
    assert await second is slot


async def test_a_waiting_coroutine_that_is_closed_gives_its_slot_back(clock):
    """An event loop that ends closes what is left, without a cancellation."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    served, unserved = slots.wait(1.0), slots.wait(1.0)
    served.send(None)
    unserved.send(None)
    slots.put(slot)
    unserved.close()
    served.close()
    assert (slots.waiting, slots.idle) == (0, 1)


async def test_a_short_limit_is_kept_on_real_clocks():
    """Behind somebody who waits for a minute, fifty milliseconds are fifty milliseconds."""
    slots = Slots[str](1, SystemClock())
    filled(slots, "a")
    (patient,) = await start(slots.wait(60.0))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(AcquireTimeoutError):
        await asyncio.wait_for(slots.wait(0.05), 5)
    assert loop.time() - began > 0.04
    patient.cancel()


async def test_an_empty_slot_goes_to_a_waiter_who_may_then_open(clock):
    """A connection that was lost leaves its place to the next in line."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    (waiter,) = await start(slots.wait(None))
    slot.empty()
    slots.put(slot)
    assert (await waiter).resource is None


async def test_an_empty_slot_nobody_waits_for_is_gone(clock):
    """Only places with a connection, or with somebody opening one, count."""
    slots = Slots[str](1, clock)
    slot = filled(slots, "a")
    slot.empty()
    slots.put(slot)
    assert slots.size == 0


async def test_withdrawing_takes_the_longest_unused_and_keeps_the_minimum(clock):
    """Lifetimes take from the bottom of the stack."""
    slots = Slots[str](4, clock)
    for name, since in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)):
        slots.put(filled(slots, name, since))
    assert [slot.resource for slot in slots.withdraw(lambda slot: slot.idle_since < 4, keep=2)] == ["a", "b"]
    assert slots.idle == 2
    assert slots.oldest_idle_since == 3.0


async def test_everybody_who_waits_can_be_dismissed(clock):
    """Each gets an error of its own: shared ones would collect each other's tracebacks."""
    slots = Slots[str](1, clock)
    filled(slots, "a")
    waiters = await start(slots.wait(None), slots.wait(9.0))
    slots.dismiss_waiters(lambda: RuntimeError("closing"))
    assert clock.pending == []
    errors = await asyncio.gather(*waiters, return_exceptions=True)
    assert [str(error) for error in errors] == ["closing", "closing"]
    assert errors[0] is not errors[1]


async def test_draining_ends_when_the_last_slot_is_gone(clock):
    """Closing a pool waits for what is in use."""
    slots = Slots[str](2, clock)
    a, b = filled(slots, "a"), filled(slots, "b")
    (drained,) = await start(slots.drained())
    for slot in (a, b):
        assert not drained.done()
        slot.empty()
        slots.put(slot)
    await asyncio.wait_for(drained, 1)


async def test_a_hundred_waiters_of_whom_half_give_up_all_end(clock):
    """No wake-up is lost, whatever the order of cancellations and returns."""
    slots = Slots[str](3, clock)
    held = [filled(slots, str(number)) for number in range(3)]

    async def use():
        slot = slots.take() or await slots.wait(None)
        await asyncio.sleep(0)
        slots.put(slot)

    tasks = await start(*(use() for _ in range(100)))
    for task in tasks[::2]:
        task.cancel()
    for slot in held:
        slots.put(slot)
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert (slots.size, slots.idle, slots.waiting) == (3, 3, 0)
