"""A worker that takes jobs from a table as soon as they are there, and does each once, also when its database restarts.

Run it with `python examples/listen_worker.py`: it starts a server of its own, puts 200 jobs into the table, restarts the server
meanwhile, and ends when all are done. With `DATABASE_URL=postgresql://... python examples/listen_worker.py` it works on yours until
it is interrupted.
"""

from __future__ import annotations

import asyncio
import os

from resilient_pool import Gap, ResilientConnection, ResilientPool
from resilient_pool.testing import EmbeddedPostgres

SCHEMA = """
    CREATE TABLE IF NOT EXISTS job (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload text NOT NULL);
    CREATE TABLE IF NOT EXISTS done (job bigint NOT NULL, result text NOT NULL);
    CREATE OR REPLACE FUNCTION job_is_there() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            NOTIFY job;
            RETURN NULL;
        END
    $$;
    CREATE OR REPLACE TRIGGER job_is_there AFTER INSERT ON job FOR EACH STATEMENT EXECUTE FUNCTION job_is_there();
"""
TAKE = """
    DELETE FROM job WHERE id = (SELECT id FROM job ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING id, payload
"""
PUT = "INSERT INTO job (payload) VALUES ($1)"
DONE = "SELECT count(*), count(DISTINCT job) FROM done"
JOBS = 200


async def do_one(connection: ResilientConnection) -> bool:
    """Take a job and do it, in one transaction; say whether there was one."""
    job = await connection.fetchrow(TAKE)
    if job is None:
        return False
    await connection.execute("INSERT INTO done VALUES ($1, $2)", job["id"], job["payload"].upper())
    return True


async def work(pool: ResilientPool) -> None:
    """Do the jobs that are there, and from then on those that are notified. Several such workers share the work."""
    async with pool.listen("job") as listener:
        while await pool.run_in_transaction(do_one):
            pass
        async for item in listener:
            if isinstance(item, Gap):
                print(f"listening again after {item.seconds:.2f} s ({item.reason}): looking for what was missed")
            while await pool.run_in_transaction(do_one):
                pass


async def try_it() -> None:
    """Let a worker and its server meet trouble."""
    async with EmbeddedPostgres() as server, ResilientPool(server.dsn()) as pool:
        await pool.execute(SCHEMA)
        working = asyncio.create_task(work(pool))
        for number in range(JOBS):
            await pool.execute(PUT, f"job {number}", exactly_once=True)
            if number == JOBS // 2:
                print("the server restarts")
                await server.restart()
        while await pool.fetchval(DONE) < JOBS:  # noqa: ASYNC110 - the jobs are done by whichever worker
            await asyncio.sleep(0.05)
        working.cancel()
        await asyncio.wait([working])
        rows, jobs = await pool.fetchrow(DONE)
        print(f"{jobs} of {JOBS} jobs are done, {rows - jobs} of them twice")


async def work_for_ever(dsn: str) -> None:
    """Work on a database that is there already."""
    async with ResilientPool(dsn) as pool:
        await pool.execute(SCHEMA)
        await work(pool)


if __name__ == "__main__":
    url = os.environ.get("DATABASE_URL")
    asyncio.run(try_it() if url is None else work_for_ever(url))
