"""A guest book with Litestar: the same pool, injected as Litestar does it.

Run it with `python examples/litestar_app.py`. Then open http://127.0.0.1:8000/schema and /ready. It starts a PostgreSQL of its own
(`pip install resilient-pool[testing] litestar uvicorn`), or uses the one that `DATABASE_URL` names.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from litestar import Litestar, get, post
from litestar.di import NamedDependency, Provide

from resilient_pool import ResilientConnection, ResilientPool, RetriedTransaction
from resilient_pool.contrib.asgi import WebPool

SCHEMA = "CREATE TABLE IF NOT EXISTS guest (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL)"
database = WebPool(lambda watch: ResilientPool(os.environ["DATABASE_URL"], observers=[watch]), name="guest book")


@asynccontextmanager
async def lifespan(application: Litestar) -> AsyncIterator[None]:
    """Open the pool."""
    async with database.lifespan(application):
        await database.pool.execute(SCHEMA, idempotent=True)
        yield


@get("/guests")
async def guests(connection: NamedDependency[ResilientConnection]) -> list[str]:
    """List the guests, on a connection that is the request's own."""
    return [row["name"] for row in await connection.fetch("SELECT name FROM guest ORDER BY id")]


@post("/guests/{name:str}")
async def sign(name: str, attempts: NamedDependency[RetriedTransaction]) -> dict[str, int]:
    """Add a guest once, whatever happens to the connection."""
    number = 0
    async for attempt in attempts:
        async with attempt as connection:
            number = await connection.fetchval("INSERT INTO guest (name) VALUES ($1) RETURNING id", name)
    return {"guest": number}


# Around all of the application: Litestar's own middleware does not see requests that no handler is for, such as /ready.
app = database.middleware(
    Litestar(
        [guests, sign],
        dependencies={"connection": Provide(database.connection), "attempts": Provide(database.transaction)},
        exception_handlers=dict(database.litestar_handlers()),
        lifespan=[lifespan],
    )
)


async def main() -> None:
    """Serve the application, beside a PostgreSQL of its own if there is no other."""
    server = uvicorn.Server(uvicorn.Config(app, port=int(os.environ.get("PORT", "8000"))))
    if "DATABASE_URL" in os.environ:
        await server.serve()
        return
    from resilient_pool.testing import EmbeddedPostgres  # noqa: PLC0415 - only needed here

    async with EmbeddedPostgres() as postgres:
        os.environ["DATABASE_URL"] = postgres.dsn()
        await server.serve()


if __name__ == "__main__":
    asyncio.run(main())
