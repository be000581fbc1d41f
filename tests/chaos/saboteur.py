"""What is done to the server and to the network, drawn from a seed and dealt blow by blow."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from book import Crash
from workers import FUNCTION, INSERT

from resilient_pool.testing import EmbeddedPostgres, FaultProxy

Restart = Literal["fast", "immediate"]
"""How the server is restarted: in an orderly way, or by a crash."""

PAUSE = 0.12
"""Seconds between two blows, on average."""
RESTART_EVERY = 10.0
"""Seconds between two restarts in a long run; a short one has one all the same."""
RESTART = 1.5
"""Seconds that one restart takes, roughly."""
OUTAGE = 0.3
"""Seconds between the server's end and its new start."""
CAUGHT = 3
"""How many COMMITs that were executed a restart finds without an answer, and how many that were not."""
CATCHING = 3.0
"""Seconds granted for each step towards that, at most; on a machine with nothing else to do some hundredths are enough."""

OTHERS = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
TERMINATE = f"SELECT pg_terminate_backend(pid) {OTHERS} AND "


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One act of mistreatment, drawn in advance.

    Attributes:
        pause: Seconds since the blow before began, if that is over by then.
        name: A key of `BLOWS`, or "restart".
        chance: Between 0 and 1, for whatever the blow has to choose.
        ending: How a connection ends, where the blow ends one.
    """

    pause: float
    name: str
    chance: float
    ending: str


# Some more than once, since these are what must not be repeated.
_REQUESTS = (
    INSERT, INSERT, INSERT, "INSERT INTO ledger", FUNCTION, "NOT EXISTS", "SELECT", "BEGIN", "COMMIT", "COMMIT", "COMMIT",
    "pg_current_xact_id", "pg_xact_status", "fenced", None,
)  # fmt: skip


def _arm(arm: Callable[..., None], blow: Blow) -> None:
    arm(blow.ending, matching=_REQUESTS[int(blow.chance * len(_REQUESTS))], times=1 + int(blow.chance * 100) % 4)


def _cut(proxy: FaultProxy, blow: Blow) -> None:
    _arm(partial(proxy.cut_next_answer, (1, 7, 40, 1500)[int(blow.chance * 40) % 4]), blow)


def _one_connection(proxy: FaultProxy, blow: Blow) -> None:
    present = proxy.connections
    if present:
        chosen = present[int(blow.chance * len(present))]
        chosen.rst() if blow.ending == "rst" else chosen.fin()


BLOWS: Mapping[str, Callable[[FaultProxy, Blow], None]] = {
    "reset": lambda proxy, _: proxy.rst(),
    "close": lambda proxy, _: proxy.fin(),
    "one": _one_connection,
    "swallow": lambda proxy, blow: _arm(proxy.swallow_next_answer, blow),
    "cut": _cut,
    "lose": lambda proxy, blow: _arm(proxy.lose_next_request, blow),
    "delay": lambda proxy, blow: proxy.delay(blow.chance * 0.02),
    "hurry": lambda proxy, _: proxy.delay(0),
    "refuse": lambda proxy, _: proxy.refuse(),
    "reject": lambda proxy, blow: proxy.reject("rst" if blow.ending == "rst" else "fin"),
    "starting": lambda proxy, _: proxy.answer_with_error(),
    "restore": lambda proxy, _: proxy.restore(),
}
# These last until the next blow, before which new connections are served again.
_CLOSED_DOORS = frozenset({"refuse", "reject", "starting"})


def schedule(seed: int, seconds: float) -> list[Blow]:
    """Draw what is to happen; every kind of blow comes before any kind comes twice more than another."""
    chance = random.Random(seed)
    restarts = max(1, int(seconds / RESTART_EVERY))
    number = int((seconds - restarts * RESTART) / PAUSE)
    names = _shuffled_rounds(chance, [*BLOWS, "swallow", "cut", "terminate", "terminate some"])
    chosen = [next(names) for _ in range(number)]
    for part in range(restarts):
        begin, end = part * number // restarts, (part + 1) * number // restarts
        chosen.insert(chance.randint(begin + (end - begin) // 3, end - (end - begin) // 3) + part, "restart")
    return [
        Blow(
            pause=PAUSE * (0.2 + 1.6 * chance.random()),
            name=name,
            chance=chance.random(),
            ending=chance.choice(["fin", "rst"]),
        )
        for name in chosen
    ]


def _shuffled_rounds(chance: random.Random, names: list[str]) -> Iterator[str]:
    while True:
        yield from chance.sample(names, len(names))


class Saboteur:
    """Deals the blows, one after the other.

    Args:
        server: What it terminates and restarts.
        proxy: What it does everything else with.
        restart: How it restarts the server.

    Attributes:
        blows: How often each kind of blow fell.
        crashes: When the server crashed.
    """

    def __init__(self, server: EmbeddedPostgres, proxy: FaultProxy, restart: Restart) -> None:
        self._server = server
        self._proxy = proxy
        self._mode: Restart = restart
        self.blows: Counter[str] = Counter()
        self.crashes: list[Crash] = []

    async def play(self, blows: list[Blow]) -> None:
        """Deal them all, and leave everything in order."""
        taken = 0.0
        for blow in blows:
            await asyncio.sleep(max(blow.pause - taken, PAUSE / 10))
            began = time.monotonic()
            await self._deal(blow)
            taken = time.monotonic() - began
            self.blows[blow.name] += 1
        await asyncio.to_thread(self._proxy.restore)

    async def _deal(self, blow: Blow) -> None:
        if blow.name == "restart":
            await self._restart()
        elif blow.name == "terminate":
            await self._terminate("true")
        elif blow.name == "terminate some":
            await self._terminate("pid % 2 = 0")
        else:
            # In a thread, so that the pool's own loop turns while it happens.
            await asyncio.to_thread(BLOWS[blow.name], self._proxy, blow)
            if blow.name in _CLOSED_DOORS:
                await asyncio.to_thread(self._proxy.rst)
                await asyncio.sleep(PAUSE)
                await asyncio.to_thread(self._proxy.restore)

    async def _terminate(self, condition: str) -> None:
        # All at the same moment; waiting for each to be gone would make it a slow procession.
        async with self._server.admin() as admin:
            await admin.execute(TERMINATE + condition)

    async def _restart(self) -> None:
        await asyncio.to_thread(self._proxy.restore)
        await self._catch(INSERT, 1)
        await self._until(lambda: len(self._proxy.connections) > 2 * CAUGHT)
        # Nobody is let in and no question gets through, so what became of them has to be found out after the restart.
        await asyncio.to_thread(self._proxy.refuse)
        await asyncio.to_thread(self._proxy.lose_next_request, matching="pg_xact_status", times=100)
        await self._catch("COMMIT", CAUGHT)
        began = time.monotonic()
        await self._server.stop(self._mode)
        await asyncio.sleep(OUTAGE)
        if self._mode == "immediate":
            self.crashes.append(Crash(began=began, over=time.monotonic()))
        await self._server.start()
        await asyncio.to_thread(self._proxy.restore)

    async def _catch(self, request: str, times: int) -> None:
        caught = self._proxy.fired + 2 * times
        await asyncio.to_thread(self._proxy.swallow_next_answer, "rst", matching=request, times=times)
        await asyncio.to_thread(self._proxy.lose_next_request, "fin", matching=request, times=times)
        await self._until(lambda: self._proxy.fired >= caught)

    @staticmethod
    async def _until(condition: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not await asyncio.to_thread(condition) and time.monotonic() - began < CATCHING:
            await asyncio.sleep(0.002)
