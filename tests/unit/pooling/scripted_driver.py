"""A driver for unit tests: connections of asyncpg's class over a protocol that answers, hangs and is lost as told."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import asyncpg

_CONFIG = SimpleNamespace(
    statement_cache_size=0, max_cached_statement_lifetime=300, command_timeout=None, max_cacheable_statement_size=0
)


class ScriptedServer:
    """What `connect=` of a pool is: it opens connections, or refuses to.

    Attributes:
        protocols: Every connection that was ever opened.
        refusal: What the next attempts to connect end with; `None` to accept them.
        hangs: Whether statements are not answered for the time being.
        broken_rules: What a driver must never see: two statements at the same time on one connection.
    """

    def __init__(self) -> None:
        self.protocols: list[ScriptedProtocol] = []
        self.refusal: Exception | None = None
        self.hangs = False
        self.broken_rules: list[str] = []

    async def connect(self, *_, **__):
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        protocol = ScriptedProtocol(self, pid=len(self.protocols) + 1)
        connection = asyncpg.Connection(
            protocol, protocol.transport, asyncio.get_running_loop(), ("fake", 0), _CONFIG, SimpleNamespace()
        )
        protocol.connection = connection
        self.protocols.append(protocol)
        return connection

    def open(self) -> list[ScriptedProtocol]:
        """Which connections the client has not closed."""
        return [protocol for protocol in self.protocols if not protocol.is_released]


class ScriptedProtocol:
    """Stands where asyncpg's protocol does, with as much of it as a pool needs."""

    def __init__(self, server: ScriptedServer, pid: int) -> None:
        self.server = server
        self.pid = pid
        self.connection: asyncpg.Connection | None = None
        self.queries_count = 0
        self.connected = True
        self.is_released = False
        self.busy = False
        self.cancelling = False
        self.is_misused = False
        self.text = ""
        self._ours, self._theirs = socket.socketpair()
        self.transport = SimpleNamespace(get_extra_info=lambda name: self._ours if name == "socket" else None)

    # What a test does

    def lose(self, *, noticed: bool) -> None:
        """Let the server end the connection: the socket shows it, and the driver has noticed or has not yet."""
        self._theirs.close()
        if noticed and self.connected:
            self.connected, self.is_released = False, True
            self._ours.close()
            self.connection._cleanup()

    # What the driver's connection and the pool use

    def get_settings(self):
        return SimpleNamespace(server_version="18.0")

    def get_server_pid(self):
        return self.pid

    def is_connected(self):
        return self.connected

    def is_in_transaction(self):
        return False

    def _is_cancelling(self):
        return self.cancelling

    async def _wait_for_cancellation(self, *_):
        while self.server.hangs and self._is_alive():
            await asyncio.sleep(0)
        self.cancelling = False

    def _is_alive(self):
        return self.connected and self._theirs.fileno() != -1

    def _get_timeout(self, timeout):
        return timeout

    def get_record_class(self):
        return asyncpg.Record

    async def prepare(self, *_, **__):
        raise asyncpg.FeatureNotSupportedError("only simple queries")

    async def query(self, text, timeout):
        if self.cancelling and text == self.text:
            await self._wait_for_cancellation()
        if self.busy and (text == self.text or self.is_misused):  # what an application does to its own lease
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        if self.busy or self.cancelling:
            self.server.broken_rules.append(f"{text!r} on connection {self.pid} while another statement runs")
        self.busy, self.text = True, text
        self.queries_count += 1
        try:
            await asyncio.sleep(0)
            while self.server.hangs and self._is_alive():
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelling = self._is_alive()
            raise
        finally:
            self.busy = False
        if not self._is_alive():
            self.lose(noticed=True)
            raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        return "OK"

    async def close(self, timeout):
        while self.server.hangs and self._is_alive():
            await asyncio.sleep(0)
        self.abort()

    def abort(self):
        self.connected, self.is_released = False, True
        self._ours.close()
        self._theirs.close()

    def resume_writing(self):
        """Nothing is ever paused."""
