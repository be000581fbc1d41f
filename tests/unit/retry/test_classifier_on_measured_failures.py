"""Every failure measured on a real server, rebuilt and classified: its fault, and no guarantee that was not kept."""

from __future__ import annotations

import asyncio
import builtins
import json
import socket
import ssl
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from asyncpg import exceptions as driver

from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Outcome, Phase, Verdict

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("measured_failures.json").read_text())
BY_ID = {case["id"]: case for case in CASES}

EXPECTED = """
STALE NOT_EXECUTED
    D13-client_idle_timeout
    C12c-transaction_timeout/asleep
    B06c-idle_in_tx_timeout/asleep
    B01-idle_session_timeout/running/asyncio/plain/fetch_new/now
    B01-idle_session_timeout/blocked/asyncio/plain/fetch_new/now
    C08b-next-op-after-timeout/1.0
UNREACHABLE NOT_EXECUTED
    A01-refused
    A02-syn-blackhole
    A03-dns-invalid
    A04b-unix-not-socket
    A05-close/ssl-default(prefer)
    A05-close/ssl=False
    A05-rst/ssl-default(prefer)
    A05-rst/ssl=False
    A05-ssl_yes_then_close/ssl=require
    A11-shutting-down/ssl-default(prefer)
    A12-starting-up/ssl-default(prefer)
    A12b-hot-standby-off/ssl-default(prefer)
    A12c-in-recovery-mode/ssl-default(prefer)
    A15-tsa-rw-standby
    A15b-tsa-primary-standby
    A02c-no-arp
    A02d-unreachable-route
    A02f-no-route
    A03d-dns-unreachable
    A02g-syn-lost
    D04c-pg-down-new-client/0
OVERLOADED NOT_EXECUTED
    A10c-role-connlimit
    A10-reserved-slots/ssl-default(prefer)
    A10b-too-many/ssl-default(prefer)
    D04b-pg-down-existing-client/0
    D07-max_client_conn
    D08c-connect-after-KILL
    D12-server-too-many-clients
CONTENTION NOT_EXECUTED
    A20-init-40P01
OVERLOADED ROLLED_BACK
    C18-out-of-shared-memory-locks
    C19-out-of-memory
    C20-disk-full
CONTENTION ROLLED_BACK
    C13-deadlock
    C14-serialization/repeatable read
    C14b-serialization-at-COMMIT
    C16-recovery-conflict/lock
WRONG_SERVER NOT_EXECUTED
    C15e-set-transaction-read-only
    C15-default_transaction_read_only
    C15c-standby-lock
    C15d-standby-xid
STATEMENT_CACHE NOT_EXECUTED
    C21b-cached-stmt-ddl/in-tx
    C21f-deallocate-all
    D09b-stmt-cache-concurrent-26000
    D09d-stmt-cache-3-processes-42P05
    D09d-stmt-cache-3-processes-26000
STATEMENT_CACHE ROLLED_BACK
    C21h-field-type-changed
    C21g-type-recreated
DISCONNECTED UNKNOWN
    C08e-path-dead-retransmit
    C08f-TCP_USER_TIMEOUT-2s
    B14-path-dead-idle-keepalive
    C08h-vip-removed
    B02-terminate/blocked/asyncio/plain/fetch_new/now
    B03-fin/blocked/asyncio/plain/fetch_new/now
    B05-silent-then-rst/running/asyncio/plain/fetch_new/now
    C04-fin-before-reply/fetch
    C04-rst-before-reply/fetch
    C07-ambiguous-commit-fin/transaction()
    C07-ambiguous-commit-rst/transaction()
    C07m-lost-in-tx-before-commit
    C07r-lost-in-tx-statement
    C12-transaction_timeout/mid-statement
    C16b-recovery-conflict/idle-in-tx
    D03b-backend-terminated-midquery/fetch
    D08d-KILL-midquery
    D13c-query_timeout
    E2-commit-lost-server-sees-close
    E6-terminated-before-commit
POISONED UNKNOWN
    B22-last-word-while-idle/simple
    B22-last-word-while-idle/prepared
    B22-last-word-while-idle/copy
    B22-last-word-while-idle/commit
    B01-idle_session_timeout/blocked/uvloop/plain/fetch_new/now
PERMANENT NOT_EXECUTED
    A03b-dns-too-long-label
    A04-unix-missing
    A05-http/ssl-default(prefer)
    A06b-ssl-unknown-ca
    A06c-ssl-hostname-mismatch
    A06e-ssl-version
    A07-wrong-password/ssl-default(prefer)
    A07c-unknown-role
    A08-hba-reject/ssl-default(prefer)
    A08b-nologin
    A09-no-database
    A09b-db-disallows
    A09c-bad-setting
    A02e-prohibit-route
    C22-another-operation
    C24b-use-after-release
    C24d-pool-closed
    D04e-bouncer-db-missing-on-server
    D04f-unknown-alias
    D04g-startup-parameter
    D08e-DISABLE
PERMANENT ROLLED_BACK
    C19b-temp_file_limit
    C01b-cancel_backend
    C10-statement_timeout
    C11-lock_timeout
    C11b-nowait
    C21e-column-dropped
    C26-unsynced/fetch-server-error
PERMANENT UNKNOWN
    C12d-transaction_timeout/one-statement
    D13b-idle_transaction_timeout
    C12b-transaction_timeout/idle-blocked
    B06-idle_in_tx_timeout/blocked/asyncio/plain/fetch_new/now
    C08g-path-dead-after-ack/keepalive=False
    B05b-silent-forever/running/asyncio/plain/fetch_new/now
    B98-execute-empty-string/asyncio
    C08-blackhole/command_timeout=1.0
    C09-command_timeout-healthy
    C26-unsynced/fetch-client-side-DataError
    C25-task-cancel/select
    C25b-cancel-race
    E5c-statement_timeout-during-COMMIT-syncrep
    E5d-client-timeout-during-COMMIT-syncrep
    C26b-unsynced/pool-release
"""


def expected() -> dict[str, str]:
    """Read the table above: a fault and an outcome, then the ids to which they belong."""
    table: dict[str, str] = {}
    verdict = ""
    for line in EXPECTED.strip().splitlines():
        if line.startswith("    "):
            table[line.strip()] = verdict
        else:
            verdict = line.strip()
    return table


def rebuild(told: dict[str, Any]) -> BaseException:
    """Make an exception as asyncpg made it, with all that is behind it."""
    error = _bare(told)
    if "cause" in told:
        error.__cause__ = rebuild(told["cause"])
    if "context" in told:
        error.__context__ = rebuild(told["context"])
    return error


def _bare(told: dict[str, Any]) -> BaseException:
    name, message = told["type"], told["message"]
    if name == "UnicodeError":
        return UnicodeError(message)
    if hasattr(driver, name):
        error: BaseException = getattr(driver, name)(message)
        if "severity" in told:
            error.severity = error.severity_en = told["severity"]  # type: ignore[attr-defined]
        if "function" in told:
            error.server_source_function = told["function"]  # type: ignore[attr-defined]
        assert getattr(error, "sqlstate", None) == told.get("sqlstate")
        return error
    makers = {"gaierror": socket.gaierror, "CancelledError": asyncio.CancelledError}
    maker = makers.get(name) or getattr(ssl, name, None) or getattr(builtins, name)
    made: BaseException = maker(told["errno"], message) if "errno" in told else maker(message)
    return made


def without_the_servers_reason(told: dict[str, Any]) -> dict[str, Any]:
    """Tell the same failure as asyncpg 0.31 and older do: of a loss, only 08003 and the socket's error remain."""
    told = dict(told)
    for link in ("cause", "context"):
        if link in told:
            told[link] = without_the_servers_reason(told[link])
    if told.get("sqlstate") == "08003" and "sqlstate" in told.get("cause", {}):
        told["message"] = "connection was closed in the middle of operation"
        del told["cause"]
    return told


def classify(case: dict[str, Any], *, older: bool = False, **known: bool) -> Verdict:
    told = without_the_servers_reason(case["error"]) if older else case["error"]
    return PostgresClassifier().classify(Failure(error=rebuild(told), phase=Phase(case["phase"]), **known))


def named(verdict: Verdict) -> str:
    return f"{verdict.fault.name} {verdict.outcome.name}"


def test_a_measured_failure_gets_the_verdict_of_the_table() -> None:
    """Each measured case has its line in the table above."""
    assert expected() == {identity: named(classify(case)) for identity, case in BY_ID.items()}


def test_the_table_and_the_measurements_name_the_same_cases() -> None:
    """No case is left out, none is named twice, none is invented."""
    listed = [line.strip() for line in EXPECTED.splitlines() if line.startswith("    ")]
    assert Counter(listed) == Counter(case["id"] for case in CASES)


@pytest.mark.parametrize("older", [False, True], ids=["asyncpg 0.32", "asyncpg 0.31 and older"])
def test_what_the_server_executed_is_never_said_to_be_without_effect(*, older: bool) -> None:
    """No guarantee is given for any case whose effect was found in the database, by any driver version."""
    executed = [case for case in CASES if case["executed"] == "yes"]
    assert len(executed) > 10
    assert {classify(case, older=older).outcome for case in executed} == {Outcome.UNKNOWN}


def test_older_drivers_lose_the_reason_and_with_it_only_guarantees() -> None:
    """Where the server's last word is missing the verdict falls back to a loss of which nothing else is known."""
    changed = {
        case["id"]: (expected()[case["id"]], named(classify(case, older=True)))
        for case in CASES
        if named(classify(case, older=True)) != expected()[case["id"]]
    }
    assert changed == {
        "B01-idle_session_timeout/blocked/asyncio/plain/fetch_new/now": ("STALE NOT_EXECUTED", "DISCONNECTED UNKNOWN"),
        "B06-idle_in_tx_timeout/blocked/asyncio/plain/fetch_new/now": ("PERMANENT UNKNOWN", "DISCONNECTED UNKNOWN"),
        "C12d-transaction_timeout/one-statement": ("PERMANENT UNKNOWN", "DISCONNECTED UNKNOWN"),
        "C12b-transaction_timeout/idle-blocked": ("PERMANENT UNKNOWN", "DISCONNECTED UNKNOWN"),
        "D13-client_idle_timeout": ("STALE NOT_EXECUTED", "DISCONNECTED UNKNOWN"),
        "D13b-idle_transaction_timeout": ("PERMANENT UNKNOWN", "DISCONNECTED UNKNOWN"),
        "D04b-pg-down-existing-client/0": ("OVERLOADED NOT_EXECUTED", "DISCONNECTED UNKNOWN"),
        "D04c-pg-down-new-client/0": ("UNREACHABLE NOT_EXECUTED", "DISCONNECTED UNKNOWN"),
    }


@pytest.mark.parametrize("older", [False, True], ids=["asyncpg 0.32", "asyncpg 0.31 and older"])
def test_an_idle_connection_known_dead_before_sending_never_executed_anything(*, older: bool) -> None:
    """Every way in which an idle connection died ends in `NOT_EXECUTED` once nothing was sent on it."""
    died_idle = [case for case in CASES if case["id"].startswith(("B01", "B02", "B03", "B05-", "B06-", "B14", "B22"))]
    died_idle = [case for case in died_idle if case["phase"] == "execute"]
    verdicts = {named(classify(case, older=older, sent=False)) for case in died_idle}
    assert verdicts == {"STALE NOT_EXECUTED", "POISONED NOT_EXECUTED"}


def test_a_waking_server_may_refuse_for_reasons_that_pass() -> None:
    """Inside the wake window two refusals count as absence; the same two are final outside of it."""
    forgiven = {case["id"] for case in CASES if named(classify(case, waking=True)) != named(classify(case))}
    assert forgiven == {"A07c-unknown-role", "A05-http/ssl-default(prefer)"}
    assert {named(classify(BY_ID[identity], waking=True)) for identity in forgiven} == {"UNREACHABLE NOT_EXECUTED"}


def test_a_pool_that_only_reads_sees_a_read_only_server_as_the_right_one() -> None:
    """25006 is the application's error where nobody expected to write."""
    readers = [classify(case, writable=False) for case in CASES if case["error"].get("sqlstate") == "25006"]
    assert {named(verdict) for verdict in readers} == {"PERMANENT ROLLED_BACK"}
