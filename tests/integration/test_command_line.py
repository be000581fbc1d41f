"""What `resilient-pool` prints: progress once, and advice that fits the service."""

from __future__ import annotations

import json
import os
import re

import pytest
from migration_tools import run
from test_other_servers import containing, everything, lines

import resilient_pool
from resilient_pool.cli.main import main
from resilient_pool.testing import PausingServer, Refusal, ScriptedServer


@pytest.fixture
def typed(monkeypatch, capsys):
    """Type a line, with nothing but these variables in the environment; return the status and what was printed."""
    for name in list(os.environ):
        if name.startswith("PG") or name == "DATABASE_URL":
            monkeypatch.delenv(name)

    def typed(line: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            status = main(line.split())
        except SystemExit as end:
            status = end.code
        return status, "".join(capsys.readouterr())

    return typed


async def test_an_outage_is_printed_once(postgres):
    """As progress; the line that a pool logs of it by itself is left out beside that."""
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=0.7, away="57P03") as server:
        server.pause()
        status, output, errors = await run("wait", dsn=server.dsn(postgres.dsn()))
    assert (status, output) == (0, ""), errors
    *progress, last = errors.splitlines()
    assert progress
    assert all(line.startswith("the database is unreachable (57P03): attempt ") for line in progress), errors
    assert last.startswith("the database answers, after ")


# What the server says, and what it does not


def test_the_doctor_names_the_profile_of_the_service_and_applies_nothing(typed, postgres):
    """By the port here, which is CockroachDB's; what a profile would change stands there line by line."""
    with ScriptedServer(host=postgres.host, port=postgres.port, listen_port=26257) as server:
        dsn = server.dsn(postgres.dsn())
        status, printed = typed("doctor", DATABASE_URL=f"{dsn}?connect_timeout=10&sslmode=disable")
        assert status == 0
        assert "advice  profile: profiles.COCKROACHDB fits" in printed
        assert "          max_lifetime=900.0 instead of 1800.0: 5 to 30 min are advised" in printed
        assert "timeout" not in printed.partition("change: ")[0]
        assert "        change: ResilientPool(dsn, **profiles.COCKROACHDB)" in printed
        status, printed = typed("doctor --json", DATABASE_URL=dsn)
        (finding,) = [each for each in json.loads(printed)["findings"] if each["check"] == "profile"]
        assert [detail.partition("=")[0] for detail in finding["details"]] == [
            *("max_inactive_connection_lifetime", "max_lifetime", "timeout", "statement_cache_size", "ssl")
        ]
        assert status == 0


def test_the_doctor_compares_max_size_with_what_the_server_lets_in(typed, postgres):
    """Less what the server keeps for superusers."""
    status, printed = typed("doctor --max-size 5000", DATABASE_URL=postgres.dsn())
    assert status == 0
    assert "advice  connections: the server lets " in printed
    assert "fewer than one pool may open, with max_size=5000" in printed


def in_front_of(postgres, *script: Refusal) -> ScriptedServer:
    return ScriptedServer(*script, host=postgres.host, port=postgres.port)


def test_the_command_line_makes_do_with_what_the_server_says(typed, postgres):
    """It answers, which is all that `wait` waits for; the doctor names what it could not find out."""
    with in_front_of(postgres, *lines(everything)) as server:
        dsn = server.dsn(postgres.dsn())
        status, printed = typed("wait --json", DATABASE_URL=dsn)
        assert (status, '"server_version": "18.' in printed) == (0, True), printed
        status, printed = typed("doctor", DATABASE_URL=dsn)
    assert status == 0
    assert "advice  server: it does not say what PostgreSQL says" in printed
    assert "server version" not in printed
    with in_front_of(postgres, *lines(containing("to_regprocedure"))) as server:
        status, printed = typed("doctor", DATABASE_URL=server.dsn(postgres.dsn()))
    assert status == 0
    assert "cannot be asked what became of a COMMIT" in printed


def test_a_migration_that_cannot_be_locked_is_wrong_usage(typed, postgres):
    """The way out is named, and nothing was run."""
    with in_front_of(postgres, *lines(containing("pg_try_advisory_xact_lock"))) as server:
        status, printed = typed("migrate -- echo never", DATABASE_URL=server.dsn(postgres.dsn()))
    assert (status, "--no-lock" in printed, "\nnever" in printed) == (2, True, False), printed


# For a person who has not read anything


def test_a_line_without_a_command_says_which_there_are(typed):
    """And where to read more."""
    status, printed = typed("")
    assert status == 2
    assert "it takes a command: migrate, wait or doctor; --help says more" in printed


@pytest.mark.parametrize("attempts", ["0", "-1", "2.5", "many"])
def test_a_wrong_number_of_attempts_is_named_as_it_was_typed(typed, attempts):
    """Not by the name that it has inside."""
    status, printed = typed(f"migrate --attempts={attempts} -- echo never")
    assert status == 2
    assert "argument --attempts: must be a whole number of attempts, at least 1, not" in printed


@pytest.mark.parametrize("line", ["--help", "wait --help", "doctor --help", "migrate --help"])
def test_help_says_what_it_does_where_the_database_is_taken_from_and_what_a_status_means(typed, line):
    """With examples, in lines that a terminal has room for."""
    status, printed = typed(line)
    assert status == 0
    for expected in ("DATABASE_URL", "exit status:", "examples:", "resilient-pool migrate -- alembic upgrade head"):
        assert expected in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_the_version_is_printed(typed):
    """As programs do."""
    assert typed("--version") == (0, f"resilient-pool {resilient_pool.__version__}\n")


@pytest.mark.parametrize(
    ("line", "environment", "where"),
    [
        ("wait", {}, "looked for at this machine\n  no database was named: pass --dsn, or set DATABASE_URL or PGHOST"),
        ("wait", {"PGHOST": "127.0.0.1", "PGPORT": "1", "PGUSER": "me"}, "looked for at 127.0.0.1:1, user me\n"),
        (
            "doctor",
            {"DATABASE_URL": "postgresql://me:hunter2@127.0.0.1:1/shop"},
            "127.0.0.1:1, database shop, user me\n",
        ),
    ],
)
def test_a_database_that_is_not_there_is_named(typed, line, environment, where):
    """Without its password; and if none was named, how to name one."""
    if "PGHOST" not in environment and "DATABASE_URL" not in environment:
        environment = {"PGPORT": "1"}  # of this machine, where a server may well listen
    status, printed = typed(f"{line} --timeout 0.2", **environment)
    assert status == 3
    assert where in printed
    assert "hunter2" not in printed


def test_a_try_that_there_is_no_time_for_is_not_announced(typed):
    """The last line of the progress says that the time is up."""
    status, printed = typed("wait --timeout 0.3", PGHOST="127.0.0.1", PGPORT="1")
    assert status == 3
    assert "next try" not in printed
    assert re.search(r"attempt 1, waited 0\.\d s, no time for another within 0\.3 s", printed)


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"PGSSLMODE": "hunter2"}, "PGSSLMODE"), ({"PGPORT": "hunter2"}, "PGPORT"), ({"PGSERVICE": "hunter2"}, "service")],
)
def test_a_wrong_variable_is_named_and_its_value_is_not_shown(typed, environment, named):
    """A password that was put into the wrong one stays where it is."""
    status, printed = typed("wait --timeout 1", **environment)
    assert status == 2
    assert named in printed
    assert "hunter2" not in printed
