"""The events: their names, and that they cannot be changed."""

from __future__ import annotations

import dataclasses

import pytest

from resilient_pool import events
from resilient_pool.events import Event

KINDS = [
    kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind.name != Event.name
]


def test_the_names_are_dotted_and_each_belongs_to_one_kind_of_event():
    """The names are those that applications filter their logs by."""
    assert {
        "pool.connection.opened",
        "pool.connection.discarded",
        "pool.retry.scheduled",
        "pool.retry.exhausted",
        "pool.circuit.opened",
        "pool.circuit.closed",
        "pool.caller.waited",
        "pool.outcome.resolved",
        "pool.outcome.unknown",
        "pool.pooler.detected",
        "migration.started",
        "migration.repeated",
        "migration.lock.waited",
        "migration.lock.lost",
    } == {kind.name for kind in KINDS}
    assert len(KINDS) == len({kind.name for kind in KINDS})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_event_is_frozen_slotted_and_made_by_keyword(kind):
    """An observer cannot change what the next one sees."""
    names = [field.name for field in dataclasses.fields(kind)]
    event = kind(**dict.fromkeys(names, 1))
    assert not hasattr(event, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, names[0], 2)
    with pytest.raises(TypeError):
        kind(*[1] * len(names))
