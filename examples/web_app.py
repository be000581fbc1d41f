"""A small web application whose users do not notice a restart of its database.

Run it with `DATABASE_URL=postgresql://... uvicorn --app-dir examples web_app:app`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from resilient_pool import AcquireTimeoutError, Failure, Fault, Phase, PostgresClassifier, ResilientPool

DEADLINE = 25.0
"""Seconds a request may wait for the database: less than the load balancer in front waits for us."""
HEALTH_DEADLINE = 0.5
"""Seconds until the health route reports the database as away: it has to answer while other requests wait."""

SCHEMA = "CREATE TABLE IF NOT EXISTS entry (id bigint PRIMARY KEY, text text NOT NULL)"
PAGE = "SELECT id, text FROM entry ORDER BY id DESC LIMIT $1"
READ = "SELECT id, text FROM entry WHERE id = $1"
WRITE = """
    INSERT INTO entry (id, text) VALUES ($1, $2)
    ON CONFLICT (id) DO UPDATE SET text = excluded.text
    RETURNING id, text
"""


class Text(BaseModel):
    """What a client sends."""

    text: str


class Entry(BaseModel):
    """What a client gets."""

    id: int
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the pool when the application starts and close it when it ends."""
    async with ResilientPool(os.environ["DATABASE_URL"], deadline=DEADLINE, command_timeout=20.0) as pool:
        await pool.execute(SCHEMA, idempotent=True)
        app.state.pool = pool
        yield


def pool_of(request: Request) -> ResilientPool:
    """Hand the application's pool to a route."""
    pool: ResilientPool = request.app.state.pool
    return pool


Pool = Annotated[ResilientPool, Depends(pool_of)]
app = FastAPI(title="Entries", lifespan=lifespan)


@app.get("/entries")
async def page(pool: Pool, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> list[Entry]:
    """Show the latest entries. A read needs no promise: it is repeated when its connection is lost."""
    return [Entry(**record) for record in await pool.fetch(PAGE, limit)]


@app.get("/entries/{number}")
async def read(pool: Pool, number: int) -> Entry:
    """Show one entry."""
    record = await pool.fetchrow(READ, number)
    if record is None:
        raise HTTPException(404, "there is no such entry")
    return Entry(**record)


@app.put("/entries/{number}")
async def write(pool: Pool, number: int, body: Text) -> Entry:
    """Store an entry. The client names it, so storing it twice is as good as once, and we may say so."""
    record = await pool.fetchrow(WRITE, number, body.text, idempotent=True)
    if record is None:
        raise HTTPException(500, "the database stored nothing")
    return Entry(**record)


@app.get("/live", status_code=204)
async def live() -> None:
    """The liveness probe of an orchestrator. It asks no database: a restart of this process would not bring one back."""


@app.get("/health")
async def health(pool: Pool) -> Response:
    """The readiness probe: the status says whether to send requests here, and the body why.

    `up` and `busy` (all connections are at work) are 200. `away` is 503: waiting will cure it, and requests that come
    nevertheless do wait. `broken` is 503 as well: it needs an operator, for a wrong password for instance.
    """
    state, reason = await _ask(pool)
    stats = pool.stats()
    words = {
        "database": state,
        "reason": reason,
        "connections": {"open": stats.size, "idle": stats.idle, "waiting": stats.waiting},
    }
    if state in ("up", "busy"):
        return JSONResponse(words)
    return JSONResponse(words, 503, {"Retry-After": "1"})


async def _ask(pool: ResilientPool) -> tuple[str, str | None]:
    try:
        await pool.fetchval("SELECT 1", deadline=HEALTH_DEADLINE, timeout=HEALTH_DEADLINE)
    except AcquireTimeoutError as error:
        return "busy" if pool.get_size() else "away", type(error).__name__
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is about it
        # The name alone: messages of drivers mention hosts and roles, and this route is public.
        return _cause(error), type(error).__name__
    return "up", None


def _cause(error: Exception) -> str:
    # No answer in time is no answer, although our own limit is no fault of the server.
    if isinstance(error, TimeoutError):
        return "away"
    fault = PostgresClassifier().classify(Failure(error=error, phase=Phase.CONNECT)).fault
    return "broken" if fault is Fault.PERMANENT else "away"
