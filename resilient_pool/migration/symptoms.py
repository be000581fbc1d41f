"""The only module that tells, from a migration's output or error, that it could not connect: a table of symptoms as data.

A migration may be run again only if it has changed nothing. So a symptom counts only as the last thing that a command
says, in the form in which the tool itself says it, and never once the command has begun to apply something: an SQL
error that merely quotes such a text is a failure as any other. What is not certain is final.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from resilient_pool.policy.verdict import Classifier, Failure, Fault, Phase

_AWAY = (
    r"(?:the database system is (?:starting up|shutting down|in recovery mode|not (?:yet )?accepting connections)"
    r"|sorry, too many clients already|remaining connection slots are reserved)"
)
_LIBPQ = (
    r"(?:connection to server .* failed: |connection failed: |connection is bad: |could not connect to server: )*"
    rf"(?:Connection refused|Connection reset by peer|Connection timed out|No route to host|Network is unreachable"
    rf"|timeout expired|server closed the connection unexpectedly|could not translate host name"
    rf"|(?:FATAL: +)?{_AWAY})"
)
_DRIVER_CONNECTS = re.compile(r'File ".*asyncpg[/\\]connect_utils\.py"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """One way in which a tool says that it could not connect.

    Attributes:
        tool: Who says so.
        line: A pattern for the whole line, from its beginning.
        after: A pattern that must stand in the traceback before it, where the line alone is not certain.
    """

    tool: str
    line: re.Pattern[str]
    after: re.Pattern[str] | None = None


SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        tool="asyncpg, also under alembic: a failure of the network while it connects",
        line=re.compile(
            r"(?:ConnectionRefusedError|ConnectionResetError|ConnectionAbortedError|OSError|socket\.gaierror"
            r"|(?:asyncio\.(?:exceptions\.)?)?TimeoutError"
            r"|asyncpg\.exceptions\.ConnectionDoesNotExistError)(?:: .*)?$"
        ),
        after=_DRIVER_CONNECTS,
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
    Symptom(tool="psql, pg_dump and their kin", line=re.compile(rf"(?:psql|pg_\w+): error: {_LIBPQ}")),
    Symptom(
        tool="Prisma",
        line=re.compile(r"(?:Error: )?P1001\b|(?:Error: )?Can't reach database server at"),
    ),
)
"""What counts as "could not connect". The tests hold the recorded output of each tool."""

_EPILOGUE = re.compile(
    r"\s|$"  # blank lines, and indented ones: what libpq and tracebacks add
    r"|\(Background on this error at: "
    r"|Please make sure your database server is running at "
    r"|Can't reach database server at "  # behind a heading "Error: P1001" of its own
    r"|Multiple connection attempts failed|- host: "
    r"|make(?:\[\d+\])?: \*\*\*|npm ERR!|npm error|error Command failed with exit code"
    r"| ?ELIFECYCLE| ?ERR_PNPM"
)
"""Lines that may follow a symptom."""

_BEGUN = re.compile(
    r".*\[alembic\.runtime\.migration\] Running (?:upgrade|downgrade|stamp_revision)"
    r"|.*\bApplying "
    r"|psql:.+:\d+: "
    r"|(?:BEGIN|CREATE|ALTER|DROP|INSERT|UPDATE|DELETE|COMMIT|DO|GRANT|TRUNCATE|COPY)\b"
)
"""Lines by which a tool says that it has begun to apply something: alembic, yoyo, Prisma, Django, psql."""


def could_not_connect(lines: Sequence[str]) -> str | None:
    """Return the line by which a failed command said that it could not connect, or `None` if it did not for certain.

    Args:
        lines: The end of its output, as it was written.
    """
    if any(_BEGUN.match(line) for line in lines):
        return None
    for position in range(len(lines) - 1, -1, -1):
        line = lines[position]
        if any(_fits(symptom, lines, position) for symptom in SYMPTOMS):
            return line
        if not _EPILOGUE.match(line):
            return None
    return None


def _fits(symptom: Symptom, lines: Sequence[str], position: int) -> bool:
    if not symptom.line.match(lines[position]):
        return False
    return symptom.after is None or any(symptom.after.search(line) for line in _traceback_before(lines, position))


def _traceback_before(lines: Sequence[str], position: int) -> Sequence[str]:
    """Return the lines of the traceback which ends at `position`."""
    begin = position
    while begin > 0 and not lines[begin].lstrip(" |+").startswith("Traceback (most recent call last)"):
        begin -= 1
    return lines[begin:position]


def failed_to_connect(error: Exception, classifier: Classifier) -> str | None:
    """Return how a function said that it could not connect, or `None` if it did not for certain.

    Certain is what asyncpg raised while it was connecting, as the traceback tells, if the classifier says of it that
    the server is away or has no room; and what another driver says in the form of one of the symptoms.

    Args:
        error: What the function raised.
        classifier: Tells what is known about a failure.
    """
    for link in Failure(error=error, phase=Phase.CONNECT).chain():
        if not isinstance(link, Exception):
            continue
        if _raised_by(link.__traceback__, "asyncpg.connect_utils"):
            verdict = classifier.classify(Failure(error=link, phase=Phase.CONNECT, sent=False))
            return _name(link) if verdict.fault in (Fault.UNREACHABLE, Fault.OVERLOADED) else None
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
