"""Deadlines: a call's own, and the limit of the context it is made in."""

from __future__ import annotations

import asyncio

import pytest

from resilient_pool.clock import deadline_after, deadline_scope


@pytest.mark.parametrize(
    ("limit", "seconds", "deadline"),
    [(None, None, None), (None, 5.0, 15.0), (12.0, None, 12.0), (12.0, 5.0, 12.0), (12.0, 1.0, 11.0)],
)
def test_the_earlier_one_counts(limit, seconds, deadline):
    """No limit and no deadline is for ever."""
    with deadline_scope(limit):
        assert deadline_after(10.0, seconds) == deadline
    assert deadline_after(10.0, None) is None


@pytest.mark.parametrize(("inner", "deadline"), [(11.0, 11.0), (13.0, 12.0), (None, 12.0)])
def test_an_inner_limit_cannot_be_later_than_the_outer_one(inner, deadline):
    """And afterwards the outer one holds again."""
    with deadline_scope(12.0):
        with deadline_scope(inner):
            assert deadline_after(10.0, None) == deadline
        assert deadline_after(10.0, None) == 12.0


async def test_a_limit_holds_for_tasks_begun_within_and_for_no_others():
    """It belongs to the context."""

    async def look():
        return deadline_after(10.0, None)

    with deadline_scope(12.0):
        within = asyncio.create_task(look())
    without = asyncio.create_task(look())
    assert (await within, await without) == (12.0, None)
