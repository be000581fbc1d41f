"""The token bucket that bounds retries."""

from __future__ import annotations

import pytest

from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.decision import RetryBudget


def test_a_new_budget_pays_for_its_reserve_and_no_more():
    """Ten retries are there before any call has paid for one."""
    budget = RetryBudget()
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]


def test_calls_pay_for_retries_at_the_ratio():
    """With an empty reserve, four calls at a quarter each pay for exactly one retry."""
    budget = RetryBudget(ratio=0.25, reserve=0)
    answers = []
    for _ in range(8):
        budget.calls += 1
        answers.append(budget.withdraw())
    assert answers == [False, False, False, True, False, False, False, True]


def test_savings_are_capped():
    """A quiet year does not pay for a storm of retries."""
    budget = RetryBudget(ratio=1, reserve=0, cap=3)
    for _ in range(100):
        budget.calls += 1
    assert budget.tokens == 3
    assert repr(budget) == "<RetryBudget tokens=3.0 cap=3 ratio=1>"


def test_a_refusal_costs_nothing():
    """Asking in vain does not delay the next retry that is paid for."""
    budget = RetryBudget(ratio=0.5, reserve=0)
    assert [budget.withdraw() for _ in range(3)] == [False] * 3
    budget.calls += 1
    budget.calls += 1
    assert budget.withdraw()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ratio": -0.1}, "ratio must be a number of retries per call, at least 0, not -0.1"),
        ({"reserve": -1}, "reserve must be a number of retries, at least 0, not -1"),
        ({"cap": 0.5}, "cap must be a number of retries, at least 1, not 0.5"),
        ({"cap": 5}, "cap must be a number of retries, at least the reserve of 10.0, not 5"),
        ({"ratio": None}, "ratio must be a number of retries per call, at least 0, not None"),
    ],
)
def test_a_wrong_number_is_named_with_its_unit_and_value(words, message):
    """A budget that cannot work is refused when it is made."""
    with pytest.raises(ConfigurationError) as caught:
        RetryBudget(**words)
    assert message == str(caught.value)
