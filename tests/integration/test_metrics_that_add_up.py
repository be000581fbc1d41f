"""Under load, with faults: what OpenTelemetry and Prometheus say agrees with itself, with each other and with the calls made."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import shutil
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, start_http_server
from waiting import eventually

from resilient_pool import ResilientPool
from resilient_pool.contrib.opentelemetry import PoolTelemetry
from resilient_pool.contrib.prometheus import PoolCollector
from resilient_pool.events import CallerWaited

WORKERS = 24
SECONDS = 3.0
DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana-dashboard.json"


class Meters:
    """Both collectors on one pool, and an observer of the test's own."""

    def __init__(self):
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.registry = CollectorRegistry()
        self.pools = {}
        self.registry.register(PoolCollector(self.pools))
        self.observer = PoolTelemetry(meter_provider=self.provider).observer("main")
        self.waits = []

    def note(self, event):
        if isinstance(event, CallerWaited):
            self.waits.append(event.elapsed)

    def prometheus(self, name, **labels):
        return self.registry.get_sample_value(f"resilient_pool_{name}", {"pool": "main", **labels})

    def prometheus_total(self, name):
        families = self.registry.collect()
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def points(self, name):
        metrics = self.reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
        return [point for metric in metrics if metric.name == name for point in metric.data.data_points]

    def collect(self):
        """Do as a scrape and a periodic reader do, in a thread of their own."""
        list(self.registry.collect())
        self.reader.get_metrics_data()


@pytest.fixture
def meters():
    meters = Meters()
    yield meters
    meters.provider.shutdown()


async def _work(pool, chance, goes_on):
    while goes_on():
        with contextlib.suppress(Exception):
            match chance.randrange(6):
                case 0:
                    await pool.fetchval("SELECT 1")
                case 1:
                    await pool.execute("SET application_name = 'busy'")
                case 2:
                    async with pool.acquire(timeout=0.2) as connection:
                        await connection.fetchval("SELECT pg_sleep(0.01)")
                case 3:
                    async for attempt in pool.transaction():
                        async with attempt as connection:
                            await connection.execute("INSERT INTO counted VALUES (1)")
                case 4:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.005):
                            await pool.fetchval("SELECT pg_sleep(0.01)")
                case 5:
                    await pool.fetchval("SELECT 1", deadline=0.05)


async def _mistreat(proxy, chance, goes_on, *, meters):
    loop = asyncio.get_running_loop()
    faults = [proxy.rst, proxy.fin, proxy.lose_next_request, proxy.swallow_next_answer]
    with ThreadPoolExecutor(1) as thread:
        await asyncio.to_thread(proxy.refuse)  # one outage in any case
        await asyncio.to_thread(proxy.rst)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(proxy.accept)
        while goes_on():
            await asyncio.to_thread(chance.choice(faults))
            await asyncio.sleep(chance.uniform(0.02, 0.15))
            await loop.run_in_executor(thread, meters.collect)


async def test_metrics_add_up_under_load_with_faults(proxy, dsn, meters):
    """Uses begun are uses ended, waits are the sum of their histogram, and both systems count the same."""
    chance = random.Random(7)
    until = asyncio.get_running_loop().time() + SECONDS
    observers = [meters.observer, meters.note]
    async with ResilientPool(proxy.dsn(dsn), max_size=6, deadline=5.0, observers=observers) as pool:
        meters.pools["main"] = pool

        def goes_on():
            stats = pool.stats()
            met = min(stats.waits, stats.wait_timeouts, stats.retries_total, stats.circuit_openings)
            return asyncio.get_running_loop().time() < until or stats.acquired <= 200 or not met

        await pool.execute("CREATE TABLE IF NOT EXISTS counted (id int)")
        async with asyncio.timeout(60):
            await asyncio.gather(
                _mistreat(proxy, chance, goes_on, meters=meters),
                *(_work(pool, chance, goes_on) for _ in range(WORKERS)),
            )
            await pool.execute("DROP TABLE counted")
            while pool.stats().resetting or pool.stats().in_use:
                await asyncio.sleep(0.01)
        stats = pool.stats()
        _assert_that_they_add_up(meters, stats)


def _assert_that_they_add_up(meters, stats):
    assert stats.acquired > 200
    assert min(stats.waits, stats.wait_timeouts, stats.retries_total, stats.circuit_openings) > 0
    # Uses
    (uses,) = meters.points("db.client.connection.use_time")
    assert uses.count == stats.acquired == meters.prometheus("acquired_total")
    assert {point.value for point in meters.points("resilient_pool.acquired")} == {stats.acquired}
    # Waits
    (waits,) = meters.points("db.client.connection.wait_time")
    assert waits.count == stats.waits == sum(stats.wait_histogram.values()) == len(meters.waits)
    assert waits.sum == pytest.approx(stats.wait_seconds)
    assert sum(meters.waits) == pytest.approx(meters.prometheus("wait_seconds_sum"))
    assert meters.prometheus("wait_seconds_count") == meters.prometheus("wait_seconds_bucket", le="+Inf") == stats.waits
    ours = [stats.wait_histogram.get(bound, 0) for bound in waits.explicit_bounds]
    assert list(waits.bucket_counts[:-1]) == ours
    # Connections
    (opened,) = meters.points("db.client.connection.create_time")
    assert opened.count == stats.size + stats.discarded_total
    assert sum(point.value for point in meters.points("db.client.connection.count")) == stats.size
    assert meters.prometheus_total("resilient_pool_connections") == stats.size
    assert meters.prometheus_total("resilient_pool_discarded_total") == stats.discarded_total
    # Retries, outages
    assert sum(point.value for point in meters.points("resilient_pool.retries")) == stats.retries_total
    assert meters.prometheus_total("resilient_pool_retries_total") == stats.retries_total
    (outages,) = meters.points("resilient_pool.circuit.open_time")
    assert outages.count == stats.circuit_openings == meters.prometheus("circuit_openings_total")
    assert outages.sum == pytest.approx(meters.prometheus("circuit_open_seconds_total"))


@pytest.mark.needs("prometheus")
async def test_prometheus_itself_answers_every_question_of_the_dashboard(dsn, meters, tmp_path):
    """It scrapes a pool, and no expression is refused or empty."""
    text = DASHBOARD.read_text()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=meters.registry)
    async with ResilientPool(dsn, max_size=1) as pool, _prometheus(tmp_path, server.server_port) as ask:
        meters.pools["main"] = pool
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(ask, "rate(resilient_pool_acquired_total[2s]) > 0"):
                await asyncio.gather(*(pool.execute("SET work_mem = '4MB'") for _ in range(5)))
        unanswered = [
            target["expr"].replace("$pool", ".*").replace("$__rate_interval", "5s").replace("$__range", "5s")
            for panel in json.loads(text)["panels"]
            for target in panel["targets"]
        ]

        async def all_are_answered():  # a scrape that came too late leaves a gap
            unanswered[:] = [question for question in unanswered if not await asyncio.to_thread(ask, question)]
            return not unanswered

        with contextlib.suppress(TimeoutError):
            await eventually(all_are_answered)
        assert unanswered == []
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.asynccontextmanager
async def _prometheus(folder, port):
    """Run a Prometheus that scrapes a port five times a second, and give a function that asks it."""
    configuration = folder / "prometheus.yml"
    configuration.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"scrape_configs: [{{job_name: pool, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            shutil.which("prometheus"),
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            stdout=output,
            stderr=output,
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(question):
        (port,) = re.findall(r'"Listening on".* address=127\.0\.0\.1:(\d+)', log.read_text())
        query = urllib.parse.urlencode({"query": question})
        with opener.open(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=5) as answer:
            return json.load(answer)["data"]["result"]

    try:
        async with asyncio.timeout(20):
            while "Server is ready" not in log.read_text():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        yield ask
    finally:
        process.kill()
        await process.wait()
