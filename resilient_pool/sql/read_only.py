"""What a statement's text alone can say: whether it looks like a read, what it names, where it ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from resilient_pool.errors import ConfigurationError
from resilient_pool.sql.function_effects import FUNCTIONS_WITH_EFFECTS, HARMLESS_FUNCTIONS
from resilient_pool.sql.keywords import CONSTRUCT_WORDS, KEYWORDS, RESERVED_WORDS
from resilient_pool.sql.lexer import Kind, Token, fold, tokens
from resilient_pool.sql.stable_functions import STABLE_FUNCTIONS
from resilient_pool.sql.transaction_control import Boundaries

_REMEMBERED_TEXTS = 1024
_LONGEST_KEY = 32_768
"""In characters. A longer text is mostly data: only its digest is kept."""
_LONGEST_HEAD = 64
_MOST_TOKENS = 20_000
"""Of a long text. One that has more, beside plain lists of values, is not read to its end: it takes too long in the event loop,
and so does not count as a read."""

_READING = frozenset({"select", "values", "table", "show", "with"})
_WRITING = frozenset({"insert", "update", "delete", "merge", "into"})
_LOCKING = frozenset({"update", "no", "share", "key"})
_AFTER_FROM = frozenset(
    {"where", "group", "having", "window", "order", "limit", "offset", "fetch", "for", "union", "intersect", "except"}
)
_QUERIES = frozenset({"select", "values", "table"})
_JOINS = frozenset({"left", "right", "full", "inner", "outer", "cross", "natural"})
_ENDS_OF_OPERANDS = frozenset({"true", "false", "null", "end"})
_FOLLOWED_BY_RELATIONS = frozenset({"from", "join", "lateral", "only"})
_AFTER_A_PARENTHESIS = frozenset({"over", "filter", "repeatable"})
_VALUES_OF_THE_SESSION = frozenset(word for word in RESERVED_WORDS if word.startswith(("current_", "local"))) | {
    "current_schema",
    "session_user",
    "system_user",
    "user",
}
"""They call a function although no parenthesis follows."""
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
_OPERATOR_CHARACTERS = frozenset("+-*/<>=~!@#%^&|`?")
_KNOWN_FUNCTIONS = STABLE_FUNCTIONS | HARMLESS_FUNCTIONS
_EFFECTS_OUTSIDE_THE_SESSION = frozenset(
    {
        # On a sequence. What currval() and lastval() return afterwards, no reset takes away either.
        *("nextval", "setval"),
        # They end with the transaction: its id, its locks, and the message that its COMMIT sends.
        *("pg_current_xact_id", "txid_current", "pg_notify"),
        *("pg_advisory_xact_lock", "pg_advisory_xact_lock_shared"),
        *("pg_try_advisory_xact_lock", "pg_try_advisory_xact_lock_shared"),
    }
)
"""Functions that have effects, but none that a reset of the session would undo."""
_EFFECTS_IN_THE_SESSION = FUNCTIONS_WITH_EFFECTS - _EFFECTS_OUTSIDE_THE_SESSION
_CHANGING = frozenset({"insert", "update", "delete", "merge"})
_BEFORE_A_PARENTHESIS = (RESERVED_WORDS | CONSTRUCT_WORDS | {"conflict", "filter", "insert", "over", "set"}) - {"treat"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What is known of one text.

    Attributes:
        looks_like_read: Whether it is one SELECT, VALUES, TABLE, SHOW, or WITH of nothing but these; has no INTO, locks no
            rows, and names, in no notation, a function of PostgreSQL's own that has effects. What functions of the user's,
            operators, casts, types, views and policies do is not visible in a text.
        is_plain_read: Whether, beside, every function that it visibly calls is one that PostgreSQL 16 and 18 mark stable or
            immutable, one that is known to be harmless, or one that was declared. A function of the user's that takes the
            place of one of these by its argument types is not visible, nor is a computed field of a table (`row.function`).
        keeps_session: Whether it leaves the session as it was: a plain read, or one INSERT, UPDATE, DELETE or MERGE that
            visibly calls nothing but what is known likewise. In both, functions may be called whose effects are outside the
            session (nextval, say). What a trigger does is not visible.
        is_atomic: Whether it is certain to be one statement that takes effect as a whole or not at all.
        ends_transaction: Whether it may hold a statement that ends the transaction it runs in.
        names: Every identifier in it that could name something callable, unless it does not look like a read.
        operators: Every run of characters of operators in it, likewise. An operator is a part of one.
    """

    looks_like_read: bool
    is_plain_read: bool
    keeps_session: bool
    is_atomic: bool
    ends_transaction: bool
    names: frozenset[str]
    operators: frozenset[str]


class StatementReader:
    """Reads statements conservatively, and remembers what it read.

    Args:
        pure_functions: Functions that write nothing and leave nothing behind in the session, as `"name"`, for that name in
            any schema or in none, or as `"schema.name"`, for that qualified name only. Default none.

    Attributes:
        pure: Their names, as declared and folded.
        keeps_session: For each text, whether the session is as it was afterwards, as far as a text can say; `False` for
            `None`, which may be anything. It is looked up after every call.

    Raises:
        ConfigurationError: `pure_functions` is a single string or holds something that is no such name.
    """

    __slots__ = ("_answers", "keeps_session", "pure")

    def __init__(self, pure_functions: Iterable[str] = ()) -> None:
        self.pure = _checked_names(pure_functions)
        self._answers: dict[str | bytes, Statement] = {}
        self.keeps_session: Mapping[str | None, bool] = _Remembered(lambda sql: self.read(sql).keeps_session)

    def looks_like_read(self, sql: str) -> bool:
        """Whether the text is one statement that only reads, as far as a text can say. It allows a guarded repeat only."""
        return self.read(sql).looks_like_read

    def is_plain_read(self, sql: str) -> bool:
        """Whether it looks like a read, and calls only what is known to write nothing. Never a reason to repeat it."""
        return self.read(sql).is_plain_read

    def read(self, sql: str) -> Statement:
        """Return what is known of a text. The answer is remembered."""
        key = sql if len(sql) <= _LONGEST_KEY else _digest(sql)
        return self._answers.get(key) or self._read(sql, key)

    def _read(self, sql: str, key: str | bytes) -> Statement:
        boundaries, text, change, reads = Boundaries(sql), _Text(self.pure), _Change(self.pure), True
        is_long, is_changing, enough = len(sql) > _LONGEST_KEY, False, _LONGEST_HEAD
        for number, token in enumerate(tokens(sql)):
            boundaries.take(token)
            change.take(token)
            known = not (is_long and number > _MOST_TOKENS)
            reads, is_changing = reads and text.takes(token) and known, change.is_plain and known
            if is_long and not (reads or is_changing) and number >= enough:
                # Without a semicolon there is one statement, and its first words say what it is.
                if ";" not in sql.rstrip("; \t\r\n"):
                    break
                enough = len(sql)
        reads = reads and text.is_whole
        statement = Statement(
            looks_like_read=reads,
            is_plain_read=reads and text.is_plain,
            keeps_session=is_changing or (reads and text.is_plain) or self._affects_only_what_is_outside(sql),
            is_atomic=boundaries.is_atomic,
            ends_transaction=boundaries.ends_transaction,
            names=frozenset(text.names if reads else ()),
            operators=frozenset(text.operators if reads else ()),
        )
        if len(self._answers) >= _REMEMBERED_TEXTS:
            self._answers.clear()  # cheaper than knowing which is the oldest, and as rare
        self._answers[key] = statement
        return statement

    def _affects_only_what_is_outside(self, sql: str) -> bool:
        """Whether a text would be a plain read if its functions had not the effects that are outside the session."""
        if len(sql) > _LONGEST_KEY or not any(name in sql.lower() for name in _EFFECTS_OUTSIDE_THE_SESSION):
            return False
        text = _Text(self.pure, but=_EFFECTS_OUTSIDE_THE_SESSION)
        return all(map(text.takes, tokens(sql))) and text.is_whole and text.is_plain


class _Remembered(dict[str | None, bool]):
    """Answers a question about texts, and remembers what it answered: a lookup of a known text calls no function of Python's."""

    __slots__ = ("_ask",)

    def __init__(self, ask: Callable[[str], bool]) -> None:
        self._ask = ask

    def __missing__(self, sql: str | None) -> bool:
        if sql is None:
            return False
        answer = self._ask(sql)
        if len(sql) <= _LONGEST_KEY:
            if len(self) >= _REMEMBERED_TEXTS:
                self.clear()
            self[sql] = answer
        return answer


def _digest(sql: str) -> bytes:
    return hashlib.sha256(sql.encode("utf-8", "surrogatepass")).digest()


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


@dataclass(slots=True, kw_only=True, eq=False)
class _Level:
    """What is known at one depth of parentheses and brackets.

    Attributes:
        opener: The word before the parenthesis (`rows` for ROWS FROM), `[` for a bracket, or an empty text.
        clause: `"with"` in the list of a WITH, `"from"` from the first FROM to the clause after it, or an empty text.
        first: Where the first token of this level is.
    """

    opener: str
    clause: str
    first: int


class _Change:
    """Sees whether a text is one INSERT, UPDATE, DELETE or MERGE that calls nothing but what is known."""

    def __init__(self, pure: frozenset[str]) -> None:
        self._pure = pure
        self._last: Token | None = None
        self._qualifier = ""
        self._is_target = self._is_over = False
        self.is_plain = False

    def take(self, token: Token) -> None:
        """Take note of the next token."""
        last, self._last = self._last, token
        if last is None:
            self.is_plain = token.kind is Kind.WORD and token.text in _CHANGING
            return
        is_name = token.kind in {Kind.WORD, Kind.QUOTED}
        refused = token.kind is Kind.DOUBT or self._is_over or (is_name and token.text in _EFFECTS_IN_THE_SESSION)
        self._is_over = token == (Kind.SIGN, ";")
        if token == (Kind.SIGN, "(") and last.kind in {Kind.WORD, Kind.QUOTED} and not self._is_target:
            refused = refused or not self._is_known(last)
        # A list of columns follows the table's name, or its alias, after INTO. What else follows belongs to neither.
        goes_on = token.text == "." or token == (Kind.WORD, "as") or last.text == "." or last == (Kind.WORD, "as")
        self._is_target = last == (Kind.WORD, "into") or (self._is_target and goes_on)
        if token.text == ".":
            self._qualifier = last.text
        elif last.text != ".":
            self._qualifier = ""
        self.is_plain = self.is_plain and not refused

    def _is_known(self, called: Token) -> bool:
        schema, name = self._qualifier, called.text
        if schema and (f"{schema}.{name}" in self._pure or name in self._pure):
            return True
        known = name in _KNOWN_FUNCTIONS or name in _EFFECTS_OUTSIDE_THE_SESSION
        if schema:
            return known and schema == "pg_catalog"
        return known or name in self._pure or (called.kind is Kind.WORD and name in _BEFORE_A_PARENTHESIS)


class _Text:
    """One text, read from left to right.

    Attributes:
        is_plain: Whether everything called so far is known.
        names: The identifiers so far.
        operators: The runs of characters of operators so far.
    """

    def __init__(self, pure: frozenset[str], *, but: frozenset[str] = frozenset()) -> None:
        self.names: set[str] = set()
        self.operators: set[str] = set()
        self._pure = pure
        self._known = _KNOWN_FUNCTIONS | but
        self._effects = FUNCTIONS_WITH_EFFECTS - but
        self._past: list[Token] = []
        self._levels = [_Level(opener="", clause="", first=0)]
        self._closed = ""
        self._begun = self._ended = False
        self._plain = True
        self._run = ""
        self._scalars: set[str] = set()
        self._qualifiers: set[str] = set()

    @property
    def is_whole(self) -> bool:
        """Whether there is a statement, and it has an end."""
        return self._begun and len(self._levels) == 1

    @property
    def is_plain(self) -> bool:
        """Whether everything that is visibly called is known, attributes of what a function in FROM returns among it."""
        return self._plain and not self._scalars & self._qualifiers

    def takes(self, token: Token) -> bool:
        """Read one more token and say whether the text still looks like a read."""
        if token.kind is Kind.DOUBT or (self._ended and token.text != ";"):
            return False
        taken = True
        if not self._begun:
            self._begun = token.kind is Kind.WORD
            taken = token.text in _READING if self._begun else token.text == "("
        if token.kind is Kind.SIGN:
            taken = taken and self._takes_sign(token.text)
        elif token.kind is not Kind.LITERAL:
            taken = taken and self._takes_name(token)
        self._end_run(token)
        self._past.append(token)
        return taken

    # What it looks like

    def _takes_sign(self, sign: str) -> bool:
        if sign in "([":
            self._opens(sign)
        elif sign in ")]":
            self._closed = self._levels.pop().opener
        elif sign == ";":
            self._ended = True
        return bool(self._levels)

    def _takes_name(self, token: Token) -> bool:
        is_word, attribute = token.kind is Kind.WORD, self._is_sign(-1, ".")
        if is_word and not attribute:
            if token.text in _WRITING or (token.text in _LOCKING and self._word(-1) == "for"):
                return False
            self._note_clause(token.text)
        if attribute:
            self._note_attribute(token.text)
        if self._is_alias_of_a_function() or (is_word and token.text in _VALUES_OF_THE_SESSION):
            self._scalars.add(token.text)
        if not is_word or attribute or token.text not in RESERVED_WORDS:
            self.names.add(token.text)
        return token.text not in self._effects

    def _end_run(self, token: Token) -> None:
        if token.kind is Kind.SIGN and token.text in _OPERATOR_CHARACTERS:
            self._run += token.text
        elif self._run:
            self.operators.add(self._run)
            self._run = ""

    def _note_clause(self, word: str) -> None:
        level = self._levels[-1]
        if word == "with" and level.first == len(self._past):
            level.clause = "with"
        elif word == "from":
            level.clause = "from"
        elif word in _QUERIES or (word in _AFTER_FROM and self._word(-1) != "collation"):
            level.clause = ""

    # What it calls

    def _opens(self, sign: str) -> None:
        level, opener, clause = self._levels[-1], "" if sign == "(" else sign, ""
        named = sign == "(" and self._is_name(-1)
        if named:
            opener = "rows" if self._word(-1) == "from" and self._word(-2) == "rows" else self._past[-1].text
            self._plain = self._plain and self._may_stand_before_a_parenthesis()
        if sign == "(" and level.clause == "from" and (opener in _FOLLOWED_BY_RELATIONS or not named):
            clause = "from"
        self._levels.append(_Level(opener=opener, clause=clause, first=len(self._past) + 1))

    def _note_attribute(self, name: str) -> None:
        # `table.column` is harmless. `(expression).name`, `array[1].name` and `$1.name` may be function calls: measured,
        # `('sequence'::regclass).nextval` advances the sequence. So may `alias.name` of a function in FROM.
        if self._is_name(-2):
            self._qualifiers.add(self._past[-2].text)
        elif name not in self._known and name not in self._pure:
            self._plain = False

    def _is_alias_of_a_function(self) -> bool:
        at = -2 if self._word(-1) == "as" else -1
        if self._is_sign(at, ")"):
            return bool(self._closed) and self._closed not in _FOLLOWED_BY_RELATIONS
        return self._word(at) == "ordinality" or self._word(at) in _VALUES_OF_THE_SESSION

    def _may_stand_before_a_parenthesis(self) -> bool:
        """Return whether the name just read calls nothing that may write."""
        parts, before = self._name_and_what_is_before()
        if len(parts) > 1:
            self._scalars.add(parts[-1])
            return self._is_type(before) or self._is_known(*parts)
        word = self._past[-1]
        if self._is_new_name(word, before):
            return True
        self._scalars.add(word.text)
        if word.kind is Kind.WORD and (word.text == "cast" or word.text in CONSTRUCT_WORDS):
            return word.text == "values" or (word.text != "treat" and not self._is_relation(before))
        if word.kind is Kind.WORD and word.text in RESERVED_WORDS:
            return self._word(before) != "collation" or not self._is_relation(before - 1)
        return (
            word.text in self._known
            or word.text in self._pure
            or self._is_type(before)
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
        if schemas == ["pg_catalog"] and name in self._known:
            return True
        return len(schemas) == 1 and (name in self._pure or ".".join(parts) in self._pure)

    def _is_type(self, before: int) -> bool:
        """Return whether what follows is a type, or a name given by AS, with something in parentheses."""
        return self._is_sign(before, "::") or self._word(before) == "as"

    def _is_relation(self, before: int) -> bool:
        """Return whether a construct may stand in FROM: `FROM CAST(x AS t)` makes an alias out of any name in it."""
        level = self._levels[-1]
        listed = level.clause == "from" and self._is_sign(before, ",")
        return listed or self._word(before) in _FOLLOWED_BY_RELATIONS or level.opener == "rows"

    def _is_new_name(self, name: Token, before: int) -> bool:
        """Return whether `name (` begins a list of column names: of a member of WITH, or of an alias without AS."""
        clause = self._levels[-1].clause
        if clause == "with":
            return True
        if clause != "from" or (name.kind is Kind.WORD and name.text in KEYWORDS):
            return False
        return self._is_plain_name(before) or self._is_closed(before) or self._word(before) == "ordinality"

    def _is_construct(self, word: str, before: int) -> bool:
        """Return whether a word that could name a function is part of the grammar here."""
        previous = self._word(before)
        if word in _AFTER_A_PARENTHESIS:
            return self._is_closed(before)
        if word in {"rollup", "cube"}:
            return self._is_grouping_element(before)
        if word == "join":
            return self._levels[-1].clause == "from" and (previous in _JOINS or self._ends_operand(before))
        if previous == "not" and word in {"ilike", "materialized"}:
            before -= 1  # NOT stands before a function, too: what matters is what is before it
        if word == "ilike":
            return self._ends_operand(before)
        return self._word(before) in _PAIRS.get(word, ())

    def _is_grouping_element(self, before: int) -> bool:
        # Elsewhere in the list it is doubted: commas also stand in what only looks like the end of an element.
        if self._word(before) in {"all", "distinct"}:
            before -= 1
        if self._word(before) == "by":
            return self._word(before - 1) == "group"
        return self._levels[-1].opener == "sets" and (self._is_sign(before, ",") or self._is_sign(before, "("))

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
        # After DISTINCT ON (...) and OPERATOR(...) begins an expression; after every other parenthesis, none does.
        return self._is_sign(at, ")") and self._closed not in {"on", "operator"}

    def _ends_operand(self, at: int) -> bool:
        token = self._token(at)
        if token is None or token.kind is Kind.LITERAL:
            return token is not None
        if token.kind is Kind.SIGN:
            return token.text == "]" or self._is_closed(at)
        return self._is_plain_name(at) or self._word(at) in _ENDS_OF_OPERANDS
