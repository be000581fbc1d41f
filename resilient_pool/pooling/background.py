"""Starts background tasks in an empty context, so that no caller's trace continues in them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TypeVar

T = TypeVar("T")


def begin(
    work: Coroutine[object, object, T], then: Callable[[asyncio.Task[T]], object] | None = None
) -> asyncio.Task[T]:
    """Begin a task in the running event loop, and call `then` with it when it has ended, both in an empty context."""
    context = Context()
    # Not `create_task(context=)`: an application's own task factory need not know it.
    task = context.run(asyncio.get_running_loop().create_task, work)
    # A program that ends without closing its pool is told nothing of what the pool was doing then: it cannot mend it.
    with contextlib.suppress(AttributeError):
        task._log_destroy_pending = False  # type: ignore[attr-defined] # noqa: SLF001
    if then is not None:
        task.add_done_callback(then, context=context)
    return task
