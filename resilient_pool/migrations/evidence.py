"""The evidence that an attempt to migrate could not connect and did nothing: what it said, and what the server counted.

What it said, its output or a function's error, shows why it failed, never what it had done before: so the server is
asked as well for sessions and writes meanwhile. A message counts only as the last line, in the form in which the tool itself writes it
while it connects, and only if no line says that a connection was made or work had started. A text that another error
merely quotes does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from resilient_pool.pool import ResilientPool
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
    """Return the line by which a failed command said that it could not connect, or `None` if it did not for certain.

    Args:
        lines: Its output from the beginning, as it was written.
    """
    scanner = OutputScanner(lines)
    return None if scanner.work_started is not None else scanner.connect_failure


def failed_to_connect(error: Exception, classifier: Classifier) -> str | None:
    """Return how a function said that it could not connect, or `None` if it did not for certain.

    Certain is what asyncpg raised while it was connecting, as the traceback shows, if the classifier says that
    the server is away or has no room; and another driver's error whose text matches one of the patterns. It must be the
    error itself or its explicit cause: an error that was being handled when another one was raised says nothing.

    Args:
        error: What the function raised.
        classifier: Classifies the error.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while isinstance(link, Exception) and id(link) not in seen:
        seen.add(id(link))
        if _raised_in(link.__traceback__, "asyncpg.connect_utils"):
            verdict = classifier.classify(Failure(error=link, phase=Phase.CONNECT, sent=False))
            return _name(link) if verdict.fault in (Fault.UNREACHABLE, Fault.OVERLOADED) else None
        link = link.__cause__
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


# What the server counted

# Sessions are counted in every database since PostgreSQL 14, each before its first statement can run; the count survives
# a clean restart, and a crash or a fail-over to another server shows in `stats_reset`, as it does in the epoch of a COMMIT.
# A pooler hides sessions, but no write: the ids of transactions are numbered without a gap, for the whole server.
# The connected sessions are read first: a session that ends in between has been counted when its row disappears.
_CONNECTED = "SELECT pg_catalog.array_agg(pid) FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL"
_COUNTED = """
    SELECT (SELECT stats_reset FROM pg_catalog.pg_stat_bgwriter) AS since,
           (SELECT array_agg((datid, stats_reset)::text ORDER BY datid) FROM pg_catalog.pg_stat_database
            WHERE stats_reset IS NOT NULL) AS resets,
           (SELECT sum(sessions)::bigint FROM pg_catalog.pg_stat_database) AS sessions,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.pg_current_xact_id()::text::bigint END AS xid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerActivity:
    """Counters of a server at one moment.

    Attributes:
        server: An identity that differs for another server, and after a crash or a reset of the statistics.
        connected: The process ids of the sessions that are there.
        sessions: How many sessions there have been.
        xid: A transaction id, taken for this question.
        opened: How many connections our own pool had opened by then.
    """

    server: tuple[object, ...]
    connected: frozenset[int]
    sessions: int
    xid: int
    opened: int


async def read_activity(pool: ResilientPool, deadline: float | None) -> ServerActivity | None:
    """Return the server's counters; `None` if it has none (an older server, a standby) or does not answer.

    Args:
        pool: The pool to query with.
        deadline: Seconds that may be spent waiting for the server; `None` is no limit.
    """
    try:
        connected = await pool.fetchval(_CONNECTED, deadline=deadline)
        counted = await pool.fetchrow(_COUNTED, deadline=deadline)
    except Exception:  # noqa: BLE001 - without an answer there is no evidence; the migration itself does not depend on it
        return None
    if counted is None or counted["sessions"] is None or counted["xid"] is None:
        return None
    return ServerActivity(
        server=(counted["since"], tuple(counted["resets"] or ())),
        connected=frozenset(connected or ()),
        sessions=counted["sessions"],
        xid=counted["xid"],
        opened=pool.stats().opened,
    )


def reason_for_doubt(before: ServerActivity | None, after: ServerActivity | None) -> str | None:
    """Say why something may have happened in between, or `None`: then no one but this process began a session or wrote.

    Args:
        before: The counters before the migration began.
        after: The counters after it ended.
    """
    if before is None or after is None:
        return "the server could not be asked (that takes PostgreSQL 14 or newer, and no standby)"
    if before.server != after.server:
        return "the server crashed, is another one, or its statistics were reset meanwhile"
    own = after.opened - before.opened
    others = after.sessions - before.sessions - own
    if others:
        return f"the server counted {max(others, 1)} other session(s) meanwhile, which may have been the migration's"
    if len(after.connected - before.connected) > own:
        return "another session is connected that was not there before, and may be the migration's"
    if after.xid - before.xid != 1:
        return "something was written on the server meanwhile, which may have been the migration"
    return None
