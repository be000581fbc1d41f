"""What the pool's own behaviour is tested with: pools that never outlive their test, a bystander, and both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import asyncpg
import pytest
import uvloop
from waiting import eventually

from resilient_pool import ResilientPool

MakePool = Callable[..., ResilientPool]
Eventually = Callable[[Callable[[], object]], Awaitable[None]]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test on asyncio's own loop, and on uvloop as well if it is marked so."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    marker = item.get_closest_marker("asyncio")
    if marker is not None and "uvloop" in marker.kwargs.get("loop_factories", ()):
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest.fixture(autouse=True)
async def no_test_hangs() -> AsyncIterator[None]:
    """End a test after a minute: a pool that lost a connection waits for it for ever."""

    def end() -> None:
        for task in asyncio.all_tasks():
            task.cancel("the test took over a minute")

    timer = asyncio.get_running_loop().call_later(60, end)
    yield
    timer.cancel()


@pytest.fixture
async def make_pool(dsn: str) -> AsyncIterator[MakePool]:
    """Make pools on the server, not yet opened; all are terminated in the end."""
    pools: list[ResilientPool] = []

    def make(where: str = dsn, **arguments: object) -> ResilientPool:
        pools.append(ResilientPool(where, **arguments))
        return pools[-1]

    yield make
    for pool in pools:
        if not pool.is_closing():
            try:
                pool.terminate()
            except asyncpg.InterfaceError as error:
                assert "not initialized" in str(error)


@pytest.fixture
async def bystander(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of nobody's pool, to look at the server from outside."""
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture(name="eventually")
def eventually_() -> Eventually:
    """Wait until a condition, plain or awaitable, holds; fail after ten seconds."""
    return eventually


@pytest.fixture
async def sessions_named(bystander: asyncpg.Connection) -> Callable[[str], Awaitable[int]]:
    """Count the sessions on the server that go by an `application_name`."""

    async def count(name: str) -> int:
        return await bystander.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name)

    return count
