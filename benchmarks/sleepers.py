"""Wakes a sleeping database by processes full of callers, and tells what it saw; the only module that starts them."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crowd import Order

from resilient_pool.testing import EmbeddedPostgres, PausingServer
from resilient_pool.testing.pausing import Away

CROWD = Path(__file__).with_name("crowd.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Who wakes whom.

    Attributes:
        contestant: Which pool, or loop around it.
        away: How attempts are met while the database wakes.
        resume: Seconds that takes.
        seed: What each attempt draws from, where there are several ways.
        processes: How many processes wake it, each with a pool.
        callers: How many callers each has.
        connections: How many connections each may have.
        capacity: How many connections the database allows at first, or None.
        capacity_seconds: For how many seconds.
        seconds: How long the server works on each call.
    """

    contestant: str
    away: Sequence[Away]
    resume: float
    seed: int = 0
    processes: int = 1
    callers: int = 100
    connections: int = 10
    capacity: int | None = None
    capacity_seconds: float = 5.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waking:
    """What came of it.

    Attributes:
        failed: How many callers got an error.
        last: Seconds from the resume to the last caller's end.
        attempts: How often somebody tried to connect during the outage.
        bunched: The most of these within a tenth of a second, once the first second was over.
        later: How often after it.
        refused: How many of those were refused because too many were connected.
        at_once: The most attempts in flight after the resume.
        served: How many connections there were in the end.
    """

    failed: int
    last: float
    attempts: int
    bunched: int
    later: int
    refused: int
    at_once: int
    served: int


async def wake(postgres: EmbeddedPostgres, scene: Scene) -> Waking:
    """Play a scene."""
    with PausingServer(
        postgres.host,
        postgres.port,
        pause_after=None,
        resume_seconds=scene.resume,
        away=scene.away,
        seed=scene.seed,
        capacity=scene.capacity,
        capacity_seconds=scene.capacity_seconds,
    ) as server:
        server.pause()
        order = Order(
            contestant=scene.contestant,
            dsn=server.dsn(postgres.dsn()),
            callers=scene.callers,
            connections=scene.connections,
            seconds=scene.seconds,
        )
        async with contextlib.AsyncExitStack() as stack:
            crowds = [await stack.enter_async_context(process()) for _ in range(scene.processes)]
            await asyncio.gather(*(crowd.prepare(order) for crowd in crowds))
            reports = await asyncio.gather(*(crowd.ask() for crowd in crowds))
        return _seen(server, reports)


def _seen(server: PausingServer, reports: Sequence[dict[str, float]]) -> Waking:
    resumed = next(entry.at for entry in server.log if entry.event == "resumed")
    later = [attempt for attempt in server.attempts if attempt.phase == "awake"]
    return Waking(
        failed=sum(int(report["failed"]) for report in reports),
        last=max(report["last"] for report in reports) - resumed,
        attempts=len(server.outage_attempts),
        bunched=_bunched([attempt.at for attempt in server.outage_attempts]),
        later=len(later),
        refused=sum(attempt.outcome == "53300" for attempt in later),
        at_once=server.peak_in_flight,
        served=sum(attempt.outcome == "served" for attempt in server.attempts),
    )


def _bunched(instants: Sequence[float]) -> int:
    later = [instant for instant in instants if instant > instants[0] + 1.0]
    return max((bisect.bisect(later, instant + 0.1) - number for number, instant in enumerate(later)), default=0)


@contextlib.asynccontextmanager
async def process() -> AsyncIterator[Crowd]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, str(CROWD), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Crowd(started)
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


class Crowd:
    """A crowd in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def prepare(self, order: Order) -> None:
        self._say(json.dumps(dataclasses.asdict(order)))
        if await self._hear() != "ready":
            raise RuntimeError("a process of callers did not become ready; its error is above")

    async def ask(self) -> dict[str, float]:
        self._say("now")
        report: dict[str, float] = json.loads(await self._hear())
        return report

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def _hear(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()
