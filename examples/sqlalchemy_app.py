"""A bank with SQLAlchemy: transfers are repeated when they conflict or lose their connection, and none is made twice.

Run it with `python examples/sqlalchemy_app.py`. Then open http://127.0.0.1:8000/docs. It starts a PostgreSQL of its own
(`pip install resilient-pool[sqlalchemy,testing] fastapi uvicorn`), or uses the one that `DATABASE_URL` names.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from resilient_pool.contrib.sqlalchemy import pool_of, retry_session

Sessions = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    """What all models have in common."""


class Account(Base):
    """Whose money it is."""

    __tablename__ = "account"
    owner: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    """What was moved."""

    __tablename__ = "transfer"
    id: Mapped[int] = mapped_column(primary_key=True)
    payer: Mapped[str]
    payee: Mapped[str]
    amount: Mapped[int]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the engine, and the tables; the database may be asleep."""
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+resilient://", 1)
    engine = create_async_engine(url, isolation_level="SERIALIZABLE", pool_size=5, pool_timeout=25)
    app.state.sessions = sessions = async_sessionmaker(engine, expire_on_commit=False)
    app.state.engine = engine
    async for attempt in retry_session(sessions):
        async with attempt as session:
            await (await session.connection()).run_sync(Base.metadata.create_all)
            for owner in ("Ada", "Grace"):
                if await session.get(Account, owner) is None:
                    session.add(Account(owner=owner, balance=1000))
    yield
    await engine.dispose()


app = FastAPI(title="Bank", lifespan=lifespan)


def sessions_of_app() -> Sessions:
    """Return what makes sessions."""
    made: Sessions = app.state.sessions
    return made


@app.post("/transfers", status_code=201)
async def transfer(payer: str, payee: str, amount: int, sessions: Annotated[Sessions, Depends(sessions_of_app)]) -> int:
    """Move money, once: what conflicts or is lost on its way is run again, and a lost COMMIT is looked up."""
    async for attempt in retry_session(sessions):
        async with attempt as session:
            accounts = [await session.get(Account, owner) for owner in (payer, payee)]
            if accounts[0] is None or accounts[1] is None or not 0 < amount <= accounts[0].balance:
                raise HTTPException(409, "there is no such account, or not so much on it")
            accounts[0].balance -= amount
            accounts[1].balance += amount
            made = Transfer(payer=payer, payee=payee, amount=amount)
            session.add(made)
    return made.id


@app.get("/accounts")
async def accounts(sessions: Annotated[Sessions, Depends(sessions_of_app)]) -> dict[str, int]:
    """List what everyone has."""
    async with sessions() as session:
        return {account.owner: account.balance for account in await session.scalars(select(Account))}


@app.get("/transfers")
async def count(sessions: Annotated[Sessions, Depends(sessions_of_app)]) -> dict[str, int]:
    """Count the transfers, and what was repeated."""
    async with sessions() as session:
        number = await session.scalar(select(func.count()).select_from(Transfer))
    retries = pool_of(app.state.engine).stats().retries
    return {"transfers": number or 0, "retries": sum(retries.values())}


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
