"""The demo's schedule: how the time is shared out."""

from __future__ import annotations

import pytest

from demo.faults import FAULT_STEPS, min_total_seconds, schedule


@pytest.mark.parametrize("spare", [0.0, 13.0])
def test_the_acts_fill_exactly_the_time_given_and_each_gets_what_it_needs(spare: float):
    """They run in their order, with nothing left over."""
    planned = schedule(min_total_seconds() + spare)
    assert tuple(step for step, _ in planned) == FAULT_STEPS
    assert sum(seconds for _, seconds in planned) == pytest.approx(min_total_seconds() + spare)
    assert all(seconds >= step.min_seconds for step, seconds in planned)


def test_too_little_time_is_refused_with_what_is_needed():
    """The message has both numbers and their unit."""
    with pytest.raises(ValueError, match=r"^1 s are not enough: the faults need [\d.]+ s$"):
        schedule(1.0)
