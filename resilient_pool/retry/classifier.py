"""Reads an error and its causes, and looks up in the table of rules what is known about it."""

from __future__ import annotations

import copy
import errno
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from asyncpg import exceptions as driver

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.errors import OutcomeUnknownError, ResilientPoolError
from resilient_pool.retry.rules import CLOSED, RULES, Sighting, severity_of, sqlstate_of, text_of
from resilient_pool.retry.verdict import Disposition, Failure, Outcome, Phase, Verdict

_SPEAKING = (driver.PostgresError, driver.InterfaceError, driver.InternalClientError, ResilientPoolError)
_LOST_TYPES = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
_LOST_ERRNOS = frozenset(
    {
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENOTCONN,
        errno.EPIPE,
    }
)
# Codes that end a session, for errors without a severity. A server that gives one may mean another server's
# connection by them (a foreign table's, say): then the session lives.
_LAST_WORDS = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "25P03", "25P04", "57P01", "57P02", "57P03", "57P04", "57P05"}
)

Match = Callable[[Failure], bool]
VerdictSource = Verdict | Callable[[Failure], Verdict]
Unwrap = Callable[[BaseException], BaseException | None]


@constructor_names_nearest
class PostgresClassifier:
    """Classifies what asyncpg (0.30 and up) raises when it talks to PostgreSQL, directly or through a pooler.

    Only what was raised for this operation counts: the error itself, and what explicitly caused it. An error that an
    application happened to be handling meanwhile is Python's `__context__` of every error raised since, and says
    nothing about them.

    Args:
        unwrap: Returns the error inside one of the application's own wrappers, or `None` for any other error. What is
            found through `__cause__`, and through SQLAlchemy's `.orig`, needs no such function. Default: none.
    """

    __slots__ = ("_custom", "_unwrap")

    def __init__(self, *, unwrap: Unwrap | None = None) -> None:
        self._custom: tuple[tuple[Match, VerdictSource], ...] = ()
        self._unwrap = unwrap

    def with_rule(self, match: Match, verdict: VerdictSource) -> PostgresClassifier:
        """Return a new classifier that asks one more rule before all others; this one stays as it is.

        Args:
            match: Says whether the rule applies to a failure. `False` defers to the rules after it.
            verdict: The verdict for failures that match, or a function that gives it.

        Returns:
            A classifier with this rule first, then those added earlier, then the built-in ones.
        """
        extended = copy.copy(self)
        extended._custom = ((match, verdict), *self._custom)  # noqa: SLF001 - a copy of this object
        return extended

    def unwrap(self, error: BaseException) -> BaseException:
        """Return the driver's error, or this package's, inside an error that wraps it; `error` itself if there is none.

        Wrapped is what stands behind `__cause__` (`raise ... from error`), in an attribute `orig` (SQLAlchemy's) or in
        what the `unwrap=` of the constructor finds. Python's `__context__` is no wrapping: it is set by chance.

        Args:
            error: What was raised.
        """
        if isinstance(error, OSError):
            return error  # the driver's own, however it came to be: a refused connection, say
        return next((inner for inner in _wrapped(error, self._unwrap) if isinstance(inner, _SPEAKING)), error)

    def classify(self, failure: Failure) -> Verdict:
        """Say what is known about `failure`: by the first rule that matches.

        An `OutcomeUnknownError` is `PERMANENT` before any rule is asked, because repeating what it stands for could
        apply it twice.
        """
        inner = self.unwrap(failure.error)
        if failure.phase is Phase.CONNECT and not isinstance(inner, (OSError, *_SPEAKING)):
            # A connector's own error, with what the network said behind it. Anywhere else it may be the application's affair.
            inner = next((each for each in _wrapped(inner, self._unwrap) if _is_of_the_network(each)), inner)
        seen = _see(failure, inner)
        if not isinstance(seen.error, OutcomeUnknownError):
            for match, verdict in self._custom:
                if match(failure):
                    return verdict if isinstance(verdict, Verdict) else verdict(failure)
        rule = next(rule for rule in RULES if rule.matches(seen))
        return _settle(rule.verdict, seen)


# What servers and poolers say of a user name or a password that they refuse, where the code alone does not. Not of a
# host, a role or a database that is missing (`no pg_hba.conf entry`), nor of having been asked too often.
_REFUSED_CREDENTIALS = re.compile(
    r"""^(
        (?!.*\bcompeting\ requests)[^:"]*\bauthentication\ failed\b  # PostgreSQL, RDS, Cloud SQL, PgBouncer, Neon
      | auth(?:entication)?\ failed$  # PgBouncer before 1.9
      | (?:odyssey:\ \S+\ )?incorrect\ password
      | password\ for\ user\ "  # PgDog
      | The\ password\ that\ was\ provided\ for\ the\ role\   # RDS Proxy
      | unable\ to\ accept\ connection,\ access\ denied  # Aurora DSQL
      | The\ access\ token\ has\ expired  # Azure
      | (?:Failed\ to\ identify\ your\ database:\ )?Your\ Postgres\ credentials\ are\ incorrect  # Prisma
    )""",
    re.VERBOSE | re.IGNORECASE,
)
# 08006 is Aurora DSQL's, XX000 Neon's and Supavisor's, 58000 PgDog's; some send none at all.
_CODES_OF_REFUSALS = frozenset({"28000", "08P01", "08006", "XX000", "58000", ""})


def refuses_credentials(error: BaseException) -> bool:
    """Say whether a server or a pooler has refused a user name or a password, so that another one may be accepted.

    Args:
        error: What opening a connection has raised, or an error that wraps it.

    Returns:
        `True` for 28P01; for 28000 and the codes of poolers if the server's function or the message says so. `False` for a
        role or a database that does not exist, and for a host that `pg_hba.conf` does not let in.
    """
    refusal = PostgresClassifier().unwrap(error)
    if not isinstance(refusal, driver.PostgresError):
        return False
    if sqlstate_of(refusal) == "28P01" or getattr(refusal, "server_source_function", None) == "auth_failed":
        return True
    return sqlstate_of(refusal) in _CODES_OF_REFUSALS and _REFUSED_CREDENTIALS.search(text_of(refusal)) is not None


# What they say of a user who is no more, or not any longer one.
_REFUSED_USER = re.compile(
    r"""^(
        role\ ".*"\ (does\ not\ exist|is\ not\ permitted\ to\ log\ in)$
      | no\ such\ user\b  # PgBouncer
      | .*\bTenant\ or\ user\ not\ found  # Supavisor
    )""",
    re.VERBOSE | re.IGNORECASE,
)


def refuses_user(error: BaseException) -> bool:
    """Say whether a server or a pooler does not know a user, or does not let that one in: another one may be.

    Args:
        error: What opening a connection has raised, or an error that wraps it.
    """
    refusal = PostgresClassifier().unwrap(error)
    if not isinstance(refusal, driver.PostgresError) or sqlstate_of(refusal) not in _CODES_OF_REFUSALS:
        return False
    if getattr(refusal, "server_source_function", None) == "InitializeSessionUserId":
        return True
    return _REFUSED_USER.search(text_of(refusal)) is not None


def reports_closed_connection(error: BaseException) -> bool:
    """Say whether the driver, and not a server, says that a connection is closed or was lost; it may be any connection.

    Args:
        error: What was raised, unwrapped.
    """
    if isinstance(error, driver.ConnectionDoesNotExistError):
        return severity_of(error) == ""
    return isinstance(error, driver.InterfaceError) and re.search(CLOSED, text_of(error)) is not None


# What servers and poolers say when they do not know themselves what became of a COMMIT: a lost connection (08), a server that
# ends (57P), a pooler's or the system's trouble (58), an internal error (XX, also CockroachDB's XXA00: it has committed).
_NO_WORD_ABOUT_A_COMMIT = ("08", "40003", "57P", "58", "XX")


def refuses_commit(error: BaseException) -> bool:
    """Say whether an answer to COMMIT is a refusal, so that the transaction is certain to be rolled back.

    Args:
        error: What the driver has raised for COMMIT.

    Returns:
        `True` for an ERROR of the server's own with a code that is no word about a lost connection. What ends the session
        (a FATAL, also one after which a pooler keeps its client) and what a pooler says for its server are no refusals.
    """
    if not isinstance(error, driver.PostgresError) or severity_of(error) != "ERROR":
        return False
    return sqlstate_of(error) != "" and not sqlstate_of(error).startswith(_NO_WORD_ABOUT_A_COMMIT)


def _see(failure: Failure, error: BaseException) -> Sighting:
    """Find what speaks for a failure, once it is unwrapped, and whether the connection is gone."""
    last_word = error
    if isinstance(error, driver.ConnectionDoesNotExistError):
        causes = (cause for cause in _causes(error) if cause is not error)
        last_word = next((cause for cause in causes if isinstance(cause, driver.PostgresError)), error)
    return Sighting(failure=failure, error=last_word, lost=_is_loss(error))


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is None  # and not of a file


def _wrapped(error: BaseException, unwrap: Unwrap | None) -> Iterator[BaseException]:
    """Yield the error and those that it wraps, nearest first, each once."""
    queue: deque[object] = deque([error])
    seen: set[int] = set()
    while queue:
        inner = queue.popleft()
        if not isinstance(inner, BaseException) or id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        queue.extend((None if unwrap is None else unwrap(inner), inner.__cause__, getattr(inner, "orig", None)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what explicitly caused it, nearest first, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is_loss(error: BaseException) -> bool:
    """Say whether the connection ended with this error, or had ended before."""
    if isinstance(error, driver.PostgresError):
        severity = severity_of(error)
        return severity in {"FATAL", "PANIC"} or (severity != "ERROR" and sqlstate_of(error) in _LAST_WORDS)
    if isinstance(error, driver.InterfaceError):
        return re.search(CLOSED, text_of(error)) is not None
    return isinstance(error, _LOST_TYPES) or (isinstance(error, OSError) and error.errno in _LOST_ERRNOS)


def _settle(verdict: Verdict, seen: Sighting) -> Verdict:
    """Add what holds whichever rule matched.

    There are two such things: before a statement was sent it cannot have run, and a peer that fell silent until the
    kernel gave up has most likely left the other connections hanging as well.
    """
    failure = seen.failure
    never_ran = failure.phase is Phase.CONNECT or (failure.phase is not Phase.COMMIT and seen.unsent)
    if never_ran and verdict.outcome is not Outcome.NOT_EXECUTED:
        verdict = replace(verdict, outcome=Outcome.NOT_EXECUTED)
    if seen.lost and failure.phase is not Phase.CONNECT and _fell_silent(failure):
        verdict = replace(verdict, others=Disposition.EXPIRE)
    return verdict


def _fell_silent(failure: Failure) -> bool:
    # Along `__context__` too: a masked loss keeps its reason there, and a false alarm costs no more than new connections.
    return any(isinstance(error, OSError) and error.errno == errno.ETIMEDOUT for error in failure.chain())
