"""What the pool would repeat never has an effect a second time: statements written by a grammar, judged by a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import runpy
from collections import Counter
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.sql.read_only import StatementReader
from resilient_pool.testing import FaultProxy

ROOT = Path(__file__).parents[1]
SCHEMA = runpy.run_path(str(ROOT / "disguises.py"))["SCHEMA"]
Writer = runpy.run_path(str(ROOT / "generated_reads.py"))["Writer"]
EXAMPLES = int(os.environ.get("GENERATED_READS", "300"))
"""How many statements are written; `make test` takes a few hundred."""

# What a plain read may hide, as its documentation says: overloads of PostgreSQL's own names, operators, casts, domains, views,
# computed fields of tables, operator classes.
HIDDEN = ("log", "age", "@+@", "<->", "positive", "wrapped", "touch", "telling", "ing ", "sequenced", "plain")
HIDDEN += ("===!", ">>#", "paired", "hash_parted")
STATE = """
SELECT (SELECT last_value + is_called::int FROM numbers), (SELECT count(*) FROM journal),
       (SELECT count(*) FROM pg_largeobject_metadata), (SELECT count(*) FROM pg_replication_slots),
       (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
       (SELECT md5(string_agg(name || setting, ',' ORDER BY name)) FROM pg_settings WHERE name <> 'transaction_read_only')
"""
# Not made smaller when they fail: each try costs several round trips, and the statement itself tells enough.
FIXED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def statements(draw):
    """A SELECT, VALUES or WITH."""
    return Writer(lambda options: draw(st.sampled_from(options))).statement()


class Judge:
    """A server, on one connection, and what it has seen of effects."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.told = []
        self.reader = StatementReader()
        self.check = ReadCheck(self.reader)
        self.seen = Counter()

    async def effects(self):
        """Everything that a statement can leave behind."""
        return (*await self.connection.fetchrow(STATE), len(self.told))

    async def has_effect(self, sql, begin):
        """Whether a statement leaves something behind, in a transaction begun that way; `None` if it fails."""
        before = await self.effects()
        failed = False
        await self.connection.execute(begin)
        try:
            await self.connection.execute(sql)
            await self.connection.execute("COMMIT")
        except asyncpg.PostgresError:
            await self.connection.execute("ROLLBACK")
            failed = True
        after = await self.effects()
        if after != before:
            await self.connection.execute("SELECT pg_advisory_unlock_all(); RESET application_name")
            return True
        return None if failed else False

    async def judge(self, sql):
        """Whether a repeat of a statement leaves no effect, and a plain read has none that is not hidden."""
        statement = self.reader.read(sql)
        repeated = statement.looks_like_read and await self.check.allows(DriverConnection(self.connection), [sql])
        twice = await self.has_effect(sql, "BEGIN READ ONLY, NOT DEFERRABLE") if repeated else False
        once = await self.has_effect(sql, "BEGIN")
        self.seen.update(
            written=1, ran=once is not None, effect=once is True, repeated=repeated, plain=statement.is_plain_read
        )
        self.seen.update({"repeated though an effect": repeated and once is True})
        assert not twice, sql
        assert not (statement.is_plain_read and once and not any(word in sql for word in HIDDEN)), sql


@pytest.fixture(params=["postgres", "postgres16"])
def judge(request):
    server = request.getfixturevalue(request.param)
    with asyncio.Runner() as runner:
        runner.run(server.create_database("generated"))
        connection = runner.run(asyncpg.connect(server.dsn(database="generated")))
        try:
            runner.run(connection.execute(SCHEMA))
            judge = Judge(connection)
            runner.run(connection.add_listener("effects", lambda *told: judge.told.append(told)))
            judge.run = runner.run
            judge.server = server
            yield judge
        finally:
            runner.run(connection.close())
            runner.run(drop(server))


async def drop(server):
    async with server.admin() as admin:
        await admin.execute("DROP DATABASE generated WITH (FORCE)")


def test_what_is_repeated_has_no_effect_a_second_time(judge):
    """Whatever notation names a function: where the catalog allows a repeat, it leaves nothing behind."""

    @FIXED
    @given(statements())
    def holds(sql):
        judge.run(judge.judge(sql))

    holds()
    print(dict(judge.seen))  # noqa: T201 - the figures of a long run
    assert judge.seen["effect"] > EXAMPLES / 20
    assert judge.seen["repeated"] > EXAMPLES / 20


@pytest.mark.parametrize("judge", ["postgres"], indirect=True)
def test_a_lost_answer_never_means_two_effects(judge):
    """The whole pool, with the answer to each statement lost."""
    judge.run(lose_answers(judge))


async def lose_answers(judge):
    texts = []
    settings(FIXED, max_examples=max(EXAMPLES // 4, 60))(given(statements())(lambda sql: texts.append(sql)))()
    with FaultProxy(judge.server.host, judge.server.port) as proxy:
        dsn = proxy.dsn(judge.server.dsn(database="generated"))
        async with ResilientPool(dsn, ssl=False, max_size=1, deadline=10) as pool:
            for sql in texts:
                before = await judge.effects()
                await judge.has_effect(sql, "BEGIN")
                once = await judge.effects()
                await pool.execute("SELECT 1")
                proxy.swallow_next_answer(matching=sql.encode())
                with contextlib.suppress(OutcomeUnknownError, asyncpg.PostgresError):
                    await pool.execute(sql)
                after = await judge.effects()
                for kind in (0, 1, 2, -1):
                    assert after[kind] - once[kind] <= once[kind] - before[kind], sql
