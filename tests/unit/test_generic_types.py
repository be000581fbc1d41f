"""Pools and leases take the type of their records, as asyncpg's do for a type checker, also where annotations are evaluated."""

import pickle

import asyncpg
import pytest

from resilient_pool import Attempt, ResilientConnection, ResilientPool, RetriedTransaction


class ByName(asyncpg.Record):
    pass


@pytest.mark.parametrize("generic", [ResilientPool, ResilientConnection, RetriedTransaction, Attempt])
def test_each_type_takes_the_type_of_its_records(generic):
    """`ResilientPool[Record]` can be written in an annotation that Python evaluates."""
    assert generic[ByName].__args__ == (ByName,)
    assert pickle.loads(pickle.dumps(generic[ByName])) == generic[ByName]


def test_a_pool_made_through_its_parameterized_type_is_a_pool():
    """`ResilientPool[ByName](...)` makes what `ResilientPool(...)` makes."""
    assert type(ResilientPool[ByName]("postgresql://x@localhost/x", record_class=ByName)) is ResilientPool
