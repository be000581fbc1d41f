"""One run of the ledger: workers, a mistreated server and a mistreated network, and the report of what came of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial

from book import Audit, Book, Crash, Promise, Told, audit
from saboteur import OTHERS, Restart, Saboteur, schedule
from workers import LIMIT, SCHEMA, CommitClock, Worker

from resilient_pool import Event, ResilientPool
from resilient_pool.events import OutcomeResolved
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

WORKERS = 20
CONNECTIONS = 8
SESSIONS = f"SELECT count(*) {OTHERS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run that is over.

    Attributes:
        seed: What the schedule and the workers' choices were drawn from.
        restart: How the server was restarted.
        commit_log: Whether there was a commit log.
        seconds: How long it lasted.
        book: What callers were told.
        audit: What became of their writes.
        blows: How often each kind of blow fell.
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
    book: Book
    audit: Audit
    blows: Counter[str]
    crashes: list[Crash]
    fired: int
    retries: int
    resolved: Counter[str]
    sessions_left: int
    sockets_left: int

    def __str__(self) -> str:
        book, audit = self.book, self.audit
        told = Counter(entry.told for entry in book.entries.values())
        writes = (
            f"acknowledged {told[Told.DONE]}, unknown {told[Told.UNKNOWN]} (present {audit.unknown_present}, "
            f"absent {audit.unknown_absent}), failed {told[Told.FAILED]}, never answered {told[Told.NOTHING]}"
        )
        how = f"{'a crash' if self.restart == 'immediate' else 'a clean restart'}, {'a' if self.commit_log else 'no'} commit log"
        return "\n".join([
            "",
            f"ledger: seed {self.seed}, {how}, {self.seconds:.1f} s, {WORKERS} workers on {CONNECTIONS} connections",
            f"  blows                      {sum(self.blows.values())}: "
            + ", ".join(f"{name} {times}" for name, times in sorted(self.blows.items())),
            f"  requests met by a fault    {self.fired}, attempts repeated {self.retries}, COMMITs found "
            + (", ".join(f"{answer} {times}" for answer, times in sorted(self.resolved.items())) or "none"),
            f"  reads answered             {book.reads}, surfaced errors {len(book.read_errors)}, wrong {len(book.wrong)}",
            f"  writes                     {len(book.entries)}: {writes}",
            *(f"  {promise.value + ' writes':26} {self._summary(promise)}" for promise in Promise),
            f"  acknowledged but absent    {len(audit.lost)}",
            f"  present twice              {len(audit.doubled)}",
            f"  present by half            {len(audit.torn)}",
            f"  failed but present         {len(audit.ghosts)}",
            f"  present but never written  {len(audit.strangers)}",
            f"  connections left over      {self.sessions_left} sessions, {self.sockets_left} sockets",
            f"  callers hung               {len(book.hung)}, slowest call {book.slowest:.2f} s",
        ])  # fmt: skip

    def _summary(self, promise: Promise) -> str:
        unknown, failed = (len(self.book.told(told, promise)) for told in (Told.UNKNOWN, Told.FAILED))
        explained = ""
        if promise is Promise.RESOLVED and unknown:
            explained = f", {unknown - len(self.book.unexplained(self.crashes))} of them in flight during a crash"
        return f"{len(self.book.told(Told.DONE, promise))} done, surfaced errors {failed}, unknown {unknown}{explained}"


# The whole


async def keep(
    seed: int, seconds: float, *, restart: Restart = "immediate", commit_log: str | None = None, **arguments: object
) -> Report:
    """Let workers use a pool while its server and its network are mistreated, and report.

    Args:
        seed: What happens, when, and which calls are made are drawn from it. How they meet is for the machine to decide.
        seconds: How long, roughly.
        restart: How the server is restarted on the way.
        commit_log: The pool's argument of that name.
        **arguments: More arguments of the pool.
    """
    random.seed(seed)  # the pool's jitter
    async with EmbeddedPostgres(settings={"max_connections": 40}) as server:
        async with server.admin() as admin:
            await admin.execute(SCHEMA)
        async with FaultProxy(server.host, server.port) as proxy:
            saboteur, book = Saboteur(server, proxy, restart), Book()
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
                await _work(pool, book, seed, saboteur.play(schedule(seed, seconds)))
                taken = time.monotonic() - began
                await _close(pool, book)
            finally:
                pool.terminate()
            sessions = await _sessions_left(server)
            sockets = len(proxy.connections)
            fired = proxy.fired
        # Only now: a session that nobody listens to any more may have been at work until it ended.
        rows = await _rows(server)
    return Report(
        seed=seed, restart=restart, commit_log=commit_log is not None, seconds=taken, book=book,
        audit=audit(book.entries, rows), blows=saboteur.blows, crashes=saboteur.crashes, fired=fired,
        retries=pool.stats().retries_total, resolved=resolved, sessions_left=sessions, sockets_left=sockets,
    )  # fmt: skip


def _count_resolved(resolved: Counter[str], event: Event) -> None:
    if isinstance(event, OutcomeResolved):
        resolved[event.answer] += 1


async def _work(pool: ResilientPool, book: Book, seed: int, mistreatment: Awaitable[None]) -> None:
    over = asyncio.Event()
    workers = [Worker(pool, book, number, seed) for number in range(WORKERS)]
    tasks = {asyncio.create_task(worker.run(over)): worker for worker in workers}
    try:
        await mistreatment
    finally:
        over.set()
        done, late = await asyncio.wait(tasks, timeout=LIMIT)
        book.hung += [tasks[task].describe() for task in late]
        for task in late:
            task.cancel()
        await asyncio.wait(tasks, timeout=LIMIT)
    for task in done:
        task.result()


async def _close(pool: ResilientPool, book: Book) -> None:
    try:
        async with asyncio.timeout(LIMIT):
            await pool.close()
    except TimeoutError:
        book.hung.append(f"close: {pool!r}")


async def _sessions_left(server: EmbeddedPostgres) -> int:
    # A session ends a moment after its client said goodbye.
    async with server.admin() as admin:
        for _ in range(250):
            if not (left := await admin.fetchval(SESSIONS)):
                return 0
            await asyncio.sleep(0.02)
    return left


async def _rows(server: EmbeddedPostgres) -> dict[int, int]:
    async with server.admin() as admin:
        return {
            row["id"]: row["times"] for row in await admin.fetch("SELECT id, count(*) AS times FROM ledger GROUP BY id")
        }
