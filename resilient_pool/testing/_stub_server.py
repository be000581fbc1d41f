"""A stub of a PostgreSQL server: it admits clients, and every statement has an empty result."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import secrets
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._protocol import compose, error_response

Login = Literal["trust", "password", "md5", "scram"]
"""The authentication method."""

INVALID = b"refused by the script"
"""Refused wherever it stands for a statement or a portal, as every server would."""

_CHUNK = 1 << 16
_CODE = struct.Struct("!i")
_COUNT = struct.Struct("!h")
_SALT = b"salt"
_TEXT = 25
_PARAMETERS = MappingProxyType(
    {
        "server_version": "18.0",
        "server_encoding": "UTF8",
        "client_encoding": "UTF8",
        "DateStyle": "ISO, MDY",
        "TimeZone": "UTC",
        "integer_datetimes": "on",
        "standard_conforming_strings": "on",
    }
)
_TAGS = MappingProxyType(
    {
        "ABORT": "ROLLBACK",
        "DELETE": "DELETE 0",
        "END": "COMMIT",
        "INSERT": "INSERT 0 0",
        "SELECT": "SELECT 0",
        "START": "START TRANSACTION",
        "UPDATE": "UPDATE 0",
    }
)
_ACKNOWLEDGED = MappingProxyType({b"P": b"1", b"B": b"2", b"C": b"3"})
_WORDS = re.compile(rb"\s*([A-Za-z]+)(?:\s+(?:WORK\s+|TRANSACTION\s+)?(TO|PREPARED)\b)?", re.IGNORECASE)
_NUMBERED = re.compile(rb"\$(\d+)")
_FIRST_OF_SCRAM = re.compile(rb"SCRAM-SHA-256\0.*?r=([^,]+)", re.DOTALL)


class StubServer:
    """The server side of one connection.

    Args:
        pid: The process id that it reports.
        login: The authentication method. Any password is accepted, except with SCRAM, where the server would have to
            know it: there every proof is refused with 28P01.
        parameters: What the server says of itself, besides and instead of what PostgreSQL 18 says.
    """

    def __init__(self, pid: int, login: Login, parameters: Mapping[str, str]) -> None:
        self._pid = pid
        self._login = login
        self._parameters = {**_PARAMETERS, **parameters}
        self._authenticated = False
        self._requests = _messages.RequestReader()
        self._status = b"I"
        self._skipping_until_sync = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until the client leaves."""
        splitter = _messages.Splitter(untyped=True)
        try:
            with contextlib.suppress(OSError, ValueError):
                while data := await reader.read(_CHUNK):
                    splitter.feed(data)
                    while (message := splitter.next()) is not None:
                        if message.kind == _messages.TERMINATE:
                            return
                        splitter.session_started()
                        writer.write(self.answer(message))
        finally:
            writer.transport.abort()

    def answer(self, message: _messages.Message) -> bytes:
        """Answer one message."""
        if not message.kind:
            return b"" if message.code == _messages.CANCEL_REQUEST else self._request_password()
        if not self._authenticated:
            return self._check_password(message)
        subject = self._requests.read(message)
        if message.kind == b"S":
            self._skipping_until_sync = False
        return b"" if self._skipping_until_sync else self._answer(message, subject)

    # Authentication

    def _request_password(self) -> bytes:
        match self._login:
            case "password":
                return _authentication(3)
            case "md5":
                return _authentication(5, _SALT)
            case "scram":
                return _authentication(10, b"SCRAM-SHA-256\0\0")
            case _:
                return self._admit()

    def _check_password(self, proof: _messages.Message) -> bytes:
        if self._login != "scram":
            return self._admit()
        first = _FIRST_OF_SCRAM.match(proof.body)
        if first is None:
            return _messages.fatal_error("28P01", "password authentication failed: a stub server knows no password")
        nonce = first[1] + secrets.token_hex(9).encode()
        return _authentication(11, b"r=%b,s=%b,i=4096" % (nonce, base64.b64encode(_SALT)))

    def _admit(self) -> bytes:
        self._authenticated = True
        parameters = (compose(b"S", f"{name}\0{value}\0".encode()) for name, value in self._parameters.items())
        key = compose(b"K", _CODE.pack(self._pid) + _SALT)
        return _authentication(0) + b"".join(parameters) + key + self._ready()

    # Statements

    def _answer(self, message: _messages.Message, subject: bytes | None) -> bytes:
        match message.kind:
            case b"Q":
                answer = self._execute(message.body)
                self._skipping_until_sync = False
                return answer + self._ready()
            case b"E":
                # A portal of that name is as good as a statement that fails.
                return self._execute(INVALID if INVALID in message.body else subject or b"")
            case b"P" if INVALID in message.body:
                return self._execute(INVALID)
            case b"D":
                return self._describe(message.body)
            case b"S":
                return self._ready()
            case _:
                return compose(_ACKNOWLEDGED[message.kind]) if message.kind in _ACKNOWLEDGED else b""

    def _describe(self, body: bytes) -> bytes:
        no_rows = compose(b"n")
        if body[:1] != b"S":
            return no_rows
        numbers = _NUMBERED.findall(self._requests.prepared(body[1:].partition(b"\0")[0]))
        count = max(map(int, numbers), default=0)
        return compose(b"t", _COUNT.pack(count) + _CODE.pack(_TEXT) * count) + no_rows

    def _execute(self, sql: bytes) -> bytes:
        if INVALID in sql:
            return self._failed("42601", "syntax error")
        words = _WORDS.match(sql)
        if words is None:
            return compose(_messages.EMPTY)
        word = words[1].decode().upper()
        tag = _TAGS.get(word, word)
        ends = tag in {"COMMIT", "ROLLBACK"} and words[2] is None
        if self._status == b"E" and tag != "ROLLBACK" and not ends:
            return self._failed(
                "25P02", "current transaction is aborted, commands ignored until end of transaction block"
            )
        if ends:
            tag = "ROLLBACK" if self._status == b"E" else tag
            self._status = b"I"
        elif tag in {"BEGIN", "START TRANSACTION", "ROLLBACK"}:
            self._status = b"T"
        return compose(_messages.COMPLETE, f"{tag}\0".encode())

    def _failed(self, sqlstate: str, text: str) -> bytes:
        self._skipping_until_sync = True
        if self._status == b"T":
            self._status = b"E"
        return error_response({"S": "ERROR", "V": "ERROR", "C": sqlstate, "M": text})

    def _ready(self) -> bytes:
        return compose(_messages.READY, self._status)


def _authentication(code: int, rest: bytes = b"") -> bytes:
    return compose(b"R", _CODE.pack(code) + rest)
