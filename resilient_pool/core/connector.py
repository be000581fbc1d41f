"""The only module that opens connections: the password, the driver's connect, `init`, and what the first one learns."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, cast

import asyncpg

from resilient_pool.config import PoolConfig
from resilient_pool.core import wire
from resilient_pool.core.clock import Clock
from resilient_pool.core.wire import AnyConnection, Link, ServerFacts
from resilient_pool.observe.events import Dispatcher, PoolerDetected
from resilient_pool.observe.redaction import Secret
from resilient_pool.observe.stats import Counters

_STANDBYS = frozenset({"standby", "read-only", "prefer-standby"})


class Connector:
    """Opens one connection at a time, as often as it is asked.

    Args:
        config: Where to connect, and how.
        clock: Measures what it takes.
        counters: Where connections are counted.
        dispatcher: Who is told of a pooler.

    Attributes:
        facts: What stands at the other end; `None` before the first connection.
    """

    def __init__(self, config: PoolConfig, clock: Clock, counters: Counters, dispatcher: Dispatcher) -> None:
        self._config = config
        self._target = config
        self._clock = clock
        self._counters = counters
        self._dispatcher = dispatcher
        self.facts: ServerFacts | None = None

    @property
    def expects_writes(self) -> bool:
        """Whether the server that is connected to should accept writes."""
        read_only = self._target.server_settings.get("default_transaction_read_only", "off").lower()
        return self._target.target_session_attrs not in _STANDBYS and read_only not in ("on", "true", "yes", "1")

    def redirect(self, target: PoolConfig) -> None:
        """Use the connection arguments of `target` for every connection opened from now on."""
        self._target = target
        self.facts = None  # something else may stand there

    async def open(self, seconds: float | None) -> Link:
        """Open a connection, ready for use.

        Args:
            seconds: How long it may take; the configured connect `timeout` if that is shorter.

        Raises:
            Exception: Whatever the driver, the password's callable or `init` raises. No frame behind it holds a secret.
        """
        ends = None if seconds is None else self._clock.monotonic() + seconds
        try:
            link = Link(await self._connect(self._limit(ends)))
        except Exception as error:
            wire.forget_locals(error)
            raise
        ready = False
        try:
            await self._prepare(link, ends)
            ready = True
        finally:
            if not ready:
                link.terminate()
        self._counters.opened += 1
        return link

    def _limit(self, ends: float | None) -> float | None:
        left = None if ends is None else ends - self._clock.monotonic()
        limits = [limit for limit in (self._target.timeout, left) if limit is not None]
        return max(min(limits), 0.001) if limits else None

    async def _connect(self, limit: float | None) -> AnyConnection:
        try:
            return await self._dial(limit)
        except asyncpg.InvalidPasswordError:
            # A password that is asked for may have been changed in the meantime.
            if not callable(self._target.password):
                raise
        return await self._dial(limit)

    async def _dial(self, limit: float | None) -> AnyConnection:
        arguments = self._target.connect_arguments()
        arguments["timeout"] = limit
        if self._target.password is not None:
            arguments["password"] = self._reveal_password
        if self.facts is not None and self.facts.has_pooler and self._target.statement_cache_size is None:
            arguments["statement_cache_size"] = 0
        connect = cast("Callable[..., Awaitable[object]]", self._config.connect or asyncpg.connect)
        connection = await connect(
            **arguments,
            loop=self._config.loop,
            connection_class=self._config.connection_class,
            record_class=self._config.record_class,
        )
        if not isinstance(connection, self._config.connection_class):
            raise asyncpg.InterfaceError(
                f"connect= returned a {type(connection).__name__}, not an instance of connection_class="
                f"{self._config.connection_class.__name__}"
            )
        return connection

    async def _reveal_password(self) -> str | None:
        # The driver keeps this method in its parameters, and calls it. The password itself it holds only while it
        # connects.
        password: Any = self._target.password
        if isinstance(password, Secret):
            return password.reveal()
        password = password()
        if inspect.isawaitable(password):
            password = await password
        return password.reveal() if isinstance(password, Secret) else password

    async def _prepare(self, link: Link, ends: float | None) -> None:
        link.tune(keepalive=self._config.tcp_keepalive, user_timeout=self._config.tcp_user_timeout)
        if self.facts is None:
            await self._learn(link, self._limit(ends))
        # Several first connections may have been dialled before the first of them had its answer.
        if self.facts is not None and self.facts.has_pooler and self._target.statement_cache_size is None:
            link.disable_statement_cache()
        if self._config.init is not None:
            await self._config.init(link.connection)

    async def _learn(self, link: Link, seconds: float | None) -> None:
        facts = await link.inspect(seconds)
        if self.facts is not None:
            return  # several first connections were opened at once, and another one asked before
        self.facts = facts
        self._counters.pooler = facts.has_pooler
        if not facts.has_pooler:
            return
        self._dispatcher.tell(
            PoolerDetected(
                handshake_pid=facts.handshake_pid,
                backend_pid=facts.backend_pid,
                statement_cache_size=self._target.statement_cache_size or 0,
            )
        )
