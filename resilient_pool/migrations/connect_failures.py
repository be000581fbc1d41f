"""Recognises "could not connect" in a command's output or in a function's error: a table of patterns.

That is one half of the evidence: it shows why an attempt failed, never what it had done before. The other half is what the
server has counted (`reason_for_doubt` in `server.py`). A message counts only as the last line, in the form in which the tool itself writes it
while it connects, and only if no line says that a connection was made or work had started. A text that another error
merely quotes does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import TracebackType

from resilient_pool.retry.classifier import causes
from resilient_pool.retry.verdict import Classifier, Failure, Fault, Phase

_UNAVAILABLE = (
    r"(?:the database system is (?:starting up|shutting down|in recovery mode|not (?:yet )?accepting connections)"
    r"|sorry, too many clients already|remaining connection slots are reserved)"
)
_FATAL = rf"FATAL: +{_UNAVAILABLE}"
# What libpq says of a socket stands behind "connection to server at ... failed: " while it connects (before libpq 14 behind
# "could not connect to server: "). Without that it speaks of a connection that had been made. A FATAL of this kind is
# sent before a session begins only.
_SOCKET = (
    r"(?:Connection refused|Connection reset by peer|Connection timed out|No route to host|Network is unreachable"
    r"|timeout expired|server closed the connection unexpectedly)"
)
_LIBPQ = (
    r"(?:connection failed: |connection is bad: )?"
    rf"(?:connection to server (?:at|on) .{{0,300}} failed: (?:{_SOCKET}|{_FATAL})"
    rf"|could not connect to server: {_SOCKET}"
    r"|could not translate host name"
    rf"|{_FATAL})"
)
_JDBC = rf"(?:Connection to \S+ refused\. Check that the hostname and port are correct|The connection attempt failed\.|{_FATAL})"
_DIAL = r"dial tcp \S+: (?:connect: connection refused|connect: no route to host|i/o timeout|lookup )"
_DRIVER_CONNECTS = re.compile(r'\s*[|+ ]*File ".*asyncpg[/\\]connect_utils\.py"')


# By these asyncpg's errors of the network are known, also under alembic, if the traceback shows that it was connecting.
_WHILE_CONNECTING = re.compile(
    r"(?:ConnectionRefusedError|ConnectionResetError|ConnectionAbortedError|OSError|socket\.gaierror"
    r"|(?:asyncio\.(?:exceptions\.)?)?TimeoutError|asyncpg\.exceptions\.ConnectionDoesNotExistError)(?:: .*)?$"
)

CONNECT_FAILURE_PATTERNS: Mapping[str, str] = {
    "asyncpg: the server's refusal": (
        rf"asyncpg\.exceptions\.(?:CannotConnectNowError|TooManyConnectionsError): (?i:{_UNAVAILABLE})"
    ),
    "asyncpg under SQLAlchemy: the server's refusal": (
        r"sqlalchemy\.exc\.\w+: \(sqlalchemy\.dialects\.postgresql\.asyncpg\.\w+\) (?:<class '[\w.]+'>: )?"
        + _UNAVAILABLE
    ),
    "psycopg and psycopg2, also under SQLAlchemy, yoyo and Django": (
        r"(?:sqlalchemy\.exc\.OperationalError: \()?(?:psycopg2?|django\.db\.utils)\.(?:errors\.)?"
        r"(?:OperationalError|ConnectionTimeout)(?:\)|:) "
        rf"(?:{_LIBPQ}|connection timeout expired|failed to resolve host|\[Errno -\d+\])"
    ),
    "pg8000": (
        r"(?:sqlalchemy\.exc\.\w+: \()?pg8000\.\w+\.(?:InterfaceError(?:\)|:) Can't create a connection to host "
        r"|DatabaseError(?:\)|:) \{'S': 'FATAL', (?:'V': 'FATAL', )?'C': '(?:57P03|53300)')"
    ),
    "psql, pg_dump and their kin": rf"(?:psql|pg_\w+): error: {_LIBPQ}",
    "Rails, and the gem pg": (
        rf"(?:ActiveRecord::(?:ConnectionNotEstablished|DatabaseConnectionError)|PG::ConnectionBad): {_LIBPQ}"
    ),
    "Prisma": r"(?:Error: )?P1001\b|(?:Error: )?Can't reach database server at",
    "knex and node-pg-migrate": (
        r"(?:could not connect to postgres|Acquire connection error): "
        rf"(?:Error: (?:connect E[A-Z]+ |getaddrinfo |timeout expired)|error: {_UNAVAILABLE})"
    ),
    "Flyway and Liquibase, and pgjdbc under them": (
        rf"(?:ERROR: )?Unable to obtain connection from database(?: \(jdbc:postgresql:.{{0,500}}\) for user '.{{0,100}}')?: {_JDBC}"
        rf"|(?:Unexpected error running Liquibase: )?(?:liquibase\.exception\.\w+: )*org\.postgresql\.util\.PSQLException: {_JDBC}"
    ),
    "golang-migrate, goose and dbmate": (
        r"(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d )?(?:[Ee]rror: |goose run: )(?:failed to open database: |unable to connect to database: )?"
        rf"(?:{_DIAL}|pq: {_UNAVAILABLE}"
        rf"|failed to connect to `[^`]{{0,300}}`:? .{{0,200}}?(?:{_DIAL}|hostname resolving error|{_FATAL}))"
    ),
}
"""By tool, the lines that count as "could not connect", from their beginning. The tests hold the output of each."""

_CONNECT_FAILURE = re.compile("|".join(f"(?:{pattern})" for pattern in CONNECT_FAILURE_PATTERNS.values()))

_TRAILING_LINE = re.compile(
    r"\s|$"  # blank lines, and indented ones: what libpq and tracebacks add
    r"|\(Background on this error at: "
    r"|Please make sure your database server is running at "
    r"|Can't reach database server at "  # behind a heading "Error: P1001" of its own
    r"|Multiple connection attempts failed|- host: "
    r"|make(?:\[\d+\])?: \*\*\*|npm ERR!|npm error|error Command failed with exit code"
    r"| ?ELIFECYCLE| ?ERR_PNPM"
    rf"|\}}$|Error: (?:connect E[A-Z]+|getaddrinfo) |error: {_UNAVAILABLE}|Node\.js v\d"
    r"|-+$|SQL State +: 08|Error Code +: 0|Message +: |Caused by:|\.\.\. \d+ more"
    r"|Tasks: TOP => |\(See full trace by running task with --trace\)|\S+\.rb:\d+:in "
)
"""Lines that may follow a message of that kind."""

_WORK_STARTED = re.compile(
    r".*\[alembic\.runtime\.migration\] (?:Running |Context impl |Will assume )"
    r"|.*\bApplying "
    r"|psql:.+:\d+: "
    r"|Operations to perform:|Running migrations:"
    r"|== +\S+ .*: (?:migrating|reverting)|-- \w+\("
    r"|Database: jdbc:|Successfully (?:validated|applied) |Current version of schema |Migrating schema |Running Changeset: "
    r"|\d+/[ud] \w|(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d )?(?:OK|FAIL) +\S+\.(?:sql|go)\b|Batch \d+ run: |### MIGRATION "
    r"|(?:BEGIN|START TRANSACTION|CREATE|ALTER|DROP|INSERT|UPDATE|DELETE|MERGE|COMMIT|ROLLBACK|DO|CALL|GRANT|REVOKE|TRUNCATE"
    r"|COPY|SET|SELECT|COMMENT|VACUUM|REINDEX|REFRESH|LOCK TABLE|PREPARE|NOTIFY)\b"
)
"""Lines by which a tool says that it had connected, or had started to apply something: alembic, yoyo, Prisma, Django, psql, Rails,
Flyway, Liquibase, golang-migrate, goose, knex, node-pg-migrate."""


class OutputScanner:
    """Scans a command's output line by line, in constant memory.

    Attributes:
        work_started: The first line that says that work had started, or `None`.
        connect_failure: The line that said "could not connect", if that was the last message, whether work had started or not.
    """

    __slots__ = ("_driver_connects", "connect_failure", "work_started")

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.work_started: str | None = None
        self.connect_failure: str | None = None
        self._driver_connects = False
        for line in lines:
            self.feed(line)

    def feed(self, line: str) -> None:
        """Take the next line, as it was written."""
        if self.work_started is None and _WORK_STARTED.match(line):
            self.work_started = line
        if line.lstrip(" |+").startswith("Traceback (most recent call last)"):
            self._driver_connects = False
        elif "connect_utils.py" in line and _DRIVER_CONNECTS.match(line):
            self._driver_connects = True
        if _CONNECT_FAILURE.match(line) or (self._driver_connects and _WHILE_CONNECTING.match(line)):
            self.connect_failure = line
        elif not _TRAILING_LINE.match(line):
            self.connect_failure = None


def could_not_connect(lines: Iterable[str]) -> str | None:
    """Return the line by which a failed command said that it could not connect, or `None` if it did not for certain."""
    scanner = OutputScanner(lines)
    return None if scanner.work_started is not None else scanner.connect_failure


def failed_to_connect(error: Exception, classifier: Classifier) -> str | None:
    """Return how a function said that it could not connect, or `None` if it did not for certain.

    Certain is what asyncpg raised while it was connecting, as the traceback shows, if the classifier says that
    the server is away or has no room; and another driver's error whose text matches one of the patterns. It must be the
    error itself or its explicit cause: an error that was being handled when another one was raised says nothing.
    """
    for link in causes(error):
        if isinstance(link, Exception) and _raised_in(link.__traceback__, "asyncpg.connect_utils"):
            verdict = classifier.classify(Failure(error=link, phase=Phase.CONNECT, sent=False))
            return _name(link) if verdict.fault in (Fault.UNREACHABLE, Fault.OVERLOADED) else None
    said = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    return _name(error) if could_not_connect(said.splitlines()) is not None else None


def _raised_in(traceback: TracebackType | None, module: str) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == module:
            return True
        traceback = traceback.tb_next
    return False


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
