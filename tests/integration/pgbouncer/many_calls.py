"""A client process: makes many calls, each with an answer of its own, and prints how many answers were wrong.

python many_calls.py DSN CALLS SEED [STATEMENT_CACHE_SIZE]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys

from resilient_pool import ResilientConnection, ResilientPool

WORKERS = 20
TEXTS = 40


async def main(dsn: str, calls: int, seed: int, cache: int | None) -> dict[str, object]:
    """Make the calls, and count."""
    chance, numbers = random.Random(seed), itertools.count(seed * 1_000_000)
    left = iter(range(calls))
    wrong: list[str] = []
    errors: list[str] = []
    kinds = [by_number, by_text, many_rows, in_transaction, by_cursor, with_no_argument]
    arguments = {} if cache is None else {"statement_cache_size": cache}

    async def work(pool: ResilientPool) -> None:
        for _ in left:
            kind, number = chance.choice(kinds), next(numbers)
            try:
                expected, answer = await kind(pool, number)
            except Exception as error:
                errors.append(f"{kind.__name__}: {error!r}")
            else:
                if answer != expected:
                    wrong.append(f"{kind.__name__}: {answer!r} instead of {expected!r}")

    async with ResilientPool(dsn, max_size=8, deadline=60, ssl=False, **arguments) as pool:
        await asyncio.gather(*(work(pool) for _ in range(WORKERS)))
        stats = pool.stats()
    return {"wrong": wrong[:5], "errors": errors[:5], "retries": stats.retries_total, "pooler": stats.pooler}


async def by_number(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Ask for an argument."""
    return number, await pool.fetchval("SELECT $1::int8", number)


async def by_text(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Ask one of many texts, each of which says which one it is."""
    text = number % TEXTS
    return (text, number), tuple(await pool.fetchrow(f"SELECT {text}, $1::int8 AS column_{text}", number))


async def with_no_argument(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Ask a text that was never asked before."""
    return number, await pool.fetchval(f"SELECT {number}")


async def many_rows(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Ask for an answer of several messages."""
    rows = await pool.fetch("SELECT $1::int8 + n FROM generate_series(1, $2::int) AS n", number, number % 50)
    return [number + 1 + n for n in range(number % 50)], [row[0] for row in rows]


async def in_transaction(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Ask twice in one transaction, which is one server session's."""

    async def block(connection: ResilientConnection) -> tuple[object, ...]:
        await connection.execute(f"SET LOCAL application_name = 'n{number}'")
        first = await connection.fetchval("SELECT pg_backend_pid()")
        return (
            await connection.fetchval("SELECT current_setting('application_name')"),
            await connection.fetchval("SELECT $1::int8 * 2", number),
            first == await connection.fetchval("SELECT pg_backend_pid()"),
        )

    return (f"n{number}", number * 2, True), await pool.run_in_transaction(block)


async def by_cursor(pool: ResilientPool, number: int) -> tuple[object, object]:
    """Read through a portal, on a lease."""
    rows = []
    async with pool.acquire() as connection, connection.transaction():
        async for row in connection.cursor("SELECT $1::int8 + n FROM generate_series(1, 7) AS n", number, prefetch=3):
            rows.append(row[0])
    return [number + 1 + n for n in range(7)], rows


if __name__ == "__main__":
    dsn, calls, seed, *cache = sys.argv[1:]
    sys.stdout.write(json.dumps(asyncio.run(main(dsn, int(calls), int(seed), int(cache[0]) if cache else None))))
