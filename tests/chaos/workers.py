"""The workers: they call the pool in a loop and log every outcome. The basic operations are those of the demo."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from itertools import cycle

import asyncpg
from call_log import CallLog, Promise, TracedWrite

from demo.ledger import Outcome
from demo.workload import READ, resilient_operations
from resilient_pool import OutcomeUnknownError, ResilientConnection, ResilientPool

LIMIT = 20.0
"""Seconds that any one call, or closing the pool, may take before it counts as hung."""
THINK = 0.008
"""Seconds a worker waits between two calls, at most."""
ROUNDS = 3
"""How often each worker makes each of its calls, at least."""
PAGE_ROWS = 200

INSERT_WITH_OTHERS = "INSERT INTO entry VALUES ($1, 'with others')"
INSERT_RETURNING = "INSERT INTO entry VALUES ($1, 'returning') RETURNING id"
# The same as the function `write_once`, as one text without arguments: a simple query, whose statements are one
# transaction. The lock is taken by a statement of its own, so that the INSERT has a snapshot from after the wait.
WRITE_ONCE_TEXT = """
    SELECT pg_advisory_xact_lock({id});
    INSERT INTO entry SELECT {id}, 'text' WHERE NOT EXISTS (SELECT FROM entry WHERE id = {id})
"""

_WRITING: ContextVar[TracedWrite] = ContextVar("writing")


class _Always(set[object]):
    """Makes the driver time every query, with or without query loggers."""

    def __bool__(self) -> bool:
        return True


class CommitClock(asyncpg.Connection):
    """A connection that logs when a COMMIT is sent, and whether its answer came."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._query_loggers = _Always()

    @contextlib.contextmanager
    def _time_and_log(self, query: str, args: object, timeout: object) -> Iterator[None]:
        # The pool's own statements bypass an application's `execute`, but not this.
        write = _WRITING.get(None) if query == "COMMIT" else None
        if write is not None:
            write.commit_sent = time.monotonic()
        try:
            yield
        finally:
            if write is not None and not self.is_closed():
                write.commit_sent = None


class Worker:
    """Reads and writes in a loop, and logs every outcome."""

    def __init__(self, pool: ResilientPool, call_log: CallLog, number: int, seed: int) -> None:
        self._pool = pool
        self._operations = resilient_operations(pool)
        self._log = call_log
        self._random = random.Random(f"{seed}/{number}")
        self._ids = iter(range(number * 1_000_000_000 + 1, (number + 1) * 1_000_000_000))
        self._acknowledged: list[int] = []
        self._current: tuple[str, float] | None = None

    async def run(self, over: asyncio.Event) -> None:
        """Call the pool until `over` is set, and on a slow machine until each call was made `ROUNDS` times."""
        calls = [
            self._insert, self._read_count, self._transaction_loop, self._write_by_text, self._page, self._exactly_once,
            self._read_count_by_row, self._transaction_callback, self._write_by_function, self._read_count_in_transaction,
        ]  # fmt: skip
        start = self._random.randrange(len(calls))
        for number, call in enumerate(cycle(calls[start:] + calls[:start])):
            if over.is_set() and number >= ROUNDS * len(calls):
                return
            await asyncio.sleep(self._random.random() * THINK)
            await self._time(call)

    def describe(self) -> str:
        """Describe the call it is waiting for."""
        name, began = self._current or ("nothing", time.monotonic())
        return f"{name} for {time.monotonic() - began:.1f} s"

    async def _time(self, call: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        self._current = call.__name__, began
        await call()
        self._current = None
        taken = time.monotonic() - began
        self._log.slowest = max(self._log.slowest, taken)
        if taken > LIMIT:
            self._log.hung.append(f"{call.__name__} took {taken:.1f} s")

    async def _insert(self) -> None:
        await self._write(self._operations.insert, Promise.PLAIN)

    async def _write_by_text(self) -> None:
        await self._write(
            lambda number: self._pool.execute(WRITE_ONCE_TEXT.format(id=number), idempotent=True), Promise.REPEATABLE
        )

    async def _write_by_function(self) -> None:
        await self._write(self._operations.write, Promise.REPEATABLE)

    async def _exactly_once(self) -> None:
        async def write(number: int) -> None:
            self._compare(number, await self._pool.fetchval(INSERT_RETURNING, number, exactly_once=True))

        await self._write(write, Promise.RESOLVED)

    async def _transaction_loop(self) -> None:
        async def write(number: int) -> None:
            async for attempt in self._pool.transaction():
                async with attempt as connection:
                    await connection.execute(INSERT_WITH_OTHERS, number)
                    await connection.execute(INSERT_WITH_OTHERS, -number)

        await self._write(write, Promise.RESOLVED, mirrored=True)

    async def _transaction_callback(self) -> None:
        async def insert(connection: ResilientConnection, number: int) -> object:
            await connection.fetchval(INSERT_RETURNING, -number)
            return await connection.fetchval(INSERT_RETURNING, number)

        async def write(number: int) -> None:
            self._compare(number, await self._pool.run_in_transaction(insert, number))

        await self._write(write, Promise.RESOLVED, mirrored=True)

    def _compare(self, number: int, answer: object) -> None:
        if answer != number:
            self._log.wrong.append(f"the id of {number}: {answer!r}")

    async def _write(
        self, call: Callable[[int], Awaitable[object]], promise: Promise, *, mirrored: bool = False
    ) -> None:
        number = next(self._ids)
        write = self._log.writes[number] = TracedWrite(promise=promise, mirrored=mirrored)
        token = _WRITING.set(write)
        try:
            await call(number)
        except OutcomeUnknownError as error:
            write.outcome, write.error, write.xid = Outcome.UNKNOWN, _describe(error, number), error.xid
        except Exception as error:
            write.outcome, write.error = Outcome.FAILED, _describe(error, number)
        else:
            write.outcome = Outcome.DONE
            self._acknowledged.append(number)
        finally:
            write.ended = time.monotonic()
            _WRITING.reset(token)

    async def _read_count(self) -> None:
        await self._check_count(self._operations.read)

    async def _read_count_by_row(self) -> None:
        async def count(number: int) -> object:
            row = await self._pool.fetchrow(READ, number)
            return row["count"]

        await self._check_count(count)

    async def _read_count_in_transaction(self) -> None:
        async def count(connection: ResilientConnection, number: int) -> object:
            return await connection.fetchval(READ, number)

        await self._check_count(lambda number: self._pool.run_in_transaction(count, number, readonly=True))

    async def _check_count(self, count: Callable[[int], Awaitable[object]]) -> None:
        if self._acknowledged:
            number = self._random.choice(self._acknowledged[-20:])
            await self._read(lambda: count(number), lambda times: times == 1, f"the count of {number}")

    async def _page(self) -> None:
        def complete(rows) -> bool:
            ids = [row["id"] for row in rows]
            return ids == sorted(ids, reverse=True) and len(ids) >= least

        least = min(PAGE_ROWS, len(self._acknowledged))
        await self._read(lambda: self._operations.page(PAGE_ROWS), complete, "the newest rows")

    async def _read(self, read: Callable[[], Awaitable[object]], is_right: Callable[..., bool], what: str) -> None:
        try:
            answer = await read()
        except Exception as error:
            self._log.read_errors.append(_describe(error, what))
            return
        self._log.reads += 1
        if not is_right(answer):
            self._log.wrong.append(f"{what}: {answer!r}"[:500])


def _describe(error: Exception, what: object) -> str:
    notes = "; ".join(getattr(error, "__notes__", []))
    cause = "" if error.__cause__ is None else f" from {error.__cause__!r}"
    return f"{what}: {error!r}{cause} {notes}".rstrip()
