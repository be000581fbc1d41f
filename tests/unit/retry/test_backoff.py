"""The delays of `BackoffPolicy`, and what it refuses."""

from __future__ import annotations

import functools
from itertools import islice

import backoff
import pytest

from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.backoff import OPERATION_BACKOFF, RECONNECT_BACKOFF, BackoffPolicy, quarter_jitter


def ours(base, factor, max_value):
    """Yield what it was given, in seconds."""
    yield base
    yield factor
    yield max_value


def open_minded(**words):
    """Yield how many words it was given."""
    yield len(words)


def primed_and_short():
    """Yield the `None` of the library, then two delays, and end."""
    yield None
    yield 1
    yield 3


def ending_with_none():
    """Yield a delay and then something that is none."""
    yield 0.5
    yield None
    yield 1


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (BackoffPolicy(jitter=None), [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]),
        (BackoffPolicy(jitter=None, base=0.25, max_value=1.0), [0.25, 0.5, 1.0, 1.0]),
        (BackoffPolicy(jitter=None, base=1, factor=3, max_value=None), [1, 3, 9, 27, 81]),
        (BackoffPolicy(jitter=None, base=0.5, factor=1), [0.5, 0.5, 0.5]),
        (BackoffPolicy(jitter=None, base=0), [0, 0, 0]),
        (BackoffPolicy(jitter=None, base=5, max_value=2), [2, 2]),
        (BackoffPolicy(jitter=None, wait=backoff.fibo, max_value=6), [1, 1, 2, 3, 5, 6, 6]),
        (BackoffPolicy(jitter=None, wait=backoff.constant, base=0.3), [0.3, 0.3, 0.3]),
        (BackoffPolicy(jitter=None, wait=backoff.constant, base=3, max_value=2), [2, 2]),
        (BackoffPolicy(jitter=None, wait=ours, base=0.1, factor=1.5, max_value=9), [0.1, 1.5, 9, 9, 9]),
        (BackoffPolicy(jitter=None, wait=open_minded), [0, 0]),
        (BackoffPolicy(jitter=None, wait=primed_and_short), [1, 2.0, 2.0]),
        (BackoffPolicy(jitter=None, wait=primed_and_short, max_value=None), [1, 3, 3, 3]),
        (BackoffPolicy(jitter=None, wait=ending_with_none), [0.5, 0.5, 0.5]),
        (BackoffPolicy(jitter=None, wait=functools.partial(backoff.expo, base=10)), [0.05, 0.5, 2.0]),
        (BackoffPolicy(jitter=None, wait=functools.partial(backoff.constant, interval=0.7)), [0.7, 0.7]),
        (BackoffPolicy(jitter=lambda value: value + 1), [1.05, 1.1]),
        (BackoffPolicy(jitter=lambda value: -value), [0.0, 0.0]),
        (BackoffPolicy(jitter=lambda _: float("nan")), [0.0, 0.0]),
    ],
)
def test_delays_follow_the_wait_generator(policy, expected):
    """Every wait generator of the library's shape is given the words it knows, and its delays are bounded and jittered."""
    assert pytest.approx(expected) == list(islice(policy.delays(), len(expected)))


def test_an_unbounded_exponential_never_ends():
    """Where the exponential leaves the range of floats, the delay stays at its last value instead of failing."""
    policy = BackoffPolicy(jitter=None, max_value=None, factor=2.0, max_attempts=None)
    delays = list(islice(policy.delays(), 1100))
    assert delays[-1] == delays[-2] > 1e300


def test_two_iterators_are_independent():
    """Each call walks its own delays."""
    policy = BackoffPolicy(jitter=None)
    first, second = policy.delays(), policy.delays()
    assert [next(first), next(first), next(second)] == [0.05, 0.1, 0.05]


def test_the_default_jitter_spreads_over_the_whole_delay():
    """Full jitter stays between nothing and the delay, and reaches into both halves."""
    delays = [next(OPERATION_BACKOFF.delays()) for _ in range(200)]
    assert 0 <= min(delays) < 0.025 < max(delays) <= 0.05


def test_quarter_jitter_keeps_three_quarters():
    """So the number of attempts in a time is bounded, whatever chance says: nine in five seconds."""
    delays = [quarter_jitter(1.0) for _ in range(200)]
    assert 0.75 <= min(delays) < 0.85 < max(delays) <= 1.0


def test_the_defaults_are_the_documented_ones():
    """The two policies of a pool are the ones that the documentation promises."""
    assert (
        BackoffPolicy(
            wait=backoff.expo,
            base=0.05,
            factor=2,
            max_value=2.0,
            jitter=backoff.full_jitter,
            max_attempts=5,
            max_elapsed=None,
        )
        == OPERATION_BACKOFF
    )
    assert (
        BackoffPolicy(
            wait=backoff.expo,
            base=0.25,
            factor=2,
            max_value=1.0,
            jitter=quarter_jitter,
            max_attempts=None,
            max_elapsed=60.0,
        )
        == RECONNECT_BACKOFF
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"base": -1}, "base must be a number of seconds, at least 0, not -1"),
        ({"base": "1"}, "base must be a number of seconds, at least 0, not '1'"),
        ({"base": True}, "base must be a number of seconds, at least 0, not True"),
        ({"base": float("nan")}, "base must be a number of seconds, at least 0, not nan"),
        ({"base": float("inf")}, "base must be a number of seconds, at least 0, not inf"),
        ({"factor": 0.5}, "factor must be a ratio, at least 1, not 0.5"),
        ({"max_value": 0}, "max_value must be a number of seconds or None, more than 0, not 0"),
        (
            {"max_attempts": 0},
            "max_attempts must be a number of attempts (the first included) or None, a whole number of at least 1, not 0",
        ),
        (
            {"max_attempts": 2.5},
            "max_attempts must be a number of attempts (the first included) or None, a whole number of at least 1, not 2.5",
        ),
        (
            {"max_attempts": True},
            "max_attempts must be a number of attempts (the first included) or None, a whole number of at least 1, not True",
        ),
        ({"max_elapsed": -3}, "max_elapsed must be a number of seconds or None, more than 0, not -3"),
        ({"jitter": 0.5}, "jitter must be a function of a number of seconds or None, not 0.5"),
        (
            {"jitter": "hunter2"},
            "jitter must be a function of a number of seconds or None, not a str that may be secret",
        ),
        (
            {"wait": "hunter2"},
            (
                "wait must be a generator function that needs no other arguments than base, factor, max_value or interval "
                "(in seconds), not a str that may be secret"
            ),
        ),
    ],
)
def test_a_wrong_number_is_named_with_its_unit_and_value(words, message):
    """A policy that cannot work is refused when it is made, with words that tell what is wrong."""
    with pytest.raises(ConfigurationError) as caught:
        BackoffPolicy(**words)
    assert message == str(caught.value)


@pytest.mark.parametrize("wait", [backoff.runtime, 5, lambda seed: iter([seed])])
def test_a_generator_that_needs_more_is_refused(wait):
    """A wait generator with arguments that nobody could give it is refused when the policy is made."""
    with pytest.raises(ConfigurationError, match="wait must be a generator function"):
        BackoffPolicy(wait=wait)
