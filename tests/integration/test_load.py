"""Many callers, big answers, many statements a second while the server restarts, and few sessions for many processes.

`RESILIENT_POOL_LOAD_SECONDS` makes the run with restarts longer; `make chaos` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from resilient_pool import AcquireTimeoutError, OutcomeUnknownError, PoolOverloadedError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres

SECONDS = float(os.environ.get("RESILIENT_POOL_LOAD_SECONDS", "6"))
RESTART_EVERY = max(SECONDS / 6, 2.0)
PER_SECOND = 1_000
MEGABYTES = 100
CLIENT = Path(__file__).with_name("pgbouncer") / "many_calls.py"


async def test_ten_thousand_callers_wait_for_five_connections(dsn):
    """All are answered, each with its own answer, and in the order in which they came, but for those that overlap."""
    order = []

    async def call(pool, number):
        assert await pool.fetchval("SELECT $1::int", number) == number
        order.append(number)

    async with ResilientPool(dsn, max_size=5, deadline=120) as pool:
        async with asyncio.timeout(120):
            await asyncio.gather(*(call(pool, number) for number in range(10_000)))
        assert pool.stats().opened <= 6
        assert pool.stats().waiting == 0
    # A session that stands still for a moment keeps its caller, and no other one.
    assert sum(abs(at - number) > 1_000 for at, number in enumerate(order)) < 100


async def test_a_quarter_of_ten_thousand_waiting_callers_is_cancelled(dsn):
    """The others are served, and no connection is lost on the way."""
    async with ResilientPool(dsn, max_size=5, deadline=120) as pool:
        calls = [asyncio.ensure_future(pool.fetchval("SELECT $1::int", number)) for number in range(10_000)]
        await asyncio.sleep(0.05)
        for call in calls[::4]:
            call.cancel()
        async with asyncio.timeout(120):
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert all(a == n or isinstance(a, asyncio.CancelledError) for n, a in enumerate(answers))
            assert [a for n, a in enumerate(answers) if n % 4] == [n for n in range(10_000) if n % 4]
            while pool.stats().idle < pool.stats().size:
                await asyncio.sleep(0.01)


async def test_an_answer_of_a_hundred_megabytes_is_whole(dsn, proxy):
    """Also one whose connection is lost in the middle: it is read again, from the beginning."""
    sql = "SELECT repeat(chr(65 + n % 26), 1048576) AS block FROM generate_series(1, $1::int) AS n"
    async with ResilientPool(proxy.dsn(dsn), max_size=2, ssl=False) as pool:
        assert await pool.fetchval("SELECT 1") == 1
        proxy.cut_next_answer(30_000_000, matching="repeat")
        async with asyncio.timeout(120):
            rows = await pool.fetch(sql, MEGABYTES)
        assert proxy.fired == 1
        assert pool.stats().retries_total == 1
    assert len(rows) == MEGABYTES
    assert all(row["block"] == chr(65 + n % 26) * 1_048_576 for n, row in enumerate(rows, 1))


async def test_a_thousand_statements_a_second_while_the_server_restarts_again_and_again():
    """Nothing fails, nothing acknowledged is absent, nothing is there twice."""
    async with EmbeddedPostgres() as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE item (id bigint)")
        done, unknown, errors = [], [], []

        async def call(pool, number):
            try:
                if number % 2:
                    assert await pool.fetchval("SELECT $1::bigint", number) == number
                else:
                    await pool.execute("INSERT INTO item VALUES ($1)", number)
                    done.append(number)
            except OutcomeUnknownError:
                unknown.append(number)
            except Exception as error:
                errors.append(error)

        async def restart():
            for mode in ("fast", "immediate") * 100:
                await asyncio.sleep(RESTART_EVERY - 0.5)
                await server.restart(mode)

        async with ResilientPool(server.dsn(), max_size=10, deadline=60) as pool, asyncio.TaskGroup() as calls:
            restarting, began, number = asyncio.create_task(restart()), time.monotonic(), 0
            while number < SECONDS * PER_SECOND:
                while number < min(time.monotonic() - began, SECONDS) * PER_SECOND:
                    calls.create_task(call(pool, number))
                    number += 1
                await asyncio.sleep(0.005)
            restarting.cancel()
            await asyncio.wait([restarting])
            await server.start()
        async with server.admin() as admin:
            rows = [row["id"] for row in await admin.fetch("SELECT id FROM item")]
    assert errors == []
    assert len(rows) == len(set(rows))
    assert set(done) <= set(rows) <= set(done) | set(unknown)


async def test_pools_of_four_processes_share_few_sessions():
    """Together they want thirty-two of a server that has nine: every call of each is answered, with its own answer."""
    async with EmbeddedPostgres(settings={"max_connections": 9, "superuser_reserved_connections": 1}) as server:
        await server.create_role("app", "secret")

        async def client(seed):
            command = (sys.executable, CLIENT, server.dsn(user="app", password="secret"), 100, seed)
            process = await asyncio.create_subprocess_exec(*map(str, command), stdout=asyncio.subprocess.PIPE)
            output, _ = await process.communicate()
            assert process.returncode == 0
            return json.loads(output)

        async with asyncio.timeout(120):
            reports = await asyncio.gather(*(client(seed) for seed in range(1, 5)))
    assert [(report["wrong"], report["errors"]) for report in reports] == [([], [])] * 4


# The limit


async def test_one_caller_more_than_may_wait_is_refused_at_once(dsn):
    """Those who wait are served, and so is who comes when there is room again."""
    async with ResilientPool(dsn, max_size=1, max_waiting=2) as pool:
        async with pool.acquire():
            waiting = [asyncio.ensure_future(pool.fetchval("SELECT $1::int", number)) for number in range(2)]
            await asyncio.sleep(0)
            for call in (pool.fetchval("SELECT 1"), pool.acquire(), pool.run_in_transaction(lambda _: None)):
                began = time.monotonic()
                with pytest.raises(
                    PoolOverloadedError, match="2 callers wait for a connection, and max_waiting=2; shed load"
                ):
                    await call
                assert time.monotonic() - began < 10
            assert pool.stats().overloads == 3
        assert await asyncio.gather(*waiting) == [0, 1]
        assert await pool.fetchval("SELECT 42") == 42
        assert pool.stats().overloads == 3
    assert issubclass(PoolOverloadedError, AcquireTimeoutError)


async def test_a_crowd_is_cut_to_what_may_wait(dsn):
    """Of ten thousand as many are answered as connections and places there are; memory is not filled by a queue."""
    async with ResilientPool(dsn, max_size=5, max_waiting=100) as pool:
        await asyncio.gather(*(pool.fetchval("SELECT pg_sleep(0.01)") for _ in range(5)))
        calls = [pool.fetchval("SELECT $1::int", number) for number in range(10_000)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, PoolOverloadedError)]
        assert len(answers) - len(refused) >= 105
        assert pool.stats().overloads == len(refused) > 0
        assert all(a == n for n, a in enumerate(answers) if not isinstance(a, PoolOverloadedError))


async def test_a_lost_commit_is_resolved_although_the_queue_is_full(postgres, dsn, proxy):
    """What is under way is not refused: its question to the server waits its turn."""
    async with postgres.admin() as admin:
        await admin.execute("CREATE TABLE IF NOT EXISTS paid (id int)")
    async with ResilientPool(proxy.dsn(dsn), max_size=1, max_waiting=1, ssl=False) as pool:
        await pool.fetchval("SELECT 1")
        waiting = []

        async def pay(connection):
            await connection.execute("INSERT INTO paid VALUES (1)")
            proxy.swallow_next_answer(matching="COMMIT")
            waiting.append(asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(0.2), 7", column=1)))
            await asyncio.sleep(0)

        await pool.run_in_transaction(pay)
        assert await asyncio.gather(*waiting) == [7]
        assert await pool.fetchval("SELECT count(*) FROM paid") == 1
    async with postgres.admin() as admin:
        await admin.execute("DROP TABLE paid")
