"""Tells from a text alone whether its failure undoes all of it, and whether it may end a transaction."""

from __future__ import annotations

from resilient_pool.policy.lexer import Kind, tokens

# These run code that may commit on its way: https://www.postgresql.org/docs/current/plpgsql-transactions.html
_MAY_COMMIT_INSIDE = frozenset({"call", "do"})


def is_atomic(sql: str) -> bool:
    """Tell whether the text is certain to be one statement that takes effect as a whole or not at all.

    Several statements in one text may hold a COMMIT, and so may the procedure that a CALL names or the block of a DO: an
    error says then nothing about what came before it.
    """
    ended = False
    for position, token in enumerate(tokens(sql)):
        if ended or token.kind is Kind.DOUBT:
            return False
        if position == 0 and token.text in _MAY_COMMIT_INSIDE:
            return False
        ended = token.kind is Kind.SIGN and token.text == ";"
    return True


# What ends a transaction, or may; BEGIN is only a warning inside one.
_ENDS = frozenset({"commit", "end", "rollback", "abort", "prepare"})


def ends_transaction(sql: str) -> bool:
    """Tell whether the text may hold a statement that ends the transaction it runs in.

    `ROLLBACK TO` a savepoint does not; what cannot be read for certain may. So may PREPARE, of which only `PREPARE
    TRANSACTION` does.
    """
    first, ending = True, ""
    for token in tokens(sql):
        if token.kind is Kind.DOUBT:
            return True
        if ending:
            if not (ending == "rollback" and token.text == "to"):
                return True
            ending = ""
        elif first and token.kind is Kind.WORD and token.text in _ENDS:
            ending = token.text
        first = token.kind is Kind.SIGN and token.text == ";"
    return bool(ending)
