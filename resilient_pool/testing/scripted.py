"""A server that answers from a script: what proxies, poolers and managed services answer, word for word.

from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedServer

waking = Refusal(
    at=Point.STARTUP,
    severity="ERROR",
    severity_en="",                                   # this proxy sends no field V
    sqlstate="XX000",
    message="Couldn't connect to compute node",
    seconds=3.0,                                      # from the first attempt on; then every client is let in
)
full = Refusal(
    at=Point.QUERY,
    severity="ERROR",
    sqlstate="58000",
    message="checkout timeout",
    then=End.READY,                                   # the connection goes on
    matching="INSERT",
    times=2,                                          # the third INSERT is executed
)
async with EmbeddedPostgres() as postgres:
    with ScriptedServer(waking, full, host=postgres.host, port=postgres.port) as server:
        pool = await create_pool(server.dsn(postgres.dsn()))
        await pool.execute("INSERT INTO things VALUES (1)")
        assert server.sent == (waking,) * 4 + (full,) * 2
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import re
import socket
import struct
from collections.abc import Callable, Mapping
from typing import cast

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._protocol import Matcher
from resilient_pool.testing._relay import ArmedFault, Ending, ProxyState, Relay, State, Stream
from resilient_pool.testing._stub_server import INVALID, Login, StubServer
from resilient_pool.testing._threaded_server import LoopbackService
from resilient_pool.testing.tls import TlsCertificates

_COMMIT = re.compile(rb"\s*(?:COMMIT|END)\b", re.IGNORECASE)
_CODE = struct.Struct("!i")
_AUTHENTICATION_OK = 0


class Point(enum.Enum):
    """How far a connection gets before it is answered by the script.

    Attributes:
        TLS: The client asks for TLS: instead of "S" or "N". A client that does not ask never gets there.
        STARTUP: The client has sent its startup message: instead of any answer.
        AUTHENTICATION: The client has proved who it is, or need not: instead of AuthenticationOk.
        LOGIN: The client was let in: after AuthenticationOk, instead of the first ReadyForQuery.
        PARSE: A statement is to be prepared: instead of preparing it.
        QUERY: A statement is to be executed, prepared or not: instead of its answer.
        COMMIT: A statement is to be executed that begins with COMMIT or END: instead of its answer.
        IDLE: A statement has been answered: after the answer, in a transaction or outside.
    """

    TLS = "tls"
    STARTUP = "startup"
    AUTHENTICATION = "authentication"
    LOGIN = "login"
    PARSE = "parse"
    QUERY = "query"
    COMMIT = "commit"
    IDLE = "idle"


class End(enum.Enum):
    """What happens to the connection after a scripted answer.

    Attributes:
        READY: It goes on: ReadyForQuery follows.
        CLOSE: It is closed in an orderly way.
        RESET: It is reset. What was sent before may be lost on the way.
        SILENCE: Nothing more is sent, and nothing read, for ever.
    """

    READY = "ready"
    CLOSE = "fin"
    RESET = "rst"
    SILENCE = "hang"


_STATEMENTS = frozenset({Point.PARSE, Point.QUERY, Point.COMMIT})
_EXECUTIONS = frozenset({Point.QUERY, Point.COMMIT})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One line of a script: an ErrorResponse, and what comes after it.

    Without `message`, `detail`, `hint` and `sqlstate` nothing is sent, and the connection just ends as `then` has it.

    Attributes:
        at: Where it is sent.
        message: The text (field M).
        severity: The severity (field S), translated or not, or None to leave it out; "FATAL" by default.
        severity_en: The severity untranslated (field V); by default the same as `severity`. Empty to leave it out, as
            servers before 9.6 do, and some proxies.
        sqlstate: The code (field C), or None to leave it out.
        detail: The detail (field D).
        hint: The hint (field H).
        bare: Whether it is sent in the format of protocol version 2, "E" and the message alone, as a server says it that
            has not read, or cannot serve, the client's first message. False by default.
        then: What becomes of the connection; `End.CLOSE` by default. `End.READY` is for PARSE, QUERY and COMMIT.
        executed: Whether the real server carries out the statement all the same; False by default. For QUERY and COMMIT.
        matching: Which statements are meant, at PARSE, QUERY, COMMIT and IDLE: text that their SQL or their arguments
            contain (at PARSE the SQL alone), a function of both as bytes, or None: all.
        nth: At which occasion it is sent first, counted from 1 over all connections; 1 by default.
        times: How often it is sent; None by default: every time.
        seconds: For how long it is sent, from the first attempt to connect; None by default: for ever.
        beyond: How many clients must have been let in, and still be there, for it to be sent; 0 by default.

    Raises:
        ValueError: The parts do not fit together, or a number is out of range.
    """

    at: Point
    message: str | None = None
    severity: str | None = "FATAL"
    severity_en: str | None = None
    sqlstate: str | None = None
    detail: str | None = None
    hint: str | None = None
    bare: bool = False
    then: End = End.CLOSE
    executed: bool = False
    matching: Matcher = None
    nth: int = 1
    times: int | None = None
    seconds: float | None = None
    beyond: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.at, Point):
            raise TypeError(f"at must be a Point, such as Point.STARTUP, not {self.at!r}")
        where = f"at {self.at.name}"
        if self.then is End.READY and self.at not in _STATEMENTS:
            raise ValueError(f"then=End.READY is for PARSE, QUERY and COMMIT, not {where}")
        if self.then is End.READY and not self.error_response:
            raise ValueError(f"then=End.READY needs something to say {where}: message= or sqlstate=")
        if self.executed and self.at not in _EXECUTIONS:
            raise ValueError(f"executed=True is for QUERY and COMMIT, not {where}")
        if self.matching is not None and self.at not in _STATEMENTS | {Point.IDLE}:
            raise ValueError(f"matching= is for PARSE, QUERY, COMMIT and IDLE: there is no statement {where}")
        if self.bare and self.message is None:
            raise ValueError(f"bare=True needs a message= {where}")
        for name, value, least in (("nth", self.nth, 1), ("times", self.times, 1), ("beyond", self.beyond, 0)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value!r}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds must be more than 0, not {self.seconds!r}")

    @property
    def error_response(self) -> bytes:
        """The encoded ErrorResponse; empty if there is nothing to send."""
        if self.bare:
            return f"E{self.message}\0".encode()
        if self.message is None and self.sqlstate is None and self.detail is None and self.hint is None:
            return b""
        english = self.severity if self.severity_en is None else self.severity_en
        fields = {
            "S": self.severity,
            "V": english or None,
            "C": self.sqlstate,
            "M": self.message,
            "D": self.detail,
            "H": self.hint,
        }
        return _messages.error_response({code: value for code, value in fields.items() if value is not None})

    def is_meant_for(self, sql: bytes) -> bool:
        """Whether a statement matches; `sql` is its SQL followed by its arguments."""
        if self.at is Point.COMMIT and not _COMMIT.match(sql):
            return False
        return _messages.matcher(self.matching)(sql)


class Script:
    """The lines of a script, and how often each has had its occasion.

    Args:
        lines: Asked in their order: the first that applies is sent, and the others have no occasion then.
        count_admitted: Counts the clients that have been let in and are still there.

    Attributes:
        sent: What was sent, in order.
    """

    def __init__(self, lines: tuple[Refusal, ...], count_admitted: Callable[[], int]) -> None:
        self.sent: list[Refusal] = []
        self._lines = lines
        self._occasions = [0] * len(lines)
        self._count_admitted = count_admitted
        self._began: float | None = None

    def begin(self, now: float) -> None:
        """Take note of an attempt to connect; the first starts the time."""
        if self._began is None:
            self._began = now

    def next(self, at: Point, now: float, sql: bytes = b"") -> Refusal | None:
        """Find what is to be sent, and count it as sent."""
        for number, line in enumerate(self._lines):
            if line.at is at and self._is_active(line, now) and line.is_meant_for(sql):
                self._occasions[number] += 1
                occasion = self._occasions[number] - line.nth
                if occasion >= 0 and (line.times is None or occasion < line.times):
                    self.sent.append(line)
                    return line
        return None

    def _is_active(self, line: Refusal, now: float) -> bool:
        in_time = line.seconds is None or self._began is None or now - self._began <= line.seconds
        return in_time and (not line.beyond or self._count_admitted() >= line.beyond)


class ScriptedRelay(Relay):
    """A relay whose client is answered by a script where a line applies.

    Attributes:
        was_admitted: Whether the script let the client's startup message pass.
    """

    def __init__(
        self,
        proxy_state: ProxyState,
        client: Stream,
        number: int,
        script: Script,
        statements: list[str],
        stub_server: StubServer | None,
    ) -> None:
        super().__init__(proxy_state, client, number)
        self.was_admitted = False
        self._script = script
        self._statements = statements
        self._stub_server = stub_server
        self._stub_task: asyncio.Task[None] | None = None
        self._after_answer: Refusal | None = None

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            await super().run()
        finally:
            if self._stub_task is not None:
                self._stub_task.cancel()

    # Before there is a session

    async def _first_message(self) -> _messages.Message:
        message = await super()._first_message()
        if message.code == _messages.TLS_REQUEST:
            await self._refuse_at(Point.TLS)
        return message

    async def _start_session(self, request: _messages.Message) -> None:
        if request.code != _messages.CANCEL_REQUEST:
            await self._refuse_at(Point.STARTUP)
            self.was_admitted = True
        await super()._start_session(request)

    async def _connect_to_server(self) -> Stream:
        if self._stub_server is None:
            return await super()._connect_to_server()
        near, far = socket.socketpair()
        served = Stream(*await asyncio.open_connection(sock=far))
        self._stub_task = asyncio.get_running_loop().create_task(self._stub_server.serve(*served))
        return Stream(*await asyncio.open_connection(sock=near))

    async def _refuse_at(self, point: Point) -> None:
        if (line := self._next(point)) is not None:
            await self._send(line.error_response)
            await self._reject(_ending(line))
            raise EOFError

    # Requests and answers

    def _fault_for(self, message: _messages.Message) -> ArmedFault | None:
        subject = self._requests.read(message)
        line = None
        if message.kind == b"P":
            line = self._next(Point.PARSE, message.body.split(b"\0")[1])
        elif subject is not None:
            self._statements.append(subject.partition(b"\0")[0].decode(errors="replace"))
            line = self._next(Point.COMMIT, subject) or self._next(Point.QUERY, subject)
            if line is None:
                self._after_answer = self._next(Point.IDLE, subject)
        if line is None:
            return None
        return ArmedFault(
            reaches_server=line.executed,
            instead=_instead(line, message) if line.then is End.READY else b"",
            error_response=line.error_response,
            then="ready" if line.then is End.READY else _ending(line),
            server_sees_close=True,
        )

    def _deliver(self, message: _messages.Message) -> None:
        line = None
        if not self.is_ready and message.kind == _messages.READY:
            line = self._next(Point.LOGIN)
        elif not self.is_ready and self._ends_authentication(message):
            line = self._next(Point.AUTHENTICATION)
        if line is None:
            super()._deliver(message)
            if message.kind == _messages.READY:
                line, self._after_answer = self._after_answer, None
        if line is not None:
            self._pass_to_client(line.error_response)
            self.end(_ending(line), server_sees_close=True)

    def _ends_authentication(self, message: _messages.Message) -> bool:
        if message.kind == _messages.AUTHENTICATION:
            return bool(_CODE.unpack_from(message.body)[0] == _AUTHENTICATION_OK)
        # The stub server refuses every proof by SCRAM. A real server's refusal takes precedence over the script.
        return message.kind == _messages.ERROR and self._stub_server is not None

    def _next(self, point: Point, sql: bytes = b"") -> Refusal | None:
        return self._script.next(point, asyncio.get_running_loop().time(), sql)


def _ending(line: Refusal) -> Ending:
    return cast("Ending", line.then.value)


def _instead(line: Refusal, message: _messages.Message) -> bytes:
    """Compose what the server gets in the place of a request that is refused: one of the same kind that fails.

    In the place of a COMMIT it is a ROLLBACK, since a server that refuses a COMMIT has rolled back.
    """
    execute = _messages.compose(b"E", b"\0" + _CODE.pack(0))
    match message.kind, line.at:
        case b"E", Point.COMMIT:
            bind = _messages.compose(b"B", b"\0\0" + b"\0\0" * 3)
            return _messages.compose(b"P", b"\0ROLLBACK\0\0\0") + bind + execute
        case _, Point.COMMIT:
            return _messages.compose(b"Q", b"ROLLBACK\0")
        case b"P", _:
            return _messages.compose(b"P", b"\0" + INVALID + b"\0\0\0")
        case b"E", _:
            return _messages.compose(b"E", INVALID + b"\0" + _CODE.pack(0))
        case _:
            return _messages.compose(b"Q", INVALID + b"\0")


class ScriptedServer(LoopbackService[ScriptedRelay]):
    """A server on 127.0.0.1 that speaks PostgreSQL's protocol up to a chosen point, and answers there from a script.

    All other requests are passed on to a real server, where one is given. Otherwise a stub server admits
    clients and answers statements, simple or prepared: each has an empty result, and transactions begin and end.
    It runs in a thread with an event loop of its own, so a program under test may block. Its counters can be read
    from any thread, also after `close()`.

    Args:
        script: Its answers. At each point the first one that applies is sent.
        host: Where a real server is; by default there is none.
        port: Where that listens, unencrypted. Given with `host`.
        login: The authentication method of the stub server: "trust" by default, "password" in clear text, "md5" or
            "scram". It accepts any password, and with "scram", which authenticates the server as well, none.
        parameters: Parameters that the stub server reports (`server_version`, ...), where they differ from PostgreSQL 18.
        tls: Certificates with which it speaks TLS to clients that ask for it; by default it answers that it has none.
        listen_port: Its own port; by default any.

    Raises:
        ValueError: `host` without `port` or the other way round, or `login` or `parameters` besides them.
    """

    def __init__(
        self,
        *script: Refusal,
        host: str | None = None,
        port: int | None = None,
        login: Login = "trust",
        parameters: Mapping[str, str] | None = None,
        tls: TlsCertificates | None = None,
        listen_port: int = 0,
    ) -> None:
        super().__init__(listen_port)
        if (host is None) != (port is None):
            raise ValueError(f"a real server needs host= and port=, not host={host!r} and port={port!r}")
        if host is not None and (login != "trust" or parameters is not None):
            raise ValueError(f"login= and parameters= are for a stub server; host={host!r} has its own")
        self._target = None if host is None or port is None else (host, port)
        self._login = login
        self._parameters = dict(parameters or {})
        self._proxy_state = ProxyState(self._target or (self.host, 0), None if tls is None else tls.server_context())
        self._script = Script(script, self._count_admitted)
        self._statements: list[str] = []
        self._attempted_at: list[float] = []

    def __repr__(self) -> str:
        behind = "" if self._target is None else " before {}:{}".format(*self._target)
        return f"<ScriptedServer {self.host}:{self._listen_port}{behind}>"

    def dsn(self, dsn: str | None = None) -> str:
        """Point a server's URL here, everything else as it is.

        Args:
            dsn: The real server's. Where there is none, by default some user's and some database's.

        Raises:
            ValueError: There is a real server, and its URL was left out.
        """
        if dsn is None and self._target is not None:
            raise ValueError("a real server stands behind this one, and knows its own users only: give dsn() its URL")
        return super().dsn(dsn or "postgresql://scripted:secret@localhost/scripted")

    @property
    def attempts(self) -> int:
        """How many connections have arrived."""
        return len(self._attempted_at)

    @property
    def attempted_at(self) -> tuple[float, ...]:
        """When each of them arrived, in seconds of a monotonic clock."""
        return tuple(self._attempted_at)

    @property
    def open_connections(self) -> int:
        """How many clients are connected, those included that were refused and have not disconnected yet."""
        return len(self._running)

    @property
    def sent(self) -> tuple[Refusal, ...]:
        """What the script has sent, in order."""
        return tuple(self._script.sent)

    @property
    def statements(self) -> tuple[str, ...]:
        """The SQL of all statements that clients wanted executed, in order, those included that the script refused."""
        return tuple(self._statements)

    def _count_admitted(self) -> int:
        return sum(relay.was_admitted and relay.state is not State.ENDED for relay in self._running)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time()
        self._attempted_at.append(now)
        self._script.begin(now)
        number = len(self._attempted_at)
        stub_server = None if self._target is not None else StubServer(number, self._login, self._parameters)
        self._run(
            ScriptedRelay(
                self._proxy_state, Stream(reader, writer), number, self._script, self._statements, stub_server
            )
        )
