"""A listener on 127.0.0.1 that serves connections in a thread and an event loop of its own."""

from __future__ import annotations

import abc
import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Generic, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from resilient_pool.testing._relay import Relay

Result = TypeVar("Result")
RelayType = TypeVar("RelayType", bound=Relay)

_PATIENCE = 30.0
_LISTEN_BACKLOG = 512
_READ_LIMIT = 1 << 20


class LoopbackService(abc.ABC, Generic[RelayType]):
    """Listens, runs a relay for each connection, and closes all sockets at the end.

    Everything with a leading underscore but `_call_in_loop()` and `_run_coroutine()` belongs to the thread's event loop.
    """

    host = "127.0.0.1"

    def __init__(self, listen_port: int = 0) -> None:
        self._listen_port = listen_port
        self._running: dict[RelayType, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._reserved: socket.socket | None = None
        self._listener: asyncio.Server | None = None

    def start(self) -> None:
        """Begin to listen."""
        if self._thread is not None:
            return
        self._reserved = _reserve(self._listen_port)
        self._listen_port = self._reserved.getsockname()[1]
        # Not the loop policy of the program under test: this loop closes sockets in the documented order.
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=repr(self), daemon=True)
        self._thread.start()
        self._run_coroutine(self._started())

    def close(self) -> None:
        """Stop listening and abort every connection, on both sides."""
        if self._loop is None or self._thread is None:
            return
        self._run_coroutine(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Where it listens, or will again."""
        return self._listen_port

    def dsn(self, dsn: str) -> str:
        """Point a server's URL here instead, everything else as it is."""
        parts = urlsplit(dsn)
        account = parts.netloc.rpartition("@")[0]
        place = f"{self.host}:{self.port}"
        return urlunsplit(parts._replace(netloc=f"{account}@{place}" if account else place))

    @abc.abstractmethod
    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    async def _started(self) -> None:
        await self._listen()

    def _run(self, relay: RelayType) -> asyncio.Task[None]:
        self._running[relay] = task = asyncio.get_running_loop().create_task(relay.run())
        task.add_done_callback(lambda _: self._running.pop(relay))
        return task

    async def _listen(self) -> None:
        if self._reserved is not None:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=_READ_LIMIT), self._on_connection),
                sock=self._reserved,
                backlog=_LISTEN_BACKLOG,
            )
            self._reserved = None

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        # asyncio accepts a connection in one turn of the loop and serves it in the next: a listener that is closed in
        # between would leak the accepted socket.
        for listening in listener.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        try:
            await yield_to_loop()
        finally:
            listener.close()
        # Bound but not listening: the port stays reserved, and connecting to it is refused.
        self._reserved = _reserve(self._listen_port)

    async def _shut_down(self) -> None:
        await self._stop_listening()
        if self._reserved is not None:
            self._reserved.close()
        tasks = list(self._running.values())
        for relay, task in list(self._running.items()):
            relay.abort()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await yield_to_loop()

    def _call_in_loop(self, action: Callable[[], Result]) -> Result:
        async def act() -> Result:
            result = action()
            await yield_to_loop()
            return result

        return self._run_coroutine(act())

    def _run_coroutine(self, work: Coroutine[object, object, Result], patience: float = _PATIENCE) -> Result:
        if self._loop is None:
            work.close()
            raise RuntimeError(f"{self!r} was not started, or is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(patience)


async def yield_to_loop() -> None:
    """Give aborted transports, which close their sockets in the loop's next turn, the time to do so."""
    for _ in range(3):
        await asyncio.sleep(0)


def _reserve(port: int) -> socket.socket:
    # With the protocol named asyncio turns Nagle's algorithm off, which else costs 40 ms per small answer.
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((LoopbackService.host, port))
    except OSError:
        reserved.close()
        raise
    return reserved
