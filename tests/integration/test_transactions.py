"""The retried transaction on a real server: what ends it, what repeats it, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
from typing import ClassVar

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.events import RetryScheduled
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


class ApplicationError(Exception):
    """Something of the application's own."""


@pytest.fixture
async def pool(postgres: EmbeddedPostgres, proxy: FaultProxy):
    async with ResilientPool(proxy.dsn(postgres.dsn()), deadline=10.0) as pool:
        yield pool


async def rows(pool, table):
    return [row["id"] for row in await pool.fetch(f"SELECT id FROM {table} ORDER BY id")]


def refusing_to_commit(table):
    """A deferred trigger that refuses the first COMMIT as a serialization failure, and lets the others pass."""
    return (
        f"CREATE SEQUENCE s_{table};"
        f"CREATE FUNCTION f_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('s_{table}') = 1 THEN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END IF; RETURN NULL; END $$;"
        f"CREATE CONSTRAINT TRIGGER t AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
        f"EXECUTE FUNCTION f_{table}()"
    )


@pytest.fixture
async def refused_once(postgres, table):
    """The same table, whose first COMMIT is refused."""
    async with postgres.admin() as admin:
        await admin.execute(refusing_to_commit(table))
    yield table
    async with postgres.admin() as admin:
        await admin.execute(f"DROP FUNCTION f_{table} CASCADE; DROP SEQUENCE s_{table}")


async def test_a_block_that_ends_is_committed_once(pool, table):
    """The loop ends after it, too."""
    numbers = []
    async for attempt in pool.transaction():
        async with attempt as connection:
            numbers.append(attempt.number)
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
    assert numbers == [1]
    assert await rows(pool, table) == [1]


async def test_a_connection_lost_inside_the_block_is_replaced_and_the_block_run_again(pool, postgres, table):
    """Everything of it, and nothing twice."""
    numbers = []
    async for attempt in pool.transaction():
        async with attempt as connection:
            numbers.append(attempt.number)
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
            if attempt.number == 1:
                await postgres.terminate_backends(f"pid = {connection.get_server_pid()}")
            await connection.execute(f"INSERT INTO {table} VALUES (2)")
    assert numbers == [1, 2]
    assert await rows(pool, table) == [1, 2]


async def test_a_lost_connection_is_replaced_before_the_block_begins(pool, postgres, table):
    """What fails at BEGIN does not reach the block."""
    await pool.fetch("SELECT 1")
    await postgres.terminate_backends()
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES ({attempt.number})")
    assert await rows(pool, table) == [1]


async def test_a_conflict_at_commit_is_repeated(pool, refused_once):
    """Nothing follows the block, so the loop is certain to go on."""
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {refused_once} VALUES ({attempt.number})")
    assert await rows(pool, refused_once) == [2]


async def test_continue_counts_as_the_end_of_the_block(pool, refused_once):
    """It leads to the next attempt just so."""
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {refused_once} VALUES ({attempt.number})")
            continue
    assert await rows(pool, refused_once) == [2]


async def test_a_loop_within_another_is_repeated(pool, refused_once):
    """The block knows which loop is its own."""
    for round_number in (10, 20):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {refused_once} VALUES ({round_number + attempt.number})")
    assert await rows(pool, refused_once) == [12, 21]


async def leave_by_break(pool, table):
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
            break


async def leave_by_return(pool, table):
    async for attempt in pool.transaction():
        async with attempt as connection:
            return await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def leave_by_break_to_an_outer_loop(pool, table):
    async for outer in pool.transaction():
        async with outer:
            pass
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                break


async def go_on_behind_the_block(pool, table):
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
        await pool.fetch("SELECT 1")


async def enter_in_a_loop_of_its_own(pool, table):
    async def once():
        yield 1

    async for attempt in pool.transaction():
        async for _ in once():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def enter_elsewhere(pool, table):
    async def work(attempt):
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")

    async for attempt in pool.transaction():
        await work(attempt)


WAYS = [
    leave_by_break,
    leave_by_return,
    leave_by_break_to_an_outer_loop,
    go_on_behind_the_block,
    enter_in_a_loop_of_its_own,
    enter_elsewhere,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_leaving_commits(pool, table, way):
    """However the block is left without an exception."""
    await way(pool, table)
    assert await rows(pool, table) == [1]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_what_cannot_be_repeated_for_certain_is_raised_and_not_taken_for_done(pool, refused_once, way):
    """A conflict at COMMIT after `break` or `return` surfaces, and nothing is left of the transaction."""
    with pytest.raises(asyncpg.SerializationError) as caught:
        await way(pool, refused_once)
    assert "rolled back" in caught.value.__notes__[-1]
    assert await rows(pool, refused_once) == []


async def test_an_exception_of_the_applications_rolls_back_and_passes(pool, table):
    """It is the same object, and there is no second attempt."""
    mine = ApplicationError()
    with pytest.raises(ApplicationError) as caught:
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                raise mine
    assert caught.value is mine
    assert not hasattr(mine, "__notes__")
    assert await rows(pool, table) == []


async def test_an_exception_caught_inside_the_loop_ends_it(pool, table):
    """It was rolled back as the application wanted; another attempt would undo that decision."""
    numbers = []
    async for attempt in pool.transaction():
        try:
            async with attempt as connection:
                numbers.append(attempt.number)
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                raise ApplicationError
        except ApplicationError:
            pass
    assert numbers == [1]
    assert await rows(pool, table) == []


@pytest.mark.parametrize(
    "error",
    [ConnectionRefusedError(111, "elsewhere"), ConnectionResetError(104, "elsewhere"), TimeoutError()],
    ids=repr,
)
async def test_another_services_loss_is_the_applications_own(pool, table, error):
    """What somebody else's connection met says nothing about this one."""
    with pytest.raises(type(error)) as caught:
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                raise error
    assert caught.value is error
    assert pool.stats().retries_total == 0
    assert await rows(pool, table) == []


class Watched(asyncpg.Connection):
    """Notes whether a transaction is open when the session is reset."""

    open_at_reset: ClassVar[list[bool]] = []

    async def reset(self, *, timeout=None):
        self.open_at_reset.append(self.is_in_transaction())
        await super().reset(timeout=timeout)


async def test_an_exception_passes_only_after_the_rollback(postgres, table):
    """Its locks are gone when the application goes on; the reset, in the background, would be too late for that."""
    async with ResilientPool(postgres.dsn(), connection_class=Watched) as pool:
        Watched.open_at_reset.clear()
        with pytest.raises(ApplicationError):
            async for attempt in pool.transaction():
                async with attempt as connection:
                    await connection.execute(f"LOCK TABLE {table}")
                    raise ApplicationError
        await pool.fetch("SELECT 1")
    assert Watched.open_at_reset == [False]


async def test_what_follows_a_commit_of_the_applications_own_is_not_repeated_either(pool, postgres, refused_once):
    """A conflict at the last COMMIT surfaces: the block as a whole cannot be run again."""
    own = f"own_{refused_once}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TABLE {own} (id int)")
    with pytest.raises(asyncpg.SerializationError):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {own} VALUES (1)")
                await connection.execute("COMMIT")
                await connection.execute("BEGIN")
                await connection.execute(f"INSERT INTO {refused_once} VALUES (1)")
    assert await rows(pool, own) == [1]
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {own}")


async def test_a_failure_that_was_caught_inside_the_block_is_not_taken_for_success(pool, table):
    """The server rolls such a transaction back at its COMMIT, and says so in its answer only."""
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        async for attempt in pool.transaction(resolve_commit=False):
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                with contextlib.suppress(asyncpg.DivisionByZeroError):
                    await connection.fetch("SELECT 1 / 0")
    assert await rows(pool, table) == []


async def test_what_the_application_committed_itself_is_not_repeated(pool, postgres, table):
    """After a COMMIT of its own inside the block, the loss surfaces."""
    with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError)):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
                await connection.execute("/* mine */ COMMIT")
                await postgres.terminate_backends(f"pid = {connection.get_server_pid()}")
                await connection.execute(f"INSERT INTO {table} VALUES (2)")
    assert await rows(pool, table) == [1]


async def test_inside_the_block_a_transaction_is_a_savepoint(pool, table):
    """What is undone inside it leaves the rest."""
    async for attempt in pool.transaction(isolation="repeatable_read"):
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
            with pytest.raises(asyncpg.DivisionByZeroError):
                async with connection.transaction():
                    await connection.execute(f"INSERT INTO {table} VALUES (2)")
                    await connection.fetch("SELECT 1 / 0")
            assert await connection.fetchval("SHOW transaction_isolation") == "repeatable read"
    assert await rows(pool, table) == [1]


async def test_an_attempt_that_was_not_entered_is_refused(pool):
    """Otherwise the loop would never end."""
    with pytest.raises(asyncpg.InterfaceError, match="not entered"):
        async for _ in pool.transaction():
            pass


async def test_a_callback_is_repeated_and_its_result_returned(pool, refused_once):
    """It may return from wherever it likes."""

    async def insert(connection, first):
        return await connection.fetchval(f"INSERT INTO {refused_once} VALUES ($1) RETURNING id", first)

    assert await pool.run_in_transaction(insert, 7, isolation="read_committed") == 7
    assert await rows(pool, refused_once) == [7]
    assert pool.stats().retries_total == 1


async def test_two_workers_under_serializable_never_see_a_conflict_and_their_sums_add_up(postgres, table):
    """Both read and write the same two rows, as often as they can."""
    events = []
    async with ResilientPool(postgres.dsn(), observers=[events.append]) as pool:
        await pool.execute(f"ALTER TABLE {table} ADD COLUMN amount int; INSERT INTO {table} VALUES (1, 0), (2, 0)")

        async def work(row):
            for _ in range(40):
                async for attempt in pool.transaction(isolation="serializable"):
                    async with attempt as connection:
                        total = await connection.fetchval(f"SELECT sum(amount) FROM {table}")
                        await connection.execute(
                            f"UPDATE {table} SET amount = $1 - (SELECT amount FROM {table} WHERE id <> $2) + 1 WHERE id = $2",
                            total,
                            row,
                        )

        async with asyncio.timeout(30):
            await asyncio.gather(work(1), work(2))
        assert await pool.fetchval(f"SELECT sum(amount) FROM {table}") == 80
    assert any(isinstance(event, RetryScheduled) and event.sqlstate == "40001" for event in events)


@pytest.mark.parametrize("isolation", ["serializable", "repeatable_read", "read_committed"])
async def test_two_workers_that_lock_the_same_rows_in_opposite_order_all_end(postgres, table, isolation):
    """Conflicts and deadlocks are repeated, no transfer is made twice or lost, and nobody waits for ever."""
    events = []
    settings = {"deadlock_timeout": "5ms"}
    async with ResilientPool(postgres.dsn(), server_settings=settings, observers=[events.append]) as pool:
        await pool.execute(f"ALTER TABLE {table} ADD COLUMN amount int; INSERT INTO {table} VALUES (1, 0), (2, 0)")

        arrived = set()

        async def transfer(connection, giver, taker):
            await connection.execute(f"UPDATE {table} SET amount = amount - 3 WHERE id = $1", giver)
            arrived.add(giver)
            while len(arrived) < 2:  # each first attempt holds its row before it asks for the other's
                await asyncio.sleep(0.001)
            await connection.execute(f"UPDATE {table} SET amount = amount + 5 WHERE id = $1", taker)
            return giver

        async def work(giver, taker):
            for _ in range(25):
                assert await pool.run_in_transaction(transfer, giver, taker, isolation=isolation) == giver

        async with asyncio.timeout(30):
            await asyncio.gather(work(1, 2), work(2, 1))
        found = await pool.fetch(f"SELECT id, amount FROM {table} ORDER BY id")
        assert [tuple(row) for row in found] == [(1, 50), (2, 50)]
    conflicts = {event.sqlstate for event in events if isinstance(event, RetryScheduled)}
    assert conflicts
    assert conflicts <= {"40001", "40P01"}


class Counting(asyncpg.Connection):
    """Counts the statements that are sent."""

    sent = 0

    async def _do_execute(self, *args, **kwargs):
        type(self).sent += 1
        return await super()._do_execute(*args, **kwargs)


@pytest.mark.parametrize(
    ("sql", "options", "extra"),
    [
        ("INSERT INTO {} VALUES ($1)", {}, 1),
        ("INSERT INTO {} VALUES ($1)", {"resolve_commit": False}, 0),
        ("SELECT id FROM {} WHERE id = $1", {}, 0),
        ("SELECT id FROM {} WHERE id = $1 FOR SHARE", {}, 1),
        ("SELECT id, random() FROM {} WHERE id = $1", {"readonly": True}, 0),
    ],
)
async def test_a_transaction_that_may_have_written_costs_one_question(postgres, table, sql, options, extra):
    """And one that is read-only, or that nobody wants resolved, costs none."""
    async with ResilientPool(postgres.dsn(), connection_class=Counting, max_size=1) as pool:

        async def work():
            async for attempt in pool.transaction(**options):
                async with attempt as connection:
                    await connection.fetch(sql.format(table), 1)

        await work()
        Counting.sent = 0
        await work()
        assert Counting.sent == 1 + extra


async def test_exactly_once_on_a_connection_is_refused(pool, table):
    """The connection may be in the middle of anything."""
    async with pool.acquire() as connection:
        with pytest.raises(asyncpg.InterfaceError, match="exactly_once"):
            await connection.execute(f"INSERT INTO {table} VALUES (1)", exactly_once=True)


# What is certain to go on with the loop, and what is not


@contextlib.asynccontextmanager
async def in_a_context_manager(pool):
    async for attempt in pool.transaction():
        async with attempt as connection:
            yield connection


async def test_a_context_manager_around_the_loop_raises_a_conflict_at_commit(pool, refused_once):
    """The body of a context manager cannot be run again, so nothing is, and the error names what can."""
    with pytest.raises(asyncpg.SerializationError) as caught:
        async with in_a_context_manager(pool) as connection:
            await connection.execute(f"INSERT INTO {refused_once} VALUES (1)")
    assert "run_in_transaction" in caught.value.__notes__[-1]
    assert await rows(pool, refused_once) == []


async def test_a_context_manager_around_the_loop_raises_what_failed_inside_it(pool, table):
    """The error itself, not "generator didn't stop", and no transaction stays open."""
    with pytest.raises(asyncpg.SerializationError) as caught:
        async with in_a_context_manager(pool) as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
            await connection.execute("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$")
    assert "run_in_transaction" in caught.value.__notes__[-1]
    assert await rows(pool, table) == []


async def test_rows_yielded_from_inside_the_block_are_yielded_once(pool, postgres, table):
    """After the loss of a connection the reader is told, and does not read the first rows again."""
    await pool.execute(f"INSERT INTO {table} SELECT generate_series(1, 5)")
    seen = []

    async def each():
        async for attempt in pool.transaction():
            async with attempt as connection:
                async for row in connection.cursor(f"SELECT id FROM {table} ORDER BY id", prefetch=1):
                    yield row["id"], connection.get_server_pid()

    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
        async for number, pid in each():
            seen.append(number)
            if number == 3:
                await postgres.terminate_backends(f"pid = {pid}")
    assert seen == [1, 2, 3]
    assert "run_in_transaction" in caught.value.__notes__[-1]


async def test_a_generator_that_yields_after_its_loop_is_repeated(pool, refused_once):
    """What it has not yielded yet cannot be yielded twice."""

    async def each():
        numbers = []
        async for attempt in pool.transaction():
            async with attempt as connection:
                numbers.append(attempt.number)
                await connection.execute(f"INSERT INTO {refused_once} VALUES (1)")
        for number in numbers:
            yield number

    assert [number async for number in each()] == [1, 2]


async def entered_through_a_stack(pool, table):
    async for attempt in pool.transaction():
        async with contextlib.AsyncExitStack() as stack:
            connection = await stack.enter_async_context(attempt)
            await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def entered_by_a_helper(pool, table):
    @contextlib.asynccontextmanager
    async def entered(attempt):
        async with attempt as connection:
            yield connection

    async for attempt in pool.transaction():
        async with entered(attempt) as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def entered_in_a_task(pool, table):
    async def work(attempt):
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")

    async for attempt in pool.transaction():
        await asyncio.create_task(work(attempt))


async def followed_by_finally(pool, table):
    async for attempt in pool.transaction():
        try:
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
        finally:
            await asyncio.sleep(0)


async def inside_another_block(pool, table):
    async for attempt in pool.transaction():
        async with asyncio.timeout(10):
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def asked_for_by_hand(pool, table):
    loop = pool.transaction()
    attempt = await anext(loop)
    async with attempt as connection:
        await connection.execute(f"INSERT INTO {table} VALUES (1)")


UNCERTAIN = [
    entered_through_a_stack,
    entered_by_a_helper,
    entered_in_a_task,
    followed_by_finally,
    inside_another_block,
    asked_for_by_hand,
]


@pytest.mark.parametrize("way", UNCERTAIN, ids=lambda way: way.__name__)
async def test_what_is_not_certain_to_go_on_raises_and_names_run_in_transaction(pool, refused_once, way):
    """Nothing is repeated, nothing is taken for done, and no retry is counted that was never made."""
    with pytest.raises(asyncpg.SerializationError) as caught:
        await way(pool, refused_once)
    assert "run_in_transaction" in caught.value.__notes__[-1]
    assert pool.stats().retries_total == 0
    assert await rows(pool, refused_once) == []


async def with_an_else(pool, table):
    done = []
    async for attempt in pool.transaction():
        async with attempt as connection:
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
    else:
        done.append(True)
    assert done == [True]


async def inside_try_and_finally(pool, table):
    try:
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES (1)")
    finally:
        await asyncio.sleep(0)


async def nested_in_a_loop_of_its_own(pool, table):
    for number in range(2):
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute(f"INSERT INTO {table} VALUES ({number})")
                for _ in range(2):
                    await connection.fetch("SELECT 1")
    await pool.execute(f"DELETE FROM {table} WHERE id = 0")


async def nested_in_another_transaction(pool, table):
    async for outer in pool.transaction():
        async with outer as first:
            await first.fetch("SELECT 1")
            async for inner in pool.transaction():
                async with inner as second:
                    await second.execute(f"INSERT INTO {table} VALUES (1)")


async def in_a_while(pool, table):
    tries = 0
    while tries < 1:
        tries += 1
        async for attempt in pool.transaction():
            async with attempt as connection:
                if connection is not None:
                    await connection.execute(f"INSERT INTO {table} VALUES (1)")


async def with_a_second_context_inside(pool, table):
    async for attempt in pool.transaction():
        async with attempt as connection, asyncio.timeout(10):
            await connection.execute(f"INSERT INTO {table} VALUES (1)")


CERTAIN = [
    with_an_else,
    inside_try_and_finally,
    nested_in_a_loop_of_its_own,
    nested_in_another_transaction,
    in_a_while,
    with_a_second_context_inside,
]


@pytest.mark.parametrize("eager", [False, True], ids=["a task", "an eager task"])
@pytest.mark.parametrize("way", CERTAIN, ids=lambda way: way.__name__)
async def test_what_is_certain_to_go_on_is_repeated(pool, refused_once, way, eager):
    """On every Python, also where a task begins to run as it is made."""
    factory = getattr(asyncio, "eager_task_factory", None)
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    if eager and factory is not None:
        loop.set_task_factory(factory)
    try:
        await asyncio.create_task(way(pool, refused_once))
    finally:
        loop.set_task_factory(before)
    assert await rows(pool, refused_once) == [1]
    assert pool.stats().retries_total == 1


async def test_an_option_that_is_misspelt_or_an_argument_of_the_functions_own_is_a_type_error(pool, table):
    """Neither is swallowed in silence, and nothing is run."""

    async def pay(connection, amount=1):
        await connection.execute(f"INSERT INTO {table} VALUES ($1)", amount)

    with pytest.raises(TypeError, match=r"'amount' of run_in_transaction\(\).*by position"):
        await pool.run_in_transaction(pay, amount=500)
    with pytest.raises(TypeError, match="did you mean 'isolation'"):
        await pool.run_in_transaction(pay, isolaton="serializable")
    with pytest.raises(TypeError, match="did you mean 'isolation'"):
        pool.transaction(isolaton="serializable")
    assert await rows(pool, table) == []


async def test_a_transaction_that_is_entered_without_its_loop_says_how_it_is_written(pool):
    """`async with pool.transaction()` is how other pools have it."""
    with pytest.raises(TypeError, match=r"write `async for attempt in pool\.transaction\(\):`"):
        async with pool.transaction():
            pass
