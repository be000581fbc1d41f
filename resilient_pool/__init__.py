"""An asyncio connection pool for PostgreSQL that finds stale connections before use and repeats only what is safe."""

from typing import TYPE_CHECKING

from resilient_pool._version import __version__
from resilient_pool.connection import ResilientConnection
from resilient_pool.errors import (
    AcquireTimeoutError,
    ConfigurationError,
    MigrationFailedError,
    MigrationLockedError,
    OutcomeUnknownError,
    ResilientPoolError,
    UnknownArgumentError,
)
from resilient_pool.observe.events import Event, Observer
from resilient_pool.observe.log import StructlogObserver
from resilient_pool.observe.stats import PoolStats
from resilient_pool.policy.backoff import BackoffPolicy
from resilient_pool.policy.budget import RetryBudget
from resilient_pool.policy.classifier import PostgresClassifier
from resilient_pool.policy.verdict import Classifier, Disposition, Failure, Fault, Outcome, Phase, Verdict
from resilient_pool.pool import ResilientPool, create_pool
from resilient_pool.transaction import Attempt, RetriedTransaction

if TYPE_CHECKING:
    from resilient_pool.migrate import MigrationResult, run_migration

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
    "MigrationFailedError",
    "MigrationLockedError",
    "MigrationResult",
    "Observer",
    "Outcome",
    "OutcomeUnknownError",
    "Phase",
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
    "create_pool",
    "run_migration",
]


def __getattr__(name: str) -> object:
    # Only deployments need these; an application's start is not to take longer for them.
    if name in ("MigrationResult", "run_migration"):
        from resilient_pool import migrate  # noqa: PLC0415

        return getattr(migrate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
