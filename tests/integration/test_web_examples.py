"""The example applications, run as their heads say, and asked over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def running(name, log, **environment):
    """Run the command that an example's head names, on a free port, and give a client for it."""
    text = (ROOT / "examples" / name).read_text()
    command = shlex.split(re.search(r"Run it with `([^`]+)`", text)[1])
    assert command[0] == "python"
    environment = {**os.environ, "PORT": "0", "PYTHONPATH": str(ROOT), **environment}
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command[1:], cwd=ROOT, stdout=output, stderr=output, env=environment
        )
    try:
        async with asyncio.timeout(60):
            while not (found := re.search(r"running on (http://\S+)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        async with httpx.AsyncClient(base_url=found[1], timeout=30, trust_env=False) as client:
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(30):
            await process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


async def test_the_fastapi_example_takes_orders(tmp_path):
    """On a PostgreSQL that it starts itself; its metrics and its page say what was done."""
    async with running("fastapi_app.py", tmp_path / "log") as client:
        assert (await client.get("/stock")).json() == {"chair": 100, "table": 10}
        answer = await client.post("/orders", json={"article": "chair", "pieces": 3})
        assert (answer.status_code, answer.json()) == (201, {"order": 1})
        assert (await client.post("/orders", json={"article": "table", "pieces": 11})).status_code == 409
        assert (await client.get("/stock")).json() == {"chair": 97, "table": 10}
        assert (await client.get("/ready")).json() == {"database": "up"}
        assert 'resilient_pool_outcomes_unknown_total{pool="orders"} 0.0' in (await client.get("/metrics/")).text
        assert "<h1>orders " in (await client.get("/pool")).text


async def test_the_litestar_example_keeps_a_guest_book(tmp_path):
    """On a PostgreSQL that it starts itself."""
    async with running("litestar_app.py", tmp_path / "log") as client:
        assert (await client.post("/guests/Ada")).json() == {"guest": 1}
        assert (await client.get("/guests")).json() == ["Ada"]
        assert (await client.get("/ready")).json() == {"database": "up"}


@pytest.fixture
async def database(postgres):
    """A database of the examples' own."""
    await postgres.create_database("web_examples")
    yield postgres.dsn("web_examples")
    async with postgres.admin() as connection:
        await connection.execute("DROP DATABASE web_examples WITH (FORCE)")


@pytest.mark.parametrize("name", ["fastapi_app.py", "litestar_app.py"])
async def test_an_example_answers_503_while_its_database_is_away(tmp_path, database, proxy, name):
    """Within the time that the request says it has."""
    path = {"fastapi_app.py": "/stock", "litestar_app.py": "/guests"}[name]
    async with running(name, tmp_path / "log", DATABASE_URL=proxy.dsn(database)) as client:
        assert (await client.get(path)).status_code == 200
        proxy.refuse()
        proxy.rst()
        answer = await client.get(path, headers={"X-Request-Timeout": "0.5"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        proxy.accept()
        assert (await client.get(path)).status_code == 200
