"""Says from a text alone whether its failure undoes all of it, and whether it may end a transaction."""

from __future__ import annotations

from resilient_pool.sql.lexer import Backslash, Kind, Token, tokens

# Statements that are one transaction, or a part of one. What is not here may commit on its way: CALL and DO run code that
# may, VACUUM, CLUSTER, ANALYZE and REINDEX have a transaction for each table, and COMMIT PREPARED ends another one.
_ATOMIC = frozenset(
    {
        *("select", "with", "values", "table", "show", "(", "insert", "update", "delete", "merge", "copy", "truncate"),
        *("create", "alter", "drop", "comment", "grant", "revoke", "reassign", "security", "import", "refresh", "lock"),
        *("set", "reset", "explain", "notify", "listen", "unlisten", "declare", "fetch", "move", "close", "execute"),
        *("prepare", "deallocate", "begin", "start", "savepoint", "release", "commit", "rollback", "end", "abort"),
    }
)
_DEFINING = frozenset({"create", "alter", "drop", "refresh"})
_BEYOND_TRANSACTIONS = frozenset({"database", "tablespace", "system", "subscription"})
"""CREATE, ALTER and DROP of these cannot run in a transaction block, or act beyond it."""
_OUTSIDE_TRANSACTIONS = frozenset(
    {
        *(
            "dblink",
            "dblink_exec",
            "dblink_open",
            "dblink_fetch",
            "dblink_close",
            "dblink_send_query",
            "dblink_get_result",
        ),
        *("lo_export", "pg_file_write", "pg_file_rename", "pg_file_unlink"),
        *("pg_create_physical_replication_slot", "pg_create_logical_replication_slot", "pg_drop_replication_slot"),
        *("pg_copy_physical_replication_slot", "pg_copy_logical_replication_slot", "pg_replication_slot_advance"),
        *("pg_logical_slot_get_changes", "pg_logical_slot_get_binary_changes", "pg_logical_emit_message"),
        *("pg_terminate_backend", "pg_cancel_backend", "pg_promote", "pg_switch_wal", "pg_create_restore_point"),
    }
)
"""Functions whose effects no rollback undoes: in another session, in files, on the server as a whole."""
_IN_A_BODY = frozenset({"select", "values", "table", "with", "insert", "update", "delete", "merge", "return", "end"})
"""What a statement of BEGIN ATOMIC may begin with, and its END."""
_FILLERS = frozenset({"work", "transaction"})
_LONGEST_HEAD = 4


class Boundaries:
    """Sees the tokens of one text, and where its statements begin and end.

    Args:
        sql: The text. It is read anew only if a setting of the server decides where a string in it ends.
    """

    def __init__(self, sql: str) -> None:
        self._sql = sql
        self._head: list[Token] = []
        self._last = Token(Kind.SIGN, ";")
        self._body = 0
        self._doubted = self._ends = self._several = self._ended = self._commits = False

    def take(self, token: Token) -> None:
        """Take note of the next token."""
        last, self._last = self._last, token
        if token.kind is Kind.DOUBT:
            self._doubted = True
        elif self._body:
            self._follow_body(token, last)
        elif token == (Kind.SIGN, ";"):
            self._end_statement()
        else:
            self._several = self._several or self._ended
            if len(self._head) < _LONGEST_HEAD:
                self._head.append(token)
            if token.kind is Kind.WORD and self._word(0) in _DEFINING:
                self._commits = self._commits or token.text == "concurrently"
                if token.text == "atomic" and last == (Kind.WORD, "begin"):
                    self._body = 1
            self._commits = self._commits or self._acts_outside(token, last)

    def _acts_outside(self, token: Token, last: Token) -> bool:
        if token.kind is Kind.WORD and token.text == "program":
            return self._word(0) == "copy" and last.text in {"to", "from"}
        return token.kind in {Kind.WORD, Kind.QUOTED} and token.text in _OUTSIDE_TRANSACTIONS

    def _follow_body(self, token: Token, last: Token) -> None:
        # BEGIN ATOMIC ... END: the statements of a function, of which CASE is the only other thing that has an END. But both
        # words may also be names of columns: what cannot stand in a body shows that it has ended unnoticed.
        if last == (Kind.SIGN, ";") and token.kind is Kind.WORD and token.text not in _IN_A_BODY:
            self._ends = self._several = True
        if token.kind is Kind.WORD and last.text not in {".", "as"}:
            self._body += (token.text == "case") - (token.text == "end")

    def _end_statement(self) -> None:
        first = self._word(0)
        if first == "prepare":
            ends = self._word(1) == "transaction" and self._kind(2) is Kind.LITERAL
        elif first == "rollback":
            ends = self._word(2 if self._word(1) in _FILLERS else 1) != "to"
        else:
            ends = first in {"commit", "end", "abort"}
        self._ends = self._ends or ends
        if self._head:
            unknown = first not in _ATOMIC
            beyond = first in _DEFINING and self._word(1) in _BEYOND_TRANSACTIONS
            self._commits = self._commits or unknown or beyond or self._word(1) == "prepared"
        self._head.clear()
        self._ended = True

    def _word(self, at: int) -> str:
        # A parenthesis may open a statement.
        token = self._head[at] if at < len(self._head) else None
        return token.text if token is not None and token.kind in {Kind.WORD, Kind.SIGN} else ""

    def _kind(self, at: int) -> Kind | None:
        return self._head[at].kind if at < len(self._head) else None

    @property
    def is_atomic(self) -> bool:
        """Whether the text is certain to be one statement that takes effect as a whole or not at all.

        Several statements in one text may hold a COMMIT; CALL and DO run code that may; and what PostgreSQL refuses inside a
        transaction block, and everything CONCURRENTLY, commits on its way: an error says then nothing about what came before.
        """
        if self._doubted or self._body or self._several:
            return False
        self._end_statement()
        return not self._commits

    @property
    def ends_transaction(self) -> bool:
        """Whether the text may hold a statement that ends the transaction it runs in."""
        self._end_statement()
        if self._ends or self._body:
            return True
        return self._doubted and _may_end_either_way(self._sql)


def _may_end_either_way(sql: str) -> bool:
    # Where a backslash stands before a quote, a setting of the server says where the string ends. Read the other way the
    # text has often no end: PostgreSQL refuses it as a whole then.
    whole = 0
    for backslash in (Backslash.PLAIN, Backslash.ESCAPES):
        boundaries = Boundaries("")
        for token in tokens(sql, backslash):
            boundaries.take(token)
        if not boundaries._doubted:  # noqa: SLF001
            whole += 1
            if boundaries.ends_transaction:
                return True
    return not whole


def ends_transaction(sql: str) -> bool:
    """Whether the text may hold a statement that ends the transaction it runs in.

    `ROLLBACK TO` a savepoint does not, nor does `PREPARE name AS`, nor the END of a function's body. What cannot be read
    for certain may.
    """
    boundaries = Boundaries(sql)
    for token in tokens(sql):
        boundaries.take(token)
    return boundaries.ends_transaction
