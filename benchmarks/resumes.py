"""Resumes a paused database with processes of callers, and returns what the server counted."""

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

from caller_process import Order

from resilient_pool.testing import EmbeddedPostgres, PausingServer
from resilient_pool.testing.pausing import Away

CALLER_PROCESS = Path(__file__).with_name("caller_process.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCase:
    """The callers, and the server that they resume.

    Attributes:
        contestant: Which pool, or loop around it.
        away: How attempts are answered while the database resumes.
        resume: Seconds that takes.
        seed: What each attempt draws from, where there are several ways.
        processes: How many processes, each with a pool.
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
class ResumeResult:
    """What the server counted.

    Attributes:
        failed: How many callers got an error.
        last: Seconds from the resume to the last caller's end; 0 if all had ended before.
        attempts: How many connections were attempted during the outage.
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


async def run_case(postgres: EmbeddedPostgres, case: ResumeCase) -> ResumeResult:
    """Run a case."""
    with PausingServer(
        postgres.host,
        postgres.port,
        pause_after=None,
        resume_seconds=case.resume,
        away=case.away,
        seed=case.seed,
        capacity=case.capacity,
        capacity_seconds=case.capacity_seconds,
    ) as server:
        server.pause()
        order = Order(
            contestant=case.contestant,
            dsn=server.dsn(postgres.dsn()),
            callers=case.callers,
            connections=case.connections,
            seconds=case.seconds,
        )
        async with contextlib.AsyncExitStack() as stack:
            crowds = [await stack.enter_async_context(process()) for _ in range(case.processes)]
            await asyncio.gather(*(crowd.prepare(order) for crowd in crowds))
            reports = await asyncio.gather(*(crowd.ask() for crowd in crowds))
        async with asyncio.timeout(case.resume + 5.0):  # all callers may have failed before it
            while all(entry.event != "resumed" for entry in server.log):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        return _result(server, reports)


def _result(server: PausingServer, reports: Sequence[dict[str, float]]) -> ResumeResult:
    resumed = next(entry.at for entry in server.log if entry.event == "resumed")
    later = [attempt for attempt in server.attempts if attempt.phase == "awake"]
    return ResumeResult(
        failed=sum(int(report["failed"]) for report in reports),
        last=max(0.0, *(report["last"] - resumed for report in reports)),
        attempts=len(server.outage_attempts),
        bunched=_max_within_100_ms([attempt.at for attempt in server.outage_attempts]),
        later=len(later),
        refused=sum(attempt.outcome == "53300" for attempt in later),
        at_once=server.peak_in_flight,
        served=sum(attempt.outcome == "served" for attempt in server.attempts),
    )


def _max_within_100_ms(instants: Sequence[float]) -> int:
    later = [instant for instant in instants if instant > instants[0] + 1.0]
    return max((bisect.bisect(later, instant + 0.1) - number for number, instant in enumerate(later)), default=0)


@contextlib.asynccontextmanager
async def process() -> AsyncIterator[CallerProcess]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, str(CALLER_PROCESS), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield CallerProcess(started)
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


class CallerProcess:
    """A process of callers."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def prepare(self, order: Order) -> None:
        self._write_line(json.dumps(dataclasses.asdict(order)))
        if await self._read_line() != "ready":
            raise RuntimeError("a process of callers did not become ready; its error is above")

    async def ask(self) -> dict[str, float]:
        self._write_line("now")
        report: dict[str, float] = json.loads(await self._read_line())
        return report

    def _write_line(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def _read_line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()
