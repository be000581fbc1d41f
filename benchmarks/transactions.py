"""What it costs to be able to find out what became of a COMMIT: transactions with that and without it, in one run.

python benchmarks/transactions.py            # a minute or two; writes results/transactions.md
python benchmarks/transactions.py --quick    # some seconds; only prints
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import asyncpg
import uvloop
from contestants import READ, WRITE, Call
from measures import Samples, shuffled, timed
from overhead import SETTINGS, arguments, pin, share_processors
from report import Aim, Spread, table

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

RESULTS = Path(__file__).parent / "results" / "transactions.md"
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
TABLE = """
    CREATE TABLE overhead (id int PRIMARY KEY, value int NOT NULL) WITH (fillfactor = 50);
    INSERT INTO overhead SELECT id, 0 FROM generate_series(0, 9999) AS id;
"""

ROUND_TRIP = "one read, bare connection"
BARE_WRITE = "writing, asyncpg's transaction(), bare connection"
UNASKED_WRITE = "writing, resolve_commit=False"
WRITE_RESOLVED = "writing, as it is by default"
WRITE_LOGGED = "writing, with a commit log"
BARE_READ = "reading, asyncpg's transaction(), bare connection"
UNASKED_READ = "reading, resolve_commit=False"
READ_PROVEN = "reading, as it is by default"
READ_DECLARED = "reading, readonly=True"
# Each beside the same without resolution of COMMITs: the difference is its cost.
WITHOUT = {
    WRITE_RESOLVED: UNASKED_WRITE,
    WRITE_LOGGED: UNASKED_WRITE,
    READ_PROVEN: UNASKED_READ,
    READ_DECLARED: UNASKED_READ,
}
# Next door a question costs more than the way there and back, since it must be worked at; at a distance that is all.
RATIO_BOUNDS = {WRITE_RESOLVED: 1.5, READ_PROVEN: 1.05, READ_DECLARED: 1.05}
DISTANT_BOUNDS = {WRITE_RESOLVED: 1.1, WRITE_LOGGED: 1.1, READ_PROVEN: 0.05, READ_DECLARED: 0.05}
ONE_WAY = 0.002
"""Seconds that everything is held back in either direction, at a distance."""


def main() -> None:
    options = arguments()
    server_cpus, client_cpus = share_processors()
    with asyncio.Runner() as runner:
        server = EmbeddedPostgres(settings=SETTINGS)
        try:
            runner.run(prepare(server))
            pin(server.pid, server_cpus)
            if client_cpus:
                os.sched_setaffinity(0, client_cpus)
            rounds, calls = (20, 20) if options.quick else (120, 40)
            near = {name: measure(name, server.dsn(), rounds, calls) for name in options.loop or LOOPS}
            with FaultProxy(server.host, server.port) as proxy:
                proxy.delay(ONE_WAY)
                distant = {
                    name: measure(name, proxy.dsn(server.dsn()), rounds // 10, calls // 2)
                    for name in options.loop or LOOPS
                }
        finally:
            runner.run(server.close())
    text = page(near, distant, server.version, pinned=bool(client_cpus))
    print(text)
    if not options.quick:
        RESULTS.write_text(text + "\n")


async def prepare(server: EmbeddedPostgres) -> None:
    await server.start()
    async with server.admin() as connection:
        await connection.execute(TABLE)
        await connection.execute("VACUUM ANALYZE overhead")


def measure(loop: str, dsn: str, rounds: int, calls: int) -> Samples:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(latency(dsn, rounds, calls))


async def latency(dsn: str, rounds: int, calls: int) -> Samples:
    """Take the median microseconds of a call, per kind and round, one call at a time."""
    chance = random.Random(1)
    async with contextlib.AsyncExitStack() as stack:
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        pools = [ResilientPool(dsn, commit_log=log) for log in (None, "public.commit_log")]
        pool, logging = [await stack.enter_async_context(pool) for pool in pools]
        kinds = kinds_of_transaction(connection, pool, logging)
        samples: Samples = {name: [] for name in kinds}
        for number in range(rounds + 1):
            for name in shuffled(list(kinds), chance):
                median = statistics.median(await timed(kinds[name], calls, 0))
                if number:  # the round before the first warms everything up
                    samples[name].append(median)
    return samples


def kinds_of_transaction(
    connection: asyncpg.Connection, pool: ResilientPool, logging: ResilientPool
) -> dict[str, Call]:
    return {
        ROUND_TRIP: lambda key: connection.fetch(READ, key),
        BARE_WRITE: bare(connection, WRITE),
        UNASKED_WRITE: retried(pool, WRITE, resolve_commit=False),
        WRITE_RESOLVED: retried(pool, WRITE),
        WRITE_LOGGED: retried(logging, WRITE),
        BARE_READ: bare(connection, READ),
        UNASKED_READ: retried(pool, READ, resolve_commit=False),
        READ_PROVEN: retried(pool, READ),
        READ_DECLARED: retried(pool, READ, readonly=True),
    }


def bare(connection: asyncpg.Connection, sql: str) -> Call:
    async def call(key: int) -> None:
        async with connection.transaction():
            await connection.fetch(sql, key)

    return call


def retried(pool: ResilientPool, sql: str, **options: bool) -> Call:
    async def call(key: int) -> None:
        async for attempt in pool.transaction(**options):
            async with attempt as connection:
                await connection.fetch(sql, key)

    return call


# The page


def page(near: Mapping[str, Samples], distant: Mapping[str, Samples], postgres: int, *, pinned: bool) -> str:
    where = "pinned to different processors" if pinned else "NOT pinned"
    conditions = (
        f"Python {platform.python_version()}, PostgreSQL {postgres} over TCP on the same machine of {os.cpu_count()} "
        f"processors, server and client {where}; at a distance, through a proxy that holds everything back for "
        f"{ONE_WAY * 1000:g} ms in either direction.\nOne statement in each transaction, one transaction at a time, with the "
        "session's reset in the background after each, as by default; the kinds take turns in small batches, in an order "
        "drawn anew for every round. Ratios and differences are formed within a round; shown are the median over the rounds "
        "and the quartiles. synchronous_commit is off, which takes the disk out."
    )
    promises = table(["", "aim", *near], aims(list(near.values()), list(distant.values())))
    parts = [
        "# What it costs to be able to ask what became of a COMMIT",
        "",
        conditions,
        "",
        "## Aims",
        "",
        promises,
        "",
    ]
    for distance, figures in (("next door", near), ("at a distance", distant)):
        for loop, samples in figures.items():
            parts += [f"## {loop}, {distance}, microseconds", "", latencies(samples), ""]
    return "\n".join(parts).rstrip()


def aims(near: Sequence[Samples], distant: Sequence[Samples]) -> list[list[str]]:
    rows = []
    for name, bound in DISTANT_BOUNDS.items():
        aim = Aim(what=f"{name}: round trips added by resolution, at a distance", bound=bound, at_most=True)
        rows.append(aim.row([Spread.of(round_trips_added(samples, name)) for samples in distant]))
    for name, bound in RATIO_BOUNDS.items():
        aim = Aim(what=f"{name}: time / the same unresolved, next door", bound=bound, at_most=True)
        rows.append(aim.row([Spread.of_ratios(samples[name], samples[WITHOUT[name]]) for samples in near]))
    return rows


def round_trips_added(samples: Samples, name: str) -> list[float]:
    rounds = zip(samples[name], samples[WITHOUT[name]], samples[ROUND_TRIP], strict=True)
    return [(with_it - without) / round_trip for with_it, without, round_trip in rounds]


def latencies(samples: Samples) -> str:
    rows = []
    for name, taken in samples.items():
        base = BARE_WRITE if name.startswith("writing") else BARE_READ
        without = WITHOUT.get(name)
        rows.append(
            [
                name,
                f"{statistics.median(taken):.0f}",
                Spread.of_ratios(taken, samples[base]).text(2),
                "" if without is None else Spread.of_ratios(taken, samples[without]).text(2),
                "" if without is None else Spread.of(round_trips_added(samples, name)).text(2),
            ]
        )
    return table(["", "time", "/ bare transaction", "/ unresolved", "round trips added"], rows)


if __name__ == "__main__":
    main()
