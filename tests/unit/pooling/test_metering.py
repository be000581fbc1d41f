"""Instruments: every use of a connection is measured once, and only where an observer asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars

import asyncpg
import pytest
from scripted_driver import ScriptedServer

from resilient_pool import ResilientPool
from resilient_pool.observability.instrument import Instrument
from resilient_pool.testing import ScriptedClock

REQUEST = contextvars.ContextVar("REQUEST", default="none")


class Recorder(Instrument):
    """Notes everything that an instrument is told."""

    def __init__(self):
        self.stats = None
        self.begun = 0
        self.uses = []
        self.events = []

    def __call__(self, event):
        self.events.append((event.name, REQUEST.get()))

    def attach(self, stats):
        self.stats = stats

    def enter_background(self):
        REQUEST.set("the pool's own")

    def use_begins(self):
        self.begun += 1

    def used(self, seconds):
        self.uses.append((seconds, REQUEST.get()))


@pytest.fixture
def server():
    return ScriptedServer()


@pytest.fixture
def clock():
    return ScriptedClock(auto=False)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
async def pool(server, clock, recorder):
    arguments = {"connect": server.connect, "clock": clock, "max_size": 2, "observers": [recorder]}
    async with ResilientPool("postgresql://user@nowhere/nothing", **arguments) as pool:
        yield pool


async def test_an_instrument_can_look_at_its_pool(pool, recorder):
    """It is given the pool's statistics when the pool is made."""
    await pool.execute("SELECT 1")
    assert recorder.stats() == pool.stats()


async def test_each_call_is_one_use(pool, recorder):
    """The one that opens the connection, and those that find it at hand."""
    for _ in range(3):
        await pool.execute("SELECT 1")
    assert [seconds for seconds, _ in recorder.uses] == [0.0] * 3
    assert (pool.stats().acquired, recorder.begun) == (3, 3)


async def test_a_use_is_known_while_it_lasts(pool, recorder):
    """An instrument is called when it begins, and again at its end."""
    async with pool.acquire():
        assert (recorder.begun, recorder.uses) == (1, [])
    assert (recorder.begun, len(recorder.uses)) == (1, 1)


@pytest.mark.parametrize("sql", ["SELECT 1", "SET work_mem = '4MB'"], ids=["kept", "reset"])
async def test_a_lease_is_one_use_from_getting_it_to_giving_it_back(pool, recorder, server, clock, sql):
    """Its reset afterwards, which takes another second here, is none of it."""
    async with pool.acquire() as connection:
        await connection.execute(sql)
        await clock.run(3.0)
        server.hangs = True
    await clock.run(1.0)
    server.hangs = False
    await pool.execute("SELECT 1")
    assert [seconds for seconds, _ in recorder.uses] == [3.0, 0.0]
    assert pool.stats().acquired == 2


async def test_a_use_belongs_to_its_caller(pool, recorder):
    """The instrument is called in the caller's context, where its trace is."""
    REQUEST.set("request 1")
    await pool.execute("SELECT 1")
    assert [context for _, context in recorder.uses] == ["request 1"]
    assert ("pool.caller.waited", "request 1") in recorder.events


async def test_background_work_runs_in_the_context_that_the_instrument_prepared(pool, recorder):
    """The prober opens a connection in no caller's context."""
    REQUEST.set("request 1")
    await pool.execute("SELECT 1")
    assert ("pool.connection.opened", "the pool's own") in recorder.events
    assert REQUEST.get() == "request 1"


async def test_uses_add_up_whatever_becomes_of_them(pool, recorder, server, clock):
    """A lost connection, a closed lease, a cancelled call: each use ends once."""
    await pool.execute("SELECT 1")
    lease = await pool.acquire()
    server.protocols[0].lose(noticed=True)
    with contextlib.suppress(asyncpg.PostgresError):
        await lease.execute("SELECT 1")
    await pool.release(lease)
    lease = await pool.acquire()
    await lease.close()
    await pool.release(lease)
    server.hangs = True
    call = asyncio.ensure_future(pool.execute("SELECT 1"))
    await clock.run(1.0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    server.hangs = False
    await pool.execute("SELECT 1")
    await clock.run(1.0)
    assert len(recorder.uses) == pool.stats().acquired
    assert pool.stats().in_use == 0


async def test_an_instrument_that_fails_breaks_no_call(server, clock, caplog):
    """Its failure is logged once."""

    class Broken(Recorder):
        def used(self, seconds):
            raise RuntimeError("no memory left")

    arguments = {"connect": server.connect, "clock": clock, "observers": [Broken()]}
    async with ResilientPool("postgresql://user@nowhere/nothing", **arguments) as pool:
        assert [await pool.execute("SELECT 1") for _ in range(2)] == ["OK", "OK"]
    assert len(caplog.records) == 1


async def test_a_pool_without_instruments_measures_no_use(server, clock):
    """Other observers cost a warm call nothing: the plain parts do the work."""
    arguments = {"connect": server.connect, "clock": clock, "observers": [lambda _: None]}
    async with ResilientPool("postgresql://user@nowhere/nothing", **arguments) as pool:
        assert {type(part).__name__ for part in (pool._acquirer, pool._maintenance)} == {"Acquirer", "Maintenance"}
