"""A COMMIT that was lost is never called done without evidence, however a block hides what it does."""

from __future__ import annotations

import asyncio
import contextlib
import io
import uuid

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

DATABASE = "disguises"

SCHEMA = """
    CREATE TABLE journal (t text);
    CREATE SEQUENCE numbers;
    CREATE TABLE item (id int PRIMARY KEY, a int);
    INSERT INTO item VALUES (1, 1);
    CREATE FUNCTION log(msg text) RETURNS void LANGUAGE sql AS $$ INSERT INTO journal VALUES (msg) $$;
    CREATE FUNCTION audit(n int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN INSERT INTO journal VALUES (n); RETURN 1; END $$;
    CREATE FUNCTION rollup(n int) RETURNS int LANGUAGE sql AS $$ INSERT INTO journal VALUES (n::text) RETURNING 1 $$;
    CREATE FUNCTION announce(x text) RETURNS void LANGUAGE sql AS $$ SELECT pg_notify('jobs', x) $$;
    CREATE FUNCTION liar(n int) RETURNS int STABLE LANGUAGE plpgsql AS $$ BEGIN RETURN audit(n); END $$;
    CREATE VIEW v AS SELECT audit(5) AS x;
    CREATE VIEW vv AS SELECT x + 1 AS y FROM v;
    CREATE FUNCTION plus_audit(int, int) RETURNS int LANGUAGE sql AS $$ SELECT audit(1) $$;
    CREATE OPERATOR #%# (LEFTARG = int, RIGHTARG = int, FUNCTION = plus_audit);
    CREATE FUNCTION checks(n int) RETURNS bool LANGUAGE sql AS $$ SELECT audit(n) = 1 $$;
    CREATE DOMAIN audited AS int CHECK (checks(VALUE));
    CREATE TABLE secret (id int);
    INSERT INTO secret VALUES (1);
"""

# What each does when it is committed: `rows` in the journal, large `objects`, or `heard` notifications.
DISGUISES = {
    "a function": ("SELECT audit(1)", "rows"),
    "an overload of a built-in name": ("SELECT log('paid')", "rows"),
    "attribute notation": ("SELECT g.audit FROM generate_series(1, 1) g", "rows"),
    "attribute notation in WHERE": ("SELECT 1 FROM generate_series(1, 1) g WHERE g.audit > 0", "rows"),
    "attribute notation in ORDER BY": ("SELECT 1 FROM generate_series(1, 1) g ORDER BY g.audit", "rows"),
    "TREAT": ("SELECT TREAT(0 AS lo_create)", "objects"),
    "an operator": ("SELECT 1 #%# 2", "rows"),
    "an operator after DISTINCT FROM": (
        "SELECT a IS DISTINCT FROM (b OPERATOR(pg_catalog.+) audit(7)) FROM (SELECT 1 AS a, 1 AS b) t",
        "rows",
    ),
    "a comma inside brackets": (
        "SELECT 1 FROM (SELECT 1 AS a) t JOIN (SELECT 2 AS b) u ON ARRAY[1,2] = ARRAY[1,2] AND b OPERATOR(pg_catalog.<>) audit(8)",
        "rows",
    ),
    "GROUP BY": ("SELECT 1 GROUP BY ARRAY[1, rollup(1)]", "rows"),
    "a domain": ("SELECT 5::audited", "rows"),
    "a view": ("SELECT * FROM v", "rows"),
    "a view of a view": ("SELECT y FROM vv", "rows"),
    "a function that PostgreSQL is told is stable": ("SELECT liar(1)", "rows"),
    "a cursor WITH HOLD": ("DECLARE held CURSOR WITH HOLD FOR SELECT audit(1)", "rows"),
    "a plain INSERT": ("INSERT INTO journal VALUES ('x')", "rows"),
    "a DO": ("DO $$ BEGIN PERFORM audit(1); END $$", "rows"),
    "a backslash before a quote": ("INSERT INTO journal VALUES ('C:\\dir\\')", "rows"),
    "NOTIFY": ("NOTIFY jobs, 'x'", "heard"),
    "pg_notify": ("SELECT pg_notify('jobs', 'x')", "heard"),
    "pg_notify by a function": ("SELECT announce('x')", "heard"),
    "pg_notify by TREAT of nothing": ("SELECT n.* FROM (SELECT announce('y')) n", "heard"),
}
FAULTS = ["never arrived", "swallowed"]
KINDS = {
    "plain": {},
    "with a log": {"commit_log": "public.commits"},
}


class Scene:
    """A database with every disguise in it, and what is seen to happen there."""

    def __init__(self, server: EmbeddedPostgres, proxy: FaultProxy, admin) -> None:
        self.server, self.proxy, self.admin = server, proxy, admin
        self.heard: list[str] = []

    async def effects(self, kind: str) -> int:
        if kind == "rows":
            return await self.admin.fetchval("SELECT count(*) FROM journal")
        if kind == "objects":
            return await self.admin.fetchval("SELECT count(*) FROM pg_largeobject_metadata")
        mark = uuid.uuid4().hex
        await self.admin.execute(f"NOTIFY jobs, '{mark}'")
        async with asyncio.timeout(5):
            while mark not in self.heard:
                await asyncio.sleep(0.005)
        return len(self.heard) - 1

    def arrange(self, fault: str) -> None:
        if fault == "never arrived":
            self.proxy.lose_next_request(matching=b"COMMIT")
        else:
            self.proxy.swallow_next_answer(matching=b"COMMIT")


@pytest.fixture(scope="module")
async def database(postgres: EmbeddedPostgres):
    await postgres.create_database(DATABASE)
    async with postgres.admin(DATABASE) as admin:
        await admin.execute(SCHEMA)
    yield DATABASE
    async with postgres.admin() as admin:
        await admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


@pytest.fixture
async def scene(postgres, database, proxy):
    async with postgres.admin(database) as admin:
        await admin.execute("TRUNCATE journal; SELECT lo_unlink(oid) FROM pg_largeobject_metadata")
        scene = Scene(postgres, proxy, admin)
        await admin.add_listener("jobs", lambda *told: scene.heard.append(told[-1]))
        yield scene


@contextlib.asynccontextmanager
async def opened(scene, **arguments):
    dsn = scene.proxy.dsn(scene.server.dsn(DATABASE))
    async with ResilientPool(dsn, **{"max_size": 1, "deadline": 8.0, **arguments}) as pool:
        await pool.run_in_transaction(nothing)
        try:
            yield pool
        except BaseException:
            pool.terminate()
            raise


async def nothing(connection):
    await connection.fetch("SELECT 1")


async def outcome(work) -> str:
    try:
        await work
    except OutcomeUnknownError:
        return "unknown"
    except asyncpg.ReadOnlySQLTransactionError:
        return "refused"
    except asyncpg.ConnectionDoesNotExistError:
        return "rolled back"
    return "done"


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("sql", "kind"), DISGUISES.values(), ids=DISGUISES)
async def test_no_disguise_is_applied_twice_or_called_done_without_an_effect(scene, sql, kind, fault, arguments):
    """Whatever became of the COMMIT: done means once, unknown means at most once."""
    async with opened(scene, **arguments) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(lambda connection: connection.execute(sql)))
        assert scene.proxy.fired == 1
    effects = await scene.effects(kind)
    assert effects == 1 if said == "done" else effects <= 1
    assert said in ("done", "unknown")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "sql",
    [sql for sql, kind in DISGUISES.values() if kind == "heard"],
    ids=[n for n, (_, k) in DISGUISES.items() if k == "heard"],
)
async def test_what_a_read_only_transaction_lets_pass_is_not_called_done_either(scene, sql, fault):
    """A notification is sent at COMMIT, read-only or not."""
    async with opened(scene) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(lambda connection: connection.execute(sql), readonly=True))
    effects = await scene.effects("heard")
    assert effects == 1 if said == "done" else effects <= 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("sql", "kind"), DISGUISES.values(), ids=DISGUISES)
async def test_no_statement_run_exactly_once_is_applied_twice(scene, sql, kind, fault):
    """Not on a pool either that repeats what is unknown."""
    async with opened(scene, retry_unknown=True) as pool:
        scene.arrange(fault)
        said = await outcome(pool.execute(sql, exactly_once=True))
    effects = await scene.effects(kind)
    assert effects == 1 if said == "done" else effects <= 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_block_of_reads_left_by_return_is_unknown_and_not_done(scene, fault):
    """It cannot be run again, and nothing proves that it wrote nothing."""

    async def leave(pool):
        async for attempt in pool.transaction():
            async with attempt as connection:
                return await connection.fetchval("SELECT id FROM item")

    async with opened(scene) as pool:
        scene.arrange(fault)
        with pytest.raises(OutcomeUnknownError):
            await leave(pool)
        assert pool.stats().retries_total == 0


async def test_a_block_that_writes_when_it_is_run_again_is_unknown(scene):
    """The server refuses the write, and nothing is known of the attempt before."""
    texts = ["SELECT 1", "INSERT INTO journal VALUES ('second')"]

    async def work(connection):
        await connection.execute(texts.pop(0))

    async with opened(scene) as pool:
        scene.arrange("never arrived")
        with pytest.raises(OutcomeUnknownError):
            await pool.run_in_transaction(work)
    assert await scene.effects("rows") == 0


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_pool_that_repeats_what_is_unknown_may_write_when_it_is_run_again(scene, fault):
    """It was told that nothing does harm twice, so there is nothing to guard."""
    texts = ["SELECT 1", "INSERT INTO journal VALUES ('second')"]

    async def work(connection):
        await connection.execute(texts.pop(0))

    async with opened(scene, retry_unknown=True) as pool:
        scene.arrange(fault)
        await pool.run_in_transaction(work)
    assert await scene.effects("rows") == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_block_that_seems_to_have_sent_nothing_is_run_again_read_only(scene, fault):
    """Past the lease it may have sent anything."""

    async def work(_connection):
        await kept[-1].copy_records_to_table("journal", records=[("copied",)])

    async with opened(scene, init=keep) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(work))
    kept.clear()
    assert await scene.effects("rows") <= 1
    assert said == "unknown"


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_copy_is_never_called_done_without_its_effect(scene, fault, way):
    """Neither one into a table, nor one of a query that writes."""

    async def work(connection):
        if way == "out":
            await connection.copy_from_query("SELECT * FROM v", output=io.BytesIO())
        else:
            await connection.copy_records_to_table("journal", records=[("copied",)])

    async with opened(scene) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(work))
    effects = await scene.effects("rows")
    assert said == ("unknown" if way == "out" else "done")
    assert effects == 1 if said == "done" else effects <= 1


@pytest.mark.parametrize("beside", [[], ["SELECT 1"]], ids=["alone", "beside a read"])
@pytest.mark.parametrize("options", [{}, {"resolve_commit": False}], ids=["resolved", "not resolved"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_sent_past_the_lease_is_not_applied_twice(scene, fault, options, beside):
    """On the driver's own connection, which libraries reach for by its private name."""

    async def work(connection):
        for sql in beside:
            await connection.execute(sql)
        await connection._con.execute("INSERT INTO journal VALUES ('past')")

    async with opened(scene) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(work, **options))
    effects = await scene.effects("rows")
    assert effects in {"done": (1,), "unknown": (0, 1), "rolled back": (0,)}[said]


async def keep(connection):
    kept.append(connection)


kept: list[asyncpg.Connection] = []


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_sent_on_a_connection_kept_from_init_is_not_applied_twice(scene, fault):
    """Nothing passed the lease, but the connection has sent something."""

    async def work(_connection):
        await kept[-1].execute("INSERT INTO journal VALUES ('kept')")

    async with opened(scene, init=keep) as pool:
        scene.arrange(fault)
        said = await outcome(pool.run_in_transaction(work))
    kept.clear()
    effects = await scene.effects("rows")
    assert effects in {"done": (1,), "unknown": (0, 1), "rolled back": (0,)}[said]


@pytest.mark.parametrize(
    "sql",
    [
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ],
)
@pytest.mark.parametrize("readonly", [False, True])
async def test_an_isolation_set_inside_the_block_counts(scene, sql, readonly):
    """What was sent beside reads is asked about, whatever the arguments said."""
    runs = []

    async def work(connection):
        runs.append(None)
        await connection.execute(sql)
        await connection.fetch("SELECT id FROM item")

    async with opened(scene) as pool:
        scene.arrange("never arrived")
        await pool.run_in_transaction(work, readonly=readonly, isolation="repeatable_read")
    assert len(runs) == 2


@pytest.mark.parametrize("readonly", [False, True])
async def test_a_default_isolation_of_the_servers_counts(scene, readonly):
    """A transaction that was serializable by default is run again."""
    await scene.admin.execute(f"ALTER DATABASE {DATABASE} SET default_transaction_isolation = 'serializable'")
    try:
        runs = []

        async def work(connection):
            runs.append(await connection.fetchval("SHOW transaction_isolation"))

        async with opened(scene) as pool:
            scene.arrange("never arrived")
            await pool.run_in_transaction(work, readonly=readonly)
        assert runs == ["serializable"] * 2
    finally:
        await scene.admin.execute(f"ALTER DATABASE {DATABASE} RESET default_transaction_isolation")


async def set_serializable(connection):
    await connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE")


@pytest.mark.parametrize("callback", ["setup", "init"])
async def test_an_isolation_that_a_callback_set_counts(scene, callback):
    """The session that was lost cannot be asked any more, so it may have been serializable."""
    runs = []

    async def work(connection):
        runs.append(await connection.fetchval("SHOW transaction_isolation"))

    async with opened(scene, **{callback: set_serializable}) as pool:
        scene.arrange("swallowed")
        await pool.run_in_transaction(work, readonly=True)
    assert len(runs) == 2


async def test_a_server_that_cannot_be_asked_in_time_is_asked_again_later(scene):
    """A statement time-out says nothing about what the server knows."""
    async with opened(scene, server_settings={"statement_timeout": "500ms"}) as pool:
        await pool.expire_connections()
        async with scene.server.admin(DATABASE) as blocker:
            await blocker.execute("BEGIN; LOCK TABLE pg_catalog.pg_proc IN ACCESS EXCLUSIVE MODE")
            with contextlib.suppress(asyncpg.QueryCanceledError):
                await pool.run_in_transaction(lambda connection: connection.execute("INSERT INTO journal VALUES ('a')"))
            await blocker.execute("ROLLBACK")
        await scene.admin.execute("TRUNCATE journal")
        scene.arrange("swallowed")
        await pool.run_in_transaction(lambda connection: connection.execute("INSERT INTO journal VALUES ('b')"))
    assert await scene.effects("rows") == 1


async def test_a_catalog_that_does_not_answer_is_not_waited_for_beyond_the_deadline(scene):
    """Neither before a block of reads is run again, nor when it is."""

    async def work(connection):
        await connection.fetch("SELECT id FROM item")

    async with opened(scene, deadline=3.0) as pool:
        scene.arrange("swallowed")
        scene.proxy.swallow_next_answer("hang", matching=b"WITH RECURSIVE", times=10)
        async with asyncio.timeout(12):
            with pytest.raises(OutcomeUnknownError):
                await pool.run_in_transaction(work)
