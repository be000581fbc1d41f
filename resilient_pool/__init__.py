"""An asyncio connection pool for PostgreSQL that finds stale connections before use and repeats only what is safe."""

from typing import TYPE_CHECKING

from resilient_pool._version import __version__
from resilient_pool.errors import (
    AcquireTimeoutError,
    ConfigurationError,
    MigrationFailedError,
    MigrationLockedError,
    OutcomeUnknownError,
    ResilientPoolError,
    UnknownArgumentError,
)
from resilient_pool.events import Event, Observer
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.execution.listener import Listener
from resilient_pool.execution.notifications import Gap, GapReason, Notification
from resilient_pool.execution.transaction import Attempt, RetriedTransaction
from resilient_pool.observability.instrument import Instrument
from resilient_pool.observability.stats import PoolStats
from resilient_pool.observability.structlog_observer import StructlogObserver
from resilient_pool.pool import ResilientPool, create_pool
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.decision import RetryBudget
from resilient_pool.retry.verdict import Classifier, Disposition, Failure, Fault, Outcome, Phase, Verdict
from resilient_pool.single_connection import connect

if TYPE_CHECKING:
    from resilient_pool.migrations.run import MigrationResult, run_migration

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


def __getattr__(name: str) -> object:
    # Only deployments need these; an application's start is not to take longer for them.
    if name in ("MigrationResult", "run_migration"):
        from resilient_pool.migrations import run as migrate  # noqa: PLC0415

        return getattr(migrate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
