"""A PgBouncer of every version that is found, in front of a server of these tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from bouncer import PgBouncer, programs

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
    server = EmbeddedPostgres(18, settings={"max_connections": 60})
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(server.start())).result()
        try:
            yield server
        finally:
            thread.submit(lambda: asyncio.run(server.close())).result()


@pytest.fixture
def pooled(behind, version):
    """Start a PgBouncer, and open a pool through it: `async with pooled(...) as (bouncer, pool)`."""

    @asynccontextmanager
    async def pooled(settings=None, **arguments):
        async with PgBouncer(behind, version, **(settings or {})) as bouncer:
            async with ResilientPool(bouncer.dsn(), **{"deadline": 30.0, "ssl": False, **arguments}) as pool:
                yield bouncer, pool

    return pooled
