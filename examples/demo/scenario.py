"""One run of the demo: sets up the environment, runs the steps, counts the rows, and cleans up."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from demo import pausing
from demo.app_process import AppProcess
from demo.application import POOLS
from demo.display import Display
from demo.faults import DELAY, IDLE_SESSION_TIMEOUT, Environment, FaultStep, schedule
from demo.ledger import Audit, audit
from demo.results import Answer, PauseResult, Score
from demo.workload import SCHEMA, count_rows
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

ROLE = "demo"


@dataclass(slots=True)
class Scenario:
    """One run of the demo.

    Attributes:
        pause_results: Results of the requests to the paused databases, by the pool's name.
        scores: What each pool's application has reported so far, likewise.
        audits: The writes compared with the rows at the end, likewise.
    """

    pause_results: Mapping[str, PauseResult] = field(
        default_factory=lambda: {pool: PauseResult() for pool in pausing.POOLS}
    )
    scores: Mapping[str, Score] = field(default_factory=lambda: {pool: Score() for pool in POOLS})
    audits: dict[str, Audit] = field(default_factory=dict)
    _step: str = ""
    _frozen: list[tuple[float, float]] = field(default_factory=list)

    async def run(self, display: Display, seconds: float, resume_seconds: float) -> None:
        """Run the pause and every step, and count the rows.

        Args:
            display: Where to show progress.
            seconds: How long all faults take together.
            resume_seconds: How long a paused database takes to resume.

        Raises:
            AppProcessError: An application process failed by itself.
        """
        display.show_status("starting a PostgreSQL server")
        async with self._environment() as environment:
            display.pause_started(pausing.describe(resume_seconds))
            await pausing.run(environment.server, self.pause_results, resume_seconds)
            display.pause_finished()
            display.show_status("starting the applications")
            await asyncio.gather(*(app.start() for app in environment.apps))
            for step, duration in schedule(seconds):
                await self._run_step(step, duration, environment, display)
            display.show_status("waiting for the last answers and counting the rows")
            await asyncio.gather(*(app.finish() for app in environment.apps))
            for pool, score in self.scores.items():
                self.audits[pool] = audit(score.writes, await _rows(environment.server, _database(pool)))

    async def _run_step(self, step: FaultStep, duration: float, environment: Environment, display: Display) -> None:
        self._step = step.name
        display.step_started(step)
        await step.run(environment, duration)
        display.step_finished(step)

    @asynccontextmanager
    async def _environment(self) -> AsyncIterator[Environment]:
        password = secrets.token_urlsafe(12)
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(EmbeddedPostgres())
            await server.create_role(ROLE, password)
            proxies, apps = [], []
            for pool in self.scores:
                await _create_database(server, _database(pool))
                proxy = await stack.enter_async_context(FaultProxy(server.host, server.port))
                proxy.delay(DELAY)
                dsn = proxy.dsn(server.dsn(_database(pool), ROLE, password))
                app = AppProcess(pool, dsn, functools.partial(self._on_answer, pool))
                stack.push_async_callback(app.stop)
                proxies.append(proxy)
                apps.append(app)
            yield Environment(server=server, proxies=proxies, apps=apps, frozen=self._frozen)

    def _on_answer(self, pool: str, answer: Answer) -> None:
        self.scores[pool].add(answer, step=self._step, frozen=self._frozen)


def _database(pool: str) -> str:
    return f"{ROLE}_{pool.partition('.')[0].lower()}"


async def _create_database(server: EmbeddedPostgres, name: str) -> None:
    await server.create_database(name, owner=ROLE)
    milliseconds = int(IDLE_SESSION_TIMEOUT * 1000)
    async with server.admin(name) as connection:
        await connection.execute(f"ALTER DATABASE {name} SET idle_session_timeout = {milliseconds}")
        await connection.execute(f"SET ROLE {ROLE}")
        await connection.execute(SCHEMA)


async def _rows(server: EmbeddedPostgres, database: str) -> Mapping[int, int]:
    # A statement of a lost connection may still run on the server; it must end before the rows are counted.
    await server.terminate_backends(f"datname = '{database}'")
    async with server.admin(database) as connection:
        return await count_rows(connection)
