"""Says from a text alone what it leaves in its session that no other session has: a listener, a lock, a setting."""

from __future__ import annotations

import re
from dataclasses import dataclass

from resilient_pool.sql.lexer import Kind, Token, tokens

# A text without any of these need not be read.
_HINT = re.compile(r"\blisten\b|\bset\b|advisory_lock", re.IGNORECASE)
_LOCKS = frozenset(
    {"pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"}
)
# Not the session's: they end with the transaction, or are its own.
_OF_THE_TRANSACTION = frozenset({"local", "transaction", "constraints"})
# The server reports these to its client, and PgBouncer and others set them again in each session that they give it.
_FOLLOWED = frozenset(
    {"application_name", "client_encoding", "datestyle", "names", "standard_conforming_strings", "time", "timezone"}
)
_LONGEST_HEAD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """What a text leaves in its session.

    Attributes:
        name: What it is, as an error names it.
        serves_transaction: Whether it does what was asked until the end of the transaction that it is in.
        instead: What does the same without a session of one's own.
    """

    name: str
    serves_transaction: bool
    instead: str


LISTENER = SessionState(name="LISTEN", serves_transaction=False, instead="")
LOCK = SessionState(
    name="a session's lock", serves_transaction=False, instead="take pg_advisory_xact_lock() in a transaction, "
)
SETTING = SessionState(
    name="SET", serves_transaction=True, instead="use SET LOCAL in a transaction, pass server_settings=, "
)


def session_state(sql: str) -> SessionState | None:
    """Return the first such thing that the text visibly leaves; `None` if there is none to be seen.

    It is no proof of anything: a function, or `set_config()`, can leave the same unseen.
    """
    if _HINT.search(sql) is None:
        return None
    head: list[Token] = []
    last = Token(Kind.SIGN, ";")
    for token in tokens(sql):
        if token == (Kind.SIGN, "(") and last.kind in {Kind.WORD, Kind.QUOTED} and last.text in _LOCKS:
            return LOCK
        last = token
        if token == (Kind.SIGN, ";"):
            head.clear()
        elif len(head) < _LONGEST_HEAD:
            head.append(token)
            if (found := _of_head([token.text for token in head])) is not None:
                return found
    return None


def _of_head(words: list[str]) -> SessionState | None:
    if words == ["listen"]:
        return LISTENER
    if words[:2] == ["set", "session"]:
        words = ["set", *words[2:]]
    if len(words) == 2 and words[0] == "set":  # noqa: PLR2004 - the word and the name
        return None if words[1] in _OF_THE_TRANSACTION | _FOLLOWED | {"session"} else SETTING
    return None
