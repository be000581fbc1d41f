"""What the pool costs when nothing is wrong, measured against a bare connection and against other pools, in one run.

    python benchmarks/overhead.py            # some minutes; writes results/overhead.md
    python benchmarks/overhead.py --quick    # some seconds; only prints

It starts a PostgreSQL of its own. Each event loop is measured in a process of its own; server and client run on
different processors where there are two and the system lets them be chosen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from report import Aim, Spread, table

from resilient_pool.testing import EmbeddedPostgres

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results" / "overhead.md"
LOOPS = ("asyncio", "uvloop")
LIBRARIES = ("asyncpg", "uvloop", "psycopg", "psycopg-pool", "SQLAlchemy")
SETTINGS = {
    "synchronous_commit": False,
    "autovacuum": False,
    "max_connections": 100,
    "max_wal_size": "4GB",
    "jit": False,
}
KINDS = ("reads", "writes", "leases", "transactions")
KINDS_OF_TASKS = ("read", "write", "lease", "transact")
CREWS = (10, 100)
OURS, BARE, ASYNCPG = "resilient_pool", "bare connection", "asyncpg.Pool"
# What an application imports: the package alone loads next to nothing.
IMPORTS = {"asyncpg": "import asyncpg", "resilient_pool": "from resilient_pool import ResilientPool"}
IMPORT_TIMER = "import time; began = time.perf_counter(); {}; print(time.perf_counter() - began)"

LATENCIES = {"busy": "back to back", "paused": "a millisecond apart", "busy writes": "writes, back to back"}
LATENCY_AIM = Aim(what="latency / bare connection's", bound=1.05, at_most=True)
BARE_AIMS = {"reads": (0.95, 0.90), "writes": (0.90, 0.85)}
"""What of the calls per second of ten bare connections is promised, with ten and with a hundred workers."""
POOL_AIMS = {"reads": (3.0, 2.9), "writes": (2.4, 2.2), "leases": (2.2, 2.0)}
"""The same beside asyncpg.Pool with as many workers."""
FAIR_AIM = Aim(what="least-served of 100 workers / fair share", bound=0.9, at_most=False)
PYTHON_AIM = Aim(
    what="Python added to a call of an application's own class, microseconds", bound=8, at_most=True, digits=1
)
TASK_AIM = Aim(what="tasks created by a read, a write, a lease", bound=0, at_most=True, digits=0)
IMPORT_AIM = Aim(what="import time / asyncpg's", bound=1.6, at_most=True)

Figures = Mapping[str, Any]


def main() -> None:
    options = arguments()
    text = asyncio.run(compare(options.loop, quick=options.quick))
    print(text)
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a rough idea in under 20 s; no file is written")
    parser.add_argument("--loop", action="append", choices=LOOPS, help="measure only in this event loop")
    return parser.parse_args()


async def compare(loops: Sequence[str] | None, *, quick: bool) -> str:
    importing = import_times(3 if quick else 25)
    server_cpus, client_cpus = share_processors()
    async with EmbeddedPostgres(settings=SETTINGS) as server:
        async with server.admin() as connection:
            await connection.execute(
                "CREATE TABLE overhead (id int PRIMARY KEY, value int NOT NULL) WITH (fillfactor = 50)"
            )
            await connection.execute("INSERT INTO overhead SELECT id, 0 FROM generate_series(0, 9999) AS id")
            await connection.execute("VACUUM ANALYZE overhead")
        pin(server.pid, server_cpus)
        figures = {loop: measure(loop, server.dsn(), client_cpus, quick=quick) for loop in loops or LOOPS}
        return "\n".join(page(figures, importing, server.version, pinned=bool(client_cpus), quick=quick))


# Processes and processors


def share_processors() -> tuple[set[int], set[int]]:
    """Return the processors of the server and of the client; both sets are empty where they cannot be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        return set(), set()
    *server, client = sorted(os.sched_getaffinity(0))
    return (set(server), {client}) if server else (set(), set())


def pin(postmaster: int | None, processors: set[int]) -> None:
    """Keep the server's processes on `processors`; sessions opened later inherit that from the postmaster."""
    if postmaster is None or not processors:
        return
    os.sched_setaffinity(postmaster, processors)
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rpartition(")")[2].split()[1]) == postmaster:
                os.sched_setaffinity(int(entry.parent.name), processors)
        except OSError:  # it ended meanwhile
            continue


def measure(loop: str, dsn: str, processors: set[int], *, quick: bool) -> Figures:
    order = {"loop": loop, "dsn": dsn, "processors": sorted(processors), "quick": quick}
    command = [sys.executable, str(BENCHMARKS / "measures.py")]
    done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def import_times(rounds: int) -> dict[str, list[float]]:
    """Take the milliseconds that each import needs in a fresh interpreter, turn about, with bytecode as once installed."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(rounds + 1):
            for name, statement in IMPORTS.items():
                command = [sys.executable, "-c", IMPORT_TIMER.format(statement)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                if number:  # the first one compiles
                    taken[name].append(float(done.stdout) * 1000)
    return taken


# The page


def page(
    figures: Mapping[str, Figures], importing: Mapping[str, list[float]], postgres: int, *, pinned: bool, quick: bool
) -> list[str]:
    loops = list(figures)
    parts = ["# What the pool costs when nothing is wrong", "", conditions(postgres, pinned=pinned, quick=quick), ""]
    parts += ["## Aims", "", table(["", "aim", *loops], aims(figures, importing)), ""]
    for loop, taken in figures.items():
        parts += [f"## {loop}: one call at a time, microseconds", "", table(*latencies(taken)), ""]
        parts += [f"## {loop}: calls per second on ten connections", "", table(*rates(taken)), ""]
    parts += ["## Besides", "", *remarks(figures, importing)]
    return parts


def conditions(postgres: int, *, pinned: bool, quick: bool) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    where = "pinned to different processors" if pinned else "NOT pinned: they share processors as the system likes"
    rough = " A quick run, good for a rough idea only." if quick else ""
    return (
        f"Python {platform.python_version()}, PostgreSQL {postgres} over TCP on the same machine of {os.cpu_count()} processors, "
        f"server and client {where}; {libraries}.\nContestants take turns in small batches, in an order drawn anew for every round; "
        "a ratio is formed within a round, and what is shown is the median over the rounds with the quartiles in parentheses. "
        f"Every contestant commits each statement by itself, but for the transactions; a lease is one read on a connection that is taken and given back, on a bare connection one read; synchronous_commit is off, which takes the disk out.{rough}"
    )


def aims(figures: Mapping[str, Figures], importing: Mapping[str, list[float]]) -> list[list[str]]:
    each = list(figures.values())
    rows = []
    for kind in ("busy", "paused"):
        aim = Aim(what=f"{LATENCY_AIM.what}, {LATENCIES[kind]}", bound=LATENCY_AIM.bound, at_most=True)
        rows.append(aim.row([Spread.of_ratios(f[kind][OURS], f[kind][BARE]) for f in each]))
    for bounds, base, title in ((BARE_AIMS, BARE, "ten bare connections'"), (POOL_AIMS, ASYNCPG, "asyncpg.Pool's")):
        for kind, at_least in bounds.items():
            for workers, bound in zip(CREWS, at_least, strict=True):
                ours, theirs = f"{OURS}/{workers}", base if base == BARE else f"{base}/{workers}"
                aim = Aim(what=f"{kind} per second / {title}, {workers} workers", bound=bound, at_most=False)
                rows.append(aim.row([Spread.of_ratios(f[kind][ours], f[kind][theirs]) for f in each]))
    rows.append(FAIR_AIM.row([Spread.of(f["fairness"][f"{OURS}/100"]) for f in each]))
    rows.append(PYTHON_AIM.row([Spread.of(f["python"][OURS]) for f in each]))
    rows.append(
        TASK_AIM.row([Spread.of([max(f["tasks"][kind] for kind in ("read", "write", "lease"))] * 2) for f in each])
    )
    rows.append(IMPORT_AIM.row([Spread.of_ratios(importing[OURS], importing["asyncpg"])] * len(each)))
    return rows


def latencies(taken: Figures) -> tuple[list[str], list[list[str]]]:
    header = [""]
    rows = [[name] for name in taken["busy"]]
    for kind, title in LATENCIES.items():
        header += [title, "/ bare"]
        for row in rows:
            samples = taken[kind][row[0]]
            row += [f"{statistics.median(samples):.0f}", Spread.of_ratios(samples, taken[kind][BARE]).text(2)]
    return header, rows


def rates(taken: Figures) -> tuple[list[str], list[list[str]]]:
    header = [""]
    rows = [[name] for name in taken["writes"]]
    for kind in KINDS:
        header += [kind, "/ ten bare"]
        for row in rows:
            samples = taken[kind][row[0]]
            row.extend(rate(samples, taken[kind][BARE]))
    for row in rows:
        name, _, workers = row[0].partition("/")
        row[0] = f"{name}, {workers} workers" if workers else "ten bare connections, 10 workers"
    return header, rows


def rate(samples: Sequence[float], base: Sequence[float]) -> list[str]:
    return [f"{statistics.median(samples):,.0f}", Spread.of_ratios(samples, base).text(2)]


def remarks(figures: Mapping[str, Figures], importing: Mapping[str, list[float]]) -> list[str]:
    medians = {name: statistics.median(taken) for name, taken in importing.items()}
    lines = [
        f"- Import: asyncpg {medians['asyncpg']:.0f} ms, resilient_pool (asyncpg included) {medians[OURS]:.0f} ms."
    ]
    for loop, taken in figures.items():
        shares = Spread.of(taken["fairness"][f"{ASYNCPG}/100"]).text(2)
        python, whole = (Spread.of(taken[kind][ASYNCPG]).text(1) for kind in ("python", "whole"))
        ours = Spread.of(taken["whole"][OURS]).text(1)
        tasks = taken["tasks"]
        cost = f"asyncpg.Pool {python} on a connection that answers at once, {whole} on a real one with event loop and kernel"
        lines += [
            f"- {loop}: asyncpg.Pool serves its unluckiest of 100 workers {shares} of a fair share.",
            f"- {loop}: processor time added to a call, microseconds: {cost}; resilient_pool {ours} on a real one.",
            f"- {loop}: of each kind {tasks['calls']} created tasks: {', '.join(f'{name} {tasks[name]}' for name in KINDS_OF_TASKS)}.",
        ]
    return lines


if __name__ == "__main__":
    main()
