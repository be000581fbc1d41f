"""What an adapter for a framework needs of a lease beyond asyncpg's methods. None of it is on the lease, for applications."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pooling.driver import AnyConnection

T = TypeVar("T")


def connection_info(lease: ResilientConnection[Any]) -> dict[object, Any]:
    """Return what adapters keep with the lease's connection for as long as that lives, through all leases of it."""
    return lease._current_driver.connection_info  # noqa: SLF001


def session_info(lease: ResilientConnection[Any]) -> dict[object, Any]:
    """Return what adapters keep with the lease's session: likewise, but empty again once the session was reset."""
    return lease._current_driver.session_info  # noqa: SLF001


def count_session_as(lease: ResilientConnection[Any], *, untouched: bool) -> None:
    """Say whether what was done in the lease's session so far is a part of it, or is to be undone by a reset."""
    lease._keeps_session = untouched and lease._leases.trusts_texts  # noqa: SLF001


def prepare_replacements(lease: ResilientConnection[Any], prepare: Callable[[], Awaitable[None]]) -> None:
    """Await `prepare()` each time the lease has replaced its connection, before anything is sent on the new one.

    What it does on the lease then is done once. What it raises counts as a failure to get the connection.
    """
    lease._attachments().replacements.append(prepare)  # noqa: SLF001


async def prepare(lease: ResilientConnection[Any], sql: str, execute: Callable[[AnyConnection], Awaitable[T]]) -> T:
    """Run `execute(connection)`, which prepares `sql` on the driver's connection and leaves it to `run` to execute it."""
    return await lease._first("prepare", sql, execute, keeps_session=True)  # noqa: SLF001


async def run(
    lease: ResilientConnection[Any], operation: str, sql: str, execute: Callable[[AnyConnection], Awaitable[T]]
) -> T:
    """Run `execute(connection)`, which sends `sql` on the driver's connection, as the lease's own methods run what they send.

    It is repeated under the same conditions as they are, so `execute` may be called more than once, with different
    connections.
    """
    return await lease._run(operation, sql, {}, execute)  # noqa: SLF001
