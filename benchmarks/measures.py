"""Takes every figure that needs a database, in one process and one event loop; prints nothing but the figures, as JSON.

Contestants are interleaved: a round is one small batch of each, in an order drawn anew, so that the machine's moods hit
all of them alike. What is written down is one figure per contestant and round; ratios are formed within a round.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns, thread_time_ns

import asyncpg
import contestants
from contestants import BARE, OURS, Call

from resilient_pool import ResilientPool

Samples = dict[str, list[float]]

CONNECTIONS = 10
CROWD = 100
WARM_UP = 3
ANSWER: list[asyncpg.Record] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of each measure is taken: rounds, and calls or seconds in each."""

    busy_rounds: int
    busy_calls: int
    paused_rounds: int
    paused_calls: int
    slices: int
    slice_seconds: float
    cpu_rounds: int
    cpu_calls: int


QUICK = Effort(
    busy_rounds=8,
    busy_calls=30,
    paused_rounds=5,
    paused_calls=10,
    slices=3,
    slice_seconds=0.06,
    cpu_rounds=8,
    cpu_calls=200,
)
FULL = Effort(
    busy_rounds=120,
    busy_calls=40,
    paused_rounds=30,
    paused_calls=25,
    slices=9,
    slice_seconds=0.12,
    cpu_rounds=120,
    cpu_calls=200,
)


def shuffled(names: Sequence[str], chance: random.Random) -> list[str]:
    return chance.sample(names, len(names))


# One call at a time


async def latency(dsn: str, *, rounds: int, calls: int, pause: float, write: bool = False) -> Samples:
    """Take the median microseconds of a call, per contestant and round."""
    samples: Samples = {name: [] for name in contestants.ONE_AT_A_TIME}
    chance = random.Random(1)
    async with contextlib.AsyncExitStack() as stack:
        calls_of = {
            name: await stack.enter_async_context(open_(dsn)) for name, open_ in contestants.ONE_AT_A_TIME.items()
        }
        chosen = {name: each.write if write else each.read for name, each in calls_of.items()}
        for number in range(rounds + 1):
            for name in shuffled(list(chosen), chance):
                median = statistics.median(await timed(chosen[name], calls, pause))
                if number:  # the round before the first warms everything up
                    samples[name].append(median)
    return samples


async def timed(call: Call, calls: int, pause: float) -> list[float]:
    taken = []
    for key in range(calls + WARM_UP):
        if pause:
            await asyncio.sleep(pause)
        began = perf_counter_ns()
        await call(key)
        taken.append((perf_counter_ns() - began) / 1000)
    return taken[WARM_UP:]


# Ten connections, ten or a hundred workers


async def throughput(dsn: str, kind: str, *, rounds: int, seconds: float) -> tuple[Samples, Samples]:
    """Take calls per second, and the least-served worker's part of a fair share, per set-up and round."""
    chance = random.Random(2)
    async with contextlib.AsyncExitStack() as stack:
        crews = await hire(stack, dsn, kind)
        rates: Samples = {name: [] for name in crews}
        shares: Samples = {name: [] for name in crews}
        for number in range(rounds + 1):
            for name in shuffled(list(crews), chance):
                counts, elapsed = await run_crew(crews[name], seconds, start=number * 1000)
                if number:
                    rates[name].append(sum(counts) / elapsed)
                    shares[name].append(min(counts) * len(counts) / sum(counts))
    return rates, shares


async def hire(stack: contextlib.AsyncExitStack, dsn: str, kind: str) -> dict[str, list[Call]]:
    """Make a crew of each contestant: ten bare connections, and each pool with ten and with a hundred workers."""

    async def call_of(contestant: contextlib.AbstractAsyncContextManager[contestants.Calls]) -> Call:
        call: Call = getattr(await stack.enter_async_context(contestant), contestants.KINDS[kind])
        return call

    crews = {BARE: [await call_of(contestants.bare_connection(dsn)) for _ in range(CONNECTIONS)]}
    for name, pool in contestants.POOLS.items():
        call = await call_of(pool(dsn))
        crews |= {f"{name}/{workers}": [call] * workers for workers in (CONNECTIONS, CROWD)}
    return crews


async def run_crew(crew: Sequence[Call], seconds: float, start: int) -> tuple[list[int], float]:
    """Let every worker call until the time is up; return the number of calls of each, and the seconds in all."""
    running = True
    counts = [0] * len(crew)

    def stop() -> None:
        nonlocal running
        running = False

    async def work(number: int, call: Call) -> None:
        # No two workers ever meet at a row, and no row is written often: HOT chains would be measured otherwise.
        key = start + number
        while running:
            await call(key % contestants.ROWS)
            key += CROWD
            counts[number] += 1

    asyncio.get_running_loop().call_later(seconds, stop)
    began = perf_counter()
    await asyncio.gather(*(work(number, call) for number, call in enumerate(crew)))
    return counts, perf_counter() - began


# What a call costs besides the network


class InstantConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection on which `fetch` answers at once, without a byte sent: the seam below which nothing is ours."""

    __slots__ = ()

    async def fetch(self, query: str, *args: object, **options: object) -> list[asyncpg.Record]:
        if query == contestants.READ:
            return ANSWER
        rows: list[asyncpg.Record] = await super().fetch(query, *args, **options)
        return rows


async def python_time(dsn: str, *, rounds: int, calls: int) -> Samples:
    """Take the microseconds of processor time that a pool adds to a call when the connection answers at once.

    Without the reset, a round trip, that follows a call which an application's class makes more of.
    """
    connection = await asyncpg.connect(dsn, connection_class=InstantConnection)
    async with (
        ResilientPool(dsn, connection_class=InstantConnection, session_reset="off") as pool,
        asyncpg.create_pool(dsn, connection_class=InstantConnection, min_size=0) as other,
    ):
        await pool.execute("SELECT 1")  # so that a connection is there
        if await pool.fetch(contestants.READ, 1) is not ANSWER:
            raise RuntimeError(
                "the pool does not call fetch() of its connection, so this measure measures something else"
            )
        fetches = {
            BARE: lambda key: connection.fetch(contestants.READ, key),
            OURS: lambda key: pool.fetch(contestants.READ, key),
            contestants.ASYNCPG: lambda key: other.fetch(contestants.READ, key),
        }
        samples = await processor_time(fetches, rounds=rounds, calls=calls)
    await connection.close()
    return added(samples)


async def whole_time(dsn: str, *, rounds: int, calls: int) -> Samples:
    """Take the same on the real network: Python, event loop and kernel together."""
    async with contextlib.AsyncExitStack() as stack:
        names = (BARE, OURS, contestants.ASYNCPG)
        reads = {name: (await stack.enter_async_context(contestants.ONE_AT_A_TIME[name](dsn))).read for name in names}
        return added(await processor_time(reads, rounds=rounds, calls=calls))


async def processor_time(calls_of: dict[str, Call], *, rounds: int, calls: int) -> Samples:
    samples: Samples = {name: [] for name in calls_of}
    chance = random.Random(3)
    for number in range(rounds + 1):
        for name in shuffled(list(calls_of), chance):
            call = calls_of[name]
            await asyncio.sleep(0)  # whatever a call left for the loop to do is done outside the next one's time
            began = thread_time_ns()
            for key in range(calls):
                await call(key)
            if number:
                samples[name].append((thread_time_ns() - began) / calls / 1000)
    return samples


def added(samples: Samples) -> Samples:
    return {
        name: [mine - base for mine, base in zip(taken, samples[BARE], strict=True)]
        for name, taken in samples.items()
        if name != BARE
    }


async def tasks_created(dsn: str, calls: int = 200) -> dict[str, int]:
    """Count the tasks that calls on a warm pool create."""
    loop = asyncio.get_running_loop()
    created = 0

    def factory(loop: asyncio.AbstractEventLoop, coroutine: object, **options: object) -> asyncio.Task[object]:
        nonlocal created
        created += 1
        return asyncio.Task(coroutine, loop=loop, **options)  # type: ignore[arg-type]

    counts = {}
    async with contestants.resilient_pool(dsn) as ours:
        for kind in contestants.KINDS.values():
            call = getattr(ours, kind)
            await call(1)
            await asyncio.sleep(0.05)  # what the first call left to be done
            created = 0
            loop.set_task_factory(factory)
            for key in range(calls):
                await call(key)
            loop.set_task_factory(None)
            counts[kind] = created
    return {**counts, "calls": calls}


# All of it


async def measure(dsn: str, effort: Effort) -> dict[str, object]:
    gc.collect()
    gc.freeze()
    busy, paused = (effort.busy_rounds, effort.busy_calls), (effort.paused_rounds, effort.paused_calls)
    crews = {
        kind: await throughput(dsn, kind, rounds=effort.slices, seconds=effort.slice_seconds)
        for kind in contestants.KINDS
    }
    return {
        "busy": await latency(dsn, rounds=busy[0], calls=busy[1], pause=0),
        "paused": await latency(dsn, rounds=paused[0], calls=paused[1], pause=0.001),
        "busy writes": await latency(dsn, rounds=busy[0] // 2, calls=busy[1], pause=0, write=True),
        **{kind: rates for kind, (rates, _) in crews.items()},
        "fairness": crews["reads"][1],
        "python": await python_time(dsn, rounds=effort.cpu_rounds, calls=effort.cpu_calls),
        "whole": await whole_time(dsn, rounds=effort.cpu_rounds, calls=effort.cpu_calls),
        "tasks": await tasks_created(dsn),
    }


def run_in(loop: str, main: Callable[[], Awaitable[dict[str, object]]]) -> dict[str, object]:
    if loop == "uvloop":
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    else:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())  # type: ignore[arg-type]


def main() -> None:
    order = json.load(sys.stdin)
    if order["processors"]:
        os.sched_setaffinity(0, order["processors"])
    effort = QUICK if order["quick"] else FULL
    json.dump(run_in(order["loop"], lambda: measure(order["dsn"], effort)), sys.stdout)


if __name__ == "__main__":
    main()
