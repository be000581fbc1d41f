"""The classifier's table, line by line, and how it reads an error and what is behind it."""

from __future__ import annotations

import errno
import json
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from asyncpg import exceptions as driver

from resilient_pool.errors import AcquireTimeoutError, ConfigurationError, OutcomeUnknownError
from resilient_pool.retry import classifier
from resilient_pool.retry.classifier import (
    RULES,
    PostgresClassifier,
    Rule,
    refuses_commit,
    refuses_credentials,
    refuses_user,
    rules_for,
)
from resilient_pool.retry.verdict import Disposition, Failure, Fault, Outcome, Phase, Verdict

KEEP, DISCARD, EXPIRE = Disposition.KEEP, Disposition.DISCARD, Disposition.EXPIRE
CONNECT, CHECKOUT, EXECUTE, COMMIT = Phase
MASK = "cannot call Transaction.__aexit__(): the underlying connection is closed"


def server(sqlstate: str, message: str = "told by the server", severity: str = "ERROR") -> driver.PostgresError:
    """Make an error as asyncpg makes it from what a server sends."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": message}
    error: driver.PostgresError = driver.PostgresError.new(fields)
    return error


def fatal(sqlstate: str, message: str = "told by the server") -> driver.PostgresError:
    return server(sqlstate, message, severity="FATAL")


def raised_in(function: str, sqlstate: str, message: str = "told by the server") -> driver.PostgresError:
    """Make an ERROR with the name of the server's function that raised it."""
    fields = {"S": "ERROR", "V": "ERROR", "C": sqlstate, "M": message, "R": function}
    error: driver.PostgresError = driver.PostgresError.new(fields)
    return error


def loss(cause: BaseException | None = None) -> BaseException:
    """Make the error into which asyncpg turns every loss of a connection in use."""
    error = driver.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    error.__cause__ = cause
    return error


def within(context: BaseException, error: BaseException) -> BaseException:
    """Raise `error` while `context` is being handled, as Python records it."""
    error.__context__ = context
    return error


def raised_from(cause: BaseException | None, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def outdated_plan() -> driver.PostgresError:
    error: driver.PostgresError = driver.PostgresError.new(
        {"S": "FEHLER", "V": "ERROR", "C": "0A000", "M": "in another language", "R": "RevalidateCachedQuery"}
    )
    return error


def silent() -> OSError:
    return TimeoutError(errno.ETIMEDOUT, "Connection timed out")


def classify(error: BaseException, phase: Phase = EXECUTE, **known: bool) -> Verdict:
    return PostgresClassifier().classify(Failure(error=error, phase=phase, **known))


def told(verdict: Verdict) -> str:
    others = "" if verdict.others is KEEP else f" others {verdict.others.name}"
    return f"{verdict.fault.name} {verdict.outcome.name} {verdict.connection.name}{others}"


CONNECTING = {
    # absent, for now
    "refused": (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "UNREACHABLE"),
    "reset": (ConnectionResetError(errno.ECONNRESET, "reset"), "UNREACHABLE"),
    "several addresses, all refused": (OSError("Multiple exceptions: [Errno 111] ..., [Errno 113] ..."), "UNREACHABLE"),
    "name not known": (socket.gaierror(socket.EAI_NONAME, "not known"), "UNREACHABLE"),
    "resolver not there": (socket.gaierror(socket.EAI_AGAIN, "try again"), "UNREACHABLE"),
    "timed out, by our timer": (TimeoutError(), "UNREACHABLE"),
    "timed out, by the kernel": (silent(), "UNREACHABLE"),
    "no route": (OSError(errno.EHOSTUNREACH, "no route"), "UNREACHABLE"),
    "57P03": (fatal("57P03", "the database system is starting up"), "UNREACHABLE"),
    "57P03, in another language": (fatal("57P03", "das Datenbanksystem startet"), "UNREACHABLE"),
    "57P01": (fatal("57P01"), "UNREACHABLE"),
    "closed in the handshake": (loss(), "UNREACHABLE"),
    "reset in the handshake": (loss(ConnectionResetError()), "UNREACHABLE"),
    "shut down in the handshake": (loss(fatal("57P01")), "UNREACHABLE"),
    "57P05 while being set up": (loss(fatal("57P05")), "UNREACHABLE"),
    "closed while being set up": (driver.InterfaceError("connection is closed"), "UNREACHABLE"),
    "half-way while being set up": (driver.InternalClientError("cannot switch to state 11; ..."), "UNREACHABLE"),
    "refused, then reset with the other TLS mode": (
        raised_from(fatal("28P01"), ConnectionResetError(errno.ECONNRESET, "reset")),
        "UNREACHABLE",
    ),
    "closed in the TLS handshake": (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), "UNREACHABLE"),
    "no primary yet": (driver.TargetServerAttributeNotMatched("None of the hosts match"), "UNREACHABLE"),
    "pooler cannot log in": (fatal("08P01", "server login has been failing, try again later"), "UNREACHABLE"),
    "pooler lost its server": (fatal("08P01", "server conn crashed?"), "UNREACHABLE"),
    # no room
    "53300": (fatal("53300", "sorry, too many clients already"), "OVERLOADED"),
    "pooler is full": (fatal("08P01", "no more connections allowed (max_client_conn)"), "OVERLOADED"),
    "53300 lost in a pooler": (fatal("08P01", "sorry, too many clients already"), "OVERLOADED"),
    "pooler queue too long": (fatal("08P01", "query_wait_timeout"), "OVERLOADED"),
    "PgDog is down": (fatal("58000", 'connection pool for user "app" and database "shop" is down'), "UNREACHABLE"),
    "PgCat shuts down": (fatal("58000", "terminating connection due to administrator command"), "UNREACHABLE"),
    "a waking Neon compute": (server("XX000", "Couldn't connect to compute node"), "UNREACHABLE"),
    "Neon's compute says": (server("XX000", "the database system is starting up"), "UNREACHABLE"),
    "Neon's control plane": (server("XX000", "Control plane request failed"), "UNREACHABLE"),
    "Supavisor's breaker": (
        fatal("XX000", "(ECIRCUITBREAKER) too many failures, new connections are temporarily blocked"),
        "UNREACHABLE",
    ),
    "too slow a login": (fatal("57014", "canceling authentication due to timeout"), "OVERLOADED"),
    "a recovery conflict in init": (loss(fatal("40001")), "UNREACHABLE"),
    "53100": (fatal("53100", "could not write init file"), "OVERLOADED"),
    "53200": (fatal("53200", "out of memory"), "OVERLOADED"),
    "53400": (fatal("53400", "Unable to accept connection, rate exceeded."), "OVERLOADED"),
    "Neon is full": (
        server("XX000", "Failed to acquire permit to connect to the database. Too many ..."),
        "OVERLOADED",
    ),
    "Neon's compute is full": (server("XX000", "sorry, too many clients already"), "OVERLOADED"),
    "Supavisor is full": (
        fatal("XX000", "(EMAXCONNSESSION) max clients reached in session mode"),
        "OVERLOADED",
    ),
    "an older Supavisor is full": (fatal("XX000", "Max client connections reached"), "OVERLOADED"),
    # an ERROR: the application's `init` has failed
    "init, 40001": (server("40001"), "CONTENTION"),
    "init, 40P01": (server("40P01"), "CONTENTION"),
    "init, 53200": (server("53200"), "OVERLOADED"),
    "init, temp_file_limit": (server("53400", "temporary file size exceeds temp_file_limit (1024kB)"), "PERMANENT"),
    "init, 26000": (server("26000"), "STATEMENT_CACHE"),
    "init, 25006": (server("25006"), "PERMANENT"),
    "init, 42P01": (server("42P01"), "PERMANENT"),
    "init, 57014": (server("57014"), "PERMANENT"),
    # final
    "a wrong password at Neon": (server("XX000", "password authentication failed for user 'app'"), "PERMANENT"),
    "Neon's endpoint is disabled": (server("XX000", "Control plane request failed: endpoint is disabled"), "PERMANENT"),
    "Supavisor's breaker, wrong passwords": (
        fatal("XX000", "(ECIRCUITBREAKER) too many authentication failures, new connections are temporarily blocked"),
        "PERMANENT",
    ),
    "58000": (fatal("58000", "No pool configured for database: shop, user: app"), "PERMANENT"),
    "certificate": (ssl.SSLCertVerificationError(1, "certificate verify failed"), "PERMANENT"),
    "TLS version": (ssl.SSLError(1, "no ciphers available"), "PERMANENT"),
    "TLS not offered": (ConnectionError('PostgreSQL server at "h:5432" rejected SSL upgrade'), "PERMANENT"),
    "socket missing": (FileNotFoundError(errno.ENOENT, "No such file"), "PERMANENT"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), "PERMANENT"),
    "name too long": (UnicodeError("encoding with 'idna' codec failed"), "PERMANENT"),
    "wrong password": (fatal("28P01"), "PERMANENT"),
    "not in pg_hba.conf": (fatal("28000", "no pg_hba.conf entry for host"), "PERMANENT"),
    "no such database": (fatal("3D000"), "PERMANENT"),
    "database closed": (fatal("55000"), "PERMANENT"),
    "pooler has no such database": (fatal("08P01", 'database "nosuchdb" does not exist'), "PERMANENT"),
    "pooler quotes a parameter": (fatal("08P01", "unsupported startup parameter: query_wait_timeout"), "PERMANENT"),
    "wrong arguments": (driver.ClientConfigurationError("invalid DSN"), "PERMANENT"),
}


def test_nothing_ran_when_no_connection_could_be_opened() -> None:
    """Each way of not getting a connection has its fault, and its outcome is always the same."""
    verdicts = {name: classify(error, CONNECT) for name, (error, _) in CONNECTING.items()}
    assert {name: fault for name, (_, fault) in CONNECTING.items()} == {
        name: verdict.fault.name for name, verdict in verdicts.items()
    }
    assert [name for name, verdict in verdicts.items() if verdict.outcome is not Outcome.NOT_EXECUTED] == []


def test_a_host_that_never_answered_condemns_no_open_connection() -> None:
    """Silence expires the other connections when it ended one of them, not when none could be opened."""
    assert told(classify(silent(), CONNECT)) == "UNREACHABLE NOT_EXECUTED DISCARD"
    assert told(classify(loss(silent()), CONNECT)) == "UNREACHABLE NOT_EXECUTED DISCARD"


WAKING = {
    "not in pg_hba.conf": (fatal("28000", "no pg_hba.conf entry for host"), "UNREACHABLE"),
    "TLS not offered": (ConnectionError('PostgreSQL server at "h:5432" rejected SSL upgrade'), "UNREACHABLE"),
    "53300": (fatal("53300"), "OVERLOADED"),
    "refused by pg_hba.conf": (fatal("28000", "pg_hba.conf rejects connection for host"), "PERMANENT"),
    "role may not log in": (fatal("28000", 'role "u" is not permitted to log in'), "PERMANENT"),
    "wrong password": (fatal("28P01"), "PERMANENT"),
    "no such database": (fatal("3D000"), "PERMANENT"),
}


def test_a_server_that_executes_is_awake() -> None:
    """What a waking server is forgiven while connecting is final in any other phase."""
    for error in (server("28000", "no pg_hba.conf entry"), ConnectionError("rejected SSL upgrade")):
        assert classify(error, EXECUTE, waking=True).fault is Fault.PERMANENT


@pytest.mark.parametrize(("error", "fault"), WAKING.values(), ids=WAKING)
def test_a_waking_server_is_forgiven_no_more_than_it_needs(error: BaseException, fault: str) -> None:
    """Inside the wake window a refusal that a waking server utters counts as absence, and no other does."""
    assert fault == classify(error, CONNECT, waking=True).fault.name


EXECUTING = {
    # had died before
    "closed": (driver.InterfaceError("connection is closed"), "STALE NOT_EXECUTED DISCARD"),
    "closed, at the state check": (
        driver.InterfaceError("cannot perform operation: connection is closed"),
        "STALE NOT_EXECUTED DISCARD",
    ),
    "closed, under a prepared statement": (
        driver.InterfaceError("cannot call PreparedStatement.fetch(): the underlying connection is closed"),
        "STALE NOT_EXECUTED DISCARD",
    ),
    "57P05 behind a loss": (loss(fatal("57P05")), "STALE NOT_EXECUTED DISCARD"),
    "57P05": (fatal("57P05"), "STALE NOT_EXECUTED DISCARD"),
    # lost on the way
    "08003": (loss(), "DISCONNECTED UNKNOWN DISCARD"),
    "08003 after a reset": (loss(ConnectionResetError()), "DISCONNECTED UNKNOWN DISCARD"),
    "08003 after a broken pipe": (loss(BrokenPipeError()), "DISCONNECTED UNKNOWN DISCARD"),
    "08003 after silence": (loss(silent()), "DISCONNECTED UNKNOWN DISCARD others EXPIRE"),
    "silence behind the server's last word": (
        loss(raised_from(silent(), fatal("57P01"))),
        "DISCONNECTED UNKNOWN DISCARD others EXPIRE",
    ),
    "57P01 behind a loss": (loss(fatal("57P01")), "DISCONNECTED UNKNOWN DISCARD"),
    "57P01": (fatal("57P01"), "DISCONNECTED UNKNOWN DISCARD"),
    "57P02": (fatal("57P02"), "DISCONNECTED UNKNOWN DISCARD"),
    "XXA00, committed": (
        server("XXA00", "transaction committed but schema change aborted"),
        "PERMANENT UNKNOWN DISCARD",
    ),
    "Odyssey lost its server": (
        server("08006", "odyssey: c1a2: remote server read/write error s3"),
        "DISCONNECTED UNKNOWN DISCARD",
    ),
    "CockroachDB shuts down": (server("57P01", "server is shutting down"), "DISCONNECTED UNKNOWN DISCARD"),
    "YugabyteDB cannot tell": (
        server("XX000", "Timed out: Perform RPC (request call id 3)"),
        "DISCONNECTED UNKNOWN DISCARD",
    ),
    "25P03 behind a loss": (loss(fatal("25P03")), "PERMANENT UNKNOWN DISCARD"),
    "25P04 behind a loss": (loss(fatal("25P04")), "PERMANENT UNKNOWN DISCARD"),
    "a pooler's idle transaction": (loss(fatal("08P01", "idle transaction timeout")), "PERMANENT UNKNOWN DISCARD"),
    "PgDog's idle transaction": (
        loss(fatal("57P05", "disconnecting idle in transaction client")),
        "PERMANENT UNKNOWN DISCARD",
    ),
    "recovery conflict as a FATAL": (fatal("40001"), "DISCONNECTED UNKNOWN DISCARD"),
    "recovery conflict behind a loss": (loss(server("40001")), "DISCONNECTED UNKNOWN DISCARD"),
    "an ERROR, then a loss": (loss(server("23505")), "DISCONNECTED UNKNOWN DISCARD"),
    "out of memory as a FATAL": (loss(fatal("53200")), "DISCONNECTED UNKNOWN DISCARD"),
    "read-only behind a loss": (loss(server("25006")), "DISCONNECTED UNKNOWN DISCARD"),
    "26000 behind a loss": (loss(server("26000")), "DISCONNECTED UNKNOWN DISCARD"),
    "a cached plan behind a loss": (loss(outdated_plan()), "DISCONNECTED UNKNOWN DISCARD"),
    "57P03 behind a loss": (loss(fatal("57P03", "the database system is starting up")), "DISCONNECTED UNKNOWN DISCARD"),
    "any other FATAL": (fatal("XX000", "cache lookup failed for type 1"), "DISCONNECTED UNKNOWN DISCARD"),
    "40003": (server("40003"), "DISCONNECTED UNKNOWN DISCARD"),
    "08007": (server("08007"), "DISCONNECTED UNKNOWN DISCARD"),
    "reset, bare": (ConnectionResetError(errno.ECONNRESET, "reset"), "DISCONNECTED UNKNOWN DISCARD"),
    "silence, bare": (silent(), "DISCONNECTED UNKNOWN DISCARD others EXPIRE"),
    "masked by the transaction": (within(loss(), driver.InterfaceError(MASK)), "DISCONNECTED UNKNOWN DISCARD"),
    "masked, with nothing behind": (driver.InterfaceError(MASK), "DISCONNECTED UNKNOWN DISCARD"),
    "masked silence": (
        within(loss(silent()), driver.InterfaceError(MASK)),
        "DISCONNECTED UNKNOWN DISCARD others EXPIRE",
    ),
    "pooler lost its server": (loss(fatal("08P01", "server conn crashed?")), "DISCONNECTED UNKNOWN DISCARD"),
    "pooler's query timeout": (loss(fatal("08P01", "query timeout")), "DISCONNECTED UNKNOWN DISCARD"),
    "pooler's database removed": (loss(fatal("08P01", "database removed")), "DISCONNECTED UNKNOWN DISCARD"),
    "half-way": (
        driver.InternalClientError("cannot switch to state 11; another operation (2) is in progress"),
        "POISONED UNKNOWN DISCARD",
    ),
    "half-way, failed": (
        driver.InternalClientError('cannot switch to state 11; protocol is in the "failed" state'),
        "POISONED UNKNOWN DISCARD",
    ),
    "half-way, not connected": (driver.InternalClientError("not connected"), "POISONED UNKNOWN DISCARD"),
    # never given to a server
    "pooler's queue": (loss(fatal("08P01", "query_wait_timeout")), "OVERLOADED NOT_EXECUTED DISCARD"),
    "pooler's queue, newer": (loss(fatal("57014", "query_wait_timeout")), "OVERLOADED NOT_EXECUTED DISCARD"),
    "pooler cannot log in": (
        loss(fatal("08P01", "server login has been failing, try again later (server_login_retry)")),
        "UNREACHABLE NOT_EXECUTED DISCARD",
    ),
    "PgCat, on a connection that lives": (
        fatal("58000", "could not get connection from the pool - AllServersDown"),
        "OVERLOADED NOT_EXECUTED DISCARD",
    ),
    "PgDog": (server("58000", "checkout timeout"), "OVERLOADED NOT_EXECUTED DISCARD"),
    "PgDog, replicas": (server("58000", "replica checkout timeout"), "OVERLOADED NOT_EXECUTED DISCARD"),
    "PgDog, down": (
        server("58000", 'connection pool for user "app" and database "shop" is down'),
        "UNREACHABLE NOT_EXECUTED DISCARD",
    ),
    "PgDog, no primary": (loss(fatal("58000", "no primary")), "UNREACHABLE NOT_EXECUTED DISCARD"),
    "PgCat, from a server": (loss(fatal("58000", "error receiving data from server")), "DISCONNECTED UNKNOWN DISCARD"),
    "Supavisor's queue": (
        loss(fatal("XX000", "(ECHECKOUTTIMEOUT) unable to check out connection from the pool after 60000ms")),
        "OVERLOADED NOT_EXECUTED DISCARD",
    ),
    "53300 behind a loss": (loss(fatal("53300")), "OVERLOADED NOT_EXECUTED DISCARD"),
    # curable, on a connection that lives
    "53300, another server's": (server("53300"), "OVERLOADED ROLLED_BACK KEEP"),
    "40001": (server("40001"), "CONTENTION ROLLED_BACK KEEP"),
    "40P01": (server("40P01"), "CONTENTION ROLLED_BACK KEEP"),
    "53100": (server("53100"), "OVERLOADED ROLLED_BACK KEEP"),
    "53200": (server("53200"), "OVERLOADED ROLLED_BACK KEEP"),
    "53400": (server("53400", "all replication slots are in use"), "OVERLOADED ROLLED_BACK KEEP"),
    "25006": (server("25006"), "WRONG_SERVER NOT_EXECUTED DISCARD others EXPIRE"),
    "26000": (server("26000"), "STATEMENT_CACHE NOT_EXECUTED DISCARD"),
    "42P05": (server("42P05"), "STATEMENT_CACHE NOT_EXECUTED DISCARD"),
    "0A000, the cached plan": (outdated_plan(), "STATEMENT_CACHE NOT_EXECUTED DISCARD others EXPIRE"),
    "XX000, a type": (
        server("XX000", "cache lookup failed for type 16450"),
        "STATEMENT_CACHE ROLLED_BACK DISCARD others EXPIRE",
    ),
    "42704, a type": (
        server("42704", "type with OID 16450 does not exist"),
        "STATEMENT_CACHE ROLLED_BACK DISCARD others EXPIRE",
    ),
    "42804, a field of an argument": (
        raised_in("record_recv", "42804", "in another language"),
        "STATEMENT_CACHE ROLLED_BACK DISCARD others EXPIRE",
    ),
    "a composite type": (
        driver.OutdatedSchemaCacheError("unexpected"),
        "STATEMENT_CACHE UNKNOWN DISCARD others EXPIRE",
    ),
    # for the application
    "temp_file_limit": (
        server("53400", 'die Größe der temporären Datei überschreitet "temp_file_limit" (1024kB)'),
        "PERMANENT ROLLED_BACK KEEP",
    ),
    "42804": (server("42804"), "PERMANENT ROLLED_BACK KEEP"),
    "42704": (server("42704", 'type "mood" does not exist'), "PERMANENT ROLLED_BACK KEEP"),
    "23505": (server("23505"), "PERMANENT ROLLED_BACK KEEP"),
    "22012": (server("22012"), "PERMANENT ROLLED_BACK KEEP"),
    "42P01": (server("42P01"), "PERMANENT ROLLED_BACK KEEP"),
    "55P03": (server("55P03"), "PERMANENT ROLLED_BACK KEEP"),
    "57014": (server("57014", "canceling statement due to statement timeout"), "PERMANENT ROLLED_BACK KEEP"),
    "0A000, anything else": (server("0A000"), "PERMANENT ROLLED_BACK KEEP"),
    "XX000, anything else": (server("XX000", "cache lookup failed for relation 1"), "PERMANENT ROLLED_BACK KEEP"),
    "P0001": (server("P0001"), "PERMANENT ROLLED_BACK KEEP"),
    "a code unknown to the driver": (server("ZZ999"), "PERMANENT ROLLED_BACK KEEP"),
    "another server's loss": (server("08006", "could not receive data"), "PERMANENT ROLLED_BACK KEEP"),
    "08P01 as an ERROR": (server("08P01", "bind message supplies 1 parameters"), "PERMANENT ROLLED_BACK DISCARD"),
    "08P01, no server's": (driver.ProtocolViolationError("query_wait_timeout"), "PERMANENT UNKNOWN DISCARD"),
    "08P01, a function's own": (server("08P01", "server conn crashed?"), "PERMANENT ROLLED_BACK DISCARD"),
    "57014, a function's own": (server("57014", "query_wait_timeout"), "PERMANENT ROLLED_BACK KEEP"),
    "57P05, a function's own": (server("57P05"), "PERMANENT ROLLED_BACK KEEP"),
    "login failing, a function's own": (
        server("08P01", "server login has been failing"),
        "PERMANENT ROLLED_BACK DISCARD",
    ),
    "28000, a function's own": (server("28000", "no pg_hba.conf entry"), "PERMANENT ROLLED_BACK KEEP"),
    "TLS trouble, bare": (ssl.SSLError(1, "bad record mac"), "PERMANENT UNKNOWN DISCARD"),
    "TLS ended, bare": (ssl.SSLEOFError(8, "EOF occurred"), "PERMANENT UNKNOWN DISCARD"),
    "somebody else's refused TLS": (ConnectionError("rejected SSL upgrade"), "PERMANENT UNKNOWN DISCARD"),
    "the driver's own": (driver.InternalClientError("no binary format encoder"), "PERMANENT UNKNOWN DISCARD"),
    "no primary": (driver.TargetServerAttributeNotMatched("None of the hosts"), "PERMANENT UNKNOWN DISCARD"),
    "the caller's time-out": (TimeoutError(), "PERMANENT UNKNOWN DISCARD"),
    "busy": (
        driver.InterfaceError("cannot perform operation: another operation is in progress"),
        "PERMANENT NOT_EXECUTED KEEP",
    ),
    "given back": (
        driver.InterfaceError("cannot call Connection.fetch(): connection has been released back to the pool"),
        "PERMANENT NOT_EXECUTED KEEP",
    ),
    "an argument that cannot be encoded": (driver.DataError("invalid input for query"), "PERMANENT UNKNOWN DISCARD"),
    "wrong use": (driver.InterfaceError("the server expects 1 argument"), "PERMANENT UNKNOWN DISCARD"),
    "a file to copy from is missing": (FileNotFoundError(errno.ENOENT, "No such file"), "PERMANENT UNKNOWN DISCARD"),
    "somebody else's refused connection": (
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        "PERMANENT UNKNOWN DISCARD",
    ),
    "the application's": (ValueError("ours"), "PERMANENT UNKNOWN DISCARD"),
    "an error without a message": (driver.PostgresError(), "PERMANENT UNKNOWN DISCARD"),
    "no connection became free": (AcquireTimeoutError(), "PERMANENT NOT_EXECUTED KEEP"),
    "configuration": (ConfigurationError("no"), "PERMANENT NOT_EXECUTED KEEP"),
    "outcome unknown": (OutcomeUnknownError("execute"), "PERMANENT UNKNOWN DISCARD"),
}


def test_a_statement_that_failed_has_its_verdict() -> None:
    """Each way in which a statement can fail, with what becomes of its connection and of the others."""
    assert {name: expected for name, (_, expected) in EXECUTING.items()} == {
        name: told(classify(error)) for name, (error, _) in EXECUTING.items()
    }


LOSSES = {
    "08003": loss(),
    "57P01": loss(fatal("57P01")),
    "57P05": loss(fatal("57P05")),
    "the pooler's queue": loss(fatal("08P01", "query_wait_timeout")),
    "53300": loss(fatal("53300")),
    "closed": driver.InterfaceError("connection is closed"),
    "closed transaction": driver.InterfaceError(
        "cannot call Transaction.commit(): the underlying connection is closed"
    ),
    "reset": ConnectionResetError(),
    "recovery conflict": loss(fatal("40001")),
    "40003": server("40003"),
    "08007": server("08007"),
}


@pytest.mark.parametrize("sent", [True, False])
def test_whatever_is_lost_during_a_commit_leaves_it_open(*, sent: bool) -> None:
    """No reason for a loss, not even one that exonerates a statement, says anything about a COMMIT."""
    assert dict.fromkeys(LOSSES, "DISCONNECTED UNKNOWN DISCARD") == {
        name: told(classify(error, COMMIT, sent=sent)) for name, error in LOSSES.items()
    }


ANSWERS_TO_COMMIT = {
    "serialization": (server("40001"), "CONTENTION ROLLED_BACK KEEP"),
    "deferred constraint": (server("23505"), "PERMANENT ROLLED_BACK KEEP"),
    "time-out": (TimeoutError(), "PERMANENT UNKNOWN DISCARD"),
    "half-way": (driver.InternalClientError("cannot switch to state 11; ..."), "POISONED UNKNOWN DISCARD"),
}


@pytest.mark.parametrize(("error", "expected"), ANSWERS_TO_COMMIT.values(), ids=ANSWERS_TO_COMMIT)
def test_an_answer_to_a_commit_is_believed(error: BaseException, expected: str) -> None:
    """An ERROR in reply to COMMIT means that nothing was committed; anything else leaves it open."""
    assert expected == told(classify(error, COMMIT))


UNSENT = {
    "08003": (loss(), "STALE NOT_EXECUTED DISCARD"),
    "57P01": (loss(fatal("57P01")), "STALE NOT_EXECUTED DISCARD"),
    "reset": (ConnectionResetError(), "STALE NOT_EXECUTED DISCARD"),
    "silence": (loss(silent()), "STALE NOT_EXECUTED DISCARD others EXPIRE"),
    "closed": (driver.InterfaceError("connection is closed"), "STALE NOT_EXECUTED DISCARD"),
    "half-way": (driver.InternalClientError("cannot switch to state 11; ..."), "POISONED NOT_EXECUTED DISCARD"),
    "the pooler's queue": (loss(fatal("08P01", "query_wait_timeout")), "OVERLOADED NOT_EXECUTED DISCARD"),
}


@pytest.mark.parametrize(("error", "expected"), UNSENT.values(), ids=UNSENT)
@pytest.mark.parametrize("known", [{"phase": EXECUTE, "sent": False}, {"phase": CHECKOUT}], ids=["unsent", "checkout"])
def test_a_loss_before_anything_was_sent_is_a_stale_connection(
    error: BaseException, expected: str, known: dict[str, object]
) -> None:
    """What died before it was used is stale, whether the check before use noticed or the first write would have."""
    assert expected == told(classify(error, **known))  # type: ignore[arg-type]


def test_a_check_that_gets_no_answer_in_time_means_a_stale_connection() -> None:
    """A peer that vanished silently answers no ping."""
    assert told(classify(TimeoutError(), CHECKOUT)) == "STALE NOT_EXECUTED DISCARD"


def test_an_error_in_the_users_own_setup_is_the_applications() -> None:
    """A `setup` callback that fails while a connection is checked out is not cured by another connection."""
    assert told(classify(server("42P01"), CHECKOUT)) == "PERMANENT NOT_EXECUTED KEEP"


@pytest.mark.parametrize("phase", [CONNECT, CHECKOUT])
def test_before_a_statement_was_sent_it_never_ran(phase: Phase) -> None:
    """In the phases before EXECUTE the outcome does not depend on the error."""
    assert dict.fromkeys(EXECUTING, Outcome.NOT_EXECUTED) == {
        name: classify(error, phase).outcome for name, (error, _) in EXECUTING.items()
    }


def test_a_read_only_server_is_the_right_one_for_a_pool_that_only_reads() -> None:
    """25006 condemns a server only where the pool expects to write."""
    assert told(classify(server("25006"), writable=False)) == "PERMANENT ROLLED_BACK KEEP"


READ_ONLY = {
    "nothing else known": ({}, "WRONG_SERVER NOT_EXECUTED DISCARD others EXPIRE"),
    "a standby": ({"in_recovery": True}, "WRONG_SERVER NOT_EXECUTED DISCARD others EXPIRE"),
    "no standby, but a full disk": ({"in_recovery": False}, "PERMANENT ROLLED_BACK KEEP"),
    "asked for": ({"read_only_asked": True}, "PERMANENT ROLLED_BACK KEEP"),
    "asked for, on a standby": ({"read_only_asked": True, "in_recovery": True}, "PERMANENT ROLLED_BACK KEEP"),
    "while connecting, on a standby": (
        {"phase": CONNECT, "in_recovery": True},
        "WRONG_SERVER NOT_EXECUTED DISCARD others EXPIRE",
    ),
}


@pytest.mark.parametrize(("known", "expected"), READ_ONLY.values(), ids=READ_ONLY)
def test_a_refusal_to_write_is_a_failover_only_where_read_only_is_news(known: dict[str, object], expected: str) -> None:
    """It is the caller's error if read-only was asked for, or if any other server would be read-only as well."""
    assert expected == told(classify(server("25006"), **known))  # type: ignore[arg-type]


FOREIGN = {
    "25006": "PERMANENT ROLLED_BACK KEEP",
    "26000": "PERMANENT ROLLED_BACK KEEP",
    "42P05": "PERMANENT ROLLED_BACK KEEP",
    "08006": "PERMANENT ROLLED_BACK KEEP",
    "57P01": "PERMANENT ROLLED_BACK KEEP",
    "57P03": "PERMANENT ROLLED_BACK KEEP",
    "57P05": "PERMANENT ROLLED_BACK KEEP",
    "XX000": "PERMANENT ROLLED_BACK KEEP",
    "40001": "CONTENTION ROLLED_BACK KEEP",
    "53300": "OVERLOADED ROLLED_BACK KEEP",
}


@pytest.mark.parametrize("function", ["pgfdw_report_error", "dblink_res_error"])
def test_what_a_foreign_tables_server_says_is_not_about_this_one(function: str) -> None:
    """Neither this connection nor the others are given up for it; a conflict there is cured by repeating here."""
    message = "cache lookup failed for type 16450"
    verdicts = {state: told(classify(raised_in(function, state, message))) for state in FOREIGN}
    assert verdicts == FOREIGN


def test_a_foreign_server_that_is_away_keeps_no_connection_from_being_opened() -> None:
    """An `init` that looks at a foreign table fails by itself: waiting for this server would not end."""
    away = [raised_in("connect_pg_server", "08001"), raised_in("dblink_get_conn", "08001")]
    away += [raised_in("pgfdw_report_error", state) for state in ("57P01", "57P03", "08006")]
    assert {classify(error, CONNECT).fault for error in away} == {Fault.PERMANENT}


def test_a_limit_on_transactions_that_ended_an_idle_connection_left_it_stale() -> None:
    """Nothing was sent on it yet, so whatever ended it is cured by another connection."""
    assert told(classify(loss(fatal("25P03")), sent=False)) == "STALE NOT_EXECUTED DISCARD"


def test_a_severity_in_another_language_is_still_understood() -> None:
    """The severity that is not translated decides; without it a code that ends a session does."""
    german = driver.PostgresError.new({"S": "SCHWERWIEGEND", "V": "FATAL", "C": "53200", "M": "Speicher aufgebraucht"})
    old_french = driver.PostgresError.new({"S": "FATALE", "C": "57P01", "M": "arrêt des connexions"})
    assert {told(classify(german)), told(classify(old_french))} == {"DISCONNECTED UNKNOWN DISCARD"}


# How a chain is read


def test_an_error_raised_from_the_drivers_is_judged_by_the_drivers() -> None:
    """A layer that translates the driver's errors, and says from which, does not hide them."""
    translated = raised_from(raised_from(server("40P01"), RuntimeError("inner")), RuntimeError("outer"))
    assert classify(translated).fault is Fault.CONTENTION


UNRELATED = {
    "a loss": (loss(), "DISCONNECTED UNKNOWN DISCARD"),
    "half-way": (driver.InternalClientError("cannot switch to state 11; ..."), "POISONED UNKNOWN DISCARD"),
    "a masked loss": (driver.InterfaceError(MASK), "DISCONNECTED UNKNOWN DISCARD"),
    "a time-out": (TimeoutError(), "PERMANENT UNKNOWN DISCARD"),
    "the application's": (ValueError("ours"), "PERMANENT UNKNOWN DISCARD"),
    "a constraint": (server("23505"), "PERMANENT ROLLED_BACK KEEP"),
}


@pytest.mark.parametrize(("error", "expected"), UNRELATED.values(), ids=UNRELATED)
@pytest.mark.parametrize("handled", [loss(fatal("57P05")), driver.InterfaceError("connection is closed")])
def test_what_was_being_handled_meanwhile_exonerates_nothing(
    handled: BaseException, error: BaseException, expected: str
) -> None:
    """An INSERT lost inside `except` of a stale connection is not itself stale, though that is its `__context__`."""
    assert expected == told(classify(within(handled, error)))


def test_an_unknown_outcome_is_final_however_it_is_wrapped() -> None:
    """An `OutcomeUnknownError` is never curable: not by its cause, not from behind, not by a rule that takes all."""
    unknown = raised_from(loss(fatal("57P05")), OutcomeUnknownError("execute"))
    wrapped = raised_from(unknown, RuntimeError("the application's"))
    stale = Verdict(fault=Fault.STALE, outcome=Outcome.NOT_EXECUTED)
    taking_all = PostgresClassifier().with_rule(lambda _: True, stale)
    for error in (unknown, wrapped):
        failure = Failure(error=error, phase=EXECUTE)
        assert told(taking_all.classify(failure)) == "PERMANENT UNKNOWN DISCARD"


def test_an_unknown_outcome_being_handled_does_not_stop_the_next_operation() -> None:
    """After an unknown outcome the application may ask the database what became of it."""
    error = within(OutcomeUnknownError("execute"), driver.InterfaceError("connection is closed"))
    assert classify(error).fault is Fault.STALE


def test_a_chain_that_bites_its_tail_is_read_once() -> None:
    """A cycle of causes ends."""
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert classify(first).fault is Fault.PERMANENT


# Errors that wrap the driver's


class Translated(Exception):
    """What a library raises in the driver's place, with the driver's error in an attribute, as SQLAlchemy does."""

    def __init__(self, orig: object) -> None:
        super().__init__("translated")
        self.orig = orig


class Enveloped(Exception):
    """An application's own, which keeps the driver's error where only the application knows."""

    def __init__(self, letter: BaseException) -> None:
        super().__init__("enveloped")
        self.letter = letter


def test_an_error_inside_another_is_found() -> None:
    """Through `__cause__`, through SQLAlchemy's `.orig`, and through both in turn, nearest first."""
    conflict = server("40001")
    unwrap = PostgresClassifier().unwrap
    assert unwrap(conflict) is conflict
    assert unwrap(raised_from(conflict, RuntimeError())) is conflict
    assert unwrap(Translated(conflict)) is conflict
    assert unwrap(Translated(raised_from(conflict, RuntimeError("the library's DBAPI")))) is conflict
    assert unwrap(raised_from(server("23505"), Translated(conflict))) is not conflict
    assert classify(Translated(conflict)).fault is Fault.CONTENTION


def test_this_packages_errors_are_found_as_well() -> None:
    """An unknown outcome that SQLAlchemy wraps stays one."""
    unknown = OutcomeUnknownError("execute")
    assert PostgresClassifier().unwrap(Translated(unknown)) is unknown


def test_what_wraps_nothing_is_returned_as_it_is() -> None:
    """An error being handled meanwhile, an `orig` of another kind and an error of the system's are not looked through."""
    for error in (
        within(loss(), ValueError()),
        Translated("text"),
        Translated(ValueError()),
        raised_from(loss(), OSError()),
    ):
        assert PostgresClassifier().unwrap(error) is error


def test_an_application_can_open_its_own_wrappers() -> None:
    """The constructor's `unwrap` is asked beside the built-in ways, and kept by a classifier with further rules."""

    def open_letter(error: BaseException) -> BaseException | None:
        return error.letter if isinstance(error, Enveloped) else None

    conflict = server("40001")
    own = PostgresClassifier(unwrap=open_letter).with_rule(is_ours, BUSY)
    assert PostgresClassifier().unwrap(Enveloped(conflict)) is not conflict
    assert own.unwrap(Enveloped(raised_from(Enveloped(conflict), ValueError()))) is conflict
    assert own.classify(Failure(error=Enveloped(conflict), phase=EXECUTE)).fault is Fault.CONTENTION


# Credentials

REFUSED = {
    "28P01, in another language": server("28P01", "Passwort-Authentifizierung fehlgeschlagen", "FATAL"),
    "RDS with IAM": fatal("28000", 'PAM authentication failed for user "app"'),
    "LDAP": fatal("28000", 'LDAP authentication failed for user "app"'),
    "Cloud SQL with IAM": fatal("28000", 'Cloud SQL IAM user authentication failed for user "app@example.com"'),
    "RDS Proxy": fatal("28000", "The IAM authentication failed for the role app. Check the IAM token for this user."),
    "RDS Proxy, a password": fatal("28000", "The password that was provided for the role app is wrong."),
    "PgBouncer": fatal("08P01", "password authentication failed"),
    "PgBouncer, SCRAM": fatal("08P01", "SASL authentication failed"),
    "PgBouncer 1.8": fatal("08P01", "Auth failed"),
    "PgDog": fatal("28000", 'password for user "app" and database "shop" is wrong, or the database does not exist'),
    "Odyssey": fatal("28000", "odyssey: c1a2b3: incorrect password"),
    "Neon": server("XX000", "password authentication failed for user 'app'"),
    "Aurora DSQL": fatal("08006", "unable to accept connection, access denied"),
    "Azure": fatal("28000", "The access token has expired. Please acquire a new token and retry."),
}
NO_SUCH_USER = {
    "dropped": fatal("28000", 'role "v-app-1" does not exist'),
    "locked": fatal("28000", 'role "v-app-1" is not permitted to log in'),
    "PgBouncer": fatal("08P01", "no such user: v-app-1"),
    "Supavisor": fatal("XX000", "(ENOTFOUND) Tenant or user not found"),
}
NOT_REFUSED = {
    "not in pg_hba.conf": fatal("28000", 'no pg_hba.conf entry for host "10.0.0.1", user "app"'),
    "no such role": fatal("28000", 'role "authentication failed" does not exist'),
    "a role that may not log in": fatal("28000", 'role "app" is not permitted to log in'),
    "no such database": fatal("3D000", 'database "password authentication failed" does not exist'),
    "asked too often": fatal("28000", "The IAM authentication failed because of too many competing requests."),
    "blocked for a while": fatal(
        "XX000", "(ECIRCUITBREAKER) too many authentication failures, new connections are blocked"
    ),
    "a pooler's own password": fatal(
        "08P01", "server login has been failing, cached error: password authentication failed"
    ),
    "another code": server("P0001", "password authentication failed"),
    "refused": ConnectionRefusedError(),
    "the driver's own": driver.InterfaceError("password authentication failed"),
}


@pytest.mark.parametrize(
    "cause", [ConnectionRefusedError(111, "refused"), TimeoutError(), socket.gaierror(-3, "later")]
)
def test_what_the_network_said_behind_a_connectors_own_error_is_seen_while_connecting(cause: OSError) -> None:
    """In a block of the application's it may be about anything else."""
    error = raised_from(cause, RuntimeError("the connector's"))
    failures = [Failure(error=error, phase=phase, sent=False) for phase in (Phase.CONNECT, Phase.EXECUTE)]
    faults = [PostgresClassifier().classify(failure).fault for failure in failures]
    assert faults == [Fault.UNREACHABLE, Fault.PERMANENT]
    missing = raised_from(FileNotFoundError(2, "no key", "key.pem"), RuntimeError("the connector's"))
    failure = Failure(error=missing, phase=Phase.CONNECT, sent=False)
    assert PostgresClassifier().classify(failure).fault is Fault.PERMANENT


def test_refused_credentials_are_recognised_in_all_words_in_use() -> None:
    """Also inside the error of a connector that wraps the driver's."""
    assert [name for name, error in REFUSED.items() if not refuses_credentials(error)] == []
    assert refuses_credentials(raised_from(fatal("28P01"), RuntimeError("the connector's")))


def test_a_user_who_is_no_more_is_recognised() -> None:
    """Only credentials that give another user are of use then."""
    assert [name for name, error in NO_SUCH_USER.items() if not refuses_user(error)] == []
    assert [name for name, error in NO_SUCH_USER.items() if refuses_credentials(error)] == []
    assert refuses_user(raised_from(NO_SUCH_USER["dropped"], RuntimeError("the connector's")))
    fields = {"S": "FATAL", "V": "FATAL", "C": "28000", "M": "Rolle gibt es nicht", "R": "InitializeSessionUserId"}
    assert refuses_user(driver.PostgresError.new(fields))
    others = [*NOT_REFUSED, *REFUSED]
    assert not any(refuses_user((NOT_REFUSED | REFUSED)[name]) for name in others if "role" not in name)


def test_the_servers_function_tells_a_refusal_in_any_language() -> None:
    """28000 has other meanings, and the message is translated; the name of the function that raised it is not."""
    fields = {"S": "FATAL", "V": "FATAL", "C": "28000", "M": "PAM-Authentifizierung fehlgeschlagen"}
    assert refuses_credentials(driver.PostgresError.new(fields | {"R": "auth_failed"}))
    assert not refuses_credentials(driver.PostgresError.new(fields | {"R": "ClientAuthentication"}))


def test_other_refusals_are_not_about_credentials() -> None:
    """A new password does not help against them."""
    assert [name for name, error in NOT_REFUSED.items() if refuses_credentials(error)] == []


# COMMIT

REFUSALS_OF_COMMIT = {
    "a deferred constraint": server("23505"),
    "a conflict": server("40001"),
    "a trigger's own": server("P0001"),
    "cancelled": server("57014"),
}
NO_REFUSALS_OF_COMMIT = {
    "PgCat, on a connection that lives": fatal("58000", "error receiving data from server"),
    "PgDog": server("58000", "query timeout"),
    "Odyssey": server("08006", "odyssey: c1: remote server read/write error s2"),
    "CockroachDB shuts down": server("57P01", "server is shutting down"),
    "CockroachDB has committed": server("XXA00", "transaction committed but schema change aborted with error: (23505)"),
    "CockroachDB, a range is not available": server("58C00", "replica unavailable: unable to serve request to r42"),
    "YugabyteDB": server("XX000", "Timed out: Perform RPC"),
    "completion unknown": server("40003"),
    "resolution unknown": server("08007"),
    "a FATAL": fatal("40001"),
    "a loss": loss(server("23505")),
    "the driver's own": driver.InternalClientError("not connected"),
}


def test_only_the_servers_own_error_refuses_a_commit() -> None:
    """Everything else may have been said after the server had committed, or without asking it."""
    assert [name for name, error in REFUSALS_OF_COMMIT.items() if not refuses_commit(error)] == []
    assert [name for name, error in NO_REFUSALS_OF_COMMIT.items() if refuses_commit(error)] == []


def test_what_does_not_refuse_a_commit_promises_nothing_about_it() -> None:
    """The verdict and the single question agree."""
    refused = {name: classify(error, COMMIT).outcome for name, error in REFUSALS_OF_COMMIT.items()}
    assert refused == dict.fromkeys(REFUSALS_OF_COMMIT, Outcome.ROLLED_BACK)
    unknown = {name: classify(error, COMMIT).outcome for name, error in NO_REFUSALS_OF_COMMIT.items()}
    assert unknown == dict.fromkeys(NO_REFUSALS_OF_COMMIT, Outcome.UNKNOWN)


# What applications write

SAYINGS = [rule for rule in RULES if rule.says and rule.service != "PostgreSQL"]


@pytest.mark.parametrize("phase", Phase)
def test_what_an_application_raises_is_never_taken_for_a_proxys_word(phase: Phase) -> None:
    """A function may raise any text with any code, user data in it: the verdict is that of any other text, or promises less."""
    for rule in SAYINGS:
        for sqlstate in sorted(rule.codes) or ["XX000", "58000", "08P01", "08006", "08000", "53100", "57P05", "P0001"]:
            texts = (f"{rule.says.removesuffix('$')}", "any other text")
            raised, other = (raised_in("exec_stmt_raise", sqlstate, text) for text in texts)
            verdicts = [classify(error, phase) for error in (raised, other)]
            lost = [classify(loss(error), phase) for error in (raised, other)]
            assert lost[0] == lost[1] or phase is COMMIT, (rule.evidence, sqlstate)
            if verdicts[0].outcome is not Outcome.UNKNOWN:
                assert verdicts[0] == verdicts[1], (rule.evidence, sqlstate)


def test_an_error_before_a_loss_promises_nothing() -> None:
    """The loss may have another reason, and the error may be about anything."""
    for rule in RULES:
        for sqlstate in rule.codes - {"25P03", "25P04"}:
            error = loss(server(sqlstate, rule.says.removesuffix("$") or "told by the server"))
            if sqlstate not in ("58000", "08000"):  # those that poolers use also in an ERROR
                assert classify(error).outcome is Outcome.UNKNOWN, (rule.evidence, sqlstate)


@pytest.mark.parametrize("wrap", [lambda error: error, loss, lambda error: raised_from(error, RuntimeError())])
@pytest.mark.parametrize("severity", ["ERROR", "FATAL"])
@pytest.mark.parametrize("phase", [EXECUTE, COMMIT])
def test_a_transaction_that_was_committed_is_never_said_to_be_rolled_back(
    phase: Phase, severity: str, wrap: Callable[[BaseException], BaseException]
) -> None:
    """CockroachDB's XXA00, with whatever text, and however it comes."""
    for text in ("transaction committed but schema change aborted with error: (23505): ...", "restart transaction", ""):
        assert classify(wrap(server("XXA00", text, severity)), phase).outcome is Outcome.UNKNOWN
    ambiguous = server("40003", "result is ambiguous: error=ba: EndTxn [exhausted] (last error: 40001)", severity)
    assert classify(wrap(ambiguous), phase).outcome is Outcome.UNKNOWN


def test_whatever_a_service_says_of_a_commit_that_is_lost_is_no_promise() -> None:
    """Nor what it says before it hangs up."""
    for error in said_by_services():
        lost = error if isinstance(error, driver.ConnectionDoesNotExistError) else loss(error)
        assert classify(lost, COMMIT).outcome is Outcome.UNKNOWN


INIT = {
    "refused": ConnectionRefusedError(errno.ECONNREFUSED, "another server's"),
    "a file": FileNotFoundError(errno.ENOENT, "no such file", "types.json"),
    "a name": socket.gaierror(socket.EAI_NONAME, "not known"),
    "wrapped": raised_from(ConnectionResetError(errno.ECONNRESET, "reset"), RuntimeError("the application's")),
    "raised": raised_in("exec_stmt_raise", "XX000", "Couldn't connect to compute node"),
}


@pytest.mark.parametrize("error", INIT.values(), ids=INIT)
def test_what_init_meets_itself_is_the_applications_error(error: BaseException) -> None:
    """The server is there: waiting for it would not end."""
    assert classify(error, CONNECT, initializing=True).fault is Fault.PERMANENT


def test_a_statement_of_inits_that_times_out_says_that_the_server_is_slow() -> None:
    """It is waited for as before."""
    assert classify(TimeoutError(), CONNECT, initializing=True).fault is Fault.UNREACHABLE
    assert classify(loss(), CONNECT, initializing=True).fault is Fault.UNREACHABLE


def test_a_client_without_tls_is_refused_for_good_also_by_a_server_that_may_be_waking() -> None:
    """Unless it is not known whether it would use TLS: with it, the server may have said the same."""
    for sslmode, fault in (("disable", "PERMANENT"), ("prefer", "UNREACHABLE"), (None, "UNREACHABLE")):
        failure = Failure(error=NOT_LET_IN, phase=CONNECT, waking=True, sslmode=sslmode)
        assert PostgresClassifier().classify(failure).fault.name == fault


def test_a_client_that_can_do_without_tls_meets_no_refusal_of_it() -> None:
    """asyncpg before 0.32 takes an error for one; for how long there is hope is in the verdict."""
    found = {
        sslmode: PostgresClassifier().classify(Failure(error=TLS_REFUSED, phase=CONNECT, sslmode=sslmode))
        for sslmode in ("allow", "prefer", "require", "verify-full", None)
    }
    assert {sslmode: verdict.fault.name for sslmode, verdict in found.items()} == {
        "allow": "UNREACHABLE",
        "prefer": "UNREACHABLE",
        "require": "PERMANENT",
        "verify-full": "PERMANENT",
        None: "PERMANENT",
    }
    assert found["prefer"].only_for == 15


# Rules of one's own

BUSY = Verdict(fault=Fault.OVERLOADED, outcome=Outcome.ROLLED_BACK, connection=KEEP)


def is_ours(failure: Failure) -> bool:
    return "MY001" in failure.sqlstates


def test_a_rule_of_ones_own_comes_before_the_built_in_ones() -> None:
    """It decides where it matches."""
    own = PostgresClassifier().with_rule(is_ours, BUSY)
    assert own.classify(Failure(error=server("MY001"), phase=EXECUTE)) == BUSY


def test_a_rule_that_does_not_match_defers() -> None:
    """Everything else is classified as before."""
    own = PostgresClassifier().with_rule(is_ours, BUSY)
    for error, expected in EXECUTING.values():
        assert expected == told(own.classify(Failure(error=error, phase=EXECUTE)))


def test_adding_a_rule_leaves_the_classifier_as_it_was() -> None:
    """A classifier that is in use does not change under its user."""
    plain = PostgresClassifier()
    plain.with_rule(is_ours, BUSY)
    assert plain.classify(Failure(error=server("MY001"), phase=EXECUTE)).fault is Fault.PERMANENT


def test_the_rule_added_last_is_asked_first() -> None:
    """A later rule can narrow an earlier one."""
    later = Verdict(fault=Fault.CONTENTION, outcome=Outcome.ROLLED_BACK)
    own = PostgresClassifier().with_rule(is_ours, BUSY).with_rule(is_ours, later)
    assert own.classify(Failure(error=server("MY001"), phase=EXECUTE)) == later


def test_a_rule_may_compute_its_verdict() -> None:
    """A function is asked for the verdict of the failure that matched."""
    own = PostgresClassifier().with_rule(
        is_ours, lambda failure: BUSY if failure.phase is EXECUTE else PostgresClassifier().classify(failure)
    )
    assert own.classify(Failure(error=server("MY001"), phase=EXECUTE)) == BUSY
    assert own.classify(Failure(error=server("MY001"), phase=COMMIT)).fault is Fault.PERMANENT


# The table as a table


def seen_as(failure: Failure) -> classifier.Sighting:
    return classifier._see(failure, PostgresClassifier().unwrap(failure.error))


def rule_for(failure: Failure) -> Rule:
    seen = seen_as(failure)
    return next(rule for rule in rules_for(failure.phase, seen.sqlstate, lost=seen.lost) if rule.matches(seen))


TLS_REFUSED = ConnectionError('PostgreSQL server at "h:5432" rejected SSL upgrade')
NOT_LET_IN = fatal("28000", 'no pg_hba.conf entry for host "h", user "u", database "d", no encryption')


def said_by_services() -> list[BaseException]:
    """Make an error of everything in the survey, alone and as the last word of a connection."""
    survey = json.loads((Path(__file__).parents[2] / "services.json").read_text(encoding="utf-8"))
    fields = [
        {"S": row["severity"], "V": row.get("severity_en", row["severity"]), "C": row["sqlstate"], "M": text}
        | {"D": row.get("detail")}
        for row in survey
        for text in row["texts"]
    ]
    told = [{name: value for name, value in each.items() if value} for each in fields]
    # Read in a pooler's sources since, or versions of other texts.
    told += [{"S": "FATAL", "C": "08P01", "M": text} for text in ("pgbouncer cannot connect to server",)]
    told += [{"S": "FATAL", "C": "57P05", "M": "client login timeout"}]
    told += [{"S": "FATAL", "C": "08004", "M": "Clients must connect with TLS"}]
    return [error for each in told for error in (driver.PostgresError.new(each), loss(driver.PostgresError.new(each)))]


def test_every_rule_is_reached_by_a_case_of_these_tables() -> None:
    """No line stands in the shadow of those above it."""
    failures = [Failure(error=error, phase=EXECUTE) for error, _ in EXECUTING.values()]
    failures += [Failure(error=error, phase=CONNECT) for error, _ in CONNECTING.values()]
    failures += [Failure(error=error, phase=CONNECT, waking=True) for error, _ in WAKING.values()]
    failures += [Failure(error=error, phase=COMMIT) for error in (*LOSSES.values(), *NO_REFUSALS_OF_COMMIT.values())]
    failures += [Failure(error=error, phase=CHECKOUT) for error in (loss(), TimeoutError())]
    failures += [Failure(error=ConnectionRefusedError(), phase=CONNECT, initializing=True)]
    failures += [Failure(error=TLS_REFUSED, phase=CONNECT, sslmode="prefer")]
    failures += [Failure(error=NOT_LET_IN, phase=CONNECT, sslmode="disable")]
    failures += [Failure(error=error, phase=phase) for phase in (CONNECT, EXECUTE) for error in said_by_services()]
    reached = {id(rule_for(failure)) for failure in failures}
    assert [rule.evidence for rule in RULES if id(rule) not in reached] == []


def test_looking_at_the_code_first_leaves_out_no_rule() -> None:
    """The rules that are asked are those that would be found by asking all of them."""
    for error, _ in [*EXECUTING.values(), *CONNECTING.values()]:
        for phase in Phase:
            seen = seen_as(Failure(error=error, phase=phase))
            whole = [
                rule for rule in RULES if rule.applies(phase, seen.sqlstate, lost=seen.lost) and rule.matches(seen)
            ]
            assert whole[0] is rule_for(seen.failure)


def test_a_guarantee_is_never_given_by_a_rule_for_lost_commits() -> None:
    """For every rule and any loss in COMMIT the verdict is decided above all rules that promise something."""
    promising = [rule for rule in RULES if rule.verdict.outcome is not Outcome.UNKNOWN and not rule.errors]
    lost_commit = next(rule for rule in RULES if rule.where == classifier.LOST_COMMIT)
    assert all(RULES.index(lost_commit) < RULES.index(rule) for rule in promising)


def test_the_last_rule_takes_everything() -> None:
    """Whatever is raised gets a verdict."""
    seen = seen_as(Failure(error=Exception(), phase=EXECUTE))
    rules = rules_for(EXECUTE, seen.sqlstate, lost=seen.lost)
    assert [rule for rule in rules if rule.matches(seen)] == [RULES[-1]]


def test_each_rule_says_in_words_what_it_recognises() -> None:
    """On one line, and no two alike."""
    assert len({(rule.evidence, rule.where) for rule in RULES}) == len(RULES)
    assert all(re.fullmatch(r"[^\n|]{10,}", rule.evidence) for rule in RULES)


def test_what_a_rule_condemns_besides_its_connection_is_rare() -> None:
    """Only the wrong server, and what was created anew, expire other connections by rule."""
    expiring = {rule.verdict.fault for rule in RULES if rule.verdict.others is EXPIRE}
    assert expiring == {Fault.WRONG_SERVER, Fault.STATEMENT_CACHE}


def test_only_errors_after_which_the_server_goes_on_keep_the_connection() -> None:
    """A connection is kept where the server answered with an ERROR, or where nothing was sent at all."""
    kept = [rule.verdict for rule in RULES if rule.verdict.connection is KEEP]
    assert {verdict.outcome for verdict in kept} <= {Outcome.ROLLED_BACK, Outcome.NOT_EXECUTED}
    assert {verdict.fault for verdict in kept} == {Fault.CONTENTION, Fault.OVERLOADED, Fault.PERMANENT}
