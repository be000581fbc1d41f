"""An asyncio connection pool for PostgreSQL that finds stale connections before use and repeats only what is safe."""

from importlib import import_module
from typing import TYPE_CHECKING

from resilient_pool._version import __version__

if TYPE_CHECKING:
    from resilient_pool.errors import (
        AcquireTimeoutError,
        ConfigurationError,
        MigrationFailedError,
        MigrationLockedError,
        OutcomeUnknownError,
        PoolOverloadedError,
        ResilientPoolError,
        UnknownArgumentError,
    )
    from resilient_pool.events import Event, Observer
    from resilient_pool.execution.connection import ResilientConnection
    from resilient_pool.execution.listener import Listener
    from resilient_pool.execution.notifications import Gap, GapReason, Notification
    from resilient_pool.execution.transaction import Attempt, RetriedTransaction
    from resilient_pool.migrations.run import MigrationResult, run_migration
    from resilient_pool.observability.instrument import Instrument
    from resilient_pool.observability.stats import PoolStats
    from resilient_pool.observability.structlog_observer import StructlogObserver
    from resilient_pool.pool import ResilientPool, create_pool
    from resilient_pool.retry.backoff import BackoffPolicy
    from resilient_pool.retry.classifier import PostgresClassifier
    from resilient_pool.retry.decision import RetryBudget
    from resilient_pool.retry.verdict import Classifier, Disposition, Failure, Fault, Outcome, Phase, Verdict
    from resilient_pool.single_connection import connect

__all__ = [
    "AcquireTimeoutError",
    "Attempt",
    "BackoffPolicy",
    "Classifier",
    "ConfigurationError",
    "Disposition",
    "Event",
    "Failure",
    "Fault",
    "Gap",
    "GapReason",
    "Instrument",
    "Listener",
    "MigrationFailedError",
    "MigrationLockedError",
    "MigrationResult",
    "Notification",
    "Observer",
    "Outcome",
    "OutcomeUnknownError",
    "Phase",
    "PoolOverloadedError",
    "PoolStats",
    "PostgresClassifier",
    "ResilientConnection",
    "ResilientPool",
    "ResilientPoolError",
    "RetriedTransaction",
    "RetryBudget",
    "StructlogObserver",
    "UnknownArgumentError",
    "Verdict",
    "__version__",
    "connect",
    "create_pool",
    "run_migration",
]

_HOMES = {
    "errors": "AcquireTimeoutError ConfigurationError MigrationFailedError MigrationLockedError OutcomeUnknownError "
    "PoolOverloadedError ResilientPoolError UnknownArgumentError",
    "events": "Event Observer",
    "execution.connection": "ResilientConnection",
    "execution.listener": "Listener",
    "execution.notifications": "Gap GapReason Notification",
    "execution.transaction": "Attempt RetriedTransaction",
    "migrations.run": "MigrationResult run_migration",
    "observability.instrument": "Instrument",
    "observability.stats": "PoolStats",
    "observability.structlog_observer": "StructlogObserver",
    "pool": "ResilientPool create_pool",
    "retry.backoff": "BackoffPolicy",
    "retry.classifier": "PostgresClassifier",
    "retry.decision": "RetryBudget",
    "retry.verdict": "Classifier Disposition Failure Fault Outcome Phase Verdict",
    "single_connection": "connect",
}
_HOME = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names.split()}
_MODULES = ("events", "profiles")


def __getattr__(name: str) -> object:
    # A module is loaded when something of it is asked for: neither every test run of a project that this is installed in, for the
    # sake of pytest's plugin, nor an application that runs no migrations has to load it all.
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
