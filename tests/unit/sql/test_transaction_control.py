"""Which statements' failures undo all of them."""

from __future__ import annotations

import pytest

from resilient_pool.sql.read_only import StatementReader
from resilient_pool.sql.transaction_control import ends_transaction


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (1);",
        "INSERT INTO t VALUES ('a;b') ON CONFLICT DO NOTHING -- ; COMMIT",
        "UPDATE t SET a = CASE WHEN b THEN 1 END",
        "/* CALL p() */ DELETE FROM t",
        "CREATE INDEX i ON t (a)",
        "REFRESH MATERIALIZED VIEW v",
        "INSERT INTO concurrently VALUES (1)",
        "(SELECT 1)",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC INSERT INTO t VALUES (1); SELECT CASE WHEN a THEN 1 END; END;",
        "",
    ],
)
def test_one_plain_statement_is_atomic(sql):
    """Its error means that nothing of it stays."""
    assert StatementReader().read(sql).is_atomic


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1); COMMIT; SELECT f()",
        "INSERT INTO t VALUES (1); SELECT 1",
        "CALL p()",
        "  -- a procedure\n call p()",
        "DO $$ BEGIN COMMIT; END $$",
        "INSERT INTO t VALUES ('unterminated",
        "CREATE INDEX CONCURRENTLY i ON t (a)",
        "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS i ON t (a)",
        "drop index concurrently i",
        "REINDEX TABLE t",
        "REINDEX INDEX CONCURRENTLY i",
        "REINDEX (CONCURRENTLY) INDEX i",
        "REINDEX DATABASE d",
        "VACUUM t",
        "VACUUM (FULL) t",
        "ANALYZE t, u",
        "CLUSTER",
        "CREATE DATABASE d",
        "DROP DATABASE d",
        "ALTER DATABASE d SET TABLESPACE s",
        "CREATE TABLESPACE s LOCATION '/s'",
        "DROP TABLESPACE s",
        "ALTER SYSTEM SET work_mem = 1",
        "ALTER TABLE t DETACH PARTITION p CONCURRENTLY",
        "REFRESH MATERIALIZED VIEW CONCURRENTLY v",
        "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p",
        "DROP SUBSCRIPTION s",
        "ALTER SUBSCRIPTION s REFRESH PUBLICATION",
        "DISCARD ALL",
        "COMMIT PREPARED 'x'",
        "ROLLBACK PREPARED 'x'",
        "CHECKPOINT",
        "LOAD 'x'",
        "REPACK t",
        "SELECT dblink_exec('c', 'INSERT INTO t VALUES (1)'), f()",
        "SELECT x.pg_create_physical_replication_slot FROM f() x",
        "SELECT \"lo_export\"(1, '/x')",
        "COPY (SELECT f()) TO PROGRAM 'mail'",
        "COPY t (a) FROM PROGRAM 'pop'",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 case; END; COMMIT; BEGIN; SELECT 2 end",
    ],
)
def test_what_may_commit_on_its_way_is_not_atomic(sql):
    """Its error says nothing about what came before."""
    assert not StatementReader().read(sql).is_atomic


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
        ("ROLLBACK WORK TO s", False),
        ("ROLLBACK TRANSACTION TO SAVEPOINT s", False),
        ("ROLLBACK TRANSACTION", True),
        ("PREPARE p AS SELECT 1", False),
        ("PREPARE p(int) AS INSERT INTO t VALUES ($1)", False),
        ("PREPARE transaction AS SELECT 1", False),
        ("PREPARE", False),
        (r"SELECT 'C:\dir\'", False),
        (r"INSERT INTO t VALUES ('C:\dir\', 'x')", False),
        (r"INSERT INTO t VALUES ('C:\dir\'); COMMIT", True),
        (r"SELECT '\'; COMMIT; --'", True),
        (r"SELECT '\'' ; COMMIT; --'", True),
        (r"SELECT 'open\'; $a$", True),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END", False),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN a THEN 1 END; END; COMMIT", True),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT x.end AS end; END; SELECT 1", False),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 case; END; COMMIT", True),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 end; END; SELECT 1", True),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1 case; END; COMMIT; SELECT 2 end", True),
        (
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE 1 WHEN 1 THEN 2 END; WITH a AS (TABLE t) SELECT 1; END",
            False,
        ),
        ("", False),
    ],
)
def test_a_text_that_may_end_its_transaction_is_known(sql, expected):
    """Only where a statement begins, and in doubt."""
    assert ends_transaction(sql) is expected
