"""A book of everything that callers were told, kept under mistreatment, to be held against what the database holds."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import cycle

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

WORKERS = 20
CONNECTIONS = 8
LIMIT = 20.0
"""Seconds that any one call, or closing the pool, may take before it counts as hung."""
PAUSE = 0.12
"""Seconds between two blows, on average."""
RESTART_EVERY = 20.0
"""Seconds between two restarts in a long run; a short one has one all the same."""
RESTART = 1.5
"""Seconds that one restart takes, roughly."""
OUTAGE = 0.3
"""Seconds between the server's end and its new start."""
THINK = 0.008
"""Seconds a worker waits between two calls, at most."""
PAGE = 200

SCHEMA = """
    CREATE TABLE ledger (id bigint NOT NULL, note text NOT NULL);  -- no constraint: a row written twice must be there twice
    CREATE INDEX ON ledger (id);
    CREATE FUNCTION enter_once(entry bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_advisory_xact_lock(entry);
        INSERT INTO ledger SELECT entry, 'function' WHERE NOT EXISTS (SELECT FROM ledger WHERE id = entry);
    END $$;
"""
INSERT = "INSERT INTO ledger VALUES ($1, 'plain')"
# While a repetition runs, the server may still be at work on the first run, whose client is gone: NOT EXISTS would see
# nothing and both would insert. So each waits for the other. The lock must be taken by a statement of its own: one that
# waited for it in a CTE would go on with a snapshot from before. In one text without arguments both statements are one
# transaction; so they are inside a volatile function.
ENTER_ONCE = """
    SELECT pg_advisory_xact_lock({id});
    INSERT INTO ledger SELECT {id}, 'text' WHERE NOT EXISTS (SELECT FROM ledger WHERE id = {id})
"""
FUNCTION = "SELECT enter_once($1)"
COUNT = "SELECT count(*) FROM ledger WHERE id = $1"
NEWEST = f"SELECT id, note FROM ledger ORDER BY id DESC LIMIT {PAGE}"
OTHERS = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
SESSIONS = f"SELECT count(*) {OTHERS}"
TERMINATE = f"SELECT pg_terminate_backend(pid) {OTHERS} AND "


class Told(Enum):
    """What the caller of a write was told."""

    NOTHING = "nothing"
    DONE = "done"
    UNKNOWN = "unknown"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Entry:
    """One write.

    Attributes:
        repeatable: Whether the caller declared it idempotent.
        told: What the caller was told.
    """

    repeatable: bool
    told: Told = Told.NOTHING


@dataclass(slots=True, kw_only=True)
class Book:
    """What the workers write down.

    Attributes:
        entries: Every write, by its id.
        reads: How many reads were answered.
        wrong_reads: Answers that contradict what was acknowledged before the question, in words.
        read_errors: Errors that reads ended in.
        repeatable_errors: Errors that idempotent writes ended in.
        plain_errors: Errors other than `OutcomeUnknownError` that plain writes ended in.
        hung: Calls that took longer than `LIMIT`, or were never answered, in words.
        slowest: Seconds the slowest call took.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    reads: int = 0
    wrong_reads: list[str] = field(default_factory=list)
    read_errors: list[str] = field(default_factory=list)
    repeatable_errors: list[str] = field(default_factory=list)
    plain_errors: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    slowest: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The book held against the database; all but the last two should be empty.

    Attributes:
        lost: Ids acknowledged but absent.
        doubled: Ids present more than once.
        ghosts: Ids reported failed, yet present.
        strangers: Ids present that nobody wrote.
        unknown_present: How many writes of unknown outcome are present.
        unknown_absent: How many are not.
    """

    lost: list[int]
    doubled: list[int]
    ghosts: list[int]
    strangers: list[int]
    unknown_present: int
    unknown_absent: int


def audit(entries: Mapping[int, Entry], rows: Mapping[int, int]) -> Audit:
    """Compare what was told with how often each id is present."""
    unknown = [number for number, entry in entries.items() if entry.told is Told.UNKNOWN]
    return Audit(
        lost=[number for number, entry in entries.items() if entry.told is Told.DONE and number not in rows],
        doubled=[number for number, times in rows.items() if times > 1],
        ghosts=[number for number, entry in entries.items() if entry.told is Told.FAILED and number in rows],
        strangers=[number for number in rows if number not in entries],
        unknown_present=sum(number in rows for number in unknown),
        unknown_absent=sum(number not in rows for number in unknown),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run that is over.

    Attributes:
        seed: What the schedule and the workers' choices were drawn from.
        seconds: How long it lasted.
        book: What callers were told.
        audit: What became of their writes.
        blows: How often each kind of blow fell.
        fired: How many armed faults met a request.
        retries: How many attempts the pool repeated.
        sessions_left: Sessions that the server still had after the pool was closed.
        sockets_left: Connections that clients still had after the pool was closed.
    """

    seed: int
    seconds: float
    book: Book
    audit: Audit
    blows: Counter[str]
    fired: int
    retries: int
    sessions_left: int
    sockets_left: int

    def __str__(self) -> str:
        book, audit = self.book, self.audit
        told = Counter(entry.told for entry in book.entries.values())
        writes = (
            f"acknowledged {told[Told.DONE]}, unknown {told[Told.UNKNOWN]} (present {audit.unknown_present}, "
            f"absent {audit.unknown_absent}), failed {told[Told.FAILED]}, never answered {told[Told.NOTHING]}"
        )
        return "\n".join([
            "",
            f"ledger: seed {self.seed}, {self.seconds:.1f} s, {WORKERS} workers on {CONNECTIONS} connections",
            f"  blows                      {sum(self.blows.values())}: "
            + ", ".join(f"{name} {times}" for name, times in sorted(self.blows.items())),
            f"  requests met by a fault    {self.fired}, attempts repeated {self.retries}",
            f"  reads answered             {book.reads}, surfaced errors {len(book.read_errors)}, wrong {len(book.wrong_reads)}",
            f"  writes                     {len(book.entries)}: {writes}",
            f"  idempotent writes          surfaced errors {len(book.repeatable_errors)}",
            f"  acknowledged but absent    {len(audit.lost)}",
            f"  present twice              {len(audit.doubled)}",
            f"  failed but present         {len(audit.ghosts)}",
            f"  present but never written  {len(audit.strangers)}",
            f"  connections left over      {self.sessions_left} sessions, {self.sockets_left} sockets",
            f"  callers hung               {len(book.hung)}, slowest call {book.slowest:.2f} s",
        ])  # fmt: skip


# The mistreatment


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One act of mistreatment, drawn in advance.

    Attributes:
        pause: Seconds since the blow before began, if that is over by then.
        name: A key of `BLOWS`, or "restart".
        chance: Between 0 and 1, for whatever the blow has to choose.
        ending: How a connection ends, where the blow ends one.
    """

    pause: float
    name: str
    chance: float
    ending: str


# The first three, since these are the calls that must not be repeated.
_REQUESTS = (INSERT, INSERT, INSERT, FUNCTION, "NOT EXISTS", "SELECT", None)


def _arm(arm: Callable[..., None], blow: Blow) -> None:
    arm(blow.ending, matching=_REQUESTS[int(blow.chance * len(_REQUESTS))], times=1 + int(blow.chance * 100) % 4)


def _cut(proxy: FaultProxy, blow: Blow) -> None:
    _arm(partial(proxy.cut_next_answer, (1, 7, 40, 1500)[int(blow.chance * 40) % 4]), blow)


def _one_connection(proxy: FaultProxy, blow: Blow) -> None:
    present = proxy.connections
    if present:
        chosen = present[int(blow.chance * len(present))]
        chosen.rst() if blow.ending == "rst" else chosen.fin()


BLOWS: Mapping[str, Callable[[FaultProxy, Blow], None]] = {
    "reset": lambda proxy, _: proxy.rst(),
    "close": lambda proxy, _: proxy.fin(),
    "one": _one_connection,
    "swallow": lambda proxy, blow: _arm(proxy.swallow_next_answer, blow),
    "cut": _cut,
    "lose": lambda proxy, blow: _arm(proxy.lose_next_request, blow),
    "delay": lambda proxy, blow: proxy.delay(blow.chance * 0.02),
    "hurry": lambda proxy, _: proxy.delay(0),
    "refuse": lambda proxy, _: proxy.refuse(),
    "reject": lambda proxy, blow: proxy.reject("rst" if blow.ending == "rst" else "fin"),
    "starting": lambda proxy, _: proxy.answer_with_error(),
    "restore": lambda proxy, _: proxy.restore(),
}
# These last until the next blow, before which new connections are served again.
_CLOSED_DOORS = frozenset({"refuse", "reject", "starting"})


def schedule(seed: int, seconds: float) -> list[Blow]:
    """Draw what is to happen; every kind of blow comes before any kind comes twice more than another."""
    chance = random.Random(seed)
    restarts = max(1, int(seconds / RESTART_EVERY))
    number = int((seconds - restarts * RESTART) / PAUSE)
    names = _shuffled_rounds(chance, [*BLOWS, "swallow", "cut", "terminate", "terminate some"])
    chosen = [next(names) for _ in range(number)]
    for part in range(restarts):
        begin, end = part * number // restarts, (part + 1) * number // restarts
        chosen.insert(chance.randint(begin + (end - begin) // 3, end - (end - begin) // 3) + part, "restart")
    return [
        Blow(
            pause=PAUSE * (0.2 + 1.6 * chance.random()),
            name=name,
            chance=chance.random(),
            ending=chance.choice(["fin", "rst"]),
        )
        for name in chosen
    ]


def _shuffled_rounds(chance: random.Random, names: list[str]) -> Iterator[str]:
    while True:
        yield from chance.sample(names, len(names))


class Saboteur:
    """Deals the blows, one after the other."""

    def __init__(self, server: EmbeddedPostgres, proxy: FaultProxy) -> None:
        self._server = server
        self._proxy = proxy
        self.blows: Counter[str] = Counter()

    async def play(self, blows: list[Blow]) -> None:
        """Deal them all, and leave everything in order."""
        taken = 0.0
        for blow in blows:
            await asyncio.sleep(max(blow.pause - taken, PAUSE / 10))
            began = time.monotonic()
            await self._deal(blow)
            taken = time.monotonic() - began
            self.blows[blow.name] += 1
        await asyncio.to_thread(self._proxy.restore)

    async def _deal(self, blow: Blow) -> None:
        if blow.name == "restart":
            await self._restart("immediate" if blow.chance < 0.5 else "fast")
        elif blow.name == "terminate":
            await self._terminate("true")
        elif blow.name == "terminate some":
            await self._terminate("pid % 2 = 0")
        else:
            # In a thread, so that the pool's own loop turns while it happens.
            await asyncio.to_thread(BLOWS[blow.name], self._proxy, blow)
            if blow.name in _CLOSED_DOORS:
                await asyncio.to_thread(self._proxy.rst)
                await asyncio.sleep(PAUSE)
                await asyncio.to_thread(self._proxy.restore)

    async def _terminate(self, condition: str) -> None:
        # All at the same moment; waiting for each to be gone would make it a slow procession.
        async with self._server.admin() as admin:
            await admin.execute(TERMINATE + condition)

    async def _restart(self, mode) -> None:
        await self._server.stop(mode)
        await asyncio.sleep(OUTAGE)
        await self._server.start()


# The workers


class Worker:
    """Reads and writes, and writes down what it was told."""

    def __init__(self, pool: ResilientPool, book: Book, number: int, seed: int) -> None:
        self._pool = pool
        self._book = book
        self._chance = random.Random(f"{seed}/{number}")
        self._ids = iter(range(number * 1_000_000_000 + 1, (number + 1) * 1_000_000_000))
        self._acknowledged: list[int] = []
        self._asked: tuple[str, float] | None = None

    async def run(self, over: asyncio.Event) -> None:
        """Call the pool until it is over."""
        calls = [self._insert, self._enter, self._enter_by_function, self._count, self._count_by_row, self._newest]
        start = self._chance.randrange(len(calls))
        for call in cycle(calls[start:] + calls[:start]):
            if over.is_set():
                return
            await asyncio.sleep(self._chance.random() * THINK)
            await self._timed(call)

    def describe(self) -> str:
        """Tell what it is waiting for."""
        name, began = self._asked or ("nothing", time.monotonic())
        return f"{name} for {time.monotonic() - began:.1f} s"

    async def _timed(self, call: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        self._asked = call.__name__, began
        await call()
        self._asked = None
        taken = time.monotonic() - began
        self._book.slowest = max(self._book.slowest, taken)
        if taken > LIMIT:
            self._book.hung.append(f"{call.__name__} took {taken:.1f} s")

    async def _insert(self) -> None:
        await self._write(lambda number: self._pool.execute(INSERT, number), repeatable=False)

    async def _enter(self) -> None:
        await self._write(
            lambda number: self._pool.execute(ENTER_ONCE.format(id=number), idempotent=True), repeatable=True
        )

    async def _enter_by_function(self) -> None:
        await self._write(lambda number: self._pool.fetchval(FUNCTION, number, idempotent=True), repeatable=True)

    async def _write(self, write: Callable[[int], Awaitable[object]], *, repeatable: bool) -> None:
        number = next(self._ids)
        entry = self._book.entries[number] = Entry(repeatable=repeatable)
        try:
            await write(number)
        except OutcomeUnknownError as error:
            entry.told = Told.UNKNOWN
            if repeatable:
                self._book.repeatable_errors.append(_words(error, number))
        except Exception as error:
            entry.told = Told.FAILED
            (self._book.repeatable_errors if repeatable else self._book.plain_errors).append(_words(error, number))
        else:
            entry.told = Told.DONE
            self._acknowledged.append(number)

    async def _count(self) -> None:
        await self._look_up(lambda number: self._pool.fetchval(COUNT, number))

    async def _count_by_row(self) -> None:
        async def count(number: int) -> object:
            row = await self._pool.fetchrow(COUNT, number)
            return row["count"]

        await self._look_up(count)

    async def _look_up(self, count: Callable[[int], Awaitable[object]]) -> None:
        if self._acknowledged:
            number = self._chance.choice(self._acknowledged[-20:])
            await self._read(lambda: count(number), lambda times: times == 1, f"the count of {number}")

    async def _newest(self) -> None:
        def complete(rows) -> bool:
            ids = [row["id"] for row in rows]
            return ids == sorted(ids, reverse=True) and len(ids) >= least

        least = min(PAGE, len(self._acknowledged))
        await self._read(lambda: self._pool.fetch(NEWEST), complete, "the newest rows")

    async def _read(self, read: Callable[[], Awaitable[object]], is_right: Callable[..., bool], what: str) -> None:
        try:
            answer = await read()
        except Exception as error:
            self._book.read_errors.append(_words(error, what))
            return
        self._book.reads += 1
        if not is_right(answer):
            self._book.wrong_reads.append(f"{what}: {answer!r}"[:500])


def _words(error: Exception, what: object) -> str:
    notes = "; ".join(getattr(error, "__notes__", []))
    cause = "" if error.__cause__ is None else f" from {error.__cause__!r}"
    return f"{what}: {error!r}{cause} {notes}".rstrip()


# The whole


async def keep(seed: int, seconds: float, **arguments: object) -> Report:
    """Let workers use a pool while its server and its network are mistreated, and report.

    Args:
        seed: What happens, when, and which calls are made are drawn from it. How they meet is for the machine to decide.
        seconds: How long, roughly.
        **arguments: More arguments of the pool.
    """
    random.seed(seed)  # the pool's jitter
    async with EmbeddedPostgres(settings={"max_connections": 40}) as server:
        async with server.admin() as admin:
            await admin.execute(SCHEMA)
        async with FaultProxy(server.host, server.port) as proxy:
            saboteur, book = Saboteur(server, proxy), Book()
            pool = ResilientPool(proxy.dsn(server.dsn()), max_size=CONNECTIONS, **arguments)
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
        seed=seed, seconds=taken, book=book, audit=audit(book.entries, rows), blows=saboteur.blows, fired=fired,
        retries=pool.stats().retries_total, sessions_left=sessions, sockets_left=sockets,
    )  # fmt: skip


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
