"""A PgBouncer of every version that is found, in front of a server of these tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import asynccontextmanager

import pytest
from bouncer import PgBouncer, programs
from in_thread import serve_in_thread

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", programs() or ["none"], scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "pgbouncer":
            item.add_marker(pytest.mark.needs("pgbouncer"))


@pytest.fixture(scope="session")
def behind() -> Iterator[EmbeddedPostgres]:
    """The server behind PgBouncer, which tests may restart."""
    yield from serve_in_thread(EmbeddedPostgres(18, settings={"max_connections": 60}))


@pytest.fixture
def pooled(behind, version):
    """Start a PgBouncer, and open a pool through it: `async with pooled(...) as (bouncer, pool)`."""

    @asynccontextmanager
    async def pooled(settings=None, **arguments):
        async with PgBouncer(behind, version, **(settings or {})) as bouncer:
            async with ResilientPool(bouncer.dsn(), **{"deadline": 30.0, "ssl": False, **arguments}) as pool:
                yield bouncer, pool

    return pooled
