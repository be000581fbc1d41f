"""What may be given to the next caller without a reset: a connection on which nothing is under way."""

from __future__ import annotations

import pytest
from scripted_driver import ScriptedServer

from resilient_pool.pooling.driver import DriverConnection


@pytest.fixture
async def connection():
    """A connection to a scripted server."""
    opened = await ScriptedServer().connect()
    protocol = opened._protocol
    yield opened
    protocol.connected = False
    protocol._ours.close()
    protocol._theirs.close()


async def test_a_connection_on_which_nothing_is_under_way_is_at_rest(connection):
    """It is the only one."""
    assert DriverConnection(connection).is_at_rest


async def test_a_connection_whose_cancellation_is_not_confirmed_is_not_at_rest(connection):
    """No transaction is open on it, but what cancels its last statement could meet the next caller's."""
    driver = DriverConnection(connection)
    connection._protocol.cancelling = True
    assert not connection.is_in_transaction()
    assert not driver.is_at_rest


async def test_a_reset_waits_for_a_cancellation_within_its_limit(connection):
    """Without a limit of its own the reset would wait for as long as the server does not answer."""
    server = connection._protocol.server
    driver = DriverConnection(connection)
    connection._protocol.cancelling = server.hangs = True
    with pytest.raises(TimeoutError):
        await driver.restore(None, 0.0, watched=False)


async def test_a_transaction_that_is_open_by_the_drivers_word_is_enough(connection):
    """Also before the server has confirmed it."""
    driver = DriverConnection(connection)
    connection._top_xact = object()
    assert not driver.is_at_rest
