"""The clock of the unit tests, itself tested without any real time passing."""

from __future__ import annotations

import asyncio

import pytest

from resilient_pool.clock import Clock
from resilient_pool.testing import ScriptedClock


async def sleeper(clock: Clock, log: list[float], *seconds: float) -> None:
    for each in seconds:
        await clock.sleep(each)
        log.append(clock.monotonic())


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_an_automatic_sleep_moves_the_time_and_is_recorded():
    """Every sleep is over at once and leaves its length behind, in order."""
    clock = ScriptedClock(start=10.0)
    for seconds in (1.5, 0.0, 2.0):
        await clock.sleep(seconds)
    assert clock.sleeps == [1.5, 0.0, 2.0]
    assert (clock.now(), clock.monotonic()) == (13.5, 13.5)


async def test_an_automatic_sleep_fires_the_timers_on_its_way():
    """What falls due during the sleep has happened when it is over."""
    clock = ScriptedClock()
    fired: list[float] = []
    clock.call_later(1.0, lambda: fired.append(clock.now()))
    clock.call_later(3.0, lambda: fired.append(clock.now()))
    await clock.sleep(2.0)
    assert fired == [1.0]
    assert clock.pending == [1.0]


async def test_an_automatic_sleep_gives_way_to_other_tasks():
    """A loop of sleeps cannot starve the rest, and a cancellation gets through."""
    clock = ScriptedClock()

    async def forever() -> None:
        while True:
            await clock.sleep(1.0)

    task = asyncio.ensure_future(forever())
    await turn()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.sleeps


async def test_timers_fire_in_order_and_each_at_its_own_time():
    """Due times decide, then the order of asking; a callback sees its own time."""
    clock = ScriptedClock()
    fired: list[tuple[str, float]] = []
    for name, seconds in (("late", 3.0), ("early", 1.0), ("early too", 1.0), ("beyond", 9.0)):
        clock.call_later(seconds, lambda name=name: fired.append((name, clock.monotonic())))
    clock.advance(5.0)
    assert fired == [("early", 1.0), ("early too", 1.0), ("late", 3.0)]
    assert clock.monotonic() == 5.0
    assert clock.pending == [4.0]


async def test_a_timer_set_by_a_timer_fires_within_the_same_advance():
    """A ping that schedules the next one is called as often as there is time."""
    clock = ScriptedClock()
    fired: list[float] = []

    def tick() -> None:
        fired.append(clock.now())
        clock.call_later(1.0, tick)

    clock.call_later(1.0, tick)
    clock.advance(3.5)
    assert fired == [1.0, 2.0, 3.0]


async def test_a_cancelled_timer_does_not_fire():
    """It is no longer pending either."""
    clock = ScriptedClock()
    fired: list[int] = []
    timer = clock.call_later(1.0, lambda: fired.append(1))
    timer.cancel()
    clock.advance(2.0)
    assert fired == []
    assert clock.pending == []
    assert not timer.is_pending


async def test_a_manual_sleep_waits_for_the_test():
    """Not a moment sooner than the time has come."""
    clock = ScriptedClock(auto=False)
    log: list[float] = []
    task = asyncio.ensure_future(sleeper(clock, log, 2.0))
    await turn()
    clock.advance(1.9)
    await turn()
    assert log == []
    clock.advance(0.1)
    await task
    assert log == [2.0]
    assert clock.sleeps == [2.0]


async def test_running_lets_sleepers_sleep_again_on_the_way():
    """Two tasks interleave as they would in real time."""
    clock = ScriptedClock(auto=False)
    log: list[float] = []
    tasks = [asyncio.ensure_future(sleeper(clock, log, *seconds)) for seconds in ((1.0, 3.0), (2.0, 0.5))]
    await clock.run(10.0)
    await asyncio.gather(*tasks)
    assert log == [1.0, 2.0, 2.5, 4.0]
    assert clock.now() == 10.0


async def test_a_sleeper_that_was_cancelled_leaves_nothing_behind():
    """Neither a pending timer nor an error when its time comes."""
    clock = ScriptedClock(auto=False)
    task = asyncio.ensure_future(sleeper(clock, [], 2.0))
    await turn()
    task.cancel()
    clock.advance(2.0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.pending == []


async def test_freezing_is_seen_by_now_alone():
    """The machine was suspended: no timer fires and the monotonic time stands still."""
    clock = ScriptedClock()
    fired: list[int] = []
    clock.call_later(1.0, lambda: fired.append(1))
    clock.freeze(3600.0)
    assert (clock.now(), clock.monotonic(), fired) == (3600.0, 0.0, [])
    clock.advance(1.0)
    assert (clock.now(), clock.monotonic(), fired) == (3601.0, 1.0, [1])


def test_time_does_not_run_backwards():
    """The message has the offending value."""
    with pytest.raises(ValueError, match=r"-1.0 seconds"):
        ScriptedClock().advance(-1.0)
