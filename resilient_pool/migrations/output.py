"""A command's output: whole lines, without secrets, of which the last are kept."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import unquote

from resilient_pool.config.secrets import Secret, scrub
from resilient_pool.migrations.connect_failures import OutputScanner

LineSink = Callable[[str], object]
"""Is given each line, scrubbed and without its end."""

_LOGGER = logging.getLogger("resilient_pool")
_LONGEST_LINE = 65536
_CUT_OFF = 4096
_KEPT_FOR_THE_RESULT = 40
_PASSWORD_IN_URL = re.compile(r"://[^\s:/?#@]*:([^\s@]+)@")
# In a DSN of words (quoted or not), and in a URL's query.
_PASSWORD_IN_PAIRS = re.compile(r"\bpassword\s*=\s*(?:'((?:[^'\\]|\\.)*)'|([^\s&;'\"]+))", re.IGNORECASE)
_NAME_OF_PASSWORD = re.compile(r"(?:PASSWORD|PASSWD|PASSPHRASE|(?:^|_)(?:PASS|PW|PWD))\Z", re.IGNORECASE)
# A URL, also one that lost a slash or its scheme, or words such as `password=...`.
_LOOKS_SECRET = re.compile(r"[a-z]:/|@|(?:pass|pwd|secret|token)\w*['\"]?\s*[=:]", re.IGNORECASE)
_DIRECTORIES = frozenset({"PWD", "OLDPWD"})


def print_line(line: str) -> None:
    """Write a line to standard output at once; nothing if there is none.

    Raises:
        OSError: It cannot be written, for example because the reader has gone.
    """
    if sys.stdout is not None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def never_failing(sink: LineSink) -> LineSink:
    """Return a sink that never raises: after the given one has raised, that is logged, and it gets no more lines."""
    listens = True

    def emit(line: str) -> None:
        nonlocal listens
        if not listens:
            return
        try:
            sink(line)
        except Exception as error:
            listens = False
            unusual = None if isinstance(error, OSError) else error
            _LOGGER.warning("the output of the migration can no longer be written: %r", error, exc_info=unusual)

    return emit


def secrets_around(texts: Iterable[str], environment: Mapping[str, str] = os.environ) -> Iterator[Secret]:
    """Yield the passwords that a command is given.

    They are the values of variables whose name ends in PASSWORD, PASSWD or PASSPHRASE, or as a word of its own in PASS, PW or
    PWD, and, in arguments and variables, what stands in a URL as `user:password@` or anywhere as `password=...`.
    """
    for name, value in environment.items():
        if value and name not in _DIRECTORIES and _NAME_OF_PASSWORD.search(name):
            yield Secret(value)
    for text in (*texts, *environment.values()):
        yield from map(Secret, _passwords_in(text))


def may_hold_a_password(text: str) -> bool:
    """Whether an argument looks like a DSN, or like a part of one, so that no error may quote it."""
    return _LOOKS_SECRET.search(text) is not None


def _passwords_in(text: str) -> Iterator[str]:
    for found in _PASSWORD_IN_URL.finditer(text):
        yield found[1]
        yield unquote(found[1])
    for found in _PASSWORD_IN_PAIRS.finditer(text):
        if plain := found[2] or re.sub(r"\\(.)", r"\1", found[1] or ""):
            yield plain
            yield unquote(plain)


class OutputLines:
    """Makes lines of a command's output.

    A secret may be cut in two between two reads, but not between two lines, so that nothing is emitted before its line has
    ended. A line of more than 65536 bytes is cut short.

    Args:
        secrets: What is known to be secret.
        sink: Is given each line. It must not raise; see `never_failing`.

    Attributes:
        scanner: What the lines say about connecting; it gets them as they were written.
        emitted: The last lines, without secrets.
    """

    __slots__ = ("_rest", "_secrets", "_sink", "emitted", "scanner")

    def __init__(self, secrets: Iterable[Secret], sink: LineSink) -> None:
        self._secrets = tuple(secrets)
        self._sink = sink
        self._rest = b""
        self.scanner = OutputScanner()
        self.emitted: deque[str] = deque(maxlen=_KEPT_FOR_THE_RESULT)

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[:_LONGEST_LINE]
        for line in lines:
            self._finish_line(line)

    def end(self) -> None:
        """Emit a last line that has no end."""
        if self._rest:
            self._finish_line(self._rest)
            self._rest = b""

    def _finish_line(self, line: bytes) -> None:
        text = line[:_LONGEST_LINE].decode(errors="replace").rstrip("\r")
        self.scanner.feed(text)
        shown = scrub(text, self._secrets)
        if len(line) >= _LONGEST_LINE:
            # Where it was cut a secret may have been cut too, which `scrub` cannot recognise.
            shown = shown[:-_CUT_OFF] + " (the line goes on)"
        self.emitted.append(shown)
        self._sink(shown)
