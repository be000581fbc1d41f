"""Many calls of several client processes through PgBouncer: every answer is the one that was asked for."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from bouncer import PgBouncer, numbers

pytestmark = pytest.mark.needs("pgbouncer")

CALLS = int(os.environ.get("RESILIENT_POOL_PGBOUNCER_CALLS", "10000"))
PROCESSES = 4
CLIENT = Path(__file__).with_name("many_calls.py")


async def clients(bouncer: PgBouncer, calls: int, *arguments: object) -> list[dict[str, object]]:
    """Run the client processes side by side, and return what each of them prints."""

    async def client(seed: int) -> dict[str, object]:
        command = [sys.executable, CLIENT, bouncer.dsn(), calls // PROCESSES, seed, *arguments]
        process = await asyncio.create_subprocess_exec(
            *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        output, complaint = await process.communicate()
        assert process.returncode == 0, complaint.decode()
        return json.loads(output)

    return await asyncio.gather(*(client(seed) for seed in range(1, PROCESSES + 1)))


def assert_all_right(reports: list[dict[str, object]]) -> None:
    """Every call was answered, and with its own answer."""
    assert [report["wrong"] for report in reports] == [[]] * PROCESSES
    assert [report["errors"] for report in reports] == [[]] * PROCESSES


async def test_ten_thousand_calls_of_four_processes_through_transaction_mode(behind, version):
    """They share five server sessions; no statement is prepared, and none of another client's is run."""
    async with PgBouncer(behind, version) as bouncer:
        reports = await clients(bouncer, CALLS)
        assert_all_right(reports)
        assert all(report["pooler"] for report in reports)


async def test_calls_of_four_processes_through_session_mode(behind, version):
    """Each connection has a server session, with what is prepared in it."""
    async with PgBouncer(behind, version, pool_mode="session", default_pool_size=40) as bouncer:
        assert_all_right(await clients(bouncer, CALLS // 5, 100))


async def test_calls_with_prepared_statements_through_transaction_mode(behind, version):
    """From 1.21 on PgBouncer follows prepared statements, if it is told to; others say that one is missing, and it is run again."""
    follows = numbers(version) >= (1, 21)
    settings = {"max_prepared_statements": 20} if follows else {}
    async with PgBouncer(behind, version, **settings) as bouncer:
        reports = await clients(bouncer, CALLS // 5, 100)
        assert [report["wrong"] for report in reports] == [[]] * PROCESSES
        if follows:
            assert_all_right(reports)


async def test_calls_while_the_sessions_behind_are_ended_again_and_again(behind, version):
    """Reads and transactions are repeated, and none gets what was meant for another; a lease that is in use is not."""
    async with PgBouncer(behind, version) as bouncer:
        running = asyncio.create_task(clients(bouncer, CALLS // 5))
        while not running.done():
            await behind.terminate_backends("pid % 3 = 0")
            await asyncio.wait([running], timeout=0.3)
        reports = await running
        for report in reports:  # whose lease it was sees the loss
            report["errors"] = [error for error in report["errors"] if not error.startswith("by_cursor: ")]
        assert_all_right(reports)
