"""Commands that wait for the database: `resilient-pool migrate -- COMMAND` and `run_migration(command)`, with the real tools."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import sys
import tomllib
import uuid
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from migration_tools import (
    PSQL,
    QUICK,
    alembic_project,
    databases,
    environment,
    marked,
    program,
    run,
    start,
    through,
    until,
    yoyo_project,
)

from resilient_pool import BackoffPolicy, ConfigurationError, MigrationFailedError, MigrationLockedError, run_migration
from resilient_pool.events import (
    MigrationLockLost,
    MigrationLockWaited,
    MigrationRepeated,
    MigrationStarted,
    RetryScheduled,
)
from resilient_pool.migrations.run import CONNECT_TIMEOUT, MIGRATION_BACKOFF
from resilient_pool.testing import EmbeddedPostgres, PausingServer

CANARY = "c@n/a:r%y-7391"
AWAY = ("hang", "refuse", "reset", "57P03", "28000")


def ignore(_line: str) -> None:
    """Ignore a line of output."""


def of(kind: type, events: list) -> list:
    """Those of one kind."""
    return [event for event in events if isinstance(event, kind)]


async def wait_out(postgres: EmbeddedPostgres, directory: Path, away: str, dsn: str) -> tuple[int, str]:
    """Migrate a database whose server sleeps, and needs 5 s to wake."""
    command = alembic_project(directory, "CREATE TABLE migrated (id int)")
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=5.0, away=away) as server:
        server.pause()
        status, _, errors = await run("migrate", "--", *command, dsn=server.dsn(dsn))
    return status, errors


async def test_a_migration_waits_out_every_way_of_being_away(postgres, tmp_path):
    """Five seconds of an absent server are waited for, and the command is run once."""
    names = [f"away_{uuid.uuid4().hex}" for _ in AWAY]
    async with databases(postgres, *names) as dsns:
        outcomes = await asyncio.gather(
            *(wait_out(postgres, tmp_path / way, way, dsn) for way, dsn in zip(AWAY, dsns, strict=True))
        )
        for way, name, (status, errors) in zip(AWAY, names, outcomes, strict=True):
            assert status == 0, (way, errors)
            assert errors.count("running ") == 1, (way, errors)
            async with postgres.admin(name) as admin:
                assert await admin.fetchval("SELECT count(*) FROM migrated") == 0


def test_the_usual_policy_takes_about_a_hundred_seconds_in_the_worst_case():
    """Five attempts to connect and the four waits between them, which fits a function of five minutes."""
    delays = MIGRATION_BACKOFF.delays()
    waits = [next(delays) for _ in range(MIGRATION_BACKOFF.max_attempts - 1)]
    assert [int(wait - 1e-9) for wait in waits] == [3, 6, 12, 24]
    assert 90 < sum(waits) + MIGRATION_BACKOFF.max_attempts * CONNECT_TIMEOUT < 100


async def test_a_broken_migration_runs_once_and_fails_with_the_tools_own_message(postgres, tmp_path):
    """A syntax error is not cured by waiting."""
    command = alembic_project(tmp_path / "project", "CREAT TABLE broken (id int)")
    async with databases(postgres, f"broken_{uuid.uuid4().hex}") as (dsn,):
        status, output, errors = await run("migrate", "--json", "--", *command, dsn=dsn)
    result = json.loads(output)
    assert status == 1
    assert errors.count("running ") == 1
    assert 'syntax error at or near "CREAT"' in errors
    assert (result["attempts"], result["command_exit_status"]) == (1, 1)
    assert any('syntax error at or near "CREAT"' in line for line in result["output"])


async def test_a_wrong_password_ends_at_once_and_says_so(postgres, tmp_path):
    """Nothing is run, and nothing is waited for."""
    await make_role(postgres, "mistaken")
    touched = tmp_path / "touched"
    status, output, errors = await run(
        *("migrate", "--", *program(f"open({str(touched)!r}, 'w')")),
        dsn=postgres.dsn("postgres", "mistaken", "wrong"),
    )
    assert status == 3
    assert 'password authentication failed for user "mistaken"' in errors
    assert "next try" not in errors
    assert output == ""
    assert not touched.exists()


async def make_role(postgres: EmbeddedPostgres, name: str) -> None:
    async with postgres.admin() as admin:
        await admin.execute(f"DROP ROLE IF EXISTS {name}")
    await postgres.create_role(name, CANARY)


@pytest.mark.parametrize("tool", ["psql", "yoyo", "alembic"])
async def test_a_command_that_could_not_connect_is_run_again(postgres, proxy, tmp_path, tool, monkeypatch):
    """The tool's own exit and output say so; when the server can be reached it does its work."""
    events = []

    def observe(event):
        events.append(event)
        if isinstance(event, MigrationStarted) and event.attempt == 1:
            proxy.refuse()
        if isinstance(event, MigrationRepeated):
            proxy.restore()

    async with databases(postgres, f"again_{uuid.uuid4().hex}") as (dsn,):
        away = through(dsn, proxy.port)
        monkeypatch.setenv("DATABASE_URL", away)
        command = {
            "psql": lambda: [PSQL, away, "-c", "CREATE TABLE migrated ()"],
            "yoyo": lambda: yoyo_project(tmp_path / "project", "CREATE TABLE migrated ();", away),
            "alembic": lambda: alembic_project(tmp_path / "project", "CREATE TABLE migrated ()"),
        }[tool]()
        result = await run_migration(command, backoff=QUICK, on_line=ignore, observers=[observe])
        connection = await asyncpg.connect(dsn)
        assert await connection.fetchval("SELECT count(*) FROM migrated") == 0
        await connection.close()
    assert result.attempts == 2
    assert result.exit_code == 0
    assert len(of(MigrationRepeated, events)) == 1


async def test_a_command_that_never_can_connect_ends_with_its_own_last_words(postgres):
    """The policy's attempts are spent; the exit status and the last lines are the command's."""
    with pytest.raises(MigrationFailedError) as caught:
        await run_migration(
            [PSQL, "postgresql://postgres@127.0.0.1:1/postgres", "-c", "SELECT 1"],
            dsn=postgres.dsn(),
            backoff=BackoffPolicy(base=0.02, max_attempts=3, jitter=None),
            on_line=ignore,
        )
    assert caught.value.exit_code == 2
    assert caught.value.attempts == 3
    assert "Connection refused" in "".join(caught.value.output)


async def test_a_database_that_never_comes_ends_with_the_drivers_error_and_status_3(tmp_path):
    """Nothing was run; standard error has each attempt, and the JSON the result."""
    status, output, errors = await run(
        *("migrate", "--json", "--deadline", "0.5", "--dsn", "postgresql://postgres@127.0.0.1:1/postgres"),
        *("--", *program("print('ran')")),
        dsn=None,
    )
    assert status == 3
    assert json.loads(output)["exit_status"] == 3
    assert "Connect call failed" in errors
    assert re.search(r"attempt \d, waited \d\.\d s, no time for another within 0\.5 s", errors)
    assert "ran" not in output


async def test_output_comes_line_by_line_and_not_only_in_the_end(postgres):
    """A line is emitted while the command still runs."""
    process = await start(
        *("migrate", "--no-lock", "--", *program("print('first', flush=True); import time; time.sleep(60)")),
        dsn=postgres.dsn(),
    )
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"first\n"
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 20)


# One at a time


async def test_two_concurrent_migrations_run_one_after_the_other(postgres, tmp_path):
    """The second waits until the first has ended, and says for whom."""
    log, may_end = tmp_path / "log", tmp_path / "may_end"
    source = (
        f"import os, time; log = open({str(log)!r}, 'a', 1); log.write('begin\\n')\n"
        f"while not os.path.exists({str(may_end)!r}): time.sleep(0.02)\n"
        "log.write('end\\n')"
    )
    waiting = []
    async with databases(postgres, f"both_{uuid.uuid4().hex}") as (dsn,):
        processes = [await start("migrate", "--", *program(source), dsn=dsn) for _ in range(2)]

        async def read(process):
            async for line in process.stderr:
                if b"waiting for another migration to end: resilient-pool migrate on" in line:
                    waiting.append(process)
                    may_end.touch()
            return await process.wait()

        async with asyncio.timeout(30):
            assert await asyncio.gather(*map(read, processes)) == [0, 0]
    assert log.read_text().split() == ["begin", "end", "begin", "end"]
    assert len(waiting) == 1


async def test_without_the_lock_they_run_together(postgres):
    """`lock=None` turns it off; of the other two each waits for the other to begin."""
    both = asyncio.Barrier(2)

    async def migrate() -> None:
        async with asyncio.timeout(20):
            await both.wait()

    await asyncio.gather(*(run_migration(migrate, dsn=postgres.dsn(), lock=None) for _ in range(2)))


async def test_a_lock_that_is_not_free_in_time_is_an_error_that_names_its_holder(postgres):
    """Nothing was run, and the waiting has an end."""
    events, ran = [], []
    release = asyncio.Event()
    begun = asyncio.Event()

    async def first() -> None:
        begun.set()
        await release.wait()

    async def second() -> None:
        ran.append(1)

    holding = asyncio.ensure_future(run_migration(first, dsn=postgres.dsn(), lock="deploy"))
    await begun.wait()
    with pytest.raises(MigrationLockedError, match=r"held by resilient-pool migrate on .*server process") as caught:
        await run_migration(second, dsn=postgres.dsn(), lock="deploy", deadline=2.0, observers=[events.append])
    assert caught.value.holder == of(MigrationLockWaited, events)[0].holder
    assert not ran
    await run_migration(second, dsn=postgres.dsn(), lock="another", deadline=5.0)
    release.set()
    assert (await holding).lock_losses == 0
    await run_migration(second, dsn=postgres.dsn(), lock="deploy", deadline=5.0)
    assert len(ran) == 2


async def test_an_index_can_be_built_concurrently_while_another_deployment_waits(postgres):
    """Neither the held lock nor the waiting for it has a snapshot that CREATE INDEX CONCURRENTLY would wait for."""
    async with databases(postgres, f"index_{uuid.uuid4().hex}") as (dsn,):
        begun, waits = asyncio.Event(), asyncio.Event()

        async def build() -> None:
            begun.set()
            connection = await asyncpg.connect(dsn)
            await connection.execute("CREATE TABLE t (id int)")
            await asyncio.wait_for(waits.wait(), 20)
            await connection.execute("CREATE INDEX CONCURRENTLY ON t (id)", timeout=20)
            await connection.close()

        async def nothing() -> None:
            return

        def observe(event) -> None:
            if isinstance(event, MigrationLockWaited):
                waits.set()

        first = asyncio.ensure_future(run_migration(build, dsn=dsn))
        await asyncio.wait_for(begun.wait(), 20)
        await asyncio.gather(first, run_migration(nothing, dsn=dsn, observers=[observe]))


async def test_a_lost_lock_is_reported_and_acquired_again(postgres):
    """The migration goes on; the result says that it was not alone for certain."""
    events = []
    async with databases(postgres, f"lost_{uuid.uuid4().hex}") as (dsn,):

        async def lose_the_lock() -> None:
            connection = await asyncpg.connect(dsn)
            holder = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            before = await connection.fetchval(holder)
            await connection.execute("SELECT pg_terminate_backend($1)", before)
            async with asyncio.timeout(20):
                while await connection.fetchval(holder) in (None, before):
                    await asyncio.sleep(0.02)
            await connection.close()

        result = await run_migration(lose_the_lock, dsn=dsn, observers=[events.append], backoff=QUICK)
    assert result.lock_losses == 1
    assert of(MigrationLockLost, events) == [MigrationLockLost(losses=1)]


# Cut short

HOLDER = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.argv[1], os.environ["DATABASE_URL"], "-c",
    "BEGIN; LOCK TABLE precious IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(60)"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
count = []
def interrupted(*_):
    count.append(1)
    print("interrupted", len(count), flush=True)
signal.signal(signal.SIGINT, interrupted)
print("running", flush=True)
child.wait()
while not os.path.exists(sys.argv[2]):
    time.sleep(0.1)
print("child ended", flush=True)
"""


@pytest.mark.parametrize(
    ("send", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c"),
        pytest.param(signal.SIGTERM, 143, id="terminated"),
        pytest.param(signal.SIGHUP, 129, id="hung up"),
        pytest.param(signal.SIGKILL, -9, id="killed"),
    ],
)
async def test_cut_short_half_way_nothing_stays_locked_and_no_process_remains(postgres, tmp_path, send, status):
    """The command is interrupted once, however often we are; its lock and ours are free again when it has ended."""
    mark, may_end = uuid.uuid4().hex, tmp_path / "may_end"
    async with databases(postgres, f"cut_{mark}") as (dsn,):
        admin = await asyncpg.connect(dsn)
        await admin.execute("CREATE TABLE precious ()")
        process = await start("migrate", "--", *program(HOLDER), PSQL, str(may_end), dsn=dsn, MARK=mark)
        assert await asyncio.wait_for(process.stdout.readline(), 20) == b"running\n"
        locks = "SELECT count(*) FROM pg_locks WHERE relation = 'precious'::regclass OR (locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
        async with asyncio.timeout(20):
            while await admin.fetchval(locks) != 2:
                await asyncio.sleep(0.02)
        assert len(marked(mark)) == 4, "the search for processes does not find them"
        process.send_signal(send)
        if send is not signal.SIGKILL:
            assert await asyncio.wait_for(process.stdout.readline(), 20) == b"interrupted 1\n"
            process.send_signal(signal.SIGINT)
        may_end.touch()
        output, errors = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == status, errors
        if send is not signal.SIGKILL:
            assert output == b"child ended\n"
            assert marked(mark) == []
        await until(lambda: not marked(mark), "the end of the orphans")
        async with asyncio.timeout(20):
            while await admin.fetchval(locks):
                await asyncio.sleep(0.02)
        await admin.close()


async def test_a_command_that_does_not_heed_ctrl_c_is_killed(postgres, monkeypatch):
    """Cancelling run_migration ends it within the time that it was given and a few seconds more."""
    mark, lines = uuid.uuid4().hex, []
    monkeypatch.setenv("MARK", mark)
    source = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " print('deaf', flush=True); time.sleep(60)"
    )
    migration = asyncio.ensure_future(
        run_migration(program(source), dsn=postgres.dsn(), on_line=lines.append, stop_within=0.2)
    )
    await until(lambda: lines)
    assert len(marked(mark)) == 2, "the search for processes does not find them"
    migration.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(migration, 10)
    assert marked(mark) == []


async def test_what_a_command_leaves_behind_ends_with_it(postgres):
    """A background process that still holds the output does not keep the migration waiting."""
    source = f"import subprocess; subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    async with asyncio.timeout(20):
        assert (await run_migration(program(source), dsn=postgres.dsn(), on_line=ignore)).exit_code == 0


async def test_a_process_in_a_session_of_its_own_does_not_keep_the_migration_waiting(postgres, tmp_path):
    """It is not ended though it holds the output; what was written is emitted, also a last line without an end."""
    pid, lines = tmp_path / "pid", []
    source = (
        "import subprocess; left = subprocess.Popen(['sleep', '60'], start_new_session=True);"
        f" open({str(pid)!r}, 'w').write(str(left.pid)); print('x' * 200_000); print('last', end='')"
    )
    try:
        async with asyncio.timeout(20):
            result = await run_migration(program(source), dsn=postgres.dsn(), on_line=lines.append)
        os.kill(int(pid.read_text()), 0)  # raises unless it still runs
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert result.output[-1] == lines[-1] == "last"


async def test_the_exit_status_of_a_command_ended_by_a_signal_is_a_shells(postgres):
    """128 and the signal's number."""
    with pytest.raises(MigrationFailedError, match=r"exit status 137 \(ended by SIGKILL\)") as caught:
        await run_migration(program("import os; os.kill(os.getpid(), 9)"), dsn=postgres.dsn(), on_line=ignore)
    assert caught.value.exit_code == 137


# Secrets

SPEAKING = """
import os, sys, time
from urllib.parse import quote
password = sys.argv[1]
print(os.environ["DATABASE_URL"])
print("the password is", password, repr(password), quote(password, safe=""), file=sys.stderr)
for half in (password[:7], password[7:]):
    os.write(1, half.encode())
    time.sleep(0.05)
print()
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["for people", "for machines"])
async def test_the_password_appears_in_no_output_even_when_the_command_prints_its_dsn(postgres, options, status):
    """Whole, quoted, or in two pieces; from DATABASE_URL and from the command's own arguments."""
    await make_role(postgres, "speaking")
    dsn = f"postgresql://speaking:{quote(CANARY, safe='')}@{postgres.host}:{postgres.port}/postgres"
    given, output, errors = await run(
        *("migrate", "--no-lock", *options, "--", *program(SPEAKING), CANARY, str(status)), dsn=dsn
    )
    assert given == status
    assert "the password is ****" in output + errors
    for text in (CANARY, quote(CANARY, safe=""), CANARY[:7], CANARY[7:]):
        assert text not in output + errors


async def test_a_password_in_the_dsn_option_works_and_earns_a_warning(postgres):
    """Others can read it in the process list; the command finds the DSN in DATABASE_URL."""
    await make_role(postgres, "warned")
    dsn = f"postgresql+asyncpg://warned:{quote(CANARY, safe='')}@{postgres.host}:{postgres.port}/postgres"
    source = f"import os; assert os.environ['DATABASE_URL'] == {dsn!r}"
    status, output, errors = await run(
        "migrate", "--no-lock", "--dsn", dsn, "--", *program(source), dsn="postgresql://nowhere:1/"
    )
    assert status == 0, errors
    assert "warning: every user of this machine can read the password in --dsn" in errors
    assert CANARY not in output + errors
    assert quote(CANARY, safe="") not in output + errors


# Functions


async def test_a_function_that_could_not_connect_is_called_again(postgres, proxy):
    """What asyncpg met while connecting is classified as the pool's own attempts are."""
    events, calls = [], []

    async def migrate() -> None:
        calls.append(1)
        if len(calls) > 1:
            proxy.restore()
        else:
            proxy.reject()
        connection = await asyncpg.connect(proxy.dsn(postgres.dsn()))
        await connection.close()

    result = await run_migration(migrate, dsn=postgres.dsn(), backoff=QUICK, observers=[events.append])
    assert result.attempts == 2
    (repeated,) = of(MigrationRepeated, events)
    assert repeated.reason.startswith("Connection")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connect call failed"),
        asyncpg.RaiseError("the database system is starting up"),
        TimeoutError(),
    ],
)
async def test_an_error_that_did_not_come_from_connecting_is_final(postgres, error):
    """It reaches the caller untouched, after one call."""
    calls = []

    async def migrate() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        await run_migration(migrate, dsn=postgres.dsn(), backoff=QUICK)
    assert caught.value is error
    assert calls == [1]


async def test_a_function_that_is_no_coroutine_function_is_called_in_a_thread(postgres):
    """So that it may run an event loop of its own, as alembic's `command.upgrade` does."""
    answers = []

    async def ask() -> None:
        connection = await asyncpg.connect(postgres.dsn())
        answers.append(await connection.fetchval("SELECT 42"))
        await connection.close()

    result = await run_migration(lambda: asyncio.run(ask()), dsn=postgres.dsn())
    assert answers == [42]
    assert (result.attempts, result.exit_code) == (1, None)


# The command line


async def test_wait_ends_well_when_the_database_answers(postgres):
    """For entrypoints: `resilient-pool wait && serve`."""
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=1.0, away="57P03") as server:
        server.pause()
        status, output, errors = await run("wait", "--json", dsn=server.dsn(postgres.dsn()))
    assert status == 0, errors
    assert json.loads(output)["status"] == "up"
    assert json.loads(output)["waited"] >= 0.9
    assert "next try in" in errors


async def test_wait_has_an_end(postgres):
    """Its `--timeout` is kept, and the status says that the database was never available."""
    status, output, errors = await run(
        "wait", "--timeout", "0.5", "--dsn", "postgresql://postgres@127.0.0.1:1/postgres", dsn=None
    )
    assert status == 3
    assert output == ""
    assert "no connection to the database" in errors


async def shell(line: str, dsn: str, **more: str) -> tuple[int, str, str]:
    """Run a line of bash in which `migrate` and `wait` mean ours."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *("bash", "-o", "pipefail", "-c", 'ours() { "$PYTHON" -m resilient_pool "$@"; }; ' + line),
        stdout=pipe,
        stderr=pipe,
        env=environment(dsn, PYTHON=sys.executable, **more),
    )
    output, errors = await asyncio.wait_for(process.communicate(), 20)
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize(
    "line",
    [
        "ours wait --json 2>&-",
        "ours wait --json >&-",
        "ours wait --json >/dev/full",
        "ours wait 2>/dev/full",
        "ours wait --json | sh -c 'exec 0<&-; sleep 1'",
        "ours doctor >/dev/full",
        "ours migrate --no-lock -- echo one 2>&-",
        "ours migrate --no-lock -- echo one >/dev/full",
        "ours migrate --no-lock --json -- echo one >&- 2>&-",
    ],
)
async def test_a_success_stays_one_when_its_output_cannot_be_written(postgres, line):
    """Standard output or error is closed, full, or without a reader; no traceback is shown."""
    status, _, errors = await shell(line, postgres.dsn())
    assert status == 0, errors
    assert "Traceback" not in errors
    assert "no connection" not in errors
    assert "Exception ignored" not in errors


async def test_characters_that_a_terminal_does_not_know_do_not_end_the_output(postgres):
    """They are written with a backslash, and the next line comes."""
    status, output, errors = await run(
        *("migrate", "--no-lock", "--", *program(r"import os; os.write(1, 'f\u00fcr \u2713\nnext\n'.encode())")),
        dsn=postgres.dsn(),
        PYTHONIOENCODING="ascii:strict",
        PYTHONUTF8="0",
    )
    assert (status, errors.count("Traceback")) == (0, 0)
    assert output == "f\\xfcr \\u2713\nnext\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["migrate"], "either a directory of *.sql files or a command behind --"),
        (["migrate", "somewhere", "--", "true"], "either a directory"),
        (["migrate", "--"], "no command behind --"),
        (["migrate", "--", "no-such-command-anywhere"], "there is no command 'no-such-command-anywhere'"),
        (["migrate", "/no/such/directory"], "is not a directory of SQL files"),
        (["migrate", "--attempts", "0", "--", "true"], "argument --attempts: must be a whole number"),
        (["wait", "--", "true"], "only migrate takes a command"),
        (["wait", "--dsn", "mysql://me:canary-1234@host/db"], "scheme must be postgresql"),
        (["migrate", "alembic", "upgrade", "head"], "a command stands behind --: migrate -- alembic upgrade head"),
        (["migrate", "alembic upgrade head"], "a command stands behind --: migrate -- alembic upgrade head"),
        (["migrate", "alembic", "upgrade", "head"], "usage: resilient-pool migrate [options]"),
        (["migrate", ""], "the directory's name is empty"),
        (["migrate", "--", ""], "there is no command ''"),
        (["migrate", "--stop-within", "-1", "--", "true"], "more than 0, not '-1'"),
        (["migrate", "--stop-within", "nan", "--", "true"], "more than 0, not ****"),
        (["migrate", "--deadline", "soon", "--", "true"], "more than 0, not ****"),
        (["migrate", "--lock", "", "--", "true"], "lock must be a name"),
        (["wait", "--timeout", "0"], "argument --timeout: must be a number of seconds, more than 0, not '0'"),
        (["migrat"], "invalid choice: 'migrat'"),
        (["nonsense"], "invalid choice: ****"),
        (
            ["migrate", "--attempts", "hunter2", "--", "true"],
            "must be a whole number of attempts, at least 1, not ****",
        ),
    ],
)
def test_wrong_usage_ends_with_status_2_before_anything_happens(arguments, message, capsys, monkeypatch):
    """The message says what is wrong, and no secret."""
    from resilient_pool.cli.main import main

    monkeypatch.delenv("DATABASE_URL", raising=False)
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    shown = "".join(capsys.readouterr())
    assert status == 2
    assert message in shown
    assert "canary-1234" not in shown


async def test_an_environment_that_the_driver_refuses_is_wrong_usage(postgres):
    """Not "no connection": waiting would not help."""
    status, _, errors = await run("wait", "--timeout", "2", dsn=postgres.dsn(), PGSSLMODE="bogus")
    assert status == 2, errors
    assert "wrong usage" in errors
    assert "`sslmode` parameter must be one of" in errors
    assert "next try" not in errors


@pytest.mark.parametrize(("options", "message"), [({"stop_within": -1.0}, "stop_within"), ({"lock": ""}, "lock must")])
async def test_wrong_arguments_are_refused_before_the_database_is_woken(options, message):
    """Likewise where the program is Python."""
    with pytest.raises(ConfigurationError, match=message):
        await run_migration("true", dsn="postgresql://postgres@127.0.0.1:1/postgres", **options)


async def test_a_missing_command_is_found_before_the_database_is_woken():
    """The configuration is wrong, whatever the database does."""
    with pytest.raises(ConfigurationError, match="there is no command 'nowhere'"):
        await run_migration("nowhere --at all", dsn="postgresql://postgres@127.0.0.1:1/postgres")


async def test_waiting_is_emitted_to_observers(postgres, proxy):
    """Each attempt to connect that failed, as the pool emits it."""
    events = []

    def observe(event) -> None:
        events.append(event)
        if isinstance(event, RetryScheduled):
            proxy.restore()

    proxy.answer_with_error()
    result = await run_migration(
        program("print(1)"),
        dsn=proxy.dsn(postgres.dsn()),
        lock=None,
        backoff=QUICK,
        observers=[observe],
        on_line=ignore,
    )
    assert result.output == ("1",)
    assert result.waited >= 0.1
    assert of(RetryScheduled, events)[0].sqlstate == "57P03"
    assert of(MigrationStarted, events)[0].migration.endswith("-c 'print(1)'")
    assert os.environ.get("DATABASE_URL") is None


async def test_the_doctor_names_the_setting_to_change(postgres):
    """Asked of a real server; what would fail has exit status 1, advice has not."""
    async with databases(postgres, f"doctor_{uuid.uuid4().hex}") as (dsn,):
        async with postgres.admin() as admin:
            await admin.execute(f"ALTER DATABASE {dsn.rpartition('/')[2]} SET idle_session_timeout = '20s'")
        status, output, errors = await run("doctor", "--min-size", "1", dsn=dsn)
        assert (status, errors) == (0, "")
        assert "change: max_inactive_connection_lifetime=15" in output
        assert "change: min_size=0" in output
        standby = await run("doctor", "--json", dsn=dsn)
    assert {finding["check"]: finding["level"] for finding in json.loads(standby[1])["findings"]} == {
        **dict.fromkeys(("server version", "pausing", "keepalive", "pooler", "encryption", "durability"), "ok"),
        **dict.fromkeys(("permissions", "clock", "role", "profile", "connections"), "ok"),
        "idle sessions": "advice",
    }


async def test_the_doctor_finds_a_standby(postgres):
    """It accepts no writes, so the application would fail: exit status 1."""
    async with await postgres.standby("doctors") as replica:
        status, output, _ = await run("doctor", dsn=replica.dsn())
    assert status == 1
    assert "problem role: the server is a standby and accepts no writes" in output


def test_the_command_is_installed_under_its_name():
    """`resilient-pool` is `resilient_pool.cli.main.main`."""
    from resilient_pool.cli.main import main

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    name, _, function = project["scripts"]["resilient-pool"].partition(":")
    assert getattr(importlib.import_module(name), function) is main
