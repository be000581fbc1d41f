"""The table and the four basic operations on it: the workload of the demo and of tests/chaos."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import asyncpg

from resilient_pool import ResilientPool

SCHEMA = """
    CREATE TABLE entry (id bigint NOT NULL, note text NOT NULL);
    CREATE INDEX ON entry (id);
    CREATE FUNCTION write_once(row_id bigint, row_note text) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(row_id);
        INSERT INTO entry (id, note) SELECT row_id, row_note WHERE NOT EXISTS (SELECT FROM entry WHERE id = row_id);
    END $$;
"""
"""The table has no unique constraint, so that a write that was applied twice is there to be counted.

The function may run twice, even at once: when a connection breaks, the server may still be busy with the first run.
Without the lock neither of two that overlap would see the other's row. The INSERT sees what was committed when the lock
was granted, since each statement in a volatile function takes a new snapshot.
"""
READ = "SELECT count(*) FROM entry WHERE id = $1"
PAGE = "SELECT id, note FROM entry ORDER BY id DESC LIMIT $1"
PAGE_ROWS = 50
WRITE = "SELECT write_once($1, $2)"
INSERT = "INSERT INTO entry (id, note) VALUES ($1, $2)"
ROW_COUNTS = "SELECT id, count(*) AS times FROM entry GROUP BY id"


class Pool(Protocol):
    """The methods of `asyncpg.Pool` that the operations call."""

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
    """The four operations.

    Attributes:
        pool: The pool under test.
        execute_idempotent: Its `execute`, for a statement that may safely run twice.
    """

    pool: Pool
    execute_idempotent: Callable[[str, int, str], Awaitable[object]]

    async def read(self, row: int) -> object:
        """Return how often a row is in the table."""
        return await self.pool.fetchval(READ, row)

    async def page(self, limit: int = PAGE_ROWS) -> list[asyncpg.Record]:
        """Return the newest rows."""
        return await self.pool.fetch(PAGE, limit)

    async def write(self, row: int) -> object:
        """Write a row with a statement that changes nothing when it runs twice."""
        return await self.execute_idempotent(WRITE, row, "written")

    async def insert(self, row: int) -> object:
        """Write a row with a statement that writes it twice when it runs twice."""
        return await self.pool.execute(INSERT, row, "inserted")


def resilient_operations(pool: ResilientPool) -> Operations:
    """Return the operations on a `ResilientPool`: `idempotent=True` on the write that may safely run twice."""
    return Operations(pool=pool, execute_idempotent=functools.partial(pool.execute, idempotent=True))


async def count_rows(connection: asyncpg.Connection) -> dict[int, int]:
    """Return how often each id is in the table."""
    return {row["id"]: row["times"] for row in await connection.fetch(ROW_COUNTS)}
