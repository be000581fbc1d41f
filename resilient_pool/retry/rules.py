"""What is known about which error: a table of rules, and what they ask of an error."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from asyncpg import exceptions as driver

from resilient_pool.errors import OutcomeUnknownError, ResilientPoolError
from resilient_pool.retry.verdict import Disposition, Failure, Fault, Outcome, Phase, Verdict

# Patterns as text: `re` compiles each with the first failure that is held against it, not while the package is imported.
CLOSED = r"connection is closed$"
_HALF_WAY = r"^(cannot switch to state |not connected$)"
_CLOSED_OR_HALF_WAY = f"{CLOSED}|{_HALF_WAY}"
_MASK = r"^cannot call Transaction\..*underlying connection is closed$"
_NOT_NOW = r"another operation is |has been released back to the pool|^pool is clos"
_NOT_LET_IN = r"^no pg_hba\.conf entry"
_TLS_REJECTED = r"rejected SSL upgrade$"
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
_POOLERS_LIMIT = r"^((idle )?transaction timeout$|disconnecting idle in transaction client)"
_LOST_ITS_SERVER = (
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
_SUPAVISOR_HAS_NONE_FREE = r"^\((ECHECKOUTTIMEOUT|ECHECKOUTRETRIES|EPOOLCHECKOUT)\)"
# PgCat (FATAL, and the connection lives) and PgDog (ERROR), while no server is attached to the client.
_CHECKOUT_FAILED = (
    r"^could not get connection from the pool - |checkout failure limit reached \(|^(replica )?checkout timeout"
)
_CHECKOUT_IMPOSSIBLE = (
    r"^(all replicas down|pool is banned|no primary|pool is shut down)|^connection pool for user .* is down$"
)
_STALE_TYPE = r"^cache lookup failed for type "  # an internal error: never translated
_RECREATED_TYPE = r"^type with OID \d+ does not exist$"
# Limits of one session or one statement, by the name of the setting: the same statement meets them again.
_LIMIT_OF_ITS_OWN = r"\btemp_file_limit\b|^tuple decompression limit |\w+ = 0$"
# Functions of postgres_fdw's and dblink's that raise what another server has said to this one, or that it is away.
_FOREIGN = frozenset({"pgfdw_report_error", "pgfdw_report", "pgfdw_report_internal", "connect_pg_server"}) | frozenset(
    {"dblink_res_error", "dblink_connect", "dblink_get_conn", "dblink_conn_not_avail"}
)
# Functions that read one argument's binary form, by the client's idea of its type.
_READS_AN_ARGUMENT = frozenset(
    {"record_recv", "array_recv", "range_recv", "multirange_recv", "enum_recv", "domain_recv"}
)
_SERVER = driver.PostgresError
_DRIVERS = (driver.InterfaceError, driver.InternalClientError)
_TLS_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_NO_SUCH_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeError)


def text_of(error: BaseException) -> str:
    """Return the message, without the details and hints that a server may add."""
    first = error.args[0] if error.args else ""
    return first if isinstance(first, str) else ""


def sqlstate_of(error: BaseException) -> str:
    """Return the SQLSTATE, or nothing."""
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else ""


def severity_of(error: BaseException) -> str:
    """Return the severity as the server sent it; nothing for an error that the driver made by itself.

    The field "severity" is translated to the server's language, "severity_en" (PostgreSQL 9.6 and up) is not.
    """
    return getattr(error, "severity_en", None) or getattr(error, "severity", None) or ""


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
    def unsent(self) -> bool:
        """Whether nothing of the application's statement was sent."""
        return self.failure.phase is Phase.CHECKOUT or not self.failure.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of the table: it matches when everything that it names holds.

    Attributes:
        evidence: What this line recognises, in words for a reader.
        fault: The kind of trouble.
        outcome: What is known of the statement. In the phases CONNECT and CHECKOUT, and where nothing was sent, it is
            `NOT_EXECUTED` in any case.
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
    connection: Disposition
    others: Disposition
    phases: frozenset[Phase]
    errors: tuple[type[BaseException], ...]
    sqlstates: frozenset[str]
    text: str | None
    lost: bool | None
    when: Callable[[Sighting], bool] | None

    def matches(self, seen: Sighting) -> bool:
        """Say whether everything that this rule names holds for `seen`, cheap questions first."""
        return (
            seen.failure.phase in self.phases
            and (self.lost is None or self.lost is seen.lost)
            and (not self.errors or isinstance(seen.error, self.errors))
            and (not self.sqlstates or not self.sqlstates.isdisjoint((state := sqlstate_of(seen.error), state[:2])))
            and (self.text is None or re.search(self.text, text_of(seen.error)) is not None)
            and (self.when is None or self.when(seen))
        )

    @property
    def verdict(self) -> Verdict:
        """The verdict of this line."""
        return Verdict(fault=self.fault, outcome=self.outcome, connection=self.connection, others=self.others)


def _rule(
    evidence: str,
    fault: Fault,
    outcome: Outcome,
    disposition: Disposition,
    phases: frozenset[Phase],
    lost: bool | None,
    *,
    codes: str | frozenset[str] = "",
    errors: type[BaseException] | tuple[type[BaseException], ...] = (),
    text: str | None = None,
    when: Callable[[Sighting], bool] | None = None,
) -> Rule:
    """Make a row. `EXPIRE` discards the connection and expires those opened before it; `codes` stand side by side."""
    expires = disposition is EXPIRE
    return Rule(
        evidence=evidence,
        fault=fault,
        outcome=outcome,
        connection=DISCARD if expires else disposition,
        others=EXPIRE if expires else KEEP,
        phases=phases,
        errors=errors if isinstance(errors, tuple) else (errors,),
        sqlstates=frozenset(codes.split()) if isinstance(codes, str) else codes,
        text=text,
        lost=lost,
        when=when,
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
    return _source(seen) not in _FOREIGN


def _source(seen: Sighting) -> str:
    return getattr(seen.error, "server_source_function", None) or ""


def _reads_an_argument(seen: Sighting) -> bool:
    return _source(seen) in _READS_AN_ARGUMENT


def _waking(seen: Sighting) -> bool:
    return seen.failure.waking


def _unsent(seen: Sighting) -> bool:
    return seen.unsent


def _sent(seen: Sighting) -> bool:
    return not seen.unsent


def _is_about_this_connection(seen: Sighting) -> bool:
    return seen.lost or seen.failure.phase is Phase.CONNECT


def _ends_the_session(seen: Sighting) -> bool:
    return seen.lost or severity_of(seen.error) != "ERROR"


def _from_the_server(seen: Sighting) -> bool:
    return severity_of(seen.error) != ""


# The words of the table's columns.
STALE, UNREACHABLE, DISCONNECTED, OVERLOADED, CONTENTION, WRONG_SERVER, STATEMENT_CACHE, POISONED, PERMANENT = Fault
NOT_EXECUTED, ROLLED_BACK, UNKNOWN = Outcome
KEEP, DISCARD, EXPIRE = Disposition
ANY, CONNECT, CHECKOUT, COMMIT = (
    frozenset(Phase),
    *(frozenset({p}) for p in (Phase.CONNECT, Phase.CHECKOUT, Phase.COMMIT)),
)
NOT_COMMIT, CONNECTED = ANY - COMMIT, ANY - CONNECT
LOST, ALIVE, EITHER = True, False, None

# fmt: off
RULES: tuple[Rule, ...] = (
    # evidence
    #   fault            outcome       connection phases    session what else must hold
    # First what this package has decided already.
    _rule("`OutcomeUnknownError`: already decided, never repeated",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        EITHER, errors=OutcomeUnknownError),
    _rule("this package's own errors, such as `AcquireTimeoutError`: nothing was sent",
        PERMANENT,       NOT_EXECUTED, KEEP,    ANY,        EITHER, errors=ResilientPoolError),
    # The server's own limits on a transaction. It is rolled back, unless it was just ending: the timer of 25P04 can go off
    # between the last look at it and the end of the COMMIT. Only the holder of the transaction can find out.
    _rule("25P03, 25P04: the server ended a transaction that was idle, or lasted, for too long; so it will the next time",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        LOST,   codes="25P03 25P04", when=_sent),
    _rule("a pooler's own limits on a transaction (`idle transaction timeout`, `transaction timeout`)",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        LOST,   codes="08P01 57P05", text=_POOLERS_LIMIT, when=_sent),
    # Whatever is lost with a COMMIT: before anything that could sound like a guarantee.
    _rule("the connection lost during COMMIT, whatever the reason",
        DISCONNECTED,    UNKNOWN,      DISCARD, COMMIT,     LOST),
    _rule("40003 completion unknown, 08007 transaction resolution unknown",
        DISCONNECTED,    UNKNOWN,      DISCARD, ANY,        EITHER, codes="40003 08007"),
    _rule("XXA00 committed, but a later step failed (CockroachDB)",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        EITHER, codes="XXA00"),
    _rule("what a pooler says when it has lost the server, as an ERROR (`odyssey: `, `server is shutting down`, ...)",
        DISCONNECTED,    UNKNOWN,      DISCARD, CONNECTED,  EITHER, codes="08006 57P01 XX000", text=_LOST_ITS_SERVER, when=_sent),
    # A server, or a pooler, which has no room or is not there.
    _rule("53300 too many clients, connecting or as a last word",
        OVERLOADED,      NOT_EXECUTED, DISCARD, ANY,        EITHER, codes="53300", when=_is_about_this_connection),
    # Newer poolers send 57014 with `query_wait_timeout`; a server never says that as its last word.
    _rule("a pooler's capacity message (08P01, FATAL: `query_wait_timeout`, `no more connections allowed`, ...)",
        OVERLOADED,      NOT_EXECUTED, DISCARD, ANY,        LOST,   codes="08P01 57014", text=_POOLER_IS_FULL),
    _rule("a pooler that cannot log in to its server (08P01, FATAL: `server login has been failing`, ...)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, ANY,        LOST,   codes="08P01", text=_POOLER_HAS_NO_SERVER),
    _rule("58000 `checkout timeout`, `could not get connection from the pool`: PgDog or PgCat has no free server",
        OVERLOADED,      NOT_EXECUTED, DISCARD, NOT_COMMIT, EITHER, codes="58000", text=_CHECKOUT_FAILED),
    _rule("58000 `connection pool for user ... is down`, `all replicas down`: PgDog has no server at all",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, NOT_COMMIT, EITHER, codes="58000", text=_CHECKOUT_IMPOSSIBLE),
    _rule("XX000 `(ECHECKOUTTIMEOUT)`, ... as a last word: Supavisor has no free server",
        OVERLOADED,      NOT_EXECUTED, DISCARD, NOT_COMMIT, LOST,   codes="XX000", text=_SUPAVISOR_HAS_NONE_FREE),
    # Opening a connection.
    _rule("connecting: a proxy is full, whatever its code (Neon, Supavisor, PgCat, PgDog)",
        OVERLOADED,      NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes=_ONE_CODE, errors=_SERVER, text=_PROXY_IS_FULL),
    _rule("connecting: a proxy has no server yet, whatever its code (Neon, Supavisor, PgCat, PgDog)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes=_ONE_CODE, errors=_SERVER, text=_PROXY_HAS_NO_SERVER),
    _rule("connecting: 57P03 (starting up, shutting down, in recovery, no hot standby), 57P01, 57P02",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes="57P01 57P02 57P03", when=_own),
    _rule("connecting: closed during the handshake (08003 and its kin)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes="08000 08001 08003 08004 08006", when=_own),
    _rule("connecting: a pooler's server went away during the login (08P01 `server conn crashed?`)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes="08P01", text=_SERVER_CRASHED),
    _rule("connecting: closed while the new connection was being set up (`InterfaceError`, `InternalClientError`)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=_DRIVERS, text=_CLOSED_OR_HALF_WAY),
    _rule("connecting, while the server wakes up: 28000 `no pg_hba.conf entry`",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, codes="28000", text=_NOT_LET_IN, when=_waking),
    _rule("connecting, while the server wakes up: `rejected SSL upgrade`",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=ConnectionError, text=_TLS_REJECTED, when=_waking),
    _rule("connecting: `TargetServerAttributeNotMatched` (no primary yet)",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=driver.TargetServerAttributeNotMatched),
    _rule("connecting: closed during the TLS handshake",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=_TLS_CUT_OFF),
    _rule("connecting: certificate, TLS version or TLS itself refused",
        PERMANENT,       NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=ssl.SSLError),
    _rule("connecting: `rejected SSL upgrade`",
        PERMANENT,       NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=ConnectionError, text=_TLS_REJECTED),
    _rule("connecting: missing socket or file, no permission, a host name that cannot be encoded",
        PERMANENT,       NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=_NO_SUCH_PLACE),
    _rule("connecting: refused, reset, no route, name not resolved, timed out",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=OSError),
    _rule("connecting: 53000, 53100, 53200, 53400: no room for one more connection now",
        OVERLOADED,      NOT_EXECUTED, DISCARD, CONNECT,    LOST,   codes="53000 53100 53200 53400"),
    _rule("connecting: 40001, 40P01 as a FATAL: `init` was in the way of a standby's recovery",
        UNREACHABLE,     NOT_EXECUTED, DISCARD, CONNECT,    LOST,   codes="40001 40P01"),
    # As an ERROR it is the application's `init` that has failed, and what it says is judged like any other statement's.
    _rule("connecting: 28P01 wrong password, 28000, 3D000 no such database, any other refusal by the server",
        PERMANENT,       NOT_EXECUTED, DISCARD, CONNECT,    EITHER, errors=_SERVER, when=_ends_the_session),
    # A connection that had died before it was used.
    _rule("57P05 idle-session timeout, itself or as the cause of a loss",
        STALE,           NOT_EXECUTED, DISCARD, ANY,        LOST,   codes="57P05"),
    _rule("the connection found lost while nothing of the statement was sent",
        STALE,           NOT_EXECUTED, DISCARD, ANY,        LOST,   when=_unsent),
    _rule("no answer in time to the check before use",
        STALE,           NOT_EXECUTED, DISCARD, CHECKOUT,   EITHER, errors=TimeoutError),
    _rule("`InterfaceError` at the end of a transaction: the connection was lost inside it",
        DISCONNECTED,    UNKNOWN,      DISCARD, ANY,        EITHER, errors=driver.InterfaceError, text=_MASK),
    _rule("`InterfaceError`: the connection was already closed when the operation was about to be sent",
        STALE,           NOT_EXECUTED, DISCARD, ANY,        EITHER, errors=driver.InterfaceError, text=CLOSED),
    # What the server said about the statement, keeping the session: its effects, if any, are undone.
    _rule("40001 serialization failure, 40P01 deadlock, as an ERROR",
        CONTENTION,      ROLLED_BACK,  KEEP,    ANY,        ALIVE,  codes="40001 40P01"),
    _rule("53400 a limit of the statement's own (`temp_file_limit`): it meets it again",
        PERMANENT,       ROLLED_BACK,  KEEP,    ANY,        ALIVE,  codes="53400", text=_LIMIT_OF_ITS_OWN),
    _rule("53100 disk full, 53200 out of memory, 53300 (another server's), 53400 limit exceeded, while executing",
        OVERLOADED,      ROLLED_BACK,  KEEP,    ANY,        ALIVE,  codes="53100 53200 53300 53400"),
    _rule("25006 read-only, unless that was asked for, or the server is no standby: the old primary",
        WRONG_SERVER,    NOT_EXECUTED, EXPIRE,  ANY,        ALIVE,  codes="25006", when=_demoted),
    _rule("26000, 42P05: the prepared statement is missing, or there already",
        STATEMENT_CACHE, NOT_EXECUTED, DISCARD, ANY,        ALIVE,  codes="26000 42P05", when=_own),
    # What was created anew is out of date on every connection: the others would fail one after the other.
    _rule("`InvalidCachedStatementError` (0A000, the cached plan is out of date)",
        STATEMENT_CACHE, NOT_EXECUTED, EXPIRE,  ANY,        ALIVE,  errors=driver.InvalidCachedStatementError),
    _rule("XX000 `cache lookup failed for type`: a type was created anew",
        STATEMENT_CACHE, ROLLED_BACK,  EXPIRE,  ANY,        ALIVE,  codes="XX000", text=_STALE_TYPE, when=_own),
    _rule("42704 `type with OID ... does not exist`: a type was created anew",
        STATEMENT_CACHE, ROLLED_BACK,  EXPIRE,  ANY,        ALIVE,  codes="42704", text=_RECREATED_TYPE, when=_own),
    _rule("42804, 22P03 from reading an argument's binary form: the type of a field has changed",
        STATEMENT_CACHE, ROLLED_BACK,  EXPIRE,  ANY,        ALIVE,  codes="42804 22P03", when=_reads_an_argument),
    # Raised while rows are decoded, when the statement has already run to its end.
    _rule("`OutdatedSchemaCacheError`: a composite type changed; the statement has run",
        STATEMENT_CACHE, UNKNOWN,      EXPIRE,  ANY,        EITHER, errors=driver.OutdatedSchemaCacheError),
    # The connection lost on the way.
    _rule("`InternalClientError`: `cannot switch to state`, `not connected` (a loss noticed half-way)",
        POISONED,        UNKNOWN,      DISCARD, ANY,        EITHER, errors=driver.InternalClientError, text=_HALF_WAY),
    _rule("the connection lost while executing: 08003 with any cause or none, 57P01, 57P02, any FATAL, "
        "a pooler's `server conn crashed?`, `query timeout`, `database removed`",
        DISCONNECTED,    UNKNOWN,      DISCARD, ANY,        LOST),
    # Errors for the application to see. On Python 3.11 the kernel's time-out (errno 110: a loss) is a `TimeoutError` too.
    _rule("the caller's own time-out (`TimeoutError` without errno)",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        EITHER, errors=TimeoutError),
    _rule("`InterfaceError`: another operation is in progress, or the connection was given back",
        PERMANENT,       NOT_EXECUTED, KEEP,    ANY,        EITHER, errors=driver.InterfaceError, text=_NOT_NOW),
    _rule("classes 22, 23, 42, 55P03 lock not available, 57014 cancelled, from the server",
        PERMANENT,       ROLLED_BACK,  KEEP,    ANY,        EITHER, codes="22 23 42 55P03 57014", when=_from_the_server),
    _rule("08P01 as an ERROR: the server did not understand the driver",
        PERMANENT,       ROLLED_BACK,  DISCARD, ANY,        EITHER, codes="08P01", when=_from_the_server),
    _rule("any other error from the server",
        PERMANENT,       ROLLED_BACK,  KEEP,    ANY,        EITHER, when=_from_the_server),
    _rule("anything else: arguments that cannot be encoded, errors of the driver or of the application",
        PERMANENT,       UNKNOWN,      DISCARD, ANY,        EITHER),
)
"""The table, first match first. Facts were provoked on real servers (tests/unit/retry/measured_failures.json)."""
# fmt: on


def describe_rules() -> list[tuple[str, str, str]]:
    """List the built-in rules for a reader, in the order in which they are asked: evidence, fault, outcome."""
    return [(rule.evidence, rule.fault.value, rule.outcome.value) for rule in RULES]
