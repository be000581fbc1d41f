"""Runs a command as a child process, which never outlives this process, and reads its output: whole lines, without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
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
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_CHUNK = 65536
_AFTER_THE_END = 1.0


def request_to_run(command: Sequence[str], dsn: Secret | None) -> Secret:
    """Return the request to the supervisor; no stack frame and no argument list shows its content.

    Without a `dsn`, `DATABASE_URL` stays as it is in this process.
    """
    variables = {} if dsn is None else {"DATABASE_URL": _as_latin1(dsn.reveal())}
    return Secret(json.dumps({"command": [_as_latin1(word) for word in command], "environment": variables}))


def _as_latin1(word: str) -> str:
    # The bytes as they are passed on, one character each: JSON knows no others than those of texts.
    return os.fsencode(word).decode("latin-1")


async def run_command(request: Secret, lines: OutputLines, *, stop_within: float) -> int:
    """Run a command to its end and return its exit status, 128 and the number for one that a signal ended.

    It has no standard input, and its error output is read together with its standard output. Cancelled, it interrupts
    the command and whatever that has started as Ctrl-C would, once, and waits for their end. Should this process die,
    however suddenly, the same happens. A process that has put itself into a session or a process group of its own is not
    ended; its output is read for one second more than the command's.

    Args:
        request: What to run, as `request_to_run` says it. Its environment is this process's.
        lines: Is given the output as it comes.
        stop_within: How many seconds it is given to end by itself before it is terminated, and 3 seconds later killed.
    """
    # A pipe of our own: one that asyncio makes keeps the process from having ended for as long as any process holds it.
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    try:
        pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
        try:
            process = await _start(theirs, stop_within)
        except BaseException:
            pipe.close()
            raise
    finally:
        os.close(theirs)
    collecting = asyncio.ensure_future(_collect(process, reader, pipe, lines))
    try:
        await _send_request(process, request)
        return await asyncio.shield(collecting)
    finally:
        if process.stdin is not None:
            process.stdin.close()  # the supervisor's sign to end it, if it has not ended
        await wait_until_done(collecting)


async def _start(output: int, stop_within: float) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", str(_SUPERVISOR), str(stop_within)),
        stdin=asyncio.subprocess.PIPE,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


async def _send_request(process: asyncio.subprocess.Process, request: Secret) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(OSError):  # it has ended already: its status says so
        process.stdin.write(request.reveal().encode() + b"\n")
        await process.stdin.drain()


async def _collect(
    process: asyncio.subprocess.Process, reader: asyncio.StreamReader, pipe: asyncio.ReadTransport, lines: OutputLines
) -> int:
    reading = asyncio.ensure_future(_read(reader, lines))
    try:
        status = await process.wait()
        # What is in the pipe already; its end need not come, since a process in another session may hold it.
        await asyncio.wait({reading}, timeout=_AFTER_THE_END)
    finally:
        reading.cancel()
        pipe.close()
    lines.end()
    return status


async def _read(reader: asyncio.StreamReader, lines: OutputLines) -> None:
    while data := await reader.read(_CHUNK):
        lines.feed(data)


async def wait_until_done(task: asyncio.Future[Any]) -> None:
    """Wait for a task that ends by itself soon, also while being cancelled; the cancellation is passed on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


# Its output


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
    ended. A line of more than 65536 bytes is cut short. The sink must not raise: see `never_failing`.

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
