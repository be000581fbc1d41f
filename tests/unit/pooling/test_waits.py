"""Callers that had to wait: each is counted and reported with how long it waited, and why."""

from __future__ import annotations

import asyncio

import pytest
from scripted_driver import ScriptedServer

from resilient_pool import AcquireTimeoutError, ResilientPool
from resilient_pool.events import CallerWaited, WaitEnd, WaitReason
from resilient_pool.retry.verdict import Fault
from resilient_pool.testing import ScriptedClock


@pytest.fixture
def server():
    return ScriptedServer()


class Bench:
    """A pool of one connection, and what its callers were reported to have waited."""

    def __init__(self, server):
        self.clock = ScriptedClock(auto=False)
        self.waits: list[CallerWaited] = []
        self.pool = ResilientPool(
            "postgresql://user@nowhere/nothing",
            connect=server.connect,
            clock=self.clock,
            max_size=1,
            observers=[lambda event: self.waits.append(event) if isinstance(event, CallerWaited) else None],
        )

    @property
    def reported(self):
        return [(wait.reason, wait.end, wait.elapsed) for wait in self.waits]

    def assert_sums(self):
        stats = self.pool.stats()
        assert stats.waits == len(self.waits) == sum(stats.wait_histogram.values())
        assert stats.wait_seconds == pytest.approx(sum(wait.elapsed for wait in self.waits))


@pytest.fixture
async def bench(server):
    bench = Bench(server)
    async with bench.pool:
        yield bench
    bench.assert_sums()


async def test_the_first_caller_waits_for_the_first_connection(bench):
    """It is opened for it, by the prober."""
    await bench.pool.execute("SELECT 1")
    assert bench.reported == [(WaitReason.CONNECTING, WaitEnd.SERVED, 0.0)]


async def test_a_warm_call_is_no_wait(bench):
    """Nothing is counted or reported of a caller that gets a connection at once."""
    await bench.pool.execute("SELECT 1")
    await bench.pool.execute("SELECT 1")
    assert (len(bench.waits), bench.pool.stats().acquired) == (1, 2)


async def test_a_caller_waits_while_every_connection_is_in_use(bench):
    """It is served with the one that is given back."""
    lease = await bench.pool.acquire()
    second = asyncio.ensure_future(bench.pool.execute("SELECT 1"))
    await bench.clock.run(2.0)
    await bench.pool.release(lease)
    await second
    assert bench.reported[1:] == [(WaitReason.BUSY, WaitEnd.SERVED, 2.0)]


async def test_a_caller_whose_time_is_up_is_counted_as_timed_out(bench):
    """It fails, and what it waited is in the sums."""
    lease = await bench.pool.acquire()
    second = asyncio.ensure_future(bench.pool.execute("SELECT 1", deadline=1.0))
    await bench.clock.run(1.5)
    with pytest.raises(AcquireTimeoutError):
        await second
    ((reason, end, elapsed),) = bench.reported[1:]
    assert (reason, end, bench.pool.stats().wait_timeouts) == (WaitReason.BUSY, WaitEnd.TIMEOUT, 1)
    assert elapsed == pytest.approx(1.0, abs=0.05)
    await bench.pool.release(lease)


async def test_a_caller_that_is_cancelled_is_counted_too(bench):
    """What it had waited by then is not lost."""
    lease = await bench.pool.acquire()
    second = asyncio.ensure_future(bench.pool.execute("SELECT 1"))
    await bench.clock.run(3.0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert bench.reported[1:] == [(WaitReason.BUSY, WaitEnd.CANCELLED, 3.0)]
    await bench.pool.release(lease)


async def test_every_caller_of_an_outage_learns_how_long_it_was(bench, server):
    """Not only the one whose attempt failed: each has waited for the same server."""
    server.refusal = ConnectionRefusedError("nothing listens")
    callers = [asyncio.ensure_future(bench.pool.execute("SELECT 1")) for _ in range(3)]
    await bench.clock.run(2.0)
    server.refusal = None
    while not all(caller.done() for caller in callers):
        await bench.clock.run(0.5)
    assert [(wait.reason, wait.end, wait.fault) for wait in bench.waits[:3]] == [
        (WaitReason.AWAY, WaitEnd.SERVED, Fault.UNREACHABLE)
    ] * 3
    assert {wait.outage for wait in bench.waits[:3]} == {bench.pool.stats().circuit_open_seconds}
    assert all(wait.attempts > 1 and wait.elapsed >= 2.0 for wait in bench.waits[:3])
    assert bench.pool.stats().circuit_openings == 1


async def test_a_wait_after_an_outage_is_none_of_it(bench, server):
    """A caller that waits later waits for a connection in use."""
    server.refusal = ConnectionRefusedError("nothing listens")
    first = asyncio.ensure_future(bench.pool.execute("SELECT 1"))
    await bench.clock.run(1.0)
    server.refusal = None
    await bench.clock.run(2.0)
    await first
    lease = await bench.pool.acquire()
    second = asyncio.ensure_future(bench.pool.execute("SELECT 1"))
    await bench.clock.run(1.0)
    await bench.pool.release(lease)
    await second
    assert (bench.waits[-1].reason, bench.waits[-1].outage) == (WaitReason.BUSY, None)


async def test_callers_of_a_pool_that_is_closed_have_failed(bench):
    """Closing ends every wait with an error."""
    lease = await bench.pool.acquire()
    second = asyncio.ensure_future(bench.pool.execute("SELECT 1"))
    await bench.clock.run(1.0)
    bench.pool.terminate()
    with pytest.raises(Exception, match="closed"):
        await second
    assert bench.reported[1:] == [(WaitReason.BUSY, WaitEnd.FAILED, 1.0)]
    del lease
