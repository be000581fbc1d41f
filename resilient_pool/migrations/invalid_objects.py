"""Finds what statements that commit on their way leave behind when they fail: invalid indexes, partitions half detached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resilient_pool.pool import ResilientPool
from resilient_pool.sql.lexer import Kind, tokens

_LONGEST_NAME = 63

# The index of a partitioned table is invalid until all of its partitions have one, and rightly so.
# `inhdetachpending` came with PostgreSQL 14.
_FLAWED = """
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
class Flaw:
    """One thing that is not whole.

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


class Remains(frozenset[Flaw]):
    """What is not whole in a database at one moment."""

    __slots__ = ()

    def without(self, others: Iterable[Flaw]) -> Remains:
        """Return what was not among the others."""
        return Remains(self.difference(others))

    def named_in(self, sql: str) -> Remains:
        """Return what a statement names, together with its table."""
        names = {_cut(token.text) for token in tokens(sql) if token.kind in (Kind.WORD, Kind.QUOTED)}
        return Remains(flaw for flaw in self if flaw.plain in names and flaw.owner in names)

    def described(self) -> str:
        """Say what is there and what to do about it."""
        return "; ".join(_described(flaw) for flaw in sorted(self, key=lambda flaw: flaw.name))


async def look(pool: ResilientPool) -> Remains:
    """Return what is not whole in the pool's database now."""
    return Remains(Flaw(**dict(row)) for row in await pool.fetch(_FLAWED))


def _cut(name: str) -> str:
    return name.encode()[:_LONGEST_NAME].decode(errors="ignore")


def _described(flaw: Flaw) -> str:
    if flaw.kind == "index":
        return f"the index {flaw.name} is invalid; DROP INDEX CONCURRENTLY {flaw.name}, then migrate again"
    return (
        f"the partition {flaw.name} of {flaw.owner} is not detached to the end; "
        f"ALTER TABLE {flaw.owner} DETACH PARTITION {flaw.name} FINALIZE"
    )
