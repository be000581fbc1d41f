"""What the reader of statements says of a text, and what it does not."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from resilient_pool.errors import ConfigurationError
from resilient_pool.sql import read_only as statements
from resilient_pool.sql.function_effects import FUNCTIONS_WITH_EFFECTS, HARMLESS_FUNCTIONS
from resilient_pool.sql.keywords import CONSTRUCT_WORDS, KEYWORDS, RESERVED_WORDS
from resilient_pool.sql.lexer import tokens
from resilient_pool.sql.read_only import StatementReader
from resilient_pool.sql.stable_functions import STABLE_FUNCTIONS

TEXTS = runpy.run_path(str(Path(__file__).parents[2] / "statement_texts.py"))
READ_ONLY = TEXTS["READ_ONLY"] + TEXTS["READ_ONLY_ELSEWHERE"]
MAY_WRITE, PURE_FUNCTIONS = TEXTS["MAY_WRITE"], TEXTS["PURE_FUNCTIONS"]
LOOKING, EFFECTFUL = TEXTS["LOOKING"], TEXTS["EFFECTFUL"]


@pytest.fixture
def reader():
    return StatementReader(PURE_FUNCTIONS)


# The tables are long and their rows alike: each is one test, which names the rows that are wrong.


def test_a_statement_that_only_reads_is_recognised(reader):
    """What applications ask most often is known to be harmless."""
    assert [sql for sql in READ_ONLY if not reader.is_plain_read(sql)] == []


def test_a_statement_that_may_write_is_never_called_read_only(reader):
    """Whatever writes, locks, changes the session, or cannot be told, may write."""
    assert [sql for sql in MAY_WRITE if reader.is_plain_read(sql)] == []


def test_what_may_call_a_users_function_looks_like_a_read_and_is_no_plain_one(reader):
    """The server is asked about it before it is repeated; until then it counts as a write."""
    assert [sql for sql in LOOKING if not reader.looks_like_read(sql)] == []
    assert [sql for sql in LOOKING if reader.is_plain_read(sql)] == []


def test_a_name_of_a_function_with_effects_is_seen_in_every_notation(reader):
    """No such text looks like a read: a read-only transaction would let some of these effects pass."""
    assert [sql for sql in EFFECTFUL if reader.looks_like_read(sql)] == []


def test_a_plain_read_looks_like_one(reader):
    """There is no third kind."""
    assert [sql for sql in READ_ONLY if not reader.looks_like_read(sql)] == []


def test_everything_that_could_be_called_is_named(reader):
    """Names by any notation, folded as PostgreSQL does, and operators as a whole or as a part of a run."""
    statement = reader.read('SELECT TREAT(A.b AS "Cd"), 1 @+@ -2, x.select FROM s.F(1) OPERATOR(t.<->) $1 a')
    assert {"a", "b", "Cd", "x", "select", "s", "f", "t"} <= statement.names
    assert {"@+@-", "<->"} <= statement.operators


def test_a_second_statement_is_never_overlooked(reader):
    """After any statement that only reads, another one may write."""
    assert [sql for sql in READ_ONLY if reader.is_plain_read(f"{sql}\n;DELETE FROM users")] == []


@pytest.mark.parametrize(
    "beside",
    ["SELECT 1 WHERE EXISTS ({}\n) AND nextval('numbers') > 0", "SELECT nextval('numbers') FROM ({}\n) x"],
)
def test_a_volatile_function_is_never_overlooked(reader, beside):
    """Beside anything that only reads, a call of a volatile function is still seen."""
    texts = [text for text in READ_ONLY if not text.startswith(("SHOW", "(")) and ";" not in text]
    assert len(texts) > 90
    assert [sql for sql in texts if reader.is_plain_read(beside.format(sql))] == []


def test_reading_statements_can_be_nested(reader):
    """A statement that only reads does so as a part of another one, too."""
    texts = [text for text in READ_ONLY if not text.startswith("SHOW") and ";" not in text]
    assert len(texts) > 90
    nested = "WITH a AS ({0}\n) SELECT lower('A') FROM ({0}\n) x(c) JOIN (SELECT 1) y ON true"
    assert [sql for sql in texts if not reader.is_plain_read(nested.format(sql))] == []


@pytest.mark.parametrize(
    ("declared", "sql", "expected"),
    [
        ((), "SELECT f(1)", False),
        (("f",), "SELECT f(1)", True),
        (("f",), "SELECT F(1)", True),
        (("f",), 'SELECT "F"(1)', False),
        (("F",), "SELECT f(1)", True),
        (("F",), 'SELECT "F"(1)', True),
        (("f",), "SELECT s.f(1)", True),
        (("s.f",), "SELECT s.f(1)", True),
        (("s.f",), "SELECT S . F (1)", True),
        (("s.f",), "SELECT f(1)", False),
        (("s.f",), "SELECT t.f(1)", False),
        (("f",), "SELECT d.s.f(1)", False),
        (("f", "s.g"), "SELECT f(s.g(1))", True),
        (("f",), "SELECT f(g(1))", False),
        (("f",), "SELECT (x).f", True),
        (("random",), "SELECT random()", True),
        (["f"], "SELECT * FROM f(1) AS x(a int)", True),
        (iter(["f"]), "SELECT f(1)", True),
    ],
)
def test_declared_functions_are_known(declared, sql, expected):
    """A bare name stands for that function in every schema, a qualified one for itself."""
    assert StatementReader(declared).is_plain_read(sql) is expected


@pytest.mark.parametrize("declared", ["f", ("f()",), ("",), ("a.b.c",), (".f",), ("a b",), (1,), ('"f"',)])
def test_a_wrong_declaration_is_refused(declared):
    """What is no name is refused when the reader is made, in words that tell what was given."""
    given = declared if isinstance(declared, str) else declared[0]
    with pytest.raises(ConfigurationError, match="pure_functions must be a collection") as caught:
        StatementReader(declared)
    assert str(caught.value).endswith(f"not {given!r}")


def test_an_answer_is_remembered(reader, monkeypatch):
    """The second time, a text is not read again, however long it is."""
    texts = ["SELECT 1", "DELETE FROM users", f"SELECT {', '.join(map(str, range(50_000)))}"]
    answers = [reader.read(text) for text in texts]
    monkeypatch.setattr(statements, "tokens", None)
    assert [reader.read(text) for text in texts] == answers
    assert [answer.is_plain_read for answer in answers] == [True, False, True]


def test_what_is_remembered_is_bounded(reader):
    """However many texts there are, a thousand or so are kept."""
    for number in range(3000):
        assert reader.is_plain_read(f"SELECT {number}")
    assert 0 < len(reader._answers) <= 1024


def test_a_very_long_text_is_not_kept_itself(reader):
    """Data written into a statement does not fill the memory: what is kept is a digest."""
    assert reader.is_plain_read(f"SELECT '{'x' * 200_000}'")
    assert not reader.is_plain_read(f"SELECT '{'x' * 200_000}', nextval('numbers')")
    assert [len(key) for key in reader._answers] == [32, 32]


def test_a_list_of_a_megabyte_is_read_at_once():
    """Lists of values, and of rows of them, are one token: they are read in the event loop."""
    numbers = ", ".join(str(number * 7919) for number in range(100_000))
    rows = ", ".join(f"({number}, 'it''s {number}', NULL, -1.5, $1)" for number in range(30_000))
    for sql in (f"SELECT * FROM t WHERE id IN ({numbers})", f"INSERT INTO t VALUES {rows}"):
        assert sum(1 for _ in tokens(sql)) < 40
    assert StatementReader().is_plain_read(f"SELECT * FROM t WHERE id IN ({numbers})")
    assert not StatementReader().looks_like_read(f"SELECT * FROM t WHERE id IN ({numbers}, nextval('s'), 3, 4)")


@pytest.mark.parametrize(
    "name", ["pg_notify", "set_config", "setseed", "pg_current_xact_id", "query_to_xml", "lo_create"]
)
def test_what_a_read_only_transaction_lets_pass_is_listed(name):
    """Functions with effects, also those that PostgreSQL marks stable."""
    assert name in FUNCTIONS_WITH_EFFECTS
    assert name not in STABLE_FUNCTIONS | HARMLESS_FUNCTIONS


@pytest.mark.parametrize("name", ["lower", "now", "count", "generate_series", "jsonb_build_object", "current_setting"])
def test_the_list_has_what_everybody_calls(name):
    """The functions that applications call most are on the list."""
    assert name in STABLE_FUNCTIONS


@pytest.mark.parametrize(
    "name",
    [
        "nextval",
        "setval",
        "set_config",
        "pg_notify",
        "pg_advisory_lock",
        "query_to_xml",
        "table_to_xml",
        "schema_to_xml_and_xmlschema",
        "ts_rewrite",
        "ts_stat",
        "lo_creat",
        "pg_read_file",
        "txid_current",
        "pg_current_xact_id",
        "fmgr_sql_validator",
        "int4in",
    ],
)
def test_the_list_has_nothing_with_an_effect(name):
    """Functions that write, run a text or belong to the machinery are not on the list."""
    assert name not in STABLE_FUNCTIONS


def test_the_words_of_the_grammar_are_apart():
    """No word is of two categories, and none of those that are never functions is missing among the keywords."""
    assert not RESERVED_WORDS & CONSTRUCT_WORDS
    assert RESERVED_WORDS | CONSTRUCT_WORDS < KEYWORDS
    assert not (RESERVED_WORDS | CONSTRUCT_WORDS) & {"over", "filter", "join", "cube", "rollup", "by"}


@pytest.mark.parametrize(
    ("sql", "keeps"),
    [
        ("INSERT INTO t (a, b) VALUES ($1, now())", True),
        ("INSERT INTO s.t(a) SELECT lower(x) FROM u ON CONFLICT (a) DO UPDATE SET b = excluded.b RETURNING a;", True),
        ('INSERT INTO "s"."T" ("a") VALUES (1)', True),
        ("UPDATE t SET (a, b) = ROW (1, 2) WHERE a IN (1, 2) AND EXISTS (SELECT FROM u)", True),
        ("DELETE FROM t WHERE a = ANY ($1)", True),
        ("MERGE INTO t USING u ON (t.a = u.a) WHEN NOT MATCHED THEN INSERT (a) VALUES (u.a)", True),
        ("SELECT 1", True),
        ("INSERT INTO t VALUES (nextval('s'), gen_random_uuid(), random(), clock_timestamp())", True),
        ("SELECT nextval('s'), pg_catalog.setval('s', 7)", True),
        ("SELECT pg_notify('channel', $1)", True),
        ("WITH l AS (SELECT pg_advisory_xact_lock(1)) SELECT NEXTVAL('s') FROM l", True),
        ("SELECT txid_current()", True),
        ("SELECT nextval('s'), set_config('a.b', 'c', false)", False),
        ("SELECT nextval('s'), mine(1)", False),
        ("SELECT nextval('s'), pg_advisory_lock(1)", False),
        ("SELECT nextval('s'); SET work_mem = '4MB'", False),
        ("SELECT setseed(0.5)", False),
        ("SELECT mine.nextval('s')", False),
        ("INSERT INTO t VALUES (set_config('a.b', 'c', false))", False),
        ("INSERT INTO t SELECT pg_advisory_lock FROM generate_series(1, 3) g", False),
        ("INSERT INTO t VALUES (mine(1))", False),
        ('UPDATE t SET a = "mine"(1)', False),
        ("INSERT INTO t AS x (a) VALUES (pg_catalog.now())", True),
        ("INSERT INTO t OVERRIDING USER VALUE SELECT lower(x) FROM u", True),
        ("INSERT INTO t SELECT mine(1)", False),
        ('INSERT INTO s."T" AS x SELECT DISTINCT mine(1)', False),
        ("INSERT INTO t AS x OVERRIDING USER VALUE SELECT mine(1)", False),
        ("MERGE INTO t USING mine(1) AS m ON true WHEN MATCHED THEN DO NOTHING", False),
        ("INSERT INTO t VALUES (theirs.now())", False),
        ("UPDATE t SET a = theirs.nextval('s')", False),
        ("DELETE FROM t USING theirs.mine(1)", False),
        ("UPDATE t SET a = treat(b AS mine)", False),
        ("INSERT INTO t VALUES (1); SET work_mem = '4MB'", False),
        ("INSERT INTO t VALUES ('", False),
        ("WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT mine(1) FROM x", False),
        ("SET work_mem = '4MB'", False),
        ("CREATE TEMP TABLE t (a int)", False),
        ("", False),
    ],
)
def test_a_text_that_leaves_the_session_as_it_was(sql, keeps):
    """Single changes of tables do, as long as all they visibly call is known; then no reset is sent after them."""
    assert StatementReader().keeps_session[sql] is keeps


@pytest.mark.parametrize("sql", ["INSERT INTO t SELECT theirs.now(1)", "UPDATE t SET a = theirs.mine(b), c = plain(d)"])
def test_a_declared_function_leaves_the_session_as_it_was_in_a_change_too(sql):
    """It is known by the names under which it was declared."""
    assert StatementReader(["theirs.now", "theirs.mine", "plain"]).keeps_session[sql] is True


@pytest.mark.parametrize("sql", ["SELECT nextval('s')", "SELECT pg_notify('c', 'x')", "SELECT txid_current()"])
def test_a_text_without_a_trace_in_the_session_is_no_read_for_that(sql):
    """That no reset follows it is no reason to repeat it."""
    reader = StatementReader()
    assert (reader.looks_like_read(sql), reader.is_plain_read(sql)) == (False, False)


def test_a_long_comment_does_not_hide_what_commits_on_its_way():
    """Of a long text only the beginning is read, but all of a short statement's words belong to it."""
    sql = f"/* {'x' * 40_000} */ ALTER TABLE a.parted DETACH PARTITION a.part CONCURRENTLY"
    assert not StatementReader().read(sql).is_atomic
