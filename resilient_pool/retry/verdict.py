"""The vocabulary of failure: what was seen (`Failure`) and what is known about it (`Verdict`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from resilient_pool._validation import constructor_names_nearest, require_number


class Phase(Enum):
    """What the pool was doing when the failure was seen.

    Attributes:
        CONNECT: Opening a connection: no statement of the application's exists yet.
        CHECKOUT: Preparing an open connection for the application (ping, `setup`): its statement is not yet sent.
        EXECUTE: Running the application's statement.
        COMMIT: Waiting for the answer to COMMIT.
    """

    CONNECT = "connect"
    CHECKOUT = "checkout"
    EXECUTE = "execute"
    COMMIT = "commit"


class Fault(Enum):
    """The kind of trouble, named after its cure.

    Attributes:
        STALE: The connection had died unnoticed before it was used. Cure: another connection.
        UNREACHABLE: No connection can be opened now. Cure: wait and connect again.
        DISCONNECTED: An open connection was lost while it was in use. Cure: another connection.
        OVERLOADED: The server or a pooler lacks a resource. Cure: wait.
        CONTENTION: Another transaction was in the way. Cure: run the transaction again.
        WRONG_SERVER: The server cannot write: it is no longer the primary. Cure: connect again and find the new one.
        STATEMENT_CACHE: A prepared statement or a cached type is out of date. Cure: prepare again.
        POISONED: The driver's state is confused by a loss noticed half-way. Cure: another connection.
        PERMANENT: Neither waiting nor reconnecting helps. The error is the application's to see.
    """

    STALE = "stale"
    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    OVERLOADED = "overloaded"
    CONTENTION = "contention"
    WRONG_SERVER = "wrong_server"
    STATEMENT_CACHE = "statement_cache"
    POISONED = "poisoned"
    PERMANENT = "permanent"


class Outcome(Enum):
    """What the failed statement is known to have done.

    Attributes:
        NOT_EXECUTED: It never ran.
        ROLLED_BACK: It ran and left no effect.
        UNKNOWN: It may have taken effect.
    """

    NOT_EXECUTED = "not_executed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"


class Disposition(Enum):
    """What becomes of connections after a failure.

    Attributes:
        KEEP: The connection stays in use.
        DISCARD: The connection of the failure is closed.
        EXPIRE: Every connection opened before the failure is replaced before its next use.
    """

    KEEP = "keep"
    DISCARD = "discard"
    EXPIRE = "expire"


@constructor_names_nearest
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is known about one failure.

    Attributes:
        fault: The kind of trouble.
        outcome: What the statement is known to have done. `NOT_EXECUTED` and `ROLLED_BACK` are guarantees.
        connection: `KEEP` or `DISCARD` the connection on which it happened.
        others: `KEEP` or `EXPIRE` every connection opened before it happened.
        not_before: For how many seconds after it another attempt is useless; `None` (default) if that is not known. A call
            that must end sooner fails at once.
        only_for: For how many seconds after the first of several such failures there is hope that it passes; after that it
            is `PERMANENT`. `None` (default) for as long as the policy allows.
    """

    fault: Fault
    outcome: Outcome
    connection: Disposition = Disposition.DISCARD
    others: Disposition = Disposition.KEEP
    not_before: float | None = None
    only_for: float | None = None

    def __post_init__(self) -> None:
        for name in ("not_before", "only_for"):
            if (seconds := getattr(self, name)) is not None:
                require_number(name, seconds, unit="a number of seconds or None", least=0, above=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What was seen of one failure.

    Attributes:
        error: The exception, as it was raised.
        phase: What the pool was doing.
        sent: Whether any byte of the statement can have left this process. `False` is a guarantee.
        waking: Whether the server is inside its wake window (it was unreachable a moment ago and may still be starting).
        writable: Whether the pool expects a server that accepts writes.
        read_only_asked: Whether read-only was asked for: by the transaction's own option, or by a setting of the session, the
            role or the database, which every server has alike.
        in_recovery: Whether that server was found to be a standby afterwards; `None` if it was not asked, or did not say.
        initializing: Whether the application's `init` has raised it, on a new connection that was still open then.
        sslmode: Under which `sslmode` the connection was opened; `None` if that is not known.
    """

    error: Exception
    phase: Phase
    sent: bool = True
    waking: bool = False
    writable: bool = True
    read_only_asked: bool = False
    in_recovery: bool | None = None
    initializing: bool = False
    sslmode: str | None = None

    def chain(self) -> Iterator[BaseException]:
        """Yield the error and everything behind it, along `__cause__` and `__context__`, nearest first, each once."""
        queue: list[BaseException] = [self.error]
        seen: set[int] = set()
        while queue:
            error = queue.pop(0)
            if id(error) in seen:
                continue
            seen.add(id(error))
            yield error
            queue.extend(link for link in (error.__cause__, error.__context__) if link is not None)

    @property
    def sqlstates(self) -> tuple[str, ...]:
        """The SQLSTATEs along the chain, nearest first."""
        states = (getattr(error, "sqlstate", None) for error in self.chain())
        return tuple(state for state in states if isinstance(state, str))


class Classifier(Protocol):
    """What can judge a `Failure`. It must not block and should not raise."""

    def classify(self, failure: Failure) -> Verdict:
        """Say what is known about `failure`."""
        ...
