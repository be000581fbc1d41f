"""A server that answers from a script: what proxies, poolers and managed services answer, word for word.

from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedServer

waking = Refusal(
    at=Point.STARTUP,
    severity="ERROR",
    severity_en="",                                   # this proxy sends no field V
    sqlstate="XX000",
    message="Couldn't connect to compute node",
    seconds=3.0,                                      # from the first attempt on; then every client is let in
)
full = Refusal(
    at=Point.QUERY,
    severity="ERROR",
    sqlstate="58000",
    message="checkout timeout",
    then=End.READY,                                   # the connection goes on
    matching="INSERT",
    times=2,                                          # the third INSERT is executed
)
async with EmbeddedPostgres() as postgres:
    with ScriptedServer(waking, full, host=postgres.host, port=postgres.port) as server:
        pool = await create_pool(server.dsn(postgres.dsn()))
        await pool.execute("INSERT INTO things VALUES (1)")
        assert server.sent == (waking,) * 4 + (full,) * 2
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from resilient_pool.testing._relay import ProxyState, State, Stream
from resilient_pool.testing._script import End, Point, Refusal, Script
from resilient_pool.testing._scripted_relay import ScriptedRelay
from resilient_pool.testing._stub_server import Login, StubServer
from resilient_pool.testing._threaded_server import LoopbackService
from resilient_pool.testing.tls import TlsCertificates

__all__ = ["End", "Point", "Refusal", "ScriptedServer"]


class ScriptedServer(LoopbackService[ScriptedRelay]):
    """A server on 127.0.0.1 that speaks PostgreSQL's protocol up to a chosen point, and answers there from a script.

    All other requests are passed on to a real server, where one is given. Otherwise a stub server admits
    clients and answers statements, simple or prepared: each has an empty result, and transactions begin and end.
    It runs in a thread with an event loop of its own, so a program under test may block. Its counters can be read
    from any thread, also after `close()`.

    Args:
        script: Its answers. At each point the first one that applies is sent.
        host: Where a real server is; by default there is none.
        port: Where that listens, unencrypted. Given with `host`.
        login: The authentication method of the stub server: "trust" by default, "password" in clear text, "md5" or
            "scram". It accepts any password, and with "scram", which authenticates the server as well, none.
        parameters: Parameters that the stub server reports (`server_version`, ...), where they differ from PostgreSQL 18.
        tls: Certificates with which it speaks TLS to clients that ask for it; by default it answers that it has none.
        listen_port: Its own port; by default any.

    Raises:
        ValueError: `host` without `port` or the other way round, or `login` or `parameters` besides them.
    """

    def __init__(
        self,
        *script: Refusal,
        host: str | None = None,
        port: int | None = None,
        login: Login = "trust",
        parameters: Mapping[str, str] | None = None,
        tls: TlsCertificates | None = None,
        listen_port: int = 0,
    ) -> None:
        super().__init__(listen_port)
        if (host is None) != (port is None):
            raise ValueError(f"a real server needs host= and port=, not host={host!r} and port={port!r}")
        if host is not None and (login != "trust" or parameters is not None):
            raise ValueError(f"login= and parameters= are for a stub server; host={host!r} has its own")
        self._target = None if host is None or port is None else (host, port)
        self._login = login
        self._parameters = dict(parameters or {})
        self._proxy_state = ProxyState(self._target or (self.host, 0), None if tls is None else tls.server_context())
        self._script = Script(script, self._count_admitted)
        self._statements: list[str] = []
        self._attempted_at: list[float] = []

    def __repr__(self) -> str:
        behind = "" if self._target is None else " before {}:{}".format(*self._target)
        return f"<ScriptedServer {self.host}:{self._listen_port}{behind}>"

    def dsn(self, dsn: str = "postgresql://scripted:secret@localhost/scripted") -> str:
        """Point a server's URL here, everything else as it is; by default some user's and some database's."""
        return super().dsn(dsn)

    @property
    def attempts(self) -> int:
        """How many connections have arrived."""
        return len(self._attempted_at)

    @property
    def attempted_at(self) -> tuple[float, ...]:
        """When each of them arrived, in seconds of a monotonic clock."""
        return tuple(self._attempted_at)

    @property
    def open_connections(self) -> int:
        """How many clients are connected, those included that were refused and have not disconnected yet."""
        return len(self._running)

    @property
    def sent(self) -> tuple[Refusal, ...]:
        """What the script has sent, in order."""
        return tuple(self._script.sent)

    @property
    def statements(self) -> tuple[str, ...]:
        """The SQL of all statements that clients wanted executed, in order, those included that the script refused."""
        return tuple(self._statements)

    def _count_admitted(self) -> int:
        return sum(relay.was_admitted and relay.state is not State.ENDED for relay in self._running)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time()
        self._attempted_at.append(now)
        self._script.begin(now)
        number = len(self._attempted_at)
        stub_server = None if self._target is not None else StubServer(number, self._login, self._parameters)
        self._run(
            ScriptedRelay(
                self._proxy_state, Stream(reader, writer), number, self._script, self._statements, stub_server
            )
        )
