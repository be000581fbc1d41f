"""What counts as "could not connect": recorded output of the real tools, and what must not be taken for it."""

from __future__ import annotations

import asyncpg
import pytest

from resilient_pool import PostgresClassifier
from resilient_pool.migrations.connect_failures import OutputScanner, could_not_connect, failed_to_connect

# Recorded from alembic 1.20 with SQLAlchemy 2.1 and asyncpg 0.32; the tracebacks' middles are left out.
ALEMBIC = """\
Traceback (most recent call last):
  File "/app/bin/alembic", line 8, in <module>
    sys.exit(main())
  File "/app/lib/python3.11/site-packages/asyncpg/connect_utils.py", line 1162, in __connect_addr
    tr, pr = await connector
             ^^^^^^^^^^^^^^^
{}
"""
SQLALCHEMY = """\
Traceback (most recent call last):
  File "/app/lib/python3.11/site-packages/sqlalchemy/connectors/asyncio.py", line 378, in create
    raise translated_error from error
{}
(Background on this error at: https://sqlalche.me/e/21/dbapi)
"""
# From yoyo 9.0 with psycopg 3.3.
YOYO = """\
Traceback (most recent call last):
  File "/app/lib/python3.11/site-packages/psycopg/connection.py", line 126, in connect
    raise last_ex.with_traceback(None)
{}
"""
PRISMA = """\
Environment variables loaded from .env
Prisma schema loaded from prisma/schema.prisma
Datasource "db": PostgreSQL database "shop", schema "public" at "db.example.com:5432"

{}
"""
SERVER = 'connection to server at "127.0.0.1", port 44205 failed: '
HINT = "\n\tIs the server running on that host and accepting TCP/IP connections?"
UNEXPECTED = (
    "server closed the connection unexpectedly\n\tThis probably means the server terminated abnormally\n"
    "\tbefore or while processing the request."
)

CONNECTING = [
    f"Connection refused{HINT}",
    f"Connection reset by peer{HINT}",
    UNEXPECTED,
    "timeout expired",
    "FATAL:  the database system is starting up",
    "FATAL:  sorry, too many clients already",
    "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
]
NODE = """\
Error: connect ECONNREFUSED 127.0.0.1:1
    at TCPConnectWrap.afterConnect [as oncomplete] (node:net:1611:16) {
  errno: -111,
  code: 'ECONNREFUSED'
}
"""
RAILS = f"""\
bin/rails aborted!
ActiveRecord::ConnectionNotEstablished: {SERVER}Connection refused{HINT}

Caused by:
PG::ConnectionBad: {SERVER}Connection refused{HINT}

Tasks: TOP => db:migrate
(See full trace by running task with --trace)
"""
JDBC = (
    "org.postgresql.util.PSQLException: Connection to localhost:5432 refused. Check that the hostname and port are correct"
    " and that the postmaster is accepting TCP/IP connections."
)
FLYWAY = f"""\
ERROR: Unable to obtain connection from database (jdbc:postgresql://db/shop) for user 'app': {JDBC.partition(": ")[2]}
----------------------------------------------------------------------------
SQL State  : 08001
Error Code : 0
Message    : {JDBC.partition(": ")[2]}

Caused by: {JDBC}
Caused by: java.net.ConnectException: Connection refused
"""

AWAY = [
    ALEMBIC.format("ConnectionRefusedError: [Errno 111] Connect call failed ('127.0.0.1', 1)"),
    ALEMBIC.format(
        "OSError: Multiple exceptions: [Errno 111] Connect call failed ('::1', 1, 0, 0), [Errno 111] Connect call failed"
        " ('127.0.0.1', 1)"
    ),
    ALEMBIC.format("ConnectionResetError: [Errno 104] Connection reset by peer"),
    ALEMBIC.format("socket.gaierror: [Errno -2] Name or service not known"),
    ALEMBIC.format("TimeoutError"),
    ALEMBIC.format("asyncpg.exceptions.ConnectionDoesNotExistError: connection was closed in the middle of operation"),
    ALEMBIC.format("asyncpg.exceptions.CannotConnectNowError: the database system is starting up"),
    SQLALCHEMY.format(
        "sqlalchemy.exc.DBAPIError: (sqlalchemy.dialects.postgresql.asyncpg.Error) the database system is starting up"
    ),
    SQLALCHEMY.format(
        "sqlalchemy.exc.DBAPIError: (sqlalchemy.dialects.postgresql.asyncpg.Error) sorry, too many clients already"
    ),
    SQLALCHEMY.format(
        f"sqlalchemy.exc.OperationalError: (psycopg.OperationalError) connection failed: {SERVER}Connection refused{HINT}"
    ),
    SQLALCHEMY.format(
        "sqlalchemy.exc.OperationalError: (psycopg.OperationalError) failed to resolve host 'no-such-host.invalid':"
        " [Errno -2] Name or service not known"
    ),
    YOYO.format(f"psycopg.OperationalError: connection failed: {SERVER}Connection refused{HINT}"),
    YOYO.format(f"psycopg.OperationalError: connection failed: {SERVER}FATAL:  the database system is starting up"),
    YOYO.format(f"psycopg.OperationalError: connection failed: {SERVER}{UNEXPECTED}"),
    YOYO.format("psycopg.errors.ConnectionTimeout: connection timeout expired"),
    f"psql: error: {SERVER}Connection refused{HINT}\n",
    f"psql: error: {SERVER}Connection reset by peer{HINT}\n",
    f"psql: error: {SERVER}FATAL:  the database system is starting up\n",
    f"psql: error: {SERVER}FATAL:  sorry, too many clients already\n",
    'psql: error: could not translate host name "no-such-host.invalid" to address: Name or service not known\n',
    # From psycopg2 2.9.13, psql 15, pg8000 1.31, knex and node-pg-migrate, with a proxy that refused, reset, closed or hung.
    *(f"psycopg2.OperationalError: {SERVER}{said}\n" for said in CONNECTING),
    *(f"psql: error: {SERVER}{said}\n" for said in CONNECTING),
    SQLALCHEMY.format(f"sqlalchemy.exc.OperationalError: (psycopg2.OperationalError) {SERVER}{UNEXPECTED}\n"),
    f"django.db.utils.OperationalError: {SERVER}Connection refused{HINT}\n",
    'psycopg2.OperationalError: could not translate host name "nowhere" to address: Name or service not known\n',
    "pg8000.exceptions.InterfaceError: Can't create a connection to host 127.0.0.1 and port 1 (timeout is 2 and source_address is None).",
    "pg8000.exceptions.DatabaseError: {'S': 'FATAL', 'V': 'FATAL', 'C': '57P03', 'M': 'the database system is starting up'}",
    f"could not connect to postgres: {NODE}{NODE}",
    f"Acquire connection error: {NODE}",
    "could not connect to postgres: error: the database system is starting up\n    at Parser.parse {\n  length: 1\n}\n",
    # libpq 13 and older.
    "psql: error: could not connect to server: Connection refused\n\tIs the server running on host ...\n",
    "psql: error: FATAL:  the database system is starting up\n",
    # From reports.
    RAILS,
    FLYWAY,
    f"Unexpected error running Liquibase: liquibase.exception.DatabaseException: {JDBC}\n\tat liquibase.Main\nCaused by: java.net.ConnectException: Connection refused\n\t... 12 more\n",
    "error: dial tcp 127.0.0.1:1: connect: connection refused\n",
    "error: pq: the database system is starting up\n",
    "2026/01/02 03:04:05 goose run: failed to connect to `host=db user=app database=shop`: dial error (dial tcp 127.0.0.1:1: connect: connection refused)\n",
    "Error: unable to connect to database: dial tcp 127.0.0.1:1: connect: connection refused\n",
    PRISMA.format(
        "Error: P1001: Can't reach database server at `db.example.com:5432`\n\n"
        "Please make sure your database server is running at `db.example.com:5432`."
    ),
    PRISMA.format("Error: P1001\n\nCan't reach database server at `db.example.com`:`5432`"),
    PRISMA.format(
        "Error: P1001: Can't reach database server at `db.example.com:5432`\nnpm ERR! code 1\nmake: *** [migrate] Error 1"
    ),
]

FINAL = [
    "",
    "all is well\n",
    # The server is there, and refuses.
    f'psql: error: {SERVER}FATAL:  password authentication failed for user "app"\n',
    f'psql: error: {SERVER}FATAL:  database "nowhere" does not exist\n',
    YOYO.format(f'psycopg.OperationalError: connection failed: {SERVER}FATAL:  no pg_hba.conf entry for host "::1"'),
    SQLALCHEMY.format(
        "sqlalchemy.exc.DBAPIError: (sqlalchemy.dialects.postgresql.asyncpg.Error) password authentication failed for"
        ' user "app"'
    ),
    # SQL errors that quote such a text.
    "asyncpg.exceptions.RaiseError: the database system is starting up\n",
    (
        "sqlalchemy.exc.DBAPIError: (sqlalchemy.dialects.postgresql.asyncpg.RaiseError) <class 'asyncpg.exceptions.RaiseError'>:"
        " connection refused\n[SQL: DO $$ BEGIN RAISE 'connection refused'; END $$]\n"
        "(Background on this error at: https://sqlalche.me/e/21/dbapi)\n"
    ),
    (f"psql:/tmp/one.sql:3: ERROR:  could not establish connection\nDETAIL:  {SERVER}Connection refused{HINT}\n"),
    (
        "psycopg.errors.SqlclientUnableToEstablishSqlconnection: could not establish connection\n"
        f"DETAIL:  {SERVER}Connection refused{HINT}\n"
    ),
    # A connection lost that had been made: in mid-statement and at COMMIT, as psycopg2, psycopg, pg8000 and psql say it.
    f"psycopg2.OperationalError: {UNEXPECTED}\n",
    SQLALCHEMY.format(f"sqlalchemy.exc.OperationalError: (psycopg2.OperationalError) {UNEXPECTED}\n"),
    SQLALCHEMY.format(
        f"sqlalchemy.exc.OperationalError: (psycopg2.OperationalError) {UNEXPECTED}\n\n[SQL: insert into t values(1)]"
    ),
    f"psycopg.OperationalError: consuming input failed: {UNEXPECTED}\n",
    "psycopg2.OperationalError: could not receive data from server: Connection timed out\n",
    "psycopg2.OperationalError: Connection reset by peer\n",
    "psycopg2.OperationalError: SSL SYSCALL error: EOF detected\n",
    "psycopg2.errors.AdminShutdown: terminating connection due to administrator command\n" + UNEXPECTED,
    "pg8000.exceptions.InterfaceError: network error\n",
    "ConnectionResetError: [Errno 104] Connection reset by peer\n",
    f"{UNEXPECTED}\nconnection to server was lost\n",
    "Error: Connection terminated unexpectedly\n",
    "ActiveRecord::ConnectionFailed: PG::ConnectionBad: PQconsumeInput() server closed the connection unexpectedly\n",
    "org.postgresql.util.PSQLException: An I/O error occurred while sending to the backend.\n",
    "error: migration failed: connection refused, line 0 (details: pq: connection refused)\n",
    # Begun far back, and something else said since.
    "INFO  [alembic.runtime.migration] Running upgrade a -> b\n" + "INFO sqlalchemy.engine INSERT\n" * 1000 + AWAY[0],
    "INFO  [alembic.runtime.migration] Context impl PostgresqlImpl.\n" + AWAY[0],
    "Operations to perform:\n  Apply all migrations: auth\n" + AWAY[0],
    # Another service than the database.
    (
        'Traceback (most recent call last):\n  File "env.py", line 3, in fetch\n'
        "ConnectionRefusedError: [Errno 111] Connection refused\n"
    ),
    # Lost on the way, after something was applied.
    "INFO  [alembic.runtime.migration] Running upgrade  -> 1\n" + AWAY[0],
    "Applying migration `20240101_init`\n" + AWAY[-3],
    "CREATE TABLE\n" + AWAY[15],
    "psql:/tmp/one.sql:3: server closed the connection unexpectedly\n\tThis probably means the server terminated abnormally\n",
    PRISMA.format("Error: P1017: Server has closed the connection."),
    PRISMA.format(
        "Error: P1002\n\nThe database server at `db:5432` was reached but timed out.\n\nPlease try again.\n\n"
        "Context: Timed out trying to acquire a postgres advisory lock"
    ),
    # It went on, and failed of something else.
    AWAY[0] + "\nDuring handling of the above exception, another exception occurred:\n\nKeyError: 'fallback'\n",
]


@pytest.mark.parametrize("output", AWAY)
def test_the_tools_say_that_they_could_not_connect(output):
    """Each in its own way, with what other programs write after it."""
    assert could_not_connect(output.splitlines()) is not None


@pytest.mark.parametrize("output", FINAL)
def test_what_is_not_certain_is_final(output):
    """Running it again could do harm, or would not help."""
    assert could_not_connect(output.splitlines()) is None


def test_a_traceback_counts_only_for_the_error_that_ends_it():
    """That an earlier one was raised while asyncpg connected says nothing of a later one."""
    later = 'Traceback (most recent call last):\n  File "fetch.py", line 3, in fetch\nConnectionRefusedError: [Errno 111] no'
    assert could_not_connect((AWAY[0] + later).splitlines()) is None


def test_what_was_begun_is_remembered_however_much_is_said_afterwards():
    """Each line is judged as it comes; what is kept does not grow."""
    scanner = OutputScanner(["Applying 0001"])
    for _ in range(5000):
        scanner.feed("something")
    scanner.feed(f"psql: error: {SERVER}Connection refused")
    assert (scanner.work_started, scanner.connect_failure) == (
        "Applying 0001",
        f"psql: error: {SERVER}Connection refused",
    )


async def test_an_error_raised_while_another_was_handled_is_not_a_failure_to_connect():
    """Only what the error itself, or its explicit cause, says of connecting counts."""
    caught = []
    for explicit in (True, False):
        try:
            try:
                await asyncpg.connect("postgresql://postgres@127.0.0.1:1/postgres")
            except OSError as error:
                if explicit:
                    raise RuntimeError("mine") from error
                raise RuntimeError("mine")  # noqa: B904 - that is what is tested
        except RuntimeError as error:
            caught.append(failed_to_connect(error, PostgresClassifier()) is not None)
    assert caught == [True, False]


def test_the_line_is_returned_that_said_so():
    """For people to read why it is run again."""
    assert could_not_connect(AWAY[15].splitlines()) == f"psql: error: {SERVER}Connection refused"


class OperationalError(Exception):
    """As another driver's."""


OperationalError.__module__ = "psycopg"


@pytest.mark.parametrize(
    ("error", "repeated"),
    [
        (OperationalError(f"connection failed: {SERVER}Connection refused{HINT}"), True),
        (OperationalError("the connection is closed"), False),
        (ConnectionRefusedError(111, "Connection refused"), False),
        (ValueError(f"psql: error: {SERVER}Connection refused"), False),
    ],
)
def test_a_functions_error_is_read_as_a_commands_last_words(error, repeated):
    """Where asyncpg did not raise it while connecting."""
    assert (failed_to_connect(error, PostgresClassifier()) is not None) is repeated
