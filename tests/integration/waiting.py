"""Waits for what is to happen, with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], object], limit: float = 10.0) -> None:
    """Wait until a condition, plain or awaitable, holds; raise `TimeoutError` after `limit` seconds."""
    async with asyncio.timeout(limit):
        while True:
            answer = condition()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.005)
