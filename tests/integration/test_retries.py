"""What a real server and a real network do to calls, and what the application sees of it."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import time

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError, ResilientPool, RetryBudget
from resilient_pool.events import PoolerDetected, RetryScheduled
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture
async def pool(postgres: EmbeddedPostgres, proxy: FaultProxy):
    async with ResilientPool(proxy.dsn(postgres.dsn()), deadline=10.0) as pool:
        yield pool


async def test_a_read_whose_answer_was_cut_is_repeated(pool, proxy):
    """The application sees the whole answer, later."""
    await pool.fetch("SELECT 1")
    proxy.cut_next_answer(after_bytes=20)
    assert len(await pool.fetch("SELECT * FROM generate_series(1, 1000)")) == 1000
    assert proxy.fired == 1
    assert pool.stats().retries_total == 1


async def test_a_write_whose_answer_was_lost_is_reported_as_unknown_and_not_repeated(pool, proxy, table):
    """The row is there once, and the error says that nobody could know."""
    await pool.execute(f"INSERT INTO {table} VALUES ($1)", 1)
    proxy.swallow_next_answer(matching=b"INSERT")
    with pytest.raises(OutcomeUnknownError) as caught:
        await pool.execute(f"INSERT INTO {table} VALUES (2)")
    assert isinstance(caught.value.__cause__, asyncpg.ConnectionDoesNotExistError)
    assert await pool.fetchval(f"SELECT count(*) FROM {table} WHERE id = 2") == 1


async def test_an_idempotent_write_whose_answer_was_lost_is_repeated(pool, proxy, table):
    """The caller said that it may run twice."""
    statement = f"INSERT INTO {table} SELECT 2 WHERE NOT EXISTS (SELECT FROM {table} WHERE id = 2)"
    proxy.swallow_next_answer(matching=b"INSERT")
    assert await pool.execute(statement, idempotent=True) == "INSERT 0 0"
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_an_error_of_the_server_reaches_the_caller_after_one_attempt_as_it_is(pool):
    """Neither its type nor its text changes, and nothing is repeated."""
    with pytest.raises(asyncpg.DivisionByZeroError) as caught:
        await pool.fetch("SELECT 1 / 0")
    assert not hasattr(caught.value, "__notes__")
    assert pool.stats().retries_total == 0


async def test_calls_outlast_a_restart(postgres, table):
    """Reads and idempotent writes that meet a restart end well; nothing surfaces, nothing doubles."""
    statement = f"INSERT INTO {table} SELECT $1::int WHERE NOT EXISTS (SELECT FROM {table} WHERE id = $1::int)"
    done = asyncio.Event()

    async def work(pool, first):
        number = first
        while not done.is_set():
            await pool.execute(statement, number, idempotent=True)
            assert await pool.fetchval(f"SELECT count(*) FROM {table} WHERE id = $1", number) == 1
            number += 10
        return (number - first) // 10

    async with ResilientPool(postgres.dsn(), max_size=5) as pool:
        workers = [asyncio.create_task(work(pool, first)) for first in range(10)]
        await asyncio.sleep(0.3)
        await postgres.restart()
        await asyncio.sleep(0.3)
        done.set()
        written = sum(await asyncio.gather(*workers))
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == written


async def test_an_absent_server_is_waited_for_no_longer_than_the_deadline(pool, proxy):
    """What surfaces is the connect error itself, with a note of what was tried."""
    proxy.refuse()
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError) as caught:
        await pool.fetch("SELECT 1", deadline=0.8)
    assert 0.5 < time.monotonic() - started < 10
    assert "attempts" in caught.value.__notes__[0]


async def test_a_server_that_accepts_and_hangs_is_cut_at_the_deadline(pool, proxy):
    """The connect time-out of a minute does not count then."""
    proxy.hang()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        await pool.fetch("SELECT 1", deadline=0.5)
    assert time.monotonic() - started < 10


async def test_the_old_primary_is_left_for_the_new_one(postgres, table):
    """A write refused as read-only is repeated where it can succeed, and every older connection is replaced."""
    standby = await postgres.standby("follower")
    async with standby:
        with FaultProxy(standby.host, standby.port) as proxy:
            async with ResilientPool(proxy.dsn(postgres.dsn()), min_size=2) as pool:
                assert await pool.fetchval("SELECT pg_is_in_recovery()") is True
                proxy.retarget(postgres.host, postgres.port)
                assert await pool.execute(f"INSERT INTO {table} VALUES (1)") == "INSERT 0 1"
                assert await pool.fetchval("SELECT pg_is_in_recovery()") is False


async def test_a_lease_replaces_its_connection_until_something_has_succeeded_on_it(pool, postgres):
    """No session state can be lost before; afterwards the error is the application's."""
    async with pool.acquire() as connection:
        before = connection.get_server_pid()
        await postgres.terminate_backends()
        after = await connection.fetchval("SELECT pg_backend_pid()")
        assert after != before
        await postgres.terminate_backends()
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
            await connection.fetchval("SELECT 1")
    assert await pool.fetchval("SELECT 1") == 1


async def test_a_copy_of_a_list_is_repeated_and_one_of_a_file_is_not(pool, proxy, table):
    """What was read once from a file cannot be read again."""
    await pool.fetch("SELECT 1")
    assert await pool.copy_records_to_table(table, records=[(1,), (2,)]) == "COPY 2"
    proxy.swallow_next_answer(matching=b"COPY")
    with pytest.raises(OutcomeUnknownError):
        await pool.copy_to_table(table, source=io.BytesIO(b"3\n"), idempotent=True)
    proxy.cut_next_answer(matching=b"COPY", after_bytes=3)
    assert await pool.copy_records_to_table(table, records=[(4,)], idempotent=True) == "COPY 1"


async def test_an_encoding_error_leaves_no_lock_behind(pool, table):
    """The driver leaves the server waiting for a Sync then, holding locks, until the session is reset."""
    with pytest.raises(asyncpg.DataError):
        await pool.fetch(f"SELECT * FROM {table} WHERE id = $1", "not a number")
    await pool.execute(f"SET lock_timeout = '2s'; ALTER TABLE {table} ADD COLUMN extra int")


async def test_a_time_out_of_the_callers_is_not_repeated(pool, table):
    """It may have taken effect; the connection is made fit again before its next use."""
    with pytest.raises(TimeoutError):
        await pool.execute("SELECT pg_sleep(5)", timeout=0.2)
    assert pool.stats().retries_total == 0
    assert await pool.fetchval("SELECT 1") == 1


async def test_what_may_have_committed_before_its_error_is_not_repeated(pool, table):
    """A procedure that committed and then met a conflict is reported as unknown."""
    await pool.execute(
        f"CREATE OR REPLACE PROCEDURE p_{table}() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO {table} VALUES (1); COMMIT; "
        "RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"
    )
    with pytest.raises(OutcomeUnknownError):
        await pool.execute(f"CALL p_{table}()")
    assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 1


class ThroughAPooler(asyncpg.Connection):
    """Says of itself what a connection through a pooler says: the handshake was made by somebody else."""

    def get_server_pid(self) -> int:
        return 1


@pytest.mark.parametrize(("explicit", "prepared"), [(None, 0), (10, 1)], ids=["default", "explicit size"])
async def test_behind_a_pooler_nothing_is_prepared_under_a_name(postgres, explicit, prepared):
    """Unless the application asked for it; and the observers are told once."""
    events = []
    arguments = {} if explicit is None else {"statement_cache_size": explicit}
    pool = ResilientPool(postgres.dsn(), connection_class=ThroughAPooler, observers=[events.append], **arguments)
    async with pool:
        async with pool.acquire() as first, pool.acquire() as second:
            for connection in (first, second):
                await connection.fetch("SELECT 42")
                named = await connection.fetchval(
                    "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%42'"
                )
                assert named == prepared
        assert pool.stats().pooler is True
    assert [event.handshake_pid for event in events if isinstance(event, PoolerDetected)] == [1]


async def test_first_connections_opened_at_once_all_learn_of_the_pooler(postgres):
    """Also those that were dialled before the first of them had asked."""
    async with ResilientPool(postgres.dsn(), connection_class=ThroughAPooler, max_size=4) as pool:
        leases = await asyncio.gather(*(pool.acquire() for _ in range(4)))
        for lease in leases:
            await lease.fetch("SELECT 43")
            assert not await lease.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%43'")
            await pool.release(lease)


async def test_where_a_pool_is_redirected_to_is_asked_again_what_stands_there(postgres):
    """There may be a pooler behind the other address."""
    async with ResilientPool(postgres.dsn()) as pool:
        await pool.fetch("SELECT 1")
        pool._connector.server_info = dataclasses.replace(pool._connector.server_info, backend_pid=0)
        pool.set_connect_args(postgres.dsn())
        await pool.expire_connections()
        await pool.fetch("SELECT 1")
        assert not pool._connector.server_info.has_pooler


async def test_without_a_pooler_statements_are_prepared_as_asyncpg_does(postgres):
    """The question asked at the first connect leaves the statement cache as it was."""
    async with ResilientPool(postgres.dsn()) as pool:
        await pool.fetch("SELECT 42")
        assert await pool.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT 42'") == 1
        assert pool.stats().pooler is False


async def test_contention_is_retried_and_told(postgres, table):
    """A one-shot statement that lost a conflict left nothing behind, so it is run again."""
    events = []
    settings = {"default_transaction_isolation": "serializable"}
    async with ResilientPool(postgres.dsn(), observers=[events.append], server_settings=settings) as pool:
        await pool.execute(f"INSERT INTO {table} VALUES (0)")
        async with postgres.admin() as other:
            async with other.transaction():
                await other.execute(f"UPDATE {table} SET id = id + 1")
                blocked = asyncio.create_task(pool.execute(f"UPDATE {table} SET id = id + 10"))
                while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
        assert await blocked == "UPDATE 1"
        assert await pool.fetchval(f"SELECT id FROM {table}") == 11
    assert [event.sqlstate for event in events if isinstance(event, RetryScheduled)] == ["40001"]


async def test_the_deadline_of_a_call_counts_from_its_beginning_not_from_its_first_failure(pool):
    """A query that took longer than that is not begun again."""
    query = "SELECT pg_sleep(1), pg_terminate_backend(pg_backend_pid())"
    for state in ("cold", "warm"):
        with pytest.raises(asyncpg.PostgresError):
            await pool.execute(query, idempotent=True, deadline=1.0)
        assert pool.stats().retries_total == 0, f"repeated on a {state} pool"
        await pool.fetch("SELECT 1")


async def test_each_call_pays_once_for_retries_whether_it_fails_or_not(postgres):
    """On a cold pool, on a warm one, and again after a failure."""
    budget = RetryBudget(ratio=0.25, reserve=0)
    async with ResilientPool(postgres.dsn(), retry_budget=budget) as pool:
        await pool.fetch("SELECT 1")
        assert budget.tokens == 0.25
        await pool.fetch("SELECT 1")
        assert budget.tokens == 0.5
        with pytest.raises(asyncpg.UndefinedTableError):
            await pool.fetch("SELECT * FROM is_not_there")
        assert budget.tokens == 0.75
