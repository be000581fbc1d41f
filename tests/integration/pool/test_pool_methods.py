"""asyncpg's one-shot methods, through the pool."""

from __future__ import annotations

import asyncio
import io

import asyncpg
import pytest

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@pytest.fixture
async def things(bystander):
    """A table with two columns, for one test."""
    await bystander.execute("CREATE TABLE things (id int PRIMARY KEY, name text)")
    yield "things"
    await bystander.execute("DROP TABLE things")


async def _fetch(pool, number):
    return [tuple(row) for row in await pool.fetch("SELECT $1::int, 'row'", number)] == [(number, "row")]


async def _fetchrow(pool, number):
    return tuple(await pool.fetchrow("SELECT $1::int AS n, 'row'", number)) == (number, "row")


async def _fetchval(pool, number):
    return await pool.fetchval("SELECT 'row', $1::int", number, column=1) == number


async def _fetchmany(pool, number):
    rows = await pool.fetchmany("SELECT $1::int AS n", [(number,), (number + 1,)])
    return [row["n"] for row in rows] == [number, number + 1]


async def _execute(pool, _number):
    return await pool.execute("SELECT generate_series(0, 10)") == "SELECT 11"


async def _execute_with_arguments(pool, number):
    return await pool.execute("SELECT generate_series(0, $1::int)", number) == f"SELECT {number + 1}"


@both_loops
@pytest.mark.parametrize("method", [_fetch, _fetchrow, _fetchval, _fetchmany, _execute, _execute_with_arguments])
async def test_many_callers_get_each_their_own_answer(make_pool, method):
    """A hundred concurrent calls of one method on four connections: every answer belongs to its question."""
    async with make_pool(max_size=4) as pool:
        assert all(await asyncio.gather(*(method(pool, number) for number in range(100))))
        assert pool.get_size() <= 4


async def test_no_rows_are_told_as_asyncpg_tells_them(make_pool):
    """`fetch` returns an empty list, `fetchrow` and `fetchval` return `None`."""
    async with make_pool() as pool:
        query = "SELECT 1 WHERE false"
        assert (await pool.fetch(query), await pool.fetchrow(query), await pool.fetchval(query)) == ([], None, None)


async def test_execute_takes_several_commands(make_pool, things):
    """Without arguments `execute` runs a script, and returns the status of its last command."""
    async with make_pool() as pool:
        status = await pool.execute("INSERT INTO things VALUES (1, 'a'); INSERT INTO things VALUES (2, 'b'), (3, 'c')")
        assert status == "INSERT 0 2"
        assert await pool.fetchval("SELECT count(*) FROM things") == 3


@both_loops
async def test_executemany_applies_all_or_nothing(make_pool, things):
    """One bad row among many leaves none of them."""
    async with make_pool(max_size=3) as pool:
        groups = [[(10 * group + row, "x") for row in range(10)] for group in range(5)]
        await asyncio.gather(*(pool.executemany("INSERT INTO things VALUES ($1, $2)", rows) for rows in groups))
        assert await pool.fetchval("SELECT count(*) FROM things") == 50
        with pytest.raises(asyncpg.UniqueViolationError):
            await pool.executemany("INSERT INTO things VALUES ($1, $2)", [(50, "x"), (49, "x")])
        assert await pool.fetchval("SELECT count(*) FROM things") == 50


async def test_fetchmany_returns_the_rows_of_all(make_pool, things):
    """`fetchmany` inserts and returns in one go."""
    async with make_pool() as pool:
        rows = await pool.fetchmany("INSERT INTO things VALUES ($1, $2) RETURNING id", [(1, "a"), (2, "b")])
        assert [row["id"] for row in rows] == [1, 2]


async def test_executemany_reads_a_generator_once(make_pool, things):
    """Arguments may come from any iterable."""
    async with make_pool() as pool:
        await pool.executemany("INSERT INTO things VALUES ($1, $2)", ((number, None) for number in range(3)))
        assert await pool.fetchval("SELECT count(*) FROM things") == 3


async def test_records_are_copied_into_a_table(make_pool, things):
    """`copy_records_to_table` takes lists and asynchronous generators."""

    async def more():
        for number in range(3, 5):
            yield number, "later"

    async with make_pool() as pool:
        assert await pool.copy_records_to_table(things, records=[(1, "a"), (2, None)]) == "COPY 2"
        assert await pool.copy_records_to_table(things, records=more(), columns=["id", "name"]) == "COPY 2"
        rows = await pool.fetch("SELECT * FROM things ORDER BY id")
        assert [tuple(row) for row in rows] == [(1, "a"), (2, None), (3, "later"), (4, "later")]


async def test_a_table_is_copied_out_and_in(make_pool, things, tmp_path):
    """`copy_from_table` and `copy_to_table` work with files, paths and functions, and know COPY's options."""
    async with make_pool() as pool:
        await pool.execute("INSERT INTO things VALUES (1, 'a'), (2, NULL)")
        out = io.BytesIO()
        assert (
            await pool.copy_from_table(things, output=out, format="csv", null="-", columns=["id", "name"]) == "COPY 2"
        )
        assert out.getvalue() == b"1,a\n2,-\n"
        path = tmp_path / "things.csv"
        await pool.copy_from_table(things, output=path, format="csv", header=True)
        assert path.read_bytes() == b"id,name\n1,a\n2,\n"
        await pool.execute("TRUNCATE things")
        out.seek(0)
        assert await pool.copy_to_table(things, source=out, format="csv", null="-") == "COPY 2"
        await pool.execute("TRUNCATE things")
        assert await pool.copy_to_table(things, source=path, format="csv", header=True) == "COPY 2"
        assert [tuple(row) for row in await pool.fetch("SELECT * FROM things ORDER BY id")] == [(1, "a"), (2, None)]


async def test_a_query_is_copied_out(make_pool):
    """`copy_from_query` takes arguments, and a coroutine function as its output."""
    chunks = []

    async def write(chunk):
        chunks.append(bytes(chunk))

    async with make_pool() as pool:
        query = "SELECT generate_series(1, $1::int)"
        assert await pool.copy_from_query(query, 3, output=write) == "COPY 3"
    assert b"".join(chunks) == b"1\n2\n3\n"


async def test_a_copy_whose_source_fails_leaves_nothing(make_pool, things):
    """An error in the application's generator reaches it, the table stays empty, and the pool goes on."""

    async def broken():
        yield 1, "a"
        raise LookupError("no more")

    async with make_pool(max_size=1) as pool:
        with pytest.raises(LookupError):
            await pool.copy_records_to_table(things, records=broken())
        assert await pool.fetchval("SELECT count(*) FROM things") == 0


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("SELEKT 1", asyncpg.PostgresSyntaxError),
        ("SELECT * FROM no_such_table", asyncpg.UndefinedTableError),
        ("SELECT 1 / 0", asyncpg.DivisionByZeroError),
        ("INSERT INTO things VALUES (1), (1)", asyncpg.UniqueViolationError),
        ("DO $$ BEGIN RAISE EXCEPTION 'mine'; END $$", asyncpg.RaiseError),
    ],
)
@pytest.mark.parametrize("method", ["fetch", "fetchrow", "fetchval", "execute"])
async def test_the_applications_own_errors_pass_unchanged(make_pool, things, method, query, error):
    """What the server says about a statement is raised in its own class, and the same connection serves on."""
    async with make_pool(max_size=1) as pool:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(error) as caught:
            await getattr(pool, method)(query)
        assert type(caught.value) is error
        assert await pool.fetchval("SELECT pg_backend_pid()") == pid


async def test_each_call_may_have_a_time_limit(make_pool, things):
    """`timeout=` is understood by every method."""
    async with make_pool(max_size=2) as pool:
        slow = "SELECT pg_sleep(60)"
        for call in (
            pool.fetch(slow, timeout=0.02),
            pool.fetchrow(slow, timeout=0.02),
            pool.fetchval(slow, timeout=0.02),
            pool.execute(slow, timeout=0.02),
            pool.executemany("INSERT INTO things SELECT $1::int FROM pg_sleep(60)", [(1,)], timeout=0.02),
            pool.fetchmany("SELECT $1::int FROM pg_sleep(60)", [(1,)], timeout=0.02),
            pool.copy_from_query(slow, output=io.BytesIO(), timeout=0.02),
        ):
            with pytest.raises(asyncio.TimeoutError):
                await call
        assert await pool.fetchval("SELECT count(*) FROM things", timeout=10) == 0


@both_loops
async def test_a_script_that_opens_a_transaction_does_not_pass_it_on(make_pool, things):
    """`execute("BEGIN; ...")` without an end is rolled back before the next call."""
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    async with make_pool(max_size=1) as pool:
        await pool.execute("BEGIN; INSERT INTO things VALUES (1, 'half')")
        assert await pool.fetchval("SELECT count(*) FROM things") == 0
        await pool.execute("INSERT INTO things VALUES (2, 'whole')")
        assert await pool.fetchval("SELECT array_agg(id) FROM things") == [2]


async def test_transactions_nest_on_a_lease(make_pool, things):
    """Savepoints inside of `connection.transaction()` work as on a bare connection."""
    async with make_pool(max_size=1) as pool:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("INSERT INTO things VALUES (1, 'kept')")
            with pytest.raises(asyncpg.UniqueViolationError):
                async with connection.transaction():
                    await connection.execute("INSERT INTO things VALUES (2, 'lost')")
                    await connection.execute("INSERT INTO things VALUES (1, 'twice')")
            await connection.execute("INSERT INTO things VALUES (3, 'kept')")
        assert await pool.fetchval("SELECT array_agg(id ORDER BY id) FROM things") == [1, 3]


async def test_a_changed_table_does_not_break_a_cached_statement(make_pool, things, bystander):
    """After ALTER TABLE the next call of a statement used before gets the new columns, without an error."""
    async with make_pool(max_size=1) as pool:
        await pool.execute("INSERT INTO things VALUES (1, 'a')")
        for _ in range(3):
            assert len(await pool.fetchrow("SELECT * FROM things")) == 2
        await bystander.execute("ALTER TABLE things ADD COLUMN more int DEFAULT 7")
        assert tuple(await pool.fetchrow("SELECT * FROM things")) == (1, "a", 7)
