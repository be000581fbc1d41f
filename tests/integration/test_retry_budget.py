"""A server that is up and failing: what retries may add to its load."""

from __future__ import annotations

import asyncio
import uuid

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import OutcomeUnknownError, ResilientPool, RetryBudget

CALLS = 300
RESERVE = 10
SIZE = 10


@pytest.fixture
async def counter(postgres):
    """A sequence, whose numbers no rollback and no lost connection takes back."""
    name = f"executed_{uuid.uuid4().hex}"
    async with postgres.admin() as administrator:
        await administrator.execute(f"CREATE SEQUENCE {name}")
    return name


async def executed(postgres, counter):
    async with postgres.admin() as administrator:
        return await administrator.fetchval(f"SELECT nextval('{counter}')") - 1


async def fail_often(pool, statement, error):
    async def fail():
        with pytest.raises(error) as caught:
            await pool.fetchval(statement, idempotent=True)
        return caught.value

    return await asyncio.gather(*(fail() for _ in range(CALLS)))


def check(errors, times):
    """A tenth is added and the reserve, and whoever is beyond that has the error of a first and only attempt."""
    assert CALLS < times <= CALLS * 1.1 + RESERVE
    assert sum(not hasattr(error, "__notes__") for error in errors) >= CALLS * 0.9 - RESERVE


async def test_a_server_that_refuses_every_call_is_spared(postgres, counter):
    """It answers with 53400, and that is what the callers see."""
    function = f"refuse_{counter}"
    async with postgres.admin() as administrator:
        await administrator.execute(
            f"CREATE FUNCTION {function}() RETURNS int LANGUAGE plpgsql AS $$ BEGIN "
            f"PERFORM nextval('{counter}'); RAISE EXCEPTION 'full' USING ERRCODE = '53400'; END $$"
        )
    async with ResilientPool(postgres.dsn(), max_size=SIZE) as pool:
        errors = await fail_often(pool, f"SELECT {function}()", asyncpg.ConfigurationLimitExceededError)
    check(errors, await executed(postgres, counter))


async def test_a_server_that_drops_every_call_is_spared(postgres, proxy, counter):
    """It executes, and resets the connection in place of an answer."""
    proxy.swallow_next_answer("rst", matching=counter.encode(), times=10 * CALLS)
    async with ResilientPool(proxy.dsn(postgres.dsn()), max_size=SIZE) as pool:
        errors = await fail_often(pool, f"SELECT nextval('{counter}')", OutcomeUnknownError)
    check(errors, await executed(postgres, counter))


async def test_a_blow_that_takes_all_connections_costs_nothing(postgres, proxy, counter):
    """They had worked before, so every call is repeated, whatever the budget."""
    async with ResilientPool(
        proxy.dsn(postgres.dsn()), max_size=SIZE, retry_budget=RetryBudget(ratio=0, reserve=0)
    ) as pool:
        statement = f"SELECT nextval('{counter}') FROM pg_sleep(0.1)"
        leases = [await pool.acquire() for _ in range(SIZE)]
        for lease in leases:
            await lease.fetchval(f"SELECT nextval('{counter}')")
            await pool.release(lease)
        await eventually(lambda: pool.get_idle_size() == SIZE)
        proxy.swallow_next_answer("rst", matching=counter.encode(), times=SIZE)
        await asyncio.gather(*(pool.fetchval(statement, idempotent=True) for _ in range(SIZE)))
    assert await executed(postgres, counter) == 3 * SIZE
