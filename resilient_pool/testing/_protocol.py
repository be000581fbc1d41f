"""The PostgreSQL protocol's message boundaries, and which statement a request carries out; no I/O."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping

TLS_REQUEST = 80877103
GSS_REQUEST = 80877104
CANCEL_REQUEST = 80877102

_LENGTH = struct.Struct("!i")
_TYPED_HEADER = 5
_UNTYPED_HEADER = 4
_LEAST_LENGTH = 4

AUTHENTICATION = b"R"
KEY_DATA = b"K"
READY = b"Z"
ERROR = b"E"
COMPLETE = b"C"
EMPTY = b"I"
SUSPENDED = b"s"
PARAMETER = b"S"
TERMINATE = b"X"
COPY_IN = b"G"
COPY_BOTH = b"W"

Matcher = bytes | str | Callable[[bytes], bool] | None
"""Which request is meant: text that its SQL or its arguments contain, a function of both, or None: any."""

NO_TRANSACTION = b"I"
"""What ReadyForQuery says of a session that is not in a transaction."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One whole message with its header; those that begin a connection have an empty kind."""

    kind: bytes
    data: bytes

    @property
    def body(self) -> bytes:
        """What follows the header."""
        return self.data[_TYPED_HEADER if self.kind else _UNTYPED_HEADER :]

    @property
    def code(self) -> int:
        """The request or protocol number of a message without a type."""
        number: int = _LENGTH.unpack_from(self.data, _UNTYPED_HEADER)[0]
        return number


class Splitter:
    """Cuts a stream into messages.

    Args:
        untyped: Whether the stream begins with messages that have no type byte; `session_started()` ends that.
    """

    def __init__(self, *, untyped: bool) -> None:
        self._untyped = untyped
        self._buffer = bytearray()

    def session_started(self) -> None:
        """From here on every message has a type."""
        self._untyped = False

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> Message | None:
        """Take the next message, or None while it is not complete.

        Raises:
            ValueError: This is not the PostgreSQL protocol.
        """
        skip = 0 if self._untyped else 1
        if len(self._buffer) < skip + _LENGTH.size:
            return None
        length: int = _LENGTH.unpack_from(self._buffer, skip)[0]
        if length < _LEAST_LENGTH:
            raise ValueError(f"a message cannot be {length} bytes long")
        if len(self._buffer) < skip + length:
            return None
        data = bytes(self._buffer[: skip + length])
        del self._buffer[: skip + length]
        return Message(kind=data[:skip], data=data)

    def rest(self) -> bytes:
        """Take the incomplete message that a stream may end with."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data


class RequestReader:
    """Follows a client's requests: which one makes the server execute something, and in which round.

    A *round* ends with the server's ReadyForQuery. Round 0 is the connection's start; each simple query, function call
    and Sync ends one. So the answer to a request sent in round n is all that the server says after its nth ReadyForQuery.
    """

    def __init__(self) -> None:
        self.round = 1
        self._statements: dict[bytes, bytes] = {}
        self._portals: dict[bytes, bytes] = {}

    def read(self, message: Message) -> bytes | None:
        """Follow one message; return the SQL with its arguments if the server executes it, else None."""
        body = message.body
        match message.kind:
            case b"Q" | b"F":
                return body
            case b"P":
                name, _, sql = body.partition(b"\0")
                self._statements[name] = sql.partition(b"\0")[0]
            case b"B":
                portal, _, remainder = body.partition(b"\0")
                name, _, arguments = remainder.partition(b"\0")
                self._portals[portal] = self._statements.get(name, b"") + b"\0" + arguments
            case b"E":
                return self._portals.get(body.partition(b"\0")[0], b"")
            case b"C":
                known = self._statements if body[:1] == b"S" else self._portals
                known.pop(body[1:].partition(b"\0")[0], None)
            case _:
                pass
        return None

    def prepared(self, name: bytes) -> bytes:
        """Return the SQL of a statement that was parsed under that name."""
        return self._statements.get(name, b"")

    def passed(self, message: Message) -> None:
        """Count the round that this message ends."""
        if message.kind in {b"Q", b"F", b"S"}:
            self.round += 1


def matcher(matching: Matcher) -> Callable[[bytes], bool]:
    """Make the function that says whether a request is meant, from its SQL and its arguments."""
    if matching is None:
        return lambda _: True
    if callable(matching):
        return matching
    needle = matching.encode() if isinstance(matching, str) else matching
    return lambda subject: needle in subject


def startup_parameters(message: Message) -> dict[str, str]:
    """Read what a client says of itself when it connects."""
    words = [word.decode(errors="replace") for word in message.body[_LENGTH.size :].split(b"\0")]
    return {name: value for name, value in zip(words[0::2], words[1::2], strict=False) if name}


def with_parameters(message: Message, added: Mapping[str, str]) -> Message:
    """Add parameters to a startup message, except those that the client has set itself."""
    known = startup_parameters(message)
    extra = b"".join(f"{name}\0{value}\0".encode() for name, value in added.items() if name not in known)
    body = message.body[:-1] + extra + b"\0"
    return Message(kind=b"", data=_LENGTH.pack(len(body) + _LENGTH.size) + body)


def sqlstate(message: Message) -> str:
    """Read the code of an ErrorResponse; empty if it has none."""
    fields = message.body.split(b"\0")
    return next((field[1:].decode(errors="replace") for field in fields if field[:1] == b"C"), "")


def compose(kind: bytes, body: bytes = b"") -> bytes:
    """Compose a message that has a type."""
    return kind + _LENGTH.pack(len(body) + _LENGTH.size) + body


def error_response(fields: Mapping[str, str]) -> bytes:
    """Compose an ErrorResponse from its fields, in their order: "S" severity, "C" SQLSTATE, "M" message and others."""
    return compose(ERROR, b"".join(f"{code}{value}\0".encode() for code, value in fields.items()) + b"\0")


def fatal_error(sqlstate: str, text: str) -> bytes:
    """Compose the ErrorResponse with which a server turns a connection away."""
    return error_response({"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": text})
