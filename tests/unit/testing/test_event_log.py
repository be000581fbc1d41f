"""What a pausing server logs and counts."""

from __future__ import annotations

import pytest

from resilient_pool.testing._event_log import EventLog


def test_an_attempt_is_in_flight_until_its_first_outcome():
    """Later outcomes change nothing."""
    log = EventLog(100.0)
    first, second = log.attempt_started(101.0), log.attempt_started(102.0)
    assert (first, second, log.in_flight, log.peak_in_flight) == (1, 2, 2, 2)
    log.set_outcome(first, "served", 103.0)
    log.set_outcome(first, "failed", 104.0)
    assert log.in_flight == 1
    attempt = log.attempts[0]
    assert (attempt.at, attempt.phase, attempt.outcome, attempt.settled_at) == (101.0, "awake", "served", 103.0)
    assert (log.attempts[1].outcome, log.attempts[1].settled_at) == ("pending", None)


def test_the_peak_is_counted_anew_from_each_resume():
    """It begins with those that are waiting then."""
    log = EventLog(0.0)
    for _ in range(3):
        log.set_outcome(log.attempt_started(1.0), "gave up", 1.5)
    log.paused(2.0)
    numbers = [log.attempt_started(3.0) for _ in range(5)]
    log.resuming(3.0)
    for number in numbers[:3]:
        log.set_outcome(number, "57P03", 4.0)
    assert log.peak_in_flight == 5
    log.resumed(5.0)
    assert log.peak_in_flight == 2
    log.attempt_started(6.0)
    assert log.peak_in_flight == 3


def test_an_outage_has_the_attempts_between_pause_and_resume():
    """Each attempt keeps the phase that it met."""
    log = EventLog(0.0)
    log.attempt_started(1.0)
    assert log.outage_attempts == ()
    for start in (10.0, 20.0):
        log.paused(start)
        assert log.outage_attempts == ()
        log.attempt_started(start + 1)
        log.resuming(start + 1)
        log.set_outcome(log.attempt_started(start + 2), "reset", start + 2)
        assert len(log.outage_attempts) == 2
        log.resumed(start + 3)
        log.attempt_started(start + 4)
        seen = [(attempt.at, attempt.phase, attempt.outcome) for attempt in log.outage_attempts]
        assert seen == [(start + 1, "paused", "pending"), (start + 2, "resuming", "reset")]
    assert [attempt.number for attempt in log.attempts] == list(range(1, 8))
    assert (log.in_flight, log.pauses) == (5, 2)


def test_seconds_awake_leave_out_the_pause_and_the_resume():
    """They go on from the moment at which it is up."""
    log = EventLog(100.0)
    assert log.awake_seconds(103.0) == 3.0
    log.paused(104.0)
    assert log.awake_seconds(150.0) == 4.0
    log.resuming(160.0)
    assert log.awake_seconds(170.0) == 4.0
    log.resumed(175.0)
    assert log.awake_seconds(177.0) == 6.0


@pytest.mark.parametrize(
    ("moment", "expected"), [(0.0, 17), (1.0, 17), (1.5, 7), (2.0, 7), (2.1, 2), (3.0, 2), (3.1, 0)]
)
def test_bytes_count_from_a_moment_on(moment, expected):
    """Those of the very moment are among them, and several reads at one time are one."""
    log = EventLog(0.0)
    assert log.bytes_since(moment) == 0
    for count, now in ((10, 1.0), (3, 2.0), (2, 2.0), (2, 3.0)):
        log.bytes_received(count, now)
    assert log.bytes_since(moment) == expected


def test_the_log_is_for_tests_and_for_people():
    """A line has the clock's time, the seconds since the start, the event and whom it is about."""
    log = EventLog(1000.0)
    log.set_outcome(log.attempt_started(1000.5), "served", 1001.25)
    assert [(entry.at, entry.event, entry.attempt) for entry in log.log] == [
        (1000.0, "started", None),
        (1000.5, "arrived", 1),
        (1001.25, "served", 1),
    ]
    assert [str(entry) for entry in log.log] == [
        "    0.000 s  started",
        "    0.500 s  attempt 1: arrived",
        "    1.250 s  attempt 1: served",
    ]
