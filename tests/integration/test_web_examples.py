"""The example applications, run as their heads say, and asked over real HTTP."""

from __future__ import annotations

import pytest
from applications import client_of_example


async def test_the_fastapi_example_takes_orders(tmp_path):
    """On a PostgreSQL that it starts itself; its metrics and its page say what was done."""
    async with client_of_example("fastapi_app.py", tmp_path / "log") as client:
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
    async with client_of_example("litestar_app.py", tmp_path / "log") as client:
        assert (await client.post("/guests/Ada")).json() == {"guest": 1}
        assert (await client.get("/guests")).json() == ["Ada"]
        assert (await client.get("/ready")).json() == {"database": "up"}


@pytest.mark.parametrize("name", ["fastapi_app.py", "litestar_app.py"])
async def test_an_example_answers_503_while_its_database_is_away(tmp_path, postgres, empty_database, proxy, name):
    """Within the time that the request says it has."""
    path = {"fastapi_app.py": "/stock", "litestar_app.py": "/guests"}[name]
    async with client_of_example(name, tmp_path / "log", proxy.dsn(postgres.dsn(empty_database))) as client:
        assert (await client.get(path)).status_code == 200
        proxy.refuse()
        proxy.rst()
        answer = await client.get(path, headers={"X-Request-Timeout": "0.5"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        proxy.accept()
        assert (await client.get(path)).status_code == 200
