"""A race of several hosts: who is tried when, and what becomes of the losers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from resilient_pool.pooling.hosts import Candidate, PinnedLoop, Race, UnansweredHosts, candidates
from resilient_pool.testing import ScriptedClock


class Connection:
    """An open connection, until it is terminated."""

    def __init__(self, candidate) -> None:
        self.candidate = candidate
        self.is_open = True

    def terminate(self) -> None:
        self.is_open = False


def race(hosts, dial, *, unanswered=None, share=1.0):
    clock = ScriptedClock()
    return Race(hosts, dial, lambda error: isinstance(error, OSError), unanswered or UnansweredHosts(clock), share)


A, B = (Candidate(address, 5432, address) for address in ("10.0.0.1", "10.0.0.2"))


def test_names_are_to_be_resolved_and_addresses_and_sockets_are_not():
    """Also an IPv6 address with the name of an interface."""
    found = candidates(["db.test", "10.0.0.1", "::1", "fe80::1%eth0", "/run/postgresql"], [1, 2, 3, 4, 5])
    assert [candidate.address for candidate in found] == [None, "10.0.0.1", "::1", "fe80::1%eth0", "/run/postgresql"]
    assert [str(candidate) for candidate in found[:2]] == ["db.test:1", "10.0.0.1:2"]
    assert str(Candidate("db.test", 1, "10.0.0.1")) == "db.test (10.0.0.1):1"


async def test_the_first_that_answers_is_taken_and_the_others_are_not_asked():
    """In their order, as asyncpg does."""
    asked = []

    async def dial(candidate):
        asked.append(candidate)
        return Connection(candidate)

    assert (await race([A, B], dial).run()).candidate is A
    assert asked == [A]


async def test_one_that_fails_is_followed_at_once_by_the_next():
    """And when all have failed there is no connection, but the error of each."""
    refused = ConnectionRefusedError(111, "no")

    async def dial(candidate):
        if candidate is A:
            raise refused
        return Connection(candidate)

    assert (await race([A, B], dial).run()).candidate is B

    async def fail(candidate):
        raise refused

    lost = race([A, B], fail)
    assert await lost.run() is None
    assert lost.errors == {A: refused, B: refused}


async def test_an_error_that_leaves_no_hope_ends_the_race():
    """The others are not asked, and those under way are given up."""
    asked = []

    async def dial(candidate):
        asked.append(candidate)
        raise LookupError("wrong password")

    with pytest.raises(LookupError, match="wrong password"):
        await race([A, B], dial).run()
    assert asked == [A]


async def test_two_that_answer_in_the_same_moment_leave_one_connection():
    """The other one is closed."""
    ready, opened = asyncio.Event(), []

    async def dial(candidate):
        if len(opened) == 0 and candidate is B:
            ready.set()
        await ready.wait()
        opened.append(Connection(candidate))
        return opened[-1]

    unanswered = UnansweredHosts(ScriptedClock())
    unanswered.note(A, answered=False)
    unanswered.note(B, answered=False)
    winner = await race([A, B], dial, unanswered=unanswered, share=0.0).run()
    await asyncio.sleep(0)
    assert [connection.is_open for connection in opened if connection is winner] == [True]
    assert [connection.is_open for connection in opened if connection is not winner] == [False]


async def test_a_race_that_is_cancelled_takes_its_attempts_along():
    """Nothing goes on behind a caller who has left."""
    cancelled, begun = [], asyncio.Event()

    async def dial(candidate):
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(candidate)
            raise

    task = asyncio.create_task(race([A, B], dial).run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert cancelled == [A]


async def test_one_that_did_not_answer_the_last_time_comes_last_for_a_minute():
    """Then it is in its place again, but is waited for shortly only."""
    clock = ScriptedClock()
    unanswered = UnansweredHosts(clock)
    unanswered.note(A, answered=False)
    assert unanswered.is_recent(A)
    asked = []

    async def dial(candidate):
        asked.append(candidate)
        return Connection(candidate)

    await Race([A, B], dial, lambda _: True, unanswered, 10.0).run()
    clock.advance(60.0)
    await Race([A, B], dial, lambda _: True, unanswered, 10.0).run()
    assert asked == [B, A]
    assert A not in unanswered


async def test_a_pinned_loop_connects_to_the_address_and_asks_for_the_host():
    """Everything else is the event loop's own; the driver finds its tasks by it."""
    made = {}

    class Loop:
        def create_connection(self, factory, host, port, **options):
            made.update(host=host, port=port, **options)

        def time(self):
            return 5.0

    loop = Loop()
    pinned = PinnedLoop(loop, "10.0.0.1")
    pinned.create_connection(asyncio.Protocol, "db.test", 5432)
    assert made == {"host": "10.0.0.1", "port": 5432}
    pinned.create_connection(asyncio.Protocol, "db.test", 5432, ssl=True)
    assert made == {"host": "10.0.0.1", "port": 5432, "ssl": True, "server_hostname": "db.test"}
    assert pinned.time() == 5.0
    assert {loop: "task"}[pinned] == "task"


async def test_an_address_that_is_local_to_a_link_keeps_its_interface(monkeypatch):
    """As the fourth part of an IPv6 address has it."""

    def resolve(*_others, **_options):
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 5432, 0, 3))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def dial(candidate):
        return Connection(candidate)

    connection = await race([Candidate("db.test", 5432, None)], dial).run()
    assert connection.candidate.address == "fe80::1%3"
