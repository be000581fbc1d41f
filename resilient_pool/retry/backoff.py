"""How long to wait between attempts: `BackoffPolicy`, over the wait generators of the `backoff` library."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import backoff

from resilient_pool._validation import constructor_names_nearest, require_count, require_number, shown
from resilient_pool.errors import ConfigurationError

WaitGenerator = Callable[..., Iterator[float | None]]
"""A generator function of the `backoff` library's shape. A first `None`, which that library's own yield, is skipped."""

Jitter = Callable[[float], float]
"""Takes a delay and returns the one to use, in seconds."""


def quarter_jitter(value: float) -> float:
    """Return a random delay between three quarters of `value` and `value` seconds."""
    return value * 3 / 4 + backoff.full_jitter(value / 4)


@constructor_names_nearest
@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffPolicy:
    """When to try again, and when to stop.

    Attributes:
        wait: A wait generator: `backoff.expo` (default), `backoff.fibo`, `backoff.constant` or one's own. It is given those of
            `base`, `factor` and `max_value` which its signature has; `interval` is given `base`. For `backoff.expo`, whose own
            words are the other way round, `base` is nevertheless the first delay and `factor` the growth.
        base: The first delay, in seconds. Default 0.05.
        factor: By how much each delay is longer than the one before, a ratio of at least 1. Default 2.
        max_value: The longest delay before jitter, in seconds, or `None` for no bound. Default 2.
        jitter: Spreads each delay; `backoff.full_jitter` (default) anywhere from 0 to it, `None` not at all.
        max_attempts: How many attempts in all, the first included, or `None` for as many as time allows. Default 5.
        max_elapsed: How long to go on trying after the first failure, in seconds, or `None` (default) for as long as the deadline allows.

    Raises:
        ConfigurationError: A number is out of its range, or `wait` needs arguments it cannot be given.
    """

    wait: WaitGenerator = backoff.expo
    base: float = 0.05
    factor: float = 2
    max_value: float | None = 2.0
    jitter: Jitter | None = backoff.full_jitter
    max_attempts: int | None = 5
    max_elapsed: float | None = None

    def __post_init__(self) -> None:
        require_number("base", self.base, unit="a number of seconds", least=0)
        require_number("factor", self.factor, unit="a ratio", least=1)
        if self.max_value is not None:
            require_number("max_value", self.max_value, unit="a number of seconds or None", least=0, above=True)
        if self.max_attempts is not None:
            require_count("max_attempts", self.max_attempts, unit="a number of attempts (the first included) or None")
        if self.max_elapsed is not None:
            require_number("max_elapsed", self.max_elapsed, unit="a number of seconds or None", least=0, above=True)
        if self.jitter is not None and not callable(self.jitter):
            raise ConfigurationError(
                f"jitter must be a function of a number of seconds or None, not {shown(self.jitter)}"
            )
        self._wait_arguments()

    def delays(self) -> Iterator[float]:
        """Yield the delays before the second, third, ... attempt, in seconds, jittered, never negative, without end."""
        last = 0.0
        for last in self._waits():
            yield self._jittered(last)
        while True:  # a generator that ended stays at its last delay
            yield self._jittered(last)

    def _waits(self) -> Iterator[float]:
        waits = self.wait(**self._wait_arguments())
        try:
            for number, wait in enumerate(waits):
                if wait is not None:
                    yield wait if self.max_value is None else min(wait, self.max_value)
                elif number:
                    return
        except OverflowError:  # an unbounded exponential reaches the end of float after a thousand attempts
            return

    def _jittered(self, delay: float) -> float:
        return max(0.0, delay if self.jitter is None else self.jitter(delay))

    def _wait_arguments(self) -> dict[str, float | None]:
        """Return what `wait` is called with, by the names that its signature has."""
        function, settled = self.wait, frozenset[str]()
        while isinstance(function, functools.partial):
            settled |= function.keywords.keys()
            function = function.func
        offered = {"base": self.base, "factor": self.factor, "max_value": self.max_value, "interval": self.base}
        if function is backoff.expo:
            offered |= {"base": self.factor, "factor": self.base}
        try:
            signature = inspect.signature(self.wait)
            accepted = {name: offered[name] for name in signature.parameters if name in offered and name not in settled}
            signature.bind(**accepted)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                "wait must be a generator function that needs no other arguments than base, factor, max_value or "
                f"interval (in seconds), not {shown(self.wait)}{f': {error}' if callable(self.wait) else ''}"
            ) from (error if callable(self.wait) else None)
        return accepted


OPERATION_BACKOFF = BackoffPolicy()
"""For operations: 0.05 s, doubling, at most 2 s, fully jittered, 5 attempts."""

RECONNECT_BACKOFF = BackoffPolicy(base=0.25, max_value=1.0, jitter=quarter_jitter, max_attempts=None, max_elapsed=60.0)
"""For a server that is away: 0.25 s, doubling, at most 1 s, at most a quarter of it taken by the jitter, for 60 s."""
