"""Ready-made arguments, and the warning of what would keep a pausing database awake."""

from __future__ import annotations

import warnings

import pytest

from resilient_pool import ResilientPool, profiles
from resilient_pool.config.pool_config import PoolConfig

DSN = "postgresql://shop@localhost/shop"


def test_the_profiles_say_what_they_are_documented_to():
    """A pausing database is let sleep and waited for; a function has one connection."""
    config = PoolConfig.from_arguments(DSN, **profiles.AURORA_SERVERLESS)
    assert (config.may_pause, config.min_size, config.max_size) == (True, 0, 10)
    assert (config.timeout, config.deadline, config.max_inactive_connection_lifetime) == (30, 60, 50)
    config = PoolConfig.from_arguments(DSN, **profiles.LAMBDA)
    assert (config.may_pause, config.min_size, config.max_size) == (False, 0, 1)
    assert (config.timeout, config.max_inactive_connection_lifetime) == (30, 50)


def test_profiles_are_merged_with_each_other_and_with_changes():
    """In the order in which they stand."""
    both = PoolConfig.from_arguments(DSN, **(profiles.AURORA_SERVERLESS | profiles.LAMBDA | {"max_size": 2}))
    assert (both.may_pause, both.max_size) == (True, 2)


def test_a_profile_cannot_be_changed_for_everybody():
    """It is shared by all who import it."""
    with pytest.raises(TypeError):
        profiles.LAMBDA["max_size"] = 2


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
    assert [(str(warning.message), warning.filename) for warning in caught] == [(reason, __file__)]


@pytest.mark.parametrize("arguments", [profiles.AURORA_SERVERLESS, profiles.LAMBDA, {"min_size": 2}])
def test_nothing_is_warned_of_otherwise(arguments):
    """Neither the profiles as they are nor a database that does not pause."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ResilientPool(DSN, **arguments)
