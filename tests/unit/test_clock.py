"""The machine's clocks: whichever of them moves on, the pool sees it."""

from __future__ import annotations

import time

import pytest

from resilient_pool import clock
from resilient_pool.clock import SystemClock


class Machine:
    """Clocks that stand where a test has put them."""

    def __init__(self) -> None:
        self.boot, self.wall = 1000.0, 1e9

    def clock_gettime(self, which: int) -> float:
        assert which == getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return self.boot

    def time(self) -> float:
        return self.wall


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(clock, "time", machine)
    return machine


@pytest.mark.parametrize(
    ("boot", "wall", "seen"),
    [
        pytest.param(2.0, 2.0, 2.0, id="both go on"),
        pytest.param(3600.0, 0.0, 3600.0, id="the wall clock stood still"),
        pytest.param(0.0, 3600.0, 3600.0, id="the machine was suspended and did not count it"),
        pytest.param(2.0, -3600.0, 2.0, id="the wall clock was set back"),
        pytest.param(2.0, 3600.0, 3600.0, id="the wall clock was set forward"),
    ],
)
def test_time_moves_on_by_the_largest_step_of_any_clock(machine, boot, wall, seen):
    """A frozen process, whichever clock kept counting, is no shorter away than it was."""
    pool_clock = SystemClock()
    machine.boot += boot
    machine.wall += wall
    assert pool_clock.now() == seen
    machine.boot += 1.0
    machine.wall += 1.0
    assert pool_clock.now() == seen + 1.0, "the step before was counted twice"


def test_the_line_of_now_never_lags_behind_the_monotonic_clock():
    """Deadlines are counted on the one, ages on the other."""
    pool_clock = SystemClock()
    before = pool_clock.now(), pool_clock.monotonic()
    while pool_clock.monotonic() - before[1] < 0.002:
        pass
    ended = pool_clock.monotonic()
    assert pool_clock.now() - before[0] >= (ended - before[1]) * 0.99
