"""The application of the demo: a process of its own that knows nothing of the mistreatment and repeats nothing itself."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import asyncpg

from demo.results import UNANSWERED, Answer
from resilient_pool import ResilientPool

WORKERS = 8
CONNECTIONS = 5
THINK = 0.02
"""Seconds a worker waits between two operations."""
TIMEOUT = 3.0
"""Seconds a statement may take: `command_timeout` of both pools."""
DRAIN = 3.0
"""Seconds granted to operations under way when the application is told to stop."""
PR_SET_PDEATHSIG = 1
"""From Linux's `sys/prctl.h`: the signal to get when the parent dies."""

TABLE = "CREATE TABLE entry (id bigint NOT NULL, note text NOT NULL)"
"""On purpose without a unique constraint: a write that is applied twice must be there to be counted."""
INDEX = "CREATE INDEX ON entry (id)"
READ = "SELECT count(*) FROM entry WHERE id = $1"
PAGE = "SELECT id, note FROM entry ORDER BY id DESC LIMIT 50"
WRITE_ONCE = """\
CREATE FUNCTION write_once(row_id bigint, row_note text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(row_id);
    INSERT INTO entry (id, note) SELECT row_id, row_note WHERE NOT EXISTS (SELECT FROM entry WHERE id = row_id);
END $$"""
"""A write that may run twice, even at once: when a connection breaks, the server may still be busy with the first one.

Without the lock neither of two that overlap would see the other's row. The INSERT sees what was committed when the lock
was granted, since in a function each statement looks at the table anew.
"""
WRITE = "SELECT write_once($1, $2)"
INSERT = "INSERT INTO entry (id, note) VALUES ($1, $2)"

Operation = Callable[[int], Awaitable[object]]


class Pool(Protocol):
    """What the application asks of a pool: the words of `asyncpg.Pool`."""

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Return all rows."""
        ...

    async def fetchval(self, query: str, *args: object) -> object:
        """Return one value."""
        ...

    async def execute(self, query: str, *args: object) -> str:
        """Return the status."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """The four things the application does."""

    pool: Pool
    write_once: Callable[[str, int, str], Awaitable[object]]

    async def read(self, row: int) -> object:
        """Look one row up."""
        return await self.pool.fetchval(READ, max(1, row - WORKERS))

    async def page(self, _row: int) -> object:
        """Show a page of the newest rows."""
        return await self.pool.fetch(PAGE)

    async def write(self, row: int) -> object:
        """Write a row with a statement that changes nothing when it runs twice."""
        return await self.write_once(WRITE, row, "written")

    async def insert(self, row: int) -> object:
        """Write a row with a statement that would write it twice when it ran twice."""
        return await self.pool.execute(INSERT, row, "inserted")

    def rota(self) -> list[tuple[str, Operation, bool]]:
        """List what a worker does in turn: kind, operation, whether it writes."""
        return [
            ("read", self.read, False),
            ("write", self.write, True),
            ("page", self.page, False),
            ("insert", self.insert, True),
        ]


@contextlib.asynccontextmanager
async def plain(dsn: str) -> AsyncIterator[Operations]:
    """Run on `asyncpg.Pool`."""
    pool = await asyncpg.create_pool(
        dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, timeout=TIMEOUT, command_timeout=TIMEOUT
    )
    try:
        yield Operations(pool=pool, write_once=pool.execute)
    finally:
        pool.terminate()


@contextlib.asynccontextmanager
async def resilient(dsn: str) -> AsyncIterator[Operations]:
    """Run on `ResilientPool`: another constructor, and one word on the writes that may safely run twice."""
    pool = ResilientPool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS, timeout=TIMEOUT, command_timeout=TIMEOUT)
    await pool
    try:
        yield Operations(pool=pool, write_once=functools.partial(pool.execute, idempotent=True))
    finally:
        pool.terminate()


POOLS = {"asyncpg.Pool": plain, "ResilientPool": resilient}


class Application:
    """A few workers that read and write without end, and report every answer on standard output.

    Args:
        operations: What to do.
        report: Called with one line of JSON per answer.
    """

    def __init__(self, operations: Operations, report: Callable[[str], None]) -> None:
        self._rota = operations.rota()
        self._report = report
        self._rows = itertools.count(1)
        self._open = asyncio.Event()
        self._open.set()
        self._stopping = False
        self._quiet = asyncio.Event()
        self._busy = 0

    async def run(self, commands: AsyncIterator[str]) -> None:
        """Work until the commands end; then give what is under way a moment, and no more."""
        workers = [asyncio.create_task(self._work(offset)) for offset in range(WORKERS)]
        async for command in commands:
            await self._obey(command)
        self._stopping = True
        self._open.set()
        _, late = await asyncio.wait(workers, timeout=DRAIN)
        for worker in late:
            worker.cancel()
        await asyncio.wait(workers, timeout=1.0)

    async def _obey(self, command: str) -> None:
        if command == "resume":
            self._open.set()
            return
        self._open.clear()
        while self._busy:
            self._quiet.clear()
            await self._quiet.wait()
        self._report(json.dumps({"event": "paused"}))

    async def _work(self, offset: int) -> None:
        for kind, operation, writes in itertools.islice(itertools.cycle(self._rota), offset, None):
            await asyncio.sleep(THINK)
            await self._open.wait()
            if self._stopping:
                return
            self._busy += 1
            try:
                await self._ask(kind, operation, next(self._rows), writes=writes)
            finally:
                self._busy -= 1
                self._quiet.set()

    async def _ask(self, kind: str, operation: Operation, row: int, *, writes: bool) -> None:
        began = time.monotonic()
        error, detail = None, ""
        try:
            await operation(row)
        except asyncio.CancelledError:
            error, detail = UNANSWERED, "no answer when the application ended"
            raise
        except Exception as failure:  # noqa: BLE001  whatever the pool lets through is what the demo counts
            error, detail = type(failure).__name__, str(failure)
        finally:
            answer = Answer(
                kind=kind, row=row if writes else None, began=began, ended=time.monotonic(), error=error, detail=detail
            )
            self._report(answer.to_json())


def _say(line: str) -> None:
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
        _say(json.dumps({"event": "ready"}))
        await Application(operations, _say).run(_lines(reader))
    _say(json.dumps({"event": "ended"}))


def _end_with_the_parent() -> None:
    # The end of standard input tells a running process that its parent is gone; this tells a frozen one too.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Run as told by the lines on standard input: settings first, then `pause` and `resume`; their end is the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    _end_with_the_parent()
    with contextlib.suppress(BrokenPipeError):  # nobody is listening any more
        asyncio.run(_main())
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)  # a connection that never answers must not hold the process


if __name__ == "__main__":
    main()
