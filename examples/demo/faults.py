"""The mistreatment: the only module of the demo that does harm, always to both applications at the same moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from demo.app_process import Actor
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

IDLE_SESSION_TIMEOUT = 1.0
"""Seconds after which the server drops an idle session."""
FREEZE = 1.6
"""Seconds for which the applications are frozen: longer than the server keeps an idle session."""
OUTAGE = 0.6
"""Seconds between the server's end and its new start."""
QUIET = 1.4
"""Seconds without traffic after which a network that forgets has forgotten, and a careful pool asks before it trusts."""
PATIENCE = 5.0
"""Seconds granted to operations under way when the applications fall quiet."""
DELAY = 0.002
"""Seconds a byte travels, each way: with a server next door hardly any operation would be under way when a blow falls."""
PAUSE = 0.7
"""Seconds between two blows of the same kind, at least."""

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'demo%'"


@dataclass(slots=True, kw_only=True)
class Stage:
    """All that can be harmed.

    Attributes:
        server: The one server.
        proxies: The network between each application and the server.
        actors: The applications.
        frozen: The intervals, on the monotonic clock, in which the applications stood still.
    """

    server: EmbeddedPostgres
    proxies: Sequence[FaultProxy]
    actors: Sequence[Actor]
    frozen: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One kind of mistreatment.

    Attributes:
        name: A few words.
        story: What happens, in a sentence.
        least: Seconds it needs.
        share: Its part of the seconds that are left over.
        play: Does it, within the seconds it is given.
    """

    name: str
    story: str
    least: float
    share: float
    play: Callable[[Stage, float], Awaitable[None]]


async def _calm(_stage: Stage, seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _freeze(stage: Stage, seconds: float) -> None:
    began = time.monotonic()
    for actor in stage.actors:
        actor.freeze()
    try:
        await asyncio.sleep(FREEZE)
    finally:
        for actor in stage.actors:
            actor.thaw()
        stage.frozen.append((began, time.monotonic()))
    await asyncio.sleep(seconds - FREEZE)


async def _repeatedly(blow: Callable[[], Awaitable[object]], seconds: float) -> None:
    times = max(1, int(seconds / PAUSE))
    for _ in range(times):
        await blow()
        await asyncio.sleep(seconds / times)


async def _terminate(stage: Stage, seconds: float) -> None:
    async with stage.server.admin() as administrator:
        await _repeatedly(lambda: administrator.execute(TERMINATE), seconds)


async def _close(stage: Stage, seconds: float) -> None:
    await _repeatedly(lambda: _to_each(stage, FaultProxy.fin), seconds)


async def _reset(stage: Stage, seconds: float) -> None:
    await _repeatedly(lambda: _to_each(stage, FaultProxy.rst), seconds)


async def _to_each(stage: Stage, blow: Callable[[FaultProxy], None]) -> None:
    for proxy in stage.proxies:
        blow(proxy)


async def _restart(stage: Stage, seconds: float) -> None:
    began = time.monotonic()
    await stage.server.stop("fast")
    await asyncio.sleep(OUTAGE)
    await stage.server.start()
    await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))


async def _forget(stage: Stage, seconds: float) -> None:
    # A network forgets flows that carry nothing, so the applications have nothing to do for a while.
    began = time.monotonic()
    await asyncio.gather(*(actor.pause(PATIENCE) for actor in stage.actors))
    await _to_each(stage, FaultProxy.forget)
    await asyncio.sleep(QUIET)
    for actor in stage.actors:
        actor.resume()
    await asyncio.sleep(max(1.0, seconds - (time.monotonic() - began)))


ACTS: tuple[Act, ...] = (
    Act(name="nothing", story="the database is well", least=0.5, share=1, play=_calm),
    Act(name="freeze", story="the process stands still until the server drops its idle sessions",
        least=FREEZE + 0.4, share=1, play=_freeze),
    Act(name="terminate", story="an administrator terminates every session", least=PAUSE, share=2, play=_terminate),
    Act(name="close", story="the network closes every connection (FIN)", least=PAUSE, share=2, play=_close),
    Act(name="reset", story="the network resets every connection (RST)", least=PAUSE, share=2, play=_reset),
    Act(name="restart", story="the server is restarted", least=OUTAGE + 0.9, share=2, play=_restart),
    Act(name="silence", story="the network forgets every idle connection and tells nobody",
        least=QUIET + 1.0, share=3, play=_forget),
)  # fmt: skip
"""What is done, in this order. Silence comes last, since a plain pool does not come back from it in time."""


def least_seconds() -> float:
    """Tell how many seconds all acts need."""
    return sum(act.least for act in ACTS)


def schedule(seconds: float) -> list[tuple[Act, float]]:
    """Give every act what it needs and its share of the rest of `seconds`.

    Raises:
        ValueError: The acts need more than that.
    """
    spare = seconds - least_seconds()
    if spare < 0:
        raise ValueError(f"{seconds:g} s are not enough: the mistreatment needs {least_seconds():g} s")
    shares = sum(act.share for act in ACTS)
    return [(act, act.least + spare * act.share / shares) for act in ACTS]
