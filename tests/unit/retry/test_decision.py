"""The whole retry policy, as tables."""

from __future__ import annotations

import itertools

import pytest

from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.decision import GiveUp, GiveUpReason, Retry, RetryBudget, RetryState, decide
from resilient_pool.retry.verdict import Fault, Outcome, Phase, Verdict

OPERATIONS = BackoffPolicy(base=1, max_value=8, jitter=None, max_attempts=5)
RECONNECT = BackoffPolicy(base=100, max_value=400, jitter=None, max_attempts=None)
FRESH = [Fault.STALE, Fault.STATEMENT_CACHE, Fault.DISCONNECTED, Fault.POISONED]


def state(**words):
    return RetryState(**{"operations": OPERATIONS, "reconnect": RECONNECT} | words)


def step(memory, fault, outcome=Outcome.NOT_EXECUTED, *, not_before=None, only_for=None, **words):
    asked = {"phase": Phase.EXECUTE, "repeatable": False, "now": 0.0, "deadline": None, "budget": None}
    verdict = Verdict(fault=fault, outcome=outcome, not_before=not_before, only_for=only_for)
    decision = decide(verdict, memory, **asked | words)
    return decision.delay if isinstance(decision, Retry) else decision.reason


@pytest.mark.parametrize("repeatable", [True, False])
def test_what_may_have_taken_effect_is_never_repeated_unless_it_is_repeatable(repeatable):
    """For every verdict: permanent faults end the call, unknown outcomes do unless repeatable, all else is retried."""
    for fault, outcome in itertools.product(Fault, Outcome):
        decision = step(state(), fault, outcome, repeatable=repeatable)
        if fault is Fault.PERMANENT:
            assert decision is GiveUpReason.PERMANENT, (fault, outcome)
        elif outcome is Outcome.UNKNOWN and not repeatable:
            assert decision is GiveUpReason.OUTCOME_UNKNOWN, (fault, outcome)
        else:
            assert isinstance(decision, float | int), (fault, outcome)


@pytest.mark.parametrize(
    ("fault", "phase", "delays"),
    [
        (Fault.STALE, Phase.EXECUTE, [0, 1, 2, 4]),
        (Fault.STATEMENT_CACHE, Phase.EXECUTE, [0, 1, 2, 4]),
        (Fault.DISCONNECTED, Phase.EXECUTE, [0, 1, 2, 4]),
        (Fault.POISONED, Phase.EXECUTE, [0, 1, 2, 4]),
        (Fault.OVERLOADED, Phase.EXECUTE, [1, 2, 4, 8]),
        (Fault.CONTENTION, Phase.EXECUTE, [1, 2, 4, 8]),
        (Fault.CONTENTION, Phase.COMMIT, [1, 2, 4, 8]),
        (Fault.OVERLOADED, Phase.CHECKOUT, [1, 2, 4, 8]),
    ],
)
def test_operations_are_tried_five_times(fault, phase, delays):
    """Four retries follow the first attempt, at once where a fresh connection is the cure, and then no more."""
    memory = state()
    assert [*delays, GiveUpReason.ATTEMPTS] == [step(memory, fault, phase=phase) for _ in range(5)]
    assert memory.attempts == 5


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        (Fault.UNREACHABLE, Phase.CONNECT),
        (Fault.UNREACHABLE, Phase.CHECKOUT),
        (Fault.WRONG_SERVER, Phase.EXECUTE),
        (Fault.WRONG_SERVER, Phase.CONNECT),
        (Fault.OVERLOADED, Phase.CONNECT),
    ],
)
def test_an_absent_server_is_waited_for_under_the_reconnect_policy(fault, phase):
    """However often it is not there, the call goes on at the reconnect policy's pace."""
    memory = state()
    assert [step(memory, fault, phase=phase) for _ in range(6)] == [100, 200, 400, 400, 400, 400]


def test_the_two_policies_count_apart():
    """Waiting for the server uses up none of the operation's attempts, and the other way round."""
    memory = state()
    faults = [Fault.CONTENTION, Fault.UNREACHABLE, Fault.CONTENTION, Fault.UNREACHABLE, Fault.CONTENTION]
    assert [step(memory, fault) for fault in faults] == [1, 100, 2, 200, 4]
    assert [step(memory, Fault.CONTENTION) for _ in range(2)] == [8, GiveUpReason.ATTEMPTS]
    assert step(memory, Fault.UNREACHABLE) == 400


@pytest.mark.parametrize("second", FRESH)
@pytest.mark.parametrize("first", FRESH)
def test_only_the_first_fresh_start_of_a_call_is_immediate(first, second):
    """A fresh connection that fails as well is no cure, so the second retry waits."""
    memory = state()
    assert [step(memory, first), step(memory, second)] == [0, 1]


def test_one_attempt_means_no_retry():
    """The attempts include the first."""
    assert step(state(operations=BackoffPolicy(max_attempts=1)), Fault.STALE) is GiveUpReason.ATTEMPTS


@pytest.mark.parametrize(
    ("now", "deadline", "expected"),
    [
        (10.0, None, 1),
        (10.0, 20.0, 1),
        (10.0, 11.0, 1),
        (10.0, 10.25, 0.25),
        (10.0, 10.0, GiveUpReason.DEADLINE),
        (10.0, 9.0, GiveUpReason.DEADLINE),
    ],
)
def test_no_delay_outlasts_the_deadline(now, deadline, expected):
    """A delay is cut to the time that is left; when none is, the call ends."""
    assert expected == step(state(), Fault.CONTENTION, now=now, deadline=deadline)


@pytest.mark.parametrize("fault", FRESH)
def test_even_an_immediate_retry_needs_time(fault):
    """After the deadline no attempt is started, not even one that would not have to wait."""
    assert step(state(), fault, now=5.0, deadline=5.0) is GiveUpReason.DEADLINE


def test_a_policy_ends_after_its_own_time_counted_from_its_first_failure():
    """A long query before the failure takes nothing from the time in which the server may come back."""
    memory = state(reconnect=BackoffPolicy(base=100, max_value=400, jitter=None, max_attempts=None, max_elapsed=250))
    seen = [step(memory, Fault.UNREACHABLE, now=now, deadline=5000.0) for now in (1000.0, 1100.0, 1250.0)]
    assert seen == [100, 150, GiveUpReason.DEADLINE]


def test_the_earlier_of_deadline_and_policy_counts():
    """Neither bound lengthens the other."""
    policy = BackoffPolicy(base=8, max_value=8, jitter=None, max_elapsed=5)
    assert step(state(operations=policy), Fault.CONTENTION, deadline=3.0) == 3
    assert step(state(operations=policy), Fault.CONTENTION, deadline=30.0) == 5


@pytest.mark.parametrize(
    ("fault", "phase", "spent"),
    [
        (Fault.OVERLOADED, Phase.EXECUTE, [1, 2, 3]),
        (Fault.OVERLOADED, Phase.CONNECT, [1, 2, 3]),
        (Fault.DISCONNECTED, Phase.EXECUTE, [0, 1, 2]),
        (Fault.POISONED, Phase.EXECUTE, [0, 1, 2]),
        (Fault.STALE, Phase.EXECUTE, [0, 0, 0]),
        (Fault.UNREACHABLE, Phase.CONNECT, [0, 0, 0]),
        (Fault.CONTENTION, Phase.EXECUTE, [0, 0, 0]),
        (Fault.WRONG_SERVER, Phase.EXECUTE, [0, 0, 0]),
        (Fault.STATEMENT_CACHE, Phase.EXECUTE, [0, 0, 0]),
    ],
)
def test_the_budget_is_asked_only_while_the_server_is_up_and_failing(fault, phase, spent):
    """Retries that add no load to a failing server are free; so is the first after a loss."""
    memory, budget, seen = state(), RetryBudget(reserve=50), []
    for _ in range(3):
        step(memory, fault, phase=phase, budget=budget)
        seen.append(50 - budget.tokens)
    assert spent == seen


def test_two_kinds_of_loss_are_counted_together():
    """A server that confuses one connection and drops the next is failing."""
    memory, budget = state(), RetryBudget(reserve=0)
    assert [step(memory, fault, budget=budget) for fault in (Fault.POISONED, Fault.DISCONNECTED)] == [
        0,
        GiveUpReason.BUDGET,
    ]


@pytest.mark.parametrize("fault", [Fault.DISCONNECTED, Fault.POISONED])
def test_the_loss_of_a_connection_that_never_worked_is_paid_for(fault):
    """A server that takes every call and drops it is failing, from the first call on."""
    budget = RetryBudget(reserve=1)
    assert step(state(), fault, budget=budget, had_served=False) == 0
    assert step(state(), fault, budget=budget, had_served=False) is GiveUpReason.BUDGET


def test_a_stale_connection_is_no_loss():
    """The first loss is free also when a stale connection came before it."""
    memory, budget = state(), RetryBudget(reserve=0)
    assert [step(memory, fault, budget=budget) for fault in (Fault.STALE, Fault.DISCONNECTED)] == [0, 1]


@pytest.mark.parametrize("fault", [Fault.STALE, Fault.UNREACHABLE, Fault.CONTENTION, Fault.WRONG_SERVER])
def test_an_empty_budget_stops_no_retry_that_costs_the_server_nothing(fault):
    """An outage is waited for even when the budget is spent."""
    memory = state()
    assert all(isinstance(step(memory, fault, budget=RetryBudget(reserve=0)), float | int) for _ in range(4))


def test_a_call_that_ends_anyway_spends_no_budget():
    """The budget is asked last."""
    budget = RetryBudget(reserve=5)
    step(state(), Fault.OVERLOADED, Outcome.UNKNOWN, budget=budget)
    step(state(), Fault.OVERLOADED, now=2.0, deadline=1.0, budget=budget)
    step(state(operations=BackoffPolicy(max_attempts=1)), Fault.OVERLOADED, budget=budget)
    assert budget.tokens == 5


def test_what_is_useless_before_some_time_is_not_tried_sooner():
    """Each delay is at least that long, and a call that must end by then ends at once, with its budget unspent."""
    memory, budget = state(), RetryBudget(reserve=5)
    assert step(memory, Fault.OVERLOADED, not_before=30.0) == 30
    assert step(memory, Fault.OVERLOADED, not_before=1.5) == 2  # the policy's own delay is longer
    assert step(memory, Fault.OVERLOADED, not_before=30.0, deadline=31.0) == 30
    assert step(memory, Fault.OVERLOADED, not_before=30.0, deadline=30.0, budget=budget) is GiveUpReason.DEADLINE
    assert budget.tokens == 5


def test_what_may_pass_within_some_time_is_believed_after_it():
    """It counts from the first such failure; the last attempt is made when that time is up."""
    memory = state(reconnect=BackoffPolicy(base=4, factor=1, max_value=4, jitter=None, max_attempts=None))
    decisions = [step(memory, Fault.WRONG_SERVER, only_for=15.0, now=100.0 + now) for now in (0, 4, 8, 12, 15)]
    assert decisions == [4, 4, 4, 3, GiveUpReason.PERMANENT]


def test_what_is_always_waited_for_is_not_doubted():
    """Only verdicts that say so are."""
    memory = state()
    assert step(memory, Fault.UNREACHABLE, only_for=15.0) == 15
    assert step(memory, Fault.UNREACHABLE, now=200.0) == 200
    assert step(memory, Fault.UNREACHABLE, only_for=15.0, now=201.0) is GiveUpReason.PERMANENT


@pytest.mark.parametrize("name", ["not_before", "only_for"])
@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "30", True])
def test_a_verdicts_times_are_numbers_of_seconds(name, seconds):
    """A mistake in an application's own rule is an error where it is written."""
    with pytest.raises(ConfigurationError, match=f"{name} must be a number of seconds or None, more than 0, not "):
        Verdict(fault=Fault.OVERLOADED, outcome=Outcome.NOT_EXECUTED, **{name: seconds})


def test_decisions_compare_by_value():
    """A decision is a value, so a test can name the one it expects."""
    verdict = Verdict(fault=Fault.STALE, outcome=Outcome.NOT_EXECUTED)
    words = {"phase": Phase.EXECUTE, "repeatable": False, "deadline": 1.0, "budget": None}
    assert decide(verdict, state(), now=0.0, **words) == Retry(delay=0.0)
    assert decide(verdict, state(), now=1.0, **words) == GiveUp(reason=GiveUpReason.DEADLINE)


def test_the_state_tells_the_history():
    """What the final error's note says comes from here."""
    memory = state(started=3.0)
    step(memory, Fault.UNREACHABLE)
    step(memory, Fault.CONTENTION)
    assert (memory.attempts, memory.elapsed(10.0)) == (2, 7.0)
