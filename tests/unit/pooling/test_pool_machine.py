"""Any sequence of uses, cancellations, losses, freezes and endings of a pool: nothing is held twice, and closing ends."""

from __future__ import annotations

import asyncio
import os

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scripted_driver import ScriptedServer

from resilient_pool import ResilientPool
from resilient_pool.testing import ScriptedClock

MAX_SIZE = 3
TURNS = 400
"""Turns of the event loop within which everything has come to rest that waits for no time to pass."""
PATIENCE = 20.0
"""Seconds, in real time and on a busy machine, after which a step that should have ended has failed."""
INDEX = st.integers(0, 7)

REFUSALS = {
    "away": ConnectionRefusedError(111, "Connect call failed"),
    "full": asyncpg.TooManyConnectionsError("too many connections for role"),
    "wrong password": asyncpg.InvalidPasswordError("password authentication failed"),
}


class PoolMachine(RuleBasedStateMachine):
    """A pool over a scripted driver, and callers who do what they like."""

    min_size = 0
    session_reset = "auto"

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.unheard = []
        self.loop.set_exception_handler(lambda _, context: self.unheard.append(context))
        self.clock = ScriptedClock(auto=False)
        self.server = ScriptedServer()
        self.calls, self.borrowing, self.releases, self.leases = [], [], [], []
        self.closing = None
        self.pool = self.run(self._open())

    def run(self, work):
        async def within_limits():
            async with asyncio.timeout(PATIENCE):
                return await work

        return self.loop.run_until_complete(within_limits())

    async def _open(self):
        return await ResilientPool(
            "postgresql://nobody@nowhere/nothing",
            connect=self.server.connect,
            clock=self.clock,
            max_size=MAX_SIZE,
            min_size=self.min_size,
            init_size=self.min_size,
            session_reset=self.session_reset,
            deadline=30.0,
        )

    @initialize()
    def the_driver_serves_as_one(self):
        assert self.run(self.pool.execute("SELECT 1")) == "OK"

    def begin(self, work):
        async def start():
            return asyncio.ensure_future(work)

        return self.run(start())

    def turn(self, number=1):
        async def turns():
            for _ in range(number):
                await asyncio.sleep(0)

        self.run(turns())
        for task in [task for task in self.borrowing if task.done()]:
            self.borrowing.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.leases.append(task.result())

    def pick(self, things, index):
        return things[index % len(things)]

    # What callers do

    @rule(sql=st.sampled_from(["SELECT 1", "SET work_mem = '4MB'"]), fail_fast=st.booleans())
    def call(self, sql, fail_fast):
        self.calls.append(self.begin(self.pool.execute(sql, fail_fast=fail_fast)))

    @rule()
    def borrow(self):
        async def acquire():
            return await self.pool.acquire(timeout=20.0)

        self.borrowing.append(self.begin(acquire()))

    @precondition(lambda self: self.leases)
    @rule(index=INDEX)
    def use(self, index):
        self.calls.append(self.begin(self.pick(self.leases, index).execute("SELECT 2")))

    @precondition(lambda self: self.leases)
    @rule(index=INDEX)
    def release(self, index):
        self.run(self._begin_release(self.pick(self.leases, index)))

    @precondition(lambda self: self.leases and (self.calls or self.borrowing))
    @rule(index=INDEX, other=INDEX)
    def release_and_cancel_in_the_same_turn(self, index, other):
        async def both():
            await self._begin_release(
                self.pick(self.leases, index), then=self.pick([*self.calls, *self.borrowing], other).cancel
            )

        self.run(both())

    async def _begin_release(self, lease, *, then=lambda: None):
        # Up to where it waits for a reset: one that is cancelled before its first step releases nothing.
        self.leases.remove(lease)
        connection = None if lease._entry is None else lease._entry.resource
        if connection is not None and connection.connection._protocol.busy:
            connection.connection._protocol.is_misused = True  # the reset meets what the application still runs
        self.releases.append(asyncio.ensure_future(self.pool.release(lease)))
        asyncio.get_running_loop().call_soon(then)
        await asyncio.sleep(0)

    @precondition(lambda self: self.calls or self.borrowing or self.releases)
    @rule(index=INDEX)
    def cancel(self, index):
        self.pick([*self.calls, *self.borrowing, *self.releases], index).cancel()

    @precondition(lambda self: self.leases)
    @rule(index=INDEX)
    def close_lease(self, index):
        async def close(lease):
            await lease.close()

        self.calls.append(self.begin(close(self.pick(self.leases, index))))

    @precondition(lambda self: self.leases)
    @rule(index=INDEX, running=st.booleans())
    def terminate_lease(self, index, running):
        lease = self.pick(self.leases, index)
        if running:
            self.run(self._terminate(lease))
        else:
            terminate(lease)

    async def _terminate(self, lease):
        terminate(lease)

    # What the server and time do

    @precondition(lambda self: self.server.open())
    @rule(index=INDEX, noticed=st.booleans())
    def lose(self, index, noticed):
        protocol = self.pick(self.server.open(), index)

        async def end():
            protocol.lose(noticed=noticed)

        self.run(end())

    @rule(why=st.sampled_from(["", *REFUSALS]))
    def refuse(self, why):
        self.server.refusal = REFUSALS.get(why)

    @rule(hangs=st.booleans())
    def hang(self, hangs):
        self.server.hangs = hangs

    @rule(number=st.integers(1, 6))
    def let_the_loop_run(self, number):
        self.turn(number)

    @rule()
    def let_everything_settle(self):
        self.turn(100)

    @rule(seconds=st.sampled_from([0.1, 1.5, 70.0]))
    def let_time_pass(self, seconds):
        self.run(self.clock.run(seconds))
        self.turn()

    @rule(seconds=st.sampled_from([2.0, 3600.0]))
    def freeze(self, seconds):
        self.clock.freeze(seconds)

    # What the application does with the pool

    @rule()
    def expire(self):
        self.run(self.pool.expire_connections())

    @precondition(lambda self: self.closing is None and not self.pool.is_closed)
    @rule()
    def close(self):
        self.closing = self.begin(self.pool.close())

    @precondition(lambda self: not self.pool.is_closed)
    @rule(running=st.booleans())
    def terminate(self, running):
        async def end():
            self.pool.terminate()

        if running:
            self.run(end())
        else:
            self.pool.terminate()

    # What always holds

    @invariant()
    def nothing_is_both_held_and_idle(self):
        resources = self.pool._resources
        idle = list(resources.idle_entries)
        assert len(idle) == len(set(idle))
        assert set(idle) <= resources._entries
        held = [lease._entry for lease in self.leases if lease._entry is not None]
        assert not set(held) & set(idle)
        connections = [id(entry.resource.connection) for entry in resources._entries if entry.resource is not None]
        assert len(connections) == len(set(connections))
        assert not [entry for entry in idle if entry.resource is None or entry.resource.connection._protocol.busy]
        assert not (idle and resources.is_awaited)

    @invariant()
    def the_counters_add_up(self):
        stats, resources = self.pool.stats(), self.pool._resources
        assert resources.size <= MAX_SIZE
        assert self.pool.get_idle_size() <= self.pool.get_size() <= MAX_SIZE
        assert stats.idle + stats.in_use <= stats.size
        filled = sum(entry.resource is not None for entry in resources)
        assert self.pool._maintenance.returning <= self.pool._maintenance.resetting
        if not self.pool.is_closing():  # closing waits no more for a reset that does not end at its time limit
            assert stats.opened - stats.discarded_total == filled
            assert self.pool._maintenance.resetting <= resources.size

    @invariant()
    def the_driver_sees_one_statement_at_a_time(self):
        assert self.server.broken_rules == []

    @invariant()
    def releasing_raises_nothing_but_what_the_reset_met_that_it_waited_for(self):
        met = (asyncpg.ConnectionDoesNotExistError, asyncpg.InterfaceError)
        may_raise = met if self.session_reset == "on_release" else ()
        for release in [release for release in self.releases if release.done()]:
            self.releases.remove(release)
            error = None if release.cancelled() else release.exception()
            assert error is None or isinstance(error, may_raise)

    def teardown(self):
        """Everything is given back, the pool is closed: that ends, and nothing is left open or running."""
        self.server.hangs = False
        if self.closing is None and not self.pool.is_closed:
            self.closing = self.begin(self.pool.close())
        for task in (*self.calls, *self.borrowing):
            task.cancel()
        self.turn()
        while self.leases:
            self.run(self._begin_release(self.leases[0]))
        self.turn(TURNS)
        try:
            assert self.closing is None or self.closing.done()
            assert self.closing is None or self.closing.exception() is None
            self.releasing_raises_nothing_but_what_the_reset_met_that_it_waited_for()
            assert self.releases == []
            assert self.pool.is_closed
            assert self.pool._resources.size == 0
            assert self.server.open() == []
            assert asyncio.all_tasks(self.loop) == set()
            assert self.unheard == []
        finally:
            for task in (*self.calls, *self.borrowing, *self.releases):
                if task.done() and not task.cancelled():
                    task.exception()
            self.loop.close()


def terminate(lease):
    try:
        lease.terminate()
    except asyncpg.InterfaceError as error:
        assert "released" in str(error) or "ended" in str(error)


class FilledPoolMachine(PoolMachine):
    """A pool that keeps connections, and resets after each use before anybody goes on."""

    min_size = 2
    session_reset = "on_release"


@pytest.mark.parametrize("machine", [PoolMachine, FilledPoolMachine])
def test_whatever_happens_nothing_is_held_twice_and_closing_ends(machine):
    """Acquire, cancel in the same turn, release, lose, close, expire, freeze and end, in any order."""
    examples = int(os.environ.get("POOL_MACHINE_EXAMPLES", "0"))  # some thousands, now and then
    phases = set(Phase) if examples else set(Phase) - {Phase.shrink}  # shrinking may take minutes
    machine.TestCase.settings = settings(
        max_examples=examples or 40,
        phases=phases,
        report_multiple_bugs=False,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase("runTest").runTest()
