"""Which statements' failures undo all of them."""

from __future__ import annotations

import pytest

from resilient_pool.policy.atomicity import ends_transaction, is_atomic


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (1);",
        "INSERT INTO t VALUES ('a;b') ON CONFLICT DO NOTHING -- ; COMMIT",
        "UPDATE t SET a = CASE WHEN b THEN 1 END",
        "/* CALL p() */ DELETE FROM t",
        "",
    ],
)
def test_one_plain_statement_is_atomic(sql):
    """Its error means that nothing of it stays."""
    assert is_atomic(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1); COMMIT; SELECT f()",
        "INSERT INTO t VALUES (1); SELECT 1",
        "CALL p()",
        "  -- a procedure\n call p()",
        "DO $$ BEGIN COMMIT; END $$",
        "INSERT INTO t VALUES ('unterminated",
    ],
)
def test_what_may_commit_on_its_way_is_not_atomic(sql):
    """Its error says nothing about what came before."""
    assert not is_atomic(sql)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("COMMIT", True),
        ("/* mine */ commit;", True),
        ("END", True),
        ("ABORT", True),
        ("ROLLBACK", True),
        ("ROLLBACK TO s", False),
        ("ROLLBACK TO s; COMMIT", True),
        ("ROLLBACK AND CHAIN", True),
        ("PREPARE TRANSACTION 'x'", True),
        ("INSERT INTO t VALUES (1); COMMIT; BEGIN", True),
        ("INSERT INTO t VALUES (1);", False),
        ("SELECT CASE WHEN a THEN 1 END; SELECT 2", False),
        ("SELECT 'COMMIT; COMMIT'", False),
        ("SELECT 'open", True),
        ("", False),
    ],
)
def test_a_text_that_may_end_its_transaction_is_known(sql, expected):
    """Only where a statement begins, and in doubt."""
    assert ends_transaction(sql) is expected
