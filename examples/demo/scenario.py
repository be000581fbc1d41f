"""Puts the demo on: sets the stage, plays the acts, counts the rows, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from demo import pausing as sleep
from demo.app_process import Actor
from demo.display import Display
from demo.faults import DELAY, IDLE_SESSION_TIMEOUT, Act, Stage, schedule
from demo.results import Answer, Ledger, Night, Score
from demo.workload import INDEX, POOLS, TABLE, WRITE_ONCE
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

ROLE = "demo"


@dataclass(slots=True)
class Performance:
    """One run of the demo.

    Attributes:
        nights: What became of the requests that found the databases asleep, by the pool's name.
        scores: What each pool's application has reported so far, likewise.
        ledgers: What the database held at the end, likewise.
    """

    nights: Mapping[str, Night] = field(default_factory=lambda: {pool: Night() for pool in sleep.POOLS})
    scores: Mapping[str, Score] = field(default_factory=lambda: {pool: Score() for pool in POOLS})
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    _act: str = ""
    _frozen: list[tuple[float, float]] = field(default_factory=list)

    async def play(self, display: Display, seconds: float, resume_seconds: float) -> None:
        """Play the night and every act, and count the rows.

        Args:
            display: Where to tell what is going on.
            seconds: How long the mistreatment takes in all.
            resume_seconds: How long a sleeping database takes to wake.

        Raises:
            ActorFailedError: An application came down by itself.
        """
        display.preparing("starting a PostgreSQL server")
        async with self._stage() as stage:
            display.falls_asleep(sleep.story(resume_seconds))
            await sleep.play(stage.server, self.nights, resume_seconds)
            display.night_is_over()
            display.preparing("starting the applications")
            await asyncio.gather(*(actor.start() for actor in stage.actors))
            for act, duration in schedule(seconds):
                await self._play(act, duration, stage, display)
            display.preparing("waiting for the last answers and counting the rows")
            await asyncio.gather(*(actor.finish() for actor in stage.actors))
            for pool, score in self.scores.items():
                self.ledgers[pool] = score.compare(await _rows(stage.server, _database(pool)))

    async def _play(self, act: Act, duration: float, stage: Stage, display: Display) -> None:
        self._act = act.name
        display.begins(act)
        await act.play(stage, duration)
        display.ends(act)

    @asynccontextmanager
    async def _stage(self) -> AsyncIterator[Stage]:
        password = secrets.token_urlsafe(12)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(EmbeddedPostgres())
            await server.create_role(ROLE, password)
            proxies, actors = [], []
            for pool in self.scores:
                await _create_database(server, _database(pool))
                proxy = await stack.enter_async_context(FaultProxy(server.host, server.port))
                proxy.delay(DELAY)
                dsn = proxy.dsn(server.dsn(_database(pool), ROLE, password))
                actor = Actor(pool, dsn, functools.partial(self._hear, pool))
                stack.push_async_callback(actor.stop)
                proxies.append(proxy)
                actors.append(actor)
            yield Stage(server=server, proxies=proxies, actors=actors, frozen=self._frozen)

    def _hear(self, pool: str, answer: Answer) -> None:
        self.scores[pool].add(answer, act=self._act, frozen=self._frozen)


def _database(pool: str) -> str:
    return f"{ROLE}_{pool.partition('.')[0].lower()}"


async def _create_database(server: EmbeddedPostgres, name: str) -> None:
    await server.create_database(name, owner=ROLE)
    milliseconds = int(IDLE_SESSION_TIMEOUT * 1000)
    async with server.admin(name) as connection:
        await connection.execute(f"ALTER DATABASE {name} SET idle_session_timeout = {milliseconds}")
        await connection.execute(f"SET ROLE {ROLE}")
        for definition in (TABLE, INDEX, WRITE_ONCE):
            await connection.execute(definition)


async def _rows(server: EmbeddedPostgres, database: str) -> Mapping[int, int]:
    # Whatever a lost connection left running on the server must have had its end before the rows are counted.
    await server.terminate_backends(f"datname = '{database}'")
    async with server.admin(database) as connection:
        found = await connection.fetch("SELECT id, count(*) AS times FROM entry GROUP BY id")
    return {row["id"]: row["times"] for row in found}
