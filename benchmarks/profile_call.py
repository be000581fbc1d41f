"""Where the time of a call goes: a table by function, for each kind of call, on a warm pool with nothing wrong.

    python benchmarks/profile_call.py                    # asyncio
    python benchmarks/profile_call.py --loop uvloop

The profiler makes each function of Python's dearer than it is, so shares are for finding what to look at, and
benchmarks/overhead.py says what it costs.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
from itertools import groupby
from pathlib import Path

import asyncpg
import contestants
from contestants import KINDS, ROWS, Call
from measures import run_in
from report import table

import resilient_pool
from resilient_pool.testing import EmbeddedPostgres

CALLS = 4000
CREWS = (10, 100)
FEWEST = 0.005
"""The share of the whole below which a function of ours has no row of its own."""
OWNERS = {
    "resilient_pool": str(Path(resilient_pool.__file__).parent),
    "asyncpg": str(Path(asyncpg.__file__).parent),
    "asyncio": str(Path(asyncio.__file__).parent),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    run_in(parser.parse_args().loop, profile_all)


async def profile_all() -> dict[str, object]:
    async with EmbeddedPostgres(settings={"synchronous_commit": False, "autovacuum": False}) as server:
        async with server.admin() as connection:
            await connection.execute("CREATE TABLE overhead (id int PRIMARY KEY, value int NOT NULL)")
            await connection.execute("INSERT INTO overhead SELECT id, 0 FROM generate_series(0, 9999) AS id")
        async with contestants.resilient_pool(server.dsn()) as calls:
            for kind, name in KINDS.items():
                for workers in CREWS:
                    print(f"\n## {kind}, {workers} workers\n")
                    print(table(*await profile(getattr(calls, name), workers)))
    return {}


async def profile(call: Call, workers: int) -> tuple[list[str], list[list[str]]]:
    """Let workers share the calls, and return the header and the rows of a table: by owner, and of ours by function."""

    async def work(number: int) -> None:
        for key in range(number, CALLS, workers):
            await call(key % ROWS)

    await asyncio.gather(*map(work, range(workers)))  # warm
    profiler = cProfile.Profile()
    profiler.enable()
    await asyncio.gather(*map(work, range(workers)))
    profiler.disable()
    return rows_of(pstats.Stats(profiler))


def rows_of(found: pstats.Stats) -> tuple[list[str], list[list[str]]]:
    functions: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = found.stats  # type: ignore[attr-defined]
    taken = sorted(
        (owner(file), f"{Path(file).name} {name}", seconds, str(times))
        for (file, _, name), (_, times, seconds, _, _) in functions.items()
    )
    whole = sum(seconds for _, _, seconds, _ in taken)
    rows = []
    for name, functions in groupby(taken, key=lambda function: function[0]):
        each = list(functions)
        rows.append(row(name, sum(seconds for _, _, seconds, _ in each), whole, ""))
        if name == "resilient_pool":
            dearest = sorted(each, key=lambda function: -function[2])
            rows += [row(f"  {what}", took, whole, times) for _, what, took, times in dearest if took > whole * FEWEST]
    return ["", "microseconds a call", "share", "calls for each"], rows


def row(name: str, seconds: float, whole: float, times: str) -> list[str]:
    each = f"{int(times) / CALLS:.1f}" if times else ""
    return [name, f"{seconds / CALLS * 1e6:.2f}", f"{seconds / whole:.1%}", each]


def owner(file: str) -> str:
    return next((name for name, folder in OWNERS.items() if file.startswith(folder)), "the interpreter and the kernel")


if __name__ == "__main__":
    main()
