"""What was asked stays as it was; what an attempt notes ends with it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from resilient_pool.execution.retry_strategy import Execution, Operation
from resilient_pool.retry.decision import RetryState
from resilient_pool.retry.verdict import Outcome, Phase

FETCH = Operation(name="fetch", sql="SELECT 1", started=0.0, deadline=None)


def test_an_operation_cannot_be_changed():
    """No attempt can change what the application asked for."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        FETCH.idempotent = True
    assert not hasattr(FETCH, "__dict__")


def test_another_attempt_begins_with_nothing_of_the_one_before():
    """A connection, a transaction's id and a known outcome belong to one attempt only."""
    execution = Execution(FETCH, RetryState())
    before = execution.attempt
    before.execute_on(SimpleNamespace(), 7)
    before.xid, before.known_outcome, before.transaction_began = 4711, Outcome.UNKNOWN, 1.0
    attempt = execution.begin_attempt()
    assert attempt is execution.attempt is not before
    noted = [attempt.phase, attempt.driver, attempt.queries_before, attempt.xid]
    assert noted == [Phase.CONNECT, None, 0, None]
    assert (attempt.known_outcome, attempt.transaction_began) == (None, None)


def test_the_caller_sees_what_time_ran_out_with():
    """A time-out says least: the error before it is raised in its place, but no other error is replaced."""
    execution, lost, limit, final = Execution(FETCH, RetryState()), ConnectionResetError(), TimeoutError(), ValueError()
    assert execution.error_for_caller(limit) is limit
    execution.remember(lost)
    execution.remember(limit)
    assert execution.error_for_caller(limit) is lost
    assert execution.error_for_caller(final) is final
