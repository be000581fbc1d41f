"""The queue in which notifications wait: bounded, in order, with a gap wherever something is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient_pool import Gap, GapReason, Notification
from resilient_pool.execution.notifications import NotificationQueue

LOST, FULL, EXPIRED = GapReason.CONNECTION_LOST, GapReason.QUEUE_FULL, GapReason.EXPIRED


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def notification(number):
    return Notification(channel="c", payload=str(number), pid=1)


def filled(size, numbers, time=None):
    queue = NotificationQueue(size, time or Time())
    for number in numbers:
        queue.put(notification(number))
    return queue


def taken(queue):
    items = []
    while queue:
        item = queue.take()
        items.append(int(item.payload) if isinstance(item, Notification) else item)
    return items


def test_what_comes_is_given_out_in_order():
    """Nothing is missing while there is room."""
    assert taken(filled(3, range(3))) == [0, 1, 2]


def test_one_gap_stands_for_all_that_found_no_place():
    """It says how many they were, and for how long, up to the moment at which it is taken."""
    time = Time()
    queue = filled(2, range(3), time)
    time.now = 4.0
    queue.put(notification(3))
    time.now = 5.0
    assert taken(queue) == [0, 1, Gap(reason=FULL, seconds=5.0, missed=2)]


def test_what_comes_before_the_gap_is_taken_belongs_to_it():
    """Also when there is room again: what the application reads at the gap is newer than all of it."""
    queue = filled(2, range(3))
    queue.take()
    queue.put(notification(3))
    assert taken(queue) == [1, Gap(reason=FULL, seconds=0.0, missed=2)]
    queue.put(notification(4))
    assert taken(queue) == [4]


def test_a_gap_after_a_loss_ends_when_it_is_put():
    """What is waited for afterwards is the application's own time."""
    time = Time()
    queue = filled(2, range(1), time)
    time.now = 3.0
    queue.put_gap(LOST, 1.0)
    time.now = 10.0
    assert taken(queue) == [0, Gap(reason=LOST, seconds=2.0)]


def test_gaps_in_a_row_are_one():
    """A server that is lost again and again while nothing is taken leaves one gap, as wide as all of them."""
    time = Time()
    queue = filled(1, range(1), time)
    for now in (2.0, 4.0, 6.0):
        time.now = now
        queue.put_gap(LOST if now < 6.0 else EXPIRED, now - 1.0)
    assert taken(queue) == [0, Gap(reason=EXPIRED, seconds=5.0)]


def test_a_loss_of_the_connection_behind_a_full_queue_makes_the_number_unknown():
    """The gap stands for both, and goes on until it is taken."""
    time = Time()
    queue = filled(1, range(3), time)
    time.now = 3.0
    queue.put_gap(LOST, 2.0)
    queue.put(notification(9))
    time.now = 7.0
    assert taken(queue) == [0, Gap(reason=LOST, seconds=7.0)]


def test_a_full_queue_behind_a_gap_widens_it():
    """And the number of those that are missing is not known."""
    time = Time()
    queue = filled(1, range(1), time)
    queue.put_gap(LOST, 0.0)
    time.now = 2.0
    queue.put(notification(1))
    assert taken(queue) == [0, Gap(reason=FULL, seconds=2.0)]


def test_a_queue_that_was_cleared_begins_anew():
    """With all its places."""
    queue = filled(1, range(3))
    queue.clear()
    assert not queue
    queue.put(notification(7))
    assert taken(queue) == [7]


@given(st.integers(1, 4), st.lists(st.sampled_from(["put", "take", "gap"]), max_size=60))
def test_every_number_is_given_out_once_and_in_order_or_stood_for_by_a_gap(size, steps):
    """Whatever the order of events, and never are there more than `size` notifications and as many gaps and one."""
    queue, number, given_out = NotificationQueue(size, Time()), 0, []

    def take():
        item = queue.take()
        given_out.append(int(item.payload) if isinstance(item, Notification) else item)

    for step in steps:
        if step == "put":
            queue.put(notification(number))
            number += 1
        elif step == "gap":
            queue.put_gap(LOST, 0.0)
        elif queue:
            take()
        assert len(queue._items) <= 2 * size + 1
    while queue:
        take()
    expected, excused = 0, False
    for item in [*given_out, number]:
        if isinstance(item, Gap):
            excused = True
            if item.missed is not None:
                expected += item.missed
                excused = False
        else:
            assert item >= expected if excused else item == expected
            expected, excused = item + 1, False
