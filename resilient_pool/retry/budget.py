"""What retries may add to the load of a server that is up but failing: `RetryBudget`, a token bucket."""

from __future__ import annotations

from resilient_pool._validation import constructor_names_nearest, require_number
from resilient_pool.errors import ConfigurationError


@constructor_names_nearest
class RetryBudget:
    """A bucket of tokens: every call puts a little in, every retry takes one out.

    Args:
        ratio: How many retries each call pays for, a ratio. Default 0.1: one retry for ten calls.
        reserve: How many retries are paid for at the start. Default 10.
        cap: How many retries can be saved up at most. Default 100.

    Raises:
        ConfigurationError: A number is negative, or `cap` is less than `reserve` or than one retry.
    """

    __slots__ = ("_cap", "_ratio", "_tokens")

    def __init__(self, *, ratio: float = 0.1, reserve: float = 10.0, cap: float = 100.0) -> None:
        require_number("ratio", ratio, unit="a number of retries per call", least=0)
        require_number("reserve", reserve, unit="a number of retries", least=0)
        require_number("cap", cap, unit="a number of retries", least=1)
        if cap < reserve:
            raise ConfigurationError(
                f"cap must be a number of retries, at least the reserve of {reserve!r}, not {cap!r}"
            )
        self._ratio = ratio
        self._cap = cap
        self._tokens = reserve

    def __repr__(self) -> str:
        return f"<RetryBudget tokens={self._tokens:.1f} cap={self._cap:g} ratio={self._ratio:g}>"

    @property
    def tokens(self) -> float:
        """How many retries are paid for now."""
        return self._tokens

    def deposit(self) -> None:
        """Put in what one call pays for."""
        if self._tokens < self._cap:
            self._tokens = min(self._cap, self._tokens + self._ratio)

    def withdraw(self) -> bool:
        """Take out one retry, if one is paid for, and say whether it was."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
