"""Prometheus: a collector that reads pools' statistics when it is asked for them.

    REGISTRY.register(PoolCollector({"orders": pool}))

It needs `prometheus_client` (the extra `prometheus`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import inf
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from resilient_pool._validation import shown
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import DiscardReason
from resilient_pool.observability.stats import WAIT_BOUNDS, PoolStats
from resilient_pool.retry.verdict import Fault

_Reading = tuple[str, str, Callable[[PoolStats], float]]
_Readings = tuple[str, str, str, Callable[[PoolStats], Mapping[str, float]]]


class Counted(Protocol):
    """What has statistics: a `ResilientPool`."""

    def stats(self) -> PoolStats:
        """Take a snapshot."""
        ...


class PoolCollector(Collector):
    """Collects the statistics of pools for any registry. It counts nothing itself: each collection reads `pool.stats()`.

    Metrics begin with `resilient_pool_` and have the label `pool`: see docs/observability.md for the list, and
    examples/grafana-dashboard.json for what to do with them. What never happened is 0 from the beginning, for every reason and
    fault, so that `rate()` and `increase()` see the first time.

    Args:
        pools: Pools by name. The mapping is read at each collection: what is added to it later is collected, too.

    Raises:
        ConfigurationError: `pools` is no mapping.
    """

    def __init__(self, pools: Mapping[str, Counted]) -> None:
        if not isinstance(pools, Mapping):
            raise ConfigurationError(f'pools must be pools by name, as in {{"orders": pool}}, not {shown(pools)}')
        self._pools = pools

    def describe(self) -> Iterable[Metric]:
        """Name the metrics, for a registry that looks for names given twice."""
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        """Read every pool once, and yield its metrics."""
        return self._families({name: pool.stats() for name, pool in tuple(self._pools.items())})

    @staticmethod
    def _families(pools: Mapping[str, PoolStats]) -> Iterator[Metric]:
        for name, description, read in _GAUGES:
            gauge = GaugeMetricFamily(f"resilient_pool_{name}", description, labels=["pool"])
            for pool, stats in pools.items():
                gauge.add_metric([pool], read(stats))
            yield gauge
        states = GaugeMetricFamily(
            "resilient_pool_connections", "Open connections, by state.", labels=["pool", "state"]
        )
        for pool, stats in pools.items():
            states.add_metric([pool, "idle"], stats.idle)
            states.add_metric([pool, "in_use"], stats.in_use)
            states.add_metric([pool, "resetting"], stats.resetting)
        yield states
        for name, description, read in _COUNTERS:
            counter = CounterMetricFamily(f"resilient_pool_{name}", description, labels=["pool"])
            for pool, stats in pools.items():
                counter.add_metric([pool], read(stats))
            yield counter
        for name, description, label, read_each in _LABELLED_COUNTERS:
            counter = CounterMetricFamily(f"resilient_pool_{name}", description, labels=["pool", label])
            for pool, stats in pools.items():
                for kind, count in read_each(stats).items():
                    counter.add_metric([pool, kind], count)
            yield counter
        waits = HistogramMetricFamily(
            "resilient_pool_wait_seconds",
            "How long callers waited that did not get a connection at once.",
            labels=["pool"],
        )
        for pool, stats in pools.items():
            waits.add_metric([pool], list(_buckets(stats)), stats.wait_seconds)
        yield waits


def _buckets(stats: PoolStats) -> Iterator[tuple[str, float]]:
    total = 0
    for bound in WAIT_BOUNDS:
        total += stats.wait_histogram.get(bound, 0)
        yield "+Inf" if bound == inf else repr(bound), total


_GAUGES: tuple[_Reading, ...] = (
    ("connections_min", "Connections that are kept open: min_size.", lambda s: s.min_size),
    ("connections_max", "Connections that there may be: max_size.", lambda s: s.max_size),
    ("waiting", "Callers that wait for a connection now.", lambda s: s.waiting),
    ("circuit_open", "Whether the server is known to be away: 1, else 0.", lambda s: s.circuit_open),
    ("pooler", "Whether a pooler stands between the pool and the server: 1, else 0.", lambda s: s.pooler),
)
_COUNTERS: tuple[_Reading, ...] = (
    ("acquired", "Connections handed to callers.", lambda s: s.acquired),
    ("opened", "Connections opened.", lambda s: s.opened),
    ("open_seconds", "What opening connections took, together.", lambda s: s.open_seconds),
    ("connect_failures", "Attempts to open a connection that failed.", lambda s: s.connect_failures),
    ("stale_found", "Connections whose socket showed before use that they were dead.", lambda s: s.stale_found),
    ("pings", "Round trips made to check a connection.", lambda s: s.pings),
    ("pings_failed", "Those of them that were not answered.", lambda s: s.pings_failed),
    ("exhausted", "Operations given up although waiting could have cured them.", lambda s: s.exhausted),
    ("outcomes_unknown", "Operations of which it is not known whether they took effect.", lambda s: s.outcomes_unknown),
    ("resets", "Sessions reset after use.", lambda s: s.resets),
    ("wait_timeouts", "Callers whose time was up while they waited.", lambda s: s.wait_timeouts),
    ("overloads", "Callers that were refused because as many as max_waiting waited.", lambda s: s.overloads),
    ("circuit_openings", "How often the server was found away.", lambda s: s.circuit_openings),
    ("circuit_open_seconds", "How long the server was away, together.", lambda s: s.circuit_open_seconds),
)
_LABELLED_COUNTERS: tuple[_Readings, ...] = (
    (
        "discarded",
        "Connections closed by the pool, by reason.",
        "reason",
        lambda s: {reason.value: s.discarded.get(reason, 0) for reason in DiscardReason},
    ),
    (
        "retries",
        "Further attempts scheduled, by fault.",
        "fault",
        lambda s: {fault.value: s.retries.get(fault, 0) for fault in Fault},
    ),
    (
        "outcomes_resolved",
        "Transactions whose COMMIT was not answered, by what became of them.",
        "answer",
        lambda s: {answer: s.outcomes_resolved.get(answer, 0) for answer in ("committed", "aborted")},
    ),
)
