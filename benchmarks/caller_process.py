"""A process with one pool and many callers: each contestant with its way of retrying.

It reads two lines: an order in JSON, and a line that starts the callers. It writes two: "ready", and the result in JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import backoff

import resilient_pool.pool
from resilient_pool import BackoffPolicy, ResilientPool
from resilient_pool.pooling.resource_pool import ResourcePool

OURS = "resilient_pool"
NO_JITTER = "resilient_pool, no jitter"
NO_ADMISSION = "resilient_pool, no admission"
NEITHER = "resilient_pool, neither"
PLAIN = "asyncpg.Pool"
FIXED = "asyncpg.Pool, again after 0.5 s"
EXPO = "asyncpg.Pool, exponential backoff"

UNJITTERED = BackoffPolicy(base=0.25, max_value=1.0, jitter=None, max_attempts=None, max_elapsed=60.0)
RETRY_SECONDS = 60.0
"""Seconds for which each caller goes on trying."""

Ask = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do: which contestant, how many callers and connections, and for how long each call takes the server."""

    contestant: str
    dsn: str
    callers: int
    connections: int
    seconds: float


class UnrampedResourcePool(ResourcePool[Any]):
    """Admits all connections after the first: 1, then all, in place of 1, 2, 4, ..."""

    __slots__ = ()

    def set_connect_limit(self, number: int) -> None:
        super().set_connect_limit(self._max_size if number else 0)


@contextlib.asynccontextmanager
async def resilient(order: Order) -> AsyncIterator[Ask]:
    if order.contestant in {NO_ADMISSION, NEITHER}:
        # No argument switches the ramp-up off: only this comparison needs that.
        resilient_pool.pool.ResourcePool = UnrampedResourcePool
    policies = {"reconnect": UNJITTERED} if order.contestant in {NO_JITTER, NEITHER} else {}
    async with ResilientPool(order.dsn, ssl=False, max_size=order.connections, **policies) as pool:
        yield lambda: pool.fetchval("SELECT 1 FROM pg_sleep($1)", order.seconds, idempotent=True)


@contextlib.asynccontextmanager
async def retried(order: Order) -> AsyncIterator[Ask]:
    """Put around each call on `asyncpg.Pool` what people put around it."""
    # Without min_size=0 the pool itself could not be opened while the database is paused.
    pool = await asyncpg.create_pool(order.dsn, ssl=False, min_size=0, max_size=order.connections)
    waits = {"interval": 0.5, "jitter": None} if order.contestant == FIXED else {"factor": 0.1, "max_value": 2}
    again = backoff.on_exception(
        backoff.constant if order.contestant == FIXED else backoff.expo,
        (asyncpg.PostgresError, asyncpg.InterfaceError, OSError),
        max_time=RETRY_SECONDS,
        logger=None,
        **waits,
    )

    async def ask() -> object:
        return await pool.fetchval("SELECT 1 FROM pg_sleep($1)", order.seconds)

    try:
        yield ask if order.contestant == PLAIN else again(ask)
    finally:
        pool.terminate()


async def run_callers(order: Order, go: Awaitable[object]) -> dict[str, object]:
    """Start all callers at once; return when the last one ended, and the errors."""
    ended: list[float] = []
    errors: Counter[str] = Counter()

    async def call(ask: Ask) -> None:
        try:
            await ask()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
            errors[type(error).__name__] += 1
        ended.append(time.monotonic())

    async with resilient(order) if order.contestant.startswith(OURS) else retried(order) as ask:
        print("ready", flush=True)
        await go
        await asyncio.gather(*(call(ask) for _ in range(order.callers)))
    return {"last": max(ended), "failed": errors.total(), "errors": errors}


def main() -> None:
    logging.getLogger("resilient_pool").addHandler(logging.NullHandler())  # its warnings would run across the report
    order = Order(**json.loads(sys.stdin.readline()))
    print(json.dumps(asyncio.run(run_callers(order, asyncio.to_thread(sys.stdin.readline)))), flush=True)


if __name__ == "__main__":
    main()
