"""Prints which files and functions of the package one call goes through: a warm `pool.fetch`, and one that is lost and repeated."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import resilient_pool
from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

PACKAGE = Path(resilient_pool.__file__).parent
TESTING = PACKAGE / "testing"
QUERY = "SELECT 1"
WARM_FILES, WARM_CALLS, REPEATED_FILES, CONNECTING_FILES = 5, 11, 14, 7
"""How many files and functions of the package a call goes through at most, and how many files more to open a connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What ran while a call was awaited, in the order of its first use.

    Attributes:
        calls: How often each function of the package was entered or resumed, by file and qualified name.
    """

    calls: Counter[tuple[str, str]]

    @property
    def files(self) -> tuple[str, ...]:
        """The files, in the order in which they were reached."""
        return tuple(dict.fromkeys(file for file, _ in self.calls))

    @property
    def total(self) -> int:
        """How many calls there were in all."""
        return self.calls.total()

    def __str__(self) -> str:
        lines = []
        for file in self.files:
            functions = [(name, times) for (where, name), times in self.calls.items() if where == file]
            lines.append(f"  {file}: {sum(times for _, times in functions)}")
            lines += [f"    {name}" + (f" x{times}" if times > 1 else "") for name, times in functions]
        return "\n".join(lines)


async def trace(call: Awaitable[object]) -> Trace:
    """Await a call, and record what of the package runs meanwhile in this thread, background tasks included.

    A coroutine counts once, however often it is resumed.
    """
    calls: Counter[tuple[str, str]] = Counter()
    alive: dict[int, FrameType] = {}  # a frame that is referred to is not made anew at the same address

    def record(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event != "call" or PACKAGE not in path.parents or TESTING in path.parents or id(frame) in alive:
            return
        alive[id(frame)] = frame
        calls[path.relative_to(PACKAGE).as_posix(), code.co_qualname] += 1

    sys.setprofile(record)
    try:
        await call
    finally:
        sys.setprofile(None)
    return Trace(calls=calls)


async def measure() -> dict[str, Trace]:
    """Trace a warm call, and two whose answer is lost: another connection is idle then, or has to be opened."""
    traces = {}
    async with EmbeddedPostgres() as postgres, FaultProxy("127.0.0.1", postgres.port) as proxy:
        dsn = proxy.dsn(postgres.dsn())
        async with ResilientPool(dsn) as alone, ResilientPool(dsn) as several:
            await asyncio.gather(*(several.fetch("SELECT pg_sleep(0.2)") for _ in range(3)))
            for pool in (alone, several):
                for _ in range(10):
                    await pool.fetch(QUERY)
            traces["warm"] = await trace(alone.fetch(QUERY))
            for title, pool in (
                ("lost, repeated on an idle connection", several),
                ("lost, repeated on a new connection", alone),
            ):
                proxy.swallow_next_answer(matching=QUERY)
                traces[title] = await trace(pool.fetch(QUERY))
    return traces


def main() -> None:
    """Print all traces, and how many files they go through."""
    for title, found in asyncio.run(measure()).items():
        print(f"a fetch, {title}: {found.total} calls, {len(found.files)} files")
        print(found)


if __name__ == "__main__":
    main()
