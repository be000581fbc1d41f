"""Awaits what the application gives the pool to call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import asyncpg

T = TypeVar("T")


async def answer_of(callback: Awaitable[T], argument: str) -> T:
    """Await the callback that was given as `argument`.

    Raises:
        asyncpg.InterfaceError: It raised a `CancelledError`, of a task of its own say, though it was not cancelled. The pool must not
            take that for the end of its own work.
    """
    try:
        return await callback
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise asyncpg.InterfaceError(f"{argument}= was cancelled") from error
