"""Tells from a statement's text alone whether it can have written anything: `StatementReader`."""

from __future__ import annotations

from collections.abc import Iterable

from resilient_pool.errors import ConfigurationError
from resilient_pool.policy.lexer import Kind, Token, fold, tokens
from resilient_pool.policy.sql_words import CONSTRUCT_WORDS, KEYWORDS, RESERVED_WORDS
from resilient_pool.policy.stable_functions import STABLE_FUNCTIONS

_REMEMBERED_TEXTS = 1024
_LONGEST_REMEMBERED = 32_768
"""In characters. A longer text is mostly data, and will not come again."""

_READING = frozenset({"select", "values", "table", "show", "with"})
_WRITING = frozenset({"insert", "update", "delete", "merge", "into"})
_LOCKING = frozenset({"update", "no", "share", "key"})
_CLAUSES = frozenset(
    {
        "select",
        "values",
        "where",
        "having",
        "window",
        "order",
        "limit",
        "offset",
        "fetch",
        "for",
        "union",
        "intersect",
        "except",
    }
)
_JOINS = frozenset({"left", "right", "full", "inner", "outer", "cross", "natural"})
_ENDS_OF_OPERANDS = frozenset({"true", "false", "null", "end"})
_FOLLOWED_BY_RELATIONS = frozenset({"from", "join", "lateral", "only"})
_AFTER_A_PARENTHESIS = frozenset({"over", "filter", "repeatable"})
_PAIRS = {
    "by": frozenset({"group", "order", "partition"}),
    "materialized": frozenset({"as"}),
    "sets": frozenset({"grouping"}),
    "varying": frozenset({"character", "char", "nchar", "bit"}),
    "zone": frozenset({"time"}),
    "bernoulli": frozenset({"tablesample"}),
    "system": frozenset({"tablesample"}),
}
"""Words that may stand before a parenthesis after certain others, as part of one construct."""
_BEFORE_GROUPING_ELEMENTS = frozenset({"by", "all", "distinct", ",", "("})


class StatementReader:
    """Reads statements conservatively: what it calls read-only is; of what it does not, some may be as well.

    A statement is read-only when it is one SELECT, VALUES, TABLE, SHOW, or WITH of nothing but these; has no INTO and
    locks no rows; and calls by name only functions that PostgreSQL 16 and 18 mark stable or immutable, or that were
    declared. Not visible in a text, and therefore not seen: volatile functions behind views, policies, operators, casts
    and computed fields (`row.function`), and functions of the user's which take the place of PostgreSQL's own by their
    argument types or by a `search_path` that puts another schema before `pg_catalog`.

    Args:
        pure_functions: Functions that write nothing and leave nothing behind in the session, as `"name"`, for that name in
            any schema or in none, or as `"schema.name"`, for that qualified name only. Default none.

    Raises:
        ConfigurationError: `pure_functions` is a single string or holds something that is no such name.
    """

    __slots__ = ("_answers", "_pure")

    def __init__(self, pure_functions: Iterable[str] = ()) -> None:
        self._pure = _checked_names(pure_functions)
        self._answers: dict[str, bool] = {}

    def looks_like_read(self, sql: str) -> bool:
        """Whether the text is one statement that only reads, as far as a text can say. It allows a guarded repeat only."""
        return self.is_plain_read(sql)

    def is_plain_read(self, sql: str) -> bool:
        """Whether the text looks like a read, and calls only what is known to write nothing. The answer is remembered."""
        answer = self._answers.get(sql)
        return self._read(sql) if answer is None else answer

    def _read(self, sql: str) -> bool:
        text = _Text(self._pure)
        answer = all(text.takes(token) for token in tokens(sql)) and text.is_whole
        if len(sql) <= _LONGEST_REMEMBERED:
            if len(self._answers) >= _REMEMBERED_TEXTS:
                self._answers.clear()  # cheaper than knowing which is the oldest, and as rare
            self._answers[sql] = answer
        return answer


def _checked_names(names: Iterable[str]) -> frozenset[str]:
    given = None if isinstance(names, str) else tuple(names)
    for name in (names,) if given is None else given:
        parts = name.split(".") if isinstance(name, str) else []
        if given is None or not 1 <= len(parts) <= 2 or not all(parts) or set(name) & set("()'\" \t\n;"):  # noqa: PLR2004
            raise ConfigurationError(
                'pure_functions must be a collection of function names, each "name" or "schema.name" '
                f"without quotes, parentheses or blanks, not {names if given is None else name!r}"
            )
    # A name that has capitals is quoted in one statement and not in another: both are meant.
    return frozenset(given or ()) | frozenset(fold(name) for name in given or ())


class _Level:
    """What is known at one depth of parentheses.

    Attributes:
        opener: The word before the parenthesis, or an empty text.
        clause: The clause that the reader is in, named after its first word; empty where there are none.
        first: Where the first token of this level is.
    """

    __slots__ = ("clause", "first", "opener")

    def __init__(self, *, opener: str, clause: str, first: int) -> None:
        self.opener = opener
        self.clause = clause
        self.first = first


class _Text:
    """One text, read from left to right. Each method answers False at the first thing that may write."""

    def __init__(self, pure: frozenset[str]) -> None:
        self._pure = pure
        self._past: list[Token] = []
        self._levels = [_Level(opener="", clause="", first=0)]
        self._closed = ""
        self._begun = False
        self._ended = False

    @property
    def is_whole(self) -> bool:
        """Whether there is a statement, and it has an end."""
        return self._begun and len(self._levels) == 1

    def takes(self, token: Token) -> bool:
        """Read one more token and tell whether the text may still be read-only."""
        if token.kind is Kind.DOUBT or (self._ended and token.text != ";"):
            return False
        if not self._begun:
            self._begun = token.kind is Kind.WORD
            taken = token.text in _READING if self._begun else token.text == "("
        else:
            taken = True
        taken = taken and self._takes_in_place(token)
        self._past.append(token)
        return taken

    def _takes_in_place(self, token: Token) -> bool:
        if token.kind is Kind.SIGN:
            return self._takes_sign(token.text)
        if token.kind is not Kind.LITERAL and self._is_sign(-1, "."):
            return self._takes_attribute(token)
        return token.kind is not Kind.WORD or self._takes_word(token.text)

    # Signs and the parentheses among them

    def _takes_sign(self, sign: str) -> bool:
        level = self._levels[-1]
        if sign == "(":
            return self._opens()
        if sign == ")":
            self._closed = level.opener
            self._levels.pop()
            return bool(self._levels)
        if sign == ";":
            self._ended = True
        if sign == "," and level.clause == "on":
            level.clause = "from"
        return True

    def _opens(self) -> bool:
        level, opener, clause = self._levels[-1], "", ""
        named = self._is_name(-1)
        if named and not self._may_stand_before_a_parenthesis():
            return False
        if named:
            opener = self._past[-1].text
        if level.clause == "from" and (opener in _FOLLOWED_BY_RELATIONS or not named):
            clause = "from"
        self._levels.append(_Level(opener=opener, clause=clause, first=len(self._past) + 1))
        return True

    # Words

    def _takes_attribute(self, token: Token) -> bool:
        # `table.column` is harmless. `(expression).name`, `array[1].name` and `$1.name` may be function calls: measured,
        # `('sequence'::regclass).nextval` advances the sequence.
        return self._is_name(-2) or token.text in STABLE_FUNCTIONS or token.text in self._pure

    def _takes_word(self, word: str) -> bool:
        level, previous = self._levels[-1], self._word(-1)
        if word in _WRITING or (word in _LOCKING and previous == "for"):
            return False
        if word == "with" and level.first == len(self._past):
            level.clause = "with"
        elif word == "from":
            level.clause = "from" if level.clause == "select" else level.clause
        elif word == "on":
            level.clause = "on" if level.clause == "from" else level.clause
        elif word == "join":
            level.clause = "from" if level.clause == "on" else level.clause
        elif word in _CLAUSES or (word == "group" and previous != "within"):
            level.clause = word
        return True

    def _may_stand_before_a_parenthesis(self) -> bool:
        """Tell whether the name just read calls nothing that may write."""
        parts, before = self._name_and_what_is_before()
        if len(parts) > 1:
            return self._is_type(before) or self._is_known(*parts)
        word = self._past[-1]
        if word.kind is Kind.WORD and (word.text in RESERVED_WORDS or word.text in CONSTRUCT_WORDS):
            return True
        return (
            word.text in STABLE_FUNCTIONS
            or word.text in self._pure
            or self._is_type(before)
            or self._is_new_name(before)
            or (word.kind is Kind.WORD and self._is_construct(word.text, before))
        )

    def _name_and_what_is_before(self) -> tuple[list[str], int]:
        """Return the parts of the name just read, and where the token before it is, counted from the end."""
        at, parts = -1, [self._past[-1].text]
        while self._is_sign(at - 1, ".") and self._is_name(at - 2):
            at -= 2
            parts.insert(0, self._past[at].text)
        return parts, at - 1

    def _is_known(self, *parts: str) -> bool:
        *schemas, name = parts
        if schemas == ["pg_catalog"] and name in STABLE_FUNCTIONS:
            return True
        return len(schemas) == 1 and (name in self._pure or ".".join(parts) in self._pure)

    def _is_type(self, before: int) -> bool:
        """Tell whether what follows is a type, or a name given by AS, with something in parentheses."""
        return self._is_sign(before, "::") or self._word(before) == "as"

    def _is_new_name(self, before: int) -> bool:
        """Tell whether `name (` begins a list of column names: of a member of WITH, or of an alias without AS."""
        clause = self._levels[-1].clause
        if clause == "with":
            return True
        if clause != "from":
            return False
        return self._is_plain_name(before) or self._is_closed(before) or self._word(before) == "ordinality"

    def _is_construct(self, word: str, before: int) -> bool:
        """Tell whether a word that could name a function is part of the grammar here."""
        previous = self._word(before)
        if word in _AFTER_A_PARENTHESIS:
            return self._is_closed(before)
        if word in {"rollup", "cube"}:
            return self._is_grouping_element(before)
        if word == "join":
            joins = previous in _JOINS or self._ends_operand(before)
            return joins and self._levels[-1].clause == "from"
        if previous == "not" and word in {"ilike", "materialized"}:
            before -= 1  # NOT stands before a function, too: what matters is what is before it
        if word == "ilike":
            return self._ends_operand(before)
        return self._word(before) in _PAIRS.get(word, ())

    def _is_grouping_element(self, before: int) -> bool:
        level = self._levels[-1]
        begins = self._past[before].text in _BEFORE_GROUPING_ELEMENTS
        return begins and (level.clause == "group" or level.opener == "sets")

    # What stands where, counted from the end

    def _token(self, at: int) -> Token | None:
        return self._past[at] if -at <= len(self._past) else None

    def _is_sign(self, at: int, sign: str) -> bool:
        return self._token(at) == (Kind.SIGN, sign)

    def _is_name(self, at: int) -> bool:
        token = self._token(at)
        return token is not None and token.kind in {Kind.WORD, Kind.QUOTED}

    def _word(self, at: int) -> str:
        """Return the word that is there, or an empty text where there is none, or one that a dot makes a plain name."""
        token = self._token(at)
        if token is None or token.kind is not Kind.WORD or self._is_sign(at - 1, "."):
            return ""
        return token.text

    def _is_plain_name(self, at: int) -> bool:
        return self._is_name(at) and self._word(at) not in KEYWORDS

    def _is_closed(self, at: int) -> bool:
        # After DISTINCT ON (...) begins an expression; after every other parenthesis, none does.
        return self._is_sign(at, ")") and self._closed != "on"

    def _ends_operand(self, at: int) -> bool:
        token = self._token(at)
        if token is None or token.kind is Kind.LITERAL:
            return token is not None
        if token.kind is Kind.SIGN:
            return token.text == "]" or self._is_closed(at)
        return self._is_plain_name(at) or self._word(at) in _ENDS_OF_OPERANDS
