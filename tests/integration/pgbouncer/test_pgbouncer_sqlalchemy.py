"""SQLAlchemy through PgBouncer in transaction mode: no statement runs in another one's place."""

from __future__ import annotations

import asyncio

from bouncer import PgBouncer
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from resilient_pool.contrib.sqlalchemy import pool_of, run_in_session

TEXTS = 40


async def test_each_statement_has_its_own_answer(behind, version):
    """Forty different ones from forty tasks at once, again and again, over three server sessions; in units of work, too. None is left there."""
    async with PgBouncer(behind, version, default_pool_size=3) as bouncer:
        url = bouncer.dsn().replace("postgresql:", "postgresql+resilient:")
        engine = create_async_engine(url, pool_size=10, max_overflow=0, connect_args={"ssl": False})

        async def ask(number):
            async with engine.connect() as connection:
                for turn in range(5):
                    result = await connection.execute(text(f"SELECT {number} AS a{number}, :turn"), {"turn": f"{turn}"})
                    assert (next(iter(result.keys())), result.all()) == (f"a{number}", [(number, f"{turn}")])
                    await connection.rollback()

        async def work(session, number):
            return (await session.execute(text(f"SELECT {number} AS b{number}"))).one()

        await asyncio.gather(*map(ask, range(TEXTS)))
        answers = await asyncio.gather(*(run_in_session(engine, work, number) for number in range(TEXTS)))
        assert answers == [(number,) for number in range(TEXTS)]
        left = "SELECT count(*), pg_sleep(0.02) FROM pg_prepared_statements WHERE statement LIKE 'SELECT % AS %'"
        assert await asyncio.gather(*(pool_of(engine).fetchval(left) for _ in range(10))) == [0] * 10
        assert (pool_of(engine).stats().pooler, pool_of(engine).stats().in_use) == (True, 0)
        await engine.dispose()


async def test_with_autocommit_too(behind, version):
    """Each statement may run in another server session, and is prepared there in the same message."""
    async with PgBouncer(behind, version, default_pool_size=3) as bouncer:
        url = bouncer.dsn().replace("postgresql:", "postgresql+resilient:")
        engine = create_async_engine(
            url, pool_size=10, max_overflow=0, connect_args={"ssl": False}, isolation_level="AUTOCOMMIT"
        )

        async def ask(number):
            async with engine.connect() as connection:
                for turn in range(20):
                    found = await connection.execute(text(f"SELECT {number} AS a, :turn AS b"), {"turn": f"{turn}"})
                    assert found.one() == (number, f"{turn}")

        await asyncio.gather(*map(ask, range(TEXTS)))
        await engine.dispose()
