"""Faults of the server and of the network, drawn from a seed and injected one after the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from call_log import Crash

from demo.workload import INSERT, WRITE
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

Restart = Literal["fast", "immediate"]
"""How the server is restarted: cleanly, or by a crash."""

PAUSE = 0.12
"""Seconds between two faults, on average."""
RESTART_EVERY = 10.0
"""Seconds between two restarts in a long run; a short one has one all the same."""
RESTART = 1.5
"""Seconds that one restart takes, roughly."""
OUTAGE = 0.3
"""Seconds between the server's end and its new start."""
COMMITS_IN_FLIGHT = 3
"""How many executed COMMITs are without an answer when the server restarts, and how many that were not executed."""
CATCH_TIMEOUT = 3.0
"""Seconds granted for each step towards that, at most; on a machine with nothing else to do some hundredths are enough."""

OTHERS = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
TERMINATE = f"SELECT pg_terminate_backend(pid) {OTHERS} AND "


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectedFault:
    """One fault, drawn in advance.

    Attributes:
        pause: Seconds between the starts of the previous fault and of this one, if that is over by then.
        name: A key of `PROXY_FAULTS`, or "restart".
        chance: A random number between 0 and 1, for what the fault has to choose.
        ending: How a connection ends, where the fault ends one.
    """

    pause: float
    name: str
    chance: float
    ending: str


# Those that must not be repeated are drawn more often.
_REQUESTS = (
    INSERT, INSERT, INSERT, "INSERT INTO entry", WRITE, "NOT EXISTS", "SELECT", "BEGIN", "COMMIT", "COMMIT", "COMMIT",
    "pg_current_xact_id", "pg_xact_status", "fenced", None,
)  # fmt: skip


def _arm(arm: Callable[..., None], fault: InjectedFault) -> None:
    arm(fault.ending, matching=_REQUESTS[int(fault.chance * len(_REQUESTS))], times=1 + int(fault.chance * 100) % 4)


def _cut(proxy: FaultProxy, fault: InjectedFault) -> None:
    _arm(partial(proxy.cut_next_answer, (1, 7, 40, 1500)[int(fault.chance * 40) % 4]), fault)


def _one_connection(proxy: FaultProxy, fault: InjectedFault) -> None:
    present = proxy.connections
    if present:
        chosen = present[int(fault.chance * len(present))]
        chosen.rst() if fault.ending == "rst" else chosen.fin()


PROXY_FAULTS: Mapping[str, Callable[[FaultProxy, InjectedFault], None]] = {
    "reset": lambda proxy, _: proxy.rst(),
    "close": lambda proxy, _: proxy.fin(),
    "one": _one_connection,
    "swallow": lambda proxy, fault: _arm(proxy.swallow_next_answer, fault),
    "cut": _cut,
    "lose": lambda proxy, fault: _arm(proxy.lose_next_request, fault),
    "delay": lambda proxy, fault: proxy.delay(fault.chance * 0.02),
    "hurry": lambda proxy, _: proxy.delay(0),
    "refuse": lambda proxy, _: proxy.refuse(),
    "reject": lambda proxy, fault: proxy.reject("rst" if fault.ending == "rst" else "fin"),
    "starting": lambda proxy, _: proxy.answer_with_error(),
    "restore": lambda proxy, _: proxy.restore(),
}
# New connections are served again before the next fault.
_CONNECT_FAULTS = frozenset({"refuse", "reject", "starting"})


def schedule(seed: int, seconds: float) -> list[InjectedFault]:
    """Draw the faults; no kind is drawn two times more often than another."""
    chance = random.Random(seed)
    restarts = max(1, int(seconds / RESTART_EVERY))
    number = int((seconds - restarts * RESTART) / PAUSE)
    names = _shuffled_rounds(chance, [*PROXY_FAULTS, "swallow", "cut", "terminate", "terminate some"])
    chosen = [next(names) for _ in range(number)]
    for part in range(restarts):
        begin, end = part * number // restarts, (part + 1) * number // restarts
        chosen.insert(chance.randint(begin + (end - begin) // 3, end - (end - begin) // 3) + part, "restart")
    return [
        InjectedFault(
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


class FaultInjector:
    """Injects the faults, one after the other.

    Args:
        server: The server to terminate and restart.
        proxy: The proxy for all other faults.
        restart: How it restarts the server.

    Attributes:
        faults: How often each kind of fault was injected.
        crashes: When the server crashed.
    """

    def __init__(self, server: EmbeddedPostgres, proxy: FaultProxy, restart: Restart) -> None:
        self._server = server
        self._proxy = proxy
        self._mode: Restart = restart
        self.faults: Counter[str] = Counter()
        self.crashes: list[Crash] = []

    async def run(self, faults: list[InjectedFault]) -> None:
        """Inject them all, and restore the proxy."""
        taken = 0.0
        for fault in faults:
            await asyncio.sleep(max(fault.pause - taken, PAUSE / 10))
            began = time.monotonic()
            await self._inject(fault)
            taken = time.monotonic() - began
            self.faults[fault.name] += 1
        await asyncio.to_thread(self._proxy.restore)

    async def _inject(self, fault: InjectedFault) -> None:
        if fault.name == "restart":
            await self._restart()
        elif fault.name == "terminate":
            await self._terminate("true")
        elif fault.name == "terminate some":
            await self._terminate("pid % 2 = 0")
        else:
            # In a thread, so that the event loop of the pool is not blocked.
            await asyncio.to_thread(PROXY_FAULTS[fault.name], self._proxy, fault)
            if fault.name in _CONNECT_FAULTS:
                await asyncio.to_thread(self._proxy.rst)
                await asyncio.sleep(PAUSE)
                await asyncio.to_thread(self._proxy.restore)

    async def _terminate(self, condition: str) -> None:
        # All at the same moment, without a wait for the end of each.
        async with self._server.admin() as admin:
            await admin.execute(TERMINATE + condition)

    async def _restart(self) -> None:
        await asyncio.to_thread(self._proxy.restore)
        await self._catch(INSERT, 1)
        await self._until(lambda: len(self._proxy.connections) > 2 * COMMITS_IN_FLIGHT)
        # New connections and queries of the outcome fail, so that the outcome is resolved after the restart.
        await asyncio.to_thread(self._proxy.refuse)
        await asyncio.to_thread(self._proxy.lose_next_request, matching="pg_xact_status", times=100)
        await self._catch("COMMIT", COMMITS_IN_FLIGHT)
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
        while not await asyncio.to_thread(condition) and time.monotonic() - began < CATCH_TIMEOUT:
            await asyncio.sleep(0.002)
