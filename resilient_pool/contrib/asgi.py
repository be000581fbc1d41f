"""FastAPI, Starlette, Litestar and every other ASGI application: a pool for the application's life, and for each request.

    database = WebPool(lambda watch: ResilientPool(DSN, observers=[watch]))
    app = FastAPI(lifespan=database.lifespan)
    app.add_middleware(database.middleware)

    @app.get("/orders/{number}")
    async def order(number: int, connection: Annotated[ResilientConnection, Depends(database.connection)]): ...

No framework is imported, except Litestar by `litestar_handlers()`. See docs/web-frameworks.md.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from html import escape
from typing import Any

import asyncpg

from resilient_pool._validation import shown
from resilient_pool.clock import deadline_scope
from resilient_pool.errors import AcquireTimeoutError, ConfigurationError, OutcomeUnknownError
from resilient_pool.events import (
    CircuitClosed,
    CircuitOpened,
    ConnectionDiscarded,
    Event,
    Observer,
    OutcomeResolved,
    OutcomeUnknown,
    RetryExhausted,
    RetryScheduled,
)
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.execution.transaction import RetriedTransaction
from resilient_pool.observability.instrument import Instrument
from resilient_pool.observability.stats import WAIT_BOUNDS, PoolStats
from resilient_pool.pool import ResilientPool
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.verdict import Failure, Fault, Outcome, Phase

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOGGER = logging.getLogger("resilient_pool")

# By RFC 9110 these change nothing (section 9.2.1), and those may be repeated (9.2.2), whatever became of the first.
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_IDEMPOTENT = _SAFE | {"PUT", "DELETE"}
_KEPT = 25
"""How many of the last events the page shows."""
_SHOWN = (RetryScheduled, RetryExhausted, OutcomeUnknown, OutcomeResolved, CircuitOpened, CircuitClosed)


class Readiness(StrEnum):
    """What the readiness route answers, from what the pool knows already.

    Attributes:
        UP: Connections are open.
        IDLE: None is open, and nothing speaks against opening one with the next request. The database may be asleep.
        WAKING: The server is being connected to, and has not been away for long: requests wait, and are served.
        AWAY: The server has been away for longer than `waking_seconds`.
        CLOSED: The pool is not open.
    """

    UP = "up"
    IDLE = "idle"
    WAKING = "waking"
    AWAY = "away"
    CLOSED = "closed"

    @property
    def is_ready(self) -> bool:
        """Whether requests are to be sent here."""
        return self not in (Readiness.AWAY, Readiness.CLOSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response in place of an error.

    Attributes:
        status: The HTTP status.
        kind: What is wrong, in one word: `"away"`, `"busy"`, `"outcome-unknown"`.
        title: The same in a sentence, without anything that an outsider should not see.
        retry_after: After how many seconds the client may send the same request again; `None` if it must not do so blindly.
    """

    status: int
    kind: str
    title: str
    retry_after: int | None = None

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What is sent with it."""
        after = [] if self.retry_after is None else [("retry-after", str(self.retry_after))]
        return [("content-type", "application/problem+json"), ("cache-control", "no-store"), *after]

    @property
    def body(self) -> bytes:
        """A problem document (RFC 9457); its member `retry` says whether the same request may be sent again."""
        problem = {
            "type": f"urn:resilient-pool:{self.kind}",
            "title": self.title,
            "status": self.status,
            "retry": self.retry_after is not None,
        }
        return json.dumps(problem).encode()


_UNKNOWN = Answer(
    status=500,
    kind="outcome-unknown",
    title="It is not known whether this request took effect. Find out before you send it again.",
)

_AWAY = "away", "The database is away."
_BUSY = "busy", "All connections to the database are in use."


def header_budget(name: str = "x-request-timeout", *, unit: float = 1.0) -> Callable[[Scope], float | None]:
    """Make a function that reads a request's budget from a header.

    Args:
        name: The header's name.
        unit: How many seconds 1 stands for: 0.001 for a header in milliseconds.

    Returns:
        The seconds that the header gives the request; `None` if it is absent or no number.
    """
    key = name.lower().encode("latin-1")

    def budget(scope: Scope) -> float | None:
        value = next((value for found, value in scope["headers"] if found == key), None)
        try:
            seconds = math.nan if value is None else float(value) * unit
        except ValueError:
            return None
        return max(seconds, 0.0) if math.isfinite(seconds) else None

    return budget


_MAKE = "as in WebPool(lambda watch: ResilientPool(dsn, observers=[watch]))"


@dataclass(slots=True, eq=False)
class _Request:
    """What is known of the pool's part in one request."""

    uses: int = 0
    given_up: RetryExhausted | None = None


class WebPool(Instrument):
    """A web application's pool: opened and closed with it, handed to its requests, and watched for both.

    Args:
        make: Makes the pool, with what it is called with among the `observers=`. It is called when the application starts.
        name: The name that the page shows.
        budget: Says how many seconds a request has, from its ASGI scope; `None` for no limit. No call of the pool within the request
            waits or tries again for longer, nor does one in a task that the request has started. It never cuts a running
            statement. Default: what the header `X-Request-Timeout` says, in seconds.
        cancel_disconnected: Whether a GET, HEAD or OPTIONS is cancelled whose client has gone before the response began: then it no
            longer waits, and its statement is cancelled on the server. Requests that may write always run to their end:
            otherwise it would not be known what they did. Default: yes.
        ready_path: The path of the readiness route, which the middleware answers; `None` for none.
        page_path: The path of the page that shows the pool live, such as `"/pool"`. Default: none.
        may_see_page: Says from the ASGI scope whether a request may see the page; else it is not found. Default: every one.
        waking_seconds: How long an absent server counts as waking up, and not as away, in seconds.
        retry_after: What `Retry-After` says, in seconds.

    Raises:
        ConfigurationError: `make` is no function; or, when the application starts, the pool that it makes is not watched.
    """

    def __init__(
        self,
        make: Callable[[Observer], ResilientPool[Any]],
        *,
        name: str = "database",
        budget: Callable[[Scope], float | None] | None = None,
        cancel_disconnected: bool = True,
        ready_path: str | None = "/ready",
        page_path: str | None = None,
        may_see_page: Callable[[Scope], bool] = lambda _: True,
        waking_seconds: float = 30.0,
        retry_after: int = 2,
    ) -> None:
        if not callable(make):
            raise ConfigurationError(f"make must be a function that makes the pool, {_MAKE}, not {shown(make)}")
        self._make = make
        self._is_watching = False
        self._name = name
        self._budget = header_budget() if budget is None else budget
        self._cancel_disconnected = cancel_disconnected
        self._ready_path = ready_path
        self._page_path = page_path
        self._may_see_page = may_see_page
        self._waking_seconds = waking_seconds
        self._retry_after = retry_after
        self._classifier = PostgresClassifier()
        self._pool: ResilientPool[Any] | None = None
        self._current: ContextVar[_Request | None] = ContextVar("resilient_pool_request", default=None)
        self._recent: deque[tuple[float, Event]] = deque(maxlen=_KEPT)
        self._away_since: float | None = None
        self._failed_at = -math.inf

    # For the application

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Open the pool, and close it when the application ends: what FastAPI, Starlette and Litestar take as a lifespan.

        The pool is `app.state.pool` meanwhile, if the application has a `state`. Opening it connects only if it has a `min_size`.
        """
        made = self._make(self)
        if (
            not self._is_watching
        ):  # else an outage would be no 503, and a request that has written would count as unused
            raise ConfigurationError(f"make must give the pool its argument as an observer, {_MAKE}")
        async with made as pool:
            self._pool = pool
            if hasattr(app, "state"):  # an application of aiohttp has none
                app.state.pool = pool
            try:
                yield
            finally:
                self._pool = None

    @property
    def pool(self) -> ResilientPool[Any]:
        """The open pool.

        Raises:
            asyncpg.InterfaceError: The application has not started, or has ended.
        """
        if self._pool is None:
            raise asyncpg.InterfaceError("the pool is not open: give the application lifespan=database.lifespan")
        return self._pool

    # Dependencies: FastAPI's Depends(...) and Litestar's Provide(...) take them as they are

    async def get_pool(self) -> ResilientPool[Any]:
        """Hand out the pool."""
        return self.pool

    async def connection(self) -> AsyncIterator[ResilientConnection[Any]]:
        """Hand out a connection that is leased for the request."""
        async with self.pool.acquire() as connection:
            yield connection

    async def transaction(self) -> RetriedTransaction[Any]:
        """Hand out the attempts of a transaction: `async for attempt in attempts: async with attempt as connection: ...`.

        It is the loop, not a connection: a dependency cannot run the request's function a second time.
        """
        return self.pool.transaction()

    # The middleware

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wrap an ASGI application: `app.add_middleware(database.middleware)`, or `database.middleware(app)` around all of it.

        It gives each request its budget, answers the readiness route and the page, and turns what the pool raised into a response:
        see `answer_to`. Litestar turns errors into responses further within: give it `litestar_handlers()` as well.
        """
        return _Middleware(self, app)

    def answer_to(self, error: Exception, method: str) -> Answer | None:
        """Say what to answer in place of an error that ended a request; `None` if it is not about the database's absence.

        503 with `Retry-After` while the server is away, or all connections are in use until the time is up; with that time after
        which a service that blocks new connections lets them in again, if that is later. `Retry-After` is left out if the request
        had used the pool before, and its method is not idempotent: a part of it may have been done. 500, with a text that says
        so, if it is not known what became of a write; that is logged as an error as well.

        Args:
            error: The error.
            method: The request's HTTP method.
        """
        inner = self._classifier.unwrap(error)
        if isinstance(inner, OutcomeUnknownError):
            _LOGGER.error("a request is answered with 500: it is not known whether it took effect", exc_info=error)
            return _UNKNOWN
        request, after = self._current.get() or _Request(), self._retry_after
        if isinstance(inner, AcquireTimeoutError):
            after = max(after, math.ceil(inner.retry_after or 0.0))
            stats = None if self._pool is None else self._pool.stats()
            is_away = stats is None or stats.circuit_open or not stats.size
        elif isinstance(inner, Exception) and self._is_about_an_absent_server(inner, request.given_up):
            is_away = True
        else:
            return None
        kind, title = _AWAY if is_away else _BUSY
        may_repeat = method in _IDEMPOTENT or request.uses == 0
        return Answer(status=503, kind=kind, title=title, retry_after=after if may_repeat else None)

    def _is_about_an_absent_server(self, error: Exception, given_up: RetryExhausted | None) -> bool:
        # The application's own OSError is none of ours: the pool must have given up in this request, with nothing left unknown, and
        # have said so in a note of this error.
        if given_up is None or given_up.reason != "absent" or given_up.outcome is Outcome.UNKNOWN:
            return False
        noted = any(note.startswith("resilient_pool:") for note in getattr(error, "__notes__", ()))
        failure = Failure(error=error, phase=Phase.CONNECT, sent=False)
        return noted and self._classifier.classify(failure).fault is not Fault.PERMANENT

    def litestar_handlers(self) -> Mapping[type[Exception], Callable[[Any, Exception], Any]]:
        """Make what Litestar takes as `exception_handlers=`. What is not about the database's absence is raised again."""
        from litestar import Response  # noqa: PLC0415 - only an application of Litestar's has it

        def handle(request: Any, error: Exception) -> Any:
            answer = self.answer_to(error, request.method)
            if answer is None:
                raise error
            return Response(content=answer.body, status_code=answer.status, headers=dict(answer.headers))

        return dict.fromkeys((asyncpg.PostgresError, asyncpg.InterfaceError, OSError), handle)

    # What is known without asking the database

    def readiness(self) -> Readiness:
        """Say whether requests are to be sent here, from what the pool knows: no connection is opened or used."""
        if self._pool is None or self._pool.is_closing():
            return Readiness.CLOSED
        stats, now = self._pool.stats(), time.monotonic()
        if stats.circuit_open:
            # A pool that no caller waits for does not try either: it must be sent a request some time to find out.
            if not stats.waiting and now - self._failed_at > self._waking_seconds:
                return Readiness.IDLE
            since = now if self._away_since is None else self._away_since
            return Readiness.AWAY if now - since > self._waking_seconds else Readiness.WAKING
        if stats.size:
            return Readiness.UP
        return Readiness.WAKING if stats.waiting else Readiness.IDLE

    def own_response(self, scope: Scope) -> tuple[int, str, bytes] | None:
        """Answer the readiness route and the page: status, content type and body. `None` for any other request."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] not in ("GET", "HEAD"):
            return None
        if path == self._ready_path:
            readiness = self.readiness()
            body = json.dumps({"database": readiness.value}).encode()
            return (200 if readiness.is_ready else 503), "application/json", body
        if path == self._page_path and self._may_see_page(scope):
            return 200, "text/html; charset=utf-8", self.page().encode()
        return None

    @property
    def retry_after(self) -> int:
        """What `Retry-After` says."""
        return self._retry_after

    def page(self) -> str:
        """Write the page that shows the pool as it is now; it reads itself anew every two seconds."""
        stats = None if self._pool is None else self._pool.stats()
        ago = [(time.monotonic() - at, event) for at, event in reversed(self._recent)]
        return _page(self._name, self.readiness(), stats, ago)

    # What the pool calls

    def __call__(self, event: Event, /) -> None:
        """Take note of an event."""
        now = time.monotonic()
        match event:
            case CircuitOpened():
                self._away_since = self._failed_at = now
            case CircuitClosed():
                self._away_since = None
            case RetryScheduled(operation="connect"):
                self._failed_at = now
            case RetryExhausted():
                request = self._current.get()
                if request is not None:
                    request.given_up = event
        if isinstance(event, _SHOWN) or (isinstance(event, ConnectionDiscarded) and event.error is not None):
            self._recent.append((now, event))

    def attach(self, stats: Callable[[], PoolStats]) -> None:  # noqa: ARG002 - the pool is at hand
        """Note that the pool is watched."""
        self._is_watching = True

    def enter_background(self) -> None:
        """Background work belongs to no request."""

    def use_begins(self) -> None:
        """Count a use by the current request: from its beginning on, something may have been done in it."""
        request = self._current.get()
        if request is not None:
            request.uses += 1

    def used(self, seconds: float) -> None:
        """How long a use was is of no interest here."""

    @asynccontextmanager
    async def request(self, scope: Scope) -> AsyncIterator[None]:
        """Give a request its budget, and take note of what the pool does for it."""
        # A WebSocket has no response to be in time for.
        seconds = self._budget(scope) if scope["type"] == "http" else None
        token = self._current.set(_Request())
        try:
            with deadline_scope(None if seconds is None else time.monotonic() + seconds):
                yield
        finally:
            self._current.reset(token)

    def watches(self, scope: Scope) -> bool:
        """Whether a request is cancelled when its client goes."""
        return self._cancel_disconnected and scope["method"] in _SAFE


class _Middleware:
    """The ASGI application around the application."""

    def __init__(self, database: WebPool, app: ASGIApp) -> None:
        self._database = database
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            own = self._database.own_response(scope)
            if own is not None:
                await self._respond(scope, send, own)
            else:
                await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            async with self._database.request(scope):
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _respond(self, scope: Scope, send: Send, response: tuple[int, str, bytes]) -> None:
        status, kind, body = response
        headers = [("content-type", kind), ("cache-control", "no-store"), *_PROTECTION]
        if status != 200:  # noqa: PLR2004 - OK
            headers.append(("retry-after", str(self._database.retry_after)))
        await _send(send, status, headers, b"" if scope["method"] == "HEAD" else body)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            if client is not None:
                client.begin_response()
            await send(message)

        async with self._database.request(scope):
            client = _Client(receive) if self._database.watches(scope) else None
            try:
                if client is None:
                    await self._app(scope, receive, noting_send)
                else:
                    await client.serve(self._app, scope, noting_send)
            except Exception as error:
                answer = None if begun else self._database.answer_to(error, scope["method"])
                if answer is None:
                    raise
                await _send(send, answer.status, answer.headers, answer.body)


class _Client:
    """The client of one request: reads what it sends one message ahead of the application, and so sees that it has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self._scope = asyncio.timeout(None)
        self._response_has_begun = False

    async def serve(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        """Run the application until it has ended, or the client has gone before the response began."""
        reader = asyncio.ensure_future(self._read_ahead())

        async def receive() -> Message:
            if reader.done() and self._read.empty():
                return await self._receive()
            read = await self._read.get()
            if isinstance(read, Exception):
                raise read
            return read

        try:
            async with self._scope:
                await app(scope, receive, send)
        except TimeoutError:
            if not self._scope.expired():
                raise
        finally:
            reader.cancel()

    def begin_response(self) -> None:
        """Cancel nothing any more: what the application does after its response is not for the client."""
        self._response_has_begun = True

    async def _read_ahead(self) -> None:
        try:
            await self._read_until_gone()
        except Exception as error:  # noqa: BLE001 - the application's receive() raises it
            self._read.put_nowait(error)

    async def _read_until_gone(self) -> None:
        # Only behind the end of the body: at which pace that is read is the application's affair.
        message = await self._receive()
        self._read.put_nowait(message)
        if message["type"] == "http.request" and not message.get("more_body"):
            message = await self._receive()
            self._read.put_nowait(message)
        if message["type"] == "http.disconnect" and not self._response_has_begun:
            self._scope.reschedule(asyncio.get_running_loop().time())


async def _send(send: Send, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
    encoded = [(name.encode(), value.encode()) for name, value in [*headers, ("content-length", str(len(body)))]]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


# The page

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1c2430; --faint: #5d6b7e; --line: #dde2ea;
  --bar: #3d7edb; --good: #18794e; --warn: #9a5b00; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1b212a; --text: #e6ebf2; --faint: #94a3b8;
  --line: #2d3643; --bar: #5b9bf5; --good: #4cc38a; --warn: #f0b45a; --bad: #ff6369; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.35rem; margin: .25rem 0 1rem; display: flex; flex-wrap: wrap; gap: .6rem; align-items: center;
  overflow-wrap: anywhere; }
h2 { font-size: .95rem; margin: 0 0 .5rem; }
.state { font-size: .85rem; font-weight: 600; padding: .1rem .6rem; border: 1px solid; border-radius: 1rem; }
.up, .idle { color: var(--good); } .waking { color: var(--warn); } .away, .closed { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .6rem; margin-bottom: .6rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .6rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .8rem; }
.card { min-width: 0; } .stack { display: grid; gap: .6rem; align-content: start; } .wide { grid-column: 1 / -1; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
.tile span, .none, td.ago { color: var(--faint); font-size: .85rem; }
table { width: 100%; border-collapse: collapse; } td, th { padding: .2rem .7rem .2rem 0; text-align: left; vertical-align: top; }
tr + tr td, tr + tr th { border-top: 1px solid var(--line); }
th { font-weight: 400; } th:has(+ .bar) { white-space: nowrap; } td.number { text-align: right; font-variant-numeric: tabular-nums; width: 4rem; padding-right: 0; white-space: nowrap; }
td.ago { white-space: nowrap; width: 4.5rem; } td.what { overflow-wrap: anywhere; }
td.bar { width: 50%; } svg { display: block; width: 100%; height: .7rem; margin-top: .35rem; } rect { fill: var(--bar); }
"""
_SCRIPT = """
setInterval(async () => {
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.querySelector("main");
    if (answer.ok && fresh) document.querySelector("main").replaceWith(fresh);
  } catch { document.querySelector(".state").textContent = "no answer"; }
}, 2000);
"""


def _hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing is loaded from anywhere, nothing runs but the script above, and no other site can show the page in a frame.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_hash_of(_STYLE)}",
        f"script-src {_hash_of(_SCRIPT)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PROTECTION = (
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
)


def _page(name: str, readiness: Readiness, stats: PoolStats | None, recent: Iterable[tuple[float, Event]]) -> str:
    body = "<p>The pool is not open.</p>" if stats is None else _tiles(stats) + _cards(stats, recent)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: pool</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(name)} <span class="state {readiness.value}">{readiness.value}</span></h1>'
        f"{body}</main><script>{_SCRIPT}</script></body></html>"
    )


def _tiles(stats: PoolStats) -> str:
    tiles = (
        ("open", f"{stats.size} / {stats.max_size}"),
        ("in use", stats.in_use),
        ("idle", stats.idle),
        ("resetting", stats.resetting),
        ("callers waiting", stats.waiting),
        ("circuit", "open" if stats.circuit_open else "closed"),
    )
    shown = "".join(f'<div class="tile"><b>{escape(str(value))}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _cards(stats: PoolStats, recent: Iterable[tuple[float, Event]]) -> str:
    mean = stats.wait_seconds / stats.waits if stats.waits else 0.0
    totals = {
        "acquired": stats.acquired,
        "opened": stats.opened,
        "failed to connect": stats.connect_failures,
        "found dead before use": stats.stale_found + stats.pings_failed,
        "given up": stats.exhausted,
        "outcomes unknown": stats.outcomes_unknown,
        "outcomes resolved": sum(stats.outcomes_resolved.values()),
        "waits that timed out": stats.wait_timeouts,
        "callers refused": stats.overloads,
        "outages": stats.circuit_openings,
        "server away for": _duration(stats.circuit_open_seconds),
    }
    waits = {
        f"up to {_duration(bound)}" if math.isfinite(bound) else "longer": stats.wait_histogram[bound]
        for bound in WAIT_BOUNDS
        if bound in stats.wait_histogram
    }
    return '<div class="cards">' + "".join(
        (
            _card("Totals", _table(totals)),
            _card(f"Waits: {stats.waits}, {_duration(mean)} on average", _table(waits, bars=True)),
            '<div class="stack">',
            _card("Retries", _table({fault.value: count for fault, count in stats.retries.items()}, bars=True)),
            _card(
                "Connections closed", _table({why.value: count for why, count in stats.discarded.items()}, bars=True)
            ),
            "</div>",
            _card("Last events", _events(recent), wide=True),
            "</div>",
        )
    )


def _card(title: str, content: str, *, wide: bool = False) -> str:
    return f'<section class="card{" wide" * wide}"><h2>{escape(title)}</h2>{content}</section>'


def _table(rows: Mapping[str, object], *, bars: bool = False) -> str:
    if not rows:
        return '<p class="none">none</p>'
    most = max((value for value in rows.values() if isinstance(value, int)), default=0) or 1

    def bar(value: object) -> str:
        if not bars or not isinstance(value, int):
            return ""
        return f'<td class="bar"><svg aria-hidden="true"><rect width="{100 * value / most:.1f}%" height="100%" rx="2"/></svg></td>'

    cells = (
        f'<tr><th scope="row">{escape(name)}</th>{bar(value)}<td class="number">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _events(recent: Iterable[tuple[float, Event]]) -> str:
    rows = "".join(
        f'<tr><td class="ago">{_duration(round(ago))} ago</td><td class="what"><b>{escape(event.name)}</b> {escape(", ".join(_fields(event)))}</td></tr>'
        for ago, event in recent
    )
    return f"<table>{rows}</table>" if rows else '<p class="none">none</p>'


def _fields(event: Event) -> Iterator[str]:
    for field in fields(event):
        value = getattr(event, field.name)
        if value is None:
            continue
        if isinstance(value, float):
            yield f"{field.name} {_duration(value)}"
        else:
            yield f"{field.name} {value.value if isinstance(value, Enum) else value}"


def _duration(seconds: float) -> str:
    if 0 < seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:  # noqa: PLR2004 - two minutes
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min"
