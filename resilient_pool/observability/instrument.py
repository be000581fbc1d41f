"""`Instrument`: an observer that measures a pool as well."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from resilient_pool.events import Event
from resilient_pool.observability.stats import PoolStats


class Instrument(ABC):
    """An observer that measures a pool: it can read its statistics at any time, and is called at the end of each use.

    Give it to a pool among its `observers=`. A pool with such an observer measures every use of a connection, which costs
    it about a microsecond a call; one without does not.
    """

    @abstractmethod
    def __call__(self, event: Event, /) -> None:
        """Take note of `event`, as every observer does."""

    @abstractmethod
    def attach(self, stats: Callable[[], PoolStats]) -> None:
        """Take note of a pool, when it is made.

        Args:
            stats: The pool's `stats` method. Keep it by a `weakref.WeakMethod`, or the pool lives as long as the instrument.
        """

    @abstractmethod
    def enter_background(self) -> None:
        """Set what context variables the pool's background work is to have. Otherwise it has none: no caller's trace goes on in it."""

    def use_begins(self) -> None:
        """Take note that a caller has got a connection. It is called in the caller's context, and must neither block nor raise."""
        return

    @abstractmethod
    def used(self, seconds: float) -> None:
        """Take note that a caller had a connection for so many seconds, from getting it to giving it back.

        It is called in the caller's context, as often as `stats().acquired` counts, and must neither block nor raise.
        """
