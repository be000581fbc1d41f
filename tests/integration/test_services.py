"""What managed services, proxies and poolers say, over a real socket and through the real driver, and the verdicts on it.

`tests/services.json` has the survey: one line for each thing that a service says, with the verdicts that are right. An
entry of the survey takes several lines where its texts, codes or verdicts differ. Of a line:

* `phases`: when it is said. "connect", "execute" and "commit" are the classifier's. "idle": between two statements, where
  the next one finds a closed connection; what crosses it on the way is "execute".
* `verdicts`: fault and outcome; the first is the best, the others do no harm. `not_before` and `only_for`: seconds, where
  the verdict has to give a time.
* `evidence`: "source" (read in the service's sources), "seen" (in logs, tests and reports of its users), "document" (its
  vendor's documentation says so), "supposed" (never seen, and here to be safe).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from resilient_pool import BackoffPolicy, OutcomeUnknownError, ResilientPool
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Outcome, Phase, Verdict
from resilient_pool.testing import End, Point, Refusal, ScriptedServer

# From this version on asyncpg passes on what the server said before it closed a connection, and tells an error in answer
# to its request for TLS from a refusal of TLS.
TELLS_THE_REASON = tuple(int(part) for part in asyncpg.__version__.split(".")[:2]) >= (0, 32)
LIMIT = 10.0
PROMPT = BackoffPolicy(base=0.001, max_value=0.002, jitter=None)
TIMES = ("not_before", "only_for")
SURVEY = 92
"""How many entries the survey has."""

KNOWN_WRONG = frozenset(
    {
        "neon-endpoint-unavailable-connect",
        "neon-pageserver-away-execute",
        "neon-pageserver-read-execute",
        "neon-pageserver-retries-execute",
        "neon-project-full-execute",
        "supavisor-checkout-execute-4",
        "supavisor-connect-failed-execute",
        "supavisor-nowhere-connect",
        "supavisor-internal-connect-8",
        "supavisor-internal-connect-9",
        "supavisor-internal-connect-10",
        "supavisor-internal-connect-11",
        "supavisor-breaker-connect",
        "supavisor-prepared-missing-execute",
        "supavisor-prepared-duplicate-execute",
        "supavisor-prepared-limits-execute",
        "supavisor-credentials-stale-execute",
        "rds-proxy-borrow-execute",
        "rds-proxy-borrow-error-execute",
        "rds-proxy-full-connect",
        "dsql-denied-connect",
        "dsql-token-expired-connect",
        "dsql-size-execute",
        "crdb-range-unavailable-execute",
        "crdb-internal-connection-execute",
        "crdb-cloud-away-connect",
        "crdb-cloud-final-older-connect",
        "yugabyte-schema-older-execute",
        "pgbouncer-limits-connect",
        "pgbouncer-shutting-down-connect",
        "pgbouncer-server-shutting-down-connect",
        "pgbouncer-server-shutting-down-execute",
        "pgbouncer-login-timeout-connect",
        "pgbouncer-query-waited-execute",
        "pgbouncer-client-idle-execute",
        "pgbouncer-reconfigured-execute",
        "pgbouncer-prepared-execute",
        "pgbouncer-queued-password-execute",
        "pgbouncer-queued-hba-execute",
        "pgbouncer-queued-database-execute",
        "pgbouncer-cached-final-connect",
        "pgbouncer-cached-final-execute",
        "pgbouncer-final-08004-connect",
        "pgcat-shutdown-execute",
        "pgcat-prepared-execute",
        "pgdog-tls-connect",
        "odyssey-no-server-execute",
        "odyssey-idle-execute",
        "planetscale-readonly-execute",
        "prisma-upstream-connect",
        "prisma-identify-connect",
        "postgres-hba-without-tls-connect",
    }
)
"""What is judged wrongly today: a line and a phase, or one of its texts by its number. A test fails when one of them is right:
then take it off the list."""

KNOWN_WRONG_BEFORE_0_32 = frozenset({"odyssey-tcp-full-tls-connect", "postgres-fork-tls-connect"})
"""Likewise on asyncpg 0.31 and older only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the survey; see above."""

    id: str
    entry: int
    service: str
    phases: list[str]
    texts: list[str]
    severity: str | None
    sqlstate: str | None
    then: str
    verdicts: list[str]
    evidence: str
    source: str
    severity_en: str | None = None
    detail: str | None = None
    hint: str | None = None
    bare: bool = False
    points: list[str] | None = None
    ssl: str | bool = False
    waking: bool = False
    executed: bool = False
    not_before: float | None = None
    only_for: float | None = None
    note: str = ""

    def said_at(self, point: Point, text: str, **fields: Any) -> Refusal:
        return Refusal(
            at=point,
            message=text,
            severity=self.severity,
            severity_en=self.severity_en,
            sqlstate=self.sqlstate,
            detail=self.detail,
            hint=self.hint,
            bare=self.bare,
            **fields,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One text in one phase."""

    id: str
    row: Row
    text: str
    phase: str

    @property
    def names(self) -> set[str]:
        return {self.id, f"{self.row.id}-{self.phase}"}

    @property
    def is_a_loss(self) -> bool:
        return self.phase in ("execute", "commit") and self.row.then != "ready"


ROWS = [Row(**row) for row in json.loads((Path(__file__).parents[1] / "services.json").read_text(encoding="utf-8"))]
CASES = [
    Case(id=f"{row.id}-{phase}" + (f"-{number}" if len(row.texts) > 1 else ""), row=row, text=text, phase=phase)
    for row in ROWS
    for phase in row.phases
    for number, text in enumerate(row.texts, 1)
]
LOSSES = [case for case in CASES if case.is_a_loss and case.phase == "execute"]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases])


async def failure_of(operation: Awaitable[object]) -> Exception:
    try:
        async with asyncio.timeout(LIMIT):
            result = await operation
    except Exception as error:
        return error
    raise AssertionError(f"it did not fail but gave {result!r}")


async def failures(case: Case) -> AsyncIterator[Exception]:
    """Have the text said in every way in which it can come in that phase, and yield what the driver makes of it."""
    ways = {"connect": while_connecting, "execute": while_executing, "commit": while_committing, "idle": while_idle}
    async for error in ways[case.phase](case):
        yield error


async def while_connecting(case: Case) -> AsyncIterator[Exception]:
    for point in map(Point, case.row.points or ("startup", "authentication", "login")):
        with ScriptedServer(case.row.said_at(point, case.text)) as server:
            yield await failure_of(asyncpg.connect(server.dsn(), ssl=case.row.ssl, timeout=LIMIT))


async def while_executing(case: Case) -> AsyncIterator[Exception]:
    then = End(case.row.then)
    for point, how in ((Point.PARSE, "fetch"), (Point.QUERY, "fetch"), (Point.QUERY, "execute")):
        with ScriptedServer(case.row.said_at(point, case.text, then=then)) as server:
            connection = await asyncpg.connect(server.dsn(), ssl=case.row.ssl, timeout=LIMIT)
            yield await failure_of(getattr(connection, how)("INSERT INTO things VALUES (1)"))
            connection.terminate()


async def while_committing(case: Case) -> AsyncIterator[Exception]:
    line = case.row.said_at(Point.COMMIT, case.text, then=End(case.row.then), executed=case.row.executed)
    with ScriptedServer(line) as server:
        connection = await asyncpg.connect(server.dsn(), ssl=case.row.ssl, timeout=LIMIT)
        await connection.execute("BEGIN")
        yield await failure_of(connection.execute("COMMIT"))
        connection.terminate()


async def while_idle(case: Case) -> AsyncIterator[Exception]:
    with ScriptedServer(case.row.said_at(Point.IDLE, case.text, then=End(case.row.then))) as server:
        connection = await asyncpg.connect(server.dsn(), ssl=case.row.ssl, timeout=LIMIT)
        await connection.execute("SELECT 1")
        async with asyncio.timeout(LIMIT):
            while not connection.is_closed():
                await asyncio.sleep(0.001)
        yield await failure_of(connection.execute("SELECT 1"))


def judge(error: Exception, phase: Phase, **known: bool) -> Verdict:
    return PostgresClassifier().classify(Failure(error=error, phase=phase, **known))


def told(verdict: Verdict) -> str:
    return f"{verdict.fault.name} {verdict.outcome.name}"


def wanted(row: Row) -> str:
    times = [f"{name} {value} s" for name in TIMES if (value := getattr(row, name)) is not None]
    return ", ".join([" or ".join(row.verdicts), *times])


def is_right(case: Case, verdict: Verdict) -> bool:
    if case.phase == "idle":
        return told(verdict) == "STALE NOT_EXECUTED"
    if case.is_a_loss and not TELLS_THE_REASON:
        return told(verdict) == "DISCONNECTED UNKNOWN"
    in_time = [getattr(verdict, name, None) == getattr(case.row, name) for name in TIMES]
    # What is final has no time.
    return told(verdict) in case.row.verdicts and (told(verdict).startswith("PERMANENT") or all(in_time))


def is_known_to_be_wrong(case: Case) -> bool:
    if TELLS_THE_REASON:
        return not case.names.isdisjoint(KNOWN_WRONG)
    return not case.names.isdisjoint(KNOWN_WRONG_BEFORE_0_32 | (frozenset() if case.is_a_loss else KNOWN_WRONG))


@each(CASES)
async def test_what_a_service_says_is_judged_rightly(case: Case):
    """In every way in which the driver can meet it, and whether the server is known to be waking or not."""
    phase = Phase(case.phase) if case.phase != "idle" else Phase.EXECUTE
    found = [
        judge(error, phase, waking=waking)
        async for error in failures(case)
        for waking in ((True,) if case.row.waking else (False, True))
    ]
    judged = f"{case.text!r} is judged {sorted(set(map(told, found)))}"
    if is_known_to_be_wrong(case):
        assert not all(is_right(case, verdict) for verdict in found), f"{judged}: take it off the list of what is wrong"
    else:
        assert all(is_right(case, verdict) for verdict in found), f"{judged}, right is {wanted(case.row)}"


@each(LOSSES)
async def test_whatever_is_said_of_a_lost_commit_its_outcome_is_unknown(case: Case):
    """Before everything that could sound like a guarantee."""
    async for error in while_committing(replace(case, phase="commit")):
        assert judge(error, Phase.COMMIT).outcome is Outcome.UNKNOWN


# What a pool does then

WAKING = Refusal(at=Point.STARTUP, sqlstate="57P03", message="the database system is starting up", times=1)
INSERT = "INSERT INTO things VALUES (1)"
# Where the list is wrong the pool is wrong as well, and where two verdicts are right it may do one thing or the other.
DECIDED = [case for case in CASES if len(case.row.verdicts) == 1 and case.names.isdisjoint(KNOWN_WRONG)]


def decided(*phases: str) -> list[Case]:
    return [case for case in DECIDED if case.phase in phases]


async def outcome_of(operation: Awaitable[object]) -> str:
    """Wait for a call, and say how it ended: well, with an outcome that is not known, or with the driver's error."""
    try:
        async with asyncio.timeout(LIMIT):
            await operation
    except OutcomeUnknownError:
        return "unknown"
    except (asyncpg.PostgresError, OSError):
        return "failed"
    return "done"


@each(decided("connect"))
async def test_a_pool_connects_again_unless_it_is_of_no_use(case: Case):
    """What is final reaches the caller after one attempt; everything else is a matter of the next."""
    point = Point(case.row.points[0]) if case.row.points else Point.LOGIN
    refused = case.row.said_at(point, case.text, times=1)
    with ScriptedServer(*((WAKING, refused) if case.row.waking else (refused,))) as server:
        async with ResilientPool(server.dsn(), ssl=case.row.ssl, reconnect=PROMPT) as pool:
            ended = await outcome_of(pool.execute(INSERT))
        is_final = case.row.verdicts == ["PERMANENT NOT_EXECUTED"]
        assert (ended, server.attempts) == (("failed", 1) if is_final else ("done", 2 + case.row.waking))
        assert server.statements.count(INSERT) == (0 if is_final else 1)


@each(decided("execute"))
async def test_a_pool_repeats_a_write_only_where_it_is_certain_to_have_had_no_effect(case: Case):
    """Otherwise it says that it does not know, after one attempt."""
    line = case.row.said_at(Point.QUERY, case.text, matching="INSERT", times=1, then=End(case.row.then))
    with ScriptedServer(line) as server:
        async with ResilientPool(server.dsn(), backoff=PROMPT, reconnect=PROMPT) as pool:
            ended = await outcome_of(pool.execute(INSERT))
        fault, outcome = case.row.verdicts[0].split()
        if case.is_a_loss and not TELLS_THE_REASON:
            fault, outcome = "DISCONNECTED", "UNKNOWN"
        if fault == "PERMANENT":
            assert (ended, server.statements.count(INSERT)) == ("failed", 1)
        elif outcome == "UNKNOWN":
            assert (ended, server.statements.count(INSERT)) == ("unknown", 1)
        else:
            assert (ended, server.statements.count(INSERT)) == ("done", 2)


@each(decided("commit"))
async def test_a_pool_repeats_a_transaction_only_where_its_commit_is_certain_to_have_failed(case: Case):
    """The stand-in knows nothing of what became of a transaction."""
    line = case.row.said_at(Point.COMMIT, case.text, times=1, then=End(case.row.then), executed=case.row.executed)

    async def insert(connection: Any) -> None:
        await connection.execute(INSERT)

    with ScriptedServer(line) as server:
        async with ResilientPool(server.dsn(), backoff=PROMPT, reconnect=PROMPT) as pool:
            ended = await outcome_of(pool.run_in_transaction(insert))
        if case.row.verdicts[0].endswith("UNKNOWN"):
            assert (ended, server.statements.count(INSERT)) == ("unknown", 1)
        else:
            assert (ended, server.statements.count(INSERT)) == ("done", 2)


@each(decided("idle"))
async def test_a_pool_is_not_troubled_by_what_ends_an_idle_connection(case: Case):
    """The next call has another one."""
    line = case.row.said_at(Point.IDLE, case.text, matching="INSERT", times=1, then=End(case.row.then))
    with ScriptedServer(line) as server:
        async with ResilientPool(server.dsn()) as pool:
            assert await outcome_of(pool.execute(INSERT)) == "done"
            async with asyncio.timeout(LIMIT):
                while server.open_connections:
                    await asyncio.sleep(0.001)
            assert await outcome_of(pool.execute(INSERT)) == "done"
        assert server.statements.count(INSERT) == 2


def test_the_survey_is_whole():
    """Every entry has a line, every line a name of its own, and the list of what is wrong names lines that exist."""
    assert {row.entry for row in ROWS} == set(range(1, SURVEY + 1))
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {row.evidence for row in ROWS} == {"source", "seen", "document", "supposed"}
    assert set().union(*(case.names for case in CASES)) >= KNOWN_WRONG | KNOWN_WRONG_BEFORE_0_32
    assert KNOWN_WRONG.isdisjoint(KNOWN_WRONG_BEFORE_0_32)
