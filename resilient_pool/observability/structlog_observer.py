"""Writes events to the log, with structlog or with `logging`; structlog is imported with the first line."""

from __future__ import annotations

import logging
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.events import (
    CallerWaited,
    CircuitOpened,
    ConnectionDiscarded,
    ConnectionOpened,
    DiscardReason,
    Event,
    MigrationLockLost,
    OutcomeUnknown,
    PoolerDetected,
    RetryExhausted,
    RetryScheduled,
    WaitReason,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME = "resilient_pool"

_LEVELS: Mapping[type[Event], int] = {
    ConnectionOpened: logging.DEBUG,
    ConnectionDiscarded: logging.DEBUG,
    CallerWaited: logging.DEBUG,
    RetryScheduled: logging.INFO,
    RetryExhausted: logging.WARNING,
    OutcomeUnknown: logging.WARNING,
    CircuitOpened: logging.WARNING,
    PoolerDetected: logging.WARNING,
    MigrationLockLost: logging.WARNING,
}

# Something outside the pool went wrong; the other reasons are its own housekeeping.
_NOTEWORTHY = frozenset(
    {DiscardReason.STALE, DiscardReason.PING_FAILED, DiscardReason.FAILED, DiscardReason.RESET_FAILED}
)


class Logger(Protocol):
    """What the observer needs of a logger: structlog's bound loggers have it."""

    def log(self, level: int, event: str, /, **fields: object) -> object:
        """Write one event."""
        ...


@constructor_names_nearest
class StructlogObserver:
    """Logs every event under its dotted name, with its attributes as fields.

    Connections opened, and discarded as housekeeping, and callers that had to wait, are logged at DEBUG; retries, connections
    that had died, and callers that waited for a server that was away, at INFO; operations given up, unknown outcomes, a server that is away, poolers and a migration's lost
    lock at WARNING. SQL text and arguments are never logged.

    Args:
        logger: A structlog logger. The default is structlog's logger `resilient_pool` as the application configured
            structlog, or, while it has not, the standard library's logger of that name, with `key=value` lines: an
            application that configured no logging at all then sees nothing below WARNING.
    """

    __slots__ = ("_configured", "_given", "_unconfigured")

    def __init__(self, logger: Logger | None = None) -> None:
        self._given = logger
        self._configured: Logger | None = None
        self._unconfigured: Logger | None = None

    def __call__(self, event: Event, /) -> None:
        """Log `event`."""
        logger = self._given if self._given is not None else self._default()
        logger.log(_level(event), event.name, **_fields(event))

    def _default(self) -> Logger:
        # Asked every time: applications often configure structlog after they made their pool.
        import structlog  # noqa: PLC0415 - importing it takes longer than importing this whole package

        if structlog.is_configured():
            if self._configured is None:
                self._configured = structlog.get_logger(_NAME)
            return self._configured
        if self._unconfigured is None:
            self._unconfigured = structlog.wrap_logger(
                logging.getLogger(_NAME),
                processors=[structlog.stdlib.filter_by_level, structlog.processors.LogfmtRenderer(key_order=["event"])],
                wrapper_class=structlog.stdlib.BoundLogger,
                context_class=dict,
            )
        return self._unconfigured


def _level(event: Event) -> int:
    if isinstance(event, ConnectionDiscarded) and event.reason in _NOTEWORTHY:
        return logging.INFO
    if isinstance(event, CallerWaited) and event.reason is WaitReason.AWAY:
        return logging.INFO
    return _LEVELS.get(type(event), logging.INFO)


def _fields(event: Event) -> dict[str, object]:
    logged = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    if logged.get("error", "") is None:
        del logged["error"]  # most connections that are discarded met none
    return logged


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return round(value, 6)  # microseconds: more digits are noise
    return value
