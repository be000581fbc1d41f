"""The page that shows a pool live: what is on it, what never is, and that a real browser shows it and keeps it fresh."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from resilient_pool import ResilientPool
from resilient_pool.contrib.asgi import WebPool

HEADLESS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


@contextlib.asynccontextmanager
async def application(where, *, name="orders", arguments=None, **options):
    """An application of nothing but a pool and its page."""
    database = WebPool(
        lambda watch: ResilientPool(where, observers=[watch], **(arguments or {})),
        name=name,
        **{"page_path": "/pool", **options},
    )
    app = Starlette(lifespan=database.lifespan)
    app.add_middleware(database.middleware)
    async with app.router.lifespan_context(app):
        yield database, app


@contextlib.asynccontextmanager
async def client_of(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_there_is_no_page_unless_it_is_asked_for(dsn):
    """It tells of the inside of an application."""
    async with application(dsn, page_path=None) as (_, app), client_of(app) as client:
        assert (await client.get("/pool")).status_code == 404


async def test_the_application_decides_who_sees_the_page(dsn):
    """For all others it is not there."""
    allowed = (b"x-operator", b"yes")
    async with (
        application(dsn, may_see_page=lambda scope: allowed in scope["headers"]) as (_, app),
        client_of(app) as client,
    ):
        assert (await client.get("/pool")).status_code == 404
        assert (await client.get("/pool", headers={"X-Operator": "yes"})).status_code == 200


async def test_the_page_shows_sizes_waits_retries_and_the_circuit(dsn, proxy):
    """What it says is what the statistics say."""
    async with application(proxy.dsn(dsn), arguments={"max_size": 3}) as (database, app), client_of(app) as client:
        proxy.lose_next_request(matching="SELECT 2")
        assert await database.pool.fetchval("SELECT 2") == 2
        text = (await client.get("/pool")).text
    seen = re.sub(r"\s+", " ", re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL))
    assert "orders up" in seen
    assert "1 / 3 open" in seen
    assert "closed circuit" in seen
    assert re.search(r"Waits: [12], ", seen)
    assert "Retries disconnected 1" in seen
    assert "pool.retry.scheduled operation fetchval, fault disconnected" in seen


async def test_the_page_needs_and_allows_nothing_from_outside(dsn):
    """One document, whose policy lets nothing else be loaded, run or framed."""
    async with application(dsn) as (_, app), client_of(app) as client:
        answer = await client.get("/pool")
        assert (await client.head("/pool")).headers["content-security-policy"] == answer.headers[
            "content-security-policy"
        ]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert re.findall(r"(?:src|href|url)\s*[=(]|https?://|@import|style=| on\w+=", answer.text) == []


async def test_everything_on_the_page_is_escaped_and_nothing_is_secret(postgres, dsn):
    """A name, and what the application's own `reset=` raised with the password in it."""

    async def reset(connection):
        raise RuntimeError("<img src=x onerror=alert(1)> with s3cret-word")

    await postgres.create_role("page", password="s3cret-word")
    where = postgres.dsn(user="page", password="s3cret-word")
    name = "<script>alert(2)</script>"
    async with application(where, name=name, arguments={"reset": reset}) as (database, app), client_of(app) as client:
        await database.pool.execute("SET work_mem = '4MB'")
        async with asyncio.timeout(5):
            while database.pool.stats().resetting:
                await asyncio.sleep(0.005)
        text = (await client.get("/pool")).text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in text
    assert ("<img" in text, "alert(2)</script>" in text, "s3cret" in text) == (False, False, False)


# A real browser


@contextlib.asynccontextmanager
async def served(app):
    """Serve an application over HTTP and give its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.ensure_future(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


async def browse(url, profile, *options):
    """Let Chromium load a page, and return the document that came of it and what the browser had to say."""
    process = await asyncio.create_subprocess_exec(
        shutil.which("chromium"),
        *HEADLESS,
        f"--user-data-dir={profile}",
        *options,
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(40):
            output, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(), [line for line in log.decode().splitlines() if "CONSOLE" in line]


@pytest.mark.needs("chromium")
async def test_a_browser_shows_the_page_and_keeps_it_fresh(dsn, tmp_path):
    """Its script runs under the page's own policy, and replaces what has changed; nothing is refused or fails."""
    async with application(dsn) as (database, app):
        asked = 0

        async def counting(scope, receive, send):
            nonlocal asked
            asked += scope["path"] == "/pool"
            if asked == 2:
                await database.pool.fetchval("SELECT 1")
            await app(scope, receive, send)

        async with served(counting) as url:
            document, said = await browse(f"{url}/pool", tmp_path, "--virtual-time-budget=7000", "--dump-dom")
    assert said == []
    assert asked >= 3
    assert '<span class="state up">up</span>' in document
    assert "<b>1 / 10</b>" in document
