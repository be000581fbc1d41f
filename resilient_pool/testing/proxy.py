"""A TCP proxy that breaks connections on command.

from resilient_pool.testing import EmbeddedPostgres, FaultProxy, TlsCertificates

async with EmbeddedPostgres() as server:
    with FaultProxy(server.host, server.port) as proxy:
        connection = await asyncpg.connect(proxy.dsn(server.dsn()))
        proxy.swallow_next_answer(matching=b"COMMIT")   # committed, and the client will never know
        proxy.rst()                                     # every connection is reset, now
        proxy.refuse()                                  # the port is closed ...
        proxy.accept()                                  # ... and again, on the same port
        proxy.delay(0.05)                               # a far-away server: 0.1 s per round trip
        proxy.connections[0].forget()                   # a firewall lost this one from its table
        proxy.blackhole()                               # the cable is cut ...
        proxy.restore()                                 # ... and mended
    certificates = TlsCertificates()
    with FaultProxy(server.host, server.port, tls=certificates) as proxy:
        await asyncpg.connect(proxy.dsn(server.dsn()), ssl=certificates.client_context())
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Literal, TypedDict, TypeVar, Unpack, get_args

from resilient_pool._validation import (
    constructor_names_nearest,
    is_sendable,
    require_count,
    require_known,
    require_number,
    shown,
)
from resilient_pool.errors import ConfigurationError
from resilient_pool.testing._protocol import Matcher, fatal_error, matcher
from resilient_pool.testing._relay import AcceptMode, ArmedFault, Ending, ProxyState, Relay, State, Stream, Traffic
from resilient_pool.testing._threaded_server import LoopbackService
from resilient_pool.testing.tls import TlsCertificates

Result = TypeVar("Result")

_SQLSTATE = 5


class FaultOptions(TypedDict, total=False):
    """Which requests a fault is armed for.

    Attributes:
        matching: Which request; by default the next on any connection. A prepared statement is known by its SQL.
        times: How many requests this happens to; 1 by default.
        server_sees_close: Whether the server's side is closed too; by default as the proxy's own argument says.
    """

    matching: Matcher
    times: int
    server_sees_close: bool | None


class _Faults(abc.ABC):
    """The faults that a whole proxy and a single connection have in common."""

    _proxy: FaultProxy
    _traffic: Traffic

    @abc.abstractmethod
    def _relays(self) -> list[Relay]: ...

    def _act(self, action: Callable[[], Result]) -> Result:
        return self._proxy._call_in_loop(action)  # noqa: SLF001 - its own proxy, or itself

    def _closing(self, server_sees_close: bool | None) -> bool:
        return self._proxy._server_sees_close if server_sees_close is None else server_sees_close  # noqa: SLF001

    @property
    def bytes_to_server(self) -> int:
        """How many bytes were passed to the server."""
        return self._traffic.bytes_to_server

    @property
    def bytes_to_client(self) -> int:
        """How many bytes were passed to clients."""
        return self._traffic.bytes_to_client

    def delay(self, seconds: float) -> None:
        """Hold everything back that long, in either direction, a connection's own delay on top of its proxy's; 0 ends it."""
        require_number("seconds", seconds, unit="a number of seconds", least=0)
        self._traffic.delay = seconds

    def blackhole(self) -> None:
        """Let nothing pass until `restore()`, on connections that are still to come too; then everything held back arrives."""
        self._act(self._traffic.passable.clear)

    def fin(self, *, server_sees_close: bool | None = None) -> None:
        """Close in an orderly way, as a server that shuts down does.

        Args:
            server_sees_close: Whether the server's side is closed too; by default as the proxy's own argument says.
        """
        self._end("fin", server_sees_close)

    def rst(self, *, server_sees_close: bool | None = None) -> None:
        """Reset, as a host does that knows nothing of the connection; arguments as in `fin()`."""
        self._end("rst", server_sees_close)

    def forget(self) -> None:
        """Swallow every byte in both directions from now on, without closing, as an idle firewall or NAT table does.

        It is for ever: what was swallowed is lost. New connections are not concerned.
        """
        self._end("hang", server_sees_close=False)

    def swallow_next_answer(self, then: Ending = "fin", **options: Unpack[FaultOptions]) -> None:
        """Let the next request be executed, and keep the answer from the client.

        The server is given all the time it needs: the connection ends when its answer has arrived at the proxy, up to
        and including ReadyForQuery. Preparing a statement is not a request that executes, so its answer passes.

        Args:
            then: "fin" or "rst" the connection, or "hang": silence for ever.
            **options: Which requests; see `FaultOptions`.
        """
        self._arm(then, options)

    def cut_next_answer(self, after_bytes: int = 7, then: Ending = "fin", **options: Unpack[FaultOptions]) -> None:
        """Do as `swallow_next_answer()`, but give the client the first bytes of the answer, and never all of it.

        Args:
            after_bytes: How many bytes; by default 7, which is within a message.
            then: As there.
            **options: Likewise.
        """
        require_number("after_bytes", after_bytes, unit="a number of bytes", least=0)
        self._arm(then, options, after_bytes=after_bytes)

    def lose_next_request(self, then: Ending = "fin", **options: Unpack[FaultOptions]) -> None:
        """Keep the next request from the server, which is not executed; arguments as in `swallow_next_answer()`."""
        self._arm(then, options, reaches_server=False)

    def _end(self, how: Ending, server_sees_close: bool | None) -> None:
        closing = self._closing(server_sees_close)

        def end() -> None:
            for relay in self._relays():
                relay.end(how, server_sees_close=closing)

        self._act(end)

    def _arm(self, then: Ending, options: FaultOptions, *, after_bytes: int = 0, reaches_server: bool = True) -> None:
        require_known(options, FaultOptions.__annotations__)
        _require_word("then", then, get_args(Ending))
        require_count("times", options.get("times", 1), unit="a number of requests")
        matching = options.get("matching")
        if not (matching is None or callable(matching) or isinstance(matching, str | bytes)):
            raise ConfigurationError(f"matching must be a str, bytes or a function, not {shown(matching)}")
        fault = ArmedFault(
            matches=matcher(matching),
            reaches_server=reaches_server,
            after_bytes=after_bytes,
            then=then,
            server_sees_close=self._closing(options.get("server_sees_close")),
        )
        self._act(lambda: self._traffic.armed.extend([fault] * options.get("times", 1)))


def _require_word(name: str, value: object, words: tuple[str, ...]) -> None:
    # A fault of another name would happen in no way, and the test pass.
    if value not in words:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, words))}, not {value!r}")


@constructor_names_nearest
class FaultProxy(LoopbackService[Relay], _Faults):
    """A proxy on 127.0.0.1 in front of a PostgreSQL server.

    It lives in a thread with an event loop of its own and keeps working while the client's loop is blocked. Every
    method may be called from any thread and returns when it has taken effect. Its TCP behaviour is
    that of a server, except that the kernel acknowledges what the proxy does not read.

    Args:
        host: Where the server is.
        port: Where it listens, unencrypted.
        tls: Certificates with which the proxy speaks TLS to clients that ask for it; by default it answers that it
            has none. Either way the server itself is never asked for TLS.
        server_sees_close: Whether a fault that closes a connection closes the server's side too; by default it does.
            Otherwise the server's session stays, with its locks, until the proxy is closed.
        listen_port: The proxy's own port; by default any.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: TlsCertificates | None = None,
        server_sees_close: bool = True,
        listen_port: int = 0,
    ) -> None:
        super().__init__(listen_port)
        self._proxy = self
        self._traffic: ProxyState = ProxyState((host, port), None if tls is None else tls.server_context())
        self._server_sees_close = server_sees_close
        self._attempted_at: list[float] = []

    def __repr__(self) -> str:
        host, port = self._traffic.target
        return f"<FaultProxy {self.host}:{self._listen_port} to {host}:{port}>"

    # What there is to see

    @property
    def connections(self) -> list[ProxiedConnection]:
        """The connections whose client is still there, oldest first."""
        return self._act(lambda: [ProxiedConnection(self, relay) for relay in self._relays()])

    def connection(self, backend_pid: int) -> ProxiedConnection:
        """Find a connection by its session's process id, as `asyncpg.Connection.get_server_pid()` returns it.

        Raises:
            LookupError: There is none.
        """
        for connection in self.connections:
            if connection.backend_pid == backend_pid:
                return connection
        raise LookupError(f"no connection of backend {backend_pid} passes through {self!r}")

    @property
    def attempts(self) -> int:
        """How many connections have arrived. Those that `refuse()` turned away cannot be counted: see `reject()`."""
        return len(self._attempted_at)

    @property
    def attempted_at(self) -> list[float]:
        """When each of them arrived, in seconds of a monotonic clock."""
        return list(self._attempted_at)

    @property
    def accepted(self) -> int:
        """How many of them were passed on to the server, requests to cancel included."""
        return self._traffic.accepted

    @property
    def fired(self) -> int:
        """How many armed faults have happened."""
        return self._traffic.fired

    @property
    def armed(self) -> int:
        """How many faults that were armed for any connection still wait for their request."""
        return len(self._traffic.armed)

    # How new connections are met

    def refuse(self) -> None:
        """Stop listening: new connections are refused, present ones stay. The port remains reserved."""
        self._run_coroutine(self._stop_listening())

    def accept(self) -> None:
        """Listen (again), on the same port."""
        self._run_coroutine(self._listen())

    def hang(self) -> None:
        """Accept new connections and never answer them, not even after `restore()`."""
        self._meet(AcceptMode.HANG)

    def reject(self, then: Literal["fin", "rst"] = "rst") -> None:
        """Accept new connections only to close them at once; unlike refused ones they are counted."""
        _require_word("then", then, ("fin", "rst"))
        self._meet(AcceptMode.RST if then == "rst" else AcceptMode.FIN)

    def answer_with_error(self, sqlstate: str = "57P03", text: str = "the database system is starting up") -> None:
        """Turn new connections away with a FATAL error in answer to their startup message."""
        if not (is_sendable(sqlstate) and len(sqlstate) == _SQLSTATE and is_sendable(text)):
            raise ConfigurationError(
                f"sqlstate must have {_SQLSTATE} characters, and text no NUL, not {sqlstate!r} and {text!r}"
            )
        self._traffic.error = fatal_error(sqlstate, text)
        self._meet(AcceptMode.ERROR)

    def refuse_tls(self) -> None:
        """Answer requests for TLS with "N" from now on."""
        self._traffic.tls_refused = True

    def retarget(self, host: str, port: int) -> None:
        """Lead new connections to another server, as a name does after a fail-over."""
        self._traffic.target = (host, port)

    def restore(self) -> None:
        """Serve again: undo all but what is final, and disarm what has not happened yet."""
        self.accept()
        self._act(self._undo)

    # Inside

    def _undo(self) -> None:
        self._traffic.accept_mode, self._traffic.tls_refused = AcceptMode.SERVE, False
        for traffic in (self._traffic, *self._running):
            traffic.undo()

    def _meet(self, accept_mode: AcceptMode) -> None:
        self.accept()
        self._traffic.accept_mode = accept_mode

    def _relays(self) -> list[Relay]:
        return [relay for relay in self._running if relay.client_connected and relay.state is not State.ENDED]

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._attempted_at.append(asyncio.get_running_loop().time())
        self._run(Relay(self._traffic, Stream(reader, writer), len(self._attempted_at)))


class ProxiedConnection(_Faults):
    """One connection through a `FaultProxy`, with the same faults for it alone."""

    def __init__(self, proxy: FaultProxy, relay: Relay) -> None:
        self._proxy = proxy
        self._traffic: Relay = relay

    def __repr__(self) -> str:
        return f"<ProxiedConnection {self.number} {self.state} backend={self.backend_pid}>"

    @property
    def number(self) -> int:
        """Which of the proxy's connections it is, counted from 1."""
        return self._traffic.number

    @property
    def state(self) -> str:
        """What became of it: "open", "forgotten" (it hangs for ever) or "ended"."""
        return self._traffic.state.value if self._traffic.client_connected else State.ENDED.value

    @property
    def backend_pid(self) -> int | None:
        """Its session's process id, known once the server has let the client in."""
        return self._traffic.backend_pid

    @property
    def parameters(self) -> dict[str, str]:
        """What the client said of itself at the start: `user`, `database`, `application_name` and others."""
        return dict(self._traffic.parameters)

    def restore(self) -> None:
        """Undo what this connection's own methods did, as far as it is not final."""
        self._act(self._traffic.undo)

    def _relays(self) -> list[Relay]:
        return [self._traffic]
