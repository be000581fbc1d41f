"""What a scripted server answers, and when; no I/O, the time is an argument."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._protocol import Matcher

_COMMIT = re.compile(rb"\s*(?:COMMIT|END)\b", re.IGNORECASE)


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
        """Find what is to be sent, and count it as sent.

        Args:
            at: Where a connection is.
            now: The time, in seconds.
            sql: The statement with its arguments, where there is one.
        """
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
