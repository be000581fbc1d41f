"""What the package's own exceptions are to those who catch them."""

from __future__ import annotations

import copy
import pickle

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError
from resilient_pool.errors import ResilientPoolError


@pytest.mark.parametrize("kind", [asyncpg.TransactionResolutionUnknownError, asyncpg.PostgresError, ResilientPoolError])
def test_an_unknown_outcome_is_caught_by_handlers_written_for_the_driver(kind):
    """SQLSTATE 08007 says the same."""
    with pytest.raises(kind) as caught:
        raise OutcomeUnknownError("transaction", xid=7)
    assert (caught.value.sqlstate, caught.value.xid, caught.value.operation) == ("08007", 7, "transaction")


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_unknown_outcome_can_be_copied_and_pickled(again):
    """It crosses to another process whole."""
    error = OutcomeUnknownError("execute", xid=2**40)
    error.add_note("seen")
    other = again(error)
    assert type(other) is OutcomeUnknownError
    assert (str(other), other.operation, other.xid, other.__notes__) == (str(error), "execute", 2**40, ["seen"])


def test_the_servers_own_08007_stays_the_drivers_class():
    """The driver makes its exceptions by SQLSTATE; the package adds no second class for one."""
    made = asyncpg.PostgresError.new({"C": "08007", "M": "resolution unknown"})
    assert type(made) is asyncpg.TransactionResolutionUnknownError


@pytest.mark.parametrize("operation", ["transaction", "execute"])
def test_the_text_says_only_what_is_known(operation):
    """A time-out or an answer "I do not know" is no lost connection."""
    assert "lost" not in str(OutcomeUnknownError(operation))
