"""Statistics: what a pool has done so far, and what it looks like now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from resilient_pool.events import DiscardReason
from resilient_pool.retry.verdict import Fault


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
        connect_failures: Attempts to open one that failed.
        discarded: Connections closed, by reason; reasons that never occurred are absent.
        stale_found: Connections found dead before use.
        pings: Round trips made to check a connection.
        pings_failed: Those of them that were not answered.
        retries: Further attempts scheduled, by fault; faults that never occurred are absent.
        exhausted: Operations given up although waiting could have cured them.
        outcomes_unknown: Operations of which it is not known whether they took effect.
        resets: Sessions reset after use.
        waits: Callers that did not get a connection at once.
        wait_seconds: How long they waited, in seconds, together.
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
    connect_failures: int
    discarded: Mapping[DiscardReason, int]
    stale_found: int
    pings: int
    pings_failed: int
    retries: Mapping[Fault, int]
    exhausted: int
    outcomes_unknown: int
    resets: int
    waits: int
    wait_seconds: float
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
    """The running totals behind `PoolStats`. The pool adds to the attributes directly: this is on the hot path."""

    acquired: int = 0
    opened: int = 0
    connect_failures: int = 0
    discarded: Counter[DiscardReason] = field(default_factory=Counter)
    stale_found: int = 0
    pings: int = 0
    pings_failed: int = 0
    retries: Counter[Fault] = field(default_factory=Counter)
    exhausted: int = 0
    outcomes_unknown: int = 0
    resets: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    pooler: bool = False

    def snapshot(self, **now: Any) -> PoolStats:
        """Freeze the totals together with `now`, the fields of `PoolStats` that are of this moment."""
        totals = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("discarded", "retries"):
            totals[name] = MappingProxyType(dict(totals[name]))
        return PoolStats(**now, **totals)
