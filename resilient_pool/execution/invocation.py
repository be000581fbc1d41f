"""One invocation of a function that is frozen afterwards: it ends in time, and leaves no work of the pool's in flight."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from resilient_pool._validation import require_seconds
from resilient_pool.clock import Clock
from resilient_pool.pooling.circuit_breaker import CircuitBreaker
from resilient_pool.pooling.deadlines import deadline_scope
from resilient_pool.pooling.maintenance import Maintenance

# What is kept back of the time: for cancelling a statement that still runs, and for resetting its connection.
_KEPT_BACK, _LONGEST_KEPT_BACK = 0.1, 1.0
# So much earlier than the block itself end those who only wait: their own error says more than that time is up.
_EARLIER = 0.1


class Invocation:
    """Enter it with `async with` around what one invocation does; see `ResilientPool.invocation`.

    Args:
        circuit_breaker: Whose prober must not go on.
        maintenance: Whose background work is ended.
        clock: Counts the time.
        seconds: The time left; `None` for no limit.
    """

    def __init__(
        self, circuit_breaker: CircuitBreaker, maintenance: Maintenance, clock: Clock, seconds: float | None
    ) -> None:
        require_seconds("deadline", seconds)
        self._circuit_breaker = circuit_breaker
        self._maintenance = maintenance
        self._clock = clock
        self._seconds = seconds
        self._ends: float | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        limit = block = None
        if self._seconds is not None:
            now = self._clock.monotonic()
            self._ends = now + self._seconds
            block = self._seconds - min(self._seconds * _KEPT_BACK, _LONGEST_KEPT_BACK)
            limit = now + max(block - _EARLIER, block / 2)
        self._stack.push_async_callback(self._rest)
        self._timeout = await self._stack.enter_async_context(asyncio.timeout(block))
        self._stack.enter_context(deadline_scope(limit))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return bool(await self._stack.__aexit__(kind, error, traceback))
        except TimeoutError as timeout:
            if not self._timeout.expired() or timeout.args:
                raise
            raise TimeoutError(
                f"the invocation did not end within its {self._seconds:g} s, less what is kept back for leaving no "
                "statement and no reset in flight"
            ) from error

    async def _rest(self) -> None:
        await self._circuit_breaker.wait_until_stopped()
        left = None if self._ends is None else max(self._ends - self._clock.monotonic(), 0.0)
        await self._maintenance.wait_for_background(left)
