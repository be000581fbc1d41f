"""What the parts of a pool share: the application's classifier can fail, and a scheduled retry is counted and emitted once."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import asyncpg
import pytest

from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.events import RetryScheduled
from resilient_pool.observability.stats import Counters
from resilient_pool.pooling.context import Dispatcher, PoolContext
from resilient_pool.retry.verdict import Failure, Fault, Outcome, Phase
from resilient_pool.testing import ScriptedClock


def broken(*_):
    raise RuntimeError("bug")


def context_of(observers=(), **arguments):
    config = PoolConfig.from_arguments(None, **arguments)
    return PoolContext(config=config, clock=ScriptedClock(), counters=Counters(), events=Dispatcher(observers))


def test_a_classifier_that_raises_makes_a_failure_permanent_and_unknown():
    """Nothing is repeated because of a classifier's mistake, and a note says whose mistake it was."""
    context = context_of(classifier=SimpleNamespace(classify=broken))
    failure = Failure(error=ConnectionResetError(), phase=Phase.EXECUTE, sent=True)
    verdict = context.classify(failure)
    assert (verdict.fault, verdict.outcome) == (Fault.PERMANENT, Outcome.UNKNOWN)
    assert failure.error.__notes__ == [
        "resilient_pool: not retried, because the classifier failed with RuntimeError: bug"
    ]


@pytest.mark.parametrize("unwrap", [broken, lambda _: None], ids=["raises", "returns no error"])
def test_an_error_that_a_classifier_cannot_unwrap_is_taken_as_it_is(unwrap):
    """A classifier's `unwrap` is a convenience: without an answer the error itself is judged."""
    context = context_of(classifier=SimpleNamespace(classify=broken, unwrap=unwrap))
    error = ValueError("wrapped")
    assert context.unwrap(error) is error


def test_a_classifier_without_unwrap_gets_the_default():
    """An application's own classifier sees the driver's error behind a wrapper, too."""
    inner = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    wrapper = RuntimeError("an engine's own")
    wrapper.__cause__ = inner
    assert context_of(classifier=SimpleNamespace(classify=broken)).unwrap(wrapper) is context_of().unwrap(wrapper)


def test_a_scheduled_retry_is_counted_and_emitted_once():
    """The statistics and the observers agree."""
    events = []
    context = context_of([events.append])
    scheduled = RetryScheduled(
        operation="fetch",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.NOT_EXECUTED,
        sqlstate=None,
        attempt=1,
        delay=0.0,
        elapsed=0.0,
    )
    context.retry_scheduled(scheduled)
    assert events == [scheduled]
    assert dict(context.counters.retries) == {Fault.DISCONNECTED: 1}


def test_a_context_cannot_be_changed():
    """What one part of a pool sees, every other part sees."""
    context = context_of()
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.clock = ScriptedClock()
    assert not hasattr(context, "__dict__")
