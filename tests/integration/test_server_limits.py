"""A server that has no room for one more connection, or refuses for good, while others of the pool work or none does."""

from __future__ import annotations

import asyncio
import contextlib
import time

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import AcquireTimeoutError, BackoffPolicy, ResilientPool
from resilient_pool.events import CircuitOpened
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@contextlib.asynccontextmanager
async def role(postgres, name, limit=None):
    """A role of its own, with a limit to how many connections it may have."""
    await postgres.create_role(name, "pw")
    async with postgres.admin() as admin:
        if limit is not None:
            await admin.execute(f"ALTER ROLE {name} CONNECTION LIMIT {limit}")
    try:
        yield postgres.dsn(user=name, password="pw")
    finally:
        await postgres.terminate_backends(f"usename = '{name}'")
        async with postgres.admin() as admin:
            await admin.execute(f"DROP ROLE {name}")


async def use(pool, seconds, workers=8, *, until=lambda: True, **options):
    """Let workers use the pool for a while, and on until a condition holds, for ten seconds at most; return what failed."""
    errors = []
    ends = time.monotonic() + seconds

    async def work():
        while (now := time.monotonic()) < ends or (now < ends + 10 and not until()):
            try:
                await pool.fetchval("SELECT pg_sleep(0.005)", **options)
            except Exception as error:
                errors.append(error)
                await asyncio.sleep(0.01)

    await asyncio.gather(*(work() for _ in range(workers)))
    return errors


WAYS = {
    "default": ({}, {}),
    "fail_fast": ({}, {"fail_fast": True}),
    "few attempts": ({"reconnect": BackoffPolicy(base=0.05, max_attempts=2)}, {}),
    "short": ({"reconnect": BackoffPolicy(base=0.05, max_elapsed=0.2)}, {"deadline": 5.0}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_roles_limit_below_max_size_fails_nobody(postgres, way):
    """Two connections work, a third is refused: they serve everybody, and the server is not taken for one that is away."""
    arguments, options = WAYS[way]
    events = []
    async with role(postgres, "two", 2) as dsn:
        async with ResilientPool(dsn, max_size=4, observers=[events.append], **arguments) as pool:
            assert await use(pool, 1.0, **options) == []
            assert pool.stats().connect_failures > 0
            assert pool.get_size() == 2
            assert not [event for event in events if isinstance(event, CircuitOpened)]


async def test_a_databases_limit_below_max_size_fails_nobody(postgres):
    """It is refused in other words, and with the same SQLSTATE."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE DATABASE narrow CONNECTION LIMIT 2")
    try:
        async with role(postgres, "anybody") as dsn:
            async with ResilientPool(dsn, database="narrow", max_size=4) as pool:
                assert await use(pool, 1.0, fail_fast=True) == []
                assert pool.stats().connect_failures > 0
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP DATABASE narrow WITH (FORCE)")


async def test_pools_that_fill_a_server_together_fail_nobody():
    """The last places are reserved for superusers: each pool goes on with what it has."""
    async with EmbeddedPostgres(18, settings={"max_connections": 9, "reserved_connections": 0}) as server:
        async with role(server, "plain") as dsn:
            pools = [ResilientPool(dsn, max_size=5) for _ in range(3)]
            async with contextlib.AsyncExitStack() as stack:
                for pool in pools:
                    await stack.enter_async_context(pool)
                    await pool.fetchval("SELECT 1")
                results = await asyncio.gather(*(use(pool, 1.5, fail_fast=True) for pool in pools))
                assert results == [[], [], []]
                assert sum(pool.get_size() for pool in pools) <= 6
                assert sum(pool.stats().connect_failures for pool in pools) > 0


async def test_room_is_used_when_there_is_some_again(postgres):
    """The limit is raised: within a second or so the pool has grown."""
    async with role(postgres, "growing", 1) as dsn:
        async with ResilientPool(dsn, max_size=3) as pool:
            assert await use(pool, 0.5) == []
            async with postgres.admin() as admin:
                await admin.execute("ALTER ROLE growing CONNECTION LIMIT 3")
            assert await use(pool, 0.0, until=lambda: pool.get_size() == 3) == []
            assert pool.get_size() == 3


@pytest.mark.parametrize("way", WAYS)
async def test_a_wrong_password_fails_no_caller_while_one_connection_works(postgres, way):
    """The role's password was changed: the open connection serves all callers, few logins are tried, and the log says it once."""
    arguments, options = WAYS[way]
    async with role(postgres, "password_changed") as dsn:
        with FaultProxy(postgres.host, postgres.port) as proxy:
            async with ResilientPool(proxy.dsn(dsn), ssl=False, max_size=4, **arguments) as pool:
                await pool.fetchval("SELECT 1")
                async with postgres.admin() as admin:
                    await admin.execute("ALTER ROLE password_changed PASSWORD 'other'")
                began = time.monotonic()
                assert await use(pool, 1.5, **options) == []
                await eventually(lambda: pool.get_size() == 1)  # another one may be under way
                logins = proxy.accepted - 1
                assert 0 < pool.stats().connect_failures <= logins <= 3 + (time.monotonic() - began) / (0.05 * 0.75)
                async with postgres.admin() as admin:
                    await admin.execute("ALTER ROLE password_changed PASSWORD 'pw'")
                assert await use(pool, 0.0, until=lambda: pool.get_size() == 4, **options) == []
                assert pool.get_size() == 4


async def test_a_caller_whom_the_open_connections_cannot_serve_in_time_sees_the_refusal(postgres):
    """It is the cause of the error that says why there was no connection."""
    async with role(postgres, "password_changed") as dsn:
        async with ResilientPool(dsn, max_size=4) as pool, pool.acquire() as lease:
            await lease.fetchval("SELECT 1")
            async with postgres.admin() as admin:
                await admin.execute("ALTER ROLE password_changed PASSWORD 'other'")
            with pytest.raises(AcquireTimeoutError, match="the server refuses another one") as caught:
                await pool.fetchval("SELECT 1", deadline=1.5)
            assert isinstance(caught.value.__cause__, asyncpg.InvalidPasswordError)
            assert await lease.fetchval("SELECT 1") == 1


async def test_an_init_that_fails_for_good_while_the_pool_is_opened_is_raised_at_once(postgres):
    """Also when another connection is open already."""
    prepared = []

    async def init(connection):
        prepared.append(connection)
        if len(prepared) > 1:
            raise KeyError("a bug")

    began = time.monotonic()
    with pytest.raises(KeyError, match="a bug"):
        await ResilientPool(postgres.dsn(), init=init, init_size=3, min_size=0)
    assert time.monotonic() - began < 10


async def test_an_idle_pool_does_not_hammer_on_a_server_that_refuses_its_password(postgres):
    """`min_size` is kept when a caller asks and is let in again, not by trying a wrong password over and over."""
    async with role(postgres, "kept") as dsn:
        with FaultProxy(postgres.host, postgres.port) as proxy:
            async with ResilientPool(proxy.dsn(dsn), ssl=False, min_size=2) as pool:
                await pool.fetchval("SELECT 1")
                async with postgres.admin() as admin:
                    await admin.execute("ALTER ROLE kept PASSWORD 'other'")
                await postgres.terminate_backends("usename = 'kept'")
                with pytest.raises(asyncpg.InvalidPasswordError):
                    await pool.fetchval("SELECT 1")
                before = proxy.attempts
                await asyncio.sleep(2.0)
                assert proxy.attempts <= before + 1
                async with postgres.admin() as admin:
                    await admin.execute("ALTER ROLE kept PASSWORD 'pw'")
                assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("arguments", [{"min_size": 2}, {"init_size": 2, "max_size": 4}])
async def test_a_refusal_for_good_at_the_start_is_raised_at_once(postgres, arguments):
    """A wrong password, a database that is not there: opening the pool says so, and nothing goes on trying."""
    for wrong, error in (
        ({"password": "wrong"}, asyncpg.InvalidPasswordError),
        ({"database": "absent"}, asyncpg.InvalidCatalogNameError),
    ):
        async with role(postgres, "starter") as dsn:
            with FaultProxy(postgres.host, postgres.port) as proxy:
                pool = ResilientPool(proxy.dsn(dsn), ssl=False, **{**arguments, **wrong})
                began = time.monotonic()
                with pytest.raises(error):
                    await pool
                assert time.monotonic() - began < 10
                attempts = proxy.attempts
                await asyncio.sleep(0.5)
                assert proxy.attempts == attempts <= 4
