"""A server that sleeps when nobody is connected and takes its time to wake, in front of a real PostgreSQL.

from resilient_pool.testing import EmbeddedPostgres, PausingServer

async with EmbeddedPostgres() as postgres:
    with PausingServer(postgres.host, postgres.port, resume_seconds=3.0, away=("hang", "57P03"), seed=1) as server:
        server.pause()                                      # now, without waiting for `pause_after`
        pool = await create_pool(server.dsn(postgres.dsn()))
        assert await pool.fetchval("SELECT 1") == 1         # woke it, and waited
        assert len(server.outage_attempts) < 10
        await pool.close()
        await server.until("paused", timeout=10)            # nobody is connected: it sleeps again
        print(server.report())
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Literal, TypeVar, get_args

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.testing._event_log import Attempt, Journal, LogEntry, Phase
from resilient_pool.testing._pausable_relay import Ear, PausableRelay
from resilient_pool.testing._relay import Rules, Stream
from resilient_pool.testing._syn_sniffer import RefusalWatch
from resilient_pool.testing._threaded_server import READ_LIMIT, LoopbackService
from resilient_pool.testing.tls import TlsCertificates

Result = TypeVar("Result")
Away = Literal["hang", "refuse", "reset", "57P03", "28000"]
"""How an attempt is met while the server is away."""

_REFUSAL_SECONDS = 0.5
_TIME_TO_BE_ACCEPTED = 0.1
_POLL = 0.005


@constructor_names_nearest
class PausingServer(LoopbackService[PausableRelay]):
    """A PostgreSQL on 127.0.0.1 that behaves like a serverless one which scales to zero.

    It sleeps after `pause_after` seconds without a connection; an open one keeps it awake, even if idle. The first
    attempt to connect wakes it, whatever becomes of that attempt, and it is up `resume_seconds` later. Until then
    attempts are met as `away` says:

    * "hang": accepted, and served once the server is up, if the client is still there then;
    * "refuse": the first is accepted and reset, since nobody can notice it otherwise; then the port is closed, and the
      kernel refuses every other (`ECONNREFUSED`) until the server is up, or in a mix for 0.5 s;
    * "reset": accepted and reset;
    * "57P03": FATAL "the database system is starting up";
    * "28000": FATAL "no pg_hba.conf entry for host ...", though the credentials may be right.

    The errors answer the startup message, after an answer to a request for TLS. Attempts that the kernel refuses are
    counted where this process may read packets, that is as root or with CAP_NET_RAW on Linux: see `counts_refusals`.
    Everything happens in a thread with an event loop of its own, so a program under test may block. Counts and the
    log can be read from any thread, also after `close()`.

    Args:
        host: Where the real server is.
        port: Where it listens, unencrypted.
        pause_after: Seconds without a connection before it sleeps; 1 by default. None: only when `pause()` says so.
        resume_seconds: Seconds from the attempt that wakes it until it is up; 3 by default.
        away: How attempts are met meanwhile, "hang" by default. With several, each attempt draws one.
        seed: What the draws depend on, besides their order; 0 by default.
        idle_session_timeout: Seconds after which the real server (PostgreSQL 14 or newer) ends idle sessions with 57P05,
            set for every session that does not set it itself; None by default: what the server is configured to do.
        capacity: How many connections are allowed at first after a resume, others getting 53300; None by default: no
            limit but the real server's.
        capacity_seconds: How long `capacity` holds; 5 by default.
        tls: Certificates with which it speaks TLS to clients that ask for it; by default it answers that it has none.
        listen_port: Its own port; by default any.

    Raises:
        ValueError: A number is out of range, or `away` names no such way.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        pause_after: float | None = 1.0,
        resume_seconds: float = 3.0,
        away: Away | Sequence[Away] = "hang",
        seed: int = 0,
        idle_session_timeout: float | None = None,
        capacity: int | None = None,
        capacity_seconds: float = 5.0,
        tls: TlsCertificates | None = None,
        listen_port: int = 0,
    ) -> None:
        super().__init__(listen_port)
        self._target = (host, port)
        self._pause_after = None if pause_after is None else _at_least(0, "pause_after", pause_after)
        self._resume_seconds = _at_least(0, "resume_seconds", resume_seconds)
        self._away = _ways(away)
        self._seed = seed
        self._settings = _settings(idle_session_timeout)
        self._capacity = None if capacity is None else _at_least(1, "capacity", capacity)
        self._capacity_seconds = _at_least(0, "capacity_seconds", capacity_seconds)
        self._tls = None if tls is None else tls.server_context()
        self._written: Journal | None = None
        self._closed_at: float | None = None

    def __repr__(self) -> str:
        host, port = self._target
        return f"<PausingServer {self.host}:{self._listen_port} before {host}:{port}>"

    # To sleep and to wake

    def pause(self, timeout: float = 5.0) -> None:
        """Sleep now, as if every idle session had timed out and `pause_after` had passed since.

        Idle sessions are ended with 57P05. This blocks the calling thread, so a request that the same thread is yet
        to send does not count as under way.

        Args:
            timeout: Seconds to wait for sessions that are busy or in a transaction; 5 by default.

        Raises:
            RuntimeError: One still is after that time, or the server is resuming.
        """
        self._await(self._pause(timeout), timeout + 5.0)

    def resume(self) -> None:
        """Be up now, if paused or resuming."""
        self._await(self._resume())

    def wait_until(self, phase: Phase, timeout: float) -> None:
        """Block the calling thread until the server is "awake", "paused" or "resuming".

        Args:
            phase: Which of them.
            timeout: How many seconds to wait for it.

        Raises:
            TimeoutError: It was not in that time; the message says what it was, and how many connections were open.
        """
        deadline = time.monotonic() + timeout
        while not self._has_reached(phase, deadline, timeout):
            time.sleep(_POLL)

    async def until(self, phase: Phase, timeout: float) -> None:
        """Do as `wait_until()`, in any event loop and without blocking it."""
        deadline = time.monotonic() + timeout
        while not self._has_reached(phase, deadline, timeout):  # noqa: ASYNC110 - it changes in another thread
            await asyncio.sleep(_POLL)

    # What there is to see

    @property
    def phase(self) -> Phase:
        """What the server does: "awake", "paused" or "resuming"."""
        return self._read(lambda journal: journal.phase)

    @property
    def open_connections(self) -> int:
        """How many clients are connected, or waiting to be."""
        return self._read(lambda _: len(self._open()))

    @property
    def pauses(self) -> int:
        """How often it has paused."""
        return self._read(lambda journal: journal.pauses)

    @property
    def awake_seconds(self) -> float:
        """How many seconds it has been awake, from its start and from each resume to the next pause."""
        return self._read(lambda journal: journal.awake_seconds(self._now()))

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every attempt to connect, requests to cancel included; refused ones only if `counts_refusals`."""
        return self._read(lambda journal: journal.attempts)

    @property
    def outage_attempts(self) -> tuple[Attempt, ...]:
        """Those of the last outage: from the last pause until the server was up again; likewise."""
        return self._read(lambda journal: journal.outage_attempts)

    @property
    def counts_refusals(self) -> bool:
        """Whether attempts are counted that the kernel refuses; if not, only the client can count them."""
        return self._can_count_refusals

    @property
    def in_flight(self) -> int:
        """How many attempts were accepted and have no outcome yet."""
        return self._read(lambda journal: journal.in_flight)

    @property
    def peak_in_flight(self) -> int:
        """The most of them at once since the last resume, those included that waited for it; before, since the start."""
        return self._read(lambda journal: journal.peak_in_flight)

    def bytes_since(self, moment: float) -> int:
        """Tell how many bytes clients have sent since a moment, in any phase and whether anybody read them.

        Args:
            moment: A reading of `time.monotonic()`.
        """
        return self._read(lambda journal: journal.bytes_since(moment))

    @property
    def log(self) -> tuple[LogEntry, ...]:
        """What has happened, in the order in which it was noticed."""
        return self._read(lambda journal: tuple(journal.log))

    def report(self) -> str:
        """Write the log for a person, a line each."""
        return "\n".join(map(str, self.log))

    def _read(self, look: Callable[[Journal], Result]) -> Result:
        if self._loop is None:
            return look(self._journal)

        def act() -> Result:
            self._look_for_refusals()
            return look(self._journal)

        return self._do(act)

    def _has_reached(self, phase: Phase, deadline: float, timeout: float) -> bool:
        now = self.phase
        if now != phase and time.monotonic() > deadline:
            raise TimeoutError(
                f"not {phase} after {timeout} s but {now}, with {self.open_connections} connections open"
            )
        return now == phase

    # Being there

    @property
    def _journal(self) -> Journal:
        if self._written is None:
            raise RuntimeError(f"{self!r} was not started")
        return self._written

    def _now(self) -> float:
        return time.monotonic() if self._closed_at is None else self._closed_at

    async def _started(self) -> None:
        self._written, self._closed_at = Journal(self._now()), None
        self._chooser = random.Random(self._seed)  # noqa: S311 - to be repeatable is the point
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._port_moves = asyncio.Lock()
        self._limited = False
        self._watch = RefusalWatch.open(self.host, self.port) if "refuse" in self._away else None
        self._can_count_refusals = self._watch is not None
        if self._watch is not None:
            asyncio.get_running_loop().add_reader(self._watch, self._look_for_refusals)
        await self._listen()
        self._rest()

    async def _shut_down(self) -> None:
        self._look_for_refusals()
        self._closed_at = self._now()
        for timer in self._timers.values():
            timer.cancel()
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await super()._shut_down()
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch)
            self._watch.close()

    def _later(self, name: str, seconds: float, action: Callable[[], object]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, action)

    def _send(self, errand: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # Falling asleep and waking

    def _open(self) -> list[PausableRelay]:
        return [visit for visit in self._running if visit.is_open]

    def _rest(self) -> None:
        quiet = self._journal.phase == "awake" and self._closed_at is None and not self._open()
        if quiet and self._pause_after is not None and "pause" not in self._timers:
            self._later("pause", self._pause_after, self._fall_asleep)

    def _stay_awake(self) -> None:
        if "pause" in self._timers:
            self._timers.pop("pause").cancel()

    def _fall_asleep(self) -> None:
        self._stay_awake()
        self._lift_limit()
        self._journal.paused(self._now())

    async def _pause(self, timeout: float) -> None:
        deadline = self._now() + timeout
        while busy := [visit for visit in self._open() if not visit.is_idle]:
            if self._now() > deadline or self._journal.phase != "awake":
                raise RuntimeError(f"cannot pause while {self._journal.phase} with {len(busy)} connections in use")
            await asyncio.sleep(_POLL)
        if self._journal.phase == "resuming":
            raise RuntimeError("cannot pause while resuming; wait until it is awake")
        for visit in self._open():
            visit.time_out()
        if self._journal.phase == "awake":
            self._fall_asleep()

    def _begin_to_wake(self) -> None:
        self._journal.resuming(self._now())
        self._later("resume", self._resume_seconds, lambda: self._send(self._resume()))

    async def _resume(self) -> None:
        async with self._port_moves:
            if self._journal.phase != "awake":
                self._look_for_refusals()
                self._wake()
                await self._open_port()

    def _wake(self) -> None:
        if "resume" in self._timers:
            self._timers["resume"].cancel()
        self._journal.resumed(self._now())
        if self._capacity is not None:
            self._limited = True
            self._journal.note("limit", self._now())
            self._later("limit", self._capacity_seconds, self._lift_limit)
        for visit in self._open():
            if not visit.is_decided:
                self._admit(visit)
        self._rest()

    def _lift_limit(self) -> None:
        if self._limited:
            self._limited = False
            self._journal.note("no limit", self._now())

    # Attempts

    def _new_reader(self) -> asyncio.StreamReader:
        return Ear(lambda count: self._journal.heard(count, self._now()), READ_LIMIT)

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._stay_awake()
        self._match(writer)
        number = self._journal.arrived(self._now())
        visit = PausableRelay(
            Rules(self._target, self._tls), Stream(reader, writer), number, self._settings, self._settled
        )
        self._run(visit).add_done_callback(lambda _: self._left(visit))
        if self._journal.phase == "awake":
            self._admit(visit)
            return
        if self._journal.phase == "paused":
            self._begin_to_wake()
        self._put_off(visit, self._chooser.choice(self._away))

    def _admit(self, visit: PausableRelay) -> None:
        served = sum(each.is_served for each in self._running)
        if self._limited and self._capacity is not None and served >= self._capacity:
            visit.turn_away("53300")
        else:
            visit.serve()

    def _put_off(self, visit: PausableRelay, away: Away) -> None:
        if away in {"57P03", "28000"}:
            visit.turn_away(away)
        elif away != "hang":
            visit.reset()
        if away == "refuse":
            self._send(self._close_port())

    def _settled(self, visit: PausableRelay, outcome: str) -> None:
        self._journal.settle(visit.number, outcome, self._now())
        self._rest()

    def _left(self, visit: PausableRelay) -> None:
        if visit.is_ready:
            self._journal.note("left", self._now(), visit.number)
        self._rest()

    # The port

    async def _close_port(self) -> None:
        async with self._port_moves:
            if self._journal.phase == "awake" or self._listener is None:
                return
            await self._stop_listening()
            self._journal.note("port closed", self._now())
        if len(set(self._away)) > 1:
            self._later("port", _REFUSAL_SECONDS, lambda: self._send(self._end_refusal()))

    async def _end_refusal(self) -> None:
        async with self._port_moves:
            self._look_for_refusals()
            await self._open_port()

    async def _open_port(self) -> None:
        if self._listener is None:
            await self._listen()
            self._journal.note("port open", self._now())

    def _match(self, writer: asyncio.StreamWriter) -> None:
        if self._watch is not None:
            self._watch.drain(self._now())
            self._watch.accepted(writer.get_extra_info("peername")[1])

    def _look_for_refusals(self) -> None:
        if self._watch is None or self._closed_at is not None:
            return
        self._watch.drain(self._now())
        # While the port is open, what was not accepted yet may still be; what came as it closed will never be.
        grace = 0.0 if self._reserved is not None else _TIME_TO_BE_ACCEPTED
        for at in self._watch.take(self._now() - grace):
            self._journal.refused(at)


def _at_least(least: float, name: str, value: float) -> float:
    if not (isinstance(value, int | float) and least <= value < float("inf")):
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return value


def _ways(away: Away | Sequence[Away]) -> tuple[Away, ...]:
    ways: tuple[Away, ...] = (away,) if isinstance(away, str) else tuple(away)
    unknown = [way for way in ways if way not in get_args(Away)]
    if unknown or not ways:
        raise ValueError(f"away must be one or more of {', '.join(get_args(Away))}, not {away!r}")
    return ways


def _settings(idle_session_timeout: float | None) -> dict[str, str]:
    if idle_session_timeout is None:
        return {}
    milliseconds = round(_at_least(0.001, "idle_session_timeout", idle_session_timeout) * 1000)
    return {"idle_session_timeout": str(milliseconds)}
