"""The faults: each is injected for both applications at the same moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from demo.app_process import AppProcess
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

IDLE_SESSION_TIMEOUT = 1.0
"""Seconds after which the server drops an idle session."""
FREEZE_SECONDS = 1.6
"""Seconds for which the applications are frozen: longer than the server keeps an idle session."""
OUTAGE_SECONDS = 0.6
"""Seconds between the server's end and its new start."""
IDLE_SECONDS = 1.4
"""Seconds without traffic: longer than the idle time after which the pool checks a connection before use."""
PATIENCE = 5.0
"""Seconds granted to operations in flight when the applications are to be idle."""
DELAY = 0.002
"""Seconds a byte travels, each way: with a server next door hardly any operation would be in flight when a fault is injected."""
INTERVAL = 0.7
"""Seconds between two faults of the same kind, at least."""

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'demo%'"


@dataclass(slots=True, kw_only=True)
class Environment:
    """Everything that faults are injected into.

    Attributes:
        server: The one server.
        proxies: The network between each application and the server.
        apps: The applications.
        frozen: The intervals, on the monotonic clock, in which the applications were frozen.
    """

    server: EmbeddedPostgres
    proxies: Sequence[FaultProxy]
    apps: Sequence[AppProcess]
    frozen: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultStep:
    """One kind of fault.

    Attributes:
        name: A few words.
        description: What happens, in a sentence.
        min_seconds: Seconds it needs.
        weight: Its part of the seconds that are left over.
        run: Does it, within the seconds it is given.
    """

    name: str
    description: str
    min_seconds: float
    weight: float
    run: Callable[[Environment, float], Awaitable[None]]


async def _no_fault(_environment: Environment, seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _freeze(environment: Environment, seconds: float) -> None:
    began = time.monotonic()
    for app in environment.apps:
        app.freeze()
    try:
        await asyncio.sleep(FREEZE_SECONDS)
    finally:
        for app in environment.apps:
            app.thaw()
        environment.frozen.append((began, time.monotonic()))
    await asyncio.sleep(seconds - FREEZE_SECONDS)


async def _repeatedly(fault: Callable[[], Awaitable[object]], seconds: float) -> None:
    times = max(1, int(seconds / INTERVAL))
    for _ in range(times):
        await fault()
        await asyncio.sleep(seconds / times)


async def _terminate(environment: Environment, seconds: float) -> None:
    async with environment.server.admin() as administrator:
        await _repeatedly(lambda: administrator.execute(TERMINATE), seconds)


async def _close_all(environment: Environment, seconds: float) -> None:
    await _repeatedly(lambda: _to_each(environment, FaultProxy.fin), seconds)


async def _reset_all(environment: Environment, seconds: float) -> None:
    await _repeatedly(lambda: _to_each(environment, FaultProxy.rst), seconds)


async def _to_each(environment: Environment, fault: Callable[[FaultProxy], None]) -> None:
    for proxy in environment.proxies:
        fault(proxy)


async def _restart(environment: Environment, seconds: float) -> None:
    began = time.monotonic()
    await environment.server.stop("fast")
    await asyncio.sleep(OUTAGE_SECONDS)
    await environment.server.start()
    await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))


async def _forget(environment: Environment, seconds: float) -> None:
    # NAT tables drop idle flows only, so the applications are idle for a while.
    began = time.monotonic()
    await asyncio.gather(*(app.pause(PATIENCE) for app in environment.apps))
    await _to_each(environment, FaultProxy.forget)
    await asyncio.sleep(IDLE_SECONDS)
    for app in environment.apps:
        app.resume()
    await asyncio.sleep(max(1.0, seconds - (time.monotonic() - began)))


FAULT_STEPS: tuple[FaultStep, ...] = (
    FaultStep(name="nothing", description="the database is well", min_seconds=0.5, weight=1, run=_no_fault),
    FaultStep(name="freeze", description="the process is frozen until the server drops its idle sessions",
        min_seconds=FREEZE_SECONDS + 0.4, weight=1, run=_freeze),
    FaultStep(name="terminate", description="an administrator terminates every session", min_seconds=INTERVAL, weight=2, run=_terminate),
    FaultStep(name="close", description="the network closes every connection (FIN)", min_seconds=INTERVAL, weight=2, run=_close_all),
    FaultStep(name="reset", description="the network resets every connection (RST)", min_seconds=INTERVAL, weight=2, run=_reset_all),
    FaultStep(name="restart", description="the server is restarted", min_seconds=OUTAGE_SECONDS + 0.9, weight=2, run=_restart),
    FaultStep(name="silence", description="the network drops every idle connection without FIN or RST",
        min_seconds=IDLE_SECONDS + 1.0, weight=3, run=_forget),
)  # fmt: skip
"""In this order. Silence is last, since a plain pool does not recover from it in time."""


def min_total_seconds() -> float:
    """Return how many seconds all steps need."""
    return sum(step.min_seconds for step in FAULT_STEPS)


def schedule(seconds: float) -> list[tuple[FaultStep, float]]:
    """Give every step its minimum and its share of the rest of `seconds`.

    Raises:
        ValueError: The steps need more than that.
    """
    spare = seconds - min_total_seconds()
    if spare < 0:
        raise ValueError(f"{seconds:g} s are not enough: the faults need {min_total_seconds():g} s")
    shares = sum(step.weight for step in FAULT_STEPS)
    return [(step, step.min_seconds + spare * step.weight / shares) for step in FAULT_STEPS]
