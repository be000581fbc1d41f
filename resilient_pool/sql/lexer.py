"""Cuts SQL into tokens as PostgreSQL's own scanner does, and knows when it cannot be sure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from typing import NamedTuple


class Kind(Enum):
    """The kind of a token."""

    WORD = "word"
    """A keyword or an identifier without quotes, folded to lower case."""
    QUOTED = "quoted"
    """An identifier in quotes, without them."""
    LITERAL = "literal"
    """A string, a number or a parameter."""
    SIGN = "sign"
    """`::`, or one character of punctuation or of an operator."""
    DOUBT = "doubt"
    """Something that is no SQL, has no end, or ends where a setting of the server says. Nothing follows it."""


class Backslash(Enum):
    """What a backslash before a quote means in a plain string: a setting of the server decides it."""

    DOUBTFUL = "doubtful"
    """It is not known."""
    PLAIN = "plain"
    """Nothing: `standard_conforming_strings` is on, as it is by default."""
    ESCAPES = "escapes"
    """It takes the quote with it."""


class Token(NamedTuple):
    """One token. That of a literal has no text: its content never matters."""

    kind: Kind
    text: str


# Every character outside ASCII is a letter to PostgreSQL, also those that are spaces elsewhere.
_START = r"[A-Za-z_\u0080-\U0010ffff]"
_INNER = r"[A-Za-z0-9_$\u0080-\U0010ffff]"

_SPACE = r"[ \t\n\r\f]*+"
_DATUM = rf"""(?: '(?:[^'\\]++|''|\\(?!'))*+' | -?[0-9]++(?:\.[0-9]++)?+(?!{_INNER}|\.) | \$[0-9]++(?!{_INNER})
              | (?i:null|true|false|default)(?!{_INNER}) )"""
# A list goes on, with plain values or with rows of them. In one go: lists of a megabyte are read in the event loop.
_DATA = rf", (?: {_SPACE} (?:{_DATUM} | \({_SPACE}{_DATUM}(?:{_SPACE},{_SPACE}{_DATUM})*+{_SPACE}\)) {_SPACE} , )++"

_TOKEN = rf"""
      (?P<data>    {_DATA} )
    | (?P<blank>   [ \t\n\r\f]++ | --[^\n\r]*+ )
    | (?P<comment> /\* )
    | (?P<escaped> [eE]'[^'\\]*+(?:(?:\\.|'')[^'\\]*+)*+' | [uU]&'[^']*+(?:''[^']*+)*+' )
    | (?P<plain>   '[^']*+(?:''[^']*+)*+' )
    | (?P<quoted>  "(?!"(?!"))[^"]*+(?:""[^"]*+)*+" )
    | (?P<endless> [eE]' | [uU]&['"] | ['"] )
    | (?P<word>    {_START}{_INNER}*+ )
    | (?P<number>  (?:\$[0-9]++ | 0[xXoObB][0-9A-Fa-f_]++ | (?:[0-9][0-9_]*+(?:\.[0-9_]*+)?+ | \.[0-9][0-9_]*+)(?:[eE][+-]?[0-9]++)?+)(?!{_INNER}) )
    | (?P<dollar>  \$(?:{_START}[A-Za-z0-9_\u0080-\U0010ffff]*+)?+\$ )
    | (?P<sign>    :: | [-+*/<>=~!@\#%^&|`?()\[\],.:;] )
    """
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_TO_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_NO_TOKEN = frozenset({"blank", "comment"})


@cache
def _token_at() -> Callable[[str, int], re.Match[str] | None]:
    # Compiled with the first statement that is read: that takes a tenth of the time that the whole package's import does.
    return re.compile(_TOKEN, re.VERBOSE | re.DOTALL).match


@cache
def _escaping_string_at() -> Callable[[str, int], re.Match[str] | None]:
    return re.compile(r"'[^'\\]*+(?:(?:\\.|'')[^'\\]*+)*+'", re.DOTALL).match


def tokens(sql: str, backslash: Backslash = Backslash.DOUBTFUL) -> Iterator[Token]:
    """Yield the tokens of a text, without blanks and comments. A `DOUBT` is the last one, if there is any.

    Values between the commas of a list are left out: there is one comma for many of them.
    """
    position, token_at = 0, _token_at()
    while position < len(sql):
        found = token_at(sql, position)
        end = None if found is None else _end(found, sql, backslash)
        if found is None or end is None:
            yield Token(Kind.DOUBT, "")
            return
        if found.lastgroup not in _NO_TOKEN:
            yield _token(found)
        position = end


def fold(identifier: str) -> str:
    """Fold an identifier without quotes to lower case, as PostgreSQL does in a database of UTF-8: ASCII letters only."""
    return identifier.translate(_TO_LOWER)


def _end(found: re.Match[str], sql: str, backslash: Backslash) -> int | None:
    """Return where what was found ends, or `None` where that is not certain."""
    group, text = found.lastgroup, found.group()
    if group in {"plain", "endless"} and text[0] == "'" and backslash is Backslash.ESCAPES:
        string = _escaping_string_at()(sql, found.start())
        return None if string is None else string.end()
    if group == "plain" and backslash is Backslash.DOUBTFUL and "\\'" in text:
        return None  # with standard_conforming_strings off, the backslash takes the quote with it
    if group == "endless":
        return None
    if group == "comment":
        return _comment_end(sql, found.end())
    if group == "dollar":
        closed = sql.find(text, found.end())
        return None if closed < 0 else closed + len(text)
    return found.end()


def _comment_end(sql: str, position: int) -> int | None:
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(sql, position)
        if edge is None:
            return None
        depth += 1 if edge.group() == "/*" else -1
        position = edge.end()
    return position


def _token(found: re.Match[str]) -> Token:
    group, text = found.lastgroup, found.group()
    if group == "data":
        return Token(Kind.SIGN, ",")
    if group == "word":
        return Token(Kind.WORD, fold(text))
    if group == "quoted":
        return Token(Kind.QUOTED, text[1:-1].replace('""', '"'))
    if group == "sign":
        return Token(Kind.SIGN, text)
    return Token(Kind.LITERAL, "")
