"""25006: where read-only was asked for, where the server is read-only by a setting, and where it is the old primary."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.pooling.driver import DriverConnection, ReadOnly
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture
async def reporter(postgres: EmbeddedPostgres):
    """A role whose transactions are read-only by default."""
    name = f"r_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'pw'; ALTER ROLE {name} SET default_transaction_read_only = on"
        )
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP ROLE {name}")


@pytest.fixture
async def followed():
    """A primary with an empty table `t`, and a standby that has it too."""
    async with EmbeddedPostgres(18) as primary, await primary.standby("s") as standby:
        async with primary.admin() as admin:
            await admin.execute("CREATE TABLE t (id int)")
        async with standby.admin() as admin, asyncio.timeout(20):
            while await admin.fetchval("SELECT to_regclass('t')") is None:
                await asyncio.sleep(0.02)
        yield primary, standby


@pytest.fixture
def asked(monkeypatch):
    """On which connections it was asked why a write was refused."""
    connections, ask = [], DriverConnection.learn_why_read_only

    async def note(driver):
        connections.append((driver, driver.queries))
        await ask(driver)

    monkeypatch.setattr(DriverConnection, "learn_why_read_only", note)
    return connections


def insert(table):
    return f"INSERT INTO {table} VALUES (1)"


async def in_a_read_only_transaction(pool, table):
    async def work(connection):
        await connection.execute(insert(table))

    await pool.run_in_transaction(work, readonly=True)


async def in_a_transaction_made_read_only(pool, table):
    async def work(connection):
        await connection.execute("SET TRANSACTION READ ONLY")
        await connection.execute(insert(table))

    await pool.run_in_transaction(work)


async def in_one_text(pool, table):
    await pool.execute(f"BEGIN READ ONLY; {insert(table)}; COMMIT")


async def on_a_lease(pool, table):
    async with pool.acquire() as connection:
        await connection.execute(f"BEGIN READ ONLY; {insert(table)}; COMMIT")


async def in_one_call(pool, table):
    await pool.execute(insert(table))


async def in_a_transaction(pool, table):
    async def work(connection):
        await connection.execute(insert(table))

    await pool.run_in_transaction(work)


ASKED = [in_a_read_only_transaction, in_a_transaction_made_read_only, in_one_text, on_a_lease]


async def refused_once(pool, work, table):
    """The work is refused at once, and no connection is given up for it."""
    async with asyncio.timeout(5):
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await work(pool, table)
    assert not any(pool.stats().retries.values())
    assert not any(pool.stats().discarded.values())


@pytest.mark.parametrize("work", ASKED)
async def test_a_write_where_read_only_was_asked_for_is_the_callers_error(postgres, table, work):
    """It is raised at once, and says nothing about the server."""
    async with ResilientPool(postgres.dsn()) as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
        await refused_once(pool, work, table)


@pytest.mark.parametrize("work", [in_one_call, in_a_transaction])
async def test_a_role_that_is_read_only_by_default_meets_its_own_limit(postgres, table, reporter, work):
    """No other server would let it write."""
    async with ResilientPool(postgres.dsn(user=reporter, password="pw")) as pool:
        await refused_once(pool, work, table)


async def test_a_default_that_the_application_has_set_is_its_own(postgres, table):
    """`init` has made the sessions read-only."""

    async def init(connection):
        await connection.execute("SET default_transaction_read_only = on")

    async with ResilientPool(postgres.dsn(), init=init, session_reset="off") as pool:
        await refused_once(pool, in_one_call, table)


@pytest.mark.parametrize("work", [in_one_call, in_a_transaction])
async def test_a_server_that_was_made_read_only_is_still_the_right_one(work):
    """As providers do when the disk is full: another connection finds the same."""
    async with EmbeddedPostgres(18) as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE t (id int)")
        await server.apply_settings({"default_transaction_read_only": "on"})
        async with ResilientPool(server.dsn()) as pool:
            await refused_once(pool, work, "t")


@pytest.mark.parametrize("work", [in_one_call, in_a_transaction])
async def test_a_standby_is_left_for_the_new_primary(followed, asked, work):
    """A write that meets the wrong server waits until the right one is there, and is made once; each refusal is asked about once."""
    _, standby = followed
    async with ResilientPool(standby.dsn(), deadline=30.0) as pool:
        writing = asyncio.ensure_future(work(pool, "t"))
        async with asyncio.timeout(20):
            while pool.stats().retries_total < 2:
                await asyncio.sleep(0.02)
        await standby.promote()
        await writing
        assert await pool.fetchval("SELECT count(*) FROM t") == 1
        assert len(asked) == len(set(asked)) == pool.stats().retries_total


async def test_an_init_that_writes_waits_for_the_new_primary(followed):
    """What it meets on a standby is cured there, and on a server that is read-only by a setting it is final."""

    async def init(connection):
        await connection.execute("INSERT INTO t VALUES (1)")

    primary, standby = followed
    async with ResilientPool(standby.dsn(), init=init, deadline=30.0) as pool:
        reading = asyncio.ensure_future(pool.fetchval("SELECT count(*) FROM t"))
        async with asyncio.timeout(20):
            while not pool.stats().connect_failures:
                await asyncio.sleep(0.02)
        await standby.promote()
        assert await reading == 1
    await primary.apply_settings({"default_transaction_read_only": "on"})
    async with ResilientPool(primary.dsn(), init=init, deadline=30.0) as pool:
        async with asyncio.timeout(5):
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await pool.fetchval("SELECT 1")


async def test_read_only_asked_for_on_a_standby_is_the_callers_error():
    """A transaction that asked for it would be refused by the new primary as well."""
    async with EmbeddedPostgres(18) as primary, await primary.standby("s") as standby:
        async with ResilientPool(standby.dsn(), deadline=30.0) as pool:
            await refused_once(pool, in_a_read_only_transaction, "pg_class")


async def reason_behind_a_pooler(**arguments):
    connection = await asyncpg.connect(**arguments)
    try:
        link = DriverConnection(connection)
        link.is_pooled = True
        await link.learn_why_read_only()
        return link.read_only
    finally:
        await connection.close()


async def test_behind_a_pooler_only_what_explains_the_refusal_counts(postgres, reporter):
    """Another server may answer the question: that it is no standby says nothing of the one that refused."""
    plain = await reason_behind_a_pooler(**postgres.connect_arguments())
    assert plain == ReadOnly(in_recovery=None, asked=False)
    role = await reason_behind_a_pooler(**{**postgres.connect_arguments(), "user": reporter, "password": "pw"})
    assert role == ReadOnly(in_recovery=False, asked=True)
    async with await postgres.standby("pooled") as standby:
        demoted = await reason_behind_a_pooler(**standby.connect_arguments())
        assert demoted == ReadOnly(in_recovery=True, asked=False)


async def test_the_question_why_can_be_cancelled(postgres, proxy: FaultProxy):
    """The caller is cancelled while a standby is asked, and the pool closes."""
    async with await postgres.standby("cancelled") as standby:
        proxy.retarget(standby.host, standby.port)
        async with ResilientPool(proxy.dsn(standby.dsn()), ssl=False, deadline=30.0) as pool:
            await pool.fetchval("SELECT 1")
            proxy.swallow_next_answer(matching=b"default_transaction_read_only")
            writing = asyncio.ensure_future(pool.execute("CREATE TABLE not_here (id int)"))
            async with asyncio.timeout(10):
                while not proxy.fired:
                    await asyncio.sleep(0.01)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            async with asyncio.timeout(10):
                assert await pool.fetchval("SELECT 1") == 1
