"""The only module that runs a command: beside this process, never left behind by it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from resilient_pool.migration.output import Lines

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_CHUNK = 65536


async def run_command(
    command: Sequence[str], lines: Lines, *, environment: Mapping[str, str], stop_within: float
) -> int:
    """Run a command to its end and return its exit status, 128 and the number for one that a signal ended.

    It has no standard input, and its error output is read together with its standard output. Cancelled, it interrupts
    the command and whatever that has started as Ctrl-C would, once, and waits for their end. Should this process die,
    however suddenly, the same happens.

    Args:
        command: The program and its arguments.
        lines: Is given the output as it comes.
        environment: The command's environment variables.
        stop_within: How many seconds it is given to end by itself before it is terminated, and 3 seconds later killed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", str(_SUPERVISOR), str(stop_within)),
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
    following = asyncio.ensure_future(_follow(process, lines))
    try:
        return await asyncio.shield(following)
    finally:
        if process.stdin is not None:
            process.stdin.close()  # the supervisor's sign to end it, if it has not ended
        await to_its_end(following)


async def _follow(process: asyncio.subprocess.Process, lines: Lines) -> int:
    while process.stdout is not None and (data := await process.stdout.read(_CHUNK)):
        lines.feed(data)
    lines.end()
    return await process.wait()


async def to_its_end(task: asyncio.Future[Any]) -> None:
    """Wait for a task that ends by itself soon, also while being cancelled; the cancellation is passed on afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def finish(clean_up: Coroutine[Any, Any, None]) -> None:
    """Run a bounded clean-up to its end, also while being cancelled."""
    await to_its_end(asyncio.ensure_future(clean_up))
