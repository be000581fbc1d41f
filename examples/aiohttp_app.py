"""A guest book in aiohttp: its visitors see no restart of the database, and new entries appear in open pages at once.

Run it with `python examples/aiohttp_app.py`: it starts a database of its own, and listens on port 8080 of this machine (`PORT=8081` for
another). With `DATABASE_URL=postgresql://... python examples/aiohttp_app.py` it uses yours.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from resilient_pool import Gap, ResilientPool
from resilient_pool.contrib.asgi import WebPool
from resilient_pool.testing import EmbeddedPostgres

DEADLINE = 20.0
"""Seconds a request waits for the database: less than the proxy in front waits for us."""
SCHEMA = "CREATE TABLE IF NOT EXISTS entry (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, text text NOT NULL)"
LATEST = "SELECT id, text FROM entry WHERE id > $1 ORDER BY id LIMIT 100"
WRITE = """
    WITH written AS (INSERT INTO entry (text) VALUES ($1) RETURNING id)
    SELECT id, pg_notify('entry', id::text) FROM written
"""
PAGE = """<!doctype html><title>Guest book</title><ul id="entries"></ul>
<form onsubmit="fetch('/entries', {method: 'POST', body: this.text.value}); this.reset(); return false"><input name="text"></form>
<script>
  new EventSource('/events').onmessage = event => {
    const item = document.createElement('li'); item.textContent = JSON.parse(event.data).text; entries.append(item)
  }
</script>"""

database = WebPool(
    lambda watch: ResilientPool(os.environ["DATABASE_URL"], deadline=DEADLINE, command_timeout=15.0, observers=[watch])
)
routes = web.RouteTableDef()


@routes.get("/")
async def page(_request: web.Request) -> web.Response:
    """The page."""
    return web.Response(text=PAGE, content_type="text/html")


@routes.get("/entries")
async def entries(_request: web.Request) -> web.Response:
    """The first entries."""
    return web.json_response([dict(row) for row in await database.pool.fetch(LATEST, 0)])


@routes.post("/entries")
async def write(request: web.Request) -> web.Response:
    """Write an entry, once: if the answer is lost, the server is asked what became of it."""
    number = await database.pool.fetchval(WRITE, await request.text(), exactly_once=True)
    return web.json_response({"id": number}, status=201)


@routes.get("/events")
async def events(request: web.Request) -> web.StreamResponse:
    """All entries as server-sent events, and then each new one. The browser says which it has when it connects again."""
    pool, last = database.pool, int(request.headers.get("Last-Event-ID", 0))
    async with pool.listen("entry") as listener:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send_new(last: int) -> int:
            while rows := await pool.fetch(LATEST, last):
                for row in rows:
                    await response.write(f"id: {row['id']}\ndata: {json.dumps(dict(row))}\n\n".encode())
                last = rows[-1]["id"]
            return last

        last = await send_new(last)
        async for item in listener:
            if isinstance(item, Gap) or int(item.payload) > last:
                last = await send_new(last)
    return response


@web.middleware
async def answer_for_the_database(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 503 with Retry-After when the deadline is over, and say when it is not known whether an entry was written."""
    headers = [(name.lower(), value) for name, value in request.raw_headers]
    async with database.request({"type": "http", "method": request.method, "path": request.path, "headers": headers}):
        try:
            return await handler(request)
        except Exception as error:
            answer = database.answer_to(error, request.method)
            if answer is None:
                raise
            return web.Response(status=answer.status, headers=dict(answer.headers), body=answer.body)


async def open_database(app: web.Application) -> AsyncIterator[None]:
    """Open the pool when the application starts, and close it when it ends."""
    async with contextlib.AsyncExitStack() as stack:
        if "DATABASE_URL" not in os.environ:
            os.environ["DATABASE_URL"] = (await stack.enter_async_context(EmbeddedPostgres())).dsn()
        await stack.enter_async_context(database.lifespan(app))
        await database.pool.execute(SCHEMA, idempotent=True)
        yield


def make_app() -> web.Application:
    """Make the application."""
    app = web.Application(middlewares=[answer_for_the_database])
    app.add_routes(routes)
    app.cleanup_ctx.append(open_database)
    return app


if __name__ == "__main__":
    # A page that is left ends its request, and with it its listener.
    web.run_app(
        make_app(),
        host="127.0.0.1",
        port=int(os.environ.get("PORT", "8080")),
        handler_cancellation=True,
        shutdown_timeout=5,
    )
