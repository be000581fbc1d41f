"""The only module that asks the application's classifier, and that survives it."""

from __future__ import annotations

import asyncpg

from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import scrub
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Fault, Outcome, Verdict

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
    """Return the SQLSTATE of what was raised, or of its cause; `None` if the server sent none.

    Not that of an error which the application was handling meanwhile, except behind the driver's `InterfaceError`: that masks a
    loss.
    """
    inner = _DEFAULT.unwrap(failure.error)
    masked = isinstance(inner, asyncpg.InterfaceError)
    told = failure.sqlstates if masked else [getattr(error, "sqlstate", None) for error in (inner, inner.__cause__)]
    return next((state for state in told if isinstance(state, str)), None)
