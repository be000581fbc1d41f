"""The AWS Lambda example, called as Lambda calls it, with a context that tells how much time is left."""

from __future__ import annotations

import asyncio
import runpy
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from migration_tools import databases

from resilient_pool.testing import PausingServer

HANDLER = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "lambda_migration.py"))["handler"]


@dataclass
class Context:
    """What the example asks of Lambda's context."""

    milliseconds: int

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


@pytest.fixture
def task_root(tmp_path, monkeypatch):
    """A deployed function's directory."""
    (tmp_path / "migrations").mkdir()
    (tmp_path / "migrations" / "1.sql").write_text("CREATE TABLE orders (id int)")
    monkeypatch.setenv("LAMBDA_TASK_ROOT", str(tmp_path))
    return tmp_path


async def test_the_handler_waits_for_the_database_and_applies_what_is_new(postgres, task_root, monkeypatch):
    """The second invocation finds nothing to do."""
    async with databases(postgres, f"lambda_{uuid.uuid4().hex}") as (dsn,):
        with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=0.3) as server:
            monkeypatch.setenv("DATABASE_URL", server.dsn(dsn))
            server.pause()
            first = await asyncio.to_thread(HANDLER, {}, Context(60_000))
            second = await asyncio.to_thread(HANDLER, {}, Context(60_000))
    assert first["applied"] == ["1.sql"]
    assert first["waited"] >= 0.25
    assert second["applied"] == []


@pytest.mark.parametrize("milliseconds", [10_500, 3_000])
async def test_the_remaining_time_is_the_deadline(task_root, monkeypatch, milliseconds):
    """A database that does not come is given up in time for an answer; it has a second at least."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres@127.0.0.1:1/postgres")
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.to_thread(HANDLER, {}, Context(milliseconds))
    assert time.monotonic() - started < 2.5
