"""Whether, and when, a failed call is tried again: `decide`, and what retries may add to a failing server's load: `RetryBudget`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import inf

from resilient_pool._validation import constructor_names_nearest, require_number
from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.backoff import OPERATION_BACKOFF, RECONNECT_BACKOFF, BackoffPolicy
from resilient_pool.retry.verdict import Fault, Outcome, Phase, Verdict

_AWAY = frozenset({Fault.UNREACHABLE, Fault.WRONG_SERVER})
_CURED_BY_A_FRESH_START = frozenset({Fault.STALE, Fault.STATEMENT_CACHE, Fault.DISCONNECTED, Fault.POISONED})
_LOSSES = frozenset({Fault.DISCONNECTED, Fault.POISONED})


class GiveUpReason(Enum):
    """Why a call is not tried again."""

    PERMANENT = "permanent"
    """Neither waiting nor reconnecting helps."""
    OUTCOME_UNKNOWN = "outcome_unknown"
    """It may have taken effect, and repeating it could do harm."""
    ATTEMPTS = "attempts"
    """It was tried as often as the policy allows."""
    DEADLINE = "deadline"
    """No time is left: neither before the call's deadline nor, if that ends earlier, of the policy's `max_elapsed`."""
    ABSENT = "absent"
    """No connection could be opened for as long as one was waited for."""
    BUDGET = "budget"
    """The server is up but failing, and the retries it can bear are spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Try again.

    Attributes:
        delay: How long to wait before, in seconds.
    """

    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Let the error go to the caller."""

    reason: GiveUpReason


@constructor_names_nearest
class RetryBudget:
    """A bucket of tokens: every call puts a little in, every retry takes one out.

    Args:
        ratio: How many retries each call pays for, a ratio. Default 0.1: one retry for ten calls.
        reserve: How many retries are paid for at the start. Default 10.
        cap: How many retries can be saved up at most. Default 100.

    Attributes:
        calls: How many calls were made since the tokens were counted last. The caller adds to it: this is on the hot path.

    Raises:
        ConfigurationError: A number is negative, or `cap` is less than `reserve` or than one retry.
    """

    __slots__ = ("_cap", "_ratio", "_tokens", "calls")

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
        self.calls = 0

    def __repr__(self) -> str:
        return f"<RetryBudget tokens={self.tokens:.1f} cap={self._cap:g} ratio={self._ratio:g}>"

    @property
    def tokens(self) -> float:
        """How many retries are paid for now."""
        # Nothing was taken out since the last time, so it makes no difference that the calls pay together.
        calls, self.calls = self.calls, 0
        self._tokens = min(self._cap, self._tokens + calls * self._ratio)
        return self._tokens

    def withdraw(self) -> bool:
        """Take out one retry, if one is paid for, and say whether it was."""
        if self.tokens < 1:
            return False
        self._tokens -= 1
        return True


class _Course:
    """How far one call has come under one policy."""

    __slots__ = ("attempts", "delays", "policy", "since")

    def __init__(self, policy: BackoffPolicy) -> None:
        self.policy = policy
        self.attempts = 0
        self.since = 0.0
        self.delays: Iterator[float] | None = None

    def count(self, now: float) -> None:
        if not self.attempts:
            self.since = now
        self.attempts += 1

    def next_delay(self) -> float:
        if self.delays is None:
            self.delays = self.policy.delays()
        return next(self.delays)

    @property
    def is_exhausted(self) -> bool:
        most = self.policy.max_attempts
        return most is not None and self.attempts >= most

    def time_left(self, now: float, deadline: float | None) -> float | None:
        ends = [] if deadline is None else [deadline]
        if self.policy.max_elapsed is not None:
            ends.append(self.since + self.policy.max_elapsed)
        return min(ends) - now if ends else None


class RetryState:
    """What one call remembers of its failures. One per call, made at its start or at its first failure.

    Args:
        operations: The policy for a failing operation.
        reconnect: The policy for an absent server.
        contention: The policy for conflicts with other transactions; by default the one for failing operations.
        started: When the call began, in seconds on the line of the `now` that `decide` is given.
    """

    __slots__ = ("_contention", "_doubted_since", "_operations", "_reconnect", "fresh_starts", "losses", "started")

    def __init__(
        self,
        *,
        operations: BackoffPolicy = OPERATION_BACKOFF,
        reconnect: BackoffPolicy = RECONNECT_BACKOFF,
        contention: BackoffPolicy | None = None,
        started: float = 0.0,
    ) -> None:
        self._operations = _Course(operations)
        self._contention = self._operations if contention is None else _Course(contention)
        self._reconnect = _Course(reconnect)
        self._doubted_since: float | None = None
        self.started = started
        self.fresh_starts = 0
        self.losses = 0

    @property
    def attempts(self) -> int:
        """How many attempts have failed, under all policies."""
        conflicts = 0 if self._contention is self._operations else self._contention.attempts
        return self._operations.attempts + self._reconnect.attempts + conflicts

    def elapsed(self, now: float) -> float:
        """Return how long the call has lasted, in seconds."""
        return now - self.started

    def note(self, fault: Fault, phase: Phase, now: float) -> _Course:
        """Count one failure and return the course that it belongs to."""
        away = fault in _AWAY or (fault is Fault.OVERLOADED and phase is Phase.CONNECT)
        conflict = self._contention if fault is Fault.CONTENTION else self._operations
        course = self._reconnect if away else conflict
        course.count(now)
        self.fresh_starts += fault in _CURED_BY_A_FRESH_START
        self.losses += fault in _LOSSES
        return course

    def hope_left(self, verdict: Verdict, now: float) -> float:
        """Take note of a verdict, and return for how many seconds there is hope that what it stands for passes."""
        if verdict.only_for is None:
            return inf
        if self._doubted_since is None:
            self._doubted_since = now
        return self._doubted_since + verdict.only_for - now


def decide(
    verdict: Verdict,
    state: RetryState,
    *,
    phase: Phase,
    repeatable: bool,
    now: float,
    deadline: float | None,
    budget: RetryBudget | None,
    had_served: bool = True,
) -> Retry | GiveUp:
    """Count one failure in `state` and say what follows from it.

    Args:
        verdict: What is known about the failure.
        state: The call's memory. It is changed.
        phase: What the pool was doing; a server that cannot take another connection is waited for as an absent one is.
        repeatable: Whether the call may run twice without harm.
        now: The present instant, in seconds.
        deadline: The instant at which the last attempt may start, on the same line, or `None` for no bound.
        budget: Is asked for a token only while the server is up and failing; `None` for no bound.
        had_served: Whether the connection had worked before. A server that restarts takes such connections along; one
            that loses others too is up and failing.

    Returns:
        `Retry` with a delay that does not outlast the deadline, or `GiveUp`. A call that may have taken effect is
        never retried unless it is repeatable, and none before the verdict's `not_before`: a call that must end sooner ends
        at once.
    """
    course, hope = state.note(verdict.fault, phase, now), state.hope_left(verdict, now)
    if verdict.fault is Fault.PERMANENT or hope <= 0:
        return GiveUp(reason=GiveUpReason.PERMANENT)
    if verdict.outcome is Outcome.UNKNOWN and not repeatable:
        return GiveUp(reason=GiveUpReason.OUTCOME_UNKNOWN)
    if course.is_exhausted:
        return GiveUp(reason=GiveUpReason.ATTEMPTS)
    left = course.time_left(now, deadline)
    earliest = verdict.not_before or 0.0
    if left is not None and left <= earliest:
        return GiveUp(reason=GiveUpReason.DEADLINE)
    burdens = _burdens_the_server(verdict.fault, state, had_served=had_served)
    if burdens and budget is not None and not budget.withdraw():
        return GiveUp(reason=GiveUpReason.BUDGET)
    delay = 0.0 if _is_cured_at_once(verdict.fault, state) else course.next_delay()
    return Retry(delay=max(min(delay, hope, inf if left is None else left), earliest))


def _burdens_the_server(fault: Fault, state: RetryState, *, had_served: bool) -> bool:
    return fault is Fault.OVERLOADED or (fault in _LOSSES and (state.losses > 1 or not had_served))


def _is_cured_at_once(fault: Fault, state: RetryState) -> bool:
    # A fresh connection is the cure. When that one fails as well, it is not.
    return fault in _CURED_BY_A_FRESH_START and state.fresh_starts == 1
