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
from enum import StrEnum
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
    """When a rule applies: in which phases, and whether the connection must, or must not, have ended with the error."""

    phases: frozenset[Phase]
    lost: bool | None = None


class Known(StrEnum):
    """How it is known what a rule says."""

    PROVOKED = "provoked on a real server"
    SOURCE = "read in its source"
    SEEN = "seen in logs and reports"
    DOCUMENT = "its vendor's documents"
    SUPPOSED = "supposed, to be safe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of the table: it applies when everything that it names holds.

    Attributes:
        verdict: What is known then. In the phases CONNECT and CHECKOUT, and where nothing was sent, the outcome is
            `NOT_EXECUTED` in any case.
        evidence: What this line recognises, in words for a reader.
        service: Who says it.
        known: How that is known.
        where: In which phases, and whether as the end of a connection.
        codes: Codes of which the error must have one; empty means any.
        recoded: Whether any code will do while connecting: it is said by what has one code for everything then.
        errors: Types of which the error must be one; empty means any.
        says: How the message begins, or with "$" at its end the whole of it; empty means any.
        text: A pattern which the message must contain.
        when: What else must hold.
    """

    verdict: Verdict
    evidence: str
    service: str
    known: Known
    where: Where
    codes: frozenset[str]
    recoded: bool
    errors: tuple[type[BaseException], ...]
    says: str
    text: str | None
    when: Callable[[Sighting], bool] | None

    def applies(self, phase: Phase, sqlstate: str, *, lost: bool) -> bool:
        """Say whether this rule can be about such an error."""
        return (
            phase in self.where.phases
            and self.where.lost in (None, lost)
            and (not self.codes or sqlstate in self.codes or (self.recoded and phase is Phase.CONNECT))
        )

    def matches(self, seen: Sighting) -> bool:
        """Say whether what else this rule names holds for `seen`, of which it `applies` to phase and code."""
        return (
            (not self.says or seen.text.startswith(self.says) or f"{seen.text}$" == self.says)
            and (not self.errors or isinstance(seen.error, self.errors))
            and (self.text is None or re.search(self.text, seen.text) is not None)
            and (self.when is None or self.when(seen))
        )


# What else must hold

# What servers and poolers say when they do not know themselves what became of a COMMIT: a lost connection (08), a server
# that ends (57P), a pooler's or the system's trouble (58), an internal error (XX, also CockroachDB's XXA00: it has).
_NO_WORD_ABOUT_A_COMMIT = ("08", "57P", "58", "XX")
# Functions of postgres_fdw's and dblink's that raise what another server has said to this one, or that it is away.
_FOREIGN = frozenset({"pgfdw_report_error", "pgfdw_report", "pgfdw_report_internal", "connect_pg_server"}) | frozenset(
    {"dblink_res_error", "dblink_connect", "dblink_get_conn", "dblink_conn_not_avail"}
)
# Functions that read one argument's binary form, by the client's idea of its type.
_READS_AN_ARGUMENT = frozenset(
    {"record_recv", "array_recv", "range_recv", "multirange_recv", "enum_recv", "domain_recv"}
)


# PgDog says for itself what it says as an ERROR as well, and RDS Proxy perhaps.
_ALSO_AS_ERROR = frozenset({"08000", "58000"})
# Those by which functions in PL/pgSQL, PL/Python, PL/Perl and PL/Tcl raise errors with codes and messages of their own.
_RAISE = frozenset({"exec_stmt_raise", "PLy_output", "PLy_elog_impl", "do_util_elog", "pltcl_elog"})


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


def _ends_session(seen: Sighting) -> bool:
    return seen.lost or seen.severity != "ERROR"


def _from_server(seen: Sighting) -> bool:
    return seen.severity != ""


def _fatal(seen: Sighting) -> bool:
    """Whether it is why the connection ended. An ERROR before that may be an application's own words."""
    return seen.lost and seen.severity in {"FATAL", "PANIC", ""}


def _of_proxy(seen: Sighting) -> bool:
    """Whether no function of a server's has raised it: those that applications write can say anything in an ERROR."""
    return seen.severity != "ERROR" or not seen.raised_in


def _of_server(seen: Sighting) -> bool:
    """Whether the server, and no function that an application wrote, has raised it."""
    return seen.raised_in not in _RAISE


def _server_answer(seen: Sighting) -> bool:
    return _of_server(seen) and not seen.unsent


def _in_handshake(seen: Sighting) -> bool:
    return isinstance(seen.error, driver.PostgresError) and not seen.failure.initializing and _of_proxy(seen)


def _queued(seen: Sighting) -> bool:
    """Whether a pooler says it for which this client waits for a server: nothing was forwarded to one."""
    if seen.failure.phase is Phase.CONNECT:
        return _in_handshake(seen)
    return _fatal(seen) or (seen.severity == "ERROR" and seen.sqlstate in _ALSO_AS_ERROR and _of_proxy(seen))


def _fatal_answer(seen: Sighting) -> bool:
    return _fatal(seen) and not seen.unsent


def _inits_own(seen: Sighting) -> bool:
    """Whether the application's `init` met it elsewhere. If a statement of `init`'s has timed out, the server is slow."""
    timed_out = isinstance(seen.error, TimeoutError) and seen.error.errno is None
    return seen.failure.initializing and not timed_out


def _without_tls(seen: Sighting) -> bool:
    return seen.failure.sslmode == "disable"


def _tls_optional(seen: Sighting) -> bool:
    return seen.failure.sslmode in {"allow", "prefer"}


def _no_refusal(seen: Sighting) -> bool:
    return _from_server(seen) and seen.sqlstate.startswith(_NO_WORD_ABOUT_A_COMMIT)


def _dropped_idle(seen: Sighting) -> bool:
    detail = getattr(seen.error, "detail", None) or ""
    return _fatal(seen) and detail.endswith("due to idle timeout")


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
COMMITTING = Where(frozenset({Phase.COMMIT}), lost=False)
LOST_CONNECTING, LOST_COMMIT = CONNECTING._replace(lost=True), COMMITTING._replace(lost=True)
ANSWERED = EXECUTING._replace(lost=False)  # what is no word about a COMMIT
IN_USE = Where(frozenset({Phase.CHECKOUT, Phase.EXECUTE}), lost=True)


def _rule(
    fault: Fault,
    raised: str | type[BaseException] | tuple[type[BaseException], ...],
    evidence: str = "",
    *,
    outcome: Outcome = UNKNOWN,
    where: Where = ANY,
    then: Disposition = DISCARD,
    says: str = "",
    text: str | None = None,
    when: Callable[[Sighting], bool] | None = None,
    recoded: bool = False,
    service: str = "PostgreSQL",
    known: Known = Known.PROVOKED,
    not_before: float | None = None,
    only_for: float | None = None,
) -> Rule:
    """Make a row of the table."""
    connection, others = (DISCARD, EXPIRE) if then is EXPIRE else (then, KEEP)
    codes, errors = (raised, ()) if isinstance(raised, str) else ("", raised)
    times = {"not_before": not_before, "only_for": only_for}
    return Rule(
        verdict=Verdict(fault=fault, outcome=outcome, connection=connection, others=others, **times),
        evidence=evidence or f"`{says.removesuffix('$')}`",
        service=service,
        known=known,
        where=where,
        codes=frozenset(codes.split()),
        recoded=recoded,
        errors=errors if isinstance(errors, tuple) else (errors,),
        says=says,
        text=text,
        when=when,
    )


_never_run = functools.partial(_rule, outcome=NOT_EXECUTED)
_connecting = functools.partial(_never_run, where=CONNECTING)
_unsent = functools.partial(_never_run, where=LOST, when=_fatal)
_lost = functools.partial(_rule, where=LOST)
_refused = functools.partial(_never_run, where=ALIVE)
_answered = functools.partial(_rule, where=ALIVE, outcome=ROLLED_BACK, then=KEEP)
_outdated = functools.partial(_answered, STATEMENT_CACHE, then=EXPIRE)

# Patterns as text: `re` compiles each with the first failure that is held against it, not while this is imported.
_CLOSED = r"connection is closed$"
_HALF_WAY = r"^(cannot switch to state |not connected$)"
_ENDED = f"{_CLOSED}|{_HALF_WAY}"
_MASK = r"^cannot call Transaction\..*underlying connection is closed$"
_NOT_NOW = r"another operation is |has been released back to the pool|^pool is clos"
_NOT_LET_IN_PLAIN = r"^no pg_hba\.conf entry .*(SSL off|no encryption)$"
_NO_TLS = r"rejected SSL upgrade$"
_LIMITS = r"^((idle )?transaction timeout$|disconnecting idle in transaction client)"
_NEW_TYPE = r"^type with OID \d+ does not exist$"
# Limits of one session or one statement, by the name of the setting: the same statement meets them again.
_OWN_LIMIT = r"\btemp_file_limit\b|^tuple decompression limit |\w+ = 0$"
_ODYSSEY_LOST = r"^odyssey: \S+ remote server read/write error"
_ODYSSEY_HAS_NONE = r"^odyssey: \S+ (failed to (get|connect to) remote server|can't find suitable host|replication lag)"
_PGDOG_DOWN = r"^connection pool for user .* is down$"
_ODYSSEY_DROPPED = r"^odyssey: \S+ Odyssey has dropped the connection"

_SERVER = driver.PostgresError
_INTERFACE, _INTERNAL = driver.InterfaceError, driver.InternalClientError
_NO_PRIMARY, _OLD_PLAN = driver.TargetServerAttributeNotMatched, driver.InvalidCachedStatementError
_OLD_TYPE = driver.OutdatedSchemaCacheError
_TLS_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_NO_SUCH_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, UnicodeError)

# What services say. While connecting, before they have handed over, the text counts whatever the code: most have one
# for everything (Neon and Supavisor XX000, PgCat and PgDog 58000, Prisma none), also for what their server has said.
# Later it counts with a code of theirs only, as a FATAL, or as an ERROR that no function of a server's has raised.

_at_login = functools.partial(_connecting, raised="", when=_in_handshake)
_instead = functools.partial(_never_run, where=IN_USE, when=_fatal_answer)
_in_queue = functools.partial(_never_run, where=EXECUTING, when=_queued, recoded=True)
_SOURCE, _SEEN, _DOCUMENT = Known.SOURCE, Known.SEEN, Known.DOCUMENT
_pgbouncer = functools.partial(_in_queue, raised="08P01 57014", service="PgBouncer", known=_SOURCE)
_pgbouncer_login = functools.partial(_at_login, service="PgBouncer", known=_SOURCE)
_pgbouncer_idle = functools.partial(_instead, STALE, "08P01", service="PgBouncer", known=_SOURCE)
_pgcat = functools.partial(_in_queue, raised="58000", service="PgCat", known=_SOURCE)
_pgcat_login = functools.partial(_at_login, service="PgCat", known=_SOURCE)
_pgcat_idle = functools.partial(_instead, STALE, "58000", service="PgCat", known=_SOURCE)
_pgdog = functools.partial(_in_queue, raised="58000", service="PgDog", known=_SOURCE)
_pgdog_login = functools.partial(_at_login, service="PgDog", known=_SOURCE)
_odyssey = functools.partial(_in_queue, raised="08006", service="Odyssey", known=_SOURCE)
_odyssey_idle = functools.partial(_instead, STALE, "08006", when=_dropped_idle, service="Odyssey", known=_SOURCE)
_supavisor = functools.partial(_in_queue, raised="XX000 08006", service="Supavisor", known=_SOURCE)
_supavisor_login = functools.partial(_at_login, service="Supavisor", known=_SOURCE)
_supavisor_cache = functools.partial(_instead, STATEMENT_CACHE, "XX000", service="Supavisor", known=_SOURCE)
_neon = functools.partial(_at_login, service="Neon", known=_SOURCE)
_neon_storage = functools.partial(_answered, OVERLOADED, where=ANSWERED, service="Neon", known=_SOURCE, when=_of_server)
_rds_proxy = functools.partial(_at_login, service="RDS Proxy", known=_DOCUMENT)
_rds_queue = functools.partial(_in_queue, raised="08000", service="RDS Proxy", known=_DOCUMENT)
_dsql = functools.partial(_at_login, service="Aurora DSQL", known=_DOCUMENT)
_cockroach = functools.partial(_at_login, service="CockroachDB Cloud", known=_SOURCE)
_prisma = functools.partial(_at_login, service="Prisma Postgres", known=_SEEN)
_lost_behind = functools.partial(_rule, DISCONNECTED, where=CONNECTED, when=_server_answer, known=Known.SUPPOSED)
_cockroach_range = functools.partial(_answered, OVERLOADED, where=ANSWERED, service="CockroachDB", known=_SOURCE)
_planetscale = functools.partial(_refused, where=ANSWERED, service="PlanetScale", known=_DOCUMENT)
_size_limit = functools.partial(_answered, PERMANENT, "53100", when=_of_server)
_yugabyte = functools.partial(
    _answered, CONTENTION, "XX000", where=ANSWERED, when=_of_server, service="YugabyteDB", known=_DOCUMENT
)
_refused_queued = functools.partial(_instead, PERMANENT, known=_SOURCE)
_cache_lost = functools.partial(_instead, STATEMENT_CACHE, known=_SOURCE)

# A maintenance or a quota, and they do not say which: so long it is waited for, in seconds.
_IN_DOUBT = 15.0
# So long Supavisor lets no new client in, once its own attempts to reach the server have failed too often.
_BLOCKED = 30.0

# fmt: off
_SERVICES: tuple[Rule, ...] = (
    # Poolers, and what the server behind them has told them. The cached reason is cut off after 100 bytes.
    _pgbouncer(PERMANENT, says="server login has been failing, cached error: password authentication"),
    _pgbouncer(PERMANENT, says="server login has been failing, cached error: no pg_hba"),
    _pgbouncer(PERMANENT, says='server login has been failing, cached error: database "'),
    _pgbouncer(PERMANENT, says='server login has been failing, cached error: role "'),
    _pgbouncer(UNREACHABLE, says="server login has been failing"),
    _pgbouncer(UNREACHABLE, says="the database system is "),
    _pgbouncer(UNREACHABLE, says="pgbouncer cannot connect to server"),
    _pgbouncer(UNREACHABLE, says="client_login_timeout"),
    _pgbouncer(UNREACHABLE, says="pooler is shutting down$"),
    _pgbouncer(UNREACHABLE, says="server shutting down$"),
    _pgbouncer(OVERLOADED, says="query_wait_timeout$"),
    _pgbouncer(OVERLOADED, says="query_timeout$"),
    _pgbouncer(OVERLOADED, says="no more connections allowed ("),
    _pgbouncer(OVERLOADED, says="client connections exceeded ("),
    _pgbouncer(OVERLOADED, says="sorry, too many clients already"),
    _pgbouncer(OVERLOADED, says="too many connections for "),
    _pgbouncer(OVERLOADED, says="remaining connection slots are reserved"),
    _pgbouncer_login(UNREACHABLE, says="server conn crashed?"),
    _pgbouncer_login(PERMANENT, says="no such database: "),
    _pgbouncer_login(PERMANENT, evidence='`database "..." is disabled`', text=r'^database ".*" is disabled'),
    _pgbouncer_idle(says="client_idle_timeout$"),
    _pgbouncer_idle(says="database configuration changed$"),
    _cache_lost("08P01", says="prepared statement did not exist", service="PgBouncer"),
    _cache_lost("08P01", says="prepared statement name is already in use", service="PgBouncer"),
    _pgcat(OVERLOADED, says="could not get connection from the pool - "),
    _pgcat(OVERLOADED, evidence="`checkout failure limit reached (`", text=r"checkout failure limit reached \("),
    _pgcat_login(UNREACHABLE, says="Pool down for database: "),
    _pgcat_login(UNREACHABLE, says="terminating connection due to administrator command$"),
    _pgcat_idle(says="terminating connection due to administrator command$"),
    _cache_lost("58000", says='prepared statement "', service="PgCat"),
    _pgdog(OVERLOADED, says="checkout timeout$"),
    _pgdog(OVERLOADED, says="replica checkout timeout$"),
    _pgdog(UNREACHABLE, says="all replicas down$"),
    _pgdog(UNREACHABLE, says="pool is banned$"),
    _pgdog(UNREACHABLE, says="no primary$"),
    _pgdog(UNREACHABLE, says="pool is shut down$"),
    _pgdog(UNREACHABLE, evidence="`connection pool for user ... is down`", text=_PGDOG_DOWN),
    _pgdog_login(UNREACHABLE, says="client login timeout$"),
    _pgdog_login(PERMANENT, says="only TLS connections are allowed"),
    _pgdog_login(PERMANENT, says="Clients must connect with TLS"),
    _odyssey(UNREACHABLE, evidence="`failed to connect to remote server`, and the like", text=_ODYSSEY_HAS_NONE),
    _odyssey_idle("`Odyssey has dropped the connection`, with a detail that says idle", text=_ODYSSEY_DROPPED),
    _cache_lost("26000 42P05", "the prepared statement is missing, or there already", service="Supavisor"),
    _refused_queued("28000 28P01 3D000", "the server refuses the pooler's login", service="PgBouncer, Supavisor"),
    # Supabase.
    _supavisor(OVERLOADED, says="(EMAXCONN) "),
    _supavisor(OVERLOADED, says="(EMAXCONNSESSION) "),
    _supavisor(OVERLOADED, says="(EMAXPOOLSREACHED) "),
    _supavisor(OVERLOADED, says="(ECHECKOUTTIMEOUT) "),
    _supavisor(OVERLOADED, says="(ECHECKOUTRETRIES) "),
    _supavisor(OVERLOADED, says="(EPOOLCHECKOUT) "),
    _supavisor(OVERLOADED, says="Max client connections reached"),
    _supavisor(OVERLOADED, says="MaxClientsInSessionMode: "),
    _supavisor(OVERLOADED, says="Max pools count reached"),
    _supavisor(OVERLOADED, says="Unable to check out process from the pool"),
    _supavisor(PERMANENT, says="Failed to connect to database: {:error, :nxdomain}"),
    _supavisor(PERMANENT, says="Failed to connect to database: {:error, :enetunreach}"),
    _supavisor(UNREACHABLE, says="Failed to connect to database: "),
    _supavisor_login(UNREACHABLE, says="(EDBHANDLEREXITED) "),
    _supavisor_login(UNREACHABLE, says="DbHandler exited"),
    _supavisor_login(UNREACHABLE, says="(ESUBSCRIBERETRIES) "),
    _supavisor_login(UNREACHABLE, says="(EPROXYSTARTFAILED) "),
    _supavisor_login(UNREACHABLE, says="(EPROXYSUPERVISORUNAVAILABLE) "),
    _supavisor_login(UNREACHABLE, says="(EWORKERNOTFOUND) "),
    _supavisor_login(UNREACHABLE, says="(EPOOLCONFIGNOTFOUND) "),
    _supavisor_login(UNREACHABLE, says="(EAUTHQUERY) auth_query connection failed"),
    _supavisor_login(UNREACHABLE, says="(EAUTHQUERY) auth_query secret check timed out"),
    _supavisor_login(UNREACHABLE, says="(EAUTHQUERY) authentication query failed: connection to database"),
    _supavisor_login(UNREACHABLE, says="Internal error (handshake)"),
    _supavisor_login(PERMANENT, says="(ECIRCUITBREAKER) too many authentication failures"),
    _supavisor_login(UNREACHABLE, says="(ECIRCUITBREAKER) ", not_before=_BLOCKED),
    _supavisor_cache(says="(EMAXPREPARED) "),
    _supavisor_cache(says="(EMAXPREPAREDMEM) "),
    _supavisor_cache(says="(EPSSIMPLEQUERY) "),
    # Neon.
    _neon(UNREACHABLE, says="Couldn't connect to compute node"),
    _neon(UNREACHABLE, says="Control plane request failed$"),
    _neon(UNREACHABLE, says="Control plane request failed: endpoint is temporarily unavailable", only_for=_IN_DOUBT),
    _neon(UNREACHABLE, says="Your project already has running operations", known=_SEEN),
    _neon(OVERLOADED, says="You've exceeded the rate limit"),
    _neon(OVERLOADED, says="Too many connections attempts"),
    _neon(OVERLOADED, says="Too many connections to this endpoint"),
    _neon(OVERLOADED, says="Failed to acquire permit to connect to the database"),
    _neon(OVERLOADED, says="You have exceeded the limit of concurrently active endpoints", only_for=_IN_DOUBT),
    _neon_storage("08001 58030 XX000", says="[NEON_SMGR] "),
    _size_limit(says="could not extend file because project size limit (", service="Neon", known=_SOURCE),
    # Amazon.
    _rds_queue(OVERLOADED, says="Timed-out waiting to acquire database connection"),
    _rds_proxy(OVERLOADED, says="The maximum number of client connections to the proxy exceeded"),
    _rds_proxy(OVERLOADED, says="Rate of connection to proxy exceeded"),
    _rds_proxy(OVERLOADED, says="The IAM authentication failed because of too many competing requests"),
    _dsql(UNREACHABLE, says="unable to accept connection, waking up cluster", known=_SEEN),
    _dsql(PERMANENT, says="unable to accept connection, access denied"),
    _size_limit(says="Current cluster size exceeds cluster size limit", service="Aurora DSQL", known=_DOCUMENT),
    # The others.
    _cockroach_range("58C00 58C01", "a range, or a node, is not available"),
    _cockroach(UNREACHABLE, says="codeBackendDialFailed: "),
    _cockroach(UNREACHABLE, says="codeUnavailable: "),
    _cockroach(UNREACHABLE, says="internal server error$"),
    _cockroach(PERMANENT, says="codeProxyRefusedConnection: "),
    _cockroach(PERMANENT, says="codeParamsRoutingFailed: "),
    _cockroach(PERMANENT, says="server requires encryption"),
    _yugabyte(says="schema version mismatch for table "),
    _yugabyte(says="Catalog Version Mismatch: A DDL occurred while processing this query"),
    _planetscale(WRONG_SERVER, "XX000", says="pg_readonly: ", then=EXPIRE, when=_of_server, only_for=_IN_DOUBT),
    _prisma(UNREACHABLE, says="Failed to connect to upstream database"),
    _prisma(UNREACHABLE, says="Failed to identify your database: A server error occurred", only_for=_IN_DOUBT),
    _prisma(UNREACHABLE, says="Failed to identify your database: Your Prisma Postgres database is", only_for=_IN_DOUBT),
)

RULES: tuple[Rule, ...] = (
    # What this package has decided already.
    _rule(PERMANENT, OutcomeUnknownError, "`OutcomeUnknownError`: decided already, never repeated"),
    _never_run(PERMANENT, ResilientPoolError, "this package's own errors, such as `AcquireTimeoutError`", then=KEEP),
    # The server's own limits on a transaction. It is rolled back, unless it was just ending: the timer of 25P04 can go
    # off between the last look at it and the end of the COMMIT. Only the holder of the transaction can find out.
    _lost(PERMANENT, "25P03 25P04", "a transaction was idle, or lasted, too long; so will the next one", when=_sent),
    _lost(PERMANENT, "08P01 57P05", "a pooler's limits on a transaction", text=_LIMITS, when=_sent, known=_SOURCE),
    # Whatever is lost with a COMMIT: before anything that could sound like a guarantee.
    _rule(DISCONNECTED, "", "the connection lost during COMMIT, whatever the reason", where=LOST_COMMIT),
    _rule(DISCONNECTED, "40003 08007", "completion of a statement, or of a transaction, unknown"),
    _rule(PERMANENT, "XXA00", "committed, but a later step failed", service="CockroachDB", known=_SOURCE),
    # Each was seen before a connection ended. If it ever came as an ERROR on one that lives, it would be no guarantee.
    _lost_behind("08006", "`remote server read/write error`", text=_ODYSSEY_LOST, service="Odyssey"),
    _lost_behind("57P01", says="server is shutting down$", service="CockroachDB"),
    _lost_behind("XX000", says="Timed out: Perform RPC", service="YugabyteDB"),
    _lost_behind("XX000", says="Invalid argument: Unknown session", service="YugabyteDB"),
    *_SERVICES,
    # A server which has no room.
    _connecting(OVERLOADED, "53300", "too many clients"),
    _unsent(OVERLOADED, "53300", "too many clients, said to a pooler", known=_SOURCE),
    # Opening a connection.
    _connecting(PERMANENT, OSError, "an error of the network's in the application's own `init`", when=_inits_own),
    _connecting(UNREACHABLE, "57P01 57P02 57P03", "starting up, shutting down, in recovery, no hot standby", when=_own),
    _connecting(UNREACHABLE, "57P05", "idle for too long while it was set up: the process was frozen", when=_own),
    _connecting(UNREACHABLE, "08000 08001 08003 08004 08006", "closed during the handshake", when=_own),
    _connecting(UNREACHABLE, (_INTERFACE, _INTERNAL), "closed while the connection was being set up", text=_ENDED),
    _connecting(PERMANENT, "28000", "no entry in pg_hba.conf without TLS", text=_NOT_LET_IN_PLAIN, when=_without_tls),
    _connecting(UNREACHABLE, "28000", says="no pg_hba.conf entry", when=_waking, service="Aurora, waking", known=_SEEN),
    _connecting(UNREACHABLE, ConnectionError, "TLS refused, while waking up", text=_NO_TLS, when=_waking),
    _connecting(UNREACHABLE, _NO_PRIMARY, "`TargetServerAttributeNotMatched`: there is no primary yet"),
    _connecting(UNREACHABLE, _TLS_CUT_OFF, "closed during the TLS handshake"),
    _connecting(PERMANENT, ssl.SSLError, "certificate, TLS version or TLS itself refused"),
    # asyncpg before 0.32 takes an error in answer to its wish for TLS for a refusal of TLS.
    _connecting(UNREACHABLE, ConnectionError, "no TLS, nor none", text=_NO_TLS, when=_tls_optional, only_for=_IN_DOUBT),
    _connecting(PERMANENT, ConnectionError, "`rejected SSL upgrade`", text=_NO_TLS),
    _connecting(PERMANENT, _NO_SUCH_PLACE, "missing socket or file, no permission, a host name that cannot be encoded"),
    _connecting(UNREACHABLE, OSError, "refused, reset, no route, name not resolved, timed out"),
    _connecting(OVERLOADED, "53000 53100 53200 53400", "no room for one more connection now", where=LOST_CONNECTING),
    _connecting(OVERLOADED, "57014", "longer than authentication_timeout", where=LOST_CONNECTING, when=_fatal),
    _connecting(UNREACHABLE, "40001 40P01", "`init` was in the way of a standby's recovery", where=LOST_CONNECTING),
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
    _refused(WRONG_SERVER, "25006", "read-only, unasked, by no setting: the old primary", then=EXPIRE, when=_demoted),
    _refused(STATEMENT_CACHE, "26000 42P05", "the prepared statement is missing, or there already", when=_own),
    # What was created anew is out of date on every connection: the others would fail one after the other.
    _refused(STATEMENT_CACHE, _OLD_PLAN, "`InvalidCachedStatementError`: a cached plan is outdated", then=EXPIRE),
    # The first is an internal error: never translated.
    _outdated("XX000", says="cache lookup failed for type ", when=_own),
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
    _rule(PERMANENT, "", "an ERROR that says nothing of a COMMIT: 08, 57P, 58, XX", where=COMMITTING, when=_no_refusal),
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
        connecting = failure.phase is Phase.CONNECT and not failure.initializing
        if connecting and not isinstance(inner, (OSError, *_SPEAKING)):
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
    """
    return isinstance(error, driver.PostgresError) and _sqlstate_of(error)[:2] in _REFUSALS_FOR_GOOD


def _see(failure: Failure, error: BaseException) -> Sighting:
    """Find what speaks for a failure, once it is unwrapped, and whether the connection is gone."""
    last_word, sqlstate, severity = error, _sqlstate_of(error), _severity_of(error)
    lost = _is_loss(error, sqlstate, severity)
    if isinstance(error, driver.ConnectionDoesNotExistError):
        behind = (cause for cause in causes(error) if cause is not error)
        last_word = next((cause for cause in behind if isinstance(cause, driver.PostgresError)), error)
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


def causes(error: BaseException | None) -> Iterator[BaseException]:
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
_REFUSED_CREDENTIALS = r"""(?xi)^(
        (?!.*\bcompeting\ requests)[^:"]*\bauthentication\ failed\b  # PostgreSQL, RDS, Cloud SQL, PgBouncer, Neon
      | auth(?:entication)?\ failed$  # PgBouncer before 1.9
      | (?:odyssey:\ \S+\ )?incorrect\ password
      | password\ for\ user\ "  # PgDog
      | The\ password\ that\ was\ provided\ for\ the\ role\   # RDS Proxy
      | unable\ to\ accept\ connection,\ access\ denied  # Aurora DSQL
      | The\ access\ token\ has\ expired  # Azure
      | (?:Failed\ to\ identify\ your\ database:\ )?Your\ Postgres\ credentials\ are\ incorrect  # Prisma
    )"""
# 08006 is Aurora DSQL's, XX000 Neon's and Supavisor's, 58000 PgDog's; some send none at all.
_CODES_OF_REFUSALS = frozenset({"28000", "08P01", "08006", "XX000", "58000", ""})


def refuses_credentials(error: BaseException) -> bool:
    """Say whether a server or a pooler has refused a user name or a password, so that another one may be accepted.

    Returns:
        `True` for 28P01; for 28000 and the codes of poolers if the server's function or the message says so. `False` for a
        role or a database that does not exist, and for a host that `pg_hba.conf` does not let in.
    """
    refusal = PostgresClassifier().unwrap(error)
    if not isinstance(refusal, driver.PostgresError):
        return False
    if _sqlstate_of(refusal) == "28P01" or getattr(refusal, "server_source_function", None) == "auth_failed":
        return True
    return (
        _sqlstate_of(refusal) in _CODES_OF_REFUSALS and re.search(_REFUSED_CREDENTIALS, _text_of(refusal)) is not None
    )


# What they say of a user who is no more, or not any longer one.
_REFUSED_USER = r"""(?xi)^(
        role\ ".*"\ (does\ not\ exist|is\ not\ permitted\ to\ log\ in)$
      | no\ such\ user\b  # PgBouncer
      | .*\bTenant\ or\ user\ not\ found  # Supavisor
    )"""


def refuses_user(error: BaseException) -> bool:
    """Say whether a server or a pooler does not know a user, or does not let that one in: another one may be."""
    refusal = PostgresClassifier().unwrap(error)
    if not isinstance(refusal, driver.PostgresError) or _sqlstate_of(refusal) not in _CODES_OF_REFUSALS:
        return False
    if getattr(refusal, "server_source_function", None) == "InitializeSessionUserId":
        return True
    return re.search(_REFUSED_USER, _text_of(refusal)) is not None


def reports_closed_connection(error: BaseException) -> bool:
    """Say whether the driver, and not a server, says that a connection is closed or was lost; it may be any connection."""
    if isinstance(error, driver.ConnectionDoesNotExistError):
        return _severity_of(error) == ""
    return isinstance(error, driver.InterfaceError) and re.search(_CLOSED, _text_of(error)) is not None


def refuses_commit(error: BaseException) -> bool:
    """Say whether an answer to COMMIT is a refusal, so that the transaction is certain to be rolled back.

    Returns:
        `True` for an ERROR of the server's own with a code that is no word about a lost connection. What ends the session
        (a FATAL, also one after which a pooler keeps its client) and what a pooler says for its server are no refusals.
    """
    if not isinstance(error, driver.PostgresError) or _severity_of(error) != "ERROR":
        return False
    return _sqlstate_of(error) != "" and not _sqlstate_of(error).startswith((*_NO_WORD_ABOUT_A_COMMIT, "40003"))
