"""Keeps secrets out of texts: `Secret` holds one, `scrub` removes them."""

from __future__ import annotations

import hmac
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NoReturn, Self, TypeVar
from urllib.parse import quote, quote_plus

MASK = "****"
"""What stands where a secret was. Its length says nothing about the secret's."""

_SHORTEST_PART = 4
_LONGEST_PART = 8

_HIDDEN_RUN = re.compile(rb"\x01+")
_LOWER_CASE_ESCAPE = re.compile(r"%[0-9A-F]{2}")

# What stands before a password in a URL; one slash is what a `Path` leaves of two. Found by its colon, since a pattern
# that begins with a run of letters is tried anew at each letter of a long word.
_SCHEME_END = re.compile(r"(?<=[A-Za-z0-9+.\-]):/{1,3}[^\s:/?#@]*:")
_WORD = re.compile(r"\S+")

_KEY = r"(?:password|passwd|pwd|passphrase)"
_QUOTED = r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.|\"\")*\""
# Compiled by `re` when something is scrubbed for the first time, as all that only errors need: an import need not take as long.
_PAIRS = (
    rf"(?P<kept>{_KEY}\s*=\s*)(?:{_QUOTED}|\S+)",
    rf"(?P<kept>{_KEY}['\"]\s*:\s*)(?:{_QUOTED}|\S+)",
    rf"(?P<kept>\bpassword\s+)(?:{_QUOTED})",
)


T_co = TypeVar("T_co", covariant=True)


class Hidden(Generic[T_co]):
    """Holds something that may be secret, or hold secrets: masked by `repr`, `str` and `format`, not to be pickled or listed."""

    # A function, not the value: a list of an object's attributes shows nothing.
    __slots__ = ("_read",)

    def __init__(self, value: T_co) -> None:
        self._read: Callable[[], T_co] = lambda: value

    def reveal(self) -> T_co:
        """Return what is held."""
        return self._read()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __format__(self, specification: str) -> str:
        return MASK

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be pickled")


class Secret(Hidden[str]):
    """A text that shows itself only when asked to: masked by `repr`, `str` and `format`, not to be pickled or listed.

    It is not a `str`, so that nothing which takes text can take it by mistake.

    Raises:
        TypeError: `value` is not a `str`. The message says its type only.
    """

    __slots__ = ()

    def __init__(self, value: str) -> None:
        if not isinstance(value, str):
            kind = type(value).__name__
            del value
            raise TypeError(f"a secret must be a str, not {kind}")
        super().__init__(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_bytes(self.reveal()), _bytes(other.reveal()))

    def __hash__(self) -> int:
        return hash((Secret, self.reveal()))


def holds_secret(value: object) -> bool:
    """Return whether `repr` would show the password of a URL, or of a `password=...`, that stands in `value`."""
    shown = repr(value)
    return scrub(shown) != shown


def scrub(text: str, secrets: Iterable[Secret] = ()) -> str:
    """Return `text` without secrets.

    Taken out are the known `secrets`: whole, in part, URL-quoted, escaped as by `repr`, JSON or HTML, and in base64 or hexadecimal digits; and, known or not, the
    password of every `scheme://user:password@host` and the value of every `password=...`. A part is a run of half the
    secret's length, of at least 4 and at most 8 characters. It rather takes out too much than too little.

    Args:
        text: Any text, such as an error message or a command's output.
        secrets: What is known to be secret. Default: nothing.
    """
    for secret in secrets:
        text = _without(text, secret.reveal())
    if "@" in text:
        text = _WORD.sub(_without_userinfo, text)
    for pair in _PAIRS:
        text = re.sub(pair, _masked, text, flags=re.IGNORECASE)
    return text


def _without_userinfo(match: re.Match[str]) -> str:
    """Return a word without the password of the URL in it."""
    word = match[0]
    # Up to the last "@": a password that was not URL-quoted may hold any of the characters that end a URL's parts.
    end = word.rfind("@")
    begin = _SCHEME_END.search(word, 0, end) if end > 0 else None
    return word if begin is None or begin.end() == end else word[: begin.end()] + MASK + word[end:]


def _masked(match: re.Match[str]) -> str:
    return match["kept"] + MASK


def _without(text: str, value: str) -> str:
    """Return `text` with each run of characters masked that `value` could have left in it."""
    if not value:
        return text
    # No regular expression is made of a secret: the `re` module would remember it.
    size = min(max(_SHORTEST_PART, min(_LONGEST_PART, (len(value) + 1) // 2)), len(value))
    runs = {form[start : start + size] for form in _forms(value) for start in range(len(form) - size + 1)}
    hidden = bytearray(len(text))
    for start in range(len(text) - size + 1):
        if text[start : start + size] in runs:
            hidden[start : start + size] = b"\x01" * size
    return "".join(_unhidden(text, hidden))


def _unhidden(text: str, hidden: bytearray) -> Iterator[str]:
    kept_from = 0
    for run in _HIDDEN_RUN.finditer(hidden):
        yield text[kept_from : run.start()]
        yield MASK
        kept_from = run.end()
    yield text[kept_from:]


def _forms(value: str) -> set[str]:
    """Return how `value` may be written."""
    quoted = {quote(value, errors="surrogatepass"), quote(value, safe="", errors="surrogatepass")}
    quoted.add(quote_plus(value, errors="surrogatepass"))
    lower = {_LOWER_CASE_ESCAPE.sub(lambda escape: escape[0].lower(), form) for form in quoted}
    doubled = value.replace("\\", "\\\\")
    escaped = {repr(value)[1:-1], ascii(value)[1:-1], doubled, doubled.replace("'", "\\'"), value.replace("'", "''")}
    escaped |= {json.dumps(value, ensure_ascii=plain)[1:-1] for plain in (True, False)}
    raw = _bytes(value)
    from html import escape  # noqa: PLC0415 - its table of names would take 2 ms of the package's import

    encoded = {raw.hex(), raw.hex().upper(), escape(value), *_in_base64(raw)}
    return {value} | quoted | lower | escaped | encoded


def _in_base64(value: bytes) -> Iterator[str]:
    """Yield how base64 writes it, whichever text stands before it, as `user:` does: without the characters that both share."""
    for before, shared in enumerate((0, 2, 3)):
        written = b64encode(bytes(before) + value).decode().rstrip("=")
        whole = written if (before + len(value)) % 3 == 0 else written[:-1]
        yield whole[shared:]
        yield whole[shared:].replace("+", "-").replace("/", "_")


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")
