"""A cancellation at a chosen await."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from functools import partial


class Cut:
    """Awaits a coroutine and cancels the task at one of its suspensions, as it begins or as it ends."""

    def __init__(self, work: Coroutine[object, object, object], *, at: int, late: bool) -> None:
        self._work = work
        self._at = at
        self._late = late
        self.happened = False

    def __await__(self) -> Generator[object, object, object]:
        resume = partial(self._work.send, None)
        for step in range(10_000):
            try:
                awaited = resume()
            except StopIteration as end:
                return end.value
            if step == self._at:
                self._cancel(awaited)
            try:
                yield awaited
            except BaseException as error:
                resume = partial(self._work.throw, error)
            else:
                resume = partial(self._work.send, None)
        raise AssertionError("it never ends")

    def _cancel(self, awaited: object) -> None:
        self.happened = True
        task = asyncio.current_task()
        assert task is not None
        if self._late and isinstance(awaited, asyncio.Future):
            # In the very turn of the loop in which what is awaited has ended: both are on their way to the task.
            awaited.add_done_callback(lambda _: task.cancel())
        else:
            asyncio.get_running_loop().call_soon(task.cancel)
