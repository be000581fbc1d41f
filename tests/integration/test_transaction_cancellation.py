"""A transaction cancelled at any of its awaits, on whichever path: nothing stays open, and the pool works on."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from cut import Cut

from resilient_pool import BackoffPolicy, ResilientPool
from resilient_pool.events import OutcomeResolved, RetryScheduled
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

PROMPT = BackoffPolicy(base=0.001, max_value=0.002, jitter=None, max_attempts=None)
DATABASE = "cancelled"
ROLE = "blind"
LOG = "public.commits"

# The first COMMIT after `armed` was emptied is refused as a conflict.
TABLES = f"""
    CREATE TABLE entry (id int);
    GRANT ALL ON entry TO stranger;
    CREATE SEQUENCE armed;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('armed') = 1 THEN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END IF; RETURN NULL;
    END $$;
    CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION refuse();
    GRANT ALL ON entry TO {ROLE};
    GRANT ALL ON SEQUENCE armed TO {ROLE}, stranger;
    GRANT ALL ON SCHEMA public TO {ROLE};
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO {ROLE};
    REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC;
    GRANT EXECUTE ON FUNCTION pg_control_system() TO stranger;
"""


@pytest.fixture(scope="module")
async def database(postgres: EmbeddedPostgres):
    """A database in which one role cannot ask for the epoch, so that only the commit log tells it anything."""
    await postgres.create_database(DATABASE)
    await postgres.create_role(ROLE, password=ROLE)
    async with postgres.admin() as admin:
        await admin.execute("CREATE ROLE stranger")
    async with postgres.admin(DATABASE) as admin:
        await admin.execute(TABLES)
    yield DATABASE
    async with postgres.admin() as admin:
        await admin.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")
        await admin.execute(f"DROP ROLE {ROLE}, stranger")


class Scene:
    """A pool of one connection, and what happens to it."""

    def __init__(self, pool: ResilientPool, proxy: FaultProxy, admin, name: str) -> None:
        self.pool = pool
        self.proxy = proxy
        self.admin = admin
        self.name = name
        self.events: list[object] = []

    @property
    def answers(self) -> list[str]:
        return [event.answer for event in self.events if isinstance(event, OutcomeResolved)]

    @property
    def retries(self) -> int:
        return sum(isinstance(event, RetryScheduled) for event in self.events)

    async def sessions(self) -> dict[int, str]:
        """Tell the state of each session, a transaction that is open included."""
        rows = await self.admin.fetch(
            "SELECT pid, CASE WHEN xact_start IS NULL THEN state ELSE 'in transaction' END AS state "
            "FROM pg_stat_activity WHERE application_name = $1",
            self.name,
        )
        return {row["pid"]: row["state"] for row in rows}


@contextlib.asynccontextmanager
async def staged(postgres, proxy, *, log: str | None, user: str | None):
    name = f"cut_{uuid.uuid4().hex}"
    events: list[object] = []
    async with (
        postgres.admin(DATABASE) as admin,
        ResilientPool(
            proxy.dsn(postgres.dsn(DATABASE, user=user, password=user)),
            max_size=1,
            deadline=10.0,
            backoff=PROMPT,
            reconnect=PROMPT,
            commit_log=log,
            server_settings={"application_name": name},
            observers=[events.append],
        ) as pool,
    ):
        await admin.execute("TRUNCATE entry; SELECT setval('armed', 1)")
        scene = Scene(pool, proxy, admin, name)
        scene.events = events
        await pool.run_in_transaction(insert, 0)
        try:
            yield scene
        except BaseException:
            pool.terminate()  # closing would wait for what was lost
            raise


async def insert(connection, number):
    await connection.execute("INSERT INTO entry VALUES ($1)", number)


async def in_a_loop(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction():
        async with attempt as connection:
            await insert(connection, number)


async def by_callback(scene: Scene, number: int) -> None:
    await scene.pool.run_in_transaction(insert, number)


async def losing_its_connection(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction():
        async with attempt as connection:
            await insert(connection, number)
            if attempt.number == 1:
                connection._driver.terminate()
            await connection.fetch("SELECT 1")


async def conflicting(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction():
        async with attempt as connection:
            await insert(connection, number)
            if attempt.number == 1:
                await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = '40001'; END $$")


async def exactly_once(scene: Scene, number: int) -> None:
    await scene.pool.execute("INSERT INTO entry VALUES ($1)", number, exactly_once=True)


async def only_reading(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction():
        async with attempt as connection:
            await connection.fetch("SELECT id FROM entry WHERE id = $1", number)


async def declared_read_only(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction(readonly=True):
        async with attempt as connection:
            await connection.fetch("SELECT id FROM entry WHERE id = $1", number)


async def under_another_role(scene: Scene, number: int) -> None:
    async for attempt in scene.pool.transaction():
        async with attempt as connection:
            await connection.execute("SET LOCAL ROLE stranger")
            await insert(connection, number)


# What goes wrong


async def nothing(scene: Scene) -> None:
    """Let everything go well, and the log be pruned."""
    scene.pool._transactions.commit_resolver._pruned = None


async def expire(scene: Scene) -> None:
    """Let it begin on a new connection."""
    await scene.pool.expire_connections()


async def drop_the_log(scene: Scene) -> None:
    """Let the question before COMMIT fail, so that the block is run again with one that cannot."""
    await scene.admin.execute(f"DROP TABLE IF EXISTS {LOG}")
    scene.pool._transactions.commit_resolver._uses_savepoints = False


async def swallow(scene: Scene) -> None:
    scene.proxy.swallow_next_answer(matching="COMMIT")


async def lose(scene: Scene) -> None:
    scene.proxy.lose_next_request(matching="COMMIT")


async def lose_unnoticed(scene: Scene) -> None:
    scene.proxy.lose_next_request(matching="COMMIT", server_sees_close=False)


async def lose_the_beginning(scene: Scene) -> None:
    scene.proxy.lose_next_request(matching="BEGIN")


async def lose_the_question_before(scene: Scene) -> None:
    scene.proxy.lose_next_request(matching="pg_current_xact_id")


async def lose_the_question_after(scene: Scene) -> None:
    scene.proxy.swallow_next_answer(matching="COMMIT")
    scene.proxy.lose_next_request(matching="pg_xact_status")


async def refuse(scene: Scene) -> None:
    await scene.admin.execute("SELECT setval('armed', 1, false)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """One way through a transaction.

    Attributes:
        mishap: What is arranged before each.
        work: What is cut.
        answers: What resolution finds, if it is not cut.
        retries: How often an attempt is repeated, if it is not cut.
        log: The pool's commit log.
        blind: Whether the role cannot ask for the epoch, so that the log alone is asked.
        rows: How many rows it leaves, if it is not cut.
        orphaned: Whether the server does not know that it has lost a client: then that session is not the pool's to end.
    """

    mishap: Callable[[Scene], Awaitable[None]]
    work: Callable[[Scene, int], Awaitable[None]] = in_a_loop
    answers: tuple[str, ...] = ()
    retries: int = 0
    log: str | None = None
    blind: bool = False
    rows: int = 1
    orphaned: bool = False


PATHS = {
    "all is well": Path(mishap=nothing, work=by_callback),
    "on a new connection": Path(mishap=expire),
    "pruning": Path(mishap=nothing, log=LOG),
    "committed": Path(mishap=swallow, answers=("committed",)),
    "committed, callback": Path(mishap=swallow, work=by_callback, answers=("committed",)),
    "committed, exactly once": Path(mishap=swallow, work=exactly_once, answers=("committed",)),
    "committed, asked twice": Path(mishap=lose_the_question_after, answers=("committed",)),
    "aborted": Path(mishap=lose, answers=("aborted",), retries=1),
    "aborted, exactly once": Path(mishap=lose, work=exactly_once, answers=("aborted",), retries=1),
    "in progress, terminated": Path(mishap=lose_unnoticed, answers=("aborted",), retries=1, orphaned=True),
    "the log says committed": Path(mishap=swallow, answers=("committed",), log=LOG, blind=True),
    "the log says aborted": Path(mishap=lose, answers=("aborted",), retries=1, log=LOG, blind=True),
    "lost before COMMIT": Path(mishap=lose_the_question_before, retries=1),
    "lost at BEGIN": Path(mishap=lose_the_beginning, retries=1),
    "lost in the block": Path(mishap=nothing, work=losing_its_connection, retries=1),
    "reads run again": Path(mishap=swallow, work=only_reading, retries=1, rows=0),
    "reads that are done": Path(mishap=lose, work=declared_read_only, rows=0),
    "the log not to be written": Path(mishap=nothing, work=under_another_role, log=LOG),
    "the log not to be written, lost": Path(
        mishap=lose, work=under_another_role, answers=("aborted",), retries=1, log=LOG
    ),
    "the log dropped": Path(mishap=drop_the_log, log=LOG),
    "conflict at COMMIT": Path(mishap=refuse, retries=1),
    "conflict in the block": Path(mishap=nothing, work=conflicting, retries=1),
}


@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_a_transaction_cancelled_at_any_await_leaves_nothing_open(postgres, database, proxy, path, late):
    """Every await of the path is tried in turn, until the transaction ends before it is cancelled."""
    async with staged(postgres, proxy, log=path.log, user=ROLE if path.blind else None) as scene:
        for at in range(300):
            await path.mishap(scene)
            scene.events.clear()
            cut, ended = await cut_once(path.work(scene, at + 1), at=at, late=late)
            rows = await settled_rows(scene, at + 1, orphaned=path.orphaned)
            assert rows == path.rows if ended is None else rows in (0, path.rows)
            if not cut.happened:
                break
        assert ended is None
        assert (tuple(scene.answers), scene.retries) == (path.answers, path.retries)
        assert at > 3 + 3 * (len(path.answers) + path.retries), "next to nothing was awaited"


@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
async def test_pruning_cut_off_at_any_await_leaves_nothing_open(postgres, database, proxy, late):
    """It runs where nobody waits for it, and ends with the pool at the latest."""
    async with staged(postgres, proxy, log=LOG, user=None) as scene:
        for at in range(100):
            await scene.pool.expire_connections()
            cut, ended = await cut_once(scene.pool._transactions.commit_resolver._prune(), at=at, late=late)
            await settled_rows(scene, 0, orphaned=False)
            if not cut.happened:
                break
        assert ended is None
        assert at >= 2


async def cut_once(work, *, at: int, late: bool) -> tuple[Cut, BaseException | None]:
    cut = Cut(work, at=at, late=late)

    async def main() -> None:
        await cut

    async with asyncio.timeout(10):
        (ended,) = await asyncio.gather(asyncio.create_task(main()), return_exceptions=True)
    assert ended is None or isinstance(ended, asyncio.CancelledError), repr(ended)
    return cut, ended


async def nothing_in_use(pool: ResilientPool) -> None:
    while pool.stats().in_use or pool.stats().resetting:
        await asyncio.sleep(0)


async def settled_rows(scene: Scene, number: int, *, orphaned: bool) -> int:
    """Check that the pool is whole and its one session idle, and count the rows with a number."""
    await asyncio.to_thread(scene.proxy.restore)
    async with asyncio.timeout(5):
        # Before the next use: that would end what was left in the middle of a message.
        await nothing_in_use(scene.pool)
        kept = {link.pid for link in scene.pool._maintenance.connections()}
        while any(state != "idle" for pid, state in (await scene.sessions()).items() if pid in kept):
            await asyncio.sleep(0.002)
        assert await scene.pool.fetchval("SELECT 1") == 1
        await nothing_in_use(scene.pool)
        slots = scene.pool._resources
        (link,) = scene.pool._maintenance.connections()
        assert (slots.size, slots.idle, slots.waiting) == (1, 1, 0)
        while (sessions := await scene.sessions()) != {link.pid: "idle"}:
            if orphaned:
                await scene.admin.fetch(
                    "SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", list(sessions.keys() - {link.pid})
                )
            await asyncio.sleep(0.002)
    return await scene.admin.fetchval("SELECT count(*) FROM entry WHERE id = $1", number)
