"""What is known about which error: a table of rules, and how an error and its causes are held against it."""

from __future__ import annotations

import copy
import errno
import functools
import re
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from asyncpg import exceptions as driver

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.errors import OutcomeUnknownError, ResilientPoolError
from resilient_pool.retry.verdict import Disposition, Failure, Fault, Outcome, Phase, Verdict

Match = Callable[[Failure], bool]
VerdictSource = Verdict | Callable[[Failure], Verdict]
Unwrap = Callable[[BaseException], BaseException | None]

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


# What rules are held against


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A failure as the rules see it.

    Attributes:
        failure: What was seen.
        error: The error that speaks for it. Of a lost connection this is the server's last word, where the driver
            passes it on (asyncpg 0.32 does, 0.31 and older do not), else the driver's `ConnectionDoesNotExistError`.
        lost: Whether the connection ended with it, or had ended before.
        sqlstate: Its SQLSTATE, or nothing.
        severity: Its severity as the server sent it; nothing for an error that the driver made by itself.
        text: Its message, without the details and hints that a server may add.
    """

    failure: Failure
    error: BaseException
    lost: bool
    sqlstate: str
    severity: str
    text: str

    @property
    def unsent(self) -> bool:
        """Whether nothing of the application's statement was sent."""
        return self.failure.phase is Phase.CHECKOUT or not self.failure.sent

    @property
    def raised_in(self) -> str:
        """The name of the server's function that raised it, or nothing."""
        return getattr(self.error, "server_source_function", None) or ""


class Where(NamedTuple):
    """When a rule applies.

    Attributes:
        phases: In which phases.
        lost: Whether the connection must, or must not, have ended with the error; `None` means either.
    """

    phases: frozenset[Phase]
    lost: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of the table: it applies when everything that it names holds.

    Attributes:
        verdict: What is known then. In the phases CONNECT and CHECKOUT, and where nothing was sent, the outcome is
            `NOT_EXECUTED` in any case.
        evidence: What this line recognises, in words for a reader.
        where: In which phases, and whether as the end of a connection.
        codes: Codes of which the error must have one, whole or by their first two characters; empty means any.
        errors: Types of which the error must be one; empty means any.
        text: A pattern which the message must contain.
        when: What else must hold.
    """

    verdict: Verdict
    evidence: str
    where: Where
    codes: frozenset[str]
    errors: tuple[type[BaseException], ...]
    text: str | None
    when: Callable[[Sighting], bool] | None

    def applies(self, phase: Phase, sqlstate: str, *, lost: bool) -> bool:
        """Say whether this rule can be about such an error."""
        return (
            phase in self.where.phases
            and self.where.lost in (None, lost)
            and (not self.codes or not self.codes.isdisjoint((sqlstate, sqlstate[:2])))
        )

    def matches(self, seen: Sighting) -> bool:
        """Say whether what else this rule names holds for `seen`, of which it `applies` to phase and code."""
        return (
            (not self.errors or isinstance(seen.error, self.errors))
            and (self.text is None or re.search(self.text, seen.text) is not None)
            and (self.when is None or self.when(seen))
        )


# What else must hold

# Functions of postgres_fdw's and dblink's that raise what another server has said to this one, or that it is away.
_FOREIGN = frozenset({"pgfdw_report_error", "pgfdw_report", "pgfdw_report_internal", "connect_pg_server"}) | frozenset(
    {"dblink_res_error", "dblink_connect", "dblink_get_conn", "dblink_conn_not_avail"}
)
# Functions that read one argument's binary form, by the client's idea of its type.
_READS_AN_ARGUMENT = frozenset(
    {"record_recv", "array_recv", "range_recv", "multirange_recv", "enum_recv", "domain_recv"}
)


def _demoted(seen: Sighting) -> bool:
    """Whether a refusal to write is news about the server: not what was asked for, and not said by another server.

    A server found not to be a standby is read-only by a setting (its disk is full, say): another connection finds the same.
    """
    failure = seen.failure
    if failure.phase is Phase.CONNECT and not failure.in_recovery:
        return False
    return failure.writable and not failure.read_only_asked and failure.in_recovery is not False and _own(seen)


def _own(seen: Sighting) -> bool:
    """Whether the error is about this session, and not what a foreign table's or dblink's server has said."""
    return seen.raised_in not in _FOREIGN


def _reads_argument(seen: Sighting) -> bool:
    return seen.raised_in in _READS_AN_ARGUMENT


def _waking(seen: Sighting) -> bool:
    return seen.failure.waking


def _not_sent(seen: Sighting) -> bool:
    return seen.unsent


def _sent(seen: Sighting) -> bool:
    return not seen.unsent


def _recoded(seen: Sighting) -> bool:
    return seen.sqlstate in _ONE_CODE


def _ends_session(seen: Sighting) -> bool:
    return seen.lost or seen.severity != "ERROR"


def _from_server(seen: Sighting) -> bool:
    return seen.severity != ""


# The words of the table

STALE, UNREACHABLE, DISCONNECTED, OVERLOADED, CONTENTION, WRONG_SERVER, STATEMENT_CACHE, POISONED, PERMANENT = Fault
NOT_EXECUTED, ROLLED_BACK, UNKNOWN = Outcome
KEEP, DISCARD, EXPIRE = Disposition
ANY = Where(frozenset(Phase))
ALIVE, LOST = ANY._replace(lost=False), ANY._replace(lost=True)
CONNECTING, CHECKING, CONNECTED, EXECUTING = (
    Where(frozenset({Phase.CONNECT})),
    Where(frozenset({Phase.CHECKOUT})),
    Where(ANY.phases - {Phase.CONNECT}),
    Where(ANY.phases - {Phase.COMMIT}),
)
LOST_CONNECTING, LOST_COMMIT = CONNECTING._replace(lost=True), Where(frozenset({Phase.COMMIT}), lost=True)
LOST_EXECUTING = EXECUTING._replace(lost=True)


def _rule(
    fault: Fault,
    raised: str | type[BaseException] | tuple[type[BaseException], ...],
    evidence: str,
    *,
    outcome: Outcome = UNKNOWN,
    where: Where = ANY,
    then: Disposition = DISCARD,
    text: str | None = None,
    when: Callable[[Sighting], bool] | None = None,
) -> Rule:
    """Make a row of the table.

    Args:
        fault: The kind of trouble.
        raised: Codes, side by side, or types; nothing for any error.
        evidence: What the row recognises, in words for a reader.
        outcome: What is known of the statement. Nothing, by default.
        where: When the row applies. At any time, by default.
        then: What becomes of the connection. `EXPIRE` discards it, and expires those opened before it.
        text: A pattern which the message must contain.
        when: What else must hold.
    """
    connection, others = (DISCARD, EXPIRE) if then is EXPIRE else (then, KEEP)
    codes, errors = (raised, ()) if isinstance(raised, str) else ("", raised)
    return Rule(
        verdict=Verdict(fault=fault, outcome=outcome, connection=connection, others=others),
        evidence=evidence,
        where=where,
        codes=frozenset(codes.split()),
        errors=errors if isinstance(errors, tuple) else (errors,),
        text=text,
        when=when,
    )


_never_run = functools.partial(_rule, outcome=NOT_EXECUTED)
_connecting = functools.partial(_never_run, where=CONNECTING)
_unsent = functools.partial(_never_run, where=LOST)
_lost = functools.partial(_rule, where=LOST)
_refused = functools.partial(_never_run, where=ALIVE)
_answered = functools.partial(_rule, where=ALIVE, outcome=ROLLED_BACK, then=KEEP)
_outdated = functools.partial(_answered, STATEMENT_CACHE, then=EXPIRE)

# Patterns as text: `re` compiles each with the first failure that is held against it, not while the package is imported.
_CLOSED = r"connection is closed$"
_HALF_WAY = r"^(cannot switch to state |not connected$)"
_ENDED = f"{_CLOSED}|{_HALF_WAY}"
_MASK = r"^cannot call Transaction\..*underlying connection is closed$"
_NOT_NOW = r"another operation is |has been released back to the pool|^pool is clos"
_NOT_LET_IN = r"^no pg_hba\.conf entry"
_NO_TLS = r"rejected SSL upgrade$"
# What PgBouncer says when it could not give a waiting client a server: the statement is still in its queue.
_POOLER_IS_FULL = (
    r"^(query_wait_timeout$|no more connections allowed \(|sorry, too many clients already"
    r"|too many connections for |remaining connection slots are reserved)"
)
_POOLER_HAS_NO_SERVER = (
    r"^(server login has been failing|client_login_timeout \(server down\)"
    r"|pgbouncer cannot connect to server|the database system is )"
)
_SERVER_CRASHED = r"^server conn crashed\?"
_LIMITS = r"^((idle )?transaction timeout$|disconnecting idle in transaction client)"
_LOST_SERVER = (
    r"^(odyssey: \S+ remote server read/write error|server is shutting down$|Timed out: Perform RPC"
    r"|Invalid argument: Unknown session)"
)
# Proxies that send one code for everything while connecting, whatever the server behind them has said: Neon and Supavisor
# XX000, PgCat and PgDog 58000, Prisma none.
_ONE_CODE = frozenset({"08P01", "XX000", "58000", ""})
_PROXY_IS_FULL = (
    _POOLER_IS_FULL
    + r"|^You've exceeded the rate limit|^Too many connections (attempts|to this endpoint)"  # Neon
    + r"|^Failed to acquire permit to connect"
    + r"|^\((EMAXCONN|EMAXCONNSESSION|EMAXPOOLSREACHED|ECHECKOUTTIMEOUT|ECHECKOUTRETRIES|EPOOLCHECKOUT)\)"  # Supavisor
    + r"|^MaxClientsInSessionMode: |^Max (client connections|pools count) reached|^Unable to check out process from the pool"
)
_PROXY_HAS_NO_SERVER = (
    _POOLER_HAS_NO_SERVER
    + r"|^Couldn't connect to compute node|^Control plane request failed$|^Your project already has running operations"
    + r"|^\((EDBHANDLEREXITED|ESUBSCRIBERETRIES|EPROXYSTARTFAILED|EPROXYSUPERVISORUNAVAILABLE|EWORKERNOTFOUND)\)"
    + r"|^\(EPOOLCONFIGNOTFOUND\)|^DbHandler exited|^\(ECIRCUITBREAKER\) (?!too many authentication failures)"
    + r"|^connection pool for user .* is down$|^Pool down for database: "  # PgDog, PgCat
    + r"|^terminating connection due to administrator command$"
)
_SUPAVISOR_BUSY = r"^\((ECHECKOUTTIMEOUT|ECHECKOUTRETRIES|EPOOLCHECKOUT)\)"
# PgCat (FATAL, and the connection lives) and PgDog (ERROR), while no server is attached to the client.
_NONE_FREE = (
    r"^could not get connection from the pool - |checkout failure limit reached \(|^(replica )?checkout timeout"
)
_NO_SERVER = r"^(all replicas down|pool is banned|no primary|pool is shut down)|^connection pool for user .* is down$"
_STALE_TYPE = r"^cache lookup failed for type "  # an internal error: never translated
_NEW_TYPE = r"^type with OID \d+ does not exist$"
# Limits of one session or one statement, by the name of the setting: the same statement meets them again.
_OWN_LIMIT = r"\btemp_file_limit\b|^tuple decompression limit |\w+ = 0$"
_SERVER = driver.PostgresError
_INTERFACE, _INTERNAL = driver.InterfaceError, driver.InternalClientError
_NO_PRIMARY, _OLD_PLAN = driver.TargetServerAttributeNotMatched, driver.InvalidCachedStatementError
_OLD_TYPE = driver.OutdatedSchemaCacheError
_TLS_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_NO_SUCH_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeError)

# The table

# fmt: off
RULES: tuple[Rule, ...] = (
    # What this package has decided already.
    _rule(PERMANENT, OutcomeUnknownError, "`OutcomeUnknownError`: decided already, never repeated"),
    _never_run(PERMANENT, ResilientPoolError, "this package's own errors, such as `AcquireTimeoutError`", then=KEEP),
    # The server's own limits on a transaction. It is rolled back, unless it was just ending: the timer of 25P04 can go
    # off between the last look at it and the end of the COMMIT. Only the holder of the transaction can find out.
    _lost(PERMANENT, "25P03 25P04", "a transaction was idle, or lasted, too long; so will the next one", when=_sent),
    _lost(PERMANENT, "08P01 57P05", "a pooler's limits on a transaction", text=_LIMITS, when=_sent),
    # Whatever is lost with a COMMIT: before anything that could sound like a guarantee.
    _rule(DISCONNECTED, "", "the connection lost during COMMIT, whatever the reason", where=LOST_COMMIT),
    _rule(DISCONNECTED, "40003 08007", "completion of a statement, or of a transaction, unknown"),
    _rule(PERMANENT, "XXA00", "committed, but a later step failed (CockroachDB)"),
    _rule(DISCONNECTED, "08006 57P01 XX000", "its server is lost", where=CONNECTED, text=_LOST_SERVER, when=_sent),
    # A server, or a pooler, which has no room or is not there.
    _connecting(OVERLOADED, "53300", "too many clients"),
    _unsent(OVERLOADED, "53300", "too many clients, said by a pooler's server"),
    # Newer poolers send 57014 with `query_wait_timeout`; a server never says that as its last word.
    _unsent(OVERLOADED, "08P01 57014", "a pooler is full", text=_POOLER_IS_FULL),
    _unsent(UNREACHABLE, "08P01", "a pooler cannot log in to its server", text=_POOLER_HAS_NO_SERVER),
    _never_run(OVERLOADED, "58000", "PgDog or PgCat has no free server", where=EXECUTING, text=_NONE_FREE),
    _never_run(UNREACHABLE, "58000", "PgDog has no server at all", where=EXECUTING, text=_NO_SERVER),
    _never_run(OVERLOADED, "XX000", "Supavisor has no free server", where=LOST_EXECUTING, text=_SUPAVISOR_BUSY),
    # Opening a connection.
    _connecting(OVERLOADED, _SERVER, "a proxy is full", text=_PROXY_IS_FULL, when=_recoded),
    _connecting(UNREACHABLE, _SERVER, "a proxy has no server yet", text=_PROXY_HAS_NO_SERVER, when=_recoded),
    _connecting(UNREACHABLE, "57P01 57P02 57P03", "starting up, shutting down, in recovery, no hot standby", when=_own),
    _connecting(UNREACHABLE, "08000 08001 08003 08004 08006", "closed during the handshake", when=_own),
    _connecting(UNREACHABLE, "08P01", "a pooler's server went away during the login", text=_SERVER_CRASHED),
    _connecting(UNREACHABLE, (_INTERFACE, _INTERNAL), "closed while the connection was being set up", text=_ENDED),
    _connecting(UNREACHABLE, "28000", "`no pg_hba.conf entry`, while waking up", text=_NOT_LET_IN, when=_waking),
    _connecting(UNREACHABLE, ConnectionError, "TLS refused, while waking up", text=_NO_TLS, when=_waking),
    _connecting(UNREACHABLE, _NO_PRIMARY, "`TargetServerAttributeNotMatched`: there is no primary yet"),
    _connecting(UNREACHABLE, _TLS_CUT_OFF, "closed during the TLS handshake"),
    _connecting(PERMANENT, ssl.SSLError, "certificate, TLS version or TLS itself refused"),
    _connecting(PERMANENT, ConnectionError, "`rejected SSL upgrade`", text=_NO_TLS),
    _connecting(PERMANENT, _NO_SUCH_PLACE, "missing socket or file, no permission, a host name that cannot be encoded"),
    _connecting(UNREACHABLE, OSError, "refused, reset, no route, name not resolved, timed out"),
    _unsent(OVERLOADED, "53000 53100 53200 53400", "no room for one more connection now", where=LOST_CONNECTING),
    _unsent(UNREACHABLE, "40001 40P01", "`init` was in the way of a standby's recovery", where=LOST_CONNECTING),
    # As an ERROR it is the application's `init` that has failed: it is judged like any other statement's.
    _connecting(PERMANENT, _SERVER, "a wrong password, no such database, any other refusal", when=_ends_session),
    # A connection that had died before it was used.
    _unsent(STALE, "57P05", "the idle-session time-out"),
    _unsent(STALE, "", "the connection found lost while nothing of the statement was sent", when=_not_sent),
    _never_run(STALE, TimeoutError, "no answer in time to the check before use", where=CHECKING),
    _rule(DISCONNECTED, _INTERFACE, "`InterfaceError` at the end of a transaction: lost inside it", text=_MASK),
    _never_run(STALE, _INTERFACE, "`InterfaceError`: closed before anything was sent", text=_CLOSED),
    # What the server said about the statement, keeping the session: its effects, if any, are undone.
    _answered(CONTENTION, "40001 40P01", "a serialization failure, a deadlock"),
    _answered(PERMANENT, "53400", "a limit of the statement's own: it meets it again", text=_OWN_LIMIT),
    _answered(OVERLOADED, "53100 53200 53300 53400", "disk full, out of memory, a limit, another server's clients"),
    _refused(WRONG_SERVER, "25006", "read-only unasked, by no setting: the old primary", then=EXPIRE, when=_demoted),
    _refused(STATEMENT_CACHE, "26000 42P05", "the prepared statement is missing, or there already", when=_own),
    # What was created anew is out of date on every connection: the others would fail one after the other.
    _refused(STATEMENT_CACHE, _OLD_PLAN, "`InvalidCachedStatementError`: a cached plan is outdated", then=EXPIRE),
    _outdated("XX000", "`cache lookup failed for type`: it was created anew", text=_STALE_TYPE, when=_own),
    _outdated("42704", "`type with OID ... does not exist`: it was created anew", text=_NEW_TYPE, when=_own),
    _outdated("42804 22P03", "an argument cannot be read: a field has another type now", when=_reads_argument),
    # Raised while rows are decoded, when the statement has already run to its end.
    _outdated(_OLD_TYPE, "`OutdatedSchemaCacheError`: a composite type changed", outcome=UNKNOWN, where=ANY),
    # The connection lost on the way.
    _rule(POISONED, _INTERNAL, "`InternalClientError`: a loss noticed half-way", text=_HALF_WAY),
    _lost(DISCONNECTED, "", "the connection lost while executing: any FATAL, any cause, or none"),
    # For the application to see. On Python 3.11 the kernel's time-out (errno 110, a loss) is a `TimeoutError` too.
    _rule(PERMANENT, TimeoutError, "the caller's own time-out (`TimeoutError` without errno)"),
    _never_run(PERMANENT, _INTERFACE, "`InterfaceError`: busy, or given back", then=KEEP, text=_NOT_NOW),
    _answered(PERMANENT, "08P01", "the driver was not understood", where=ANY, then=DISCARD, when=_from_server),
    _answered(PERMANENT, "", "any other error from the server", where=ANY, when=_from_server),
    _rule(PERMANENT, "", "anything else: arguments that cannot be encoded, errors of the driver or the application"),
)
"""The table, first match first. Facts were provoked on real servers (tests/unit/retry/measured_failures.json)."""
# fmt: on


# Reading an error


@functools.lru_cache(maxsize=256)
def rules_for(phase: Phase, sqlstate: str, *, lost: bool) -> tuple[Rule, ...]:
    """Return the rules that can be about an error, in their order: first the code is looked at, and texts after."""
    return tuple(rule for rule in RULES if rule.applies(phase, sqlstate, lost=lost))


def _text_of(error: BaseException) -> str:
    """Return the message, without the details and hints that a server may add."""
    first = error.args[0] if error.args else ""
    return first if isinstance(first, str) else ""


def _sqlstate_of(error: BaseException) -> str:
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else ""


def _severity_of(error: BaseException) -> str:
    # The field "severity" is translated to the server's language, "severity_en" (PostgreSQL 9.6 and up) is not.
    return getattr(error, "severity_en", None) or getattr(error, "severity", None) or ""


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
        rules = rules_for(failure.phase, seen.sqlstate, lost=seen.lost)
        return _settle(next(rule for rule in rules if rule.matches(seen)).verdict, seen)


# Syntax, names and privileges; a feature; a schema; an internal error, which is how some say that they have no such thing.
_REFUSALS_FOR_GOOD = ("42", "0A", "3F", "XX")


def refuses_question(error: BaseException) -> bool:
    """Say whether a server has refused a question of the pool's own in a way in which it will the next time, too.

    Databases that only speak PostgreSQL's protocol lack some of its functions and catalogs, and a role may not use all of them.

    Args:
        error: What the driver has raised, while the connection is still open.
    """
    return isinstance(error, driver.PostgresError) and _sqlstate_of(error)[:2] in _REFUSALS_FOR_GOOD


def _see(failure: Failure, error: BaseException) -> Sighting:
    """Find what speaks for a failure, once it is unwrapped, and whether the connection is gone."""
    last_word, sqlstate, severity = error, _sqlstate_of(error), _severity_of(error)
    lost = _is_loss(error, sqlstate, severity)
    if isinstance(error, driver.ConnectionDoesNotExistError):
        causes = (cause for cause in _causes(error) if cause is not error)
        last_word = next((cause for cause in causes if isinstance(cause, driver.PostgresError)), error)
        sqlstate, severity = _sqlstate_of(last_word), _severity_of(last_word)
    return Sighting(
        failure=failure, error=last_word, lost=lost, sqlstate=sqlstate, severity=severity, text=_text_of(last_word)
    )


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


def _is_loss(error: BaseException, sqlstate: str, severity: str) -> bool:
    """Say whether the connection ended with this error, or had ended before."""
    if isinstance(error, driver.PostgresError):
        return severity in {"FATAL", "PANIC"} or (severity != "ERROR" and sqlstate in _LAST_WORDS)
    if isinstance(error, driver.InterfaceError):
        return re.search(_CLOSED, _text_of(error)) is not None
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


# Single questions

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
    if _sqlstate_of(refusal) == "28P01" or getattr(refusal, "server_source_function", None) == "auth_failed":
        return True
    return _sqlstate_of(refusal) in _CODES_OF_REFUSALS and _REFUSED_CREDENTIALS.search(_text_of(refusal)) is not None


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
    if not isinstance(refusal, driver.PostgresError) or _sqlstate_of(refusal) not in _CODES_OF_REFUSALS:
        return False
    if getattr(refusal, "server_source_function", None) == "InitializeSessionUserId":
        return True
    return _REFUSED_USER.search(_text_of(refusal)) is not None


def reports_closed_connection(error: BaseException) -> bool:
    """Say whether the driver, and not a server, says that a connection is closed or was lost; it may be any connection.

    Args:
        error: What was raised, unwrapped.
    """
    if isinstance(error, driver.ConnectionDoesNotExistError):
        return _severity_of(error) == ""
    return isinstance(error, driver.InterfaceError) and re.search(_CLOSED, _text_of(error)) is not None


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
    if not isinstance(error, driver.PostgresError) or _severity_of(error) != "ERROR":
        return False
    return _sqlstate_of(error) != "" and not _sqlstate_of(error).startswith(_NO_WORD_ABOUT_A_COMMIT)
