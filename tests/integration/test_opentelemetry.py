"""OpenTelemetry: what the SDK is handed by real pools on a real server, in memory."""

from __future__ import annotations

import asyncio
import gc
import inspect

import pytest
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.metrics import db_metrics

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.contrib.opentelemetry import PoolTelemetry
from resilient_pool.testing import PausingServer

NAME = "db.client.connection.pool.name"


class Sdk:
    """An SDK of the test's own: nothing is global."""

    def __init__(self):
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.spans = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = self.tracers.get_tracer("test")
        self.telemetry = PoolTelemetry(meter_provider=self.meters)

    def metrics(self):
        """Collect every metric by name."""
        data = self.reader.get_metrics_data()
        resources = data.resource_metrics if data is not None else ()
        return {
            metric.name: metric
            for resource in resources
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name):
        """Collect the points of one metric, by their attributes but the pool's name."""
        metric = self.metrics().get(name)
        points = metric.data.data_points if metric is not None else ()
        return {
            tuple(value for key, value in sorted(point.attributes.items()) if key != NAME): point for point in points
        }

    def value(self, name):
        """Collect a metric of one point."""
        (point,) = self.points(name).values()
        return getattr(point, "value", None) if hasattr(point, "value") else point

    def values(self, name):
        return {key[0]: point.value for key, point in self.points(name).items()}

    def events(self, span_name):
        """List the events on each finished span of a name."""
        return [list(span.events) for span in self.spans.get_finished_spans() if span.name == span_name]


@pytest.fixture
def sdk():
    sdk = Sdk()
    yield sdk
    sdk.meters.shutdown()
    sdk.tracers.shutdown()


def test_names_and_units_are_those_of_the_conventions(sdk):
    """The package with the conventions' own constants says what they are."""

    class Recorder:
        def __getattr__(self, kind):
            return lambda name, unit, description: (name, unit, kind.removeprefix("create_").replace("observable_", ""))

    conventions = {
        made[0]: made
        for made in (
            make(Recorder())
            for name, make in inspect.getmembers(db_metrics, inspect.isfunction)
            if name.startswith("create_db_client_connection_")
        )
    }
    kinds = {"ObservableUpDownCounter": "up_down_counter", "ObservableCounter": "counter", "Histogram": "histogram"}
    ours = {
        name: (name, instrument.unit, kinds[type(instrument).__name__.removeprefix("_")])
        for name, instrument in _instruments(sdk).items()
        if name.startswith("db.")
    }
    assert ours == conventions


def _instruments(sdk):
    made = {}

    class Meters(MeterProvider):
        def get_meter(self, *args, **kwargs):
            meter = super().get_meter(*args, **kwargs)
            for kind in ("create_histogram", "create_observable_counter", "create_observable_up_down_counter"):
                create = getattr(meter, kind)

                def keep(name, *args, create=create, **kwargs):
                    made[name] = create(name, *args, **kwargs)
                    return made[name]

                setattr(meter, kind, keep)
            return meter

    meters = Meters([], shutdown_on_exit=False)
    PoolTelemetry(meter_provider=meters)
    meters.shutdown()
    return made


async def test_a_pool_is_measured_under_its_name(sdk, dsn):
    """Sizes by state, limits, and a point in each histogram for what happened."""
    observer = sdk.telemetry.observer("orders")
    async with ResilientPool(dsn, min_size=1, max_size=4, observers=[observer]) as pool:
        async with pool.acquire() as connection:
            await connection.fetchval("SELECT 1")
            assert sdk.values("db.client.connection.count") == {"idle": 0, "used": 1, "resetting": 0}
        assert [sdk.value(f"db.client.connection.{name}") for name in ("max", "idle.max", "idle.min")] == [4, 4, 1]
        assert sdk.value("db.client.connection.pending_requests") == 0
        assert sdk.value("db.client.connection.create_time").count == 1
        assert sdk.value("db.client.connection.use_time").count == pool.stats().acquired
        (point,) = sdk.metrics()["db.client.connection.max"].data.data_points
        assert point.attributes == {NAME: "orders"}


async def test_uses_need_not_be_recorded(sdk, dsn):
    """They are the one thing that happens with every call."""
    telemetry = PoolTelemetry(meter_provider=sdk.meters, use_time=False)
    async with ResilientPool(dsn, observers=[telemetry.observer("orders")]) as pool:
        await pool.fetchval("SELECT 1")
        assert "db.client.connection.use_time" not in sdk.metrics()
        assert sdk.metrics()["db.client.connection.create_time"] is not None


async def test_pools_of_one_name_are_added_up_and_a_forgotten_one_is_gone(sdk, dsn):
    """One for each event loop, say; the telemetry keeps none of them alive."""
    observer = sdk.telemetry.observer("orders")
    other = ResilientPool(dsn, max_size=3, observers=[sdk.telemetry.observer("stock")])
    pools = [ResilientPool(dsn, max_size=4, observers=[observer]) for _ in range(2)]
    maxima = sdk.metrics()["db.client.connection.max"].data.data_points
    assert {point.attributes[NAME]: point.value for point in maxima} == {"orders": 8, "stock": 3}
    pools.pop()
    gc.collect()
    maxima = sdk.metrics()["db.client.connection.max"].data.data_points
    assert {point.attributes[NAME]: point.value for point in maxima} == {"orders": 4, "stock": 3}
    del other


async def test_what_a_forgotten_pool_has_counted_stays_counted(sdk, dsn):
    """A counter never falls: one that did would look like a restart, and the others' counts like new ones."""
    for number in range(3):
        async with ResilientPool(dsn, observers=[sdk.telemetry.observer("orders")]) as pool:
            await pool.fetchval("SELECT 1")
        del pool
        gc.collect()
        (acquired,) = sdk.metrics()["resilient_pool.acquired"].data.data_points
        (closed,) = sdk.metrics()["resilient_pool.discarded"].data.data_points
        assert (acquired.value, closed.value) == (number + 1, number + 1)


async def test_every_caller_that_waits_for_a_sleeping_server_has_the_outage_on_its_span(sdk, postgres):
    """Ten requests, one prober: each span says how long the server was away and why."""

    async def request(pool):
        with sdk.tracer.start_as_current_span("request"):
            assert await pool.fetchval("SELECT 1") == 1

    with PausingServer(postgres.host, postgres.port, resume_seconds=1.0, away=("57P03",), seed=1) as server:
        server.pause()
        where = server.dsn(postgres.dsn())
        async with ResilientPool(where, max_size=10, observers=[sdk.telemetry.observer("orders")]) as pool:
            await asyncio.gather(*(request(pool) for _ in range(10)))
            openings, seconds = pool.stats().circuit_openings, pool.stats().circuit_open_seconds
    waits = [
        [event.attributes for event in events if event.name == "pool.caller.waited"] for events in sdk.events("request")
    ]
    assert [len(each) > 0 for each in waits] == [True] * 10
    for attributes in (each[0] for each in waits):
        assert attributes["resilient_pool.reason"] == "away"
        assert attributes["resilient_pool.end"] == "served"
        assert attributes["resilient_pool.outage"] >= 0.5
        assert attributes["resilient_pool.attempts"] >= 1
        assert attributes["resilient_pool.fault"] == "unreachable"
    assert sdk.value("resilient_pool.circuit.openings") == openings == 1
    assert sdk.value("resilient_pool.circuit.open_time").sum == pytest.approx(seconds)


async def test_a_retry_is_on_the_span_of_the_caller_whose_statement_is_repeated(sdk, proxy, dsn):
    """With the fault and the delay; the metric counts it by fault."""
    async with ResilientPool(proxy.dsn(dsn), observers=[sdk.telemetry.observer("orders")]) as pool:
        await pool.fetchval("SELECT 1")
        proxy.lose_next_request()
        with sdk.tracer.start_as_current_span("request"):
            assert await pool.fetchval("SELECT 2") == 2
        retries = pool.stats().retries
    (events,) = sdk.events("request")
    (retry,) = [event for event in events if event.name == "pool.retry.scheduled"]
    assert retry.attributes["resilient_pool.operation"] == "fetchval"
    assert retry.attributes["resilient_pool.fault"] == "disconnected"
    assert sdk.values("resilient_pool.retries") == {fault.value: count for fault, count in retries.items()}


async def test_outcomes_are_counted_by_what_is_known(sdk, proxy, dsn):
    """A COMMIT whose answer is lost is resolved; a write outside of a transaction is not."""
    async with ResilientPool(proxy.dsn(dsn), observers=[sdk.telemetry.observer("orders")]) as pool:
        await pool.execute("CREATE TABLE IF NOT EXISTS told (id int)")
        async for attempt in pool.transaction():
            async with attempt as connection:
                await connection.execute("INSERT INTO told VALUES (1)")
                proxy.swallow_next_answer(matching="COMMIT")
        proxy.swallow_next_answer(matching="INSERT")
        with pytest.raises(OutcomeUnknownError):
            await pool.execute("INSERT INTO told VALUES (2)")
        await pool.execute("DROP TABLE told")
        assert sdk.values("resilient_pool.outcomes") == {"committed": 1, "unknown": 1}


@pytest.fixture
def instrumented(sdk):
    AsyncPGInstrumentor().instrument(tracer_provider=sdk.tracers)
    yield
    AsyncPGInstrumentor().uninstrument()


async def _leave_work_behind(pool, sdk):
    with sdk.tracer.start_as_current_span("request"):
        await pool.execute("SET work_mem = '4MB'")  # a reset follows, in the background
    async with asyncio.timeout(10):
        while pool.stats().resetting:
            await asyncio.sleep(0.005)
    await pool.expire_connections()  # a goodbye follows
    with sdk.tracer.start_as_current_span("request"):
        await pool.fetchval("SELECT 1")


def _orphans(sdk):
    spans = sdk.spans.get_finished_spans()
    return [span.name for span in spans if span.parent is None and span.name != "request"]


async def test_background_work_makes_no_traces_beside_the_instrumentation_of_asyncpg(sdk, dsn, instrumented):
    """Every span belongs to a request, and the statements of the requests are there."""
    async with ResilientPool(dsn, observers=[sdk.telemetry.observer("orders")]) as pool:
        await _leave_work_behind(pool, sdk)
        resets = pool.stats().resets
    assert (resets, _orphans(sdk)) == (1, [])
    names = [span.name for span in sdk.spans.get_finished_spans()]
    assert (names.count("request"), names.count("SET"), names.count("SELECT")) == (2, 1, 1)


async def test_without_the_observer_a_reset_is_a_trace_of_its_own(sdk, dsn, instrumented):
    """So the test before shows something."""
    async with ResilientPool(dsn) as pool:
        await _leave_work_behind(pool, sdk)
    assert _orphans(sdk) != []
