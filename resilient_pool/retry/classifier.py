"""Tells from an error what is known about it: a table of rules as data, and the reading of an error chain they need."""

from __future__ import annotations

import copy
import errno
import re
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from asyncpg import exceptions as driver

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.errors import OutcomeUnknownError, ResilientPoolError
from resilient_pool.retry.verdict import Disposition, Failure, Fault, Outcome, Phase, Verdict

_EVERY_PHASE = frozenset(Phase)
_CONNECT = frozenset({Phase.CONNECT})
_COMMIT = frozenset({Phase.COMMIT})
_NOT_COMMIT = frozenset(Phase) - _COMMIT
_CONNECTED = frozenset(Phase) - _CONNECT

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
# Codes that end a session, for errors which do not tell their severity. A server that does tell may mean another
# server's connection by them (a foreign table's, say): then the session lives.
_LAST_WORDS = frozenset(
    {"08000", "08001", "08003", "08004", "08006", "25P03", "25P04", "57P01", "57P02", "57P03", "57P04", "57P05"}
)
_CLOSED = re.compile(r"connection is closed$")
_HALF_WAY = re.compile(r"^(cannot switch to state |not connected$)")
_MASK = re.compile(r"^cannot call Transaction\..*underlying connection is closed$")
# What PgBouncer says when it could not give a waiting client a server: the statement is still in its queue.
_POOLER_IS_FULL = re.compile(
    r"^(query_wait_timeout$|no more connections allowed \(|sorry, too many clients already"
    r"|too many connections for |remaining connection slots are reserved)"
)
_POOLER_HAS_NO_SERVER = re.compile(
    r"^(server login has been failing|client_login_timeout \(server down\)"
    r"|pgbouncer cannot connect to server|the database system is )"
)
# Proxies that send one code for everything while connecting, whatever the server behind them has said: Neon and Supavisor
# XX000, PgCat and PgDog 58000, Prisma none.
_ONE_CODE_FOR_ALL = frozenset({"08P01", "XX000", "58000", ""})
_PROXY_IS_FULL = re.compile(
    _POOLER_IS_FULL.pattern
    + r"|^You've exceeded the rate limit|^Too many connections (attempts|to this endpoint)"  # Neon
    + r"|^Failed to acquire permit to connect"
    + r"|^\((EMAXCONN|EMAXCONNSESSION|EMAXPOOLSREACHED|ECHECKOUTTIMEOUT|ECHECKOUTRETRIES|EPOOLCHECKOUT)\)"  # Supavisor
    + r"|^MaxClientsInSessionMode: |^Max (client connections|pools count) reached|^Unable to check out process from the pool"
)
_PROXY_HAS_NO_SERVER = re.compile(
    _POOLER_HAS_NO_SERVER.pattern
    + r"|^Couldn't connect to compute node|^Control plane request failed$|^Your project already has running operations"
    + r"|^\((EDBHANDLEREXITED|ESUBSCRIBERETRIES|EPROXYSTARTFAILED|EPROXYSUPERVISORUNAVAILABLE|EWORKERNOTFOUND)\)"
    + r"|^\(EPOOLCONFIGNOTFOUND\)|^DbHandler exited|^\(ECIRCUITBREAKER\) (?!too many authentication failures)"
    + r"|^connection pool for user .* is down$|^Pool down for database: "  # PgDog, PgCat
    + r"|^terminating connection due to administrator command$"
)
# PgCat (FATAL, and the connection lives) and PgDog (ERROR), while no server is attached to the client.
_CHECKOUT_FAILED = re.compile(
    r"^could not get connection from the pool - |checkout failure limit reached \(|^(replica )?checkout timeout"
)
_CHECKOUT_IMPOSSIBLE = re.compile(
    r"^(all replicas down|pool is banned|no primary|pool is shut down)|^connection pool for user .* is down$"
)
_STALE_TYPE = re.compile(r"^cache lookup failed for type ")  # an internal error: never translated
_RECREATED_TYPE = re.compile(r"^type with OID \d+ does not exist$")
# Limits of one session or one statement, by the name of the setting: the same statement meets them again.
_LIMIT_OF_ITS_OWN = re.compile(r"\btemp_file_limit\b|^tuple decompression limit |\w+ = 0$")
# Functions of postgres_fdw's and dblink's that raise what another server has said to this one, or that it is away.
_FOREIGN = frozenset({"pgfdw_report_error", "pgfdw_report", "pgfdw_report_internal", "connect_pg_server"}) | frozenset(
    {"dblink_res_error", "dblink_connect", "dblink_get_conn", "dblink_conn_not_avail"}
)
# Functions that read one argument's binary form, by the client's idea of its type.
_READS_AN_ARGUMENT = frozenset(
    {"record_recv", "array_recv", "range_recv", "multirange_recv", "enum_recv", "domain_recv"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A failure as the rules see it.

    Attributes:
        failure: What was seen.
        error: The error that speaks for it. Of a lost connection this is the server's last word, where the driver
            passes it on (asyncpg 0.32 does, 0.31 and older do not), else the driver's `ConnectionDoesNotExistError`.
        lost: Whether the connection ended with it, or had ended before.
    """

    failure: Failure
    error: BaseException
    lost: bool

    @property
    def text(self) -> str:
        """The message, without the details and hints that a server may add."""
        return _text(self.error)

    @property
    def sqlstate(self) -> str:
        """The SQLSTATE, or nothing."""
        return _sqlstate(self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of the table: it matches when everything that it names holds.

    Attributes:
        evidence: What this line recognises, in words for a reader.
        fault: The kind of trouble.
        outcome: What is known of the statement. In the phases CONNECT and CHECKOUT, and where nothing was sent, it is
            `NOT_EXECUTED` whatever stands here.
        connection: What becomes of the connection.
        others: What becomes of the connections opened before.
        phases: In which phases it applies.
        errors: Types of which the error must be one; empty means any.
        sqlstates: Codes of which the error must have one, whole or by their first two characters (a class).
        text: A pattern which the message must contain.
        lost: Whether the connection must, or must not, have ended with the error; `None` means either.
        when: What else must hold.
    """

    evidence: str
    fault: Fault
    outcome: Outcome
    connection: Disposition = Disposition.DISCARD
    others: Disposition = Disposition.KEEP
    phases: frozenset[Phase] = _EVERY_PHASE
    errors: tuple[type[BaseException], ...] = ()
    sqlstates: frozenset[str] = frozenset()
    text: re.Pattern[str] | None = None
    lost: bool | None = None
    when: Callable[[Sighting], bool] | None = None

    def matches(self, seen: Sighting) -> bool:
        """Say whether everything that this rule names holds for `seen`, cheap questions first."""
        return (
            seen.failure.phase in self.phases
            and (self.lost is None or self.lost is seen.lost)
            and (not self.errors or isinstance(seen.error, self.errors))
            and (not self.sqlstates or not self.sqlstates.isdisjoint({seen.sqlstate, seen.sqlstate[:2]}))
            and (self.text is None or self.text.search(seen.text) is not None)
            and (self.when is None or self.when(seen))
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict of this line."""
        return Verdict(fault=self.fault, outcome=self.outcome, connection=self.connection, others=self.others)


def _text(error: BaseException) -> str:
    first = error.args[0] if error.args else ""
    return first if isinstance(first, str) else ""


def _sqlstate(error: BaseException) -> str:
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else ""


def _severity(error: BaseException) -> str:
    """Tell the severity as the server sent it; nothing for an error that the driver made by itself.

    The field "severity" is translated to the server's language, "severity_en" (PostgreSQL 9.6 and up) is not.
    """
    return getattr(error, "severity_en", None) or getattr(error, "severity", None) or ""


def _waking(seen: Sighting) -> bool:
    return seen.failure.waking


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
    return _source(seen) not in _FOREIGN


def _source(seen: Sighting) -> str:
    return getattr(seen.error, "server_source_function", None) or ""


def _reads_an_argument(seen: Sighting) -> bool:
    return _source(seen) in _READS_AN_ARGUMENT


def _unsent(seen: Sighting) -> bool:
    return seen.failure.phase is Phase.CHECKOUT or not seen.failure.sent


def _is_about_this_connection(seen: Sighting) -> bool:
    return seen.lost or seen.failure.phase is Phase.CONNECT


def _ends_the_session(seen: Sighting) -> bool:
    return seen.lost or _severity(seen.error) != "ERROR"


def _sent(seen: Sighting) -> bool:
    return not _unsent(seen)


def _from_the_server(seen: Sighting) -> bool:
    return _severity(seen.error) != ""


RULES: tuple[Rule, ...] = (
    # First what this package has decided already.
    Rule(
        evidence="`OutcomeUnknownError`: already decided, never repeated",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
        errors=(OutcomeUnknownError,),
    ),
    Rule(
        evidence="this package's own errors, such as `AcquireTimeoutError`: nothing was sent",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        connection=Disposition.KEEP,
        errors=(ResilientPoolError,),
    ),
    # The server's own limits on a transaction. It is rolled back, unless it was just ending: the timer of 25P04 can go off
    # between the last look at it and the end of the COMMIT. Only the one who holds the transaction can tell.
    Rule(
        evidence="25P03, 25P04: the server ended a transaction that was idle, or lasted, for too long; so it will the next time",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
        sqlstates=frozenset({"25P03", "25P04"}),
        lost=True,
        when=_sent,
    ),
    Rule(
        evidence="a pooler's own limits on a transaction (`idle transaction timeout`, `transaction timeout`)",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
        sqlstates=frozenset({"08P01", "57P05"}),
        text=re.compile(r"^((idle )?transaction timeout$|disconnecting idle in transaction client)"),
        lost=True,
        when=_sent,
    ),
    # Whatever is lost with a COMMIT: before anything that could sound like a guarantee.
    Rule(
        evidence="the connection lost during COMMIT, whatever the reason",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.UNKNOWN,
        phases=_COMMIT,
        lost=True,
    ),
    Rule(
        evidence="40003 completion unknown, 08007 transaction resolution unknown",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.UNKNOWN,
        sqlstates=frozenset({"40003", "08007"}),
    ),
    Rule(
        evidence="XXA00 committed, but a later step failed (CockroachDB)",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
        sqlstates=frozenset({"XXA00"}),
    ),
    Rule(
        evidence="what a pooler says when it has lost the server, as an ERROR (`odyssey: `, `server is shutting down`, ...)",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.UNKNOWN,
        phases=_CONNECTED,
        sqlstates=frozenset({"08006", "57P01", "XX000"}),
        text=re.compile(
            r"^(odyssey: \S+ remote server read/write error|server is shutting down$|Timed out: Perform RPC|Invalid argument: Unknown session)"
        ),
        when=_sent,
    ),
    # A server, or a pooler, which has no room or is not there.
    Rule(
        evidence="53300 too many clients, connecting or as a last word",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        sqlstates=frozenset({"53300"}),
        when=_is_about_this_connection,
    ),
    Rule(
        evidence="a pooler's capacity message (08P01, FATAL: `query_wait_timeout`, `no more connections allowed`, ...)",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        # Newer poolers send 57014 with `query_wait_timeout`; a server never says that as its last word.
        sqlstates=frozenset({"08P01", "57014"}),
        lost=True,
        text=_POOLER_IS_FULL,
    ),
    Rule(
        evidence="a pooler that cannot log in to its server (08P01, FATAL: `server login has been failing`, ...)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        sqlstates=frozenset({"08P01"}),
        lost=True,
        text=_POOLER_HAS_NO_SERVER,
    ),
    Rule(
        evidence="58000 `checkout timeout`, `could not get connection from the pool`: PgDog or PgCat has no free server",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        phases=_NOT_COMMIT,
        sqlstates=frozenset({"58000"}),
        text=_CHECKOUT_FAILED,
    ),
    Rule(
        evidence="58000 `connection pool for user ... is down`, `all replicas down`: PgDog has no server at all",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_NOT_COMMIT,
        sqlstates=frozenset({"58000"}),
        text=_CHECKOUT_IMPOSSIBLE,
    ),
    Rule(
        evidence="XX000 `(ECHECKOUTTIMEOUT)`, ... as a last word: Supavisor has no free server",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        phases=_NOT_COMMIT,
        sqlstates=frozenset({"XX000"}),
        lost=True,
        text=re.compile(r"^\((ECHECKOUTTIMEOUT|ECHECKOUTRETRIES|EPOOLCHECKOUT)\)"),
    ),
    # Opening a connection.
    Rule(
        evidence="connecting: a proxy is full, whatever its code (Neon, Supavisor, PgCat, PgDog)",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(driver.PostgresError,),
        sqlstates=_ONE_CODE_FOR_ALL,
        text=_PROXY_IS_FULL,
    ),
    Rule(
        evidence="connecting: a proxy has no server yet, whatever its code (Neon, Supavisor, PgCat, PgDog)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(driver.PostgresError,),
        sqlstates=_ONE_CODE_FOR_ALL,
        text=_PROXY_HAS_NO_SERVER,
    ),
    Rule(
        evidence="connecting: 57P03 (starting up, shutting down, in recovery, no hot standby), 57P01, 57P02",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"57P01", "57P02", "57P03"}),
        when=_own,
    ),
    Rule(
        evidence="connecting: closed during the handshake (08003 and its kin)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"08000", "08001", "08003", "08004", "08006"}),
        when=_own,
    ),
    Rule(
        evidence="connecting: a pooler's server went away during the login (08P01 `server conn crashed?`)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"08P01"}),
        text=re.compile(r"^server conn crashed\?"),
    ),
    Rule(
        evidence="connecting: closed while the new connection was being set up (`InterfaceError`, `InternalClientError`)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(driver.InterfaceError, driver.InternalClientError),
        text=re.compile(f"{_CLOSED.pattern}|{_HALF_WAY.pattern}"),
    ),
    Rule(
        evidence="connecting, while the server wakes up: 28000 `no pg_hba.conf entry`",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"28000"}),
        text=re.compile(r"^no pg_hba\.conf entry"),
        when=_waking,
    ),
    Rule(
        evidence="connecting, while the server wakes up: `rejected SSL upgrade`",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(ConnectionError,),
        text=re.compile(r"rejected SSL upgrade$"),
        when=_waking,
    ),
    Rule(
        evidence="connecting: `TargetServerAttributeNotMatched` (no primary yet)",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(driver.TargetServerAttributeNotMatched,),
    ),
    Rule(
        evidence="connecting: closed during the TLS handshake",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError),
    ),
    Rule(
        evidence="connecting: certificate, TLS version or TLS itself refused",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(ssl.SSLError,),
    ),
    Rule(
        evidence="connecting: `rejected SSL upgrade`",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(ConnectionError,),
        text=re.compile(r"rejected SSL upgrade$"),
    ),
    Rule(
        evidence="connecting: missing socket or file, no permission, a host name that cannot be encoded",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeError),
    ),
    Rule(
        evidence="connecting: refused, reset, no route, name not resolved, timed out",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(OSError,),
    ),
    Rule(
        evidence="connecting: 53000, 53100, 53200, 53400: no room for one more connection now",
        fault=Fault.OVERLOADED,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"53000", "53100", "53200", "53400"}),
        lost=True,
    ),
    Rule(
        evidence="connecting: 40001, 40P01 as a FATAL: `init` was in the way of a standby's recovery",
        fault=Fault.UNREACHABLE,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        sqlstates=frozenset({"40001", "40P01"}),
        lost=True,
    ),
    Rule(
        # As an ERROR it is the application's `init` that has failed, and what it says is judged like any other statement's.
        evidence="connecting: 28P01 wrong password, 28000, 3D000 no such database, any other refusal by the server",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        phases=_CONNECT,
        errors=(driver.PostgresError,),
        when=_ends_the_session,
    ),
    # A connection that had died before it was used.
    Rule(
        evidence="57P05 idle-session timeout, itself or as the cause of a loss",
        fault=Fault.STALE,
        outcome=Outcome.NOT_EXECUTED,
        sqlstates=frozenset({"57P05"}),
        lost=True,
    ),
    Rule(
        evidence="the connection found lost while nothing of the statement was sent",
        fault=Fault.STALE,
        outcome=Outcome.NOT_EXECUTED,
        lost=True,
        when=_unsent,
    ),
    Rule(
        evidence="no answer in time to the check before use",
        fault=Fault.STALE,
        outcome=Outcome.NOT_EXECUTED,
        phases=frozenset({Phase.CHECKOUT}),
        errors=(TimeoutError,),
    ),
    Rule(
        evidence="`InterfaceError` at the end of a transaction: the connection was lost inside it",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.UNKNOWN,
        errors=(driver.InterfaceError,),
        text=_MASK,
    ),
    Rule(
        evidence="`InterfaceError`: the connection was already closed when the operation was about to be sent",
        fault=Fault.STALE,
        outcome=Outcome.NOT_EXECUTED,
        errors=(driver.InterfaceError,),
        text=_CLOSED,
    ),
    # What the server said about the statement, keeping the session: its effects, if any, are undone.
    Rule(
        evidence="40001 serialization failure, 40P01 deadlock, as an ERROR",
        fault=Fault.CONTENTION,
        outcome=Outcome.ROLLED_BACK,
        connection=Disposition.KEEP,
        sqlstates=frozenset({"40001", "40P01"}),
        lost=False,
    ),
    Rule(
        evidence="53400 a limit of the statement's own (`temp_file_limit`): it meets it again",
        fault=Fault.PERMANENT,
        outcome=Outcome.ROLLED_BACK,
        connection=Disposition.KEEP,
        sqlstates=frozenset({"53400"}),
        lost=False,
        text=_LIMIT_OF_ITS_OWN,
    ),
    Rule(
        evidence="53100 disk full, 53200 out of memory, 53300 (another server's), 53400 limit exceeded, while executing",
        fault=Fault.OVERLOADED,
        outcome=Outcome.ROLLED_BACK,
        connection=Disposition.KEEP,
        sqlstates=frozenset({"53100", "53200", "53300", "53400"}),
        lost=False,
    ),
    Rule(
        evidence="25006 read-only, unless that was asked for, or the server is no standby: the old primary",
        fault=Fault.WRONG_SERVER,
        outcome=Outcome.NOT_EXECUTED,
        others=Disposition.EXPIRE,
        sqlstates=frozenset({"25006"}),
        lost=False,
        when=_demoted,
    ),
    Rule(
        evidence="26000, 42P05: the prepared statement is missing, or there already",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.NOT_EXECUTED,
        sqlstates=frozenset({"26000", "42P05"}),
        lost=False,
        when=_own,
    ),
    # What was created anew is out of date on every connection: the others would fail one after the other.
    Rule(
        evidence="`InvalidCachedStatementError` (0A000, the cached plan is out of date)",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.NOT_EXECUTED,
        others=Disposition.EXPIRE,
        errors=(driver.InvalidCachedStatementError,),
        lost=False,
    ),
    Rule(
        evidence="XX000 `cache lookup failed for type`: a type was created anew",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.ROLLED_BACK,
        others=Disposition.EXPIRE,
        sqlstates=frozenset({"XX000"}),
        lost=False,
        text=_STALE_TYPE,
        when=_own,
    ),
    Rule(
        evidence="42704 `type with OID ... does not exist`: a type was created anew",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.ROLLED_BACK,
        others=Disposition.EXPIRE,
        sqlstates=frozenset({"42704"}),
        lost=False,
        text=_RECREATED_TYPE,
        when=_own,
    ),
    Rule(
        evidence="42804, 22P03 from reading an argument's binary form: the type of a field has changed",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.ROLLED_BACK,
        others=Disposition.EXPIRE,
        sqlstates=frozenset({"42804", "22P03"}),
        lost=False,
        when=_reads_an_argument,
    ),
    Rule(
        # Raised while rows are decoded, when the statement has already run to its end.
        evidence="`OutdatedSchemaCacheError`: a composite type changed; the statement has run",
        fault=Fault.STATEMENT_CACHE,
        outcome=Outcome.UNKNOWN,
        others=Disposition.EXPIRE,
        errors=(driver.OutdatedSchemaCacheError,),
    ),
    # The connection lost on the way.
    Rule(
        evidence="`InternalClientError`: `cannot switch to state`, `not connected` (a loss noticed half-way)",
        fault=Fault.POISONED,
        outcome=Outcome.UNKNOWN,
        errors=(driver.InternalClientError,),
        text=_HALF_WAY,
    ),
    Rule(
        evidence="the connection lost while executing: 08003 with any cause or none, 57P01, 57P02, any FATAL, "
        "a pooler's `server conn crashed?`, `query timeout`, `database removed`",
        fault=Fault.DISCONNECTED,
        outcome=Outcome.UNKNOWN,
        lost=True,
    ),
    # Errors for the application to see.
    Rule(
        # The kernel's, with errno 110, is a loss. On Python 3.11 both are `TimeoutError` and `OSError`.
        evidence="the caller's own time-out (`TimeoutError` without errno)",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
        errors=(TimeoutError,),
    ),
    Rule(
        evidence="`InterfaceError`: another operation is in progress, or the connection was given back",
        fault=Fault.PERMANENT,
        outcome=Outcome.NOT_EXECUTED,
        connection=Disposition.KEEP,
        errors=(driver.InterfaceError,),
        text=re.compile(r"another operation is |has been released back to the pool|^pool is clos"),
    ),
    Rule(
        evidence="classes 22, 23, 42, 55P03 lock not available, 57014 cancelled, from the server",
        fault=Fault.PERMANENT,
        outcome=Outcome.ROLLED_BACK,
        connection=Disposition.KEEP,
        sqlstates=frozenset({"22", "23", "42", "55P03", "57014"}),
        when=_from_the_server,
    ),
    Rule(
        evidence="08P01 as an ERROR: the server did not understand the driver",
        fault=Fault.PERMANENT,
        outcome=Outcome.ROLLED_BACK,
        sqlstates=frozenset({"08P01"}),
        when=_from_the_server,
    ),
    Rule(
        evidence="any other error from the server",
        fault=Fault.PERMANENT,
        outcome=Outcome.ROLLED_BACK,
        connection=Disposition.KEEP,
        when=_from_the_server,
    ),
    Rule(
        evidence="anything else: arguments that cannot be encoded, errors of the driver or of the application",
        fault=Fault.PERMANENT,
        outcome=Outcome.UNKNOWN,
    ),
)
"""The table, first match first. Facts were provoked on real servers (tests/unit/retry/measured_failures.json)."""


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
        seen = _see(failure, self.unwrap(failure.error))
        if not isinstance(seen.error, OutcomeUnknownError):
            for match, verdict in self._custom:
                if match(failure):
                    return verdict if isinstance(verdict, Verdict) else verdict(failure)
        rule = next(rule for rule in RULES if rule.matches(seen))
        return _settle(rule.verdict, seen)


def describe_rules() -> list[tuple[str, str, str]]:
    """List the built-in rules for a reader, in the order in which they are asked: evidence, fault, outcome."""
    return [(rule.evidence, rule.fault.value, rule.outcome.value) for rule in RULES]


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
    if _sqlstate(refusal) == "28P01" or getattr(refusal, "server_source_function", None) == "auth_failed":
        return True
    return _sqlstate(refusal) in _CODES_OF_REFUSALS and _REFUSED_CREDENTIALS.search(_text(refusal)) is not None


def tells_of_a_closed_connection(error: BaseException) -> bool:
    """Say whether the driver, and not a server, says that a connection is closed or was lost; it may be any connection.

    Args:
        error: What was raised, unwrapped.
    """
    if isinstance(error, driver.ConnectionDoesNotExistError):
        return _severity(error) == ""
    return isinstance(error, driver.InterfaceError) and _CLOSED.search(_text(error)) is not None


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
    if not isinstance(error, driver.PostgresError) or _severity(error) != "ERROR":
        return False
    return _sqlstate(error) != "" and not _sqlstate(error).startswith(_NO_WORD_ABOUT_A_COMMIT)


def _see(failure: Failure, error: BaseException) -> Sighting:
    """Find what speaks for a failure, once it is unwrapped, and whether the connection is gone."""
    last_word = error
    if isinstance(error, driver.ConnectionDoesNotExistError):
        causes = (cause for cause in _causes(error) if cause is not error)
        last_word = next((cause for cause in causes if isinstance(cause, driver.PostgresError)), error)
    return Sighting(failure=failure, error=last_word, lost=_is_loss(error))


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
        severity = _severity(error)
        return severity in {"FATAL", "PANIC"} or (severity != "ERROR" and _sqlstate(error) in _LAST_WORDS)
    if isinstance(error, driver.InterfaceError):
        return _CLOSED.search(_text(error)) is not None
    return isinstance(error, _LOST_TYPES) or (isinstance(error, OSError) and error.errno in _LOST_ERRNOS)


def _settle(verdict: Verdict, seen: Sighting) -> Verdict:
    """Add what holds whichever rule matched.

    There are two such things: before a statement was sent it cannot have run, and a peer that fell silent until the
    kernel gave up has most likely left the other connections hanging as well.
    """
    failure = seen.failure
    never_ran = failure.phase is Phase.CONNECT or (failure.phase is not Phase.COMMIT and _unsent(seen))
    if never_ran and verdict.outcome is not Outcome.NOT_EXECUTED:
        verdict = replace(verdict, outcome=Outcome.NOT_EXECUTED)
    if seen.lost and failure.phase is not Phase.CONNECT and _fell_silent(failure):
        verdict = replace(verdict, others=Disposition.EXPIRE)
    return verdict


def _fell_silent(failure: Failure) -> bool:
    # Along `__context__` too: a masked loss keeps its reason there, and a false alarm costs no more than new connections.
    return any(isinstance(error, OSError) and error.errno == errno.ETIMEDOUT for error in failure.chain())
