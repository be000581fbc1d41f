"""Decides what became of a COMMIT whose answer was lost, from what the server says. It asks nobody itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Answer(Enum):
    """What became of a transaction."""

    COMMITTED = "committed"
    """It took effect."""
    ABORTED = "aborted"
    """It left no effect, and cannot have one later."""
    IN_PROGRESS = "in_progress"
    """It is not decided yet: ask again."""
    UNKNOWN = "unknown"
    """This server cannot tell, now or later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A stretch of one server's life in which no transaction id is given twice.

    A clean restart does not end it. A crash does, also one of a single backend that the postmaster outlives, and so does a
    failover: what was not yet on disk, or not yet on the standby, is forgotten there, and its ids are given to others.

    Attributes:
        system: The system identifier.
        timeline: The timeline.
        stats_reset: Since when its statistics count; every crash begins them anew, and a standby has its own.
    """

    system: str
    timeline: int
    stats_reset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What is known of a transaction before its COMMIT is sent.

    Attributes:
        xid: Its id; `None` if it had none, or if nobody could be asked.
        epoch: When the id was given; `None` if the server could not tell.
        token: Its row in the commit log; `None` without one.
        nothing_written: Whether it is certain that it wrote nothing.
    """

    xid: int | None = None
    epoch: Epoch | None = None
    token: str | None = None
    nothing_written: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server says of a transaction id.

    Attributes:
        status: What `pg_xact_status` said; `None` if it has forgotten the id, or never knew it.
        epoch: The present epoch; `None` if the server cannot tell.
        in_recovery: Whether it is a standby.
    """

    status: str | None
    epoch: Epoch | None
    in_recovery: bool = False


_ANSWERS = {"committed": Answer.COMMITTED, "aborted": Answer.ABORTED, "in progress": Answer.IN_PROGRESS}


def judge(mark: Mark, reply: Reply) -> Answer:
    """Say what a reply means for the transaction of `mark`.

    The status of an id means something only in the epoch that gave it: in any other it may be a stranger's. A standby's
    word does not count: what it has not heard of yet looks to it like what never was.
    """
    if mark.xid is None or mark.epoch is None or reply.epoch != mark.epoch or reply.in_recovery:
        return Answer.UNKNOWN
    return _ANSWERS.get(reply.status or "", Answer.UNKNOWN)


def judge_token(*, fenced: bool | None) -> Answer:
    """Say what the row of a token means, after an attempt to insert it.

    Args:
        fenced: Whether the row is the one of whoever asked; `None` if there is none.
    """
    if fenced is None:
        return Answer.IN_PROGRESS
    # Whoever asks inserts the token himself. Only one can: if he did, the transaction's own row can never come.
    return Answer.ABORTED if fenced else Answer.COMMITTED
