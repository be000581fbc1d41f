"""The example application, served by uvicorn and asked over real HTTP while its database is mistreated."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import asyncpg
import httpx
import pytest
from applications import client_of

from resilient_pool.testing import EmbeddedPostgres

CLIENTS = 10
SESSIONS = "datname = 'web_app'"


@pytest.fixture
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database of the application's own, on a server that is running again in the end."""
    await postgres.create_database("web_app")
    try:
        yield postgres.dsn("web_app")
    finally:
        await postgres.start()
        async with postgres.admin() as connection:
            await connection.execute("DROP DATABASE web_app WITH (FORCE)")


def _serving(dsn: str, log: Path, *options: str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    arguments = ("-m", "uvicorn", "--app-dir", "examples", "--port", "0", *options, "web_app:app")
    return client_of(*arguments, log=log, dsn=dsn)


class Traffic:
    """What ten clients did, and what they were told."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._numbers = itertools.count(1)
        self.statuses: Counter[int] = Counter()
        self.stored: dict[int, str] = {}
        self.wrong: list[object] = []
        self.over = False

    async def run(self) -> None:
        while not self.over:
            number = next(self._numbers)
            entry = {"id": number, "text": f"entry {number}"}
            if await self._ask("PUT", f"/entries/{number}", entry, json={"text": entry["text"]}):
                self.stored[number] = entry["text"]
                await self._ask("GET", f"/entries/{number}", entry)
            await self._ask("GET", "/entries?limit=5")

    async def _ask(self, method: str, path: str, expected: object = None, **options: object) -> bool:
        answer = await self._client.request(method, path, **options)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200 and expected is not None and answer.json() != expected:
            self.wrong.append((path, answer.json()))
        return answer.status_code == 200

    async def moves_on(self) -> None:
        """Wait until each client has had some more answers."""
        before = self.statuses.total()
        async with asyncio.timeout(30):
            while self.statuses.total() < before + 8 * CLIENTS:
                await asyncio.sleep(0.02)


async def _mistreat(postgres: EmbeddedPostgres, traffic: Traffic) -> None:
    for _ in range(4):
        await traffic.moves_on()
        await postgres.terminate_backends(SESSIONS)
    for mode in ("fast", "immediate"):
        await traffic.moves_on()
        await postgres.restart(mode)
    await traffic.moves_on()
    async with postgres.admin() as connection:
        pid = await connection.fetchval(f"SELECT pid FROM pg_stat_activity WHERE {SESSIONS} LIMIT 1")
    postgres.kill_backend(pid)
    await traffic.moves_on()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_no_client_sees_what_happens_to_the_server(postgres, database, tmp_path, loop):
    """Through terminated sessions, two restarts and a crash every request is answered, and every write is there."""
    log = tmp_path / "application.log"
    async with _serving(database, log, "--loop", loop) as client:
        traffic = Traffic(client)
        async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(traffic.run())
            try:
                await _mistreat(postgres, traffic)
            finally:
                traffic.over = True
        assert set(traffic.statuses) == {200}, f"{traffic.statuses}\n{log.read_text()}"
        assert traffic.wrong == []
        health = (await client.get("/health")).json()
    assert health["database"] == "up"
    connection = await asyncpg.connect(database)
    try:
        rows = await connection.fetch("SELECT id, text FROM entry")
    finally:
        await connection.close()
    assert {row["id"]: row["text"] for row in rows} == traffic.stored
    assert "Traceback" not in log.read_text()


async def test_the_health_route_tells_away_from_up(postgres, database, tmp_path):
    """While the server is stopped the route says so long before a request that was made meanwhile is answered."""
    async with _serving(database, tmp_path / "application.log") as client:
        up = await client.get("/health")
        assert (up.status_code, up.json()["database"]) == (200, "up")
        await postgres.stop()
        patient = asyncio.create_task(client.put("/entries/1", json={"text": "late"}))
        async with asyncio.timeout(10):
            away = await client.get("/health")
        assert (away.status_code, away.json()["database"]) == (503, "away")
        assert "retry-after" in away.headers
        assert (await client.get("/live")).status_code == 204
        assert not patient.done()
        await postgres.start()
        async with asyncio.timeout(20):
            assert (await patient).status_code == 200
        again = await client.get("/health")
        assert (again.status_code, again.json()["database"]) == (200, "up")


async def test_the_health_route_answers_while_the_server_stands_still(postgres, database, tmp_path):
    """A server that accepts connections and never answers is away as well, and it does not hang the route."""
    async with _serving(database, tmp_path / "application.log") as client:
        assert (await client.get("/health")).json()["database"] == "up"
        postgres.freeze(backends=True)
        try:
            async with asyncio.timeout(10):
                away = await client.get("/health")
        finally:
            postgres.thaw()
        assert (away.status_code, away.json()["database"]) == (503, "away")
        async with asyncio.timeout(20):
            assert (await client.get("/entries")).status_code == 200
            assert (await client.get("/entries/404")).status_code == 404
            assert (await client.get("/entries?limit=0")).status_code == 422


async def test_the_health_route_tells_what_waiting_does_not_cure(postgres, database, tmp_path):
    """When the role's password was changed under the application, somebody has to look."""
    await postgres.create_role("web_app", "before", superuser=True)
    try:
        dsn = postgres.dsn("web_app", "web_app", "before")
        async with _serving(dsn, tmp_path / "application.log") as client:
            assert (await client.get("/health")).json()["database"] == "up"
            async with postgres.admin() as connection:
                await connection.execute("ALTER ROLE web_app PASSWORD 'after'")
            await postgres.terminate_backends("usename = 'web_app'")
            broken = await client.get("/health")
            assert (broken.status_code, broken.json()["database"]) == (503, "broken")
            assert "before" not in broken.text
    finally:
        async with postgres.admin("web_app") as connection:
            await connection.execute("REASSIGN OWNED BY web_app TO postgres; DROP ROLE web_app")
