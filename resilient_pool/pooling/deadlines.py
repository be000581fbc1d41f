"""The deadline of the present context: by when everything in it must have ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_LIMIT: ContextVar[float | None] = ContextVar("resilient_pool_limit", default=None)


def deadline_after(started: float, seconds: float | None) -> float | None:
    """Return the instant `seconds` after `started`, or the limit of the context if that is earlier; `None` for never."""
    limit = _LIMIT.get()
    if seconds is None:
        return limit
    ends = started + seconds
    return ends if limit is None or ends < limit else limit


@contextlib.contextmanager
def deadline_scope(instant: float | None) -> Iterator[None]:
    """Let nothing that begins within have a later deadline than that instant, also in tasks that are started there."""
    outer = _LIMIT.get()
    inner = instant if outer is None or (instant is not None and instant < outer) else outer
    token = _LIMIT.set(inner)
    try:
        yield
    finally:
        _LIMIT.reset(token)
