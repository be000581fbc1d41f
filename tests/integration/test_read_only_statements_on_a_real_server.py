"""What the reader of statements believes, held against servers of both versions."""

from __future__ import annotations

import runpy
from pathlib import Path

import asyncpg
import pytest

from resilient_pool.sql.read_only import StatementReader
from resilient_pool.sql.stable_functions import STABLE_FUNCTIONS

ROOT = Path(__file__).parents[2]
TEXTS = runpy.run_path(str(ROOT / "tests" / "statement_texts.py"))
LISTING = runpy.run_path(str(ROOT / "scripts" / "list_stable_functions.py"))
EFFECTS = runpy.run_path(str(ROOT / "scripts" / "list_function_effects.py"))

# What a session can keep of a statement, and what a database can: neither may differ after one that only reads.
TRACES = """
SELECT (SELECT last_value::text || is_called FROM numbers),
    (SELECT string_agg(name || setting, ';' ORDER BY name) FROM pg_settings),
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),
    (SELECT count(*) FROM pg_class),
    (SELECT count(*) FROM pg_largeobject_metadata),
    (SELECT count(*) FROM users),
    (SELECT count(*) FROM orders),
    (SELECT count(*) FROM pg_listening_channels())
"""
VOLATILITIES = "SELECT proname::text, provolatile::text FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace"


@pytest.fixture(params=["postgres16", "postgres"])
async def connection(request):
    """A superuser's connection to a database of its own, on each version."""
    server = request.getfixturevalue(request.param)
    await server.create_database("statements")
    try:
        async with server.admin("statements") as connection:
            yield connection
    finally:
        async with server.admin() as admin:
            await admin.execute("DROP DATABASE statements WITH (FORCE)")


async def failure_in_a_read_only_transaction(connection, sql):
    transaction = connection.transaction(readonly=True)
    await transaction.start()
    try:
        await connection.execute(sql)
        has_id = await connection.fetchval("SELECT pg_current_xact_id_if_assigned()") is not None
    except asyncpg.PostgresError as error:
        return str(error)
    finally:
        await transaction.rollback()
    return "it was given a transaction id" if has_id else None


async def failure_in_the_open(connection, sql, traces):
    try:
        await connection.execute(sql)
    except asyncpg.PostgresError as error:
        return str(error)
    return None if tuple(await connection.fetchrow(TRACES)) == traces else "it left traces"


async def test_every_statement_called_read_only_only_reads(connection):
    """Each runs where the server itself refuses to write, and leaves nothing behind where it does not."""
    failures = {}
    await connection.execute(TEXTS["SCHEMA"])
    traces = tuple(await connection.fetchrow(TRACES))
    for sql in TEXTS["READ_ONLY"]:
        refused = await failure_in_a_read_only_transaction(connection, sql)
        failures[sql] = refused or await failure_in_the_open(connection, sql, traces)
    assert {sql: failure for sql, failure in failures.items() if failure} == {}


async def test_the_listed_functions_are_stable_in_every_form(connection):
    """No overload of a listed function is volatile on a server of this version, and each exists there."""
    rows = await connection.fetch(VOLATILITIES)
    assert {name for name, volatility in rows if volatility == "v"} & STABLE_FUNCTIONS == set()
    assert STABLE_FUNCTIONS - {name for name, _ in rows} == set()


async def test_the_data_modules_are_what_the_script_writes(postgres, postgres16):
    """The lists were not edited by hand and are not out of date."""
    catalogs = [await LISTING["read_catalog"](server) for server in (postgres16, postgres)]
    for name, text in LISTING["modules"](catalogs).items():
        assert (LISTING["SQL"] / name).read_text() == text


async def test_the_functions_with_effects_are_what_the_script_finds(postgres, postgres16):
    """Every function is called anew on both versions, in read-only transactions, and leaves behind what it left before."""
    found = [await EFFECTS["find_effects"](server) for server in (postgres16, postgres)]
    assert EFFECTS["MODULE"].read_text() == EFFECTS["module"](found)


async def test_no_operator_and_no_cast_of_postgresql_itself_is_volatile(connection):
    """Operators and casts cannot be judged from a text, so those that come with the server have to be harmless."""
    operators = "SELECT o.oid FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode WHERE p.provolatile = 'v'"
    casts = "SELECT c.oid FROM pg_cast c JOIN pg_proc p ON p.oid = c.castfunc WHERE p.provolatile = 'v'"
    assert await connection.fetch(f"{operators} UNION ALL {casts}") == []


async def test_no_volatile_function_can_be_hidden_as_an_attribute_of_a_row(connection):
    """`row.function` is a call, so no function that takes a row of any type may have an effect."""
    # The first only shuffles; the others refuse arguments that are not pairs of a name and a value.
    harmless = {"array_shuffle", "pg_restore_relation_stats", "pg_restore_attribute_stats"}
    query = """
        SELECT proname::text FROM pg_proc
        WHERE provolatile = 'v' AND pronargs - pronargdefaults <= 1 AND pronargs > 0 AND prokind = 'f' AND NOT proretset
            AND pronamespace = 'pg_catalog'::regnamespace
            AND proargtypes[0]::regtype::text ~ '^("any"|record|any.*)$'
    """
    assert {row[0] for row in await connection.fetch(query)} - harmless == set()


async def test_a_function_without_parentheses_is_a_call(connection):
    """Attribute notation on an expression does advance a sequence: the reason why the reader doubts it."""
    sql = "SELECT ('numbers'::regclass).nextval"
    assert not StatementReader().is_plain_read(sql)
    await connection.execute("CREATE SEQUENCE numbers")
    assert [await connection.fetchval(sql) for _ in range(2)] == [1, 2]
