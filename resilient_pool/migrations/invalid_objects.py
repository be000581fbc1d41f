"""Finds what statements that commit in between leave behind when they fail: invalid indexes, partitions half detached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resilient_pool.pool import ResilientPool
from resilient_pool.sql.lexer import Kind, tokens

_MAX_NAME_BYTES = 63

# The index of a partitioned table is invalid until all of its partitions have one, and rightly so.
# `inhdetachpending` came with PostgreSQL 14.
_INVALID = """
    SELECT 'index' AS kind, c.oid, c.oid::pg_catalog.regclass::text AS name, c.relname AS plain, t.relname AS owner
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
    WHERE NOT i.indisvalid AND c.relkind = 'i'
    UNION ALL
    SELECT 'partition', c.oid, c.oid::pg_catalog.regclass::text, c.relname, t.relname
    FROM pg_catalog.pg_inherits h
    JOIN pg_catalog.pg_class c ON c.oid = h.inhrelid JOIN pg_catalog.pg_class t ON t.oid = h.inhparent
    WHERE (pg_catalog.to_jsonb(h) ->> 'inhdetachpending')::boolean
    ORDER BY 1, 3
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidObject:
    """An invalid index, or a partition that is half detached.

    Attributes:
        kind: `"index"`, an invalid one; or `"partition"`, whose detaching was begun and not ended.
        oid: Its object id.
        name: Its name, quoted and with its schema where that is needed.
        plain: Its name alone.
        owner: Its table's name, or of a partition the partitioned table's.
    """

    kind: str
    oid: int
    name: str
    plain: str
    owner: str


class InvalidObjects(frozenset[InvalidObject]):
    """The invalid objects of a database at one moment."""

    __slots__ = ()

    def without(self, others: Iterable[InvalidObject]) -> InvalidObjects:
        """Return those that are not among the others."""
        return InvalidObjects(self.difference(others))

    def named_in(self, sql: str) -> InvalidObjects:
        """Return those that a statement names together with their table."""
        names = {_truncate(token.text) for token in tokens(sql) if token.kind in (Kind.WORD, Kind.QUOTED)}
        return InvalidObjects(each for each in self if each.plain in names and each.owner in names)

    def describe(self) -> str:
        """Say what is there and what to do about it."""
        return "; ".join(_describe(each) for each in sorted(self, key=lambda each: each.name))


async def find_invalid_objects(pool: ResilientPool) -> InvalidObjects:
    """Return the invalid objects in the pool's database now."""
    return InvalidObjects(InvalidObject(**dict(row)) for row in await pool.fetch(_INVALID))


def _truncate(name: str) -> str:
    return name.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


def _describe(each: InvalidObject) -> str:
    if each.kind == "index":
        return f"the index {each.name} is invalid; DROP INDEX CONCURRENTLY {each.name}, then migrate again"
    return (
        f"the partition {each.name} of {each.owner} is not detached to the end; "
        f"ALTER TABLE {each.owner} DETACH PARTITION {each.name} FINALIZE"
    )
