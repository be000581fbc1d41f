"""What the parts of one pool share: configuration, clock, counters, events, and the application's classifier."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from resilient_pool.clock import Clock
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import scrub
from resilient_pool.events import RetryScheduled
from resilient_pool.observability.dispatcher import Dispatcher
from resilient_pool.observability.stats import Counters
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Fault, Outcome, Verdict

_DEFAULT = PostgresClassifier()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolContext:
    """What every part of one pool is given.

    Attributes:
        config: The pool's arguments, checked.
        clock: Measures time and waits.
        counters: The running totals behind `pool.stats()`.
        events: Hands events to the application's observers.
    """

    config: PoolConfig
    clock: Clock
    counters: Counters
    events: Dispatcher

    def classify(self, failure: Failure) -> Verdict:
        """Ask the application's classifier what is known about a failure.

        If the classifier itself raises, nothing is known: the failure is permanent, its outcome unknown, and a note of its
        error says why.
        """
        try:
            return self.config.classifier.classify(failure)
        except Exception as broken:  # noqa: BLE001 - the application must see its own error, not the classifier's
            reason = scrub(f"{type(broken).__name__}: {broken}", self.config.secrets())
            failure.error.add_note(f"resilient_pool: not retried, because the classifier failed with {reason}")
            return Verdict(fault=Fault.PERMANENT, outcome=Outcome.UNKNOWN)

    def unwrap(self, error: Exception) -> BaseException:
        """Return the driver's error inside one that wraps it, as the classifier sees it; a classifier without `unwrap` gets ours."""
        try:
            inner = getattr(self.config.classifier, "unwrap", _DEFAULT.unwrap)(error)
        except Exception:  # noqa: BLE001 - the application must see its own error, not the classifier's
            return error
        return inner if isinstance(inner, BaseException) else error

    def retry_scheduled(self, scheduled: RetryScheduled) -> None:
        """Count a further attempt, and emit its event."""
        self.counters.retries[scheduled.fault] += 1
        self.events.emit(scheduled)


def nearest_sqlstate(failure: Failure) -> str | None:
    """Return the SQLSTATE of what was raised, or of its cause; `None` if the server sent none.

    Not that of an error which the application was handling meanwhile, except behind the driver's `InterfaceError`: that masks a
    loss.
    """
    inner = _DEFAULT.unwrap(failure.error)
    masked = isinstance(inner, asyncpg.InterfaceError)
    states = failure.sqlstates if masked else [getattr(error, "sqlstate", None) for error in (inner, inner.__cause__)]
    return next((state for state in states if isinstance(state, str)), None)
