"""Every Python block of README.md and of the documentation runs, page by page, against a real server."""

from __future__ import annotations

import ast
import asyncio
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TABLES = """
    CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
    CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, total int NOT NULL);
    INSERT INTO account VALUES (1, 100), (2, 100);
    INSERT INTO orders VALUES (7, 1, 30);
"""


def blocks(page):
    """Find the Python blocks of a page, those in comments included: these set up and check what the visible ones do."""
    return list(Sybil([CodeBlockParser(language="python", evaluator=compiled)]).parse(page).examples())


def compiled(example: Example):
    """Compile a block; it may await as a coroutine function does, and a traceback shows the page's own line."""
    lines = "\n" * (example.line + example.parsed.line_offset)
    return compile(
        lines + example.parsed, example.path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )


async def run(example, namespace):
    """Run a block in its page's namespace: a whole program in a process of its own, and tests after their definition."""
    if "asyncio.run(" in example.parsed:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", example.parsed, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        namespace["output"], errors = (text.decode() for text in await program.communicate())
        assert program.returncode == 0, errors
        return
    before = set(namespace)
    code = compiled(example)
    result = eval(code, namespace)  # what it defines stays for the blocks after it
    if inspect.iscoroutine(result):
        await result
    for name in namespace.keys() - before:
        if name.startswith("test_"):
            await namespace[name]()


@pytest.fixture
async def shop(postgres, monkeypatch):
    """A database as the pages speak of it: `postgresql://shop@localhost/shop`, and the environment says the same."""
    await postgres.create_role("shop", "shop")
    async with postgres.admin() as admin:
        await admin.execute("DROP DATABASE IF EXISTS shop WITH (FORCE)")
        await admin.execute("CREATE DATABASE shop OWNER shop")
    for name, value in {"PGPORT": str(postgres.port), "PGPASSWORD": "shop"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DATABASE_URL", postgres.dsn("shop", "shop", "shop"))
    async with postgres.admin("shop") as admin:
        await admin.execute("SET ROLE shop")
        await admin.execute(TABLES)
    yield
    async with postgres.admin() as admin:
        await admin.execute("DROP DATABASE shop WITH (FORCE)")
        await admin.execute("DROP ROLE shop")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
async def test_the_blocks_of_a_page_run_one_after_the_other(page, shop, monkeypatch):
    """What a reader types in gives what the page says."""
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where frameworks look up what annotations name
    namespace = vars(module)
    for example in blocks(page):
        await run(example, namespace)


def test_a_block_that_fails_is_seen(tmp_path):
    """The test above fails with the page's own line."""
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nvalue = 1\nassert value == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        eval(compiled(blocks(page)[0]), {})
    assert caught.traceback[-1].lineno + 1 == 5
