"""The dispatcher: every observer sees every event, and no observer can break a call."""

from __future__ import annotations

import asyncio
import inspect
import logging

import pytest

from resilient_pool.events import ConnectionDiscarded, ConnectionOpened, DiscardReason
from resilient_pool.pooling.context import Dispatcher

OPENED = ConnectionOpened(elapsed=0.004, server_pid=4711, size=1)
DISCARDED = ConnectionDiscarded(reason=DiscardReason.STALE, age=61.5, server_pid=4711)


def failing(event):
    raise RuntimeError("out of disk")


def test_every_observer_sees_every_event_in_order():
    """Two observers see the same events, in the order in which they were emitted."""
    first, second = [], []
    dispatcher = Dispatcher([first.append, second.append])
    dispatcher.emit(OPENED)
    dispatcher.emit(DISCARDED)
    assert [OPENED, DISCARDED] == first == second


def look_at_a_cancelled_task(event):
    raise asyncio.CancelledError


@pytest.mark.parametrize("broken", [failing, look_at_a_cancelled_task])
def test_a_failing_observer_keeps_no_event_from_the_others(broken):
    """The observer behind a failing one still sees the event, and the caller of `emit` notices nothing."""
    heard = []
    Dispatcher([broken, heard.append]).emit(OPENED)
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


def test_a_coroutine_that_an_observer_returns_is_closed_and_reported_once(caplog):
    """It is not awaited: that is an error of the observer's, and no warning of a coroutine that was never awaited."""
    returned, heard = [], []

    async def take(event):
        """Never run."""

    def hand_over(event):
        returned.append(take(event))
        return returned[-1]

    dispatcher = Dispatcher([hand_over, heard.append])
    dispatcher.emit(OPENED)
    dispatcher.emit(DISCARDED)
    assert [inspect.getcoroutinestate(coroutine) for coroutine in returned] == [inspect.CORO_CLOSED] * 2
    assert heard == [OPENED, DISCARDED]
    (record,) = caplog.records
    assert "an observer must not return a coroutine" in str(record.exc_info[1])
    assert "pool.connection.opened" in record.getMessage()


def test_a_dispatcher_is_false_only_without_observers():
    """A caller can ask before making an event."""
    assert not Dispatcher()
    assert Dispatcher([failing])
