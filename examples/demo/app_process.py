"""One pool's application as a process: start, stop, freeze, and read its answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import Callable

from demo.results import Answer

PATIENCE = 20.0
"""Seconds within which the application must have opened its pool, and within which it must have ended after a request to end."""


class AppProcessError(Exception):
    """The application process itself failed."""


class AppProcess:
    """The application on one pool, in a process of its own.

    Args:
        pool: The pool's name, as the application knows it.
        dsn: Where its database is.
        on_answer: Called with every answer the application reports.
    """

    def __init__(self, pool: str, dsn: str, on_answer: Callable[[Answer], None]) -> None:
        self.pool = pool
        self._dsn = dsn
        self._on_answer = on_answer
        self._events = {event: asyncio.Event() for event in ("ready", "paused", "ended")}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and return when its pool is open.

        Raises:
            AppProcessError: It did not come so far.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "demo.application",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._stderr,
        )
        self._listener = asyncio.create_task(self._listen(self._process))
        self._send(json.dumps({"pool": self.pool, "dsn": self._dsn}))
        await self._await("ready", PATIENCE)

    async def pause(self, limit: float) -> None:
        """Let the application finish its operations and start no new ones; wait `limit` seconds at most."""
        self._events["paused"].clear()
        self._send("pause")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._events["paused"].wait(), limit)

    def resume(self) -> None:
        """Let it start operations again."""
        self._send("resume")

    def freeze(self) -> None:
        """Stop the process, as a paused container is."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue the frozen process."""
        self._signal(signal.SIGCONT)

    async def finish(self) -> None:
        """Ask the application to end, and wait until it has.

        Raises:
            AppProcessError: It did not end in good order.
        """
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await self._await("ended", PATIENCE)

    async def stop(self) -> None:
        """Kill the process, whatever state it is in."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._stderr.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                self._process.send_signal(number)

    def _send(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line.encode() + b"\n")

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise AppProcessError("the process has no pipe for its answers")
        while line := await process.stdout.readline():
            said = json.loads(line)
            if "event" in said:
                self._events[said["event"]].set()
            else:
                self._on_answer(Answer(**said))

    async def _await(self, event: str, limit: float) -> None:
        waiter = asyncio.create_task(self._events[event].wait())
        listening = [waiter] if self._listener is None else [waiter, self._listener]
        await asyncio.wait(listening, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if not self._events[event].is_set():
            self._stderr.seek(0)
            violations = self._stderr.read()[-2000:].decode(errors="replace")
            raise AppProcessError(f"the application on {self.pool} never was {event}\n{violations}")
