"""Failures provoked on a real server, as the installed asyncpg tells them, and the verdicts on them."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Disposition, Failure, Phase
from resilient_pool.testing import EmbeddedPostgres

# From this version on asyncpg passes on what the server said before it closed a connection.
TELLS_THE_REASON = tuple(int(part) for part in asyncpg.__version__.split(".")[:2]) >= (0, 32)
LIMIT = 10.0


async def failure_of(operation: Awaitable[object] | Callable[[], Awaitable[object]]) -> Exception:
    """Wait for something that has to fail, and return how; some of asyncpg's methods fail when they are called."""
    async with asyncio.timeout(LIMIT):
        try:
            result = await (operation() if callable(operation) else operation)
        except TimeoutError as error:
            return error
        except Exception as error:
            return error
    raise AssertionError(f"it did not fail but gave {result!r}")


def verdict(error: Exception, phase: Phase = Phase.EXECUTE, **known: bool) -> str:
    found = PostgresClassifier().classify(Failure(error=error, phase=phase, **known))
    others = "" if found.others is Disposition.KEEP else f" others {found.others.name}"
    return f"{found.fault.name} {found.outcome.name} {found.connection.name}{others}"


@pytest.fixture
async def connect(postgres: EmbeddedPostgres) -> AsyncIterator[Callable[..., Awaitable[asyncpg.Connection]]]:
    """Open connections that are gone when the test is, whatever became of them."""
    opened: list[asyncpg.Connection] = []

    async def open_one(**arguments: Any) -> asyncpg.Connection:
        connection = await asyncpg.connect(**{**postgres.connect_arguments(), **arguments})
        opened.append(connection)
        return connection

    yield open_one
    for connection in opened:
        connection.terminate()


@pytest.fixture
async def table(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """An empty table with two rows to fight over besides."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE TABLE classified (id int PRIMARY KEY, n int)")
        await admin.execute("INSERT INTO classified VALUES (1, 0), (2, 0)")
    yield "classified"
    await postgres.terminate_backends()  # some may hold locks on it
    async with postgres.admin() as admin:
        await admin.execute("DROP TABLE classified")


async def until_it_runs(postgres: EmbeddedPostgres, connection: asyncpg.Connection) -> None:
    """Wait until the server works on what was sent on that connection and sleeps in `pg_sleep`."""
    pid = connection.get_server_pid()
    async with postgres.admin() as admin, asyncio.timeout(LIMIT):
        while await admin.fetchval("SELECT wait_event FROM pg_stat_activity WHERE pid = $1", pid) != "PgSleep":
            await asyncio.sleep(0.005)


async def terminate(postgres: EmbeddedPostgres, connection: asyncpg.Connection) -> None:
    assert await postgres.terminate_backends(f"pid = {connection.get_server_pid()}") == 1


def freeze_until_the_server_hangs_up(connection: asyncpg.Connection) -> None:
    """Stand still, event loop and all, until the server has closed its end; asyncpg has noticed nothing then."""
    poll = select.poll()
    poll.register(connection._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    assert poll.poll(LIMIT * 1000)
    assert not connection.is_closed()


async def until_closed(connection: asyncpg.Connection) -> None:
    async with asyncio.timeout(LIMIT):
        while not connection.is_closed():
            await asyncio.sleep(0.005)


# Connecting


async def test_a_port_on_which_nobody_listens_is_worth_waiting_for(connect):
    """Refused: the server may be back soon."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        error = await failure_of(connect(port=reserved.getsockname()[1]))
    assert isinstance(error, ConnectionRefusedError)
    assert verdict(error, Phase.CONNECT) == "UNREACHABLE NOT_EXECUTED DISCARD"


async def test_a_server_that_does_not_answer_is_worth_waiting_for(postgres, connect):
    """The kernel accepts for a postmaster that stands still; our own timer gives up."""
    postgres.freeze()
    try:
        error = await failure_of(connect(timeout=0.3))
    finally:
        postgres.thaw()
    assert isinstance(error, TimeoutError)
    assert verdict(error, Phase.CONNECT) == "UNREACHABLE NOT_EXECUTED DISCARD"


async def test_a_socket_that_is_missing_stays_missing(connect, tmp_path: Path):
    """No such file."""
    error = await failure_of(connect(host=str(tmp_path)))
    assert isinstance(error, FileNotFoundError)
    assert verdict(error, Phase.CONNECT) == "PERMANENT NOT_EXECUTED DISCARD"


async def test_tls_which_the_server_does_not_offer_is_final_unless_it_is_waking(connect):
    """The embedded servers have no TLS."""
    error = await failure_of(connect(ssl="require"))
    assert verdict(error, Phase.CONNECT) == "PERMANENT NOT_EXECUTED DISCARD"
    assert verdict(error, Phase.CONNECT, waking=True) == "UNREACHABLE NOT_EXECUTED DISCARD"


async def test_refusals_by_the_server_are_final_and_a_full_house_is_not(postgres, connect):
    """A wrong password and a missing database stay wrong and missing; a connection limit may be met again."""
    await postgres.create_role("classified", "right", options="CONNECTION LIMIT 1")
    try:
        wrong_password = await failure_of(connect(user="classified", password="wrong"))
        missing_database = await failure_of(connect(database="nowhere"))
        only_one = await connect(user="classified", password="right")
        one_too_many = await failure_of(connect(user="classified", password="right"))
        await only_one.close()
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP ROLE classified")
    for waking in (False, True):
        assert verdict(wrong_password, Phase.CONNECT, waking=waking) == "PERMANENT NOT_EXECUTED DISCARD"
        assert verdict(missing_database, Phase.CONNECT, waking=waking) == "PERMANENT NOT_EXECUTED DISCARD"
        assert verdict(one_too_many, Phase.CONNECT, waking=waking) == "OVERLOADED NOT_EXECUTED DISCARD"


async def test_a_server_that_is_no_primary_may_become_one(postgres, connect):
    """`target_session_attrs` finds no server that writes."""
    await postgres.apply_settings({"default_transaction_read_only": True})
    try:
        error = await failure_of(connect(target_session_attrs="read-write"))
    finally:
        await postgres.apply_settings({"default_transaction_read_only": None})
    assert verdict(error, Phase.CONNECT) == "UNREACHABLE NOT_EXECUTED DISCARD"


# Connections that die


async def test_a_backend_terminated_in_the_middle_of_a_write_leaves_it_open(postgres, connect, table):
    """57P01 reaches the application as a loss, and a loss promises nothing."""
    connection = await connect()
    write = asyncio.create_task(failure_of(connection.execute(f"INSERT INTO {table} SELECT 9 FROM pg_sleep(60)")))
    await until_it_runs(postgres, connection)
    await terminate(postgres, connection)
    error = await write
    assert ("57P01" in Failure(error=error, phase=Phase.EXECUTE).sqlstates) is TELLS_THE_REASON
    assert verdict(error) == "DISCONNECTED UNKNOWN DISCARD"
    assert verdict(error, sent=False) == "STALE NOT_EXECUTED DISCARD"


async def test_a_session_ended_for_idleness_while_we_were_frozen_is_stale(connect, table):
    """From asyncpg 0.32 on the server's reason proves it; before, only whoever looked at the socket knows."""
    connection = await connect(server_settings={"idle_session_timeout": "100ms"})
    freeze_until_the_server_hangs_up(connection)
    error = await failure_of(connection.execute(f"INSERT INTO {table} VALUES (9)"))
    assert isinstance(error, asyncpg.ConnectionDoesNotExistError)
    assert verdict(error) == ("STALE NOT_EXECUTED DISCARD" if TELLS_THE_REASON else "DISCONNECTED UNKNOWN DISCARD")
    assert verdict(error, sent=False) == "STALE NOT_EXECUTED DISCARD"
    assert await (await connect()).fetchval(f"SELECT count(*) FROM {table} WHERE id = 9") == 0


async def test_a_session_found_ended_before_use_is_stale(connect, table):
    """With a loop that runs asyncpg notices by itself, and sends nothing."""
    connection = await connect(server_settings={"idle_session_timeout": "100ms"})
    prepared = await connection.prepare("SELECT 1")
    await connection.fetchval("SELECT 1")
    await until_closed(connection)
    for operation in (
        connection.execute(f"INSERT INTO {table} VALUES (9)"),
        connection.fetch("SELECT 1"),
        prepared.fetch,
    ):
        error = await failure_of(operation)
        assert isinstance(error, asyncpg.InterfaceError)
        assert verdict(error) == "STALE NOT_EXECUTED DISCARD"


async def test_a_loss_noticed_half_way_is_poison(connect):
    """Between the server's last word and the end of the stream asyncpg is in no state to start anything."""
    verdicts: list[str] = []
    for turns in range(7):
        connection = await connect(server_settings={"idle_session_timeout": "100ms"})
        freeze_until_the_server_hangs_up(connection)
        for _ in range(turns):
            await asyncio.sleep(0)
        error = await failure_of(connection.fetchval("SELECT 1"))
        verdicts.append(verdict(error))
        assert verdict(error, sent=False).split()[1] == "NOT_EXECUTED"
    noticed = "STALE NOT_EXECUTED DISCARD"
    assert verdicts[0] == (noticed if TELLS_THE_REASON else "DISCONNECTED UNKNOWN DISCARD")
    assert "POISONED UNKNOWN DISCARD" in verdicts
    assert verdicts[-1] == noticed


async def test_a_loss_masked_by_the_end_of_a_transaction_is_still_a_loss(postgres, connect, table):
    """`transaction()` tells only that it could not roll back."""
    connection = await connect()

    async def transact() -> None:
        async with connection.transaction():
            await connection.execute(f"INSERT INTO {table} VALUES (9)")
            await connection.execute("SELECT pg_sleep(60)")

    running = asyncio.create_task(failure_of(transact()))
    await until_it_runs(postgres, connection)
    await terminate(postgres, connection)
    error = await running
    assert isinstance(error, asyncpg.InterfaceError)
    assert verdict(error) == "DISCONNECTED UNKNOWN DISCARD"
    assert verdict(error, Phase.COMMIT) == "DISCONNECTED UNKNOWN DISCARD"


async def test_a_connection_lost_before_the_commit_leaves_the_commit_open(postgres, connect, table):
    """In COMMIT no reason for a loss is believed to prove anything."""
    connection = await connect()
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(f"INSERT INTO {table} VALUES (9)")
    await terminate(postgres, connection)
    error = await failure_of(transaction.commit)
    assert verdict(error, Phase.COMMIT) == "DISCONNECTED UNKNOWN DISCARD"


async def test_a_write_lost_while_an_older_failure_is_handled_is_not_excused_by_it(postgres, connect, table):
    """Python hangs the error being handled behind every error raised meanwhile; it proves nothing about them."""
    stale, fresh = await connect(), await connect()
    await terminate(postgres, stale)
    await until_closed(stale)
    try:
        await stale.execute("SELECT 1")
    except asyncpg.InterfaceError as older:
        write = asyncio.create_task(failure_of(fresh.execute(f"INSERT INTO {table} SELECT 9 FROM pg_sleep(60)")))
        await until_it_runs(postgres, fresh)
        await terminate(postgres, fresh)
        try:
            raise await write
        except asyncpg.PostgresError as error:
            assert older in list(Failure(error=error, phase=Phase.EXECUTE).chain())
            assert verdict(error) == "DISCONNECTED UNKNOWN DISCARD"


# Errors after which the session goes on


async def test_a_deadlock_is_rolled_back_and_the_connection_stays(connect, table):
    """One of two transactions that wait for each other is sacrificed."""
    first, second = await connect(), await connect()
    update = f"UPDATE {table} SET n = n + 1 WHERE id = $1"
    for connection, row in ((first, 1), (second, 2)):
        await connection.execute("SET deadlock_timeout = '20ms'")
        await connection.execute("BEGIN")
        await connection.execute(update, row)
    results = await asyncio.gather(first.execute(update, 2), second.execute(update, 1), return_exceptions=True)
    (error,) = [result for result in results if isinstance(result, Exception)]
    assert verdict(error) == "CONTENTION ROLLED_BACK KEEP"
    for connection in (first, second):
        await connection.execute("ROLLBACK")
        assert await connection.fetchval("SELECT 1") == 1


async def test_a_serialization_failure_is_rolled_back_wherever_it_strikes(connect, table):
    """At a statement as at COMMIT itself."""
    first, second = await connect(), await connect()
    swap = f"UPDATE {table} SET n = (SELECT sum(n) + 1 FROM {table}) WHERE id = $1"
    for connection, row in ((first, 1), (second, 2)):
        await connection.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
        await connection.execute(swap, row)
    await first.execute("COMMIT")
    error = await failure_of(second.execute("COMMIT"))
    assert verdict(error, Phase.COMMIT) == "CONTENTION ROLLED_BACK KEEP"

    await first.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await first.fetch(f"SELECT * FROM {table}")
    await second.execute(f"UPDATE {table} SET n = 7")
    error = await failure_of(first.execute(f"UPDATE {table} SET n = 8"))
    assert verdict(error) == "CONTENTION ROLLED_BACK KEEP"


async def test_a_server_that_only_reads_is_the_wrong_one_to_write_to(connect, table):
    """25006 tells a pool that writes to look for the new primary."""
    connection = await connect(server_settings={"default_transaction_read_only": "on"})
    error = await failure_of(connection.execute(f"INSERT INTO {table} VALUES (9)"))
    assert verdict(error) == "WRONG_SERVER NOT_EXECUTED DISCARD others EXPIRE"
    assert verdict(error, writable=False) == "PERMANENT ROLLED_BACK KEEP"


async def test_statements_that_were_prepared_and_are_no_longer_valid_are_prepared_again(connect, table):
    """A statement deallocated behind asyncpg's back, and one whose result has changed inside a transaction."""
    connection = await connect()
    query = f"SELECT * FROM {table} WHERE id = $1"
    await connection.fetch(query, 1)
    await connection.execute("DEALLOCATE ALL")
    missing = await failure_of(connection.fetch(query, 1))
    assert verdict(missing) == "STATEMENT_CACHE NOT_EXECUTED DISCARD"

    connection = await connect()
    await connection.fetch(query, 1)
    await connection.execute(f"ALTER TABLE {table} ADD COLUMN more text")
    await connection.execute("BEGIN")
    outdated = await failure_of(connection.fetch(query, 1))
    assert verdict(outdated) == "STATEMENT_CACHE NOT_EXECUTED DISCARD others EXPIRE"


async def test_a_type_made_anew_makes_cached_types_stale(connect):
    """The server no longer knows the number under which asyncpg remembers the type."""
    connection = await connect()
    await connection.execute("CREATE TYPE mood AS ENUM ('good')")
    query = "SELECT $1::mood"
    try:
        await connection.fetch(query, "good")
        await connection.execute("DROP TYPE mood; CREATE TYPE mood AS ENUM ('good', 'bad')")
        error = await failure_of(connection.fetch(query, "bad"))
    finally:
        await connection.execute("DROP TYPE mood")
    assert isinstance(error, asyncpg.InternalServerError)
    assert verdict(error) == "STATEMENT_CACHE ROLLED_BACK DISCARD others EXPIRE"


async def test_a_row_that_cannot_be_read_any_more_was_written_all_the_same(connect):
    """asyncpg finds a composite type changed when it decodes the rows of a statement that has run to its end."""
    connection, observer = await connect(), await connect()
    await connection.execute("CREATE TYPE pair AS (a int, b int); CREATE TABLE pairs (p pair)")
    insert = "INSERT INTO pairs VALUES (ROW(1, 2)) RETURNING p"
    try:
        await connection.fetch(insert)
        await observer.execute("ALTER TYPE pair ADD ATTRIBUTE c int CASCADE")
        error = await failure_of(connection.fetch("INSERT INTO pairs VALUES (ROW(1, 2, 3)) RETURNING p"))
        rows = await observer.fetchval("SELECT count(*) FROM pairs")
    finally:
        await observer.execute("DROP TABLE pairs; DROP TYPE pair")
    assert isinstance(error, asyncpg.OutdatedSchemaCacheError)
    assert rows == 2
    assert verdict(error) == "STATEMENT_CACHE UNKNOWN DISCARD others EXPIRE"


async def test_a_servers_own_time_limits_are_the_applications_to_see(connect, table):
    """statement_timeout and lock_timeout are somebody's intention, and leave the session usable."""
    holder, connection = await connect(), await connect()
    await connection.execute("SET statement_timeout = '300ms'")
    slow = await failure_of(connection.execute("SELECT pg_sleep(60)"))
    assert verdict(slow) == "PERMANENT ROLLED_BACK KEEP"
    await connection.execute("SET statement_timeout = 0; SET lock_timeout = '50ms'")
    await holder.execute(f"BEGIN; LOCK TABLE {table}")
    locked = await failure_of(connection.execute(f"LOCK TABLE {table}"))
    assert verdict(locked) == "PERMANENT ROLLED_BACK KEEP"


async def test_mistakes_of_the_application_are_final(connect, table):
    """Constraint, syntax, argument, time limit and misuse: none is cured by trying again."""
    connection = await connect()
    duplicate = await failure_of(connection.execute(f"INSERT INTO {table} VALUES (1)"))
    syntax = await failure_of(connection.execute("SELEC 1"))
    argument = await failure_of(connection.fetch("SELECT $1::int", "one"))
    number = await failure_of(connection.fetch("SELECT $1::int", 1, 2))
    impatient = await failure_of(connection.execute("SELECT pg_sleep(60)", timeout=0.05))
    busy = asyncio.create_task(connection.execute("SELECT pg_sleep(0.2)"))
    await asyncio.sleep(0)
    misuse = await failure_of(connection.execute("SELECT 1"))
    await busy
    verdicts = [verdict(error) for error in (duplicate, syntax, argument, number, impatient, misuse)]
    assert verdicts == [
        "PERMANENT ROLLED_BACK KEEP",
        "PERMANENT ROLLED_BACK KEEP",
        "PERMANENT UNKNOWN DISCARD",
        "PERMANENT UNKNOWN DISCARD",
        "PERMANENT UNKNOWN DISCARD",
        "PERMANENT NOT_EXECUTED KEEP",
    ]
