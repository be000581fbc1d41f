"""The only module that opens connections: the password, the driver's connect, `init`, and what the first one learns."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import anyio
import asyncpg

from resilient_pool.config import PoolConfig
from resilient_pool.core import wire
from resilient_pool.core.clock import Clock
from resilient_pool.core.wire import AnyConnection, Link, ReadOnly, ServerFacts
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
        read_only: Why the server has last refused a write of `init`, if it has.
    """

    def __init__(self, config: PoolConfig, clock: Clock, counters: Counters, dispatcher: Dispatcher) -> None:
        self._config = config
        self._target = config
        self._clock = clock
        self._counters = counters
        self._dispatcher = dispatcher
        self.facts: ServerFacts | None = None
        self.read_only: ReadOnly | None = None

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
        target = self._target  # `redirect` may change it meanwhile
        limits = [limit for limit in (target.timeout, seconds) if limit is not None]
        ends = self._clock.monotonic() + max(min(limits), 0.001)
        try:
            link = Link(await self._connect(target, ends))
        except Exception as error:
            wire.forget_locals(error)
            raise
        ready = False
        try:
            with anyio.fail_after(self._left(ends)):
                await self._prepare(target, link)
            ready = True
        finally:
            if not ready:
                link.terminate()
        link.opened_at = self._clock.monotonic()
        self._counters.opened += 1
        return link

    def _left(self, ends: float) -> float:
        return max(ends - self._clock.monotonic(), 0.001)

    async def _connect(self, target: PoolConfig, ends: float) -> AnyConnection:
        try:
            return await self._dial(target, self._left(ends))
        except asyncpg.InvalidPasswordError:
            # A password that is asked for may have been changed in the meantime.
            if not callable(target.password):
                raise
        return await self._dial(target, self._left(ends))

    async def _dial(self, target: PoolConfig, limit: float) -> AnyConnection:
        arguments = target.connect_arguments()
        arguments["timeout"] = limit
        if target.password is not None:
            arguments["password"] = partial(_reveal, target)
        if self.facts is not None and self.facts.has_pooler and target.statement_cache_size is None:
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

    async def _prepare(self, target: PoolConfig, link: Link) -> None:
        link.tune(keepalive=self._config.tcp_keepalive, user_timeout=self._config.tcp_user_timeout)
        # Several first connections may have been dialled before the first of them had its answer.
        facts = self.facts if target is self._target and self.facts is not None else await self._learn(target, link)
        link.is_pooled = facts.has_pooler
        if facts.has_pooler and target.statement_cache_size is None:
            link.disable_statement_cache()
        if self._config.init is not None:
            try:
                await self._config.init(link.connection)
            except asyncpg.ReadOnlySQLTransactionError:
                await link.learn_why_read_only()
                self.read_only = link.read_only
                raise
            await link.keep_roles()

    async def _learn(self, target: PoolConfig, link: Link) -> ServerFacts:
        facts = await link.inspect(None)
        if self.facts is None and target is self._target:
            self.facts = facts
            self._counters.pooler = facts.has_pooler
            if facts.has_pooler:
                self._tell_of_pooler(target, facts)
        return facts

    def _tell_of_pooler(self, target: PoolConfig, facts: ServerFacts) -> None:
        self._dispatcher.tell(
            PoolerDetected(
                handshake_pid=facts.handshake_pid,
                backend_pid=facts.backend_pid,
                statement_cache_size=target.statement_cache_size or 0,
            )
        )


async def _reveal(target: PoolConfig) -> str | None:
    # The driver keeps this function in its parameters, and calls it. The password itself it holds only while it
    # connects.
    password: Any = target.password
    if isinstance(password, Secret):
        return password.reveal()
    password = password()
    if inspect.isawaitable(password):
        password = await password
    return password.reveal() if isinstance(password, Secret) else password
