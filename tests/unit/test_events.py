"""Telling observers: everyone is told, and nobody who listens can break a call."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from resilient_pool import events
from resilient_pool.events import ConnectionDiscarded, ConnectionOpened, DiscardReason, Dispatcher, Event

OPENED = ConnectionOpened(elapsed=0.004, server_pid=4711, size=1)
DISCARDED = ConnectionDiscarded(reason=DiscardReason.STALE, age=61.5, server_pid=4711)
KINDS = [
    kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
]


def failing(event):
    raise RuntimeError("out of disk")


def test_every_observer_is_told_every_event_in_order():
    """Two observers see the same events, in the order in which they were told."""
    first, second = [], []
    dispatcher = Dispatcher([first.append, second.append])
    dispatcher.emit(OPENED)
    dispatcher.emit(DISCARDED)
    assert [OPENED, DISCARDED] == first == second


def test_a_failing_observer_does_not_keep_the_others_from_being_told():
    """The observer behind a failing one still hears, and the caller of `tell` notices nothing."""
    heard = []
    Dispatcher([failing, heard.append]).emit(OPENED)
    assert heard == [OPENED]


def test_each_failing_observer_is_reported_once(caplog):
    """Two failing observers and three events make two log records, each with the exception."""
    dispatcher = Dispatcher([failing, lambda event: failing(event)])
    for _ in range(3):
        dispatcher.emit(OPENED)
    assert [("resilient_pool", logging.ERROR, RuntimeError)] * 2 == [
        (record.name, record.levelno, record.exc_info[0]) for record in caplog.records
    ]
    assert "pool.connection.opened" in caplog.messages[0]


def test_an_observer_cannot_swallow_an_interruption():
    """What is not an `Exception`, such as the user's Ctrl-C, is not an observer's failure and goes through."""

    def interrupted(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Dispatcher([interrupted]).emit(OPENED)


def test_a_dispatcher_is_false_only_when_nobody_listens():
    """Whoever has something to tell can ask before making an event."""
    assert not Dispatcher()
    assert Dispatcher([failing])


def test_the_names_are_dotted_and_each_belongs_to_one_kind_of_event():
    """The names are those that applications filter their logs by."""
    assert {
        "pool.connection.opened",
        "pool.connection.discarded",
        "pool.retry.scheduled",
        "pool.retry.exhausted",
        "pool.circuit.opened",
        "pool.circuit.closed",
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
