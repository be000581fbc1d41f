"""One chaos run: workers, faults of server and network, and the report of the result."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial

from call_log import CallLog, Crash, Promise
from fault_injector import OTHERS, FaultInjector, Restart, schedule
from workers import LIMIT, CommitClock, Worker

from demo.ledger import Audit, Outcome, audit
from demo.workload import SCHEMA, count_rows
from resilient_pool import Event, ResilientPool
from resilient_pool.events import OutcomeResolved
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

WORKERS = 20
CONNECTIONS = 8
SESSIONS = f"SELECT count(*) {OTHERS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a run.

    Attributes:
        seed: What the schedule and the workers' choices were drawn from.
        restart: How the server was restarted.
        commit_log: Whether there was a commit log.
        seconds: How long it lasted.
        call_log: All calls of the workers.
        audit: Their writes compared with the rows.
        faults: How often each kind of fault was injected.
        crashes: When the server crashed.
        fired: How many armed faults met a request.
        retries: How many attempts the pool repeated.
        resolved: How many COMMITs without an answer were resolved, by the answer the server gave later.
        sessions_left: Sessions that the server still had after the pool was closed.
        sockets_left: Connections that clients still had after the pool was closed.
    """

    seed: int
    restart: Restart
    commit_log: bool
    seconds: float
    call_log: CallLog
    audit: Audit
    faults: Counter[str]
    crashes: list[Crash]
    fired: int
    retries: int
    resolved: Counter[str]
    sessions_left: int
    sockets_left: int

    def __str__(self) -> str:
        call_log, audit = self.call_log, self.audit
        times = Counter(write.outcome for write in call_log.writes.values())
        writes = (
            f"acknowledged {times[Outcome.DONE]}, unknown {times[Outcome.UNKNOWN]} (present {len(audit.unknown_present)}, "
            f"absent {len(audit.unknown_absent)}), failed {times[Outcome.FAILED]}, never answered {times[Outcome.UNANSWERED]}"
        )
        how = f"{'a crash' if self.restart == 'immediate' else 'a clean restart'}, {'a' if self.commit_log else 'no'} commit log"
        return "\n".join([
            "",
            f"chaos: seed {self.seed}, {how}, {self.seconds:.1f} s, {WORKERS} workers on {CONNECTIONS} connections",
            f"  faults                     {sum(self.faults.values())}: "
            + ", ".join(f"{name} {number}" for name, number in sorted(self.faults.items())),
            f"  requests met by a fault    {self.fired}, attempts repeated {self.retries}, COMMITs found "
            + (", ".join(f"{answer} {number}" for answer, number in sorted(self.resolved.items())) or "none"),
            f"  reads answered             {call_log.reads}, surfaced errors {len(call_log.read_errors)}, wrong {len(call_log.wrong)}",
            f"  writes                     {len(call_log.writes)}: {writes}",
            *(f"  {promise.value + ' writes':26} {self._summary(promise)}" for promise in Promise),
            f"  acknowledged but absent    {len(audit.lost)}",
            f"  present twice              {len(audit.duplicated)}",
            f"  present by half            {len(audit.torn)}",
            f"  failed but present         {len(audit.ghosts)}",
            f"  present but never written  {len(audit.unexpected)}",
            f"  connections left over      {self.sessions_left} sessions, {self.sockets_left} sockets",
            f"  callers hung               {len(call_log.hung)}, slowest call {call_log.slowest:.2f} s",
        ])  # fmt: skip

    def _summary(self, promise: Promise) -> str:
        unknown, failed = (
            len(self.call_log.ended_as(outcome, promise)) for outcome in (Outcome.UNKNOWN, Outcome.FAILED)
        )
        explained = ""
        if promise is Promise.RESOLVED and unknown:
            explained = f", {unknown - len(self.call_log.unexplained(self.crashes))} of them in flight during a crash"
        return f"{len(self.call_log.ended_as(Outcome.DONE, promise))} done, surfaced errors {failed}, unknown {unknown}{explained}"


async def run_chaos(
    seed: int, seconds: float, *, restart: Restart = "immediate", commit_log: str | None = None, **arguments: object
) -> Report:
    """Let workers use a pool under faults of its server and its network, and report.

    Args:
        seed: What happens, when, and which calls are made are drawn from it. How calls and faults interleave depends on the machine.
        seconds: How long, roughly.
        restart: How the server is restarted during the run.
        commit_log: The pool's argument of that name.
        **arguments: More arguments of the pool.
    """
    random.seed(seed)  # the pool's jitter
    async with EmbeddedPostgres(settings={"max_connections": 40}) as server:
        async with server.admin() as admin:
            await admin.execute(SCHEMA)
        async with FaultProxy(server.host, server.port) as proxy:
            fault_injector, call_log = FaultInjector(server, proxy, restart), CallLog()
            resolved: Counter[str] = Counter()
            pool = ResilientPool(
                proxy.dsn(server.dsn()),
                max_size=CONNECTIONS,
                commit_log=commit_log,
                connection_class=CommitClock,
                observers=[partial(_count_resolved, resolved)],
                **arguments,
            )
            await pool
            began = time.monotonic()
            try:
                await _work(pool, call_log, seed, fault_injector.run(schedule(seed, seconds)))
                taken = time.monotonic() - began
                await _close(pool, call_log)
            finally:
                pool.terminate()
            sessions = await _sessions_left(server)
            sockets = len(proxy.connections)
            fired = proxy.fired
        # After the sessions have ended: one without a client may still have been executing.
        async with server.admin() as admin:
            rows = await count_rows(admin)
    return Report(
        seed=seed, restart=restart, commit_log=commit_log is not None, seconds=taken, call_log=call_log,
        audit=audit(call_log.writes, rows), faults=fault_injector.faults, crashes=fault_injector.crashes, fired=fired,
        retries=pool.stats().retries_total, resolved=resolved, sessions_left=sessions, sockets_left=sockets,
    )  # fmt: skip


def _count_resolved(resolved: Counter[str], event: Event) -> None:
    if isinstance(event, OutcomeResolved):
        resolved[event.answer] += 1


async def _work(pool: ResilientPool, call_log: CallLog, seed: int, faults: Awaitable[None]) -> None:
    over = asyncio.Event()
    workers = [Worker(pool, call_log, number, seed) for number in range(WORKERS)]
    tasks = {asyncio.create_task(worker.run(over)): worker for worker in workers}
    try:
        await faults
    finally:
        over.set()
        done, late = await asyncio.wait(tasks, timeout=LIMIT)
        call_log.hung += [tasks[task].describe() for task in late]
        for task in late:
            task.cancel()
        await asyncio.wait(tasks, timeout=LIMIT)
    for task in done:
        task.result()


async def _close(pool: ResilientPool, call_log: CallLog) -> None:
    try:
        async with asyncio.timeout(LIMIT):
            await pool.close()
    except TimeoutError:
        call_log.hung.append(f"close: {pool!r}")


async def _sessions_left(server: EmbeddedPostgres) -> int:
    # A session ends a moment after its client has disconnected.
    async with server.admin() as admin:
        for _ in range(250):
            if not (left := await admin.fetchval(SESSIONS)):
                return 0
            await asyncio.sleep(0.02)
    return left
