"""Units of work of SQLAlchemy's, repeated as a whole: what is committed, what is repeated, and what the application is told."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import asyncpg
import pytest
from in_thread import run_in_thread
from sqlalchemy import ForeignKey, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.orm import selectinload as loaded

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.contrib.sqlalchemy import engine_on, pool_of, retry_session, run_in_session

CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{0}'; END $$"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    items: Mapped[list[Item]] = relationship()


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id", deferrable=True, initially="DEFERRED"))


@pytest.fixture(scope="module")
def database(postgres):
    """A database with the tables of the models."""

    async def make():
        await postgres.create_database("units")
        engine = create_async_engine(postgres.dsn("units").replace("postgresql:", "postgresql+resilient:"))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()

    run_in_thread(make())
    return postgres.dsn("units")


@pytest.fixture
async def engine(database, proxy):
    """An engine behind a proxy; the tables are empty."""
    engine = create_async_engine(proxy.dsn(database).replace("postgresql:", "postgresql+resilient:"))
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE orders, items RESTART IDENTITY"))
    yield engine
    await engine.dispose()


async def names(engine):
    """What is in the table, in order."""
    async with AsyncSession(engine) as session:
        return list(await session.scalars(select(Order.name).order_by(Order.id)))


async def leave_nothing(engine):
    """No place is taken, and no transaction is open."""
    async with asyncio.timeout(10):
        while (stats := pool_of(engine).stats()).in_use or stats.resetting:
            await asyncio.sleep(0.01)


class Once:
    """Something that goes wrong the first time."""

    def __init__(self):
        self.attempts = 0

    def __bool__(self):
        self.attempts += 1
        return self.attempts == 1


# Committing


async def test_what_is_added_is_committed_at_the_end_of_the_block(engine):
    """And can be used afterwards, since nothing expires."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            order = Order(name="first", items=[Item(), Item()])
            session.add(order)
    assert (order.id, order.name, len(order.items), attempt.number) == (1, "first", 2, 1)
    async with AsyncSession(engine) as session:
        (found,) = await session.scalars(select(Order).options(loaded(Order.items)))
        assert len(found.items) == 2
    await leave_nothing(engine)


async def test_a_unit_that_is_entered_says_how_the_loop_is_written(engine):
    """As a transaction of the pool does."""
    with pytest.raises(TypeError, match=r"write `async for attempt in retry_session\(engine\):`"):
        async with retry_session(engine):
            pass


async def test_a_function_is_run_and_what_it_returned_is_returned(engine):
    """With its arguments; on an engine, on what makes sessions, and on a pool."""

    async def add(session, name):
        session.add(Order(name=name))
        await session.flush()
        return await session.scalar(select(func.count()).select_from(Order))

    assert await run_in_session(engine, add, "one") == 1
    assert await run_in_session(async_sessionmaker(engine), add, "two") == 2
    assert await run_in_session(pool_of(engine), add, "three") == 3
    assert await run_in_session(pool_of(engine), add, "four", isolation="serializable") == 4


async def test_sessions_are_those_that_the_sessionmaker_makes(engine):
    """Of its class and with its options."""

    class Own(AsyncSession):
        pass

    async for attempt in retry_session(async_sessionmaker(engine, class_=Own, info={"a": 1}, expire_on_commit=True)):
        async with attempt as session:
            assert (type(session), session.info, session.sync_session.expire_on_commit) == (Own, {"a": 1}, True)


async def test_a_pool_of_the_applications_is_shared_with_its_own_transactions(database, engine):
    """`engine_on(pool)` is an engine like any other."""
    async with ResilientPool(database, max_size=2) as pool:
        async for attempt in retry_session(engine_on(pool)):
            async with attempt as session:
                session.add(Order(name="shared"))
        assert await pool.fetchval("SELECT name FROM orders") == "shared"


async def test_a_task_that_a_listener_begins_has_a_connection_of_its_own(engine):
    """Not the unit's, in whose transaction its statements would be."""
    tasks = []

    async def count():
        async with engine.connect() as connection:
            return (await connection.execute(select(func.count()).select_from(Order))).scalar()

    event.listen(engine.sync_engine, "checkout", lambda *_: tasks or tasks.append(asyncio.create_task(count())))
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="not seen"))
            await session.flush()
            assert await tasks[0] == 0
    await leave_nothing(engine)


async def test_a_listener_that_refuses_a_units_connection_ends_the_unit(engine):
    """Nothing is done on another connection, outside of its transaction."""
    refused = []

    def refuse(*_):
        if not refused:
            refused.append(1)
            raise DisconnectionError

    event.listen(engine.sync_engine, "checkout", refuse)
    with pytest.raises(InvalidRequestError, match="has replaced the connection"):
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="gone"))
    assert await names(engine) == []
    await leave_nothing(engine)


async def test_savepoints_are_rolled_back_by_themselves(engine):
    """What came before and after is committed."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="kept"))
            with contextlib.suppress(IntegrityError):
                async with session.begin_nested():
                    session.add(Order(name="lost"))
                    await session.flush()
                    session.add(Order(name="kept"))
            async with session.begin_nested():
                session.add(Order(name="after"))
    assert await names(engine) == ["kept", "after"]


async def test_a_commit_inside_is_the_units_own(engine):
    """Helpers that commit at their end can be called last; what would follow it is refused."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="committed"))
            await session.commit()
            assert await names(engine) == ["committed"]
            with pytest.raises(InvalidRequestError, match="the unit of work was committed"):
                await session.scalar(select(1))
    assert await names(engine) == ["committed"]
    async for attempt in retry_session(engine):
        async with attempt as session, session.begin():
            session.add(Order(name="begun"))
    assert await names(engine) == ["committed", "begun"]
    await leave_nothing(engine)


async def test_what_is_raised_after_a_commit_inside_is_not_repeated(engine):
    """It was committed."""
    attempts = 0
    with pytest.raises(ConnectionResetError):
        async for attempt in retry_session(engine):
            async with attempt as session:
                attempts += 1
                session.add(Order(name="committed"))
                await session.commit()
                raise ConnectionResetError
    assert (attempts, await names(engine)) == (1, ["committed"])


async def test_a_rollback_inside_begins_again(engine):
    """What came before is gone, what comes after is committed; with nothing after it, nothing is."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="gone"))
            await session.flush()
            await session.rollback()
            session.add(Order(name="after"))
    assert await names(engine) == ["after"]
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="gone"))
            await session.flush()
            await session.rollback()
    assert await names(engine) == ["after"]
    await leave_nothing(engine)


async def test_listeners_to_after_commit_hear_of_what_is_committed(engine, proxy):
    """Once, also when the answer to COMMIT was lost: the listener is called when that is resolved."""
    heard = []

    class Own(AsyncSession):
        pass

    maker = async_sessionmaker(engine, class_=Own)
    async for attempt in retry_session(maker):
        async with attempt as session:
            event.listen(session.sync_session, "after_commit", lambda _, number=attempt.number: heard.append(number))
            session.add(Order(name="once"))
            await session.flush()
            proxy.swallow_next_answer(matching=b"COMMIT", then="rst")
    assert (heard, await names(engine)) == ([1], ["once"])


# Isolation


@pytest.mark.parametrize(
    ("options", "asked", "expected"),
    [
        ({}, {}, "read committed"),
        ({"isolation_level": "SERIALIZABLE"}, {}, "serializable"),
        ({"isolation_level": "SERIALIZABLE"}, {"isolation": "repeatable_read"}, "repeatable read"),
        ({"isolation_level": "AUTOCOMMIT"}, {}, "read committed"),
    ],
)
async def test_the_isolation_is_the_engines_unless_another_is_asked_for(database, engine, options, asked, expected):
    """By the engine's argument or by its execution options; AUTOCOMMIT is none, a unit is one transaction."""
    other = create_async_engine(database.replace("postgresql:", "postgresql+resilient:"), **options)
    for each in (other, engine.execution_options(**options)):
        async for attempt in retry_session(each, **asked):
            async with attempt as session:
                assert await session.scalar(text("SHOW transaction_isolation")) == expected
                session.add(Order(name=uuid.uuid4().hex))
    assert len(await names(engine)) == 2
    async with engine.connect() as connection:
        assert (await connection.execute(text("SHOW transaction_isolation"))).scalar() == "read committed"
    await other.dispose()


async def test_a_transaction_that_has_begun_cannot_be_made_another(engine):
    """It would be ignored, so it is refused."""
    for options in ({"isolation_level": "SERIALIZABLE"}, {"postgresql_readonly": True}):
        with pytest.raises(InvalidRequestError, match="cannot be changed inside a unit of work"):
            async for attempt in retry_session(engine):
                async with attempt as session:
                    await session.connection(execution_options=options)
    async for attempt in retry_session(engine.execution_options(postgresql_readonly=True)):
        async with attempt as session:
            assert await session.scalar(text("SHOW transaction_read_only")) == "on"
    async for attempt in retry_session(engine, readonly=True):
        async with attempt as session:
            assert await session.scalar(text("SHOW transaction_read_only")) == "on"


# Repeating


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
async def test_a_lost_conflict_is_repeated_with_a_new_session(engine, sqlstate):
    """Wherever it comes up: in a statement, or in what the end of the block flushes."""
    once, sessions = Once(), []
    async for attempt in retry_session(engine):
        async with attempt as session:
            sessions.append(session)
            session.add(Order(name="once"))
            if once:
                await session.execute(text(CONFLICT.format(sqlstate)))
    assert (once.attempts, len(set(sessions)), await names(engine)) == (2, 2, ["once"])
    await leave_nothing(engine)


async def test_a_conflict_between_two_units_is_repeated(engine):
    """Two serializable ones that read what the other one writes."""
    barrier = asyncio.Barrier(2)
    attempts = []

    async def work(name):
        async for attempt in retry_session(engine, isolation="serializable"):
            async with attempt as session:
                attempts.append(name)
                await session.scalar(select(func.count()).select_from(Order))
                if attempt.number == 1:
                    await barrier.wait()
                session.add(Order(name=name))

    await asyncio.gather(work("a"), work("b"))
    assert (sorted(await names(engine)), len(attempts)) == (["a", "b"], 3)


@pytest.mark.parametrize("swallowed", [False, True])
async def test_a_lost_connection_is_repeated_on_another_one(engine, proxy, swallowed):
    """Also when the block does not let the error through."""
    once = Once()
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="once"))
            await session.flush()
            if once:
                proxy.rst()
                with contextlib.suppress(DBAPIError if swallowed else ()):
                    await session.scalar(select(1))
    assert (once.attempts, await names(engine)) == (2, ["once"])
    await leave_nothing(engine)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("committed", "attempts"), [(True, 1), (False, 2)])
async def test_a_lost_commit_is_resolved(engine, proxy, inside, committed, attempts):
    """It is repeated if it did not take effect, and not if it did; the same for a commit inside the block."""
    once = Once()
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="once"))
            await session.flush()
            if once:
                if committed:
                    proxy.swallow_next_answer(matching=b"COMMIT", then="rst")
                else:
                    proxy.lose_next_request(matching=b"COMMIT", then="rst")
            if inside:
                await session.commit()
    assert (once.attempts, await names(engine)) == (attempts, ["once"])
    await leave_nothing(engine)


@pytest.mark.parametrize("inside", [False, True])
async def test_what_cannot_be_resolved_is_an_unknown_outcome(engine, proxy, inside):
    """And nothing else: neither repeated nor called committed."""
    once = Once()
    with pytest.raises(OutcomeUnknownError):
        async for attempt in retry_session(engine, resolve_commit=False):
            async with attempt as session:
                session.add(Order(name="once"))
                await session.flush()
                if once:
                    proxy.swallow_next_answer(matching=b"COMMIT", then="rst")
                if inside:
                    await session.commit()
    assert (once.attempts, await names(engine)) == (1, ["once"])
    await leave_nothing(engine)


async def test_what_follows_the_block_in_the_loop_is_not_repeated(engine):
    """The error says why, and that `run_in_session` has no such condition; the transaction was rolled back."""
    done = []
    with pytest.raises(DBAPIError) as raised:
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="gone"))
                await session.flush()
                await session.execute(text(CONFLICT.format("40001")))
            done.append(attempt.number)
    assert "not certain to go on with the loop" in str(raised.value.__notes__)
    assert (done, await names(engine)) == ([], [])


async def test_a_block_that_is_left_by_return_is_committed(engine):
    """And one that is left by `break`."""

    async def first():
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="returned"))
                return 1

    assert await first() == 1
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="broken off"))
            break
    assert await names(engine) == ["returned", "broken off"]
    await leave_nothing(engine)


async def test_a_server_that_is_away_is_waited_for(engine, proxy):
    """Before the first statement, in every attempt."""
    proxy.refuse()
    proxy.rst()
    asyncio.get_running_loop().call_later(0.5, proxy.accept)
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="later"))
    assert await names(engine) == ["later"]


# What is not repeated


async def test_errors_that_repeating_does_not_cure_are_sqlalchemys_own(engine):
    """With everything rolled back: a statement's, a flush's at the end of the block, and COMMIT's."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="taken"))
    attempts = []

    async def statement(session):
        await session.execute(insert(Order), [{"name": "taken"}])

    async def flush(session):
        session.add(Order(name="taken"))

    async def commit(session):
        await session.execute(insert(Item), [{"order_id": 1234}])

    async def commit_inside(session):
        await session.execute(insert(Item), [{"order_id": 1234}])
        await session.commit()

    for work in (statement, flush, commit, commit_inside):
        with pytest.raises(IntegrityError):
            async for attempt in retry_session(engine):
                async with attempt as session:
                    attempts.append(work.__name__)
                    session.add(Order(name=work.__name__))
                    await work(session)
    assert (len(attempts), await names(engine)) == (4, ["taken"])
    await leave_nothing(engine)


@pytest.mark.parametrize("kind", ["refused", "aborted", "cancelled"])
async def test_an_error_of_a_commit_inside_that_is_caught_is_raised_nevertheless(engine, kind):
    """No block ends well whose commit did not."""
    with pytest.raises((DBAPIError, InvalidRequestError, asyncpg.PostgresError, asyncpg.InterfaceError)):
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="gone"))
                await session.flush()
                if kind == "refused":
                    await session.execute(insert(Item), [{"order_id": 1234}])
                elif kind == "aborted":
                    with contextlib.suppress(DBAPIError):
                        await session.execute(text("SELECT 1/0"))
                else:
                    await session.execute(text("SELECT pg_advisory_xact_lock(1)"))
                    asyncio.current_task().cancel()
                with contextlib.suppress(DBAPIError, asyncio.CancelledError):
                    await session.commit()
                asyncio.current_task().uncancel()
    await leave_nothing(engine)


async def test_a_caught_error_of_a_flush_leaves_a_unit_that_can_go_on(engine):
    """SQLAlchemy has rolled back by then, and a new transaction begins."""
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="taken"))
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="taken"))
            with pytest.raises(IntegrityError):
                await session.flush()
            await session.rollback()
            session.add(Order(name="free"))
    assert await names(engine) == ["taken", "free"]


async def test_an_error_of_the_applications_rolls_back(engine):
    """And passes."""
    with pytest.raises(KeyError):
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="gone"))
                await session.flush()
                raise KeyError
    assert await names(engine) == []
    await leave_nothing(engine)


async def test_a_cancelled_unit_leaves_nothing(engine):
    """Wherever it is cancelled: all of it is there or nothing, and no connection is lost."""

    async def work(turns):
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name=f"{turns}"))
                await session.flush()
                session.add(Order(name=f"{turns} too"))

    for turns in range(30):
        task = asyncio.create_task(work(turns))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await leave_nothing(engine)
        found = [name for name in await names(engine) if name.split()[0] == f"{turns}"]
        assert found in ([], [f"{turns}", f"{turns} too"])


async def test_an_attempt_that_is_not_entered_is_an_error(engine):
    """As for `pool.transaction()`."""
    with pytest.raises(Exception, match="was not entered"):
        async for _ in retry_session(engine):
            pass
    await leave_nothing(engine)


# Sessions used in another way than they are meant to be


async def test_a_session_that_begins_nothing_by_itself_is_committed_once(engine):
    """With `autobegin=False` nothing is left to commit behind a commit inside, and that is no error."""
    async for attempt in retry_session(async_sessionmaker(engine, autobegin=False)):
        async with attempt as session, session.begin():
            session.add(Order(name="kept"))
    assert await names(engine) == ["kept"]


@pytest.mark.parametrize("chosen_by", ["get_bind", "bind_arguments"])
async def test_a_session_that_chooses_another_connection_is_refused(database, engine, chosen_by):
    """What it commits there would be there twice when the unit is repeated."""
    elsewhere = create_async_engine(database.replace("postgresql:", "postgresql+resilient:"))

    class Routed(Session):
        def get_bind(self, *arguments, **options):
            return elsewhere.sync_engine if chosen_by == "get_bind" else super().get_bind(*arguments, **options)

    with pytest.raises(InvalidRequestError, match="works on the unit's own connection only"):
        async for attempt in retry_session(async_sessionmaker(engine, sync_session_class=Routed)):
            async with attempt as session:
                options = {"bind": elsewhere.sync_engine} if chosen_by == "bind_arguments" else {}
                await session.execute(insert(Order).values(name="elsewhere"), bind_arguments=options)
    assert await names(engine) == []
    await leave_nothing(engine)
    await elsewhere.dispose()


@pytest.mark.parametrize("goes_on", [False, True])
async def test_a_connection_that_the_application_invalidates_commits_nothing(engine, goes_on):
    """And that is said; nor does the session go on with another connection."""
    with pytest.raises((asyncpg.InterfaceError, InvalidRequestError), match="invalidated"):
        async for attempt in retry_session(engine):
            async with attempt as session:
                session.add(Order(name="dropped"))
                await session.flush()
                await session.invalidate()
                if goes_on:
                    session.add(Order(name="more"))
    assert await names(engine) == []
    await leave_nothing(engine)


async def test_a_rollback_inside_is_one_also_where_sqlalchemy_would_skip_it(database, engine):
    """An engine whose statements commit by themselves may skip it; those of a unit do not."""
    own = create_async_engine(
        database.replace("postgresql:", "postgresql+resilient:"),
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
    )
    async for attempt in retry_session(own):
        async with attempt as session:
            session.add(Order(name="undone"))
            await session.flush()
            await session.rollback()
    await own.dispose()
    assert await names(engine) == []


@pytest.mark.parametrize("is_noticed", [False, True])
async def test_what_is_added_after_a_rollback_is_not_forgotten_with_a_lost_connection(engine, proxy, is_noticed):
    """It is written in another attempt: a block does not end well without what it has added."""
    once = Once()
    async for attempt in retry_session(engine):
        async with attempt as session:
            session.add(Order(name="undone"))
            await session.flush()
            await session.rollback()
            session.add(Order(name="kept"))
            if once:
                adapted = (await engine_connection(session)).dbapi_connection
                proxy.rst()
                async with asyncio.timeout(5):
                    while not adapted.driver_connection.is_closed():
                        await asyncio.sleep(0.01)
                if is_noticed:
                    with contextlib.suppress(DBAPIError):
                        await session.flush()
                    await session.rollback()
                    session.add(Order(name="kept"))
    assert (once.attempts, await names(engine)) == (2, ["kept"])


async def engine_connection(session):
    """The connection of a session, looked at without a statement."""
    return await session.bind.get_raw_connection()


# Under load


async def test_a_restart_in_mid_load_loses_nothing_and_does_nothing_twice(postgres, engine):
    """Every unit that ended well is there once, and no other."""
    begun, done, unknown = asyncio.Event(), [], []

    async def work(number):
        for part in range(12):
            name = f"{number}.{part}"
            try:
                async for attempt in retry_session(engine):
                    async with attempt as session:
                        session.add(Order(name=name, items=[Item()]))
                        await session.flush()
                        await session.execute(text("SELECT pg_sleep(0.005)"))
                done.append(name)
            except OutcomeUnknownError:
                unknown.append(name)
            if len(done) == 20:
                begun.set()

    async def restart():
        await begun.wait()
        await postgres.restart("fast")
        await asyncio.sleep(0)
        await postgres.restart("immediate")

    async with asyncio.timeout(50):
        await asyncio.gather(restart(), *map(work, range(10)))
    found = await names(engine)
    assert len(found) == len(set(found))
    assert set(done) <= set(found) <= {*done, *unknown}
    assert len(done) + len(unknown) == 120
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(Item))).scalar() == len(found)
