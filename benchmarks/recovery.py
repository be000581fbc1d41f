"""Recovery: a paused database is resumed, stays idle, does not come back, or fails while it is up.

    python benchmarks/recovery.py            # some minutes; writes results/recovery.md
    python benchmarks/recovery.py --quick    # half a minute; only prints

It starts a PostgreSQL of its own, and a `PausingServer` in front of it for each case.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import waiting
from caller_process import EXPO, FIXED, NEITHER, NO_ADMISSION, NO_JITTER, OURS, PLAIN
from report import Aim, table
from resumes import ResumeCase, ResumeResult, run_case
from waiting import Ending, Idleness, Load

from resilient_pool import RetryBudget
from resilient_pool.testing import EmbeddedPostgres
from resilient_pool.testing.pausing import Away

RESULTS = Path(__file__).parent / "results" / "recovery.md"
LIBRARIES = ("asyncpg", "backoff")
SETTINGS = {"max_connections": 250, "fsync": False}

WAYS: tuple[Away, ...] = ("hang", "refuse", "reset", "57P03", "28000")
CASES: Mapping[str, Sequence[Away]] = {**{way: (way,) for way in WAYS}, "a mix": WAYS}
CONTESTANTS = (OURS, PLAIN, FIXED, EXPO)
FLEETS = (OURS, NO_JITTER, NO_ADMISSION, NEITHER, FIXED, EXPO)
FLEET = ResumeCase(
    contestant=OURS,
    away=("57P03",),
    resume=5.0,
    processes=20,
    callers=10,
    connections=5,
    capacity=30,
    capacity_seconds=5.0,
    seconds=0.05,
)
DEADLINE = 2.0
RESUME = 5.0
NO_LIMIT = "a budget without end"
BUDGET = "the budget (a tenth, and 10)"

FAILED_AIM = Aim(what="100 callers wake it: failed", bound=0, at_most=True, digits=0)
LAST_AIM = Aim(what="the last answer after the resume, seconds", bound=1.2, at_most=True)
ATTEMPTS_AIM = Aim(what="attempts to connect during the outage", bound=9, at_most=True, digits=0)
ADMITTED_AIM = Aim(what="attempts in flight after it / connections", bound=2, at_most=True)
EMPTY_AIM = Aim(what="idle: the last connection's end - idle lifetime, seconds", bound=2, at_most=True)
SENT_AIM = Aim(what="idle: bytes sent from then on", bound=0, at_most=True, digits=0)
DEADLINE_AIM = Aim(what="deadline: error after it, seconds", bound=0.1, at_most=True, digits=3)
FAIL_FAST_AIM = Aim(what="fail_fast: error after, seconds", bound=0.1, at_most=True, digits=3)
LOAD_AIM = Aim(what="up and failing: retries / calls, beyond the first 10", bound=0.1, at_most=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of it is done: rounds of each case, seconds, calls."""

    rounds: int
    cases: Sequence[str]
    idle_lifetime: float
    watch: float
    calls: int


QUICK = Effort(rounds=1, cases=("a mix",), idle_lifetime=1.0, watch=2.0, calls=100)
FULL = Effort(rounds=3, cases=tuple(CASES), idle_lifetime=5.0, watch=10.0, calls=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All that was measured; the keys are the tables' first columns."""

    crowds: Mapping[tuple[str, str], Sequence[ResumeResult]]
    fleets: Mapping[str, Sequence[ResumeResult]]
    idle: Mapping[str, Idleness]
    deadlines: Mapping[str, Ending]
    at_once: Mapping[str, Ending]
    loads: Mapping[tuple[str, str], Load]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a rough idea; no file is written")
    effort = QUICK if parser.parse_args().quick else FULL
    text = "\n".join(page(asyncio.run(measure(effort)), effort))
    print(text)
    if effort is FULL:
        RESULTS.write_text(text + "\n")


# Measuring


async def measure(effort: Effort) -> Figures:
    async with EmbeddedPostgres(settings=SETTINGS) as postgres:
        async with postgres.admin() as administrator:
            for definition in (waiting.COUNTER, waiting.OVERLOADED):
                await administrator.execute(definition)
        return Figures(
            deadlines={
                way: await waiting.meet_deadline(postgres, way, deadline=DEADLINE, resume=RESUME) for way in WAYS
            },
            at_once={way: await waiting.fail_at_once(postgres, way, resume=RESUME) for way in WAYS if way != "hang"},
            idle=await idleness(postgres, effort),
            loads=await loads(postgres, effort),
            crowds=await crowds(postgres, effort),
            fleets=await fleets(postgres, effort),
        )


async def crowds(postgres: EmbeddedPostgres, effort: Effort) -> dict[tuple[str, str], list[ResumeResult]]:
    """Run the contestants at the same time; each has a process and a database of its own."""
    taken: dict[tuple[str, str], list[ResumeResult]] = {
        (name, contestant): [] for name in effort.cases for contestant in CONTESTANTS
    }
    for seed in range(effort.rounds):
        for name in effort.cases:
            cases = [
                ResumeCase(contestant=contestant, away=CASES[name], resume=RESUME, seed=seed)
                for contestant in CONTESTANTS
            ]
            for case, result in zip(
                cases, await asyncio.gather(*(run_case(postgres, each) for each in cases)), strict=True
            ):
                taken[name, case.contestant].append(result)
    return taken


async def fleets(postgres: EmbeddedPostgres, effort: Effort) -> dict[str, list[ResumeResult]]:
    taken: dict[str, list[ResumeResult]] = {name: [] for name in FLEETS}
    for seed in range(effort.rounds):
        for name in FLEETS:
            taken[name].append(await run_case(postgres, replace(FLEET, contestant=name, seed=seed)))
    return taken


async def idleness(postgres: EmbeddedPostgres, effort: Effort) -> dict[str, Idleness]:
    lifetime, watch = effort.idle_lifetime, effort.watch
    ours, awake, theirs = await asyncio.gather(
        waiting.idle_ours(postgres, lifetime=lifetime, watch=watch, pauses=True),
        waiting.idle_ours(postgres, lifetime=lifetime, watch=watch, pauses=False),
        waiting.idle_theirs(postgres, limit=lifetime + waiting.SPARE, watch=watch),
    )
    return {
        f"resilient_pool, idle lifetime {lifetime:g} s": ours,
        "the same, before a database that does not pause": awake,
        "asyncpg.Pool's defaults": theirs,
    }


async def loads(postgres: EmbeddedPostgres, effort: Effort) -> dict[tuple[str, str], Load]:
    failing = {"every call answered with 53400": waiting.overload, "every answer lost": waiting.lose_answers}
    return {
        (what, budget): await fail(postgres, RetryBudget() if budget == BUDGET else waiting.endless(), effort.calls)
        for what, fail in failing.items()
        for budget in (BUDGET, NO_LIMIT)
    }


# The page


def page(figures: Figures, effort: Effort) -> list[str]:
    parts = ["# What a recovery takes", "", conditions(effort), ""]
    parts += ["## Aims", "", table(["", "aim", "the worst there was"], aims(figures, effort)), ""]
    parts += [f"## 100 callers meet a database that sleeps, and wakes in {RESUME:g} s", "", crowd_notes(), ""]
    parts += [table(*crowd_rows(figures.crowds)), ""]
    parts += [
        "## A fleet of 20 processes wakes one database",
        "",
        fleet_notes(),
        "",
        table(*fleet_rows(figures.fleets)),
        "",
    ]
    parts += [
        "## An application that has nothing to do",
        "",
        idle_notes(effort),
        "",
        table(*idle_rows(figures.idle)),
        "",
    ]
    parts += [f"## A deadline of {DEADLINE:g} s, and a resume of {RESUME:g} s", "", deadline_notes(), ""]
    parts += [table(*deadline_rows(figures)), ""]
    parts += ["## A server that is up and failing", "", load_notes(), "", table(*load_rows(figures.loads))]
    return parts


def conditions(effort: Effort) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    rough = " A quick run, good for a rough idea only." if effort is QUICK else ""
    return (
        f"Python {platform.python_version()}, PostgreSQL over TCP on the same machine of {os.cpu_count()} processors; "
        f"{libraries}.\nBefore the server stands a `PausingServer`, which counts; every crowd of callers is a process of its own. "
        "Connections are made with `ssl=False`: with the driver's `sslmode=prefer` some refusals are met with a second attempt at "
        f"once, which would be counted. Where there are several runs the median is shown, with the extremes in parentheses.{rough}"
    )


def aims(figures: Figures, effort: Effort) -> list[list[str]]:
    ours = [result for (_, contestant), runs in figures.crowds.items() if contestant == OURS for result in runs]
    idle = [each for name, each in figures.idle.items() if "asyncpg" not in name]
    empty = [float("inf") if each.empty_after is None else each.empty_after for each in idle]
    limited = [load for (_, budget), load in figures.loads.items() if budget == BUDGET]
    worst = {
        FAILED_AIM: max(result.failed for result in ours),
        LAST_AIM: max(result.last for result in ours),
        ATTEMPTS_AIM: max(result.attempts for result in ours),
        ADMITTED_AIM: max(result.at_once / result.served for result in ours),
        EMPTY_AIM: max(empty) - effort.idle_lifetime,
        SENT_AIM: max(each.sent for each in idle),
        DEADLINE_AIM: max(abs(at - DEADLINE) for each in figures.deadlines.values() for at in (each.first, each.last)),
        FAIL_FAST_AIM: max(each.last for each in figures.at_once.values()),
        LOAD_AIM: max((load.executed - load.calls - 10) / load.calls for load in limited),
    }
    return [[aim.what, aim.promise(), f"{value:.{aim.digits}f}, {aim.verdict(value)}"] for aim, value in worst.items()]


def spread(values: Sequence[float], digits: int = 0) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low} to {high})"


def crowd_notes() -> str:
    return (
        f"100 callers at once meet a database that takes {RESUME:g} s to wake, through pools of at most 10 connections. Beside "
        "resilient_pool stands asyncpg.Pool, alone and with a retry loop around each call, as people write it: again after half a second, or "
        "`backoff.on_exception(backoff.expo, ...)` from 0.1 s to 2 s with full jitter."
    )


def crowd_rows(crowds: Mapping[tuple[str, str], Sequence[ResumeResult]]) -> tuple[list[str], list[list[str]]]:
    header = [
        "it meets them with",
        "",
        "failed",
        "last answer after the resume, s",
        "attempts in the outage",
        "most in flight after",
    ]
    rows = []
    for (name, contestant), runs in crowds.items():
        figures = [
            spread([run.failed for run in runs]),
            spread([run.last for run in runs], 2) if max(run.last for run in runs) > 0 else "before it",
            spread([run.attempts for run in runs]),
            spread([run.at_once for run in runs]),
        ]
        rows.append([name if contestant == CONTESTANTS[0] else "", contestant, *figures])
    return header, rows


def fleet_notes() -> str:
    return (
        f"{FLEET.processes} processes, each with {FLEET.callers} callers and at most {FLEET.connections} connections, begin at the same "
        f"moment. The database answers 57P03 for {FLEET.resume:g} s, then allows {FLEET.capacity} connections for "
        f"{FLEET.capacity_seconds:g} s; each call takes it {FLEET.seconds * 1000:g} ms. Without admission everybody may connect as soon as "
        "the prober got through (a subclass in the benchmark; the package has no switch for that). *: after the first second, "
        "in which everybody begins at the same moment."
    )


def fleet_rows(fleets: Mapping[str, Sequence[ResumeResult]]) -> tuple[list[str], list[list[str]]]:
    header = ["", "failed", "last answer after the resume, s", "attempts in the outage", "most within 0.1 s*"]
    header += ["attempts after it", "refused with 53300"]
    rows = [
        [
            name,
            spread([run.failed for run in runs]),
            spread([run.last for run in runs], 2),
            spread([run.attempts for run in runs]),
            spread([run.bunched for run in runs]),
            spread([run.later for run in runs]),
            spread([run.refused for run in runs]),
        ]
        for name, runs in fleets.items()
    ]
    return header, rows


def idle_notes(effort: Effort) -> str:
    return (
        f"After a burst of {waiting.BURST} calls. Bytes are counted from the last connection's end, or from the end of the time in "
        f"which it should have come, for {effort.watch:g} s. asyncpg.Pool keeps its 10 connections open, and so the database awake."
    )


def idle_rows(idle: Mapping[str, Idleness]) -> tuple[list[str], list[list[str]]]:
    header = ["", "no connection left after, s", "connections left", "bytes sent then", "the database is"]
    rows = [
        [
            name,
            f"not in {each.watched:.0f}" if each.empty_after is None else f"{each.empty_after:.2f}",
            str(each.left),
            str(each.sent),
            each.phase,
        ]
        for name, each in idle.items()
    ]
    return header, rows


def deadline_notes() -> str:
    return (
        f"{waiting.CALLERS} callers each. With `fail_fast=True` they call one after the other once an attempt has failed; an attempt "
        "that hangs has not failed, so there is nothing to fail fast with."
    )


def deadline_rows(figures: Figures) -> tuple[list[str], list[list[str]]]:
    header = ["it meets them with", "error after, s", "error", "with fail_fast after, ms", "error"]
    rows = []
    for way, each in figures.deadlines.items():
        fast = figures.at_once.get(way)
        cells = (
            ["", ""] if fast is None else [f"{fast.first * 1000:.2f} to {fast.last * 1000:.2f}", ", ".join(fast.errors)]
        )
        rows.append([way, f"{each.first:.3f} to {each.last:.3f}", ", ".join(each.errors), *cells])
    return header, rows


def load_notes() -> str:
    return (
        f"{waiting.WORKERS} workers call a statement that may be repeated and never succeeds; the server counts how often it is executed. "
        "Callers beyond the budget get the error of their first attempt, at once: what that takes is a call's usual time."
    )


def load_rows(loads: Mapping[tuple[str, str], Load]) -> tuple[list[str], list[list[str]]]:
    header = [
        "",
        "retries on",
        "calls",
        "executed",
        "executed / calls",
        "failed on the first attempt",
        "after, ms (median)",
    ]
    rows = []
    for (what, budget), load in loads.items():
        median = f"{load.median * 1000:.0f}" if load.at_once else ""
        ratio = f"{load.executed / load.calls:.2f}"
        rows.append(
            [
                what if budget == BUDGET else "",
                budget,
                str(load.calls),
                str(load.executed),
                ratio,
                str(load.at_once),
                median,
            ]
        )
    return header, rows


if __name__ == "__main__":
    main()
