"""The tokens of SQL texts."""

from __future__ import annotations

import pytest

from resilient_pool.sql.lexer import Kind, tokens

SHORT = {Kind.WORD: "w", Kind.QUOTED: "q", Kind.LITERAL: "l", Kind.SIGN: "s", Kind.DOUBT: "?"}


CUTS = [
    ("", []),
    ("Select A$1", ["w:select", "w:a$1"]),
    ("a::b", ["w:a", "s:::", "w:b"]),
    ("a:b", ["w:a", "s::", "w:b"]),
    ("1.5", ["l:"]),
    ("1.x", ["?:"]),
    ("t.x", ["w:t", "s:.", "w:x"]),
    ("$12+1", ["l:", "s:+", "l:"]),
    ("'a''b'c", ["l:", "w:c"]),
    ("'a' 'b'", ["l:", "l:"]),
    (r"E'\'' x", ["l:", "w:x"]),
    (r"e'''\\' x", ["l:", "w:x"]),
    (r"'\a' x", ["l:", "w:x"]),
    (r"'\' x", ["?:"]),
    (r"'\'' x", ["?:"]),
    (r"a 'b\\' x", ["w:a", "?:"]),
    (r"U&'\' x", ["l:", "w:x"]),
    ("te'x'", ["w:te", "l:"]),
    ("e 'x'", ["w:e", "l:"]),
    ("E'x", ["?:"]),
    ("$$a$$b", ["l:", "w:b"]),
    ("$a$$$$b$$a$c", ["l:", "w:c"]),
    ("$a$$A$", ["?:"]),
    ("$1$ $1$", ["?:"]),
    ("a$b$ $b$c$b$", ["w:a$b$", "l:"]),
    ('"A""b"', ['q:A"b']),
    ('""', ["?:"]),
    ('""""', ['q:"']),
    ('"a', ["?:"]),
    ("--a\nb", ["w:b"]),
    ("--a\rb", ["w:b"]),
    ("--a\u2028b", []),
    ("a--", ["w:a"]),
    ("a-b", ["w:a", "s:-", "w:b"]),
    ("/*/**/*/a", ["w:a"]),
    ("/*/**/a", ["?:"]),
    ("/*/a", ["?:"]),
    ("/**/a", ["w:a"]),
    ("/*--*/a", ["w:a"]),
    ("--/*\na", ["w:a"]),
    ("'--'a", ["l:", "w:a"]),
    ("'/*'a", ["l:", "w:a"]),
    ("*/*x*/a", ["s:*", "w:a"]),
    ("ÄB", ["w:Äb"]),
    ("\u00a0a", ["w:\u00a0a"]),
    ("\u212a", ["w:\u212a"]),
    ("a\\b", ["w:a", "?:"]),
    ("\x00", ["?:"]),
]


def test_a_text_is_cut_as_the_server_cuts_it():
    """Words are folded, literals swallow what looks like SQL, comments vanish, and doubt ends everything."""
    assert [(sql, [f"{SHORT[token.kind]}:{token.text}" for token in tokens(sql)]) for sql, _ in CUTS] == CUTS


@pytest.mark.parametrize("opener", ["'", '"', "E'", "$$", "/*", "U&'", "(", "''", "\\", "1", "/*/", "'\\", "a."])
def test_no_text_takes_more_than_linear_time(opener):
    """Twenty thousand openings of anything are read without backtracking."""
    assert sum(1 for _ in tokens(opener * 20_000)) <= 40_000
