"""Statistics: what a pool has done so far, and what it looks like now."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf
from types import MappingProxyType
from typing import Any

from resilient_pool.events import DiscardReason
from resilient_pool.retry.verdict import Fault

WAIT_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, inf)
"""The upper bounds of `PoolStats.wait_histogram`, in seconds: from a round trip to what a sleeping database takes to wake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A snapshot of one pool. The first eight are of this moment, the others count since the pool was made.

    Attributes:
        size: Open connections, in any state.
        idle: Connections that can be handed out at once.
        in_use: Connections lent to the application.
        resetting: Connections that are being made fit for their next use.
        waiting: Callers that wait for a connection.
        min_size: As configured.
        max_size: As configured.
        circuit_open: Whether the server is known to be away: one prober tries to reach it, and callers wait.
        acquired: Connections handed out.
        opened: Connections opened.
        open_seconds: What opening them took, in seconds, together.
        connect_failures: Attempts to open one that failed.
        discarded: Connections closed, by reason; reasons that never occurred are absent.
        stale_found: Connections found dead before use.
        pings: Round trips made to check a connection.
        pings_failed: Those of them that were not answered.
        retries: Further attempts scheduled, by fault; faults that never occurred are absent.
        exhausted: Operations given up although waiting could have cured them.
        outcomes_unknown: Operations of which it is not known whether they took effect.
        outcomes_resolved: Transactions whose COMMIT was not answered and of which it is known nevertheless what became of them,
            by answer (`"committed"`, `"aborted"`); answers that never occurred are absent.
        resets: Sessions reset after use.
        waits: Callers that did not get a connection at once, whether they got one in the end or not. Each is counted when its wait
            has ended: see `waiting` for the others.
        wait_seconds: How long they waited, in seconds, together.
        wait_histogram: How many of the waits took how long: by the smallest of `WAIT_BOUNDS`, in seconds, that was not
            exceeded; bounds without any are absent. They add up to `waits`.
        wait_timeouts: Those of the waits whose time was up.
        overloads: Callers that were refused because as many as `max_waiting` waited.
        circuit_openings: How often the server was found away.
        circuit_open_seconds: How long it was away, in seconds, together; an outage that goes on is not in it yet.
        pooler: Whether a pooler was found between this process and PostgreSQL.
    """

    size: int
    idle: int
    in_use: int
    resetting: int
    waiting: int
    min_size: int
    max_size: int
    circuit_open: bool
    acquired: int
    opened: int
    open_seconds: float
    connect_failures: int
    discarded: Mapping[DiscardReason, int]
    stale_found: int
    pings: int
    pings_failed: int
    retries: Mapping[Fault, int]
    exhausted: int
    outcomes_unknown: int
    outcomes_resolved: Mapping[str, int]
    resets: int
    waits: int
    wait_seconds: float
    wait_histogram: Mapping[float, int]
    wait_timeouts: int
    overloads: int
    circuit_openings: int
    circuit_open_seconds: float
    pooler: bool

    @property
    def discarded_total(self) -> int:
        """How many connections were closed, for any reason."""
        return sum(self.discarded.values())

    @property
    def retries_total(self) -> int:
        """How many further attempts were scheduled, for any fault."""
        return sum(self.retries.values())


@dataclass(slots=True, kw_only=True)
class Counters:
    """The running totals behind `PoolStats`. The pool adds to the attributes directly: this is on the hot path.

    `wait_histogram` has a number for each of `WAIT_BOUNDS`: counting by position takes half as long as by the bound itself.
    """

    acquired: int = 0
    opened: int = 0
    open_seconds: float = 0.0
    connect_failures: int = 0
    discarded: Counter[DiscardReason] = field(default_factory=Counter)
    stale_found: int = 0
    pings: int = 0
    pings_failed: int = 0
    retries: Counter[Fault] = field(default_factory=Counter)
    exhausted: int = 0
    outcomes_unknown: int = 0
    outcomes_resolved: Counter[str] = field(default_factory=Counter)
    resets: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    wait_histogram: list[int] = field(default_factory=lambda: [0] * len(WAIT_BOUNDS))
    wait_timeouts: int = 0
    overloads: int = 0
    circuit_openings: int = 0
    circuit_open_seconds: float = 0.0
    pooler: bool = False

    def count_wait(self, seconds: float) -> None:
        """Count one wait for a connection that has ended."""
        self.waits += 1
        self.wait_seconds += seconds
        self.wait_histogram[bisect_left(WAIT_BOUNDS, seconds)] += 1

    def snapshot(self, **now: Any) -> PoolStats:
        """Freeze the totals together with `now`, the fields of `PoolStats` that are of this moment."""
        totals = {each.name: getattr(self, each.name) for each in fields(self)}
        waits = zip(WAIT_BOUNDS, self.wait_histogram, strict=True)
        totals["wait_histogram"] = MappingProxyType({bound: number for bound, number in waits if number})
        for name, value in totals.items():
            if isinstance(value, Counter):
                totals[name] = MappingProxyType(dict(value))
        return PoolStats(**now, **totals)
