"""One connection to a scripted server: answered by the script where a line applies, relayed otherwise."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._relay import ArmedFault, Ending, ProxyState, Relay, Stream
from resilient_pool.testing._script import End, Point, Refusal, Script
from resilient_pool.testing._stub_server import INVALID, StubServer

_CODE = struct.Struct("!i")
_AUTHENTICATION_OK = 0
_ENDS_OF_ANSWERS = frozenset({_messages.COMPLETE, _messages.ERROR, _messages.EMPTY, _messages.SUSPENDED})
_PASSED_ON = frozenset({_messages.READY, _messages.PARAMETER, _messages.COPY_IN, _messages.COPY_BOTH})


class ScriptedRelay(Relay):
    """A relay whose client is answered by a script.

    Args:
        proxy_state: Where the server is, and whether TLS is offered.
        client: The client's side.
        number: Which connection it is, counted from 1.
        script: The scripted answers.
        statements: List to which the SQL of each execution is appended.
        stub_server: What answers the rest, or None: the server of `proxy_state`.

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
        self._request_instead: bytes | None = None
        self._replaced_round: int | None = None
        self._replacement = b""
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
            await self._reject(_termination(line))
            raise EOFError

    # Requests

    def _match_fault(self, message: _messages.Message) -> None:
        if message.kind == b"P":
            line = self._next(Point.PARSE, message.body.split(b"\0")[1])
            self._requests.read(message)
        elif (subject := self._requests.read(message)) is not None:
            self._statements.append(subject.partition(b"\0")[0].decode(errors="replace"))
            line = self._next(Point.COMMIT, subject) or self._next(Point.QUERY, subject)
            if line is None:
                self._after_answer = self._next(Point.IDLE, subject)
        else:
            return
        if line is not None:
            self._apply(line, message)

    def _apply(self, line: Refusal, message: _messages.Message) -> None:
        if line.then is not End.READY:
            self._firing_round = self._requests.round
            self._firing = ArmedFault(
                matches=lambda _: True,
                reaches_server=line.executed,
                after_bytes=0,
                then=_termination(line),
                server_sees_close=True,
                error_response=line.error_response,
            )
            return
        self._replaced_round, self._replacement = self._requests.round, line.error_response
        if not line.executed:
            self._request_instead = _rollback(message) if line.at is Point.COMMIT else _invalid_request(message)

    def _pass_to_server(self, server: Stream, message: _messages.Message) -> None:
        if self._request_instead is not None:
            message = _messages.Message(kind=message.kind, data=self._request_instead)
            self._request_instead = None
        super()._pass_to_server(server, message)

    # Answers

    def _deliver(self, message: _messages.Message) -> None:
        if self._rounds_answered == self._replaced_round and message.kind not in _PASSED_ON:
            self._replace_answer(message)
            return
        line = self._next_before_session(message)
        if line is None:
            super()._deliver(message)
            if message.kind == _messages.READY:
                line, self._after_answer = self._after_answer, None
        if line is not None:
            self._pass_to_client(line.error_response)
            self.end(_termination(line), server_sees_close=True)

    def _next_before_session(self, message: _messages.Message) -> Refusal | None:
        if self.is_ready:
            return None
        if message.kind == _messages.READY:
            return self._next(Point.LOGIN)
        return self._next(Point.AUTHENTICATION) if self._ends_authentication(message) else None

    def _ends_authentication(self, message: _messages.Message) -> bool:
        if message.kind == _messages.AUTHENTICATION:
            return bool(_CODE.unpack_from(message.body)[0] == _AUTHENTICATION_OK)
        # The stub server refuses every proof by SCRAM. A real server's refusal takes precedence over the script.
        return message.kind == _messages.ERROR and self._stub_server is not None

    def _replace_answer(self, message: _messages.Message) -> None:
        # ReadyForQuery is the server's own: it knows whether there is a transaction.
        if message.kind in _ENDS_OF_ANSWERS:
            self._pass_to_client(self._replacement)
            self._replacement = b""

    def _next(self, point: Point, sql: bytes = b"") -> Refusal | None:
        return self._script.next(point, asyncio.get_running_loop().time(), sql)


def _termination(line: Refusal) -> Ending:
    return cast("Ending", line.then.value)


def _invalid_request(message: _messages.Message) -> bytes:
    """Compose a request of the same kind that fails: it names an invalid statement or portal."""
    if message.kind == b"P":
        return _messages.compose(b"P", b"\0" + INVALID + b"\0\0\0")
    if message.kind == b"E":
        return _messages.compose(b"E", INVALID + b"\0" + _CODE.pack(0))
    return _messages.compose(b"Q", INVALID + b"\0")


def _rollback(message: _messages.Message) -> bytes:
    """Compose a ROLLBACK in place of a COMMIT, since a server that refuses a COMMIT has rolled back."""
    if message.kind != b"E":
        return _messages.compose(b"Q", b"ROLLBACK\0")
    parse, bind = _messages.compose(b"P", b"\0ROLLBACK\0\0\0"), _messages.compose(b"B", b"\0\0" + b"\0\0" * 3)
    return parse + bind + _messages.compose(b"E", b"\0" + _CODE.pack(0))
