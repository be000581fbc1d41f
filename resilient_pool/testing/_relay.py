"""One proxied connection and its faults; everything here runs in the event loop of the service it is part of."""

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
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_KEY_DATA = struct.Struct("!i")
# Without the first two the client would never send the data that the statement is waiting for; the third is no answer.
_NEVER_WITHHELD = frozenset({_messages.COPY_IN, _messages.COPY_BOTH, _messages.PARAMETER})
_ENDS_OF_ANSWERS = frozenset({_messages.COMPLETE, _messages.ERROR, _messages.EMPTY, _messages.SUSPENDED})


class State(enum.Enum):
    """What became of a connection."""

    OPEN = "open"
    FORGOTTEN = "forgotten"
    ENDED = "ended"


class AcceptMode(enum.Enum):
    """How a new connection is answered."""

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
class ArmedFault:
    """A fault that is armed for the next matching request.

    Attributes:
        matches: Predicate on a request: its SQL and its arguments, as bytes.
        reaches_server: Whether the server gets the request.
        instead: What it gets in the place of the request; nothing by default.
        after_bytes: How much of the answer the client gets.
        error_response: An ErrorResponse to send after that much of the answer.
        then: How the connection ends for the client; "ready": it goes on, with the server's own ReadyForQuery.
        server_sees_close: Whether the server's side is closed too.
    """

    matches: Callable[[bytes], bool] = lambda _: True
    reaches_server: bool
    instead: bytes = b""
    after_bytes: int = 0
    error_response: bytes = b""
    then: Ending | Literal["ready"]
    server_sees_close: bool


class Traffic:
    """What passes, or is held back, on one connection or on all of a proxy.

    Attributes:
        delay: For how many seconds everything is held back, in either direction.
        passable: Whether anything passes at all.
        armed: Faults that wait for their request.
        bytes_to_server: How many bytes were passed to the server.
        bytes_to_client: How many bytes were passed to clients.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.passable = asyncio.Event()
        self.passable.set()
        self.armed: list[ArmedFault] = []
        self.bytes_to_server = 0
        self.bytes_to_client = 0

    def undo(self) -> None:
        """Let everything pass again, and disarm what has not happened yet."""
        self.delay = 0.0
        self.armed.clear()
        self.passable.set()


class ProxyState(Traffic):
    """Settings and counters that all connections of one proxy share."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None) -> None:
        super().__init__()
        self.target = target
        self.tls = tls
        self.tls_refused = False
        self.accept_mode = AcceptMode.SERVE
        self.error = b""
        self.accepted = 0
        self.fired = 0


class Relay(Traffic):
    """One connection: a client's side, the server's side, and what passes between them, message by message."""

    def __init__(self, proxy_state: ProxyState, client: Stream, number: int) -> None:
        super().__init__()
        self.number = number
        self.state = State.OPEN
        self.client_connected = True
        self.parameters: dict[str, str] = {}
        self.backend_pid: int | None = None
        self.startup_error: str | None = None
        self._proxy_state = proxy_state
        self._client = client
        self._server: Stream | None = None
        self._from_client = _messages.Splitter(untyped=True)
        self._from_server = _messages.Splitter(untyped=False)
        self._requests = _messages.RequestReader()
        self._rounds_answered = 0
        self._in_transaction = False
        self._firing: ArmedFault | None = None
        self._firing_round = 0
        self._withheld = b""
        self._withheld_length = 0

    @property
    def accept_mode(self) -> AcceptMode:
        """How the client is answered."""
        return self._proxy_state.accept_mode

    @property
    def is_open(self) -> bool:
        """Whether a server would count it as a connection."""
        return self.client_connected and self.state is State.OPEN

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
                await self._handshake()
        finally:
            self.abort()

    def end(self, how: Ending, *, server_sees_close: bool) -> None:
        """End the connection as the client is to see it, and perhaps on the server's side too."""
        if self.state is State.ENDED or not self.client_connected:
            return
        self.state = State.FORGOTTEN if how == "hang" else State.ENDED
        if how == "hang":
            return
        close = _reset if how == "rst" else _half_close
        close(self._client.writer)
        if server_sees_close and self._server is not None:
            close(self._server.writer)

    def abort(self) -> None:
        """Abort both sides at once."""
        self.client_connected = False
        for side in (self._client, self._server):
            if side is not None:
                side.writer.transport.abort()

    # Startup

    async def _handshake(self) -> None:
        await self._wait_until_passable()
        mode = self.accept_mode
        if mode is AcceptMode.HANG:
            self.state = State.FORGOTTEN
            await self._discard_input()
        elif mode in {AcceptMode.FIN, AcceptMode.RST}:
            await self._reject("rst" if mode is AcceptMode.RST else "fin")
        else:
            await self._start_session(await self._first_request())

    async def _first_request(self) -> _messages.Message:
        while True:
            message = await self._first_message()
            if message.code not in {_messages.TLS_REQUEST, _messages.GSS_REQUEST}:
                return message
            shared = self._proxy_state
            if message.code == _messages.TLS_REQUEST and shared.tls is not None and not shared.tls_refused:
                await self._send(b"S")
                await self._client.writer.start_tls(shared.tls)
            else:
                await self._send(b"N")

    async def _first_message(self) -> _messages.Message:
        while (message := self._from_client.next()) is None:
            data = await self._receive()
            if not data:
                raise EOFError
            self._from_client.feed(data)
        return message

    async def _start_session(self, request: _messages.Message) -> None:
        if self.accept_mode is AcceptMode.ERROR and request.code != _messages.CANCEL_REQUEST:
            await self._send(self._refusal(request))
            await self._reject("fin")
            return
        try:
            self._server = await self._connect_to_server()
        except OSError:
            _reset(self._client.writer)
            raise
        if self.state is State.ENDED:  # by a fault during the connect, when there was no server side to end
            self._server.writer.transport.abort()
            await self._discard_input()
            return
        self._proxy_state.accepted += 1
        if request.code != _messages.CANCEL_REQUEST:
            self.parameters = _messages.startup_parameters(request)
        self._from_client.session_started()
        self._pass_to_server(self._server, request)
        async with asyncio.TaskGroup() as directions:
            directions.create_task(self._relay_requests(self._server))
            directions.create_task(self._relay_answers(self._server))

    def _refusal(self, _request: _messages.Message) -> bytes:
        return self._proxy_state.error

    async def _connect_to_server(self) -> Stream:
        return Stream(*await asyncio.open_connection(*self._proxy_state.target, limit=_CHUNK))

    async def _reject(self, how: Ending) -> None:
        self.end(how, server_sees_close=True)
        await self._discard_input()

    async def _discard_input(self) -> None:
        while await self._receive():
            pass

    async def _receive(self) -> bytes:
        """Read what the client sends, and hold it back for as long as it must be; nothing at its end."""
        data = await _read(self._client.reader)
        await self._wait_until_passable()
        return data

    async def _send(self, data: bytes) -> None:
        if self.state is State.ENDED:  # by a fault during the handshake
            raise EOFError
        self._client.writer.write(data)
        await self._client.writer.drain()

    # Relaying

    async def _relay_requests(self, server: Stream) -> None:
        self._read_requests(server)
        while data := await self._receive():
            if self.state is State.OPEN:
                self._from_client.feed(data)
                self._read_requests(server)
                await _drain(server.writer)
        self.client_connected = False
        if self.state is State.OPEN:
            server.writer.close()
        self._client.writer.close()

    async def _relay_answers(self, server: Stream) -> None:
        while data := await _read(server.reader):
            await self._wait_until_passable()
            if self.state is State.OPEN:
                self._from_server.feed(data)
                self._read_answers()
                await _drain(self._client.writer)
        await self._wait_until_passable()
        if self.state is not State.OPEN:
            return
        if self._firing is not None and self._rounds_answered == self._firing_round:
            self._fire(self._firing)
        else:
            self._pass_to_client(self._from_server.rest())
            self.end("fin", server_sees_close=True)

    def _read_requests(self, server: Stream) -> None:
        while self.state is State.OPEN and (message := self._from_client.next()) is not None:
            sent = message
            if (fault := self._fault_for(message)) is not None:
                self._firing, self._firing_round = fault, self._requests.round
                if not fault.reaches_server and not fault.instead:
                    self._fire(fault)
                    return
                if not fault.reaches_server:
                    sent = _messages.Message(kind=message.kind, data=fault.instead)
            self._pass_to_server(server, sent)
            self._requests.passed(message)

    def _fault_for(self, message: _messages.Message) -> ArmedFault | None:
        subject = self._requests.read(message)
        if subject is None or self._firing is not None:
            return None
        for waiting in (self.armed, self._proxy_state.armed):
            for fault in waiting:
                if fault.matches(subject):
                    waiting.remove(fault)
                    return fault
        return None

    def _read_answers(self) -> None:
        while self.state is State.OPEN and (message := self._from_server.next()) is not None:
            if message.kind == _messages.KEY_DATA:
                self.backend_pid = _KEY_DATA.unpack_from(message.body)[0]
            if message.kind == _messages.ERROR and not self.is_ready:
                self.startup_error = _messages.sqlstate(message)
            self._deliver(message)
            if message.kind == _messages.READY:
                self._rounds_answered += 1
                self._in_transaction = message.body != _messages.NO_TRANSACTION

    def _deliver(self, message: _messages.Message) -> None:
        """Pass a message on, or withhold it; ReadyForQuery ends the answer that is withheld."""
        fault = self._firing
        if fault is None or self._rounds_answered != self._firing_round or message.kind in _NEVER_WITHHELD:
            self._pass_to_client(message.data)
            return
        self._withheld += message.data[: max(fault.after_bytes - len(self._withheld), 0)]
        self._withheld_length += len(message.data)
        if fault.then == "ready" and message.kind in _ENDS_OF_ANSWERS:
            # At once: a client that has sent Flush waits for it, before it sends Sync.
            self._pass_to_client(fault.error_response)
            fault = self._firing = dataclasses.replace(fault, error_response=b"")
        if message.kind == _messages.READY:
            self._fire(fault)
            if fault.then == "ready":
                self._pass_to_client(message.data)

    def _fire(self, fault: ArmedFault) -> None:
        # Never the whole answer, however much was asked for.
        self._pass_to_client(self._withheld[: max(self._withheld_length - 1, 0)] + fault.error_response)
        self._proxy_state.fired += 1
        self._firing, self._withheld, self._withheld_length = None, b"", 0
        if fault.then != "ready":
            self.end(fault.then, server_sees_close=fault.server_sees_close)

    def _pass_to_server(self, server: Stream, message: _messages.Message) -> None:
        _write(server, message.data)
        self.bytes_to_server += len(message.data)
        self._proxy_state.bytes_to_server += len(message.data)

    def _pass_to_client(self, data: bytes) -> None:
        _write(self._client, data)
        self.bytes_to_client += len(data)
        self._proxy_state.bytes_to_client += len(data)

    async def _wait_until_passable(self) -> None:
        seconds = self.delay + self._proxy_state.delay
        if seconds:
            await asyncio.sleep(seconds)
        while not (self.passable.is_set() and self._proxy_state.passable.is_set()):
            await self.passable.wait()
            await self._proxy_state.passable.wait()


async def _read(reader: asyncio.StreamReader) -> bytes:
    # A reset counts as end of file here.
    with contextlib.suppress(OSError):
        return await reader.read(_CHUNK)
    return b""


async def _drain(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        _socket_of(writer).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()


def _write(stream: Stream, data: bytes) -> None:
    # asyncio logs a warning for each write to a closing transport.
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
