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

from resilient_pool import AcquireTimeoutError, BackoffPolicy, OutcomeUnknownError, ResilientPool
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Outcome, Phase, Verdict
from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedClock, ScriptedServer

# From this version on asyncpg passes on what the server said before it closed a connection, and tells an error in answer
# to its request for TLS from a refusal of TLS.
TELLS_THE_REASON = tuple(int(part) for part in asyncpg.__version__.split(".")[:2]) >= (0, 32)
LIMIT = 10.0
PROMPT = BackoffPolicy(base=0.001, max_value=0.002, jitter=None)
TIMES = ("not_before", "only_for")
SURVEY = 92
"""How many entries the survey has."""


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


def judge(error: Exception, phase: Phase, row: Row, **known: bool) -> Verdict:
    sslmode = row.ssl if isinstance(row.ssl, str) else "disable"
    return PostgresClassifier().classify(Failure(error=error, phase=phase, sslmode=sslmode, **known))


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
    if case.row.points == ["tls"] and not TELLS_THE_REASON:
        # What was said is not known, and there is hope for as long as that may mean a server that wakes.
        return told(verdict) in case.row.verdicts and verdict.only_for in (None, 15)
    in_time = [getattr(verdict, name) == getattr(case.row, name) for name in TIMES]
    # What is final has no time.
    return told(verdict) in case.row.verdicts and (told(verdict).startswith("PERMANENT") or all(in_time))


@each(CASES)
async def test_what_a_service_says_is_judged_rightly(case: Case):
    """In every way in which the driver can meet it, and whether the server is known to be waking or not."""
    phase = Phase(case.phase) if case.phase != "idle" else Phase.EXECUTE
    found = [
        judge(error, phase, case.row, waking=waking)
        async for error in failures(case)
        for waking in ((True,) if case.row.waking else (False, True))
    ]
    judged = f"{case.text!r} is judged {sorted(set(map(told, found)))}"
    assert all(is_right(case, verdict) for verdict in found), f"{judged}, right is {wanted(case.row)}"


@each(LOSSES)
async def test_whatever_is_said_of_a_lost_commit_its_outcome_is_unknown(case: Case):
    """Before everything that could sound like a guarantee."""
    async for error in while_committing(replace(case, phase="commit")):
        assert judge(error, Phase.COMMIT, case.row).outcome is Outcome.UNKNOWN


# What a pool does then

WAKING = Refusal(at=Point.STARTUP, sqlstate="57P03", message="the database system is starting up", times=1)
INSERT = "INSERT INTO things VALUES (1)"
# Where two verdicts are right the pool may do one thing or the other.
DECIDED = [case for case in CASES if len(case.row.verdicts) == 1]


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
    clock = ScriptedClock()  # no attempt is awaited in vain, however late it comes
    with ScriptedServer(*((WAKING, refused) if case.row.waking else (refused,))) as server:
        async with ResilientPool(server.dsn(), ssl=case.row.ssl, reconnect=PROMPT, deadline=60, clock=clock) as pool:
            ended = await outcome_of(pool.execute(INSERT))
        assert case.row.not_before is None or max(clock.sleeps) == case.row.not_before
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


# What users see


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.id == name)


async def test_a_crowd_before_a_compute_that_wakes_is_served_with_few_attempts(postgres: EmbeddedPostgres):
    """A Neon-like endpoint refuses for three seconds and then hands over: 100 callers, one prober, a real server behind."""
    asleep = replace(
        case_of("neon-waking-connect-1").row.said_at(Point.STARTUP, "Couldn't connect to compute node"), seconds=3.0
    )
    with ScriptedServer(asleep, host=postgres.host, port=postgres.port) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), max_size=5) as pool:
            async with asyncio.timeout(3 * LIMIT):
                results = await asyncio.gather(*(pool.fetchval("SELECT 7") for _ in range(100)))
            assert results == [7] * 100
        refused = len(server.sent)
        assert refused <= 9
        # Those that were let in are the pool's size, and a second client that looks what stands there.
        assert server.attempts <= refused + 6


async def test_nobody_fails_at_a_full_pooler_while_two_connections_circulate(postgres: EmbeddedPostgres):
    """A Supavisor-like endpoint lets two clients in, and answers EMAXCONNSESSION to every other one."""
    text = case_of("supavisor-full-connect-2").text
    full = replace(case_of("supavisor-full-connect-2").row.said_at(Point.LOGIN, text), beyond=2)
    with ScriptedServer(full, host=postgres.host, port=postgres.port) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), max_size=10, statement_cache_size=0) as pool:
            async with asyncio.timeout(2 * LIMIT):
                results = await asyncio.gather(*(pool.fetchval("SELECT pg_sleep(0.01)::text") for _ in range(200)))
            assert results == [""] * 200
            assert not pool.stats().circuit_open
        assert server.sent  # others were refused


FINAL = [
    "supavisor-nowhere-connect-1",
    "pgbouncer-cached-final-connect-1",
    "neon-final-connect-1",
    "prisma-final-connect-1",
]


@each([case_of(name) for name in FINAL])
@pytest.mark.parametrize("callers", [1, 10])
async def test_what_no_waiting_cures_is_one_clear_error_at_once(case: Case, callers: int):
    """A host name that is not there, a wrong password in a pooler's cache, a quota: what was said, after one attempt."""
    with ScriptedServer(case.row.said_at(Point.LOGIN, case.text)) as server:
        async with ResilientPool(server.dsn(), ssl=False) as pool:
            errors = await asyncio.gather(*(failure_of(pool.execute(INSERT)) for _ in range(callers)))
        assert {type(error).__module__ for error in errors} <= {"asyncpg.exceptions", "asyncpg.exceptions._base"}
        assert {str(error) for error in errors} == {case.text}
        assert server.attempts == 1


DOUBTFUL = [case for case in CASES if case.row.only_for is not None and case.phase == "connect"]


@each(DOUBTFUL)
async def test_a_quota_that_may_be_a_maintenance_is_believed_after_some_time(case: Case):
    """For no longer than promised: what was said, with what was waited for in a note."""
    clock = ScriptedClock()
    with ScriptedServer(case.row.said_at(Point.LOGIN, case.text)) as server:
        async with ResilientPool(server.dsn(), ssl=False, deadline=60, clock=clock) as pool:
            error = await failure_of(pool.execute(INSERT))
            assert str(error).startswith(case.text)
            assert clock.monotonic() == pytest.approx(case.row.only_for, abs=0.3)
            assert any(f"believed after {case.row.only_for} s" in note for note in error.__notes__)
            attempts = server.attempts
            assert 10 < attempts < 25
            # From now on it is believed at once.
            assert str(await failure_of(pool.execute(INSERT))).startswith(case.text)
            assert server.attempts == attempts + 1


async def test_a_read_only_cluster_is_waited_for_and_then_believed():
    """PlanetScale says the same of a fail-over and of a full disk."""
    case, clock = case_of("planetscale-readonly-execute-1"), ScriptedClock()
    line = case.row.said_at(Point.QUERY, case.text, matching="INSERT", then=End.READY)
    with ScriptedServer(line) as server:
        async with ResilientPool(server.dsn(), deadline=60, clock=clock) as pool:
            error = await failure_of(pool.execute(INSERT))
        assert str(error).startswith(case.text)
        assert clock.monotonic() == pytest.approx(15, abs=0.3)


@pytest.mark.parametrize("fail_fast", [False, True])
async def test_a_blocked_client_that_cannot_wait_is_told_when_to_come_again(fail_fast: bool):
    """After one attempt, and without waiting for anything."""
    case = case_of("supavisor-breaker-connect-1")
    with ScriptedServer(case.row.said_at(Point.LOGIN, case.text)) as server:
        async with ResilientPool(server.dsn(), ssl=False, deadline=20, fail_fast=fail_fast) as pool:
            errors = await asyncio.gather(*(failure_of(pool.execute(INSERT)) for _ in range(10)))
        assert server.attempts == 1
    if fail_fast:
        assert {str(error) for error in errors} == {case.text}
        assert all("another attempt makes sense 30 s after" in "".join(error.__notes__) for error in errors)
    else:
        assert {type(error) for error in errors} == {AcquireTimeoutError}
        assert all(25 < error.retry_after <= 30 and str(error.__cause__) == case.text for error in errors)


class OfTheApplication(OSError):
    """What an application's own client of something else raises."""


@pytest.mark.parametrize("error", [OfTheApplication(111, "refused"), ConnectionResetError(104, "reset")])
async def test_an_error_of_inits_own_is_the_applications_and_not_an_absent_server(error: OSError):
    """It reaches the caller as it is, after one attempt."""

    async def init(connection: asyncpg.Connection) -> None:
        raise error

    with ScriptedServer() as server:
        async with ResilientPool(server.dsn(), ssl=False, init=init) as pool:
            assert await failure_of(pool.execute(INSERT)) is error
            assert not pool.stats().circuit_open
        assert server.attempts == 1


async def test_a_connection_that_is_lost_under_init_is_the_servers_affair(postgres: EmbeddedPostgres):
    """Whatever `init` makes of it."""

    async def init(connection: asyncpg.Connection) -> None:
        try:
            await connection.execute("SELECT 'init'")
        except asyncpg.PostgresError as lost:
            raise ConnectionResetError("init saw it") from lost

    cut = Refusal(at=Point.QUERY, matching="init", times=2)
    with ScriptedServer(cut, host=postgres.host, port=postgres.port) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), ssl=False, init=init, reconnect=PROMPT) as pool:
            assert await pool.fetchval("SELECT 7") == 7
        assert server.attempts == 3


async def test_words_of_a_proxys_in_an_error_of_the_applications_are_the_applications(postgres: EmbeddedPostgres):
    """A real server raises them, with a code of a pooler's: they reach the caller after one attempt, and no connection is closed."""
    async with ResilientPool(postgres.dsn(), max_size=1) as pool:
        for case in LOSSES:
            code = case.row.sqlstate if case.row.sqlstate not in (None, "42P05", "26000") else "58000"
            text = case.text.replace("'", "''").replace("%", "%%")
            raising = f"DO $do$ BEGIN RAISE EXCEPTION '{text}' USING ERRCODE = '{code}'; END $do$"
            opened = pool.stats().opened
            error = await failure_of(pool.execute(raising))
            assert isinstance(error, asyncpg.PostgresError), case.id
            assert pool.stats().opened == max(opened, 1), case.id


def test_the_survey_is_whole():
    """Every entry has a line, and every line a name of its own."""
    assert {row.entry for row in ROWS} == set(range(1, SURVEY + 1))
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert {row.evidence for row in ROWS} == {"source", "seen", "document", "supposed"}
