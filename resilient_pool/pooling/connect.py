"""Opens connections: whom to connect as and where, the driver's connect, `init`, and what the first one learns."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import anyio
import asyncpg

from resilient_pool._validation import is_sendable
from resilient_pool.config.pool_config import PassedOn, PoolConfig
from resilient_pool.config.secrets import Hidden, Secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import PoolerDetected
from resilient_pool.pooling.callbacks import answer_of
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import (
    AnyConnection,
    DriverConnection,
    ReadOnly,
    ServerInfo,
    draw_statement_names,
    forget_locals,
)
from resilient_pool.pooling.hosts import Candidate, PinnedLoop, Race, UnansweredHosts, candidates
from resilient_pool.retry.classifier import refuses_credentials, refuses_question, refuses_user
from resilient_pool.retry.verdict import Failure, Fault, Phase

_LOGGER = logging.getLogger("resilient_pool")

# So long a second client may take that is opened to find out what a proxy does: a pooler may let it wait for the first one.
_SECOND_CLIENT_LIMIT = 2.0
# So often two clients are asked which of them has the session with a listener: a busy pooler may give it to neither.
_LISTENER_ROUNDS = 5
_STANDBYS = frozenset({"standby", "read-only", "prefer-standby"})


class Connector:
    """Opens one connection at a time, as often as it is asked.

    Attributes:
        server_info: What stands at the other end; `None` before the first connection.
        expects_writes: Whether the server that is connected to should accept writes.
    """

    def __init__(self, context: PoolContext) -> None:
        self._context = context
        self._config = context.config
        self._clock = context.clock
        self._unanswered = UnansweredHosts(context.clock)
        self._init_failure: tuple[Exception, ReadOnly | None] | None = None
        self.redirect(context.config)

    @property
    def takes_any_host(self) -> bool:
        """Whether there are several hosts, and whichever answers is used, be it a primary or a standby."""
        return len(self._target.host or ()) > 1 and self._target.target_session_attrs in (None, "any")

    def describe(self, error: Exception, *, waking: bool = False) -> Failure:
        """Say what was seen of a connection that could not be opened."""
        init_error, why = self._init_failure or (None, None)
        initializing = error is init_error
        if initializing:
            self._init_failure = None  # it is asked for once, and holds on to the frames that it went through
        return Failure(
            error=error,
            phase=Phase.CONNECT,
            sent=False,
            waking=waking,
            writable=self.expects_writes,
            read_only_asked=initializing and why is not None and why.asked,
            in_recovery=why.in_recovery if initializing and why is not None else None,
            initializing=initializing,
            sslmode=self._sslmode(),
        )

    def _sslmode(self) -> str | None:
        target = self._target
        # A server that pauses refuses like one that insists on TLS while it wakes, and a `connect=` decides by itself.
        if target.may_pause or target.passed is not None:
            return None
        if target.ssl is None:
            return os.environ.get("PGSSLMODE") or "prefer"
        if isinstance(target.ssl, str):
            return target.ssl
        return "disable" if target.ssl is False else "require"

    def redirect(self, target: PoolConfig) -> None:
        """Use the connection arguments of `target` for every connection opened from now on."""
        self._target = target
        self._credentials = Credentials(target)
        self.server_info: ServerInfo | None = None  # something else may stand there
        self._keeps_state: bool | None = None
        read_only = target.server_settings.get("default_transaction_read_only", "off").lower()
        self.expects_writes = target.target_session_attrs not in _STANDBYS and read_only not in (
            "on",
            "true",
            "yes",
            "1",
        )

    def distrust_proxy(self) -> bool:
        """Take a proxy that seemed to keep a session for each client for a pooler: a prepared statement was not there.

        Returns:
            Whether that is news: connections that were opened before still have prepared statements.
        """
        if self.server_info is None or not self.server_info.keeps_session:
            return False
        self.server_info = replace(self.server_info, keeps_session=False)
        self._context.counters.pooler = True
        self._emit_pooler_detected(self._target, self.server_info, "a prepared statement was missing in the session")
        return True

    async def open(self, seconds: float | None) -> DriverConnection:
        """Open a connection, ready for use.

        Args:
            seconds: How long it may take; the configured connect `timeout` if that is shorter.

        Raises:
            Exception: What the driver, a function of the application's or `init` raises. No frame behind it holds a secret.
        """
        if self.server_info is None:
            draw_statement_names()
        target = self._target  # `redirect` may change it meanwhile
        limits = [limit for limit in (target.timeout, seconds) if limit is not None]
        ends = self._clock.monotonic() + max(min(limits), 0.001)
        driver = DriverConnection(await self._connect(target, ends))
        ready = False
        try:
            with anyio.fail_after(self._left(ends)):
                await self._prepare(target, driver, ends)
            ready = True
        finally:
            if not ready:
                driver.terminate()
        driver.opened_at = self._clock.monotonic()
        self._context.counters.opened += 1
        return driver

    def _left(self, ends: float) -> float:
        return max(ends - self._clock.monotonic(), 0.001)

    async def _connect(self, target: PoolConfig, ends: float) -> AnyConnection:
        connection = None
        try:
            with anyio.fail_after(self._left(ends)):
                if target.passed is not None:
                    connection = await self._call(target, target.passed.reveal())
                else:
                    connection = await self._log_in(target, self._credentials, ends)
        finally:
            if connection is None:
                # Whatever it is, a cancellation too: the driver's frames hold the password while it connects.
                forget_locals(sys.exception())
        return connection

    async def _call(self, target: PoolConfig, passed: PassedOn) -> AnyConnection:
        """Let the application's `connect=` function connect."""
        connect = cast("Callable[..., Awaitable[object]]", target.connect)
        connection = await answer_of(connect(passed.dsn, **passed.arguments, **self._classes()), "connect")
        if not isinstance(connection, self._config.connection_class):
            raise asyncpg.InterfaceError(
                f"connect= returned a {type(connection).__name__}, not an instance of connection_class="
                f"{self._config.connection_class.__name__}"
            )
        if connection.is_closed():
            raise asyncpg.InterfaceError("connect= returned a closed connection; it must open a new one at each call")
        return connection

    def _classes(self) -> dict[str, object]:
        return {
            "loop": self._config.loop,
            "connection_class": self._config.connection_class,
            "record_class": self._config.record_class,
        }

    async def _log_in(self, target: PoolConfig, credentials: Credentials, ends: float) -> AnyConnection:
        login = await credentials.get()
        try:
            return await self._reach(target, login, ends)
        except Exception as error:
            # What is asked for may have been changed in the meantime.
            stale = refuses_credentials(error) or (credentials.give_user and refuses_user(error))
            if not (credentials.are_asked_for and stale):
                raise
            credentials.refused(login)
        return await self._reach(target, await credentials.get(), ends)

    async def _reach(self, target: PoolConfig, login: Login, ends: float) -> AnyConnection:
        """Connect to the first of the hosts that answers and is of the wanted kind."""
        hosts = [] if target.host is None else candidates(target.host, target.port or ())
        if not hosts or (len(hosts) == 1 and hosts[0].address is not None):
            return await self._dial(target, login, ends, {})
        if target.target_session_attrs != "prefer-standby":
            return await self._race(target, login, ends, hosts, {})
        try:
            # A standby that is silent is not waited for when a primary has answered, which serves as well.
            return await self._race(
                target, login, ends, hosts, {"target_session_attrs": "standby"}, suffices=_is_mismatched
            )
        except asyncpg.TargetServerAttributeNotMatched:
            pass
        return await self._race(target, login, ends, hosts, {"target_session_attrs": "any"})

    async def _race(
        self,
        target: PoolConfig,
        login: Login,
        ends: float,
        hosts: list[Candidate],
        wanted: dict[str, object],
        suffices: Callable[[Exception], bool] = lambda _: False,
    ) -> AnyConnection:
        async def dial(candidate: Candidate) -> AnyConnection:
            where = {"host": candidate.host, "port": candidate.port, **wanted}
            if candidate.address not in (None, candidate.host):
                loop = self._config.loop or asyncio.get_running_loop()
                where["loop"] = PinnedLoop(loop, candidate.address)
            return await self._dial(target, login, ends, where)

        share = min(self._left(ends), self._config.deadline or math.inf)
        race = Race(hosts, dial, self._may_try_next_host, self._unanswered, share, suffices)
        connection = await race.run()
        if connection is None:
            raise self._most_informative(race.errors)
        return connection

    def _may_try_next_host(self, error: Exception) -> bool:
        """Whether another host may let us in: after what the network says, and what waiting cures."""
        return isinstance(error, OSError) or self._context.classify(self.describe(error)).fault is Fault.UNREACHABLE

    def _most_informative(self, errors: Mapping[Candidate, Exception]) -> Exception:
        """Choose from how each host failed: what waiting cures, since that host may be back, and the soonest of that."""
        mismatched = asyncpg.TargetServerAttributeNotMatched
        verdicts = [(error, self._context.classify(self.describe(error))) for error in errors.values()]
        curable = [(error, verdict) for error, verdict in verdicts if verdict.fault is Fault.UNREACHABLE]
        curable.sort(key=lambda each: each[1].not_before or 0.0, reverse=True)
        chosen, _ = next((each for each in curable if isinstance(each[0], mismatched)), [*verdicts, *curable][-1])
        if len(errors) > 1:
            each = ", ".join(f"{candidate} ({type(error).__name__})" for candidate, error in errors.items())
            chosen.add_note(f"resilient_pool: tried {each}")
        return chosen

    async def _dial(self, target: PoolConfig, login: Login, ends: float, where: dict[str, object]) -> AnyConnection:
        arguments = {**target.connect_arguments(), **self._classes(), **where, "timeout": self._left(ends)}
        if login.user is not None:
            arguments["user"] = login.user
        if login.password is not None:
            # A function: the driver keeps what it is given in its parameters.
            arguments["password"] = login.password.reveal
        if self.server_info is not None and self.server_info.has_pooler and target.statement_cache_size is None:
            arguments["statement_cache_size"] = 0
        return cast("AnyConnection", await asyncpg.connect(**arguments))  # type: ignore[call-overload]

    async def _prepare(self, target: PoolConfig, driver: DriverConnection, ends: float) -> None:
        driver.set_socket_options(keepalive=self._config.tcp_keepalive, user_timeout=self._config.tcp_user_timeout)
        # Several first connections may have been dialled before the first of them had its answer.
        info = self.server_info
        if target is not self._target or info is None or info.refused_by not in (None, driver.address):
            info = await self._fetch_server_info(target, driver, ends)
        driver.is_pooled = info.has_pooler
        if info.has_pooler and target.statement_cache_size is None:
            driver.disable_statement_cache()
        if self._config.init is not None:
            try:
                await answer_of(self._config.init(driver.connection), "init")
            except Exception as error:
                why = None
                if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
                    await driver.learn_why_read_only()
                    why = driver.read_only
                # A connection that was closed meanwhile is the likelier reason.
                self._init_failure = None if driver.connection.is_closed() else (error, why)
                raise
            await driver.keep_roles()

    async def _fetch_server_info(self, target: PoolConfig, driver: DriverConnection, ends: float) -> ServerInfo:
        info = await driver.fetch_server_info(None)
        seen = None
        if info.has_proxy and target.statement_cache_size is None:
            seen = await self._find_session_sharing(target, driver, info, ends)
            info = replace(info, keeps_session=seen is None)
        known = self.server_info
        if target is self._target and (known is None or known.refused_by not in (None, driver.address)):
            self.server_info = info
            self._context.counters.pooler = info.has_pooler
            if info.has_pooler:
                self._emit_pooler_detected(target, info, seen)
        return info

    async def _find_session_sharing(
        self, target: PoolConfig, driver: DriverConnection, info: ServerInfo, ends: float
    ) -> str | None:
        """Return why what made the handshake in the server's place may share its sessions; `None` if it keeps one for each.

        A second client beside this one finds out. An idle pooler gives it the session that the first one has just used; a
        busy one an older session, or the first one another session afterwards. A proxy that does none of this opened a
        session for the second client, after that client came.
        """
        began = self._clock.monotonic()
        until = min(began + _SECOND_CLIENT_LIMIT, (began + ends) / 2)
        try:
            second = DriverConnection(await self._connect(target, until))
        except Exception as error:  # noqa: BLE001 - there may be no room for a second one
            return f"a second client was not let in ({type(error).__name__})"
        try:
            other = await second.backend(self._left(until))
            took = self._clock.monotonic() - began
            same = await driver.backend(self._left(until))
        except Exception as error:  # noqa: BLE001 - it may have to wait for the first one's session
            return f"a second client was not served ({type(error).__name__})"
        finally:
            second.terminate()
        if other is None or same is None or second.pid in (driver.pid, other[0]):
            return "what stands there cannot be asked"
        if other[0] == info.backend_pid or same[0] != info.backend_pid:
            return "another client was given the same session"
        return None if other[1] < took else "another client was given a session that was there before it"

    async def keeps_session_state(self) -> bool:
        """Whether what a client leaves in its session is there for its next transaction, as far as two more clients can see.

        Some poolers give a session away with every transaction, others keep it for a client that has left something in it.
        One client listens; if the other is given that session nevertheless, or the first another one, it is not kept. Found
        out when it is asked for, once: an answer that was not to be had counts as yes.
        """
        if self._keeps_state is None:
            until = self._clock.monotonic() + _SECOND_CLIENT_LIMIT
            channel = f"resilient_pool_{secrets.token_hex(8)}"
            clients: list[DriverConnection] = []
            try:
                clients.append(first := DriverConnection(await self._connect(self._target, until)))
                clients.append(second := DriverConnection(await self._connect(self._target, until)))
                with anyio.fail_after(self._left(until)):
                    self._keeps_state = await _keeps_listener(first, second, channel)
            except Exception as error:  # noqa: BLE001 - there may be no room for two more, or none of them is served
                if refuses_question(error):
                    self._keeps_state = True  # so it will be the next time, and two clients are two logins
                return True
            finally:
                for client in clients:
                    client.terminate()
        return self._keeps_state

    def _emit_pooler_detected(self, target: PoolConfig, info: ServerInfo, seen: str | None) -> None:
        self._context.events.emit(
            PoolerDetected(
                handshake_pid=info.handshake_pid,
                backend_pid=info.backend_pid,
                statement_cache_size=target.statement_cache_size or 0,
            )
        )
        if seen is not None:
            _LOGGER.warning(
                "a pooler stands between the pool and the server (the handshake's process id is not the server process's, and "
                "%s): statements are not kept prepared, and each query takes two round trips; if it keeps one session for "
                "each client, or follows prepared statements (PgBouncer 1.21 and up), pass statement_cache_size=100",
                seen,
            )


async def _keeps_listener(first: DriverConnection, second: DriverConnection, channel: str) -> bool:
    await first.execute(f"LISTEN {channel}")
    listens = f"SELECT '{channel}' IN (SELECT pg_catalog.pg_listening_channels())"
    kept = all(
        [
            not await second.fetchval_uncached(listens) and await first.fetchval_uncached(listens)
            for _ in range(_LISTENER_ROUNDS)
        ]
    )
    for client in (second, first):  # whichever is given that session
        await client.execute(f"UNLISTEN {channel}")
    return kept


def _is_mismatched(error: Exception) -> bool:
    return isinstance(error, asyncpg.TargetServerAttributeNotMatched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Whom to connect as; what is `None` is left to the driver."""

    user: str | None
    password: Secret | None


class Credentials:
    """Gives the login of one configuration.

    Connections that are opened at the same time share one question. It is cancelled when the last of them is.
    """

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._question: asyncio.Task[Login] | None = None
        self._waiting = 0

    @property
    def are_asked_for(self) -> bool:
        """Whether another question may have another answer."""
        return self._config.credentials is not None or callable(self._config.password)

    @property
    def give_user(self) -> bool:
        """Whether another question may be answered with another user."""
        return self._config.credentials is not None

    async def get(self) -> Login:
        """Return the login as it is now.

        Raises:
            ConfigurationError: The application's function returned something else. No message shows what.
            Exception: Whatever that function raises.
        """
        password = self._config.password
        if self._config.credentials is None and (password is None or isinstance(password, Secret)):
            return Login(user=self._config.user, password=password)
        question = self._question
        if question is None:
            question = self._question = asyncio.get_running_loop().create_task(self._ask())
            question.add_done_callback(self._answered)
        self._waiting += 1
        try:
            await asyncio.wait([question])
        finally:
            self._waiting -= 1
            if not self._waiting and not question.done():
                self._question = None
                question.cancel()
        if question.cancelled():
            raise asyncpg.InterfaceError("the function that gives the password was cancelled")
        return question.result()

    def refused(self, login: Login) -> None:
        """Let the application's function know that the server has refused what it gave, if it has a method `refused`."""
        source = self._config.password if self._config.credentials is None else self._config.credentials
        refused = getattr(source, "refused", None)
        if callable(refused):
            refused(login.password)

    def _answered(self, question: asyncio.Task[Login]) -> None:
        if self._question is question:
            self._question = None
        if not question.cancelled():
            question.exception()  # those who asked may all have gone

    async def _ask(self) -> Login:
        if self._config.credentials is not None:
            return _login(await _answer(self._config.credentials))
        ask = self._config.password
        return Login(user=self._config.user, password=_password(await _answer(ask), "password"))  # type: ignore[arg-type]


async def _answer(ask: Callable[[], object]) -> Hidden[object]:
    """Call the application's function, and hide at once what it returns."""
    answer = ask()
    if inspect.isawaitable(answer):
        return Hidden(await answer)
    return Hidden(answer)


def _login(answer: Hidden[object]) -> Login:
    if not isinstance(answer.reveal(), tuple) or len(answer.reveal()) != 2:  # type: ignore[arg-type] # noqa: PLR2004
        raise ConfigurationError("credentials= must return a tuple of the user's name and the password")
    user, password = map(Hidden, answer.reveal())  # type: ignore[call-overload]
    if not is_sendable(user.reveal()):
        raise ConfigurationError(
            "credentials= must return a tuple of the user's name, a str without NUL or surrogates, and the password"
        )
    return Login(user=user.reveal(), password=_password(password, "credentials"))


def _password(answer: Hidden[object], argument: str) -> Secret | None:
    kind = type(answer.reveal())
    if issubclass(kind, str):
        return Secret(answer.reveal())  # type: ignore[arg-type]
    if answer.reveal() is None or issubclass(kind, Secret):
        return answer.reveal()  # type: ignore[return-value]
    raise ConfigurationError(f"the password that {argument}= returns must be a str, not {kind.__name__}")
