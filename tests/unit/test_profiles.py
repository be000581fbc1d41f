"""Ready-made arguments: what each promises, which one fits a host name, and the warning of what would keep a pausing database awake."""

from __future__ import annotations

import string
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as some

from resilient_pool import ConfigurationError, ResilientPool, profiles
from resilient_pool.config.arguments import PoolArguments, ProfileArguments
from resilient_pool.config.pool_config import ARGUMENTS, PoolConfig

DSN = "postgresql://shop@localhost/shop"
NAMES = sorted(profiles.EXPLAINED)
NAMED = (
    "NEON NEON_POOLED SUPABASE_SESSION SUPABASE_TRANSACTION RDS_PROXY AURORA AURORA_SERVERLESS AURORA_DSQL COCKROACHDB "
    "PGBOUNCER PGDOG AZURE CLOUD_SQL_POOLED PLANETSCALE PRISMA_POSTGRES LAMBDA"
)
POOLED = ("NEON_POOLED", "SUPABASE_TRANSACTION", "PGBOUNCER", "PGDOG", "CLOUD_SQL_POOLED")


def config_of(name, dsn=DSN, **changes):
    return PoolConfig.from_arguments(dsn, **(getattr(profiles, name) | changes))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for variable in ("PGHOST", "PGPORT", "PGSSLMODE", "PGSSLROOTCERT", "AWS_LAMBDA_FUNCTION_NAME"):
        monkeypatch.delenv(variable, raising=False)


# What they promise


def test_there_is_one_for_each_service():
    """Each constant is the arguments of the profile of its name."""
    assert sorted(NAMED.split()) == NAMES
    for name, profile in profiles.EXPLAINED.items():
        assert profile.name == name
        assert dict(getattr(profiles, name)) == {key: choice.value for key, choice in profile.choices.items()}


@pytest.mark.parametrize("name", NAMES)
def test_each_value_is_an_argument_with_a_reason_and_a_source(name):
    """And a pool can be made with all of them, and with nothing else."""
    profile = profiles.EXPLAINED[name]
    assert profile.choices.keys() <= {argument.name for argument in ARGUMENTS}
    for choice in profile.choices.values():
        assert choice.reason
        assert choice.source
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ResilientPool(DSN, **getattr(profiles, name))


@pytest.mark.parametrize("name", NAMES)
def test_connections_are_given_up_before_the_service_cuts_them(name):
    """With a margin: what is idle after at most 90 % of the time, what is old after 95 %; and idle ones are given up at all."""
    profile, config = profiles.EXPLAINED[name], config_of(name)
    assert config.max_inactive_connection_lifetime > 0
    if profile.idle_cut is not None:
        assert config.max_inactive_connection_lifetime <= 0.9 * profile.idle_cut
    if profile.age_cut is not None:
        assert 0 < config.max_lifetime <= 0.95 * profile.age_cut


@pytest.mark.parametrize("name", NAMES)
def test_an_attempt_to_connect_outlasts_the_time_for_which_the_service_may_hold_it(name):
    """So that what it says at the end is heard."""
    profile = profiles.EXPLAINED[name]
    assert profile.holds is None or config_of(name).timeout > profile.holds


@pytest.mark.parametrize("name", NAMES)
def test_a_caller_waits_at_least_as_long_as_one_attempt_to_connect(name):
    """Or what the service says at the end of its own patience would never be seen."""
    config = config_of(name)
    assert config.deadline is None or config.deadline >= config.timeout


@pytest.mark.parametrize("name", POOLED)
def test_a_pooler_in_transaction_mode_is_sent_no_reset_after_a_call(name):
    """And named statements only where the pooler follows them."""
    config = config_of(name)
    assert config.session_reset == "off"
    assert config.statement_cache_size == (100 if name == "PGDOG" else 0)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(POOLED)))
def test_where_a_session_outlives_a_transaction_it_is_reset(name):
    """Otherwise one caller's settings would be the next caller's."""
    assert config_of(name).session_reset == "auto"


def test_the_first_profiles_are_as_they_were():
    """A pausing database is let sleep and waited for; a function has one connection."""
    config = config_of("AURORA_SERVERLESS")
    assert (config.may_pause, config.min_size, config.max_size) == (True, 0, 10)
    assert (config.timeout, config.deadline, config.max_inactive_connection_lifetime) == (30, 60, 50)
    config = config_of("LAMBDA")
    assert (config.may_pause, config.min_size, config.max_size) == (False, 0, 1)
    assert (config.timeout, config.max_inactive_connection_lifetime) == (30, 50)


# How they are used


def test_profiles_are_merged_with_each_other_and_with_changes():
    """In the order in which they stand."""
    both = PoolConfig.from_arguments(DSN, **(profiles.AURORA_SERVERLESS | profiles.LAMBDA | {"max_size": 2}))
    assert (both.may_pause, both.max_size) == (True, 2)


def test_an_argument_beside_a_profile_that_has_it_is_pythons_own_error():
    """Not a silent choice between the two: they are merged by `|`."""
    with pytest.raises(TypeError, match="multiple values for keyword argument 'timeout'"):
        ResilientPool(DSN, **profiles.NEON, timeout=5)
    assert ResilientPool(DSN, **(profiles.NEON | {"timeout": 5}))._config.timeout == 5


def test_a_profile_wins_over_the_dsn_and_a_change_over_both():
    """As every argument does; what a profile does not name is the DSN's."""
    dsn = f"{DSN}?connect_timeout=7&statement_cache_size=9&connection_limit=3"
    config = config_of("PGBOUNCER", dsn)
    assert (config.timeout, config.statement_cache_size, config.max_size) == (20, 0, 3)
    assert config_of("PGBOUNCER", dsn, statement_cache_size=100).statement_cache_size == 100


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ("", {}, "require"),
        ("?sslmode=verify-full", {}, "verify-full"),
        ("?sslmode=verify-ca", {}, "verify-ca"),
        ("?sslmode=disable", {}, "disable"),
        ("?sslrootcert=system", {}, "verify-full"),
        ("?sslrootcert=/ca.pem", {}, "require"),
        ("?sslrootcert=system&sslmode=verify-full", {}, "verify-full"),
        ("", {"PGSSLMODE": "verify-full"}, None),  # which the driver reads
        ("", {"PGSSLROOTCERT": "system"}, "verify-full"),
        ("?sslmode=verify-ca", {"PGSSLMODE": "prefer"}, "verify-ca"),
    ],
)
def test_no_profile_weakens_what_is_said_of_tls(monkeypatch, options, environment, expected):
    """Its `ssl` applies where neither the DSN nor the environment has a word about it."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    config = config_of("NEON", DSN + options)
    assert config.ssl == expected
    assert config_of("NEON", DSN + options, ssl="verify-full").ssl == "verify-full"


def test_a_service_file_is_heard_of_tls_too(monkeypatch, tmp_path):
    """It says less than the DSN and more than a profile."""
    (tmp_path / "services").write_text("[shop]\nhost=localhost\nsslmode=verify-full\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert PoolConfig.from_arguments(None, service="shop", **profiles.NEON).ssl == "verify-full"
    assert PoolConfig.from_arguments("postgresql://?service=shop&sslmode=verify-ca", **profiles.NEON).ssl == "verify-ca"


def test_for_a_type_checker_a_profile_holds_what_some_profile_holds_and_no_more():
    """So that everything else may stand beside it, with the same types."""
    held = {argument for profile in profiles.EXPLAINED.values() for argument in profile.choices}
    assert ProfileArguments.__annotations__.keys() == held
    assert ProfileArguments.__annotations__.items() <= PoolArguments.__annotations__.items()


def test_a_profile_cannot_be_changed_for_everybody():
    """It is shared by all who import it."""
    with pytest.raises(TypeError):
        profiles.LAMBDA["max_size"] = 2
    with pytest.raises(TypeError):
        profiles.EXPLAINED["NEON"].choices["max_size"] = 2
    with pytest.raises(TypeError):
        profiles.EXPLAINED["OURS"] = None


# Which one fits


@pytest.mark.parametrize(
    ("expected", "dsn"),
    [
        ("NEON", "postgresql://alex:pw@ep-cool-darkness-123456.us-east-2.aws.neon.tech/shop?sslmode=require"),
        ("NEON_POOLED", "postgresql://alex:pw@ep-cool-darkness-123456-pooler.us-east-2.aws.neon.tech/shop"),
        ("NEON_POOLED", "postgresql://alex:pw@EP-COOL-POOLER.us-east-2.aws.NEON.tech./shop"),
        ("NEON", "postgresql+asyncpg://alex:pw@ep-cool.eu-central-1.aws.neon.tech:5432/shop?channel_binding=require"),
        ("SUPABASE_SESSION", "postgres://postgres.ref:pw@aws-0-eu-west-1.pooler.supabase.com:5432/postgres"),
        ("SUPABASE_SESSION", "postgres://postgres.ref:pw@aws-0-eu-west-1.pooler.supabase.com/postgres"),
        ("SUPABASE_TRANSACTION", "postgres://postgres.ref:pw@aws-0-eu-west-1.pooler.supabase.com:6543/postgres"),
        ("SUPABASE_TRANSACTION", "postgres://postgres:pw@db.abcdef.supabase.co:6543/postgres"),
        (None, "postgres://postgres:pw@db.abcdef.supabase.co:5432/postgres"),
        ("RDS_PROXY", "postgresql://shop@shop.proxy-abc123.eu-central-1.rds.amazonaws.com/shop"),
        ("RDS_PROXY", "postgresql://shop@ro.endpoint.proxy-abc123.cn-north-1.rds.amazonaws.com.cn/shop"),
        ("AURORA", "postgresql://shop@shop.cluster-abc123.eu-central-1.rds.amazonaws.com/shop"),
        ("AURORA", "postgresql://shop@shop.cluster-ro-abc123.eu-central-1.rds.amazonaws.com/shop"),
        ("AURORA", "postgresql://shop@shop.cluster-custom-abc123.eu-central-1.rds.amazonaws.com/shop"),
        ("AURORA", "postgresql://shop@shop.global-abc123.global.rds.amazonaws.com/shop"),
        (None, "postgresql://shop@shop.abc123.eu-central-1.rds.amazonaws.com/shop"),
        ("AURORA_DSQL", "postgresql://admin@abcdefghijklmnop.dsql.us-east-1.on.aws/postgres"),
        ("AURORA_DSQL", "postgresql://admin@abcdefghijklmnop.dsql-fnh4.us-east-1.on.aws/postgres"),
        ("COCKROACHDB", "postgresql://shop:pw@shop-1234.7tt.aws-eu-central-1.cockroachlabs.cloud:26257/defaultdb"),
        ("COCKROACHDB", "postgresql://root@localhost:26257/defaultdb?sslmode=disable"),
        ("AZURE", "postgresql://shop:pw@shop.postgres.database.azure.com:5432/postgres"),
        ("PGBOUNCER", "postgresql://shop:pw@shop.postgres.database.azure.com:6432/postgres"),
        ("CLOUD_SQL_POOLED", "postgresql://shop@1a23.4b56.europe-west1.sql.goog:6432/postgres"),
        ("CLOUD_SQL_POOLED", "postgresql://shop@1a23.4b56.europe-west1.alloydb-psc.goog:6432/postgres"),
        (None, "postgresql://shop@1a23.4b56.europe-west1.sql.goog:5432/postgres"),
        ("PLANETSCALE", "postgresql://postgres.x:pw@eu-central-1.pg.psdb.cloud:6432/postgres"),
        ("PRISMA_POSTGRES", "postgres://key:pw@pooled.db.prisma.io:5432/?sslmode=require"),
        ("PRISMA_POSTGRES", "postgres://key:pw@db.prisma.io:5432/?sslmode=require"),
        (None, DSN),
        (None, "postgresql://shop@neon.tech.example.com/shop"),
        (None, "postgresql://shop@evilneon.tech/shop"),
        (None, "postgresql://neon.tech@example.com/shop"),
        # Not only where a URL has its host.
        ("NEON", "postgresql:///shop?host=ep-cool.us-east-2.aws.neon.tech&user=alex"),
        ("SUPABASE_TRANSACTION", "postgresql:///shop?host=a.pooler.supabase.com&port=6543"),
        ("SUPABASE_TRANSACTION", "postgresql://a.pooler.supabase.com/shop?port=6543"),
        ("SUPABASE_TRANSACTION", "host=a.pooler.supabase.com port=6543 password='x y'"),
        # Several hosts are one service's, or none.
        ("COCKROACHDB", "postgresql://root@one:26257,two:26257/defaultdb"),
        (None, "postgresql://root@one:26257,two:5432/defaultdb"),
        (None, "postgresql://u@ep-a.x.aws.neon.tech,example.com/shop"),
        # A password that ends a URL's parts, and what else the pool would refuse.
        ("NEON", "postgresql://alex:a/b?c#d@ep-cool.us-east-2.aws.neon.tech/shop"),
        ("NEON", "postgresql://alex:pw@ep-cool.us-east-2.aws.neon.tech/shop?application_name=me@home"),
        ("NEON", "jdbc:postgresql://ep-cool.us-east-2.aws.neon.tech/shop?user=alex"),
        ("NEON", "  postgresql://ep-cool.us-east-2.aws.neon.tech\n"),
        (None, "postgresql://[fe80::1%25eth0]:5432/shop"),
        (None, "postgresql://shop@[::1/shop"),
        (None, "postgresql://shop@host:port/shop"),
        (None, "ep-cool.us-east-2.aws.neon.tech"),
        (None, "://@:,"),
        (None, ""),
        (None, None),
    ],
)
def test_a_host_name_says_which_profile_fits(expected, dsn):
    """By its end, its first part and its port; of what is not known nothing is said."""
    assert profiles.suggest(dsn) == expected


@given(some.text(alphabet=string.printable) | some.text())
def test_nothing_makes_a_suggestion_fail(text):
    """Also a text that is no DSN."""
    assert profiles.suggest(text) in {None, *NAMES}
    assert profiles.suggest(f"postgresql://u:{text}@ep-a.us-east-2.aws.neon.tech/d") in {None, *NAMES}


def test_without_a_host_the_environment_is_asked(monkeypatch):
    """As the pool does; also for a DSN that names none."""
    monkeypatch.setenv("PGHOST", "a.pooler.supabase.com")
    assert profiles.suggest() == profiles.suggest("postgresql:///shop") == "SUPABASE_SESSION"
    monkeypatch.setenv("PGPORT", "6543")
    assert profiles.suggest() == "SUPABASE_TRANSACTION"
    assert profiles.suggest("postgresql://u@ep-a.us-east-2.aws.neon.tech/shop") == "NEON"


def test_in_a_function_of_lambda_that_is_what_is_left(monkeypatch):
    """A service that is known comes first; both can be merged."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "shop")
    assert profiles.suggest(DSN) == "LAMBDA"
    assert profiles.suggest("postgresql://u@ep-a.us-east-2.aws.neon.tech/shop") == "NEON"
    both = PoolConfig.from_arguments(DSN, **(profiles.NEON | profiles.LAMBDA))
    assert (both.max_size, both.max_inactive_connection_lifetime, both.may_pause) == (1, 50, True)


def test_a_suggestion_shows_nothing_of_the_dsn():
    """It is the name of a constant, whatever stood there."""
    for password in ("hunter2", "NEON", "a@b"):
        assert profiles.suggest(f"postgresql://u:{password}@ep-a.us-east-2.aws.neon.tech/shop") == "NEON"
        assert profiles.suggest(f"postgresql://u:{password}@example.com/shop") is None


# What keeps a pausing database awake


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"min_size": 2}, "the database will not pause: min_size=2 keeps connections open for ever; use min_size=0"),
        (
            {"max_inactive_connection_lifetime": 0},
            "the database will not pause: max_inactive_connection_lifetime=0 never closes a connection; use 50",
        ),
    ],
)
def test_what_would_keep_a_pausing_database_awake_is_warned_of_once(arguments, reason):
    """With the reason and what to do, at the line that makes the pool."""
    with pytest.warns(UserWarning, match="will not pause") as caught:
        ResilientPool(DSN, **(profiles.AURORA_SERVERLESS | arguments))
    assert [(str(warning.message), warning.filename) for warning in caught] == [
        (f"{reason}; see docs/symptoms.md#will-not-pause", __file__)
    ]


def test_nothing_is_warned_of_otherwise():
    """A database that does not pause may be kept awake."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ResilientPool(DSN, min_size=2)


def test_a_value_that_is_no_argument_is_refused_as_ever():
    """A profile of the application's own is merged in the same way, and checked."""
    with pytest.raises(ConfigurationError, match="did you mean 'timeout'"):
        ResilientPool(DSN, **(profiles.NEON | {"timeuot": 3}))
