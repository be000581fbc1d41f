"""A server that scales to zero while no client is connected, in front of a real PostgreSQL.

from resilient_pool.testing import EmbeddedPostgres, PausingServer

async with EmbeddedPostgres() as postgres:
    with PausingServer(postgres.host, postgres.port, resume_seconds=3.0, away=("hang", "57P03"), seed=1) as server:
        server.pause()                                      # now, without waiting for `pause_after`
        pool = await create_pool(server.dsn(postgres.dsn()))
        assert await pool.fetchval("SELECT 1") == 1         # resumed it, and waited
        assert len(server.outage_attempts) < 10
        await pool.close()
        await server.until("paused", timeout=10)            # no connection is open: it pauses again
        print(server.report())
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._event_log import Attempt, EventLog, LogEntry, Phase
from resilient_pool.testing._relay import AcceptMode, Ending, ProxyState, Relay, Stream
from resilient_pool.testing._threaded_server import LoopbackService
from resilient_pool.testing.tls import TlsCertificates

Result = TypeVar("Result")
Away = Literal["hang", "refuse", "reset", "57P03", "28000"]
"""How an attempt is answered while the server is away."""

_REFUSAL_SECONDS = 0.5
_POLL = 0.005
_TEXTS = MappingProxyType(
    {
        "53300": "sorry, too many clients already",
        "57P03": "the database system is starting up",
        "57P05": "terminating connection due to idle-session timeout",
    }
)


class PausableRelay(Relay):
    """A relay that holds the client until `decide()` is called."""

    def __init__(
        self,
        proxy_state: ProxyState,
        client: Stream,
        number: int,
        settings: Mapping[str, str],
        on_outcome: Callable[[int, str], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        super().__init__(proxy_state, client, number)
        self._settings = settings
        self._on_outcome = on_outcome
        self._on_bytes = on_bytes
        self._has_left = False
        self._code = ""
        self._decision: asyncio.Future[AcceptMode] = asyncio.get_running_loop().create_future()

    @property
    def is_decided(self) -> bool:
        """Whether it is known how the client is answered."""
        return self._decision.done()

    @property
    def accept_mode(self) -> AcceptMode:
        """How the client is answered, once that is decided."""
        return self._decision.result()

    @property
    def is_served(self) -> bool:
        """Whether it has, or is about to get, a session on the server."""
        return self.is_open and self.is_decided and self.accept_mode is AcceptMode.SERVE

    def decide(self, accept_mode: AcceptMode, sqlstate: str = "") -> None:
        """Answer the client so; for `AcceptMode.ERROR` with that SQLSTATE."""
        self._code = sqlstate
        if not self._decision.done():
            self._decision.set_result(accept_mode)

    def end_idle_session(self) -> None:
        """End an idle session as a server's `idle_session_timeout` does."""
        self._pass_to_client(_messages.fatal_error("57P05", _TEXTS["57P05"]))
        self.end("fin", server_sees_close=True)

    def end(self, how: Ending, *, server_sees_close: bool) -> None:
        """End the connection, and report the outcome."""
        super().end(how, server_sees_close=server_sees_close)
        self._on_outcome(self.number, "reset" if self.accept_mode is AcceptMode.RST else self._code or "failed")

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            await super().run()
        finally:
            self._on_outcome(self.number, "gave up" if self._has_left else "failed")

    async def _handshake(self) -> None:
        reading = asyncio.ensure_future(self._read_ahead())
        reading_or_decision: list[asyncio.Future[Any]] = [reading, self._decision]
        try:
            await asyncio.wait(reading_or_decision, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()
        await asyncio.wait([reading])
        if self._decision.done():
            await super()._handshake()

    async def _read_ahead(self) -> None:
        while data := await self._receive():
            self._from_client.feed(data)

    async def _receive(self) -> bytes:
        data = await super()._receive()
        self._on_bytes(len(data))
        self._has_left = not data
        return data

    async def _start_session(self, request: _messages.Message) -> None:
        if request.code != _messages.CANCEL_REQUEST:
            await super()._start_session(_messages.with_parameters(request, self._settings))
        elif self.accept_mode is AcceptMode.SERVE:
            self._on_outcome(self.number, "cancel")
            await super()._start_session(request)

    def _refusal(self, request: _messages.Message) -> bytes:
        said = _messages.startup_parameters(request)
        user = said.get("user", "")
        host = self._client.writer.get_extra_info("peername")[0]
        not_let_in = f'no pg_hba.conf entry for host "{host}", user "{user}", database "{said.get("database", user)}"'
        if self._proxy_state.tls is not None:  # one that knows no TLS does not say that it was missing
            encrypted = self._client.writer.get_extra_info("ssl_object") is not None
            not_let_in += f", {'SSL encryption' if encrypted else 'no encryption'}"
        return _messages.fatal_error(self._code, _TEXTS.get(self._code, not_let_in))

    def _read_answers(self) -> None:
        super()._read_answers()
        if self.startup_error:
            self._on_outcome(self.number, self.startup_error)
        elif self.is_ready:
            self._on_outcome(self.number, "served")


@constructor_names_nearest
class PausingServer(LoopbackService[PausableRelay]):
    """A PostgreSQL on 127.0.0.1 that behaves like a serverless one which scales to zero.

    It pauses after `pause_after` seconds without a connection; an open one keeps it awake, even if idle. The first
    attempt to connect resumes it, whatever the outcome of that attempt, and it is up `resume_seconds` later. Until then
    attempts are answered according to `away`:

    * "hang": accepted, and served once the server is up, if the client is still there then;
    * "refuse": the first is accepted and reset, since a refused one cannot be noticed; then the port is closed, and the
      kernel refuses every other (`ECONNREFUSED`) until the server is up, or in a mix for 0.5 s;
    * "reset": accepted and reset;
    * "57P03": FATAL "the database system is starting up";
    * "28000": FATAL "no pg_hba.conf entry for host ...", though the credentials may be right.

    The errors answer the startup message, after an answer to a request for TLS. Attempts that the kernel refuses cannot
    be counted here, only by the client. Everything happens in a thread with an event loop of its own, so a program under
    test may block. Counts and the log can be read from any thread, also after `close()`.

    Args:
        host: Where the real server is.
        port: Where it listens, unencrypted.
        pause_after: Seconds without a connection before it pauses; 1 by default. None: only when `pause()` is called.
        resume_seconds: Seconds from the attempt that resumes it until it is up; 3 by default.
        away: How attempts are answered meanwhile, "hang" by default. With several, each attempt draws one.
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
        self._proxy_state = ProxyState((host, port), None if tls is None else tls.server_context())
        self._pause_after = None if pause_after is None else _at_least(0, "pause_after", pause_after)
        self._resume_seconds = _at_least(0, "resume_seconds", resume_seconds)
        self._away = _away_modes(away)
        self._seed = seed
        self._settings = _settings(idle_session_timeout)
        self._capacity = None if capacity is None else _at_least(1, "capacity", capacity)
        self._capacity_seconds = _at_least(0, "capacity_seconds", capacity_seconds)
        self._log_if_started: EventLog | None = None
        self._stopped_at: float | None = None

    def __repr__(self) -> str:
        host, port = self._proxy_state.target
        return f"<PausingServer {self.host}:{self._listen_port} before {host}:{port}>"

    # Pause and resume

    def pause(self, timeout: float = 5.0) -> None:
        """Pause now, as if every idle session had timed out and `pause_after` had passed since.

        Idle sessions are ended with 57P05. This blocks the calling thread, so a request that the same thread is yet
        to send does not count as under way.

        Args:
            timeout: Seconds to wait for sessions that are busy or in a transaction; 5 by default.

        Raises:
            RuntimeError: One still is after that time, or the server is resuming.
        """
        self._run_coroutine(self._pause(timeout), timeout + 5.0)

    def resume(self) -> None:
        """Be up now, if paused or resuming."""
        self._run_coroutine(self._resume())

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

    # State, counters and log

    @property
    def phase(self) -> Phase:
        """The present phase: "awake", "paused" or "resuming"."""
        return self._read_log(lambda log: log.phase)

    @property
    def open_connections(self) -> int:
        """How many clients are connected, or waiting to be."""
        return self._read_log(lambda _: len(self._open_relays()))

    @property
    def pauses(self) -> int:
        """How often it has paused."""
        return self._read_log(lambda log: log.pauses)

    @property
    def awake_seconds(self) -> float:
        """How many seconds it has been awake, from its start and from each resume to the next pause."""
        return self._read_log(lambda log: log.awake_seconds(self._now()))

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Every attempt to connect, requests to cancel included, without those that the kernel refused."""
        return self._read_log(lambda log: log.attempts)

    @property
    def outage_attempts(self) -> tuple[Attempt, ...]:
        """Those of the last outage: from the last pause until the server was up again; likewise."""
        return self._read_log(lambda log: log.outage_attempts)

    @property
    def in_flight(self) -> int:
        """How many attempts were accepted and have no outcome yet."""
        return self._read_log(lambda log: log.in_flight)

    @property
    def peak_in_flight(self) -> int:
        """The most of them at once since the last resume, those included that waited for it; before, since the start."""
        return self._read_log(lambda log: log.peak_in_flight)

    def bytes_since(self, moment: float) -> int:
        """Return how many bytes clients have sent since a moment, in any phase, read by the server or not.

        Args:
            moment: A reading of `time.monotonic()`.
        """
        return self._read_log(lambda log: log.bytes_since(moment))

    @property
    def log(self) -> tuple[LogEntry, ...]:
        """What has happened, in the order in which it was noticed."""
        return self._read_log(lambda log: tuple(log.log))

    def report(self) -> str:
        """Write the log for a person, a line each."""
        return "\n".join(map(str, self.log))

    def _read_log(self, read: Callable[[EventLog], Result]) -> Result:
        if self._loop is None:
            return read(self._events)
        return self._call_in_loop(lambda: read(self._events))

    def _has_reached(self, phase: Phase, deadline: float, timeout: float) -> bool:
        now = self.phase
        if now != phase and time.monotonic() > deadline:
            raise TimeoutError(
                f"not {phase} after {timeout} s but {now}, with {self.open_connections} connections open"
            )
        return now == phase

    # Start and stop

    @property
    def _events(self) -> EventLog:
        if self._log_if_started is None:
            raise RuntimeError(f"{self!r} was not started")
        return self._log_if_started

    def _now(self) -> float:
        return time.monotonic() if self._stopped_at is None else self._stopped_at

    async def _started(self) -> None:
        self._log_if_started, self._stopped_at = EventLog(self._now()), None
        self._random = random.Random(self._seed)  # noqa: S311 - to be repeatable is the point
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._port_lock = asyncio.Lock()
        self._capacity_limited = False
        await self._listen()
        self._schedule_pause()

    async def _shut_down(self) -> None:
        self._stopped_at = self._now()
        for timer in self._timers.values():
            timer.cancel()
        for work in self._tasks:
            work.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super()._shut_down()

    def _set_timer(self, name: str, seconds: float, action: Callable[[], object]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, action)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Phases

    def _open_relays(self) -> list[PausableRelay]:
        return [relay for relay in self._running if relay.is_open]

    def _schedule_pause(self) -> None:
        quiet = self._events.phase == "awake" and self._stopped_at is None and not self._open_relays()
        if quiet and self._pause_after is not None and "pause" not in self._timers:
            self._set_timer("pause", self._pause_after, self._enter_pause)

    def _cancel_pause(self) -> None:
        if "pause" in self._timers:
            self._timers.pop("pause").cancel()

    def _enter_pause(self) -> None:
        self._cancel_pause()
        self._end_capacity_limit()
        self._events.paused(self._now())

    async def _pause(self, timeout: float) -> None:
        deadline = self._now() + timeout
        while busy := [relay for relay in self._open_relays() if not relay.is_idle]:
            if self._now() > deadline or self._events.phase != "awake":
                raise RuntimeError(f"cannot pause while {self._events.phase} with {len(busy)} connections in use")
            await asyncio.sleep(_POLL)
        if self._events.phase == "resuming":
            raise RuntimeError("cannot pause while resuming; wait until it is awake")
        for relay in self._open_relays():
            relay.end_idle_session()
        if self._events.phase == "awake":
            self._enter_pause()

    def _start_resuming(self) -> None:
        self._events.resuming(self._now())
        self._set_timer("resume", self._resume_seconds, lambda: self._spawn(self._resume()))

    async def _resume(self) -> None:
        async with self._port_lock:
            if self._events.phase != "awake":
                self._finish_resuming()
                await self._open_port()

    def _finish_resuming(self) -> None:
        if "resume" in self._timers:
            self._timers["resume"].cancel()
        self._events.resumed(self._now())
        if self._capacity is not None:
            self._capacity_limited = True
            self._events.record("limit", self._now())
            self._set_timer("limit", self._capacity_seconds, self._end_capacity_limit)
        for relay in self._open_relays():
            if not relay.is_decided:
                self._admit(relay)
        self._schedule_pause()

    def _end_capacity_limit(self) -> None:
        if self._capacity_limited:
            self._capacity_limited = False
            self._events.record("no limit", self._now())

    # Attempts

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._cancel_pause()
        number = self._events.attempt_started(self._now())
        relay = PausableRelay(
            self._proxy_state, Stream(reader, writer), number, self._settings, self._on_outcome, self._on_bytes
        )
        self._run(relay).add_done_callback(lambda _: self._on_disconnect(relay))
        if self._events.phase == "awake":
            self._admit(relay)
            return
        if self._events.phase == "paused":
            self._start_resuming()
        away = self._random.choice(self._away)
        if away in {"57P03", "28000"}:
            relay.decide(AcceptMode.ERROR, away)
        elif away != "hang":
            relay.decide(AcceptMode.RST)
        if away == "refuse":
            self._spawn(self._close_port())

    def _admit(self, relay: PausableRelay) -> None:
        served = sum(each.is_served for each in self._running)
        if self._capacity_limited and self._capacity is not None and served >= self._capacity:
            relay.decide(AcceptMode.ERROR, "53300")
        else:
            relay.decide(AcceptMode.SERVE)

    def _on_bytes(self, count: int) -> None:
        self._events.bytes_received(count, self._now())

    def _on_outcome(self, number: int, outcome: str) -> None:
        self._events.set_outcome(number, outcome, self._now())
        self._schedule_pause()

    def _on_disconnect(self, relay: PausableRelay) -> None:
        if relay.is_ready:
            self._events.record("left", self._now(), relay.number)
        self._schedule_pause()

    # The port

    async def _close_port(self) -> None:
        async with self._port_lock:
            if self._events.phase == "awake" or self._listener is None:
                return
            await self._stop_listening()
            self._events.record("port closed", self._now())
        if len(set(self._away)) > 1:
            self._set_timer("port", _REFUSAL_SECONDS, lambda: self._spawn(self._reopen_port()))

    async def _reopen_port(self) -> None:
        async with self._port_lock:
            await self._open_port()

    async def _open_port(self) -> None:
        if self._listener is None:
            await self._listen()
            self._events.record("port open", self._now())


def _at_least(least: float, name: str, value: float) -> float:
    if not (isinstance(value, int | float) and least <= value < float("inf")):
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    return value


def _away_modes(away: Away | Sequence[Away]) -> tuple[Away, ...]:
    modes: tuple[Away, ...] = (away,) if isinstance(away, str) else tuple(away)
    unknown = [way for way in modes if way not in get_args(Away)]
    if unknown or not modes:
        raise ValueError(f"away must be one or more of {', '.join(get_args(Away))}, not {away!r}")
    return modes


def _settings(idle_session_timeout: float | None) -> dict[str, str]:
    if idle_session_timeout is None:
        return {}
    milliseconds = round(_at_least(0.001, "idle_session_timeout", idle_session_timeout) * 1000)
    return {"idle_session_timeout": str(milliseconds)}
