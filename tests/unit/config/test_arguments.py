"""What a type checker accepts is what the constructor accepts."""

from __future__ import annotations

import inspect

import pytest

from resilient_pool import ConfigurationError, ResilientPool, create_pool
from resilient_pool.config.arguments import TypedPoolArguments
from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.pool import Invocation


def test_the_typed_arguments_are_those_of_the_configuration():
    """An argument added in one place and forgotten in the other is found here."""
    assert set(TypedPoolArguments.__annotations__) - {"dsn"} == {argument.name for argument in ARGUMENTS}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: pool.acquire(timout=1), "unknown argument 'timout' of acquire(); did you mean 'timeout'?"),
        (lambda pool: pool.release(None, tmeout=1), "unknown argument 'tmeout' of release(); did you mean 'timeout'?"),
        (lambda pool: pool.transaction(isolaton=1), "unknown argument 'isolaton' of transaction(); did you mean "),
        (
            lambda pool: pool.invocation(dedline=1),
            "unknown argument 'dedline' of invocation(); did you mean 'deadline'?",
        ),
        (lambda pool: pool.set_connect_args(hots="h"), "unknown argument 'hots'; did you mean 'host'?"),
        (lambda _: ResilientPool(max_sise=1), "unknown argument 'max_sise'; did you mean 'max_size'?"),
        (lambda _: create_pool(max_sise=1), "unknown argument 'max_sise'; did you mean 'max_size'?"),
    ],
)
def test_a_misspelt_argument_is_a_type_error_that_names_the_nearest_known(call, message):
    """As Python says it of any function, and a ConfigurationError, as everything that is wrong with an argument."""
    with pytest.raises(TypeError) as caught:
        _begin(call(ResilientPool()))
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ConfigurationError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, True, "5"])
def test_a_time_that_is_no_number_of_seconds_is_refused_wherever_one_is_taken(value):
    """At once, and not when it is first needed."""
    pool = ResilientPool()
    with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds or None, at least 0"):
        pool.acquire(timeout=value)
    with pytest.raises(ConfigurationError, match=r"^deadline must be a number of seconds or None, at least 0"):
        Invocation(pool._circuit_breaker, pool._maintenance, pool._clock, value)


def _begin(call: object) -> None:
    if inspect.iscoroutine(call):
        call.send(None)


CALLS = {
    "fetch": ("SELECT 1",),
    "fetchrow": ("SELECT 1",),
    "fetchval": ("SELECT 1",),
    "execute": ("SELECT 1",),
    "executemany": ("SELECT 1", []),
    "fetchmany": ("SELECT 1", []),
}


@pytest.mark.parametrize(("name", "arguments"), CALLS.items(), ids=CALLS)
async def test_a_misspelt_argument_of_a_query_names_the_nearest_known(name, arguments):
    """Before anything is asked of the server."""
    message = f"unknown argument 'deadlin' of {name}(); did you mean 'deadline'?"
    with pytest.raises(TypeError) as caught:
        await getattr(ResilientPool(), name)(*arguments, deadlin=1)
    assert str(caught.value) == message
    with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds or None, at least 0, not nan$"):
        await getattr(ResilientPool(), name)(*arguments, timeout=float("nan"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("copy_from_table", {"table_name": "t", "output": "o"}),
        ("copy_from_query", {"query": "SELECT 1", "output": "o"}),
        ("copy_to_table", {"table_name": "t", "source": "s"}),
        ("copy_records_to_table", {"table_name": "t", "records": []}),
    ],
)
async def test_a_misspelt_option_of_a_copy_names_the_nearest_known(name, arguments):
    """COPY's own options and those of the call."""
    with pytest.raises(
        TypeError, match=rf"unknown argument 'schema_nam' of {name}|unknown argument 'delimitr' of {name}"
    ):
        await getattr(ResilientPool(), name)(**arguments, **{"delimitr" if "query" in arguments else "schema_nam": 1})
