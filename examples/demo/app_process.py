"""One pool's application as a process: the only module of the demo that starts, stops, freezes and hears it."""

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
"""Seconds within which the application must have opened its pool, and within which it must have ended when told to."""


class ActorFailedError(Exception):
    """The application itself came down, which no mistreatment explains."""


class Actor:
    """The application on one pool, in a process of its own.

    Args:
        pool: The pool's name, as the application knows it.
        dsn: Where its database is.
        hear: Called with every answer the application reports.
    """

    def __init__(self, pool: str, dsn: str, hear: Callable[[Answer], None]) -> None:
        self.pool = pool
        self._dsn = dsn
        self._hear = hear
        self._heard = {event: asyncio.Event() for event in ("ready", "paused", "ended")}
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process and return when its pool is open.

        Raises:
            ActorFailedError: It did not come so far.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "demo.workload",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._complaints,
        )
        self._listener = asyncio.create_task(self._listen(self._process))
        self._tell(json.dumps({"pool": self.pool, "dsn": self._dsn}))
        await self._await("ready", PATIENCE)

    async def pause(self, limit: float) -> None:
        """Let the application finish what it does and start nothing new; wait for that `limit` seconds at most."""
        self._heard["paused"].clear()
        self._tell("pause")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard["paused"].wait(), limit)

    def resume(self) -> None:
        """Let it go on."""
        self._tell("resume")

    def freeze(self) -> None:
        """Stop the process where it stands, as a paused container is."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the frozen process go on."""
        self._signal(signal.SIGCONT)

    async def finish(self) -> None:
        """Tell the application to end, and hear it out.

        Raises:
            ActorFailedError: It did not end in good order.
        """
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await self._await("ended", PATIENCE)

    async def stop(self) -> None:
        """Make sure that nothing of it is left, whatever state it is in."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._complaints.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                self._process.send_signal(number)

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line.encode() + b"\n")

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise ActorFailedError("no pipe to hear the application through")
        while line := await process.stdout.readline():
            said = json.loads(line)
            if "event" in said:
                self._heard[said["event"]].set()
            else:
                self._hear(Answer(**said))

    async def _await(self, event: str, limit: float) -> None:
        waiter = asyncio.create_task(self._heard[event].wait())
        listening = [waiter] if self._listener is None else [waiter, self._listener]
        await asyncio.wait(listening, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if not self._heard[event].is_set():
            self._complaints.seek(0)
            complaints = self._complaints.read()[-2000:].decode(errors="replace")
            raise ActorFailedError(f"the application on {self.pool} never was {event}\n{complaints}")
