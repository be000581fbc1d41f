"""A role that was taken on never outlives its use: the next caller is who logged in, in whatever way sessions are reset."""

from __future__ import annotations

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres

WHO = "SELECT session_user || '/' || current_user"
BECOME = ["SET ROLE tenant", "SET SESSION AUTHORIZATION tenant", "SELECT set_config('role', 'tenant', false)"]


@pytest.fixture(params=[16, 18])
async def server(request, postgres, postgres16) -> EmbeddedPostgres:
    server = postgres16 if request.param == 16 else postgres
    async with server.admin() as admin:
        for name in ("tenant", "clerk", "guest"):
            if not await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", name):
                await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'known'")
        await admin.execute("GRANT guest, tenant TO clerk")
    return server


async def on_lease(pool: ResilientPool, sql: str) -> None:
    async with pool.acquire() as connection:
        await connection.fetch(sql)


async def in_transaction(pool: ResilientPool, sql: str) -> None:
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.fetch(sql)


async def in_one_call(pool: ResilientPool, sql: str) -> None:
    await pool.fetch(sql)


async def in_an_abandoned_transaction(pool: ResilientPool, sql: str) -> None:
    async with pool.acquire() as connection:
        await connection.transaction().start()
        await connection.fetch(sql)


WAYS = [on_lease, in_transaction, in_one_call, in_an_abandoned_transaction]


@pytest.mark.parametrize("sql", BECOME)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("session_reset", ["auto", "background", "on_release"])
async def test_a_role_does_not_outlive_the_use_it_was_taken_on_in(server, way, sql, session_reset):
    """Whatever statement took it on, and wherever."""
    async with ResilientPool(server.dsn(), max_size=1, session_reset=session_reset) as pool:
        who = await pool.fetchval(WHO)
        await way(pool, sql)
        assert await pool.fetchval(WHO) == who
        assert pool.stats().opened == 1


async def test_a_role_that_belongs_to_the_login_is_returned_to(server):
    """It may stand in the role's own settings, or in `server_settings`."""
    async with server.admin() as admin:
        await admin.execute("ALTER ROLE clerk SET role TO guest")
    try:
        for arguments in ({}, {"server_settings": {"role": "tenant"}}):
            async with ResilientPool(server.dsn(user="clerk", password="known"), max_size=1, **arguments) as pool:
                who = await pool.fetchval(WHO)
                assert who == ("clerk/tenant" if arguments else "clerk/guest")
                await on_lease(pool, "SET ROLE clerk")
                assert await pool.fetchval(WHO) == who
                assert pool.stats().opened == 1
    finally:
        async with server.admin() as admin:
            await admin.execute("ALTER ROLE clerk RESET role")


@pytest.mark.parametrize("become", BECOME)
async def test_a_role_that_init_took_on_is_returned_to(server, become):
    """A reset must not give back the rights that the application gave up when it connected."""

    async def init(connection):
        await connection.fetch(become)

    async with ResilientPool(server.dsn(), max_size=1, init=init) as pool:
        who = await pool.fetchval(WHO)
        assert who.endswith("/tenant")
        await on_lease(pool, "RESET ROLE")
        assert await pool.fetchval(WHO) == who
        assert pool.stats().opened == 1


async def test_a_role_does_not_survive_an_applications_own_reset(server):
    """Neither a `reset=` nor a class with a query of its own has to think of it."""

    async def reset(connection):
        await connection.execute("UNLISTEN *")

    class Asking(asyncpg.Connection):
        def get_reset_query(self):
            return "UNLISTEN *"

    for arguments in ({"reset": reset}, {"connection_class": Asking}):
        async with ResilientPool(server.dsn(), max_size=1, **arguments) as pool:
            who = await pool.fetchval(WHO)
            await on_lease(pool, "SET SESSION AUTHORIZATION tenant")
            assert await pool.fetchval(WHO) == who
            assert pool.stats().opened == 1


async def test_resetting_a_lease_resets_its_role(server):
    """`reset()` sends what the pool sends, in one round trip."""
    async with ResilientPool(server.dsn(), max_size=1) as pool, pool.acquire() as connection:
        await connection.execute("SET ROLE tenant")
        assert await connection.fetchval("SELECT current_user") == "tenant"
        await connection.reset()
        assert await connection.fetchval("SELECT current_user") != "tenant"
