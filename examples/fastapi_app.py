"""Orders over FastAPI: requests wait for a database that sleeps or restarts, and operators see what it costs.

Run it with `python examples/fastapi_app.py`. Then open http://127.0.0.1:8000/docs, /pool, /ready and /metrics. It starts a PostgreSQL of
its own (`pip install resilient-pool[testing,prometheus] fastapi uvicorn`), or uses the one that `DATABASE_URL` names.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from prometheus_client import CollectorRegistry, make_asgi_app
from pydantic import BaseModel

from resilient_pool import ResilientConnection, ResilientPool, RetriedTransaction
from resilient_pool.contrib.asgi import WebPool
from resilient_pool.contrib.prometheus import Counted, PoolCollector

SCHEMA = """
    CREATE TABLE IF NOT EXISTS stock (article text PRIMARY KEY, pieces int NOT NULL CHECK (pieces >= 0));
    CREATE TABLE IF NOT EXISTS orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, article text NOT NULL, pieces int NOT NULL);
    INSERT INTO stock VALUES ('chair', 100), ('table', 10) ON CONFLICT DO NOTHING;
"""
database = WebPool(
    lambda watch: ResilientPool(os.environ["DATABASE_URL"], observers=[watch], deadline=25.0),
    name="orders",
    page_path="/pool",  # of an application that the world can reach: with may_see_page=
)
measured: dict[str, Counted] = {}
registry = CollectorRegistry()
registry.register(PoolCollector(measured))


class Order(BaseModel):
    """What a client orders."""

    article: str
    pieces: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool, and have it measured."""
    async with database.lifespan(app):
        measured["orders"] = database.pool
        await database.pool.execute(SCHEMA, idempotent=True)
        yield


app = FastAPI(title="Orders", lifespan=lifespan)
app.add_middleware(database.middleware)
app.mount("/metrics", make_asgi_app(registry))


@app.get("/stock")
async def stock(connection: Annotated[ResilientConnection[Any], Depends(database.connection)]) -> dict[str, int]:
    """Say what is there, on a connection that is the request's own."""
    return {row["article"]: row["pieces"] for row in await connection.fetch("SELECT article, pieces FROM stock")}


@app.post("/orders", status_code=201)
async def order(
    wanted: Order, attempts: Annotated[RetriedTransaction[Any], Depends(database.transaction)]
) -> dict[str, int]:
    """Take pieces from the stock and note the order: both or neither, and once, whatever happens to the connection."""
    number = 0
    async for attempt in attempts:
        async with attempt as connection:
            taken = await connection.execute(
                "UPDATE stock SET pieces = pieces - $2 WHERE article = $1 AND pieces >= $2",
                wanted.article,
                wanted.pieces,
            )
            if taken == "UPDATE 0":
                raise HTTPException(409, "there are not so many")
            number = await connection.fetchval(
                "INSERT INTO orders (article, pieces) VALUES ($1, $2) RETURNING id", wanted.article, wanted.pieces
            )
    return {"order": number}


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
