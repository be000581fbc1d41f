from __future__ import annotations

import inspect
import traceback
from unittest.mock import AsyncMock, create_autospec

import pytest

from resilient_pool import PostgresClassifier, ResilientConnection, ResilientPool, StructlogObserver, Verdict
from resilient_pool._validation import names_nearest, require_seconds
from resilient_pool.errors import ConfigurationError, UnknownArgumentError
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.decision import RetryBudget
from resilient_pool.testing import EmbeddedPostgres, FaultProxy, PausingServer
from resilient_pool.testing.clock import ScriptedClock


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        (
            BackoffPolicy,
            "max_atempts",
            "unknown argument 'max_atempts' of BackoffPolicy(); did you mean 'max_attempts'?",
        ),
        (RetryBudget, "ratios", "unknown argument 'ratios' of RetryBudget(); did you mean 'ratio'?"),
        (StructlogObserver, "loger", "unknown argument 'loger' of StructlogObserver(); did you mean 'logger'?"),
        (EmbeddedPostgres, "setting", "unknown argument 'setting' of EmbeddedPostgres(); did you mean 'settings'?"),
        (FaultProxy, "lsten_port", "unknown argument 'lsten_port' of FaultProxy(); did you mean 'listen_port'?"),
        (PausingServer, "pauseafter", "unknown argument 'pauseafter' of PausingServer(); did you mean 'pause_after'?"),
        (PostgresClassifier, "unwrp", "unknown argument 'unwrp' of PostgresClassifier(); did you mean 'unwrap'?"),
        (Verdict, "falt", "unknown argument 'falt' of Verdict(); did you mean 'fault'?"),
        (ScriptedClock, "zzz", "unknown argument 'zzz' of ScriptedClock()"),
    ],
)
def test_a_misspelt_argument_of_any_constructor_is_answered_with_the_nearest_known(kind, argument, message):
    """It is a TypeError, as Python has it, and a ConfigurationError."""
    with pytest.raises(TypeError) as caught:
        kind(**{argument: 1})
    assert isinstance(caught.value, UnknownArgumentError | ConfigurationError)
    assert str(caught.value) == message


def test_what_stood_under_a_misspelt_name_is_not_shown():
    """Not in the message, and not by a report that shows local variables."""

    @names_nearest
    def connect(*, password: str = "") -> None:
        pass

    with pytest.raises(UnknownArgumentError, match="did you mean 'password'") as caught:
        connect(passwrod="hunter2")  # type: ignore[call-arg]
    ours = caught.value.__traceback__.tb_next
    shown = traceback.TracebackException(type(caught.value), caught.value, ours, capture_locals=True).format()
    assert "hunter2" not in "".join(shown)


async def test_what_stood_under_an_unknown_option_of_a_transaction_is_not_shown():
    """The same holds for a function's own argument that is given by name."""
    with pytest.raises(UnknownArgumentError, match="go by position") as caught:
        await ResilientPool().run_in_transaction(print, token="hunter2")
    ours = caught.value.__traceback__.tb_next
    shown = traceback.TracebackException(type(caught.value), caught.value, ours, capture_locals=True).format()
    assert "hunter2" not in "".join(shown)


def test_a_coroutine_function_stays_one():
    """Mocks with a specification, and frameworks, tell by it what has to be awaited."""
    for method in (ResilientPool.close, ResilientPool.release, ResilientConnection.close, ResilientConnection.prepare):
        assert inspect.iscoroutinefunction(method)
    assert not inspect.iscoroutinefunction(ResilientPool.acquire)
    assert isinstance(create_autospec(ResilientPool, instance=True).release, AsyncMock)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400, -1, -0.001, True, "5", b"5", [5]]
)
def test_what_is_no_number_of_seconds_is_refused(value):
    """Neither a truth value nor a text is a number here."""
    with pytest.raises(ConfigurationError, match=r"^deadline must be a number of seconds or None, at least 0, not "):
        require_seconds("deadline", value)


@pytest.mark.parametrize("value", [None, 0, 0.0, 5, 1e9])
def test_a_number_of_seconds_is_taken(value):
    """Zero is no time at all."""
    require_seconds("deadline", value)
