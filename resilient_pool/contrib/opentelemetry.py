"""OpenTelemetry: a pool's metrics by the conventions for database clients, and events on the spans of its callers.

    telemetry = PoolTelemetry()
    pool = ResilientPool(dsn, observers=[telemetry.observer("orders")])

It needs `opentelemetry-api` (the extra `opentelemetry`); what becomes of metrics and spans is the application's SDK's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar
from weakref import WeakMethod

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation

from resilient_pool._version import __version__
from resilient_pool.events import CallerWaited, CircuitClosed, ConnectionOpened, Event
from resilient_pool.observability.instrument import Instrument
from resilient_pool.observability.stats import WAIT_BOUNDS, Counters, PoolStats

_NAME = "db.client.connection.pool.name"
_STATE = "db.client.connection.state"
_STATUS = "db.response.status_code"
# Instrumentations look for it in their context: what runs in one that has it makes no spans.
_SUPPRESSED = "suppress_instrumentation"

# What a metric says of a pool at one moment: numbers, each with what distinguishes it from the others.
_Values = Iterable[tuple[float, Mapping[str, str]]]
_Totals = dict[tuple[tuple[str, str], ...], float]
_K = TypeVar("_K")


class PoolTelemetry:
    """An application's pools as OpenTelemetry sees them. Make one for a process, and an observer for each pool.

    Metrics follow the semantic conventions for database clients' connection pools: `db.client.connection.count` (with
    `db.client.connection.state`: `idle`, `used`, and `resetting` between two uses), `.idle.max`, `.idle.min`, `.max`,
    `.pending_requests`, `.timeouts`, `.create_time`, `.wait_time` (of callers that did not get a connection at once) and
    `.use_time`, all with `db.client.connection.pool.name`. Others begin with `resilient_pool.`: see docs/observability.md.

    Each event of a pool becomes an event on the span that is current where it happens: of every caller that waits for an outage,
    then, and not only of the one that finds it. What a pool does by itself (probes, resets, goodbyes) has no caller. It runs in
    a context in which instrumentations are suppressed, and makes no traces.

    Args:
        meter_provider: Where metrics go. Default: the global provider.
        use_time: Whether each use is recorded for `db.client.connection.use_time`. The SDK takes about 7 µs for one, which is what a
            warm call costs the pool and the driver together, without the round trip. Default: yes.
    """

    def __init__(self, *, meter_provider: MeterProvider | None = None, use_time: bool = True) -> None:
        meter = metrics.get_meter("resilient_pool", __version__, meter_provider)
        self._pools: dict[str, _Pools] = {}
        self._create_time = _histogram(meter, "db.client.connection.create_time", "To open a connection.")
        self._wait_time = _histogram(
            meter, "db.client.connection.wait_time", "To get a connection, for callers that did not get one at once."
        )
        use = _histogram(meter, "db.client.connection.use_time", "Between getting a connection and giving it back.")
        self._use_time = use if use_time else None
        self._open_time = _histogram(
            meter, "resilient_pool.circuit.open_time", "How long the server was away, once it is back."
        )
        for name, unit, description, values in _GAUGES:
            meter.create_observable_up_down_counter(name, [self._callback(values)], unit, description)
        for name, unit, description, values in _COUNTERS:
            meter.create_observable_counter(name, [self._callback(values, counts=True)], unit, description)

    def observer(self, name: str) -> Instrument:
        """Make what a pool takes among its `observers=`.

        Args:
            name: The pool's name in the metrics. Pools of the same name, one for each event loop, say, are added up; what a pool
                has counted stays in the counters when it is forgotten.
        """
        return _PoolObserver(self, name, self._pools.setdefault(name, _Pools()))

    def record(self, name: str, event: Event) -> None:
        """Record what an event says was measured."""
        match event:
            case ConnectionOpened():
                self._create_time.record(event.elapsed, {_NAME: name})
            case CallerWaited():
                self._wait_time.record(event.elapsed, {_NAME: name})
            case CircuitClosed():
                self._open_time.record(event.elapsed, {_NAME: name})

    def record_use(self, name: str, seconds: float) -> None:
        """Record that a connection was used for so many seconds."""
        if self._use_time is not None:
            self._use_time.record(seconds, {_NAME: name})

    def _callback(
        self, values: Callable[[PoolStats], _Values], *, counts: bool = False
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            for name, pools in tuple(self._pools.items()):
                totals = pools.counted_before(values) if counts else {}
                for stats in pools.living():
                    _add(totals, values(stats()))
                for key, total in totals.items():
                    yield Observation(total, {_NAME: name, **dict(key)})

        return observe


class _Pools:
    """The pools of one name: those that live, by weak references, and what those have counted that do not."""

    def __init__(self) -> None:
        self._living: dict[WeakMethod[Callable[[], PoolStats]], Counters] = {}
        self._counted: dict[Callable[[PoolStats], _Values], _Totals] = {}

    def add(self, stats: Callable[[], PoolStats]) -> None:
        """Take a pool among them."""
        pool: Any = getattr(stats, "__self__", None)
        # The counters alone outlive the pool.
        self._living[WeakMethod(stats, self._forget)] = pool._counters  # noqa: SLF001

    def _forget(self, reference: WeakMethod[Callable[[], PoolStats]]) -> None:
        now = dict.fromkeys(("size", "idle", "in_use", "resetting", "waiting", "min_size", "max_size"), 0)
        last = self._living.pop(reference).snapshot(**now, circuit_open=False)
        for _, _, _, values in _COUNTERS:
            _add(self._counted.setdefault(values, {}), values(last))

    def living(self) -> Iterable[Callable[[], PoolStats]]:
        """Return what reads the statistics of each that lives."""
        return [stats for pool in tuple(self._living) if (stats := pool()) is not None]

    def counted_before(self, values: Callable[[PoolStats], _Values]) -> _Totals:
        """Return what the others have counted in one metric."""
        return dict(self._counted.get(values, {}))


def _add(totals: _Totals, values: _Values) -> None:
    for value, attributes in values:
        key = tuple(attributes.items())
        totals[key] = totals.get(key, 0) + value


class _PoolObserver(Instrument):
    """One pool's observer: it knows the pool's name."""

    def __init__(self, telemetry: PoolTelemetry, name: str, pools: _Pools) -> None:
        self._telemetry = telemetry
        self._name = name
        self._pools = pools

    def __call__(self, event: Event, /) -> None:
        self._telemetry.record(self._name, event)
        span = trace.get_current_span()
        if span.is_recording():
            span.add_event(event.name, {_NAME: self._name, **_attributes(event)})

    def attach(self, stats: Callable[[], PoolStats]) -> None:
        self._pools.add(stats)

    def enter_background(self) -> None:
        context.attach(context.set_value(_SUPPRESSED, True))

    def used(self, seconds: float) -> None:
        self._telemetry.record_use(self._name, seconds)


def _attributes(event: Event) -> dict[str, Any]:
    values = ((field.name, getattr(event, field.name)) for field in fields(event))
    return {
        _STATUS if name == "sqlstate" else f"resilient_pool.{name}": _plain(value)
        for name, value in values
        if value is not None
    }


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=WAIT_BOUNDS[:-1])


def _one(read: Callable[[PoolStats], float]) -> Callable[[PoolStats], _Values]:
    return lambda stats: [(read(stats), {})]


def _each(read: Callable[[PoolStats], Mapping[_K, int]], attribute: str) -> Callable[[PoolStats], _Values]:
    return lambda stats: [(count, {attribute: str(_plain(kind))}) for kind, count in read(stats).items()]


def _states(stats: PoolStats) -> Mapping[str, int]:
    return {"idle": stats.idle, "used": stats.in_use, "resetting": stats.resetting}


def _outcomes(stats: PoolStats) -> Mapping[str, int]:
    return {**stats.outcomes_resolved, "unknown": stats.outcomes_unknown}


_Metric = tuple[str, str, str, Callable[[PoolStats], _Values]]
_GAUGES: Sequence[_Metric] = (
    ("db.client.connection.count", "{connection}", "Open connections, by state.", _each(_states, _STATE)),
    ("db.client.connection.idle.max", "{connection}", "Idle connections allowed.", _one(lambda s: s.max_size)),
    ("db.client.connection.idle.min", "{connection}", "Connections that are kept open.", _one(lambda s: s.min_size)),
    ("db.client.connection.max", "{connection}", "Open connections allowed.", _one(lambda s: s.max_size)),
    ("db.client.connection.pending_requests", "{request}", "Callers that wait now.", _one(lambda s: s.waiting)),
    ("resilient_pool.circuit.open", "1", "Whether the server is away: 1, else 0.", _one(lambda s: s.circuit_open)),
)
# fmt: off
_COUNTERS: Sequence[_Metric] = (
    ("db.client.connection.timeouts", "{timeout}", "Callers whose time was up while they waited.",
     _one(lambda s: s.wait_timeouts)),
    ("resilient_pool.overloads", "{call}", "Callers refused because of max_waiting.", _one(lambda s: s.overloads)),
    ("resilient_pool.acquired", "{use}", "Connections handed to callers.", _one(lambda s: s.acquired)),
    ("resilient_pool.connect.failures", "{attempt}", "Attempts to open a connection that failed.",
     _one(lambda s: s.connect_failures)),
    ("resilient_pool.discarded", "{connection}", "Connections closed, by reason.",
     _each(lambda s: s.discarded, "resilient_pool.reason")),
    ("resilient_pool.stale", "{connection}", "Connections found dead before use, by what showed it.",
     _each(lambda s: {"socket": s.stale_found, "ping": s.pings_failed}, "resilient_pool.reason")),
    ("resilient_pool.retries", "{retry}", "Further attempts scheduled, by fault.",
     _each(lambda s: s.retries, "resilient_pool.fault")),
    ("resilient_pool.exhausted", "{operation}", "Operations given up although waiting could have cured them.",
     _one(lambda s: s.exhausted)),
    ("resilient_pool.outcomes", "{operation}", "Operations whose answer was lost, by what is known of them: committed, aborted, unknown.",
     _each(_outcomes, "resilient_pool.outcome")),
    ("resilient_pool.circuit.openings", "{opening}", "How often the server was found away.",
     _one(lambda s: s.circuit_openings)),
)
# fmt: on
