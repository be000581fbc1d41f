"""One connection to a scripted server: it is relayed, and answered by the script where that has something to say."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import cast

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._relay import Ending, OneShot, Relay, Rules, Stream
from resilient_pool.testing._script import End, Point, Refusal, Script
from resilient_pool.testing._stand_in import SPOILT, StandIn

_CODE = struct.Struct("!i")
_AUTHENTICATION_OK = 0
_ENDS_OF_ANSWERS = frozenset({_messages.COMPLETE, _messages.ERROR, _messages.EMPTY, _messages.SUSPENDED})
_PASSED_ON = frozenset({_messages.READY, _messages.PARAMETER, _messages.COPY_IN, _messages.COPY_BOTH})


class Scene(Relay):
    """A flow whose client is answered by a script.

    Args:
        rules: Where the server is, and whether TLS is offered.
        client: The client's side.
        number: Which connection it is, counted from 1.
        script: What there is to say.
        statements: Where to write down the SQL that the client wants executed.
        stand_in: What answers the rest, or None: the server of `rules`.

    Attributes:
        was_let_in: Whether the script let the client's startup message pass.
    """

    def __init__(
        self,
        rules: Rules,
        client: Stream,
        number: int,
        script: Script,
        statements: list[str],
        stand_in: StandIn | None,
    ) -> None:
        super().__init__(rules, client, number)
        self.was_let_in = False
        self._script = script
        self._statements = statements
        self._stand_in = stand_in
        self._at_work: asyncio.Task[None] | None = None
        self._instead: bytes | None = None
        self._overruled_round: int | None = None
        self._words = b""
        self._farewell: Refusal | None = None

    async def run(self) -> None:
        """Serve the connection to its end."""
        try:
            await super().run()
        finally:
            if self._at_work is not None:
                self._at_work.cancel()

    # Before there is a session

    async def _first_message(self) -> _messages.Message:
        message = await super()._first_message()
        if message.code == _messages.TLS_REQUEST:
            await self._refuse_at(Point.TLS)
        return message

    async def _introduce(self, request: _messages.Message) -> None:
        if request.code != _messages.CANCEL_REQUEST:
            await self._refuse_at(Point.STARTUP)
            self.was_let_in = True
        await super()._introduce(request)

    async def _reach_server(self) -> Stream:
        if self._stand_in is None:
            return await super()._reach_server()
        near, far = socket.socketpair()
        served = Stream(*await asyncio.open_connection(sock=far))
        self._at_work = asyncio.get_running_loop().create_task(self._stand_in.serve(*served))
        return Stream(*await asyncio.open_connection(sock=near))

    async def _refuse_at(self, point: Point) -> None:
        if (line := self._next(point)) is not None:
            await self._say(line.words)
            await self._turn_away(_ending(line))
            raise EOFError

    # Requests

    def _arm_for(self, message: _messages.Message) -> None:
        if message.kind == b"P":
            line = self._next(Point.PARSE, message.body.split(b"\0")[1])
            self._requests.read(message)
        elif (subject := self._requests.read(message)) is not None:
            self._statements.append(subject.partition(b"\0")[0].decode(errors="replace"))
            line = self._next(Point.COMMIT, subject) or self._next(Point.QUERY, subject)
            if line is None:
                self._farewell = self._next(Point.IDLE, subject)
        else:
            return
        if line is not None:
            self._obey(line, message)

    def _obey(self, line: Refusal, message: _messages.Message) -> None:
        if line.then is not End.READY:
            self._firing_round = self._requests.round
            self._firing = OneShot(
                matches=lambda _: True,
                reaches_server=line.executed,
                after_bytes=0,
                then=_ending(line),
                server_sees_close=True,
                says=line.words,
            )
            return
        self._overruled_round, self._words = self._requests.round, line.words
        if not line.executed:
            self._instead = _rollback(message) if line.at is Point.COMMIT else _spoilt(message)

    def _pass_to_server(self, server: Stream, message: _messages.Message) -> None:
        if self._instead is not None:
            message = _messages.Message(kind=message.kind, data=self._instead)
            self._instead = None
        super()._pass_to_server(server, message)

    # Answers

    def _deliver(self, message: _messages.Message) -> None:
        if self._rounds_answered == self._overruled_round and message.kind not in _PASSED_ON:
            self._overrule(message)
            return
        line = self._next_before_the_session(message)
        if line is None:
            super()._deliver(message)
            if message.kind == _messages.READY:
                line, self._farewell = self._farewell, None
        if line is not None:
            self._pass_to_client(line.words)
            self.end(_ending(line), server_sees_close=True)

    def _next_before_the_session(self, message: _messages.Message) -> Refusal | None:
        if self.is_ready:
            return None
        if message.kind == _messages.READY:
            return self._next(Point.LOGIN)
        return self._next(Point.AUTHENTICATION) if self._ends_the_login(message) else None

    def _ends_the_login(self, message: _messages.Message) -> bool:
        if message.kind == _messages.AUTHENTICATION:
            return bool(_CODE.unpack_from(message.body)[0] == _AUTHENTICATION_OK)
        # A stand-in must refuse every proof by SCRAM. A real server's refusal goes before the script.
        return message.kind == _messages.ERROR and self._stand_in is not None

    def _overrule(self, message: _messages.Message) -> None:
        # ReadyForQuery is the server's own: it knows whether there is a transaction.
        if message.kind in _ENDS_OF_ANSWERS:
            self._pass_to_client(self._words)
            self._words = b""

    def _next(self, point: Point, sql: bytes = b"") -> Refusal | None:
        return self._script.next(point, asyncio.get_running_loop().time(), sql)


def _ending(line: Refusal) -> Ending:
    return cast("Ending", line.then.value)


def _spoilt(message: _messages.Message) -> bytes:
    """Compose what fails in place of a message: the same kind, of something that is not SQL or not there."""
    if message.kind == b"P":
        return _messages.compose(b"P", b"\0" + SPOILT + b"\0\0\0")
    if message.kind == b"E":
        return _messages.compose(b"E", SPOILT + b"\0" + _CODE.pack(0))
    return _messages.compose(b"Q", SPOILT + b"\0")


def _rollback(message: _messages.Message) -> bytes:
    """Compose a ROLLBACK in place of a COMMIT, since a server that refuses a COMMIT has rolled back."""
    if message.kind != b"E":
        return _messages.compose(b"Q", b"ROLLBACK\0")
    parse, bind = _messages.compose(b"P", b"\0ROLLBACK\0\0\0"), _messages.compose(b"B", b"\0\0" + b"\0\0" * 3)
    return parse + bind + _messages.compose(b"E", b"\0" + _CODE.pack(0))
