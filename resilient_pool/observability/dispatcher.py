"""Hands events to the application's observers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable

from resilient_pool.events import Event, Observer

_LOGGER = logging.getLogger("resilient_pool")


class Dispatcher:
    """Calls every observer with each event, in order. An observer that raises breaks no call.

    It is false when there is no observer: then the caller can leave the event unmade.

    Args:
        observers: What to call.
    """

    __slots__ = ("_observers", "_reported")

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._reported: set[int] = set()

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
                        position, event, TypeError("an observer must not return a coroutine: it is not awaited")
                    )
            except Exception as error:  # noqa: BLE001 - an observer's failure is not the caller's
                self._report(position, event, error)

    def _report(self, position: int, event: Event, error: Exception) -> None:
        # Once: an observer that always fails would otherwise write as much as the pool does.
        if position in self._reported:
            return
        self._reported.add(position)
        _LOGGER.error("an observer failed at %s; its further failures are not reported", event.name, exc_info=error)
