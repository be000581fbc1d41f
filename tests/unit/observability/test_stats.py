"""Counting: a snapshot does not move."""

from __future__ import annotations

import dataclasses

import pytest

from resilient_pool.events import DiscardReason
from resilient_pool.observability.stats import WAIT_BOUNDS, Counters, PoolStats
from resilient_pool.retry.verdict import Fault

NOW = {
    "size": 3,
    "idle": 1,
    "in_use": 1,
    "resetting": 1,
    "waiting": 2,
    "min_size": 0,
    "max_size": 10,
    "circuit_open": False,
}


def test_a_new_pool_has_counted_nothing():
    """Every total starts at zero, and no reason or fault is listed before it occurs."""
    stats = Counters().snapshot(**NOW)
    totals = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats) if field.name not in NOW}
    assert [name for name, value in totals.items() if value] == []


def test_every_counter_arrives_in_the_snapshot_under_its_own_name():
    """No total is mixed up with another one, and none is forgotten."""
    counters = Counters()
    names = [
        field.name for field in dataclasses.fields(Counters) if isinstance(getattr(counters, field.name), int | float)
    ]
    for number, name in enumerate(names, start=1):
        setattr(counters, name, number)
    stats = counters.snapshot(**NOW)
    assert list(range(1, len(names) + 1)) == [getattr(stats, name) for name in names]
    assert {field.name for field in dataclasses.fields(PoolStats)} == {
        *NOW,
        *(field.name for field in dataclasses.fields(Counters)),
    }


def test_what_the_pool_looks_like_now_is_part_of_the_snapshot():
    """Sizes are passed through, each under its own name."""
    stats = Counters().snapshot(**NOW)
    assert {name: getattr(stats, name) for name in NOW} == NOW


def test_a_snapshot_does_not_change_when_counting_goes_on():
    """Neither the totals nor the mappings of an old snapshot follow the pool."""
    counters = Counters()
    counters.discarded[DiscardReason.STALE] += 1
    before = counters.snapshot(**NOW)
    counters.acquired += 1
    counters.discarded[DiscardReason.STALE] += 1
    counters.retries[Fault.STALE] += 1
    assert (before.acquired, dict(before.discarded), dict(before.retries)) == (0, {DiscardReason.STALE: 1}, {})


def test_totals_are_sums_over_reasons_and_faults():
    """`discarded_total` and `retries_total` add up what the mappings hold."""
    counters = Counters()
    counters.discarded.update({DiscardReason.STALE: 2, DiscardReason.IDLE: 3})
    counters.retries.update({Fault.STALE: 1, Fault.OVERLOADED: 6})
    stats = counters.snapshot(**NOW)
    assert (stats.discarded_total, stats.retries_total) == (5, 7)


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0.0, 0.001), (0.001, 0.001), (0.0011, 0.005), (59.0, 60.0), (61.0, WAIT_BOUNDS[-1])]
)
def test_a_wait_is_counted_under_the_bound_that_it_did_not_exceed(seconds, bound):
    """The histogram's counts add up to the number of waits, and its bounds are those of Prometheus: inclusive."""
    counters = Counters()
    counters.count_wait(seconds)
    stats = counters.snapshot(**NOW)
    assert (dict(stats.wait_histogram), stats.waits, stats.wait_seconds) == ({bound: 1}, 1, seconds)


def test_a_snapshot_cannot_be_changed():
    """It is a value: neither its attributes nor its mappings can be assigned to."""
    stats = Counters().snapshot(**NOW)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.size = 0
    with pytest.raises(TypeError):
        stats.discarded[DiscardReason.STALE] = 1
