"""What resets a session, on a server that refuses a part of what PostgreSQL takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

import asyncpg

ROLES = ("RESET SESSION AUTHORIZATION", "RESET ROLE")
"""What asyncpg's own text leaves out: `RESET ALL` does not touch them. `RESET ROLE` returns to what was given at login."""

POSTGRESQL = ("SELECT pg_advisory_unlock_all()", "CLOSE ALL", "UNLISTEN *", "RESET ALL")
"""What asyncpg sends to PostgreSQL, and to what it takes for that."""

_INSTEAD = {"RESET SESSION AUTHORIZATION": "SET SESSION AUTHORIZATION DEFAULT", "RESET ROLE": "SET ROLE NONE"}
# A server without the statement has nothing that it would undo: no locks, no cursors that outlive a transaction, no channels,
# no other role. Settings are different: most servers take SET.
_DISPENSABLE = frozenset({*ROLES, *POSTGRESQL} - {"RESET ALL"})
# Not 42501: what this role may not undo it may still have done. Nor class XX: an internal error says nothing of the next time.
_LACKING = frozenset({"0A000", "42601", "42704", "42883", "42P01"})


def is_lacking(error: asyncpg.PostgresError) -> bool:
    """Whether a server says that it has no such statement, function, setting or catalog, and never will."""
    return error.sqlstate in _LACKING


def statements_of(text: str) -> tuple[str, ...]:
    """Return the statements of a reset of asyncpg's, which has each on a line."""
    return tuple(line.removesuffix(";") for line in text.splitlines())


def as_text(statements: Iterable[str]) -> str:
    """Return statements as one text, to be sent in one query."""
    return "\n".join(f"{statement};" for statement in statements)


async def execute_each(execute: Callable[[str], Awaitable[object]], statements: Iterable[str]) -> tuple[str, ...]:
    """Execute statements one by one, and return those that the server has, or what it has in their place.

    Raises:
        asyncpg.PostgresError: A statement failed that cannot be left out.
    """
    known: list[str] = []
    for statement in statements:
        for form in (statement, _INSTEAD.get(statement)):
            if form is None:
                continue
            try:
                await execute(form)
            except asyncpg.PostgresError as error:
                if statement not in _DISPENSABLE or not is_lacking(error):
                    raise
            else:
                known.append(form)
                break
    return tuple(known)
