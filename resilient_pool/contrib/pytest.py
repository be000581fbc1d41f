"""Fixtures and a marker for pytest: real servers that misbehave on command, and an application's own tests put through faults.

pytest loads this in every project in whose environment the package is installed, so nothing of the package, and no driver, is
imported before a test asks for a fixture. The fixtures need the extra `testing`.

    def test_an_order_is_placed_once(database_dsn): ...

    @pytest.mark.database_faults("restart", "stale", "lost_answer", at=range(1, 4))
    async def test_an_order_is_placed_once_whatever_happens(shop): ...
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from resilient_pool.testing import (
        EmbeddedPostgres,
        FaultProxy,
        PausingServer,
        Refusal,
        ScriptedClock,
        ScriptedServer,
    )

T = TypeVar("T")

_DEFAULT_SECONDS = 1.0
_FAULTS = """\
none          nothing: the test must pass as it is
stale         connections that were opened before the test body are reset, unnoticed until they are used
vanished      they swallow everything from then on, as an idle firewall's do
restart       the server is stopped, and starts while the test body begins
crash         likewise, without an orderly end
away          every connection is cut, and none accepted for some seconds
frozen        nothing passes for some seconds, and nothing is closed
starting      every connection is cut, and new ones are refused with 57P03 for some seconds
full          every connection is cut, and new ones are refused with 53300 for some seconds
lost_request  request number `at` does not reach the server, and its connection is closed
lost_answer   it is executed, and its answer is lost with the connection
cut_answer    likewise, with the first bytes of the answer arriving
"""
_NAMES = tuple(line.split()[0] for line in _FAULTS.splitlines())
_AT_A_REQUEST = frozenset({"lost_request", "lost_answer", "cut_answer"})
_OPTIONS = ("at", "matching", "seconds")
_FAULT = "database_fault"
_MARKER = "database_faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a project can say of the server, in its configuration file."""
    parser.addini("embedded_postgres_version", "major version of the fixture embedded_postgres: 16 or 18", default="18")
    parser.addini("embedded_postgres_settings", "its settings, one a line: max_connections = 50", type="linelist")
    parser.addini(
        "database_scope",
        "how long fault_proxy and database_dsn live: function, class, module, package or session",
        default="function",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    config.addinivalue_line(
        "markers",
        "database_faults(*names, at=1, matching='', seconds=1.0): run the test once for each fault of its database, which is reached through "
        f"the fixture database_dsn or fault_proxy. Faults: {', '.join(_NAMES)}",
    )
    config.addinivalue_line(
        "markers", "pausing_server(**options): what the fixture pausing_server is made with, such as resume_seconds=0.5"
    )


# Servers


@pytest.fixture(scope="session")
def embedded_postgres(pytestconfig: pytest.Config) -> Iterator[EmbeddedPostgres]:
    """A real PostgreSQL server of the test session's own; with xdist, of each worker's."""
    from resilient_pool.testing import EmbeddedPostgres  # noqa: PLC0415 - when it is asked for

    lines = pytestconfig.getini("embedded_postgres_settings")
    settings = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    server = EmbeddedPostgres(int(pytestconfig.getini("embedded_postgres_version")), settings=settings)
    _run(server.start())
    try:
        yield server
    finally:
        _run(server.close())


def _database_scope(fixture_name: str, config: pytest.Config) -> Any:  # noqa: ARG001 - pytest passes both by name
    return config.getini("database_scope")


@pytest.fixture(scope=_database_scope)
def fault_proxy(embedded_postgres: EmbeddedPostgres) -> Iterator[FaultProxy]:
    """A proxy before the server: it refuses, hangs, resets, delays, swallows answers; `fault_proxy.dsn(dsn)` leads through it."""
    from resilient_pool.testing import FaultProxy  # noqa: PLC0415 - when it is asked for

    with FaultProxy(embedded_postgres.host, embedded_postgres.port) as proxy:
        yield proxy


@pytest.fixture(scope=_database_scope)
def database_dsn(embedded_postgres: EmbeddedPostgres, fault_proxy: FaultProxy) -> Iterator[str]:
    """The DSN of a new and empty database, which is dropped afterwards; it leads through `fault_proxy`."""
    name = f"test_{secrets.token_hex(6)}"
    _run(embedded_postgres.create_database(name))
    try:
        yield fault_proxy.dsn(embedded_postgres.dsn(database=name))
    finally:
        _run(_drop(embedded_postgres, name))


async def _drop(server: EmbeddedPostgres, name: str) -> None:
    async with server.admin() as connection:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture
def pausing_server(embedded_postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> Iterator[PausingServer]:
    """A server that sleeps while nothing is connected, before the real one; `@pytest.mark.pausing_server(...)` has its options."""
    from resilient_pool.testing import PausingServer  # noqa: PLC0415 - when it is asked for

    marker = request.node.get_closest_marker("pausing_server")
    with PausingServer(
        embedded_postgres.host, embedded_postgres.port, **({} if marker is None else marker.kwargs)
    ) as server:
        yield server


@pytest.fixture
def scripted_server(embedded_postgres: EmbeddedPostgres) -> Iterator[Callable[..., ScriptedServer]]:
    """A function that starts a `ScriptedServer(*refusals, **options)` before the real server, for the test's duration."""
    from resilient_pool.testing import ScriptedServer  # noqa: PLC0415 - when it is asked for

    with ExitStack() as servers:

        def start(*refusals: Refusal, **options: Any) -> ScriptedServer:
            options.setdefault("host", embedded_postgres.host)
            options.setdefault("port", embedded_postgres.port)
            return servers.enter_context(ScriptedServer(*refusals, **options))

        yield start


@pytest.fixture
def scripted_clock() -> ScriptedClock:
    """A clock that only the test advances, for a pool's `clock=`."""
    from resilient_pool.testing import ScriptedClock  # noqa: PLC0415 - when it is asked for

    return ScriptedClock()


def _run(work: Coroutine[object, object, T]) -> T:
    """Run something in an event loop of its own, whether or not one runs in this thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


# Faults


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseFault:
    """A fault that a test is put through.

    Attributes:
        name: Which one.
        at: At which request of the test's body, counted from 1 over all connections; for those that concern one request.
        matching: What the requests that are counted contain, in their SQL or their arguments; empty for all requests, those
            that a pool makes by itself included.
        seconds: How long it lasts; for those that last.
    """

    name: str
    at: int
    matching: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name}@{self.at}" if self.name in _AT_A_REQUEST else self.name


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Let a marked test use the fixture that puts it through faults, by its own marker or by that of its class or module."""
    if not (inspect.isfunction(obj) and collector.funcnamefilter(name)):
        return
    own = getattr(obj, "pytestmark", ())
    if collector.get_closest_marker(_MARKER) is not None or any(mark.name == _MARKER for mark in own):
        pytest.mark.usefixtures(_FAULT)(obj)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a marked test run once for each of its faults."""
    marker = metafunc.definition.get_closest_marker(_MARKER)
    if marker is None:
        return
    unknown = [name for name in marker.kwargs if name not in _OPTIONS]
    if unknown:
        raise pytest.Collector.CollectError(f"database_faults takes {', '.join(_OPTIONS)}, not {', '.join(unknown)}")
    faults = list(_faults(*marker.args, **marker.kwargs))
    metafunc.parametrize(_FAULT, faults, ids=map(str, faults), indirect=True)


def _faults(
    *names: str, at: int | Iterable[int] = 1, matching: str = "", seconds: float = _DEFAULT_SECONDS
) -> Iterator[DatabaseFault]:
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        raise pytest.Collector.CollectError(
            f"database_faults takes some of {', '.join(_NAMES)}, not {', '.join(map(repr, unknown)) or 'nothing'}"
        )
    if not isinstance(matching, str):
        raise pytest.Collector.CollectError(f"matching= must be a str, not {matching!r}")
    if not isinstance(seconds, int | float) or not 0 <= seconds < threading.TIMEOUT_MAX:
        raise pytest.Collector.CollectError(f"seconds= must be a number of seconds, at least 0, not {seconds!r}")
    numbers = list(at) if isinstance(at, Iterable) else [at]
    if not numbers or not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise pytest.Collector.CollectError(
            f"at= must be the number of a request, counted from 1, or several, not {at!r}"
        )
    for name in names:
        for number in numbers if name in _AT_A_REQUEST else numbers[:1]:
            yield DatabaseFault(name=name, at=number, matching=matching, seconds=seconds)


@pytest.fixture
def database_fault(
    request: pytest.FixtureRequest, embedded_postgres: EmbeddedPostgres, fault_proxy: FaultProxy
) -> _Injection | None:
    """The fault that a test marked with `database_faults` is put through; `None` for a test that is not marked."""
    fault = getattr(request, "param", None)
    if fault is None:
        return None
    return _Injection(fault, embedded_postgres, fault_proxy)


class _Injection:
    """One fault on its way: begun when the test's fixtures are ready, and undone after its body."""

    def __init__(self, fault: DatabaseFault, server: EmbeddedPostgres, proxy: FaultProxy) -> None:
        self.fault = fault
        self._server = server
        self._proxy = proxy
        self._seen = 0
        self._timer: threading.Timer | None = None
        self._thread = ThreadPoolExecutor(1)
        self._restart: Future[None] | None = None

    def begin(self) -> None:
        """Make it happen, or arm it."""
        name, proxy = self.fault.name, self._proxy
        if name == "stale":
            proxy.rst()
        elif name == "vanished":
            for connection in proxy.connections:
                connection.forget()
        elif name in ("restart", "crash"):
            # The body begins without a server, so that it meets the fault however short it is.
            _run(self._server.stop("fast" if name == "restart" else "immediate"))
            self._restart = self._thread.submit(asyncio.run, self._server.start())
        elif name == "lost_request":
            proxy.lose_next_request(matching=self._is_due)
        elif name == "lost_answer":
            proxy.swallow_next_answer(matching=self._is_due)
        elif name == "cut_answer":
            proxy.cut_next_answer(matching=self._is_due)
        elif name != "none":
            self._begin_for_a_while(name)

    def _begin_for_a_while(self, name: str) -> None:
        proxy = self._proxy
        if name == "frozen":
            proxy.blackhole()
        elif name == "away":
            proxy.refuse()
        elif name == "starting":
            proxy.answer_with_error()
        else:
            proxy.answer_with_error("53300", "sorry, too many clients already")
        if name != "frozen":
            proxy.rst()
        self._timer = threading.Timer(self.fault.seconds, proxy.restore)
        self._timer.start()

    def _is_due(self, request: bytes) -> bool:
        self._seen += self.fault.matching.encode() in request
        return self._seen == self.fault.at

    def require_happened(self) -> None:
        """Fail a test that has passed without having met its fault."""
        if self.fault.name in _AT_A_REQUEST and self._seen < self.fault.at:
            pytest.fail(
                f"{self.fault} did not happen: the test's body made {self._seen} such requests through fault_proxy; use "
                "database_dsn, lower at= or change matching=",
                pytrace=False,
            )

    def end(self) -> None:
        """Undo it: the server is up and the proxy passes everything afterwards."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self._thread.shutdown()
        self._proxy.restore()
        if self._restart is not None:
            self._restart.result()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Begin the fault between a test's fixtures and its body."""
    injection = getattr(item, "funcargs", {}).get(_FAULT)
    if not isinstance(injection, _Injection):
        if item.get_closest_marker(_MARKER) is not None:
            pytest.fail(
                "database_faults does nothing for a method of unittest.TestCase: write a function", pytrace=False
            )
        return (yield)
    try:
        injection.begin()
        result = yield
    finally:
        injection.end()  # before the fixtures are torn down
    injection.require_happened()
    return result
