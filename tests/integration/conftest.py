"""Servers and proxies that the integration tests share; no server belongs to any one event loop."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from in_thread import serve_in_thread

from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """PostgreSQL 18; a test that stops or freezes it, or changes its settings, leaves it as it was.

    Nothing but the tests writes there: a migration is not repeated when anything else did, autovacuum included.
    """
    yield from serve_in_thread(EmbeddedPostgres(18, settings={"max_connections": 60, "autovacuum": False}))


@pytest.fixture(scope="session")
def postgres16() -> Iterator[EmbeddedPostgres]:
    """PostgreSQL 16, started when the first test asks for it."""
    yield from serve_in_thread(EmbeddedPostgres(16, settings={"max_connections": 60}))


@pytest.fixture
def dsn(postgres: EmbeddedPostgres) -> str:
    """The superuser's way to PostgreSQL 18, without a proxy."""
    return postgres.dsn()


@pytest.fixture
def proxy(postgres: EmbeddedPostgres) -> Iterator[FaultProxy]:
    """A fault proxy of the test's own in front of PostgreSQL 18; `proxy.dsn(dsn)` leads through it."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        yield proxy


@pytest.fixture
async def table(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """An empty table of one column `id`, without any constraint."""
    name = f"t_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TABLE {name} (id int)")
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {name} CASCADE")


@pytest.fixture
async def empty_database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """The name of a database of the test's own."""
    name = f"d_{uuid.uuid4().hex}"
    await postgres.create_database(name)
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
