"""One proxied connection and what can be done to it; everything here runs in the event loop of the service it is part of."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Literal, NamedTuple

from resilient_pool.testing import _protocol as _messages

Ending = Literal["fin", "rst", "hang"]

_CHUNK = 1 << 20
_LINGER_NOT = struct.pack("ii", 1, 0)
_KEY_DATA = struct.Struct("!i")


class State(enum.Enum):
    """What became of a connection."""

    OPEN = "open"
    FORGOTTEN = "forgotten"
    ENDED = "ended"


class Manner(enum.Enum):
    """How a new connection is met."""

    SERVE = "serve"
    HANG = "hang"
    FIN = "fin"
    RST = "rst"
    ERROR = "error"


class Stream(NamedTuple):
    """One side of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """A fault that waits for the request it is meant for.

    Attributes:
        matches: Whether it is meant for a request, told from its SQL and arguments.
        reaches_server: Whether the server gets the request.
        after_bytes: How much of the answer the client gets.
        then: What the client sees next.
        server_sees_close: Whether the server's side is closed too.
        says: What the client is told after that much of the answer, before the end.
    """

    matches: Callable[[bytes], bool]
    reaches_server: bool
    after_bytes: int
    then: Ending
    server_sees_close: bool
    says: bytes = b""


class Rules:
    """What holds for all connections that share it, and what they count together."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None) -> None:
        self.target = target
        self.tls = tls
        self.tls_refused = False
        self.manner = Manner.SERVE
        self.error = b""
        self.delay = 0.0
        self.passable = asyncio.Event()
        self.passable.set()
        self.armed: list[OneShot] = []
        self.accepted = 0
        self.fired = 0
        self.bytes_to_server = 0
        self.bytes_to_client = 0


class Relay:
    """One connection: a client's side, the server's side, and what passes between them, message by message."""

    def __init__(self, rules: Rules, client: Stream, number: int) -> None:
        self.number = number
        self.state = State.OPEN
        self.client_is_there = True
        self.parameters: dict[str, str] = {}
        self.backend_pid: int | None = None
        self.turned_away_with: str | None = None
        self.delay = 0.0
        self.passable = asyncio.Event()
        self.passable.set()
        self.armed: list[OneShot] = []
        self.bytes_to_server = 0
        self.bytes_to_client = 0
        self._rules = rules
        self._client = client
        self._server: Stream | None = None
        self._from_client = _messages.Splitter(untyped=True)
        self._from_server = _messages.Splitter(untyped=False)
        self._requests = _messages.RequestReader()
        self._rounds_answered = 0
        self._in_transaction = False
        self._firing: OneShot | None = None
        self._firing_round = 0
        self._withheld = b""
        self._withheld_length = 0

    @property
    def is_ready(self) -> bool:
        """Whether the server has let the client in."""
        return self._rounds_answered > 0

    @property
    def is_idle(self) -> bool:
        """Whether the session waits for a request, outside a transaction."""
        waits = self.is_ready and self._rounds_answered == self._requests.round
        return waits and not self._in_transaction and self.state is State.OPEN

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            with contextlib.suppress(OSError, ValueError, EOFError):
                await self._greet()
        finally:
            self.drop()

    def end(self, how: Ending, *, server_sees_close: bool) -> None:
        """End the connection as the client is to see it, and perhaps on the server's side too."""
        if self.state is State.ENDED or not self.client_is_there:
            return
        self.state = State.FORGOTTEN if how == "hang" else State.ENDED
        if how == "hang":
            return
        close = _reset if how == "rst" else _half_close
        close(self._client.writer)
        if server_sees_close and self._server is not None:
            close(self._server.writer)

    def drop(self) -> None:
        """Let go of both sides at once."""
        self.client_is_there = False
        for side in (self._client, self._server):
            if side is not None:
                side.writer.transport.abort()

    # The beginning

    async def _greet(self) -> None:
        await self._held_up()
        manner = self._rules.manner
        if manner is Manner.HANG:
            self.state = State.FORGOTTEN
            await self._listen_in_vain()
        elif manner in {Manner.FIN, Manner.RST}:
            await self._turn_away("rst" if manner is Manner.RST else "fin")
        else:
            await self._introduce(await self._first_request())

    async def _first_request(self) -> _messages.Message:
        while True:
            message = await self._first_message()
            if message.code == _messages.TLS_REQUEST and self._rules.tls is not None and not self._rules.tls_refused:
                await self._say(b"S")
                await self._client.writer.start_tls(self._rules.tls)
            elif message.code in {_messages.TLS_REQUEST, _messages.GSS_REQUEST}:
                await self._say(b"N")
            else:
                return message

    async def _first_message(self) -> _messages.Message:
        while (message := self._from_client.next()) is None:
            data = await self._client.reader.read(_CHUNK)
            if not data:
                raise EOFError
            await self._held_up()
            self._from_client.feed(data)
        return message

    async def _introduce(self, request: _messages.Message) -> None:
        if self._rules.manner is Manner.ERROR and request.code != _messages.CANCEL_REQUEST:
            await self._say(self._rules.error)
            await self._turn_away("fin")
            return
        try:
            self._server = await self._reach_server()
        except OSError:
            _reset(self._client.writer)
            raise
        if self.state is State.ENDED:  # by a fault that came in between, when there was no server's side to end yet
            self._server.writer.transport.abort()
            await self._listen_in_vain()
            return
        self._rules.accepted += 1
        if request.code != _messages.CANCEL_REQUEST:
            self.parameters = _messages.startup_parameters(request)
        self._from_client.began()
        self._pass_to_server(self._server, request)
        await self._relay(self._server)

    async def _reach_server(self) -> Stream:
        return Stream(*await asyncio.open_connection(*self._rules.target, limit=_CHUNK))

    async def _turn_away(self, how: Ending) -> None:
        self.end(how, server_sees_close=True)
        await self._listen_in_vain()

    async def _listen_in_vain(self) -> None:
        while await self._client.reader.read(_CHUNK):
            pass

    async def _say(self, data: bytes) -> None:
        if self.state is State.ENDED:  # by a fault that came in the middle of the greeting
            raise EOFError
        self._client.writer.write(data)
        await self._client.writer.drain()

    # The middle

    async def _relay(self, server: Stream) -> None:
        async with asyncio.TaskGroup() as directions:
            directions.create_task(self._relay_requests(server))
            directions.create_task(self._relay_answers(server))

    async def _relay_requests(self, server: Stream) -> None:
        self._read_requests(server)
        while data := await _read(self._client.reader):
            await self._held_up()
            if self.state is State.OPEN:
                self._from_client.feed(data)
                self._read_requests(server)
                await _drain(server.writer)
        await self._held_up()
        self.client_is_there = False
        if self.state is State.OPEN:
            server.writer.close()
        self._client.writer.close()

    async def _relay_answers(self, server: Stream) -> None:
        while data := await _read(server.reader):
            await self._held_up()
            if self.state is State.OPEN:
                self._from_server.feed(data)
                self._read_answers()
                await _drain(self._client.writer)
        await self._held_up()
        if self.state is State.OPEN:
            self._server_left()

    def _read_requests(self, server: Stream) -> None:
        while self.state is State.OPEN and (message := self._from_client.next()) is not None:
            self._arm_for(message)
            if self._firing is not None and not self._firing.reaches_server:
                self._fire(self._firing)
                return
            self._pass_to_server(server, message)
            self._requests.passed(message)

    def _arm_for(self, message: _messages.Message) -> None:
        subject = self._requests.read(message)
        if subject is None or self._firing is not None:
            return
        for waiting in (self.armed, self._rules.armed):
            for fault in waiting:
                if fault.matches(subject):
                    waiting.remove(fault)
                    self._firing, self._firing_round = fault, self._requests.round
                    return

    def _read_answers(self) -> None:
        while self.state is State.OPEN and (message := self._from_server.next()) is not None:
            if message.kind == _messages.KEY_DATA:
                self.backend_pid = _KEY_DATA.unpack_from(message.body)[0]
            if message.kind == _messages.ERROR and not self.is_ready:
                self.turned_away_with = _messages.sqlstate(message)
            self._deliver(message)
            if message.kind == _messages.READY:
                self._rounds_answered += 1
                self._in_transaction = message.body != _messages.NO_TRANSACTION

    def _deliver(self, message: _messages.Message) -> None:
        if self._is_withheld(message):
            self._withhold(message)
        else:
            self._pass_to_client(message.data)

    def _is_withheld(self, message: _messages.Message) -> bool:
        if self._firing is None or self._rounds_answered != self._firing_round:
            return False
        # Without these the client would never send the data that the statement is waiting for.
        return message.kind not in {_messages.COPY_IN, _messages.COPY_BOTH}

    def _withhold(self, message: _messages.Message) -> None:
        fault = self._firing
        assert fault is not None  # noqa: S101 - _is_withheld() has seen it
        self._withheld += message.data[: max(fault.after_bytes - len(self._withheld), 0)]
        self._withheld_length += len(message.data)
        if message.kind == _messages.READY:
            self._fire(fault)

    def _fire(self, fault: OneShot) -> None:
        # Never the whole answer, however much was asked for.
        self._pass_to_client(self._withheld[: max(self._withheld_length - 1, 0)] + fault.says)
        self._rules.fired += 1
        self._firing = None
        self.end(fault.then, server_sees_close=fault.server_sees_close)

    def _server_left(self) -> None:
        if self._firing is not None and self._rounds_answered == self._firing_round:
            self._fire(self._firing)
        else:
            self._pass_to_client(self._from_server.rest())
            self.end("fin", server_sees_close=True)

    def _pass_to_server(self, server: Stream, message: _messages.Message) -> None:
        _write(server, message.data)
        self.bytes_to_server += len(message.data)
        self._rules.bytes_to_server += len(message.data)

    def _pass_to_client(self, data: bytes) -> None:
        _write(self._client, data)
        self.bytes_to_client += len(data)
        self._rules.bytes_to_client += len(data)

    async def _held_up(self) -> None:
        seconds = self.delay + self._rules.delay
        if seconds:
            await asyncio.sleep(seconds)
        while not (self.passable.is_set() and self._rules.passable.is_set()):
            await self.passable.wait()
            await self._rules.passable.wait()


async def _read(reader: asyncio.StreamReader) -> bytes:
    # A reset is an end like any other to the side that is only told of it.
    with contextlib.suppress(OSError):
        return await reader.read(_CHUNK)
    return b""


async def _drain(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    _socket_of(writer).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    writer.transport.abort()


def _write(stream: Stream, data: bytes) -> None:
    # Whoever has left before the last answers is no news; asyncio would warn of each.
    if not stream.writer.is_closing():
        stream.writer.write(data)


def _half_close(writer: asyncio.StreamWriter) -> None:
    # Closing the socket with unread data in it would send a reset: say that we are done, and go on reading.
    with contextlib.suppress(OSError):
        if writer.transport.can_write_eof():
            writer.write_eof()
        else:
            writer.transport.close()
            _socket_of(writer).shutdown(socket.SHUT_WR)


def _socket_of(writer: asyncio.StreamWriter) -> socket.socket:
    found: socket.socket = writer.get_extra_info("socket")
    return found
