"""The only module that asks the application's classifier, and that survives it."""

from __future__ import annotations

from resilient_pool.config import PoolConfig
from resilient_pool.observe.redaction import scrub
from resilient_pool.policy.classifier import PostgresClassifier
from resilient_pool.policy.verdict import Failure, Fault, Outcome, Verdict

_DEFAULT = PostgresClassifier()


def judge(config: PoolConfig, failure: Failure) -> Verdict:
    """Ask the classifier what is known about a failure; if it fails itself, nothing is, and the error's notes say so."""
    try:
        return config.classifier.classify(failure)
    except Exception as broken:  # noqa: BLE001 - the application must see its own error, not the classifier's
        reason = scrub(f"{type(broken).__name__}: {broken}", config.secrets())
        failure.error.add_note(f"resilient_pool: not retried, because the classifier failed with {reason}")
        return Verdict(fault=Fault.PERMANENT, outcome=Outcome.UNKNOWN)


def unwrap(config: PoolConfig, error: Exception) -> BaseException:
    """Ask the classifier for the driver's error inside one that wraps it; one that cannot tell gets the default."""
    try:
        find = getattr(config.classifier, "unwrap", _DEFAULT.unwrap)
        inner = find(error)
    except Exception:  # noqa: BLE001 - the application must see its own error, not the classifier's
        return error
    return inner if isinstance(inner, BaseException) else error


def nearest_sqlstate(failure: Failure) -> str | None:
    """Return the nearest SQLSTATE of a failure, or `None` if the server sent none."""
    return next(iter(failure.sqlstates), None)
