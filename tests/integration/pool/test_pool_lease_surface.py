"""A lease has every method of the driver's connection; looking at it is no use of it, and its first operation is repaired."""

from __future__ import annotations

import asyncio
import inspect
import time

import asyncpg
import pytest
from asyncpg.transaction import Transaction
from waiting import eventually

from resilient_pool.execution.connection import ResilientConnection

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

PUBLIC = sorted(name for name in dir(asyncpg.Connection) if not name.startswith("_"))
OURS = {"idempotent", "exactly_once", "deadline", "fail_fast"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_method_of_the_driver_is_defined_documented_and_typed(name):
    """By hand: in `dir`, for an autospec, for a type checker, and with what the driver's method takes."""
    (defined,) = [kind for kind in ResilientConnection.__mro__ if name in vars(kind)][:1]
    assert defined.__module__.startswith("resilient_pool.")
    ours, theirs = getattr(ResilientConnection, name), getattr(asyncpg.Connection, name)
    assert inspect.getdoc(ours)
    assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)
    mine, his = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    for parameter, each in his.items():
        if parameter not in mine:
            assert mine["options"].kind is inspect.Parameter.VAR_KEYWORD
        else:
            assert mine[parameter].kind is each.kind
            assert (mine[parameter].default is inspect.Parameter.empty) == (each.default is inspect.Parameter.empty)
            assert parameter == "self" or mine[parameter].annotation is not inspect.Parameter.empty
    assert set(mine) - set(his) - OURS <= {"options", "unknown"}
    assert inspect.signature(ours).return_annotation is not inspect.Signature.empty


def test_nothing_else_is_public():
    """What is internal is private."""
    public = {name for name in dir(ResilientConnection) if not name.startswith("_")}
    assert public - set(PUBLIC) == {"is_released"}


LOOKS = {
    "nothing": lambda connection: None,
    "hasattr": lambda connection: hasattr(connection, "a_span_of_some_agent"),
    "getattr": lambda connection: getattr(connection, "_params", None),
    "an inner attribute": lambda connection: connection._addr,
    "dir": dir,
    "repr": repr,
    "get_settings": lambda connection: connection.get_settings(),
    "get_server_version": lambda connection: connection.get_server_version(),
    "get_server_pid": lambda connection: connection.get_server_pid(),
    "get_reset_query": lambda connection: connection.get_reset_query(),
    "is_in_transaction": lambda connection: connection.is_in_transaction(),
    "is_closed": lambda connection: connection.is_closed(),
    "add_log_listener": lambda connection: (connection.add_log_listener(print), connection.remove_log_listener(print)),
    "add_query_logger": lambda connection: connection.add_query_logger(list),
    "query_logger": lambda connection: connection.query_logger(list).__enter__(),
    "transaction": lambda connection: connection.transaction(),
    "cursor": lambda connection: connection.cursor("SELECT 1"),
    "a method": lambda connection: connection._introspect_type,
    "reload_schema_state": lambda connection: connection.reload_schema_state(),
    "set_type_codec": lambda connection: connection.set_type_codec(
        "int4", schema="pg_catalog", encoder=str, decoder=int
    ),
    "set_builtin_type_codec": lambda connection: connection.set_builtin_type_codec(
        "text", schema="pg_catalog", codec_name="text"
    ),
    "reset_type_codec": lambda connection: connection.reset_type_codec("int4", schema="pg_catalog"),
    "a refused read": lambda connection: refused(connection, "SELECT 1 / 0"),
    "a refused read of a table": lambda connection: refused(connection, "SELECT * FROM nowhere"),
    "a refused preparation": lambda connection: refused_to_prepare(connection, "SELECT * FROM nowhere"),
}


async def refused(connection, sql):
    with pytest.raises(asyncpg.PostgresError):
        await connection.fetch(sql)


async def refused_to_prepare(connection, sql):
    with pytest.raises(asyncpg.PostgresError):
        await connection.prepare(sql)


async def cut(connection, bystander):
    link, ended = connection._con, asyncio.Event()
    link.add_termination_listener(lambda _: ended.set())
    await bystander.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    async with asyncio.timeout(5):
        await ended.wait()


@pytest.mark.parametrize("look", LOOKS)
async def test_looking_is_no_use(make_pool, bystander, look):
    """The first operation after it is repaired as if nothing had been looked at, before a loss and after it."""
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        for _ in range(2):
            looked = LOOKS[look](connection)
            if inspect.iscoroutine(looked):
                await looked
            if not connection.is_closed():
                await cut(connection, bystander)
        assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_advisory_lock(7), 1 / 0",
        "BEGIN; SELECT 1 / 0",
        "SET application.mark = 'here'; SELECT 1 / 0",
        "SELECT set_config('application.mark', 'here', false), 1 / 0",
        "SELECT nextval('numbers'), 1 / 0",
        "LISTEN news; SELECT 1 / 0",
    ],
)
async def test_a_statement_that_may_have_left_something_behind_is_a_use(make_pool, bystander, sql):
    """Though it failed: what it left would be missing on another connection, and nobody would know."""
    await bystander.execute("CREATE SEQUENCE IF NOT EXISTS numbers")
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute(sql)
        await cut(connection, bystander)
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            await connection.fetchval("SELECT 1")


async def in_a_transaction(connection):
    async with connection.transaction():
        return await connection.fetchval("SELECT 1")


async def in_a_manual_transaction(connection):
    transaction = connection.transaction(isolation="serializable", readonly=True, deferrable=True)
    assert isinstance(transaction, Transaction)
    await transaction.start()
    isolation = await connection.fetchval("SHOW transaction_isolation")
    await transaction.commit()
    return 1 if isolation == "serializable" else isolation


async def by_a_statement(connection):
    return await (await connection.prepare("SELECT 1")).fetchval()


async def by_a_listener(connection):
    heard = asyncio.get_running_loop().create_future()

    def hear(*news):
        heard.set_result(news[-1])

    await connection.add_listener("first", hear)
    await connection.execute("NOTIFY first, '1'")
    number = int(await heard)
    await connection.remove_listener("first", hear)
    return number


async def by_a_codec(connection):
    await connection.set_type_codec("int4", schema="pg_catalog", encoder=str, decoder=lambda text: int(text) * 10)
    return await connection.fetchval("SELECT 1") // 10


async def by_a_cursor(connection):
    cursors = connection.cursor("SELECT generate_series(1, 3)", prefetch=1)
    async with connection.transaction():
        rows = [row[0] async for row in cursors]
    assert rows == [1, 2, 3]
    return 1


async def by_an_awaited_cursor(connection):
    cursors = connection.cursor("SELECT 1")
    async with connection.transaction():
        return (await (await cursors).fetchrow())[0]


async def by_a_cursor_alone(connection):
    with pytest.raises(asyncpg.NoActiveSQLTransactionError):
        async for _ in connection.cursor("SELECT 1"):
            pass
    with pytest.raises(asyncpg.NoActiveSQLTransactionError):
        await connection.cursor("SELECT 1")
    return 1


async def by_a_reset(connection):
    await connection.reset()
    return await connection.fetchval("SELECT 1")


FIRST = [
    in_a_transaction,
    in_a_manual_transaction,
    by_a_statement,
    by_a_listener,
    by_a_codec,
    by_a_cursor,
    by_an_awaited_cursor,
    by_a_cursor_alone,
    by_a_reset,
]


@both_loops
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("how", ["seen", "unseen", "in flight"])
async def test_the_first_thing_on_a_lease_is_repaired(make_pool, proxy, dsn, bystander, first, how):
    """Whatever it is: nothing can have been lost yet."""
    async with make_pool(proxy.dsn(dsn), max_size=1) as pool, pool.acquire() as connection:
        if how == "seen":
            await cut(connection, bystander)
        elif how == "unseen":
            await bystander.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        elif first is by_a_statement:
            return  # what prepares it asks for no answer of its own: the next request would be lost, which is no first thing
        else:
            proxy.lose_next_request("rst")
        assert await first(connection) == 1


async def test_a_codec_goes_along_to_a_replacement(make_pool, bystander):
    """And so do loggers and listeners that the application has attached."""
    logged, said = [], []

    def hear(_connection, message):
        said.append(message.message)

    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            await connection.set_type_codec(
                "int4", schema="pg_catalog", encoder=str, decoder=lambda text: int(text) * 10
            )
            connection.add_query_logger(lambda record: logged.append(record.query))
            connection.add_log_listener(hear)
            await cut(connection, bystander)
            assert await connection.fetchval("SELECT 1") == 10
            await connection.execute("DO $$ BEGIN RAISE NOTICE 'here'; END $$")
            await asyncio.sleep(0)
            connection.remove_log_listener(hear)
            assert "SELECT 1" in logged
            assert said == ["here"]
        logged.clear()
        await pool.fetchval("SELECT 2")
        await asyncio.sleep(0)
        assert logged == []


async def test_a_logger_that_init_has_added_outlives_a_lease(make_pool):
    """Only what was added on the lease goes with it."""
    logged = []

    def log(record):
        logged.append(record.query)

    async def init(connection):
        connection.add_query_logger(log)

    async with make_pool(max_size=1, init=init) as pool:
        async with pool.acquire() as connection:
            connection.add_query_logger(log)
        await pool.fetchval("SELECT 3")
        await asyncio.sleep(0)
        assert "SELECT 3" in logged


async def test_a_logger_of_a_context_ends_with_it_also_after_its_lease(make_pool):
    """Nothing is taken from the next caller, whose logger may be the same function."""
    logged = []

    def log(record):
        logged.append(record.query)

    async with make_pool(max_size=1) as pool:
        connection = await pool.acquire()
        with connection.query_logger(log):
            await connection.fetchval("SELECT 1")
            await pool.release(connection)
            other = await pool.acquire()
            other.add_query_logger(log)
        await other.fetchval("SELECT 2")
        await asyncio.sleep(0)
        assert logged == ["SELECT 1", "SELECT 2"]
        await pool.release(other)


async def test_after_release_unknown_attributes_are_missing(make_pool):
    """As `getattr` with a default and `hasattr` expect it."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            pass
        assert getattr(connection, "_params", None) is None
        assert not hasattr(connection, "_addr")
        assert not hasattr(connection, "anything")
        assert hasattr(connection, "is_closed")


async def test_a_failed_begin_leaves_no_transaction_behind(make_pool, bystander):
    """The next one is none of its savepoints."""

    class Failing(asyncpg.Connection):
        failures = 1

        async def execute(self, query, *args, timeout=None):
            if query.startswith("BEGIN") and Failing.failures:
                Failing.failures -= 1
                query = "BEGIN NONSENSE"
            return await super().execute(query, *args, timeout=timeout)

    async with make_pool(max_size=1, connection_class=Failing) as pool, pool.acquire() as connection:
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await connection.transaction().start()
        await cut(connection, bystander)
        async with connection.transaction(), connection.transaction():
            assert await connection.fetchval("SELECT 1") == 1
        with pytest.raises(asyncpg.InterfaceError, match="isolation"):
            async with (
                connection.transaction(isolation="serializable"),
                connection.transaction(isolation="read_committed"),
            ):
                pass


async def test_transactions_can_be_entered_nested_and_ended_as_with_the_driver(make_pool, bystander):
    """Commits and rolls back what it should, and says what is wrong as the driver does."""
    await bystander.execute("CREATE TABLE IF NOT EXISTS notes (x int)")
    await bystander.execute("TRUNCATE notes")
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("INSERT INTO notes VALUES (1)")
            with pytest.raises(ZeroDivisionError):
                async with connection.transaction():
                    await connection.execute("INSERT INTO notes VALUES (2)")
                    raise ZeroDivisionError
            inner = connection.transaction()
            await inner.start()
            await connection.execute("INSERT INTO notes VALUES (3)")
            await inner.rollback()
        assert await connection.fetch("SELECT x FROM notes") == [(1,)]
        with pytest.raises(asyncpg.InterfaceError, match="already rolled back"):
            await inner.start()
        with pytest.raises(asyncpg.InterfaceError, match="not yet started"):
            await connection.transaction().rollback()
        with pytest.raises(ValueError, match="isolation"):
            connection.transaction(isolation="loose")
        assert await connection.fetchval("SELECT 1") == 1
        outer = connection.transaction()
        async with outer:
            with pytest.raises(asyncpg.InterfaceError, match="within an `async with`"):
                await outer.commit()
            with pytest.raises(asyncpg.InterfaceError, match="already in an"):
                async with outer:
                    pass


class Own(asyncpg.Connection):
    async def fetchval(self, query):
        return f"narrow {await super().fetchval(query)}"

    async def fetch(self, query, *args, tag=None, **options):
        return tag, await super().fetch(query, *args, **options)

    async def execute(self, query, *args, idempotent="their own", timeout=None):
        return idempotent, await super().execute(query, *args, timeout=timeout)

    async def executemany(self, command, args):
        return await super().executemany(command, list(args))

    async def prepare(self, query, label=None):
        return label, await super().prepare(query)

    def cursor(self, query):
        return super().cursor(query, prefetch=2)

    def transaction(self, *, label=None, isolation=None):
        self.label = label
        return super().transaction(isolation=isolation)

    async def close(self, reason=None, *, timeout=None):
        self.reason = reason
        await super().close(timeout=timeout)

    async def reset(self, *, timeout=None):
        await super().reset(timeout=timeout)

    async def transfer(self, amount):
        return amount

    def greeting(self):
        return "hello"

    label = None


@pytest.mark.parametrize("lost", [False, True])
async def test_a_class_of_the_applications_own_is_called_as_it_declares_its_methods(make_pool, bystander, lost):
    """With narrower signatures and wider ones, with what it adds, and repaired as far as that is certain."""
    await bystander.execute("CREATE TABLE IF NOT EXISTS notes (x int)")
    calls = {
        "narrower": lambda connection: connection.fetchval("SELECT 1"),
        "wider": lambda connection: connection.fetch("SELECT 1", tag="x"),
        "theirs": lambda connection: connection.execute("SELECT 1", idempotent="mine"),
        "many": lambda connection: connection.executemany("INSERT INTO notes VALUES ($1)", iter([(1,)])),
        "prepare": lambda connection: connection.prepare("SELECT 1", "a label"),
        "added": lambda connection: connection.transfer(3),
    }
    expected = {
        "narrower": "narrow 1",
        "wider": ("x", [(1,)]),
        "theirs": ("mine", "SELECT 1"),
        "added": 3,
        "many": None,
    }
    async with make_pool(max_size=1, connection_class=Own) as pool:
        for name, call in calls.items():
            async with pool.acquire() as connection:
                if lost:
                    await cut(connection, bystander)
                answer = await call(connection)
                if name == "prepare":
                    assert (answer[0], await answer[1].fetchval()) == ("a label", 1)
                else:
                    assert answer == expected[name]
        async with pool.acquire() as connection:
            assert isinstance(connection, Own)
            assert connection.greeting() == "hello"
            async with connection.transaction(label="x") as nothing:
                assert nothing is None
                assert connection.label == "x"
                assert [row[0] async for row in connection.cursor("SELECT generate_series(1, 3)")] == [1, 2, 3]
            await connection.close("enough", timeout=3)
        assert await pool.fetch("SELECT 1") == (None, [(1,)])
        with pytest.raises(TypeError):
            async with pool.acquire() as connection:
                await connection.fetchval("SELECT 1", nonsense=1)


async def test_what_a_class_of_the_applications_own_may_have_sent_is_not_sent_again(make_pool, bystander):
    """That the last of its statements was not sent proves nothing of those before."""
    await bystander.execute("CREATE TABLE IF NOT EXISTS notes (x int)")
    await bystander.execute("TRUNCATE notes")

    class Twice(asyncpg.Connection):
        async def execute(self, query, **options):
            await super().execute(query)
            await bystander.execute("SELECT pg_terminate_backend($1)", self.get_server_pid())
            while not self.is_closed():
                await asyncio.sleep(0.01)
            return await super().execute(query)

        async def book(self, query):
            return await self.execute(query)

    async with make_pool(max_size=1, connection_class=Twice) as pool:
        for use in ("pool", "lease", "own"):
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError)):
                if use == "pool":
                    await pool.execute("INSERT INTO notes VALUES (1)")
                else:
                    async with pool.acquire() as connection:
                        await (connection.execute if use == "lease" else connection.book)(
                            "INSERT INTO notes VALUES (1)"
                        )
    assert await bystander.fetchval("SELECT count(*) FROM notes") == 3


@both_loops
@pytest.mark.parametrize("lose", ["everything", "the rollback"])
@pytest.mark.parametrize("manual", [False, True])
async def test_a_time_out_around_a_transaction_ends_it_when_nothing_is_answered(make_pool, proxy, dsn, lose, manual):
    """As a time-out, within the time that a rollback may take; the connection is closed then, and its place free."""

    async def work():
        async with asyncio.timeout(0.3), pool.acquire() as connection:
            if manual:
                transaction = connection.transaction()
                await transaction.start()
                try:
                    await meet(connection)
                finally:
                    await transaction.rollback()
            else:
                async with connection.transaction():
                    await meet(connection)

    async def meet(connection):
        await connection.execute("SELECT 1")
        if lose == "everything":
            await asyncio.to_thread(proxy.hang)
            await connection.execute("SELECT pg_sleep(30)")
        else:
            proxy.lose_next_request("hang", matching=b"ROLLBACK")
            await asyncio.sleep(30)

    async with make_pool(proxy.dsn(dsn), ssl=False, max_size=1, reset_timeout=1.0) as pool:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await work()
        assert time.monotonic() - started < 4
        await asyncio.to_thread(proxy.restore)
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("nested", [False, True])
async def test_rolling_back_on_a_lost_connection_hides_nothing(make_pool, nested):
    """What was raised before is what is seen: there is nothing left to roll back."""
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        transactions = [connection.transaction() for _ in range(1 + nested)]
        with pytest.raises(asyncpg.ConnectionDoesNotExistError):
            try:
                for transaction in transactions:
                    await transaction.start()
                await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            except BaseException:
                for transaction in reversed(transactions):
                    await transaction.rollback()
                raise


@both_loops
@pytest.mark.parametrize("way", ["time-out", "cancellation"])
async def test_an_operation_after_a_cancelled_one_does_not_wait_for_ever(make_pool, proxy, dsn, way):
    """When the cancellation is lost: the lease ends, and the place is free."""
    async with (
        make_pool(proxy.dsn(dsn), ssl=False, max_size=1, reset_timeout=0.5) as pool,
        pool.acquire() as connection,
    ):
        await connection.execute("SELECT 1")
        await asyncio.to_thread(proxy.hang)
        with pytest.raises(TimeoutError):
            if way == "time-out":
                await connection.execute("SELECT pg_sleep(30)", timeout=0.2)
            else:
                async with asyncio.timeout(0.2):
                    await connection.execute("SELECT pg_sleep(30)")
        started = time.monotonic()
        with pytest.raises(asyncpg.InterfaceError, match="closed"):
            await connection.execute("SELECT 1")
        assert time.monotonic() - started < 3
        await asyncio.to_thread(proxy.restore)
        assert await pool.fetchval("SELECT 1") == 1


async def test_an_operation_after_a_cancelled_one_is_served(make_pool):
    """On the same connection, as soon as the server has confirmed the cancellation."""
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        for first in (True, False):
            pid = connection.get_server_pid()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await connection.execute("SELECT pg_sleep(30)")
            assert await connection.fetchval("SELECT pg_backend_pid()") == pid, first


@both_loops
async def test_a_cancellation_of_a_transaction_is_one_when_its_connection_is_lost(make_pool, bystander):
    """`CancelledError` arrives, and not that the transaction could not be ended."""
    async with make_pool(max_size=1) as pool:
        started = asyncio.Event()

        async def work():
            async with pool.acquire() as connection, connection.transaction():
                pid.append(connection.get_server_pid())
                started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    await cut(connection, bystander)

        pid: list[int] = []
        task = asyncio.create_task(work())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_the_error_of_a_block_is_seen_when_its_connection_is_lost(make_pool, bystander):
    """Not that there was nothing left to roll back."""
    async with make_pool(max_size=1) as pool, pool.acquire() as connection:
        with pytest.raises(KeyError):
            async with connection.transaction():
                await cut(connection, bystander)
                raise KeyError("mine")


@pytest.mark.parametrize("ask", ["acquire", "fetch", "lease"])
async def test_setup_that_hangs_is_bounded_by_the_callers_time(make_pool, bystander, ask):
    """By `acquire(timeout=)` and by the deadline of a call."""
    hanging = False

    async def setup(connection):
        if hanging:
            await connection.execute("SELECT pg_sleep(30)")

    async with make_pool(max_size=1, setup=setup) as pool:
        await pool.fetchval("SELECT 1")
        await eventually(lambda: pool.get_idle_size() == 1)  # the time is not spent on connecting
        hanging, started = True, time.monotonic()
        if ask == "acquire":
            with pytest.raises(TimeoutError, match="setup="):
                await pool.acquire(timeout=0.3)
        elif ask == "fetch":
            with pytest.raises(TimeoutError, match="setup="):
                await pool.fetchval("SELECT 1", deadline=0.3)
        else:
            hanging = False
            async with pool.acquire() as connection:
                hanging = True
                await cut(connection, bystander)
                started = time.monotonic()
                with pytest.raises(TimeoutError, match="setup="):
                    await connection.fetchval("SELECT 1", deadline=1.0)
        assert 0.2 < time.monotonic() - started < 10
        hanging = False
        assert await pool.fetchval("SELECT 1", deadline=5) == 1


async def test_setup_that_loses_its_connection_is_repeated(make_pool, bystander):
    """On another one; what it raises or swallows of the loss is no matter."""
    losses = 2

    async def setup(connection):
        nonlocal losses
        if losses:
            losses -= 1
            await cut(connection, bystander)
            if losses:
                await connection.execute("SELECT 1")

    async with make_pool(max_size=1, setup=setup) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        losses = 2
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 1") == 1
        assert pool.get_size() == 1


async def test_what_only_the_drivers_connection_has_is_found_on_a_lease(make_pool):
    """Its private attributes, too; and as they may be used for anything, the session is reset."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection:
            inner = connection._driver.connection
            for name in set(dir(asyncpg.Connection)) - set(dir(ResilientConnection)) - {"__del__"}:
                getattr(connection, name)
            assert connection._protocol is inner._protocol
            assert connection._top_xact is None
            assert await connection._execute("SELECT 1", (), 0, None)
            with pytest.raises(AttributeError, match="no attribute 'nothing'"):
                _ = connection.nothing
        await eventually(lambda: pool.stats().resets == 1)
        with pytest.raises(AttributeError, match=r"_protocol.*released"):
            _ = connection._protocol


async def test_an_attribute_of_a_lease_is_read_without_a_detour(make_pool):
    """`__getattr__` makes all attributes of a class slow to read, so only leases of an application's own class have it."""
    async with make_pool() as pool, pool.acquire() as connection:
        assert not hasattr(type(connection), "__getattr__")
