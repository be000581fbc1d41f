"""Every Python block of README.md runs, as it stands there, against a real server."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from resilient_pool import ResilientPool

TEXT = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
MADE_UP_DSN = "postgresql://shop@localhost/shop"


def block(containing):
    """Find the one block that has a text in it."""
    [found] = [text for text in BLOCKS if containing in text]
    return found


def load(text, **names):
    """Execute a block that is a whole module, and return its names."""
    namespace = {"__name__": "example", **names}
    exec(compile(text, "README.md", "exec"), namespace)  # its annotations must be those of a module
    return SimpleNamespace(**namespace)


async def run(text, **names):
    """Run a block that is a part of a coroutine function; return what it returned, and its local names."""
    namespace = dict(names)
    body = textwrap.indent(text, "    ")
    exec(compile(f"async def example():\n{body}\n    return locals()\n", "README.md", "exec"), namespace)
    return await namespace["example"]()


@pytest.fixture
async def pool(dsn):
    """A pool on a server with the tables of the examples."""
    async with ResilientPool(dsn) as pool:
        await pool.execute("""
            DROP TABLE IF EXISTS account, orders;
            CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
            CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, total int NOT NULL);
            INSERT INTO account VALUES (1, 100), (2, 100);
            INSERT INTO orders VALUES (7, 1, 30);
        """)
        yield pool
        await pool.execute("DROP TABLE account, orders")


def test_every_block_has_a_test():
    """A new block is noticed here: run it in this module."""
    assert len(BLOCKS) == 9


async def test_the_web_application(pool, dsn):
    """The first example serves a request."""
    example = load(block("FastAPI").replace(MADE_UP_DSN, dsn))
    transport = httpx.ASGITransport(app=example.app)
    async with example.lifespan(example.app), httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        answer = await client.get("/customers/1/orders")
    assert [row["total"] for row in answer.json()] == [30]


async def test_the_transaction(pool):
    """Both forms of a transaction move money."""

    async def function(connection, argument):
        return await connection.fetchval("SELECT sum(balance) + $1 FROM account", argument)

    names = await run(block("pool.transaction("), pool=pool, payer=1, payee=2, function=function, argument=5)
    assert names["total"] == 205
    assert await pool.fetchval("SELECT balance FROM account WHERE id = 2") == 110


async def test_the_profile(dsn):
    """A pool with a profile works."""
    names = await run(block("**profiles.AURORA_SERVERLESS)"), dsn=dsn)
    async with names["pool"] as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_the_invocation(pool):
    """The hook for functions that are frozen returns what its block returns."""
    context = SimpleNamespace(get_remaining_time_in_millis=lambda: 5000)
    text = block("pool.invocation(").replace("SELECT ...", "SELECT 3")
    assert await run(text, pool=pool, context=context) == 3


async def test_the_credentials(postgres):
    """A function gives user and password."""
    await postgres.create_role("rotated", "first")

    async def read(path):
        return {"username": "rotated", "password": "first"}

    where = f'host="{postgres.host}", port={postgres.port}, database="postgres"'
    text = block("credentials=credentials").replace('host="db.internal", database="shop"', where)
    names = await run(text, vault=SimpleNamespace(read=read), ResilientPool=ResilientPool)
    async with names["pool"] as pool:
        assert await pool.fetchval("SELECT current_user") == "rotated"


async def test_the_observer(dsn):
    """A pool with the observer for structlog works."""
    names = await run(block("observers=["), dsn=dsn)
    async with names["pool"] as pool:
        assert await pool.fetchval("SELECT 1") == 1


async def test_the_migration(dsn, monkeypatch):
    """A command is run once the database is there."""
    monkeypatch.setenv("DATABASE_URL", dsn)
    text = block("await run_migration").replace('["alembic", "upgrade", "head"]', '[sys.executable, "-c", "pass"]')
    await run(text, sys=sys)


@pytest.mark.parametrize("containing", ["FaultProxy", "PausingServer("])
async def test_the_tests(containing):
    """The examples of tests pass."""
    names = vars(load(block(containing)))
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests != []
    for test in tests:
        await test()
