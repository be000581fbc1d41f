"""The application of the demo: a process of its own that knows nothing of the faults and repeats nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from demo.results import UNANSWERED, Answer
from demo.workload import Operations, resilient_operations
from resilient_pool import ResilientPool

WORKERS = 8
CONNECTIONS = 5
THINK = 0.02
"""Seconds a worker waits between two operations."""
TIMEOUT = 3.0
"""Seconds a statement may take: `command_timeout` of both pools."""
DRAIN = 3.0
"""Seconds granted to operations in flight when the application is to stop."""
PR_SET_PDEATHSIG = 1
"""From Linux's `sys/prctl.h`: the signal to get when the parent dies."""

Operation = Callable[[int], Awaitable[object]]


@contextlib.asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Operations]:
    """Run on `asyncpg.Pool`."""
    pool = await asyncpg.create_pool(
        dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, timeout=TIMEOUT, command_timeout=TIMEOUT
    )
    try:
        yield Operations(pool=pool, execute_idempotent=pool.execute)
    finally:
        pool.terminate()


@contextlib.asynccontextmanager
async def resilient(dsn: str) -> AsyncIterator[Operations]:
    """Run on `ResilientPool`: another constructor, and one argument on the writes that may safely run twice."""
    pool = ResilientPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, timeout=TIMEOUT, command_timeout=TIMEOUT)
    await pool
    try:
        yield resilient_operations(pool)
    finally:
        pool.terminate()


POOLS = {"asyncpg.Pool": plain, "ResilientPool": resilient}


class Application:
    """Workers that read and write in a loop, and report every answer on standard output.

    Args:
        operations: What to do.
        report: Called with one line of JSON per answer.
    """

    def __init__(self, operations: Operations, report: Callable[[str], None]) -> None:
        self._rota: list[tuple[str, Operation, bool]] = [  # kind, operation, whether it writes
            ("read", lambda row: operations.read(max(1, row - WORKERS)), False),
            ("write", operations.write, True),
            ("page", lambda _: operations.page(), False),
            ("insert", operations.insert, True),
        ]
        self._report = report
        self._rows = itertools.count(1)
        self._running = asyncio.Event()
        self._running.set()
        self._stopping = False
        self._idle = asyncio.Event()
        self._busy = 0

    async def run(self, commands: AsyncIterator[str]) -> None:
        """Work until the commands end; then wait for operations in flight, for a limited time."""
        workers = [asyncio.create_task(self._work(offset)) for offset in range(WORKERS)]
        async for command in commands:
            await self._execute_command(command)
        self._stopping = True
        self._running.set()
        _, late = await asyncio.wait(workers, timeout=DRAIN)
        for worker in late:
            worker.cancel()
        await asyncio.wait(workers, timeout=1.0)

    async def _execute_command(self, command: str) -> None:
        if command == "resume":
            self._running.set()
            return
        self._running.clear()
        while self._busy:
            self._idle.clear()
            await self._idle.wait()
        self._report(json.dumps({"event": "paused"}))

    async def _work(self, offset: int) -> None:
        for kind, operation, writes in itertools.islice(itertools.cycle(self._rota), offset, None):
            await asyncio.sleep(THINK)
            await self._running.wait()
            if self._stopping:
                return
            self._busy += 1
            try:
                await self._run_operation(kind, operation, next(self._rows), writes=writes)
            finally:
                self._busy -= 1
                self._idle.set()

    async def _run_operation(self, kind: str, operation: Operation, row: int, *, writes: bool) -> None:
        began = time.monotonic()
        error, detail = None, ""
        try:
            await operation(row)
        except asyncio.CancelledError:
            error, detail = UNANSWERED, "no answer when the application ended"
            raise
        except Exception as failure:  # noqa: BLE001  every error that the pool lets through is counted
            error, detail = type(failure).__name__, str(failure)
        finally:
            answer = Answer(
                kind=kind, row=row if writes else None, began=began, ended=time.monotonic(), error=error, detail=detail
            )
            self._report(answer.to_json())


def _write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    while line := await reader.readline():
        yield line.decode().strip()


async def _main() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    settings = json.loads(await reader.readline())
    async with POOLS[settings["pool"]](settings["dsn"]) as operations:
        _write_line(json.dumps({"event": "ready"}))
        await Application(operations, _write_line).run(_lines(reader))
    _write_line(json.dumps({"event": "ended"}))


def _end_with_the_parent() -> None:
    # A running process sees the end of standard input when its parent is gone; a frozen one does not.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Run the commands on standard input: settings first, then `pause` and `resume`; end of file ends the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    _end_with_the_parent()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        asyncio.run(_main())
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)  # a connection that never answers must not hold the process


if __name__ == "__main__":
    main()
