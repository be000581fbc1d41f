"""Which ways out of a block are certain to lead on with its loop."""

from __future__ import annotations

import dis

import pytest

from resilient_pool.execution.loop_control import leads_to


async def ends(loop):
    async for item in loop:
        async with item:
            item(1)


async def goes_on(loop):
    async for item in loop:
        async with item:
            continue


async def breaks(loop):
    async for item in loop:
        async with item:
            break


async def returns(loop):
    async for item in loop:
        async with item:
            return


async def does_more(loop):
    async for item in loop:
        async with item:
            item(1)
        loop(2)


async def has_a_handler(loop):
    async for item in loop:
        try:
            async with item:
                item(1)
        except ValueError:
            loop(2)


WAYS = [(ends, True), (goes_on, True), (has_a_handler, True), (breaks, False), (returns, False), (does_more, False)]


def awaits(function):
    """List where `__aexit__` is awaited, without and with an exception."""
    steps = list(dis.get_instructions(function))
    send, raised, kinds = None, False, {}
    for step in steps:
        raised = raised or step.opname == "WITH_EXCEPT_START"
        if step.opname == "SEND":
            send = step.offset
            kinds["raised" if raised else "left"] = send
            raised = False
    head = next(step.offset for step in steps if step.opname == "GET_ANEXT")
    return kinds, head


@pytest.mark.parametrize(("way", "expected"), WAYS)
def test_a_way_without_an_exception(way, expected):
    """Only the end of the block and `continue` lead on, and only if nothing follows."""
    kinds, head = awaits(way)
    assert leads_to(way.__code__, kinds["left"], head, swallowing=False) is expected


def test_a_swallowed_exception_leads_on_unless_something_follows():
    """What follows the block would run although nothing was committed."""
    kinds, head = awaits(ends)
    assert leads_to(ends.__code__, kinds["raised"], head, swallowing=True)
    assert not leads_to(ends.__code__, kinds["raised"], head, swallowing=False)
    kinds, head = awaits(does_more)
    assert not leads_to(does_more.__code__, kinds["raised"], head, swallowing=True)


def test_any_other_place_leads_nowhere():
    """Nothing is concluded from what is not an await."""
    _, head = awaits(ends)
    assert not leads_to(ends.__code__, 0, head, swallowing=True)
    assert not leads_to(ends.__code__, 10**6, head, swallowing=True)
