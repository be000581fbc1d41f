"""What the parts of one pool share: configuration, clock, counters, observers, the application's classifier, background tasks."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context
from dataclasses import dataclass, field
from typing import TypeVar

import asyncpg

from resilient_pool.clock import Clock
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import scrub
from resilient_pool.events import Event, Observer, RetryScheduled
from resilient_pool.observability.instrument import Instrument
from resilient_pool.observability.stats import Counters
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Fault, Outcome, Verdict

T = TypeVar("T")

_LOGGER = logging.getLogger("resilient_pool")
_DEFAULT = PostgresClassifier()
# What breaks an observer, and not its caller. A call that cannot wait cannot be cancelled either: the second is of a task it looked at.
_FAILURES = (Exception, asyncio.CancelledError)


class Dispatcher:
    """Calls every observer with each event, in order, and every instrument with each use. One that raises breaks no call.

    It is false when there is no observer: then the caller can leave the event unmade.

    Attributes:
        instruments: Those of the observers that measure uses.
    """

    __slots__ = ("_observers", "_reported", "instruments")

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._reported: set[int] = set()
        self.instruments = tuple(observer for observer in self._observers if isinstance(observer, Instrument))

    def __bool__(self) -> bool:
        return bool(self._observers)

    def emit(self, event: Event) -> None:
        """Hand `event` to every observer; an observer's exception is logged, once for each observer, and forgotten."""
        for position, observer in enumerate(self._observers):
            try:
                returned: object = observer(event)  # type: ignore[func-returns-value]
                if returned is not None and inspect.iscoroutine(returned):
                    returned.close()
                    self._report(
                        position, event.name, TypeError("an observer must not return a coroutine: it is not awaited")
                    )
            except _FAILURES as error:
                self._report(position, event.name, error)

    def emit_use_begin(self) -> None:
        """Let every instrument know that a use begins."""
        for instrument in self.instruments:
            try:
                instrument.use_begins()
            except _FAILURES as error:
                self._report(self._observers.index(instrument), "the beginning of a use", error)

    def emit_use(self, seconds: float) -> None:
        """Hand the duration of a use to every instrument."""
        for instrument in self.instruments:
            try:
                instrument.used(seconds)
            except _FAILURES as error:
                self._report(self._observers.index(instrument), "the end of a use", error)

    def _report(self, position: int, name: str, error: BaseException) -> None:
        # Once: an observer that always fails would otherwise write as much as the pool does.
        if position in self._reported:
            return
        self._reported.add(position)
        _LOGGER.error("an observer failed at %s; its further failures are not reported", name, exc_info=error)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolContext:
    """What every part of one pool is given.

    Attributes:
        config: The pool's arguments, checked.
        clock: Measures time and waits.
        counters: The running totals behind `pool.stats()`.
        events: Hands events to the application's observers.
        background: What background work begins in a copy of. It is no caller's context: no caller's trace goes on there.
    """

    config: PoolConfig
    clock: Clock
    counters: Counters
    events: Dispatcher
    background: Context = field(default_factory=Context)

    def __post_init__(self) -> None:
        for instrument in self.events.instruments:
            self.background.run(instrument.enter_background)

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

    def begin(
        self, work: Coroutine[object, object, T], then: Callable[[asyncio.Task[T]], object] | None = None
    ) -> asyncio.Task[T]:
        """Begin a task in the running event loop, and call `then` with it when it has ended, both in a context of their own."""
        context = self.background.copy()
        # Not `create_task(context=)`: an application's own task factory need not know it.
        task = context.run(asyncio.get_running_loop().create_task, work)
        # A program that ends without closing its pool is told nothing of what the pool was doing then: it cannot mend it.
        with contextlib.suppress(AttributeError):
            task._log_destroy_pending = False  # type: ignore[attr-defined] # noqa: SLF001
        if then is not None:
            task.add_done_callback(then, context=context)
        return task


def nearest_sqlstate(failure: Failure) -> str | None:
    """Return the SQLSTATE of what was raised, or of its cause; `None` if the server sent none.

    Not that of an error which the application was handling meanwhile, except behind the driver's `InterfaceError`: that masks a
    loss.
    """
    inner = _DEFAULT.unwrap(failure.error)
    masked = isinstance(inner, asyncpg.InterfaceError)
    states = failure.sqlstates if masked else [getattr(error, "sqlstate", None) for error in (inner, inner.__cause__)]
    return next((state for state in states if isinstance(state, str)), None)
