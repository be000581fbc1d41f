"""Directories of SQL files: each file once, in order, in one transaction, recorded; and what is refused."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from migration_tools import QUICK, databases, run, through

from resilient_pool import ConfigurationError, MigrationFailedError, MigrationResult, run_migration
from resilient_pool.events import MigrationStarted, OutcomeResolved
from resilient_pool.migrations.sql_directory import NO_TRANSACTION
from resilient_pool.testing import EmbeddedPostgres, End, FaultProxy, Point, Refusal, ScriptedServer

APPLIED = "SELECT name FROM resilient_pool_migrations WHERE finished_at IS NOT NULL ORDER BY name"


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database of the test's own."""
    async with databases(postgres, f"files_{uuid.uuid4().hex}") as (dsn,):
        yield dsn


def write(directory: Path, **files: str) -> Path:
    """Write files into a directory, each under its name and `.sql`."""
    directory.mkdir(exist_ok=True)
    for name, sql in files.items():
        (directory / f"{name.lstrip('_')}.sql").write_text(sql)
    return directory


async def ask(dsn: str, sql: str) -> list:
    connection = await asyncpg.connect(dsn)
    try:
        return [row[0] for row in await connection.fetch(sql)]
    finally:
        await connection.close()


async def migrate(dsn: str, directory: Path, **options) -> MigrationResult:
    return await run_migration(directory, dsn=dsn, backoff=QUICK, on_line=lambda _: None, **options)


async def test_each_file_is_applied_once_in_the_order_of_their_numbers(dsn, tmp_path):
    """Ten comes after nine; what is recorded is not applied again, what is new is."""
    write(tmp_path, _1_make="CREATE TABLE t (id serial, what text)", _9_nine="INSERT INTO t (what) VALUES ('nine')")
    write(tmp_path, _10_ten="INSERT INTO t (what) VALUES ('ten'); INSERT INTO t (what) VALUES ('more');")
    first = await migrate(dsn, tmp_path)
    assert first.applied == ("1_make.sql", "9_nine.sql", "10_ten.sql")
    assert (await migrate(dsn, tmp_path)).applied == ()
    write(tmp_path, _11_eleven="INSERT INTO t (what) VALUES ('eleven')")
    assert (await migrate(dsn, tmp_path)).applied == ("11_eleven.sql",)
    assert await ask(dsn, "SELECT what FROM t ORDER BY id") == ["nine", "ten", "more", "eleven"]


async def test_a_failing_file_is_undone_as_a_whole_and_named_with_its_line(dsn, tmp_path):
    """Those before it stay, those after it are not begun, and once it is mended it is applied."""
    write(tmp_path, _1="CREATE TABLE a ()", _2="CREATE TABLE b ();\nCREAT TABLE c ();\n", _3="CREATE TABLE d ()")
    events = []
    with pytest.raises(MigrationFailedError, match=r'2\.sql, line 2: syntax error at or near "CREAT"') as caught:
        await migrate(dsn, tmp_path, observers=[events.append])
    assert isinstance(caught.value.__cause__, asyncpg.PostgresSyntaxError)
    assert len([event for event in events if isinstance(event, MigrationStarted)]) == 1
    assert await ask(dsn, APPLIED) == ["1.sql"]
    assert await ask(dsn, "SELECT to_regclass('b') IS NULL") == [True]
    write(tmp_path, _2="CREATE TABLE b ();\nCREATE TABLE c ();\n")
    assert (await migrate(dsn, tmp_path)).applied == ("2.sql", "3.sql")


async def test_a_recorded_file_that_has_changed_is_refused_before_anything_is_applied(dsn, tmp_path):
    """But not one whose line ends are another system's."""
    await migrate(dsn, write(tmp_path, _1="CREATE TABLE a ();\n"))
    write(tmp_path, _2="CREATE TABLE b ()")
    (tmp_path / "1.sql").write_bytes(b"CREATE TABLE a ();\r\n")
    assert (await migrate(dsn, tmp_path)).applied == ("2.sql",)
    write(tmp_path, _1="CREATE TABLE a (id int);\n", _3="CREATE TABLE c ()")
    with pytest.raises(MigrationFailedError, match=r"1\.sql has changed since it was applied"):
        await migrate(dsn, tmp_path)
    assert await ask(dsn, APPLIED) == ["1.sql", "2.sql"]


@pytest.mark.parametrize("lock", ["deploy", None], ids=["under the lock", "without it"])
async def test_two_deployments_apply_each_file_once(dsn, tmp_path, lock):
    """Also without the lock: the record is written first, and the second one waits for it."""
    write(tmp_path, _1="CREATE TABLE t (id int)", _2="INSERT INTO t VALUES (1); SELECT pg_sleep(0.2)")
    results = await asyncio.gather(*(migrate(dsn, tmp_path, lock=lock) for _ in range(2)))
    assert sorted(name for result in results for name in result.applied) == ["1.sql", "2.sql"]
    assert await ask(dsn, "SELECT id FROM t") == [1]


@pytest.mark.parametrize(
    ("sqlstate", "message"),
    [
        ("23505", 'duplicate key value violates unique constraint "pg_type_typname_nsp_index"'),
        ("42P07", 'relation "resilient_pool_migrations" already exists'),
        ("42710", 'type "resilient_pool_migrations" already exists'),
    ],
)
async def test_a_table_that_another_deployment_creates_at_the_same_moment_is_used(
    postgres, dsn, tmp_path, sqlstate, message
):
    """Whichever of the server's checks sees it first."""
    write(tmp_path, _1="CREATE TABLE t (id int)")
    line = Refusal(
        at=Point.QUERY,
        severity="ERROR",
        sqlstate=sqlstate,
        message=message,
        then=End.READY,
        executed=True,
        matching="CREATE TABLE IF NOT EXISTS resilient_pool_migrations",
    )
    with ScriptedServer(line, host=postgres.host, port=postgres.port) as server:
        result = await migrate(through(dsn, server.port), tmp_path)
        assert server.sent == (line,)
    assert result.applied == ("1.sql",)


async def test_a_type_with_the_name_of_the_table_is_an_error_that_names_it(dsn, tmp_path):
    """It is not taken for a table that another deployment has just created."""
    await ask(dsn, "CREATE TYPE resilient_pool_migrations AS ENUM ('one')")
    write(tmp_path, _1="CREATE TABLE t (id int)")
    with pytest.raises(asyncpg.DuplicateObjectError, match='type "resilient_pool_migrations" already exists'):
        await migrate(dsn, tmp_path)


async def test_a_commit_whose_answer_was_lost_is_resolved(postgres, dsn, tmp_path):
    """The file took effect, so it counts as applied, and it is not applied again."""
    write(tmp_path, _1="CREATE TABLE t (id int)", _2="INSERT INTO t VALUES (1)")
    await migrate(dsn, tmp_path)
    write(tmp_path, _3="INSERT INTO t VALUES (3)")
    events = []
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.swallow_next_answer("rst", matching=b"COMMIT")
        result = await migrate(through(dsn, proxy.port), tmp_path, observers=[events.append])
        assert proxy.fired == 1
    assert result.applied == ("3.sql",)
    assert [event.answer for event in events if isinstance(event, OutcomeResolved)] == ["committed"]
    assert await ask(dsn, "SELECT id FROM t ORDER BY id") == [1, 3]


async def test_a_connection_lost_before_the_commit_is_made_good(postgres, dsn, tmp_path):
    """The transaction is repeated as a whole."""
    write(tmp_path, _1="CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.lose_next_request(matching=b"CREATE TABLE t ")
        assert (await migrate(through(dsn, proxy.port), tmp_path)).applied == ("1.sql",)
        assert proxy.fired == 1
    assert await ask(dsn, "SELECT id FROM t") == [1]


async def test_a_marked_file_runs_outside_a_transaction(dsn, tmp_path):
    """Unmarked, the server says that it cannot, and nothing is recorded."""
    write(tmp_path, _1="CREATE TABLE t (id int)", _2="CREATE INDEX CONCURRENTLY i ON t (id)")
    with pytest.raises(MigrationFailedError, match=r"2\.sql: CREATE INDEX CONCURRENTLY cannot run inside"):
        await migrate(dsn, tmp_path)
    write(tmp_path, _2=f"{NO_TRANSACTION}\nCREATE INDEX CONCURRENTLY i ON t (id)")
    assert (await migrate(dsn, tmp_path)).applied == ("2.sql",)
    assert await ask(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") == [True]


async def test_a_marked_file_that_was_refused_may_be_mended(dsn, tmp_path):
    """The server's error is certain: it is not under way."""
    write(tmp_path, _1=f"{NO_TRANSACTION}\nVACUUM nowhere")
    with pytest.raises(MigrationFailedError, match=r'1\.sql: relation "nowhere" does not exist'):
        await migrate(dsn, tmp_path)
    write(tmp_path, _1=f"{NO_TRANSACTION}\nVACUUM pg_class")
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql",)


async def test_a_marked_file_whose_end_is_not_known_is_refused_until_its_record_is_changed(postgres, dsn, tmp_path):
    """It is not guessed: the connection was lost while it ran."""
    write(tmp_path, _1=f"{NO_TRANSACTION}\nVACUUM pg_class")
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.swallow_next_answer("rst", matching=b"VACUUM")
        with pytest.raises(MigrationFailedError, match=r"1\.sql: the connection was lost, and its end is not known"):
            await migrate(through(dsn, proxy.port), tmp_path)
        assert proxy.fired == 1
    with pytest.raises(MigrationFailedError, match="was begun before and its end is not known"):
        await migrate(dsn, tmp_path)


async def test_a_marked_file_whose_end_is_not_known_says_so_also_when_it_has_changed(postgres, dsn, tmp_path):
    """It was not applied for certain, so that "has changed since it was applied" would be wrong."""
    write(tmp_path, _1=f"{NO_TRANSACTION}\nVACUUM pg_class")
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.swallow_next_answer("rst", matching=b"VACUUM")
        with pytest.raises(MigrationFailedError):
            await migrate(through(dsn, proxy.port), tmp_path)
    write(tmp_path, _1=f"{NO_TRANSACTION}\nVACUUM pg_type")
    with pytest.raises(MigrationFailedError, match="was begun before and its end is not known"):
        await migrate(dsn, tmp_path)


@pytest.mark.parametrize("sql", ["VACUUM pg_class; VACUUM pg_type", "VACUUM pg_class; -- and\nVACUUM", "-- nothing"])
async def test_a_marked_file_that_is_not_one_statement_is_refused_before_the_database_is_asked(tmp_path, sql):
    """The server would refuse it, or its progress would have to be found out by hand."""
    with pytest.raises(ConfigurationError, match=r"1\.sql is marked .* but is not one statement"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres", write(tmp_path, _1=f"{NO_TRANSACTION}\n{sql}"))


@pytest.mark.parametrize("sql", ["VACUUM pg_class; -- done", "DO $$ BEGIN NULL; NULL; END $$;;"])
async def test_a_marked_file_may_end_its_one_statement(dsn, tmp_path, sql):
    """By a semicolon, and a comment after it; those inside a text in dollars do not count."""
    assert (await migrate(dsn, write(tmp_path, _1=f"{NO_TRANSACTION}\n{sql}"))).applied == ("1.sql",)


FAILING = "DO $$ BEGIN PERFORM nextval('calls'); RAISE 'as always' USING ERRCODE = '{}'; END $$"


@pytest.mark.parametrize(
    ("sql", "message", "calls"),
    [
        pytest.param(FAILING.format("40001"), r"as always \(in each of 5 attempts\)", 5, id="contention"),
        pytest.param(FAILING.format("53100"), "as always", None, id="disk full"),
        pytest.param(FAILING.format("57P03"), "as always", None, id="starting up"),
        pytest.param(
            "SELECT nextval('calls'); SELECT pg_terminate_backend(pg_backend_pid())",
            "terminat|closed",
            None,
            id="killed",
        ),
    ],
)
async def test_whatever_a_file_raises_is_its_own_failure_and_has_an_end(dsn, tmp_path, sql, message, calls):
    """The database was there: no status 3, and no repetition without end."""
    await (connection := await asyncpg.connect(dsn)).execute("CREATE SEQUENCE calls")
    await connection.close()
    async with asyncio.timeout(25):
        with pytest.raises(MigrationFailedError, match=rf"^1\.sql.*({message})"):
            await migrate(dsn, write(tmp_path, _1=sql), deadline=None)
    made = (await ask(dsn, "SELECT last_value FROM calls"))[0]
    assert made == calls if calls else made <= 5


async def test_the_error_of_a_role_that_may_not_create_names_the_table_and_the_grant(postgres, dsn, tmp_path):
    """The failure is the migration's, and nothing was applied."""
    name = f"modest_{uuid.uuid4().hex}"
    await postgres.create_role(name, "secret")
    try:
        with pytest.raises(
            MigrationFailedError, match=r"table resilient_pool_migrations.*permission denied.*GRANT it CREATE"
        ):
            await migrate(postgres.dsn(dsn.rpartition("/")[2], name, "secret"), write(tmp_path, _1="SELECT 1"))
    finally:
        async with postgres.admin() as admin:
            await admin.execute(f"DROP ROLE {name}")


@pytest.mark.parametrize("sql", ["CREATE TABLE a (); COMMIT; CREATE TABLE b ()", "BEGIN; CREATE TABLE a (); END"])
async def test_a_file_that_ends_its_transaction_is_refused_before_the_database_is_asked(tmp_path, sql):
    """It could be applied in part."""
    with pytest.raises(ConfigurationError, match=r"1\.sql may end the transaction"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres", write(tmp_path, _1=sql))


async def test_a_file_that_changes_the_search_path_is_recorded_where_the_others_are(dsn, tmp_path):
    """The record is made first, and the next file begins with a clean session."""
    write(tmp_path, _1="CREATE SCHEMA other; SET search_path = other; CREATE TABLE t ()", _2="CREATE TABLE u ()")
    await migrate(dsn, tmp_path)
    assert await ask(dsn, APPLIED) == ["1.sql", "2.sql"]
    assert await ask(
        dsn, "SELECT 1 WHERE to_regclass('other.t') IS NOT NULL AND to_regclass('public.u') IS NOT NULL"
    ) == [1]


async def test_the_command_line_applies_a_directory(dsn, tmp_path):
    """It writes the name of each file to standard output."""
    write(tmp_path, _1="CREATE TABLE a ()", _2="CREATE TABLE b (")
    status, output, errors = await run("migrate", str(tmp_path), dsn=dsn)
    assert (status, output) == (1, "applied 1.sql\n")
    assert "resilient-pool: the migration failed: 2.sql" in errors
    assert "syntax error at end of input" in errors


async def test_a_directory_is_applied_when_its_output_cannot_be_written(dsn, tmp_path):
    """The output about the files is not part of applying them."""
    write(tmp_path, _1="CREATE TABLE a ()", _2="CREATE TABLE b ()")
    calls = []

    def broken(line: str) -> None:
        calls.append(line)
        raise BrokenPipeError

    result = await run_migration(tmp_path, dsn=dsn, backoff=QUICK, on_line=broken)
    assert result.applied == ("1.sql", "2.sql")
    assert calls == ["applied 1.sql"]
    assert await ask(dsn, APPLIED) == ["1.sql", "2.sql"]


@pytest.mark.parametrize("sql", ["", "-- later\n", ";", "/* nothing */ ;; -- yet", "\ufeff"])
async def test_a_file_without_a_statement_is_recorded(dsn, tmp_path, sql):
    """It is applied, and not again."""
    write(tmp_path, _1=sql)
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql",)
    assert (await migrate(dsn, tmp_path)).applied == ()
    assert await ask(dsn, APPLIED) == ["1.sql"]


async def test_a_renamed_file_is_not_applied_again(dsn, tmp_path):
    """It is refused with the statement that renames its record, and that works."""
    write(tmp_path, _1="CREATE TABLE t (id int)", _2="INSERT INTO t VALUES (1)")
    await migrate(dsn, tmp_path)
    (tmp_path / "2.sql").rename(tmp_path / "02_it's.sql")
    write(tmp_path, _0="CREATE TABLE u ()")
    with pytest.raises(MigrationFailedError, match=r"02_it's\.sql holds exactly what is recorded as 2\.sql") as caught:
        await migrate(dsn, tmp_path)
    assert await ask(dsn, "SELECT id FROM t") == [1]
    assert await ask(dsn, "SELECT 1 WHERE to_regclass('u') IS NULL") == [1]
    statement = str(caught.value).partition("rename the record: ")[2].partition(". If it")[0]
    await ask(dsn, statement)
    assert (await migrate(dsn, tmp_path)).applied == ("0.sql",)
    assert await ask(dsn, "SELECT id FROM t") == [1]


async def test_two_files_may_hold_the_same(dsn, tmp_path):
    """As long as both are there; and an empty file may be renamed as one likes."""
    write(tmp_path, _1="CREATE TABLE t (id int)", _2="INSERT INTO t VALUES (1)", _3="-- nothing")
    await migrate(dsn, tmp_path)
    write(tmp_path, _4="INSERT INTO t VALUES (1)")
    (tmp_path / "3.sql").rename(tmp_path / "5.sql")
    assert (await migrate(dsn, tmp_path)).applied == ("4.sql", "5.sql")
    assert await ask(dsn, "SELECT id FROM t") == [1, 1]


async def test_hidden_files_and_directories_are_left_out(dsn, tmp_path):
    """What a file manager or an editor leaves behind stops nothing, but a link to nowhere does."""
    write(tmp_path, _1="CREATE TABLE t ()")
    (tmp_path / "._1.sql").write_bytes(b"\x00\xff")
    (tmp_path / ".#2.sql").symlink_to("nowhere")
    (tmp_path / "old.sql").mkdir()
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql",)
    (tmp_path / "3.sql").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match=r"3\.sql cannot be read"):
        await migrate(dsn, tmp_path)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("COPY t FROM stdin;\n1\n2\n\\.\n", "holds COPY ... FROM STDIN"),
        ("CREATE TABLE t (i int); COPY public.t (i) FROM STDIN WITH (FORMAT csv);", "holds COPY ... FROM STDIN"),
        ("copy binary t from /* here */ stdin", "holds COPY ... FROM STDIN"),
        (f"{NO_TRANSACTION}\nCOPY t FROM stdin", "holds COPY ... FROM STDIN"),
        ("SELECT 1;\n\\connect other\n", "line 2 begins with a backslash, as psql's own commands do"),
        ("\\restrict abc\nSELECT 1;", "line 1 begins with a backslash"),
        ("SELECT 'no end;\nCOMMIT;", "cannot be read to its end for certain"),
        ("SELECT 1; COMMIT", "may end the transaction"),
        ("SELECT '\0'", "holds a character of code 0"),
    ],
)
async def test_a_file_that_cannot_be_applied_is_refused_at_once_with_its_reason(tmp_path, sql, message):
    """Before the database is asked, so that nothing hangs while it holds the lock."""
    with pytest.raises(ConfigurationError) as caught:
        await migrate("postgresql://postgres@127.0.0.1:1/postgres", write(tmp_path, _1=sql))
    assert str(caught.value).startswith("1.sql ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE stdin (i int); COPY (SELECT i FROM stdin) TO '/dev/null'",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; END",
        "CREATE TABLE t (path text); INSERT INTO t VALUES ('C:\\dir\\'), ('it''s')",
        "PREPARE p AS SELECT 1; DEALLOCATE p",
        "SAVEPOINT s; CREATE TABLE t (); ROLLBACK TO SAVEPOINT s",
    ],
)
async def test_a_valid_file_is_not_mistaken_for_another(dsn, tmp_path, sql):
    """It only looks like COPY FROM STDIN, or like the end of a transaction."""
    assert (await migrate(dsn, write(tmp_path, _1=sql))).applied == ("1.sql",)


async def test_a_file_name_that_is_not_utf_8_is_refused(tmp_path):
    """It cannot be recorded."""
    (tmp_path / "a\udcff.sql").write_text("SELECT 1")
    with pytest.raises(ConfigurationError, match="is not UTF-8"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres", tmp_path)


async def test_what_cannot_run_in_a_transaction_says_where_it_can(dsn, tmp_path):
    """The server's error names the trouble, ours the way out."""
    with pytest.raises(
        MigrationFailedError, match=f"(?s)VACUUM cannot run inside .* that begins with '{NO_TRANSACTION}'"
    ):
        await migrate(dsn, write(tmp_path, _1="VACUUM"))


async def test_a_large_file_holds_up_neither_the_loop_nor_its_transaction(dsn, tmp_path):
    """It is read before, in a thread: an idle transaction of a second would be ended by the server."""
    rows = ",\n".join(f"({i}, lower('some text {i}'))" for i in range(60_000))
    write(tmp_path, _1=f"CREATE TABLE big (id int, what text); INSERT INTO big VALUES {rows}")
    await ask(dsn, f"ALTER DATABASE {dsn.rpartition('/')[2]} SET idle_in_transaction_session_timeout = '600ms'")
    longest, last = 0.0, time.thread_time()

    async def watch() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.01)
            now = time.thread_time()  # which stands still while the machine does something else
            longest, last = max(longest, now - last), now

    watching = asyncio.ensure_future(watch())
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql",)
    watching.cancel()
    assert longest < 0.5
    assert await ask(dsn, "SELECT count(*) FROM big") == [60_000]


# Locks that are not to be had, and statements that commit on their way


async def test_a_lock_timeout_is_tried_again(dsn, tmp_path):
    """As a conflict with another transaction is; the file is undone in between."""
    await migrate(dsn, write(tmp_path, _1="CREATE TABLE t (id int)"))
    blocker = await asyncpg.connect(dsn)
    await blocker.execute("BEGIN; LOCK TABLE t IN ACCESS SHARE MODE")
    write(tmp_path, _2="SET LOCAL lock_timeout = '50ms'; ALTER TABLE t ADD COLUMN j int")
    migration = asyncio.ensure_future(migrate(dsn, tmp_path))
    async with asyncio.timeout(20):
        while not await ask(
            dsn, "SELECT 1 FROM pg_stat_database WHERE datname = current_database() AND xact_rollback > 0"
        ):
            await asyncio.sleep(0.02)
    await blocker.execute("ROLLBACK")
    await blocker.close()
    assert (await migration).applied == ("2.sql",)


async def test_a_lock_that_is_never_to_be_had_is_final_after_five_attempts(dsn, tmp_path):
    """The error is the server's, and says how often it was tried."""
    await migrate(dsn, write(tmp_path, _1="CREATE TABLE t (id int); CREATE SEQUENCE calls"))
    blocker = await asyncpg.connect(dsn)
    await blocker.execute("BEGIN; LOCK TABLE t IN ACCESS SHARE MODE")
    write(tmp_path, _2="SELECT nextval('calls'); LOCK TABLE t IN ACCESS EXCLUSIVE MODE NOWAIT")
    with pytest.raises(MigrationFailedError, match=r"2\.sql: could not obtain lock .* \(in each of 5 attempts\)"):
        await migrate(dsn, tmp_path)
    await blocker.close()
    assert await ask(dsn, "SELECT last_value FROM calls") == [5]


async def deadlock(dsn: str) -> None:
    """Keep an index from being built until it waits for us, and then wait for it."""
    blocker, watcher = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    await blocker.execute("SET deadlock_timeout = '1h'; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM t LIMIT 1")
    yielded = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    try:
        async with asyncio.timeout(20):
            while not await watcher.fetchval(yielded):
                await asyncio.sleep(0.02)
        # Before the two seconds are over after which the other one looks, once, whether it waits for ever.
        await blocker.execute("LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE; ROLLBACK", timeout=20)
    finally:
        await blocker.close()
        await watcher.close()


@pytest.mark.parametrize("clause", ["", "IF NOT EXISTS "])
async def test_an_invalid_index_that_was_left_is_reported_and_never_recorded(dsn, tmp_path, clause):
    """Not at once, and not by the next run, which would find it there; once it is dropped, the next run builds it."""
    await ask(dsn, "CREATE TABLE t (a int)")
    await ask(dsn, "INSERT INTO t SELECT generate_series(1, 1000)")
    await ask(dsn, f"ALTER DATABASE {dsn.rpartition('/')[2]} SET deadlock_timeout = '2s'")
    write(tmp_path, _1=f"{NO_TRANSACTION}\nCREATE INDEX CONCURRENTLY {clause}i ON t (a)")
    blocking = asyncio.ensure_future(deadlock(dsn))
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        while not await ask(
            dsn, "SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()"
        ):
            await asyncio.sleep(0.02)
    with pytest.raises(
        MigrationFailedError, match=r"(?s)1\.sql: deadlock detected.*the index i is invalid; DROP INDEX CONCURRENTLY i"
    ):
        await migrate(dsn, tmp_path)
    await blocking
    assert await ask(dsn, APPLIED) == []
    assert await ask(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") == [False]
    again = (
        "the statement was skipped.*the index i is invalid"
        if clause
        else 'relation "i" already exists.*the index i is invalid'
    )
    with pytest.raises(MigrationFailedError, match=f"(?s){again}"):
        await migrate(dsn, tmp_path)
    assert await ask(dsn, APPLIED) == []
    await ask(dsn, "DROP INDEX i")
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql",)
    assert await ask(dsn, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass") == [True]


async def test_an_index_over_values_that_are_not_unique_is_reported(dsn, tmp_path):
    """It is left invalid by an error that waiting would not cure."""
    await ask(dsn, "CREATE TABLE t (a int)")
    await ask(dsn, "INSERT INTO t VALUES (1), (1)")
    write(tmp_path, _1=f'{NO_TRANSACTION}\nCREATE UNIQUE INDEX CONCURRENTLY "The One" ON t (a)')
    with pytest.raises(
        MigrationFailedError, match=r'(?s)could not create unique index.*the index "The One" is invalid'
    ):
        await migrate(dsn, tmp_path)
    assert await ask(dsn, APPLIED) == []


async def test_an_index_whose_building_was_cut_off_is_reported_by_the_next_run(postgres, dsn, tmp_path):
    """The first run does not know what became of it; the next one says that it is there, and invalid."""
    await ask(dsn, "CREATE TABLE t (a int)")
    write(tmp_path, _1=f"{NO_TRANSACTION}\nCREATE INDEX CONCURRENTLY i ON t (a)")
    blocker = await asyncpg.connect(dsn)
    await blocker.execute("BEGIN; INSERT INTO t VALUES (1)")
    migration = asyncio.ensure_future(migrate(dsn, tmp_path))
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    async with asyncio.timeout(20):
        while not (pids := await ask(dsn, waiting)):
            await asyncio.sleep(0.02)
    await ask(dsn, f"SELECT pg_terminate_backend({pids[0]})")
    with pytest.raises(MigrationFailedError, match=r"1\.sql: the connection was lost, and its end is not known"):
        await migration
    await blocker.close()
    with pytest.raises(MigrationFailedError, match=r"its end is not known.* the index i is invalid"):
        await migrate(dsn, tmp_path)
    assert await ask(dsn, APPLIED) == []


async def test_another_invalid_index_is_not_taken_for_one_that_was_left(dsn, tmp_path):
    """Of another table, or of a partitioned one, which is invalid until its partitions have one."""
    await ask(dsn, "CREATE TABLE p (a int) PARTITION BY LIST (a)")
    await ask(dsn, "CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1)")
    await ask(dsn, "CREATE INDEX whole ON ONLY p (a)")
    write(
        tmp_path,
        _1=f"{NO_TRANSACTION}\nCREATE INDEX CONCURRENTLY part ON p1 (a)",
        _2="ALTER INDEX whole ATTACH PARTITION part",
    )
    assert (await migrate(dsn, tmp_path)).applied == ("1.sql", "2.sql")


async def test_a_call_that_failed_may_have_committed_something(dsn, tmp_path):
    """So its end is not known, and it is not run again until its author has looked."""
    await ask(dsn, "CREATE TABLE t (a int)")
    await ask(
        dsn, "CREATE PROCEDURE p() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO t VALUES (1); COMMIT; RAISE 'late'; END $$"
    )
    write(tmp_path, _1=f"{NO_TRANSACTION}\nCALL p()")
    with pytest.raises(MigrationFailedError, match=r"1\.sql: late"):
        await migrate(dsn, tmp_path)
    with pytest.raises(MigrationFailedError, match="was begun before and its end is not known"):
        await migrate(dsn, tmp_path)
    assert await ask(dsn, "SELECT a FROM t") == [1]


async def test_a_directory_without_sql_files_is_refused(tmp_path):
    """Rather than being done at once, which would hide a wrong path."""
    with pytest.raises(ConfigurationError, match=r"holds no file whose name ends in \.sql"):
        await migrate("postgresql://postgres@127.0.0.1:1/postgres", tmp_path)
