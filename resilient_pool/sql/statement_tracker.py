"""What one transaction has sent so far, and what follows from that for its end: `StatementTracker`."""

from __future__ import annotations

import re

from resilient_pool.sql.read_only import StatementReader

_MOST_TEXTS = 200
"""A transaction of more different texts is not checked text by text after a failure."""

# These leave the session as it was: its role, and whether it may write. What a trigger or a function in them does is not
# seen. A lock at the end of a SELECT hides what is otherwise a plain read.
_CHANGES_ROWS_ONLY = re.compile(r"\s*(?:insert|update|delete|merge|copy)\b", re.IGNORECASE)
_LOCK = re.compile(
    r"\bfor\s+(?:no\s+key\s+update|update|key\s+share|share)(?:\s+of\s+[\w., ]+)?(?:\s+nowait|\s+skip\s+locked)?\s*;?\s*$",
    re.IGNORECASE,
)


class StatementTracker:
    """Is given every text that is sent inside one transaction.

    Args:
        reader: Knows which texts look like reads.

    Attributes:
        may_write: Whether anything was sent that is not plainly a read.
        may_be_anything: Whether anything was sent of which no text is known.
        ended_by_text: Whether a text was sent that may have ended the transaction.
        may_change_session: Whether anything was sent that may change the role, or whether the transaction may write.
    """

    __slots__ = (
        "_reader",
        "_reads",
        "_texts",
        "ended_by_text",
        "may_be_anything",
        "may_change_session",
        "may_write",
    )

    def __init__(self, reader: StatementReader) -> None:
        self._reader = reader
        self._texts: dict[str, None] = {}
        self._reads = True
        self.may_write = self.may_be_anything = self.ended_by_text = self.may_change_session = False

    def sent(self, sql: str | None) -> None:
        """Take note of a text that is about to be sent; `None` stands for anything at all."""
        if sql is None:
            self.may_write = self.may_be_anything = self.may_change_session = True
            self._reads = False
        elif sql not in self._texts:
            self._read(sql)

    def _read(self, sql: str) -> None:
        statement = self._reader.read(sql)
        if not statement.is_plain_read:
            self.may_write = True
            self.ended_by_text = self.ended_by_text or statement.ends_transaction
            self.may_change_session = self.may_change_session or not self._leaves_session(sql)
            self._reads = self._reads and statement.looks_like_read
        if len(self._texts) < _MOST_TEXTS:
            self._texts[sql] = None
        else:
            self._reads = False

    @property
    def reads(self) -> tuple[str, ...] | None:
        """All that was sent, if every text looks like a read, else `None`."""
        return tuple(self._texts) if self._reads else None

    @property
    def may_have_ended(self) -> bool:
        """Whether the application itself may have ended the transaction."""
        return self.ended_by_text or self.may_be_anything

    def _leaves_session(self, sql: str) -> bool:
        if _CHANGES_ROWS_ONLY.match(sql):
            return True
        unlocked = _LOCK.sub("", sql)
        return unlocked != sql and self._reader.is_plain_read(unlocked)
