"""What the doctor says of a server and a configuration, without either."""

from __future__ import annotations

import dataclasses

import pytest

from resilient_pool import profiles
from resilient_pool.cli.doctor import Facts, diagnose
from resilient_pool.config.pool_config import PoolConfig

HEALTHY = Facts(
    version=180001,
    resolves=True,
    standby=False,
    idle=None,
    connections=97,
    synchronous_commit="on",
    tls=True,
    tls_version="TLSv1.3",
    remote=True,
    may_terminate=True,
    role="shop",
    skew=0.1,
    pooler=False,
)


def findings(config: dict, **facts: object) -> dict[str, tuple[str, str, str]]:
    found = diagnose(dataclasses.replace(HEALTHY, **facts), PoolConfig.from_arguments(None, **config))
    return {finding.check: (finding.level, finding.text, finding.change) for finding in found}


def test_of_a_healthy_database_all_is_well():
    """Nothing is advised for the sake of advising, and nothing is to be changed."""
    found = [*findings({}).values(), *findings({}, may_terminate=False).values()]
    assert {(level, change) for level, _, change in found} == {("ok", "")}


@pytest.mark.parametrize(
    ("check", "facts", "config", "level", "text", "change"),
    [
        ("server version", {"version": 120005}, {}, "problem", "PostgreSQL 12", "resolve_commit=False"),
        ("server version", {"version": 140005}, {}, "advice", "tested on 16", "upgrade to PostgreSQL 16"),
        ("idle sessions", {"idle": 20.0}, {}, "advice", "idle for 20 s", "max_inactive_connection_lifetime=15"),
        ("idle sessions", {"idle": 60.0}, {}, "ok", "the default max_inactive_connection_lifetime (50)", ""),
        (
            "idle sessions",
            {"idle": 60.0},
            {"max_inactive_connection_lifetime": 30},
            "ok",
            "with max_inactive_connection_lifetime=30",
            "",
        ),
        ("pausing", {}, {}, "ok", "with the default min_size (0)", ""),
        ("keepalive", {}, {}, "ok", "with the default tcp_user_timeout (30)", ""),
        (
            "idle sessions",
            {"idle": 60.0},
            {"max_inactive_connection_lifetime": 0},
            "advice",
            "for 60 s",
            "max_inactive_connection_lifetime=55",
        ),
        ("pausing", {}, {"min_size": 2}, "advice", "min_size=2", "min_size=0"),
        (
            "pausing",
            {},
            {"max_inactive_connection_lifetime": 0},
            "advice",
            "max_inactive_connection_lifetime=0 keeps idle connections open",
            "max_inactive_connection_lifetime=50",
        ),
        ("connections", {}, {}, "ok", "enough for 9 processes with the default max_size (10)", ""),
        ("connections", {}, {"max_size": 60}, "ok", "enough for 1 process with max_size=60", ""),
        (
            "connections",
            {},
            {"max_size": 98},
            "advice",
            "fewer than one pool may open, with max_size=98",
            "max_size=97",
        ),
        ("keepalive", {}, {"tcp_user_timeout": None}, "advice", "quarter of an hour", "tcp_user_timeout=30"),
        ("keepalive", {}, {"tcp_keepalive": False}, "advice", "quarter of an hour", "tcp_keepalive=True"),
        ("pooler", {"pooler": True}, {}, "ok", "without named prepared statements", ""),
        ("pooler", {"pooler": True}, {"statement_cache_size": 100}, "problem", "another query's result", "=0"),
        ("encryption", {"tls": False}, {}, "advice", "over a network", "sslmode=verify-full"),
        ("encryption", {"tls": False, "remote": False}, {}, "ok", "same machine", ""),
        ("durability", {"synchronous_commit": "off"}, {}, "advice", "loses", "synchronous_commit=on"),
        ("permissions", {"may_terminate": False}, {}, "ok", "GRANT pg_signal_backend TO shop", ""),
        ("clock", {"skew": -7.2}, {}, "advice", "7.2 s", "NTP"),
        ("server version", {"resolves": False}, {}, "advice", "if lost, it is unknown", "unique key"),
        ("server version", {"resolves": None}, {}, "advice", "if lost, it is unknown", "unique key"),
        ("server", {"unsaid": ("idle", "clock")}, {}, "advice", "(idle, clock)", "a profile"),
        ("role", {"standby": True}, {}, "problem", "no writes", "target_session_attrs=primary"),
        ("role", {"standby": True}, {"target_session_attrs": "standby"}, "ok", "a standby", ""),
    ],
)
def test_each_finding_names_the_setting_to_change(check, facts, config, level, text, change):
    """In plain words, of the one thing that is not as it should be."""
    found = findings(config, **facts)[check]
    assert found[0] == level
    assert text in found[1]
    assert change in found[2]


NEON = "postgresql://alex@ep-cool.us-east-2.aws.neon.tech/shop"


def profile(dsn: str, **arguments: object):
    found = diagnose(HEALTHY, PoolConfig.from_arguments(dsn, **arguments))
    return next(finding for finding in found if finding.check == "profile")


def test_a_profile_that_fits_the_host_is_named_with_what_it_would_change(monkeypatch):
    """Each value beside the present one, with its reason; what the pool has anyway is left out, and nothing is applied."""
    monkeypatch.delenv("PGSSLMODE", raising=False)
    finding = profile(NEON)
    assert (finding.level, finding.change) == ("advice", "ResilientPool(dsn, **profiles.NEON)")
    assert [detail.partition(":")[0] for detail in finding.details] == [
        "may_pause=True instead of False",
        "max_inactive_connection_lifetime=240.0 instead of 50.0",
        "timeout=30.0 instead of 60.0",
        "ssl='require' instead of None",
    ]
    assert "suspended after 300 s" in finding.details[1]


def test_what_the_dsn_and_the_options_say_is_compared_with_the_profile(monkeypatch):
    """A stricter TLS mode is no difference, since the profile leaves it."""
    monkeypatch.delenv("PGSSLMODE", raising=False)
    finding = profile(f"{NEON}?sslmode=verify-full&connect_timeout=30", may_pause=True)
    assert [detail.partition("=")[0] for detail in finding.details] == ["max_inactive_connection_lifetime"]
    finding = profile(NEON, **profiles.NEON)
    assert (finding.level, finding.details, finding.change) == ("ok", (), "")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert "ssl" not in str(profile(NEON))


def test_of_a_host_that_is_not_known_no_profile_is_named(monkeypatch):
    """Which is no reason for advice."""
    monkeypatch.delenv("AWS_LAMBDA_FUNCTION_NAME", raising=False)
    finding = profile("postgresql://shop@db.example.com/shop")
    assert (finding.level, finding.details, finding.change) == ("ok", (), "")


def test_behind_a_pooler_the_servers_own_limit_says_nothing():
    """It lets in as many clients as it likes."""
    assert "connections" not in findings({"max_size": 500}, pooler=True)


def test_of_what_the_server_does_not_say_nothing_is_found():
    """Neither that all is well nor that it is not."""
    unsaid = (
        "version",
        "resolves",
        "standby",
        "idle",
        "connections",
        "synchronous_commit",
        "tls",
        "remote",
        "may_terminate",
        "role",
    )
    facts = {**dict.fromkeys(unsaid), "tls_version": None, "skew": None}
    assert findings({}, **facts, unsaid=(*unsaid, "clock")).keys() == {
        *("profile", "server", "pausing", "keepalive", "pooler")
    }
