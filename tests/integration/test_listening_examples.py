"""The examples that listen, run as their heads say: the worker, and the guest book in aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@contextlib.asynccontextmanager
async def running(name, **environment):
    """Run an example, and end it as a keyboard would, if it does not end by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        EXAMPLES / name,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.communicate()


async def test_the_worker_does_each_job_once_through_a_restart():
    """With a server of its own, by one command."""
    async with asyncio.timeout(60), running("listen_worker.py") as worker:
        said, _ = await worker.communicate()
    assert worker.returncode == 0, said.decode()
    assert "the server restarts" in said.decode()
    assert "200 of 200 jobs are done, 0 of them twice" in said.decode()


@pytest.fixture
def port():
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


async def test_the_guest_book_shows_new_entries_through_a_restart_of_its_database(postgres, port):
    """An open page gets all entries in order, each once; a request that comes while the server restarts is served."""
    await postgres.create_database("guests")
    where = {"PORT": str(port), "DATABASE_URL": postgres.dsn(database="guests")}
    async with asyncio.timeout(60), running("aiohttp_app.py", **where):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            await until_up(client)
            seen = asyncio.ensure_future(read_events(client, 20))
            for number in range(20):
                if number == 10:
                    restarting = asyncio.ensure_future(postgres.restart())
                answer = await client.post("/entries", content=f"entry {number}")
                assert answer.status_code == 201, answer.text
            assert await seen == [f"entry {number}" for number in range(20)]
            await restarting
            assert len((await client.get("/entries")).json()) == 20
            assert "Guest book" in (await client.get("/")).text


async def until_up(client):
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/entries")).status_code == 200:
                return
        await asyncio.sleep(0.02)


async def read_events(client, count):
    texts = []
    async with client.stream("GET", "/events") as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                texts.append(json.loads(line[6:])["text"])
            if len(texts) == count:
                return texts
