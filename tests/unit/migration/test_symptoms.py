"""What counts as "could not connect": recorded output of the real tools, and what must not be taken for it."""

from __future__ import annotations

import pytest

from resilient_pool import PostgresClassifier
from resilient_pool.migration.symptoms import could_not_connect, failed_to_connect

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
