"""Prometheus: what a registry is handed of pools' statistics, and that the dashboard asks for nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilient_pool.contrib.prometheus import PoolCollector
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import DiscardReason
from resilient_pool.observability.stats import WAIT_BOUNDS, Counters, PoolStats
from resilient_pool.retry.verdict import Fault

DASHBOARD = json.loads((Path(__file__).parents[3] / "examples" / "grafana-dashboard.json").read_text())
NOW = ("size", "idle", "in_use", "resetting", "waiting", "min_size", "max_size", "circuit_open")


def stats(**changes):
    now = dict.fromkeys(NOW, 0)
    return dataclasses.replace(Counters().snapshot(**now), **changes)


def collected(**pools):
    """Read what a scrape says, as sample values by name and labels."""
    registry = CollectorRegistry()
    registry.register(PoolCollector({name: SimpleNamespace(stats=lambda s=s: s) for name, s in pools.items()}))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("kind", [list, tuple])
def test_pools_without_names_are_refused_at_once(kind):
    """Not at the first scrape, where the error would stand in a web server's log."""
    with pytest.raises(ConfigurationError, match=r'pools by name, as in \{"orders": pool\}, not'):
        PoolCollector(kind([SimpleNamespace(stats=stats)]))


@pytest.mark.parametrize(
    "name",
    [field.name for field in dataclasses.fields(PoolStats) if field.name not in {"size", "wait_histogram", "waits"}],
)
def test_every_number_of_the_statistics_is_exported(name):
    """None is left out; the size is the sum over the states, and the waits are the histogram's count."""
    value = {"discarded": {DiscardReason.STALE: 7}, "retries": {Fault.STALE: 7}, "outcomes_resolved": {"aborted": 7}}
    samples = collected(orders=stats(**{name: value.get(name, 7)}))
    assert [sample for sample, number in samples.items() if number == 7] != []


def test_pools_are_told_apart_by_their_names():
    """Each sample has the label `pool`."""
    samples = collected(orders=stats(acquired=3), stock=stats(acquired=4))
    name = "resilient_pool_acquired_total"
    assert [samples[name, f"pool={pool}"] for pool in ("orders", "stock")] == [3, 4]
    assert all(any(label.startswith("pool=") for label in sample[1:]) for sample in samples)


def test_what_never_happened_is_zero():
    """So an increase from nothing to one is seen: every reason, fault and answer is there from the beginning."""
    samples = collected(orders=stats())
    assert samples["resilient_pool_discarded_total", "pool=orders", "reason=stale"] == 0
    assert len([sample for sample in samples if sample[0] == "resilient_pool_retries_total"]) == len(Fault)
    assert {number for sample, number in samples.items() if sample[0].endswith("_total")} == {0}


def test_the_histogram_is_cumulative_and_adds_up():
    """Each bucket has all waits up to its bound, and the last one all."""
    samples = collected(orders=stats(wait_histogram={0.005: 2, 1.0: 3, WAIT_BOUNDS[-1]: 1}, wait_seconds=70.0))
    buckets = [number for sample, number in samples.items() if sample[0] == "resilient_pool_wait_seconds_bucket"]
    assert len(buckets) == len(WAIT_BOUNDS)
    assert (buckets[0], buckets[1], buckets[-2], buckets[-1]) == (0, 2, 5, 6)
    assert buckets == sorted(buckets)
    assert samples["resilient_pool_wait_seconds_count", "pool=orders"] == 6
    assert samples["resilient_pool_wait_seconds_sum", "pool=orders"] == 70.0


def test_a_pool_that_is_added_later_is_collected():
    """The mapping is read at each scrape."""
    pools, registry = {}, CollectorRegistry()
    registry.register(PoolCollector(pools))
    pools["orders"] = SimpleNamespace(stats=lambda: stats(acquired=5))
    assert registry.get_sample_value("resilient_pool_acquired_total", {"pool": "orders"}) == 5


def test_two_collectors_in_one_registry_are_refused():
    """One collector takes all pools: the same names twice would be two answers to one question."""
    registry = CollectorRegistry()
    registry.register(PoolCollector({}))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(PoolCollector({}))


# The dashboard


def expressions():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_only_for_metrics_that_there_are():
    """Every metric of every expression, and of the variable, is in the collector's output."""
    exported = {sample[0] for sample in collected(orders=stats())}
    queries = [*expressions(), DASHBOARD["templating"]["list"][1]["definition"]]
    asked = {name for query in queries for name in re.findall(r"resilient_pool_\w+", query)}
    assert asked <= exported
    assert len(asked) > 20


def test_the_dashboard_shows_every_metric():
    """None but the pooler's, which does not change, is exported without being looked at."""
    exported = {re.sub("_(sum|bucket|count)$", "", sample[0]) for sample in collected(orders=stats())}
    asked = {
        re.sub("_(bucket|count)$", "", name)
        for text in expressions()
        for name in re.findall(r"resilient_pool_\w+", text)
    }
    assert exported - asked == {"resilient_pool_pooler"}


def test_the_dashboard_has_what_grafana_requires():
    """The classic schema's fields; panels that have a place of their own; a data source that is chosen, and not ours."""
    assert DASHBOARD["id"] is None
    assert {
        "uid",
        "title",
        "schemaVersion",
        "version",
        "time",
        "templating",
        "annotations",
        "panels",
    } <= DASHBOARD.keys()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert {"id", "type", "title", "gridPos", "datasource", "fieldConfig", "options", "targets"} <= panel.keys()
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))
