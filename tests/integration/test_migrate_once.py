"""A migration is repeated only if it certainly changed nothing, whatever its last words are."""

from __future__ import annotations

import asyncio
import sys
import threading
import uuid
from collections.abc import AsyncIterator

import asyncpg
import psycopg2
import pytest
from migration_tools import PSQL, QUICK, databases, program, through, until

from resilient_pool import MigrationFailedError, ResilientPool, run_migration
from resilient_pool.clock import SystemClock
from resilient_pool.events import MigrationRepeated
from resilient_pool.migrations.server import MigrationLock, read_activity, reason_for_doubt
from resilient_pool.pooling.context import Dispatcher
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

NOWHERE = "postgresql://postgres@127.0.0.1:1/postgres"


def ignore(_line: str) -> None:
    """Ignore a line of output."""


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database of the test's own, with a table to count in."""
    async with databases(postgres, f"once_{uuid.uuid4().hex}") as (dsn,):
        await ask_for(dsn, "CREATE TABLE applied (id int)")
        yield dsn


async def ask_for(dsn: str, sql: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def rows(dsn: str) -> object:
    return await ask_for(dsn, "SELECT count(*) FROM applied")


async def fails_once(dsn: str, migration: object, kind: type[Exception], **options: object) -> Exception:
    """Run a migration that must end with its first failure, and return that."""
    events: list[object] = []
    with pytest.raises(kind) as caught:
        await run_migration(migration, dsn=dsn, backoff=QUICK, on_line=ignore, observers=[events.append], **options)
    assert not [event for event in events if isinstance(event, MigrationRepeated)]
    return caught.value


@pytest.mark.parametrize("lock", ["deploy", None], ids=["under the lock", "without it"])
async def test_a_second_connection_that_fails_after_a_first_one_worked_is_final(dsn, lock):
    """What the first one did would be done twice; the error says why it was not run again."""
    calls = []

    async def twice() -> None:
        calls.append(1)
        await ask_for(dsn, "INSERT INTO applied VALUES (1)")
        await asyncpg.connect(NOWHERE)

    error = await fails_once(dsn, twice, ConnectionRefusedError, lock=lock)
    assert "it was not run again: the server counted 1 other session(s)" in "".join(error.__notes__)
    assert (calls, await rows(dsn)) == ([1], 1)


async def test_a_function_whose_own_pool_reconnects_in_vain_is_final(postgres, dsn):
    """Its error is that of connecting, but its pool had worked before."""
    with FaultProxy(postgres.host, postgres.port) as proxy:

        async def migrate() -> None:
            async with asyncpg.create_pool(through(dsn, proxy.port), min_size=1, max_size=1) as pool:
                await pool.execute("INSERT INTO applied VALUES (1)")
                await pool.expire_connections()
                proxy.refuse()
                await pool.execute("INSERT INTO applied VALUES (2)")

        await fails_once(dsn, migrate, ConnectionRefusedError)
    assert await rows(dsn) == 1


SILENT = """
import asyncio, asyncpg, os
async def migrate():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    await connection.execute({sql!r})
    await connection.close()
    await asyncpg.connect("postgresql://postgres@127.0.0.1:1/postgres")
asyncio.run(migrate())
"""


@pytest.mark.parametrize("sql", ["INSERT INTO applied VALUES (1)", "SELECT 1"], ids=["written", "only looked"])
async def test_a_command_that_had_connected_before_is_final_though_it_says_nothing_of_it(dsn, sql):
    """The server has counted its session."""
    error = await fails_once(dsn, program(SILENT.format(sql=sql)), MigrationFailedError)
    assert "it was not run again: the server counted 1 other session(s)" in "".join(error.__notes__)
    assert await rows(dsn) == ("INSERT" in sql)


async def test_a_command_that_had_connected_to_another_database_of_the_server_is_final(postgres, dsn):
    """Sessions are counted in all of them."""
    other = postgres.dsn("postgres")
    source = SILENT.format(sql="SELECT 1").replace('os.environ["DATABASE_URL"]', repr(other))
    error = await fails_once(dsn, program(source), MigrationFailedError)
    assert "the server counted 1 other session(s)" in "".join(error.__notes__)


async def test_a_command_that_left_a_session_behind_is_final(dsn):
    """Its session is still there when the command has ended."""
    source = SILENT.format(sql="SELECT 1").replace("await connection.close()", "pass")
    await fails_once(dsn, program(source), MigrationFailedError)


PSYCOPG2 = """
import psycopg2, sys
connection = psycopg2.connect(sys.argv[1])
connection.cursor().execute("INSERT INTO applied VALUES (1)")
connection.commit()
"""
SQLALCHEMY = """
import sqlalchemy, sys
engine = sqlalchemy.create_engine(sys.argv[1].replace("postgresql:", "postgresql+psycopg2:"))
with engine.begin() as connection:
    connection.execute(sqlalchemy.text("INSERT INTO applied VALUES (1)"))
"""


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("lost", [b"COMMIT", b"INSERT"])
@pytest.mark.parametrize("source", [PSYCOPG2, SQLALCHEMY], ids=["psycopg2", "SQLAlchemy over it"])
async def test_a_loss_in_the_middle_is_not_taken_for_a_failure_to_connect(postgres, dsn, source, lost, how):
    """psycopg2 says of both that the server closed the connection unexpectedly."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.swallow_next_answer(how, matching=lost)
        error = await fails_once(dsn, [*program(source), through(dsn, proxy.port)], MigrationFailedError)
        assert proxy.fired == 1
    assert "server closed the connection unexpectedly" in "".join(error.output)
    assert await rows(dsn) == (lost == b"COMMIT")


async def test_a_psycopg2_function_whose_commit_was_lost_is_called_once(postgres, dsn):
    """Likewise inside this process."""
    with FaultProxy(postgres.host, postgres.port) as proxy:

        def migrate() -> None:
            connection = psycopg2.connect(through(dsn, proxy.port))
            connection.cursor().execute("INSERT INTO applied VALUES (1)")
            proxy.swallow_next_answer("rst", matching=b"COMMIT")
            connection.commit()

        await fails_once(dsn, migrate, psycopg2.OperationalError)
    assert await rows(dsn) == 1


@pytest.mark.parametrize("away", ["refuse", "reject", "answer_with_error"])
async def test_what_never_connected_is_run_again(postgres, dsn, away):
    """psycopg2's words while it connects, and nothing that the server saw: it is run again, and once in the end."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        getattr(proxy, away)()

        def observe(event: object) -> None:
            if isinstance(event, MigrationRepeated):
                proxy.restore()

        command = [*program(PSYCOPG2), through(dsn, proxy.port)]
        result = await run_migration(command, dsn=dsn, backoff=QUICK, on_line=ignore, observers=[observe])
    assert (result.attempts, await rows(dsn)) == (2, 1)


async def test_what_was_begun_long_before_the_last_words_is_remembered(dsn):
    """However much was said meanwhile."""
    source = (
        "print('INFO  [alembic.runtime.migration] Running upgrade a -> b')\n"
        "for _ in range(2000): print('INFO something')\n"
        f"import os; os.execv({PSQL!r}, ['psql', {NOWHERE!r}, '-c', 'SELECT 1'])"
    )
    error = await fails_once(dsn, [sys.executable, "-u", "-c", source], MigrationFailedError)
    assert "it had begun ('INFO  [alembic.runtime.migration] Running upgrade a -> b')" in "".join(error.__notes__)


# What the server saw


async def test_the_server_knows_whether_anything_happened_in_between(dsn):
    """A write through a session that was there before, as a pooler's is, shows too; a read through it does not."""
    other = await asyncpg.connect(dsn)
    async with ResilientPool(dsn, max_size=2) as pool:
        before = await read_activity(pool, 5.0)
        await other.fetchval("SELECT count(*) FROM applied")
        assert reason_for_doubt(before, await read_activity(pool, 5.0)) is None

        before = await read_activity(pool, 5.0)
        await other.execute("INSERT INTO applied VALUES (1)")
        assert "something was written on the server meanwhile" in str(
            reason_for_doubt(before, await read_activity(pool, 5.0))
        )

        before = await read_activity(pool, 5.0)
        await pool.expire_connections()
        assert reason_for_doubt(before, await read_activity(pool, 5.0)) is None, "our own sessions do not count"

        before = await read_activity(pool, 5.0)
        await other.execute("SELECT pg_stat_reset()")
        assert "its statistics were reset" in str(reason_for_doubt(before, await read_activity(pool, 5.0)))
    await other.close()


async def test_a_role_without_privileges_sees_it_as_well(postgres, dsn):
    """Sessions that are there, and those that have been."""
    name = f"plain_{uuid.uuid4().hex[:8]}"
    await postgres.create_role(name, "secret")
    async with ResilientPool(postgres.dsn(dsn.rpartition("/")[2], name, "secret"), max_size=2) as pool:
        before = await read_activity(pool, 5.0)
        other = await asyncpg.connect(dsn)
        assert before is not None
        assert "1 other session(s)" in str(reason_for_doubt(before, await read_activity(pool, 5.0)))
        await other.close()
    async with postgres.admin() as admin:
        await admin.execute(f"DROP ROLE {name}")


async def test_a_clean_restart_keeps_the_count_and_a_crash_ends_it():
    """After a crash there is no evidence, so that nothing is run again."""
    async with EmbeddedPostgres() as server, ResilientPool(server.dsn(), max_size=2, deadline=20.0) as pool:
        before = await read_activity(pool, 20.0)
        await server.restart()
        after = await read_activity(pool, 20.0)
        assert before is not None
        assert after is not None
        assert after.server == before.server
        await server.restart("immediate")
        assert "the server crashed" in str(reason_for_doubt(before, await read_activity(pool, 20.0)))


async def test_without_evidence_nothing_is_run_again(postgres, dsn):
    """A standby has no such counters; the error says so."""
    async with await postgres.standby(f"blind_{uuid.uuid4().hex[:8]}") as replica, ResilientPool(replica.dsn()) as pool:
        assert await read_activity(pool, 5.0) is None
    assert "the server could not be asked" in str(reason_for_doubt(None, None))


# A function in a thread


async def test_a_cancelled_function_keeps_the_lock_until_its_thread_has_ended(dsn, caplog):
    """It cannot be ended, so the next migration waits for it; a second cancellation changes nothing."""
    log: list[str] = []
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert may_end.wait(20)
        log.append("first ends")

    async def second() -> None:
        log.append("second runs")

    first = asyncio.ensure_future(run_migration(slow, dsn=dsn))
    await asyncio.wait_for(begun.wait(), 20)
    next_one = asyncio.ensure_future(run_migration(second, dsn=dsn))
    first.cancel()
    await until(lambda: caplog.text)
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert log[:1] == ["first ends"]
    await next_one
    assert log == ["first ends", "second runs"]
    assert "a function in a thread cannot be ended: it is waited for" in caplog.text


async def test_a_cancelled_function_that_fails_in_its_thread_says_so(dsn, caplog):
    """The cancellation reaches the caller; what became of the function is a note on it."""
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def fail() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert may_end.wait(20)
        raise ValueError

    running = asyncio.ensure_future(run_migration(fail, dsn=dsn))
    await asyncio.wait_for(begun.wait(), 20)
    running.cancel()
    await until(lambda: caplog.text)
    may_end.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await running
    assert "ran to its end in its thread, and ended with ValueError" in "".join(caught.value.__notes__)


async def test_a_lock_that_is_cancelled_as_it_is_given_back_leaves_no_connection_behind(dsn):
    """The pool can be closed at once, and the next migration begins, at whatever turn of the event loop that was."""
    for turns in range(40):
        async with asyncio.timeout(10), ResilientPool(dsn) as pool:
            lock, leaving = MigrationLock(pool, "given back", SystemClock(), Dispatcher(())), asyncio.Event()

            async def hold(lock=lock, leaving=leaving):
                async with lock.held(5):
                    leaving.set()

            task = asyncio.create_task(hold())
            await leaving.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            ended = task.done()
            task.cancel()
            await asyncio.wait([task])
        if ended:
            return
