"""The pool's process of a soak run: every kind of call, some of them cancelled, and samples of what the process holds.

    python soak_client.py DSN SECONDS SEED SAMPLE_EVERY LEDGER

It prints one sample a line, as JSON, and writes into the file LEDGER what the caller of each write was told. Nothing that
grows with the run is kept in this process: it is measured.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import io
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from demo.ledger import Outcome
from demo.workload import INSERT, READ, resilient_operations
from resilient_pool import OutcomeUnknownError, ResilientConnection, ResilientPool
from resilient_pool.events import Event

WORKERS = 12
CONNECTIONS = 6
THINK = 0.03
"""Seconds a worker waits between two calls, at most."""
CANCELLED = 0.08
"""How often a call is cancelled, within `SOON`."""
SOON = 0.02
PARKING_LIMIT = 90.0
"""Seconds within which every call ends, and everything that the pool does in the background."""
BIG = 200_000


class Soak:
    """Calls a pool and takes samples.

    Args:
        pool: The pool.
        seed: What is called, and which calls are cancelled, is drawn from it.
        ledger: Where the outcomes of writes go.
    """

    def __init__(self, pool: ResilientPool, seed: int, ledger: io.TextIOBase) -> None:
        self._pool = pool
        self._operations = resilient_operations(pool)
        self._random = random.Random(seed)
        self._ledger = ledger
        self._ids = itertools.count(1)
        self._newest = 0
        self._go = asyncio.Event()
        self._parked = 0
        self._over = False
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.wrong = 0

    # The calls

    async def work(self) -> None:
        """Make one call after the other, except while a sample is taken."""
        calls = [
            self._read, self._read, self._page, self._big_answer, self._cursor, self._prepared, self._listener, self._copy_out,
            self._insert, self._write, self._exactly_once, self._transaction, self._callback, self._many, self._copy_in,
        ]  # fmt: skip
        while not self._over:
            if not self._go.is_set():
                self._parked += 1
                await self._go.wait()
                self._parked -= 1
                continue
            await asyncio.sleep(self._random.random() * THINK)
            await self._call(self._random.choice(calls))

    async def _call(self, call: Callable[[], Awaitable[None]]) -> None:
        limit = self._random.random() * SOON if self._random.random() < CANCELLED else None
        try:
            async with asyncio.timeout(limit):
                await call()
        except TimeoutError:
            self.calls["cancelled"] += 1
        except Exception as error:
            self.errors[f"{call.__name__.strip('_')}: {type(error).__name__}"] += 1
        else:
            self.calls[call.__name__.strip("_")] += 1

    async def _read(self) -> None:
        number = self._newest
        answer = await self._operations.read(number)
        self.wrong += number > 0 and answer != 1

    async def _page(self) -> None:
        rows = [row["id"] for row in await self._operations.page()]
        self.wrong += rows != sorted(rows, reverse=True)

    async def _big_answer(self) -> None:
        self.wrong += len(await self._pool.fetchval("SELECT repeat('x', $1)", BIG)) != BIG

    async def _cursor(self) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            rows = [row[0] async for row in connection.cursor("SELECT generate_series(1, 20)", prefetch=7)]
        self.wrong += rows != list(range(1, 21))

    async def _prepared(self) -> None:
        async with self._pool.acquire() as connection:
            statement = await connection.prepare(READ)
            self.wrong += await statement.fetchval(-1) > 1

    async def _listener(self) -> None:
        async with self._pool.acquire() as connection:
            await connection.add_listener("soak", _ignore)
            try:
                await connection.execute("NOTIFY soak")
            finally:
                if not connection.is_closed():
                    await connection.remove_listener("soak", _ignore)

    async def _copy_out(self) -> None:
        await self._pool.copy_from_query("SELECT generate_series(1, 1000)", output=io.BytesIO())

    async def _insert(self) -> None:
        await self._note(self._operations.insert)

    async def _write(self) -> None:
        await self._note(self._operations.write)

    async def _exactly_once(self) -> None:
        await self._note(lambda number: self._pool.execute(INSERT, number, "once", exactly_once=True))

    async def _many(self) -> None:
        await self._note(lambda number: self._pool.executemany(INSERT, [(number, "many")]))

    async def _copy_in(self) -> None:
        await self._note(lambda number: self._pool.copy_records_to_table("entry", records=[(number, "copied")]))

    async def _transaction(self) -> None:
        async def write(number: int) -> None:
            async for attempt in self._pool.transaction():
                async with attempt as connection:
                    await connection.execute(INSERT, number, "first")
                    await connection.execute(INSERT, -number, "second")

        await self._note(write, mirrored=True)

    async def _callback(self) -> None:
        async def block(connection: ResilientConnection, number: int) -> None:
            await connection.execute(INSERT, number, "first")
            await connection.execute(INSERT, -number, "second")

        await self._note(lambda number: self._pool.run_in_transaction(block, number), mirrored=True)

    async def _note(self, write: Callable[[int], Awaitable[object]], *, mirrored: bool = False) -> None:
        number, outcome = next(self._ids), Outcome.UNKNOWN  # as one that is cancelled is
        try:
            await write(number)
            outcome = Outcome.DONE
        except OutcomeUnknownError:
            raise
        except Exception:
            outcome = Outcome.FAILED
            raise
        finally:
            self._ledger.write(f"{number} {outcome.value} {int(mirrored)}\n")
        self._newest = number

    # The samples

    async def samples(self, seconds: float, every: float) -> AsyncIterator[dict[str, object]]:
        """Let the workers work, stop them now and then, and yield what is left when everything has ended."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self.work())
            yield await self._sample(began)
            while time.monotonic() < began + seconds:
                self._go.set()
                await asyncio.sleep(min(every, began + seconds - time.monotonic()))
                self._go.clear()
                yield await self._sample(began)
            self._over = True
            self._go.set()

    async def _sample(self, began: float) -> dict[str, object]:
        at = time.monotonic()
        own = WORKERS + 1
        while not self._has_settled(own) and time.monotonic() < at + PARKING_LIMIT:
            if self._parked == WORKERS and len(asyncio.all_tasks()) == own:
                # Faults go on: a connection that one has ended since its last use is found at the next.
                await asyncio.gather(*(self._call(self._read) for _ in range(CONNECTIONS)))
            await asyncio.sleep(0.02)
        stats = self._pool.stats()
        gc.collect()
        return {
            "seconds": round(at - began, 1),
            "settled_in": round(time.monotonic() - at, 3),
            "calls": self.calls.total(),
            "wrong": self.wrong,
            "errors": dict(self.errors),
            **held(asyncio.get_running_loop(), own),
            "stats": {
                name: getattr(stats, name)
                for name in (
                    "size", "idle", "in_use", "resetting", "waiting", "opened", "discarded_total", "acquired",
                    "retries_total", "outcomes_unknown", "exhausted",
                )
            },
        }  # fmt: skip

    def _has_settled(self, own: int) -> bool:
        stats = self._pool.stats()
        return (
            self._parked == WORKERS
            and len(asyncio.all_tasks()) == own
            and 1 <= stats.size == stats.idle == stats.opened - stats.discarded_total
        )


def held(loop: asyncio.AbstractEventLoop, own: int) -> dict[str, int]:
    """Count what this process holds, after it has returned what the allocator only keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return {
        "kilobytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024,
        "blocks": sys.getallocatedblocks(),
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,
        "tasks": len(asyncio.all_tasks()) - own,
        "timers": sum(not handle.cancelled() for handle in getattr(loop, "_scheduled", ())),
    }


def _ignore(*_: object) -> None:
    """Hear a notification."""


async def main(dsn: str, seconds: float, seed: int, every: float, ledger: str) -> None:
    """Run, and print the samples; the last one is taken when the pool is closed."""
    random.seed(seed)  # the pool's jitter
    counted: Counter[str] = Counter()

    def count(event: Event) -> None:
        counted[event.name] += 1

    loop = asyncio.get_running_loop()
    with Path(ledger).open("w", buffering=1) as written:  # noqa: ASYNC230 - what a write costs is part of the load
        pool = ResilientPool(
            dsn, max_size=CONNECTIONS, deadline=30.0, commit_log="public.commits", observers=[count], ssl=False
        )
        async with pool:
            soak = Soak(pool, seed, written)
            async for sample in soak.samples(seconds, every):
                print(json.dumps({**sample, "events": counted}), flush=True)  # noqa: T201 - what it is for
        await asyncio.sleep(1.0)  # what wakes callers of a lost connection does so after half a second
        gc.collect()
        print(json.dumps({"closed": held(loop, 1), "calls": soak.calls}), flush=True)  # noqa: T201 - likewise


if __name__ == "__main__":
    where, how_long, drawn, step, path = sys.argv[1:]
    asyncio.run(main(where, float(how_long), int(drawn), float(step), path))
