"""Runs a command as a child process, which never outlives this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resilient_pool.config.secrets import Secret
from resilient_pool.migrations.output import OutputLines

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_CHUNK = 65536
_AFTER_THE_END = 1.0


def request_to_run(command: Sequence[str], dsn: Secret | None) -> Secret:
    """Return the request to the supervisor; no stack frame and no argument list shows its content.

    Args:
        command: The program and its arguments.
        dsn: What `DATABASE_URL` says to it; `None` leaves that as it is in this process.
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
