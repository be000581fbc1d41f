"""What a type checker accepts is what the constructor accepts."""

from __future__ import annotations

from resilient_pool.arguments import PoolArguments
from resilient_pool.config import ARGUMENTS


def test_the_typed_arguments_are_those_of_the_configuration():
    """An argument added in one place and forgotten in the other is found here."""
    assert set(PoolArguments.__annotations__) - {"dsn"} == {argument.name for argument in ARGUMENTS}
