"""The examples that listen, run as their heads say: the worker, and the guest book in aiohttp."""

from __future__ import annotations

import asyncio
import json
import sys

from applications import ROOT, client_of_example
from migration_tools import environment


async def test_the_worker_does_each_job_once_through_a_restart():
    """With a server of its own, by one command."""
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, ROOT / "examples" / "listen_worker.py"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(None),
    )
    try:
        async with asyncio.timeout(60):
            said, _ = await worker.communicate()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    assert worker.returncode == 0, said.decode()
    assert "the server restarts" in said.decode()
    assert "200 of 200 jobs are done, 0 of them twice" in said.decode()


async def test_the_guest_book_shows_new_entries_through_a_restart_of_its_database(postgres, empty_database, tmp_path):
    """An open page gets all entries in order, each once; a request that comes while the server restarts is served."""
    dsn = postgres.dsn(empty_database)
    async with asyncio.timeout(60), client_of_example("aiohttp_app.py", tmp_path / "log", dsn) as client:
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


async def read_events(client, count):
    texts = []
    async with client.stream("GET", "/events") as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                texts.append(json.loads(line[6:])["text"])
            if len(texts) == count:
                return texts
