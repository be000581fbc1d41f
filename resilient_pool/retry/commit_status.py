"""Decides what became of a COMMIT whose answer was lost, from what the server says. It asks nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

RETENTION = 86_400.0
"""For how many seconds the absence of a token proves anything. Rows of the commit log are kept for longer than that."""


class CommitStatus(Enum):
    """What became of a transaction."""

    COMMITTED = "committed"
    """It took effect."""
    ABORTED = "aborted"
    """It left no effect, and cannot have one later."""
    IN_PROGRESS = "in_progress"
    """It is not decided yet: ask again."""
    ELSEWHERE = "elsewhere"
    """This server does not know, but another one may: ask again, on another connection."""
    UNKNOWN = "unknown"
    """No server knows, now or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A stretch of one server's life in which no transaction id is given twice.

    A clean restart does not end it. A crash does, also one of a single backend that the postmaster outlives, and so does a
    failover: what was not yet on disk, or not yet on the standby, is forgotten there, and its ids are given to others.

    Attributes:
        system: The system identifier.
        timeline: The timeline that is written now, as eight hexadecimal digits.
        stats_reset: Since when its statistics count; every crash begins them anew, and a standby has its own.
        started: When it was started.
        asked_at: When it said all this, by its own clock, as seconds since 1970.
        checkpoint_at: When its last checkpoint began, likewise, in whole seconds; a clean shutdown makes one.
    """

    system: str
    timeline: str
    stats_reset: str
    started: float = 0.0
    asked_at: float = 0.0
    checkpoint_at: float = 0.0

    def goes_on_in(self, later: Epoch) -> bool:
        """Whether a server that was asked later is in this epoch still.

        A copy that was made while the server was shut down has all of it, the statistics too, and gives the same ids to
        others. It is another server if it was started before this one was asked; and if its last checkpoint was made before,
        it never had what a clean restart of this one would have kept.
        """
        if (self.system, self.timeline, self.stats_reset) != (later.system, later.timeline, later.stats_reset):
            return False
        restarted = later.started > self.asked_at and later.checkpoint_at >= int(self.asked_at)
        return later.started == self.started or restarted


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A row in the commit log, written inside the transaction that it stands for.

    Attributes:
        value: Its key.
        log: Which table it is in: another after the table was made anew, or emptied by TRUNCATE.
        written_at: When it was written, by the server's clock, as seconds since 1970.
    """

    value: str
    log: str
    written_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitToken:
    """What is known of a transaction before its COMMIT is sent.

    Attributes:
        xid: Its id; `None` if the server could not be asked.
        epoch: When the id was given; `None` if the server did not know.
        token: Its row in the commit log; `None` without one.
        nothing_written: Whether it is certain that its COMMIT decides nothing: the server was in recovery.
    """

    xid: int | None = None
    epoch: Epoch | None = None
    token: Token | None = None
    nothing_written: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class XactStatusReply:
    """What a server says of a transaction id.

    Attributes:
        status: What `pg_xact_status` said; `None` if it has forgotten the id, or never knew it.
        epoch: The present epoch; `None` if the server does not know.
        in_recovery: Whether it is a standby.
    """

    status: str | None
    epoch: Epoch | None
    in_recovery: bool = False


_ANSWERS = {
    "committed": CommitStatus.COMMITTED,
    "aborted": CommitStatus.ABORTED,
    "in progress": CommitStatus.IN_PROGRESS,
}


def interpret_status(mark: CommitToken, reply: XactStatusReply) -> CommitStatus:
    """Say what a reply means for the transaction of `mark`.

    The status of an id means something only in the epoch that gave it: in any other it may be a stranger's. A standby's
    word does not count, nor that of another database system or of one that was left behind by a failover: what such a
    server has not heard of looks to it like what never was.
    """
    if reply.in_recovery or _is_another_server(mark.epoch, reply.epoch):
        return CommitStatus.ELSEWHERE
    if mark.xid is None or mark.epoch is None or reply.epoch is None or not mark.epoch.goes_on_in(reply.epoch):
        return CommitStatus.UNKNOWN
    return _ANSWERS.get(reply.status or "", CommitStatus.UNKNOWN)


def _is_another_server(then: Epoch | None, now: Epoch | None) -> bool:
    return then is not None and now is not None and (now.system != then.system or now.timeline < then.timeline)


def interpret_token(token: Token, *, fenced: bool | None, log: str, now: float) -> CommitStatus:
    """Say what the row of a token means, after an attempt to insert it.

    Args:
        token: What was inserted before COMMIT.
        fenced: Whether the row is the one that the attempt inserted; `None` if there is none.
        log: Which table was looked into.
        now: The present time by the server's clock, as seconds since 1970.
    """
    if fenced is None:
        return CommitStatus.IN_PROGRESS
    if not fenced:
        return CommitStatus.COMMITTED
    # Only one can insert it: the transaction's own row can never come now. That it was never there is certain only
    # while no row of its age was deleted.
    is_kept = log == token.log and now - token.written_at < RETENTION
    return CommitStatus.ABORTED if is_kept else CommitStatus.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one server, asked on one connection, can do about transactions.

    Attributes:
        ids: Whether it knows ids, and what became of them.
        epoch: Whether the role may ask for the epoch.
        epoch_for_all: Whether every role may.
        log: Whether the role may write to the commit log, and there is one.
    """

    ids: bool = False
    epoch: bool = False
    epoch_for_all: bool = False
    log: bool = False
