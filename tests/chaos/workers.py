"""Those who use the pool, and write down what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from itertools import cycle

import asyncpg
from book import Book, Entry, Promise, Told

from resilient_pool import OutcomeUnknownError, ResilientConnection, ResilientPool

LIMIT = 20.0
"""Seconds that any one call, or closing the pool, may take before it counts as hung."""
THINK = 0.008
"""Seconds a worker waits between two calls, at most."""
ROUNDS = 3
"""How often each worker makes each of its calls, at least."""
PAGE = 200

SCHEMA = """
    CREATE TABLE ledger (id bigint NOT NULL, note text NOT NULL);  -- no constraint: a row written twice must be there twice
    CREATE INDEX ON ledger (id);
    CREATE FUNCTION enter_once(entry bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock(entry);
        INSERT INTO ledger SELECT entry, 'function' WHERE NOT EXISTS (SELECT FROM ledger WHERE id = entry);
    END $$;
"""
INSERT = "INSERT INTO ledger VALUES ($1, 'plain')"
INSERT_WITH_OTHERS = "INSERT INTO ledger VALUES ($1, 'with others')"
INSERT_RETURNING = "INSERT INTO ledger VALUES ($1, 'returning') RETURNING id"
# While a repetition runs, the server may still be at work on the first run, whose client is gone: NOT EXISTS would see
# nothing and both would insert. So each waits for the other. The lock must be taken by a statement of its own: one that
# waited for it in a CTE would go on with a snapshot from before. In one text without arguments both statements are one
# transaction; so they are inside a volatile function.
ENTER_ONCE = """
    SELECT pg_advisory_xact_lock({id});
    INSERT INTO ledger SELECT {id}, 'text' WHERE NOT EXISTS (SELECT FROM ledger WHERE id = {id})
"""
FUNCTION = "SELECT enter_once($1)"
COUNT = "SELECT count(*) FROM ledger WHERE id = $1"
NEWEST = f"SELECT id, note FROM ledger ORDER BY id DESC LIMIT {PAGE}"


_WRITING: ContextVar[Entry] = ContextVar("writing")


class _Always(set[object]):
    """Lets the driver time every query, whether or not anything is told of it."""

    def __bool__(self) -> bool:
        return True


class CommitClock(asyncpg.Connection):
    """A connection that notes in the book when a COMMIT is sent, and that its answer came."""

    __slots__ = ()

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._query_loggers = _Always()

    @contextlib.contextmanager
    def _time_and_log(self, query: str, args: object, timeout: object) -> Iterator[None]:
        # The pool sends its own statements past an application's `execute`, but not past this.
        entry = _WRITING.get(None) if query == "COMMIT" else None
        if entry is not None:
            entry.commit_sent = time.monotonic()
        try:
            yield
        finally:
            if entry is not None and not self.is_closed():
                entry.commit_sent = None


class Worker:
    """Reads and writes, and writes down what it was told."""

    def __init__(self, pool: ResilientPool, book: Book, number: int, seed: int) -> None:
        self._pool = pool
        self._book = book
        self._chance = random.Random(f"{seed}/{number}")
        self._ids = iter(range(number * 1_000_000_000 + 1, (number + 1) * 1_000_000_000))
        self._acknowledged: list[int] = []
        self._asked: tuple[str, float] | None = None

    async def run(self, over: asyncio.Event) -> None:
        """Call the pool until it is over, and on a slow machine until each call was made `ROUNDS` times."""
        calls = [
            self._insert, self._count, self._loop, self._enter, self._newest, self._exactly_once,
            self._count_by_row, self._callback, self._enter_by_function, self._count_in_transaction,
        ]  # fmt: skip
        start = self._chance.randrange(len(calls))
        for number, call in enumerate(cycle(calls[start:] + calls[:start])):
            if over.is_set() and number >= ROUNDS * len(calls):
                return
            await asyncio.sleep(self._chance.random() * THINK)
            await self._timed(call)

    def describe(self) -> str:
        """Tell what it is waiting for."""
        name, began = self._asked or ("nothing", time.monotonic())
        return f"{name} for {time.monotonic() - began:.1f} s"

    async def _timed(self, call: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        self._asked = call.__name__, began
        await call()
        self._asked = None
        taken = time.monotonic() - began
        self._book.slowest = max(self._book.slowest, taken)
        if taken > LIMIT:
            self._book.hung.append(f"{call.__name__} took {taken:.1f} s")

    async def _insert(self) -> None:
        await self._write(lambda number: self._pool.execute(INSERT, number), Promise.PLAIN)

    async def _enter(self) -> None:
        await self._write(
            lambda number: self._pool.execute(ENTER_ONCE.format(id=number), idempotent=True), Promise.REPEATABLE
        )

    async def _enter_by_function(self) -> None:
        await self._write(lambda number: self._pool.fetchval(FUNCTION, number, idempotent=True), Promise.REPEATABLE)

    async def _exactly_once(self) -> None:
        async def write(number: int) -> None:
            self._compare(number, await self._pool.fetchval(INSERT_RETURNING, number, exactly_once=True))

        await self._write(write, Promise.RESOLVED)

    async def _loop(self) -> None:
        async def write(number: int) -> None:
            async for attempt in self._pool.transaction():
                async with attempt as connection:
                    await connection.execute(INSERT_WITH_OTHERS, number)
                    await connection.execute(INSERT_WITH_OTHERS, -number)

        await self._write(write, Promise.RESOLVED, mirrored=True)

    async def _callback(self) -> None:
        async def insert(connection: ResilientConnection, number: int) -> object:
            await connection.fetchval(INSERT_RETURNING, -number)
            return await connection.fetchval(INSERT_RETURNING, number)

        async def write(number: int) -> None:
            self._compare(number, await self._pool.run_in_transaction(insert, number))

        await self._write(write, Promise.RESOLVED, mirrored=True)

    def _compare(self, number: int, answer: object) -> None:
        if answer != number:
            self._book.wrong.append(f"the id of {number}: {answer!r}")

    async def _write(
        self, write: Callable[[int], Awaitable[object]], promise: Promise, *, mirrored: bool = False
    ) -> None:
        number = next(self._ids)
        entry = self._book.entries[number] = Entry(promise=promise, mirrored=mirrored)
        token = _WRITING.set(entry)
        try:
            await write(number)
        except OutcomeUnknownError as error:
            entry.told, entry.error, entry.xid = Told.UNKNOWN, _words(error, number), error.xid
        except Exception as error:
            entry.told, entry.error = Told.FAILED, _words(error, number)
        else:
            entry.told = Told.DONE
            self._acknowledged.append(number)
        finally:
            entry.told_at = time.monotonic()
            _WRITING.reset(token)

    async def _count(self) -> None:
        await self._look_up(lambda number: self._pool.fetchval(COUNT, number))

    async def _count_by_row(self) -> None:
        async def count(number: int) -> object:
            row = await self._pool.fetchrow(COUNT, number)
            return row["count"]

        await self._look_up(count)

    async def _count_in_transaction(self) -> None:
        async def count(connection: ResilientConnection, number: int) -> object:
            return await connection.fetchval(COUNT, number)

        await self._look_up(lambda number: self._pool.run_in_transaction(count, number, readonly=True))

    async def _look_up(self, count: Callable[[int], Awaitable[object]]) -> None:
        if self._acknowledged:
            number = self._chance.choice(self._acknowledged[-20:])
            await self._read(lambda: count(number), lambda times: times == 1, f"the count of {number}")

    async def _newest(self) -> None:
        def complete(rows) -> bool:
            ids = [row["id"] for row in rows]
            return ids == sorted(ids, reverse=True) and len(ids) >= least

        least = min(PAGE, len(self._acknowledged))
        await self._read(lambda: self._pool.fetch(NEWEST), complete, "the newest rows")

    async def _read(self, read: Callable[[], Awaitable[object]], is_right: Callable[..., bool], what: str) -> None:
        try:
            answer = await read()
        except Exception as error:
            self._book.read_errors.append(_words(error, what))
            return
        self._book.reads += 1
        if not is_right(answer):
            self._book.wrong.append(f"{what}: {answer!r}"[:500])


def _words(error: Exception, what: object) -> str:
    notes = "; ".join(getattr(error, "__notes__", []))
    cause = "" if error.__cause__ is None else f" from {error.__cause__!r}"
    return f"{what}: {error!r}{cause} {notes}".rstrip()
