"""Web applications on a real server that is mistreated: FastAPI, Starlette and Litestar, through the whole of each framework."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import asyncpg
import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI
from litestar import Litestar
from litestar import get as litestar_get
from litestar import post as litestar_post
from litestar.di import NamedDependency, Provide
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from resilient_pool import (
    ConfigurationError,
    OutcomeUnknownError,
    ResilientConnection,
    ResilientPool,
    RetriedTransaction,
)
from resilient_pool.contrib.asgi import WebPool, header_budget
from resilient_pool.testing import PausingServer, Point, Refusal, ScriptedServer

FRAMEWORKS = ["fastapi", "starlette", "litestar"]
WRITE = "INSERT INTO visits VALUES ($1)"


class Handlers:
    """What the applications do, in any framework."""

    def __init__(self, database):
        self.database = database

    async def lease(self, connection):
        return {"value": await connection.fetchval("SELECT 1")}

    async def write(self, attempts):
        async for attempt in attempts:
            async with attempt as connection:
                await connection.execute(WRITE, 1)
        return {"value": 1}

    async def read(self):
        return {"value": await self.database.pool.fetchval("SELECT 1")}

    async def twice(self):
        await self.database.pool.execute(WRITE, 2)
        return {"value": await self.database.pool.fetchval("SELECT 1 AS second")}

    async def plain_write(self):
        return {"value": await self.database.pool.execute(WRITE, 3)}

    async def own_error(self):
        with contextlib.suppress(OSError):
            await self.database.pool.fetchval("SELECT 1")
        raise ConnectionRefusedError("a service of the application's")


def fastapi_application(database):
    do = Handlers(database)
    app = FastAPI(lifespan=database.lifespan)
    app.add_middleware(database.middleware)

    async def lease(connection: Annotated[Any, Depends(database.connection)]):
        return await do.lease(connection)

    async def write(attempts: Annotated[Any, Depends(database.transaction)]):
        return await do.write(attempts)

    lease.__annotations__["connection"] = Annotated[Any, Depends(database.connection)]
    write.__annotations__["attempts"] = Annotated[Any, Depends(database.transaction)]
    app.get("/lease")(lease)
    app.post("/write")(write)
    app.get("/read")(do.read)
    app.post("/twice")(do.twice)
    app.put("/twice")(do.twice)
    app.post("/plain-write")(do.plain_write)
    app.get("/own-error")(do.own_error)
    return app


def starlette_application(database):
    do = Handlers(database)

    def route(path, handle, method):
        async def endpoint(request):
            return JSONResponse(await handle())

        return Route(path, endpoint, methods=[method])

    async def lease():
        async with contextlib.asynccontextmanager(database.connection)() as connection:
            return await do.lease(connection)

    async def write():
        return await do.write(await database.transaction())

    routes = [
        route("/lease", lease, "GET"),
        route("/write", write, "POST"),
        route("/read", do.read, "GET"),
        route("/twice", do.twice, "POST"),
        route("/twice", do.twice, "PUT"),
        route("/plain-write", do.plain_write, "POST"),
        route("/own-error", do.own_error, "GET"),
    ]
    app = Starlette(routes=routes, lifespan=database.lifespan)
    app.add_middleware(database.middleware)
    return app


def litestar_application(database):
    do = Handlers(database)

    @litestar_get("/lease")
    async def lease(connection: NamedDependency[ResilientConnection]) -> dict[str, int]:
        return await do.lease(connection)

    @litestar_post("/write", status_code=200)
    async def write(attempts: NamedDependency[RetriedTransaction]) -> dict[str, int]:
        return await do.write(attempts)

    @litestar_get("/read")
    async def read() -> dict[str, int]:
        return await do.read()

    @litestar_post("/twice")
    async def twice() -> dict[str, int]:
        return await do.twice()

    @litestar_post("/plain-write")
    async def plain_write() -> dict[str, str]:
        return await do.plain_write()

    @litestar_get("/own-error")
    async def own_error() -> None:
        await do.own_error()

    return Litestar(
        [lease, write, read, twice, plain_write, own_error],
        dependencies={"connection": Provide(database.connection), "attempts": Provide(database.transaction)},
        lifespan=[database.lifespan],
        exception_handlers=database.litestar_handlers(),
        logging_config=None,
    )


BUILDERS = {"fastapi": fastapi_application, "starlette": starlette_application, "litestar": litestar_application}


@contextlib.asynccontextmanager
async def serving(framework, database):
    """Start an application and give a client for it, past no server: what it raises becomes its own 500."""
    app = BUILDERS[framework](database)
    if framework == "litestar":
        started, asgi = app.lifespan(), database.middleware(app)
    else:
        started, asgi = app.router.lifespan_context(app), app
    async with started:
        transport = httpx.ASGITransport(asgi, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            yield client


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
async def visits(dsn):
    """A table that requests write to."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE visits (id int)")
    yield connection
    await connection.execute("DROP TABLE visits")
    await connection.close()


def web_pool(where, *, arguments=None, **options):
    return WebPool(lambda watch: ResilientPool(where, observers=[watch], **(arguments or {})), **options)


async def test_requests_are_given_connections_and_transactions(framework, dsn, visits):
    """By the framework's own way of injecting what a function asks for; the pool is closed with the application."""
    database = web_pool(dsn)
    async with serving(framework, database) as client:
        assert (await client.get("/lease")).json() == {"value": 1}
        assert (await client.post("/write")).json() == {"value": 1}
        stats = database.pool.stats()
        assert (stats.in_use, stats.acquired) == (0, 2)
    assert await visits.fetchval("SELECT count(*) FROM visits") == 1
    with pytest.raises(asyncpg.InterfaceError, match="lifespan"):
        _ = database.pool


async def test_a_transaction_of_a_request_is_repeated(framework, dsn, proxy, visits):
    """The connection is lost in its middle, and the client does not notice."""
    async with serving(framework, web_pool(proxy.dsn(dsn))) as client:
        proxy.lose_next_request(matching="INSERT")
        assert (await client.post("/write")).json() == {"value": 1}
    assert await visits.fetchval("SELECT count(*) FROM visits") == 1


async def test_requests_wait_for_a_sleeping_database(framework, postgres):
    """All of them are served."""
    with PausingServer(postgres.host, postgres.port, resume_seconds=0.5, away=("57P03",), seed=2) as server:
        server.pause()
        async with serving(framework, web_pool(server.dsn(postgres.dsn()))) as client:
            answers = await asyncio.gather(*(client.get("/read") for _ in range(10)))
    assert [answer.status_code for answer in answers] == [200] * 10


async def test_an_absent_server_is_503_with_retry_after_within_the_requests_own_time(framework, dsn, proxy):
    """The time is the header's, and nothing of the server is in the answer."""
    proxy.refuse()
    async with serving(framework, web_pool(proxy.dsn(dsn))) as client:
        started = asyncio.get_running_loop().time()
        for path in ("/read", "/lease"):
            answer = await client.get(path, headers={"X-Request-Timeout": "0.4"})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json() == {
                "type": "urn:resilient-pool:away",
                "title": "The database is away.",
                "status": 503,
                "retry": True,
            }
        answer = await client.post("/write", headers={"X-Request-Timeout": "0.4"})
        assert (answer.status_code, answer.json()["retry"]) == (503, True)
        assert asyncio.get_running_loop().time() - started < 5


async def test_a_client_is_told_when_a_service_that_blocks_new_connections_lets_them_in_again(framework):
    """Sooner is useless, and the request does not wait for it."""
    text = (
        "(ECIRCUITBREAKER) too many failed attempts to connect to the database, new connections are temporarily blocked"
    )
    with ScriptedServer(Refusal(at=Point.STARTUP, sqlstate="XX000", message=text)) as server:
        async with serving(framework, web_pool(server.dsn())) as client:
            answer = await client.get("/read", headers={"X-Request-Timeout": "5"})
            assert (answer.status_code, answer.headers["retry-after"], answer.json()["retry"]) == (503, "30", True)
        assert server.attempts == 1


async def test_a_busy_pool_is_503_as_well(framework, dsn):
    """The client is told that it is not the server's absence."""
    database = web_pool(dsn, arguments={"max_size": 1})
    async with serving(framework, database) as client, database.pool.acquire():
        answer = await client.get("/read", headers={"X-Request-Timeout": "0.1"})
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:resilient-pool:busy")


async def test_an_error_of_the_applications_own_is_not_the_databases(framework, dsn, proxy):
    """Also while the database is away: a refused connection to another service is a 500 as before."""
    proxy.refuse()
    async with serving(framework, web_pool(proxy.dsn(dsn))) as client:
        assert (await client.get("/own-error", headers={"X-Request-Timeout": "0.2"})).status_code == 500
        assert (await client.get("/read", headers={"X-Request-Timeout": "0.2"})).status_code == 503


async def test_an_unknown_outcome_tells_the_client_not_to_repeat(framework, dsn, proxy, visits, caplog):
    """It is no 503, has no Retry-After, and says why; the log has the error."""
    async with serving(framework, web_pool(proxy.dsn(dsn))) as client:
        proxy.swallow_next_answer(matching="INSERT")
        answer = await client.post("/plain-write")
        assert (answer.status_code, "retry-after" in answer.headers) == (500, False)
        assert (answer.json()["type"], answer.json()["retry"]) == ("urn:resilient-pool:outcome-unknown", False)
    (logged,) = [record for record in caplog.records if record.levelname == "ERROR" and record.name == "resilient_pool"]
    assert isinstance(logged.exc_info[1], OutcomeUnknownError)
    assert await visits.fetchval("SELECT count(*) FROM visits") == 1


@pytest.mark.parametrize(("method", "retry"), [("POST", False), ("PUT", True)])
async def test_a_request_that_was_done_in_part_is_repeated_only_if_its_method_allows_it(
    dsn, proxy, visits, method, retry
):
    """Its first write took effect, and then the server went away."""
    async with serving("starlette", web_pool(proxy.dsn(dsn), arguments={"reconnect": _impatient()})) as client:
        waiting = asyncio.ensure_future(client.request(method, "/twice", headers={"X-Request-Timeout": "20"}))
        proxy.swallow_next_answer(matching="second", times=10)
        async with asyncio.timeout(10):
            while proxy.fired == 0:
                await asyncio.sleep(0.005)
        proxy.refuse()
        answer = await waiting
    assert (answer.status_code, answer.json()["retry"], "retry-after" in answer.headers) == (503, retry, retry)
    assert await visits.fetchval("SELECT count(*) FROM visits") == 1


async def test_a_write_that_is_not_over_yet_counts_as_well(dsn, visits):
    """It goes on while its request, which wanted another connection at the same time, is answered."""
    database = web_pool(dsn, arguments={"max_size": 1})
    sent, writes = [], []
    await visits.execute("SELECT pg_advisory_lock(714)")
    write = "INSERT INTO visits SELECT 1 FROM pg_advisory_xact_lock(714)"

    async def application(scope, receive, send):
        writes.append(asyncio.ensure_future(database.pool.execute(write)))
        async with asyncio.timeout(10):
            while not await visits.fetchval("SELECT count(*) FROM pg_locks WHERE objid = 714 AND NOT granted"):
                await asyncio.sleep(0.005)
        await database.pool.fetch("SELECT 1", deadline=0.05)

    async def send(message):
        sent.append(message)

    async with database.lifespan(Starlette()):
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await database.middleware(application)(scope, None, send)
        await visits.execute("SELECT pg_advisory_unlock(714)")
        await asyncio.gather(*writes)
    assert (sent[0]["status"], b"retry-after" in dict(sent[0]["headers"])) == (503, False)
    assert await visits.fetchval("SELECT count(*) FROM visits") == 1


def _impatient():
    from resilient_pool import BackoffPolicy

    return BackoffPolicy(base=0.01, max_value=0.05, max_elapsed=0.3)


# The readiness route


async def test_readiness_is_answered_from_what_the_pool_knows(dsn, proxy):
    """It connects to nothing: not before the first request, not while the server is away."""
    database = web_pool(proxy.dsn(dsn))

    async def until(state, client):
        async with asyncio.timeout(10):
            while (answer := await client.get("/ready")).json() != {"database": state}:
                await asyncio.sleep(0.01)
        return answer

    async with serving("starlette", database) as client:
        answer = await client.get("/ready")
        assert (answer.status_code, answer.json(), proxy.attempts) == (200, {"database": "idle"}, 0)
        await client.get("/read")
        assert (await client.get("/ready")).json() == {"database": "up"}
        proxy.refuse()
        proxy.rst()
        request = asyncio.ensure_future(client.get("/read", headers={"X-Request-Timeout": "1.5"}))
        assert (await until("waking", client)).status_code == 200
        database._waking_seconds = 0.1
        answer = await until("away", client)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        await request
        # No caller waits, so it is not known any more: a request has to find out.
        assert (await until("idle", client)).status_code == 200


async def test_readiness_does_not_wake_a_sleeping_database(postgres):
    """A probe every few seconds would keep it awake for ever."""
    with PausingServer(postgres.host, postgres.port, resume_seconds=1.0, seed=3) as server:
        server.pause()
        async with serving("starlette", web_pool(server.dsn(postgres.dsn()))) as client:
            for _ in range(20):
                assert (await client.get("/ready")).json() == {"database": "idle"}
        assert (server.phase, server.attempts) == ("paused", ())


# A request's own time


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1.5", 1.5), (b"0", 0.0), (b"-3", 0.0), (b"nan", None), (b"inf", None), (b"soon", None), (None, None)],
)
def test_a_header_that_is_no_number_of_seconds_is_no_limit(value, seconds):
    """What a client sends is not trusted to make sense."""
    headers = [] if value is None else [(b"x-request-timeout", value)]
    assert header_budget()({"headers": headers}) == seconds
    assert header_budget("grpc-ms", unit=0.001)({"headers": [(b"grpc-ms", b"1500")]}) == 1.5


async def test_the_application_may_say_how_much_time_a_request_has(dsn):
    """By a function of its own, of the path for one."""
    database = web_pool(dsn, arguments={"max_size": 1}, budget=lambda scope: 0.1 if scope["path"] == "/read" else None)
    async with serving("starlette", database) as client, database.pool.acquire():
        assert (await client.get("/read")).status_code == 503


# A client that has gone


async def run_until_disconnected(database, app, method, gone):
    """Drive an application as a server does whose client goes away when `gone` is set."""
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": [], "query_string": b""}
    async with asyncio.timeout(20):
        await database.middleware(app)(scope, receive, send)
    return sent


@pytest.fixture
async def sleeper(dsn):
    """An application that sleeps on the server, and what there is to see of it."""
    database = web_pool(dsn, arguments={"max_size": 1})
    started, gone, ended = asyncio.Event(), asyncio.Event(), []

    async def app(scope, receive, send):
        started.set()
        ended.append("cancelled")
        await database.pool.fetchval(f"SELECT pg_sleep({10 if scope['method'] == 'GET' else 0.5})")
        ended[-1] = "done"

    app.state = type("State", (), {})()
    async with database.lifespan(app):
        yield database, app, started, gone, ended


async def test_a_read_whose_client_has_gone_is_cancelled_also_on_the_server(sleeper, visits):
    """The connection is free again at once."""
    database, app, started, gone, ended = sleeper
    request = asyncio.ensure_future(run_until_disconnected(database, app, "GET", gone))
    await started.wait()
    async with asyncio.timeout(5):
        while not await visits.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(10)'"):
            await asyncio.sleep(0.01)
        gone.set()
        assert await request == []
        assert await database.pool.fetchval("SELECT 1") == 1
    assert ended == ["cancelled"]


async def test_a_read_whose_client_has_gone_waits_for_no_connection(sleeper):
    """Its place in the queue is given up."""
    database, app, started, gone, ended = sleeper
    async with database.pool.acquire():
        request = asyncio.ensure_future(run_until_disconnected(database, app, "GET", gone))
        await started.wait()
        async with asyncio.timeout(5):
            while not database.pool.stats().waiting:
                await asyncio.sleep(0.005)
            gone.set()
            assert await request == []
        assert (database.pool.stats().waiting, ended) == (0, ["cancelled"])


async def test_a_write_runs_to_its_end_although_its_client_has_gone(sleeper):
    """If it were cut short, what it did would not be known."""
    database, app, _, gone, ended = sleeper
    gone.set()
    await run_until_disconnected(database, app, "POST", gone)
    assert ended == ["done"]


async def test_a_browser_that_is_closed_ends_its_request_on_the_server(dsn, visits):
    """Over a real socket, through uvicorn and FastAPI."""
    database = web_pool(dsn)
    app = FastAPI(lifespan=database.lifespan)
    app.add_middleware(database.middleware)

    @app.get("/sleep")
    async def sleep():
        await database.pool.fetchval("SELECT pg_sleep(11)")

    running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(11)' AND state = 'active'"
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    serving = asyncio.ensure_future(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.005)
        _, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        writer.write(b"GET /sleep HTTP/1.1\r\nHost: test\r\n\r\n")
        while not await visits.fetchval(running):
            await asyncio.sleep(0.01)
        writer.close()
        while await visits.fetchval(running):
            await asyncio.sleep(0.01)
    server.should_exit = True
    await serving


async def test_a_websocket_is_not_limited_by_a_requests_time(dsn):
    """It lives on, whatever the header said."""
    database, sent = web_pool(dsn), []

    async def app(scope, receive, send):
        await asyncio.sleep(0.02)
        sent.append(await database.pool.fetchval("SELECT 1"))

    app.state = type("State", (), {})()
    async with database.lifespan(app):
        scope = {"type": "websocket", "path": "/", "headers": [(b"x-request-timeout", b"0.01")]}
        await database.middleware(app)(scope, None, None)
    assert sent == [1]


async def test_what_follows_a_response_is_not_cancelled(dsn):
    """Every client goes when it has its answer: work after it, a background task's, is not for the client."""
    database, gone, done = web_pool(dsn), asyncio.Event(), []

    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        gone.set()
        assert (await receive())["type"] == "http.disconnect"
        done.append(await database.pool.fetchval("SELECT 1"))

    app.state = type("State", (), {})()
    async with database.lifespan(app):
        await run_until_disconnected(database, app, "GET", gone)
    assert done == [1]


def test_a_pool_in_the_place_of_a_function_is_refused(dsn):
    """When the application is written, and not when it starts."""
    with pytest.raises(ConfigurationError, match=r"make must be a function .* not ResilientPool"):
        WebPool(ResilientPool(dsn))


async def test_a_pool_that_is_not_watched_is_refused(dsn):
    """It would be ready for ever, and a request that has written would be said to be safe to send again."""
    with pytest.raises(ConfigurationError, match=r"observers=\[watch\]"):
        async with WebPool(lambda _: ResilientPool(dsn)).lifespan(None):
            pass


@pytest.mark.parametrize("read_before", [0, 1])
async def test_an_error_of_the_servers_receive_reaches_the_application(dsn, read_before):
    """It is raised where the application reads, which does not wait for ever."""
    messages = [{"type": "http.request", "body": b"", "more_body": False}][:read_before]

    async def receive():
        if messages:
            return messages.pop()
        raise OSError("the client's connection is broken")

    async def send(message):
        raise AssertionError(message)

    async def application(scope, receive, send):
        for _ in range(read_before + 1):
            await receive()

    database = web_pool(dsn)
    async with database.lifespan(Starlette()), asyncio.timeout(5):
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        with pytest.raises(OSError, match="is broken"):
            await database.middleware(application)(scope, receive, send)
