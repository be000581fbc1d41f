"""The example with SQLAlchemy, run as its head says, and asked over real HTTP."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def client(tmp_path):
    """The example in a process of its own, with a PostgreSQL that it starts itself."""
    text = (ROOT / "examples" / "sqlalchemy_app.py").read_text()
    command = shlex.split(re.search(r"Run it with `([^`]+)`", text)[1])
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command[1:]),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**environment, "PORT": "0", "PYTHONPATH": str(ROOT)},
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


async def test_the_example_moves_money_once(client):
    """Transfers that are asked for at once conflict, and each is made once."""
    assert (await client.get("/accounts")).json() == {"Ada": 1000, "Grace": 1000}
    for _ in range(8):
        moves = [{"payer": "Ada", "payee": "Grace", "amount": 30}, {"payer": "Grace", "payee": "Ada", "amount": 10}] * 2
        answers = await asyncio.gather(*(client.post("/transfers", params=move) for move in moves))
        assert [answer.status_code for answer in answers] == [201] * 4
    assert (await client.get("/accounts")).json() == {"Ada": 680, "Grace": 1320}
    told = (await client.get("/transfers")).json()
    assert (told["transfers"], told["retries"] > 0) == (32, True)
    assert (await client.post("/transfers", params={"payer": "Ada", "payee": "Bob", "amount": 1})).status_code == 409
