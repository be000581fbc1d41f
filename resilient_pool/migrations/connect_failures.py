"""Recognises, in a command's output or in a function's error, the words for "could not connect": a table of symptoms as data.

Such words are one half of the evidence. They say why an attempt failed, never what it had done before: that half is
`migrations/server_activity.py`. Words count only as the last thing that is said, in the form in which the tool itself says them
while it connects, and not once a line says that a connection was made or something was begun. A text that another error
merely quotes is a failure as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

from resilient_pool.retry.verdict import Classifier, Failure, Fault, Phase

_AWAY = (
    r"(?:the database system is (?:starting up|shutting down|in recovery mode|not (?:yet )?accepting connections)"
    r"|sorry, too many clients already|remaining connection slots are reserved)"
)
_FATAL = rf"FATAL: +{_AWAY}"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """One way in which a tool says that it could not connect.

    Attributes:
        tool: Who says so.
        line: A pattern for the whole line, from its beginning.
        connecting: Whether the traceback before it must show asyncpg's connecting, where the line alone is not certain.
    """

    tool: str
    line: re.Pattern[str]
    connecting: bool = False


SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        tool="asyncpg, also under alembic: a failure of the network while it connects",
        line=re.compile(
            r"(?:ConnectionRefusedError|ConnectionResetError|ConnectionAbortedError|OSError|socket\.gaierror"
            r"|(?:asyncio\.(?:exceptions\.)?)?TimeoutError"
            r"|asyncpg\.exceptions\.ConnectionDoesNotExistError)(?:: .*)?$"
        ),
        connecting=True,
    ),
    Symptom(
        tool="asyncpg: the server's refusal",
        line=re.compile(
            r"asyncpg\.exceptions\.(?:CannotConnectNowError|TooManyConnectionsError): " + _AWAY, re.IGNORECASE
        ),
    ),
    Symptom(
        tool="asyncpg under SQLAlchemy: the server's refusal",
        line=re.compile(
            r"sqlalchemy\.exc\.\w+: \(sqlalchemy\.dialects\.postgresql\.asyncpg\.\w+\) (?:<class '[\w.]+'>: )?" + _AWAY
        ),
    ),
    Symptom(
        tool="psycopg and psycopg2, also under SQLAlchemy, yoyo and Django",
        line=re.compile(
            r"(?:sqlalchemy\.exc\.OperationalError: \()?(?:psycopg2?|django\.db\.utils)\.(?:errors\.)?"
            r"(?:OperationalError|ConnectionTimeout)(?:\)|:) "
            rf"(?:{_LIBPQ}|connection timeout expired|failed to resolve host|\[Errno -\d+\])"
        ),
    ),
    Symptom(
        tool="pg8000",
        line=re.compile(
            r"(?:sqlalchemy\.exc\.\w+: \()?pg8000\.\w+\.(?:InterfaceError(?:\)|:) Can't create a connection to host "
            r"|DatabaseError(?:\)|:) \{'S': 'FATAL', (?:'V': 'FATAL', )?'C': '(?:57P03|53300)')"
        ),
    ),
    Symptom(tool="psql, pg_dump and their kin", line=re.compile(rf"(?:psql|pg_\w+): error: {_LIBPQ}")),
    Symptom(
        tool="Rails, and the gem pg",
        line=re.compile(
            rf"(?:ActiveRecord::(?:ConnectionNotEstablished|DatabaseConnectionError)|PG::ConnectionBad): {_LIBPQ}"
        ),
    ),
    Symptom(
        tool="Prisma",
        line=re.compile(r"(?:Error: )?P1001\b|(?:Error: )?Can't reach database server at"),
    ),
    Symptom(
        tool="knex and node-pg-migrate",
        line=re.compile(
            r"(?:could not connect to postgres|Acquire connection error): "
            rf"(?:Error: (?:connect E[A-Z]+ |getaddrinfo |timeout expired)|error: {_AWAY})"
        ),
    ),
    Symptom(
        tool="Flyway and Liquibase, and pgjdbc under them",
        line=re.compile(
            rf"(?:ERROR: )?Unable to obtain connection from database(?: \(jdbc:postgresql:.{{0,500}}\) for user '.{{0,100}}')?: {_JDBC}"
            rf"|(?:Unexpected error running Liquibase: )?(?:liquibase\.exception\.\w+: )*org\.postgresql\.util\.PSQLException: {_JDBC}"
        ),
    ),
    Symptom(
        tool="golang-migrate, goose and dbmate",
        line=re.compile(
            r"(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d )?(?:[Ee]rror: |goose run: )(?:failed to open database: |unable to connect to database: )?"
            rf"(?:{_DIAL}|pq: {_AWAY}"
            rf"|failed to connect to `[^`]{{0,300}}`:? .{{0,200}}?(?:{_DIAL}|hostname resolving error|{_FATAL}))"
        ),
    ),
)
"""What counts as "could not connect". The tests hold the output of each tool."""

_EPILOGUE = re.compile(
    r"\s|$"  # blank lines, and indented ones: what libpq and tracebacks add
    r"|\(Background on this error at: "
    r"|Please make sure your database server is running at "
    r"|Can't reach database server at "  # behind a heading "Error: P1001" of its own
    r"|Multiple connection attempts failed|- host: "
    r"|make(?:\[\d+\])?: \*\*\*|npm ERR!|npm error|error Command failed with exit code"
    r"| ?ELIFECYCLE| ?ERR_PNPM"
    rf"|\}}$|Error: (?:connect E[A-Z]+|getaddrinfo) |error: {_AWAY}|Node\.js v\d"
    r"|-+$|SQL State +: 08|Error Code +: 0|Message +: |Caused by:|\.\.\. \d+ more"
    r"|Tasks: TOP => |\(See full trace by running task with --trace\)|\S+\.rb:\d+:in "
)
"""Lines that may follow a symptom."""

_BEGUN = re.compile(
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
"""Lines by which a tool says that it had connected, or begun to apply something: alembic, yoyo, Prisma, Django, psql, Rails,
Flyway, Liquibase, golang-migrate, goose, knex, node-pg-migrate."""


class Transcript:
    """Judges a command's output line by line as it comes; what it keeps does not grow with it.

    Attributes:
        begun: The first line that says that something had been begun, or `None`.
    """

    __slots__ = ("_driver_connects", "_symptom", "begun")

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.begun: str | None = None
        self._symptom: str | None = None
        self._driver_connects = False
        for line in lines:
            self.hear(line)

    def hear(self, line: str) -> None:
        """Take the next line, as it was written."""
        if self.begun is None and _BEGUN.match(line):
            self.begun = line
        if line.lstrip(" |+").startswith("Traceback (most recent call last)"):
            self._driver_connects = False
        elif "connect_utils.py" in line and _DRIVER_CONNECTS.match(line):
            self._driver_connects = True
        if any(self._fits(symptom, line) for symptom in SYMPTOMS):
            self._symptom = line
        elif not _EPILOGUE.match(line):
            self._symptom = None

    @property
    def symptom(self) -> str | None:
        """The line that said "could not connect", if that was the last thing said, whatever had been begun before."""
        return self._symptom

    def _fits(self, symptom: Symptom, line: str) -> bool:
        return symptom.line.match(line) is not None and (self._driver_connects or not symptom.connecting)


def could_not_connect(lines: Iterable[str]) -> str | None:
    """Return the line by which a failed command said that it could not connect, or `None` if it did not for certain.

    Args:
        lines: Its output from the beginning, as it was written.
    """
    heard = Transcript(lines)
    return None if heard.begun is not None else heard.symptom


def failed_to_connect(error: Exception, classifier: Classifier) -> str | None:
    """Return how a function said that it could not connect, or `None` if it did not for certain.

    Certain is what asyncpg raised while it was connecting, as the traceback tells, if the classifier says of it that
    the server is away or has no room; and what another driver says in the form of one of the symptoms. It must be the
    error itself or its explicit cause: an error that was being handled when another one was raised says nothing.

    Args:
        error: What the function raised.
        classifier: Tells what is known about a failure.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while isinstance(link, Exception) and id(link) not in seen:
        seen.add(id(link))
        if _raised_by(link.__traceback__, "asyncpg.connect_utils"):
            verdict = classifier.classify(Failure(error=link, phase=Phase.CONNECT, sent=False))
            return _name(link) if verdict.fault in (Fault.UNREACHABLE, Fault.OVERLOADED) else None
        link = link.__cause__
    said = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    return _name(error) if could_not_connect(said.splitlines()) is not None else None


def _raised_by(traceback: TracebackType | None, module: str) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == module:
            return True
        traceback = traceback.tb_next
    return False


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
