"""What a script says and when, without a connection: its lines are data, and the time is an argument."""

from __future__ import annotations

import pytest

from resilient_pool.testing import End, Point, Refusal
from resilient_pool.testing.scripted import Script


def error_response(**fields) -> bytes:
    return Refusal(at=Point.STARTUP, **fields).error_response


def sent(script: Script, *occasions: tuple[Point, float] | tuple[Point, float, bytes]) -> list[str | None]:
    lines = [script.next(*occasion) for occasion in occasions]
    return [line and line.message for line in lines]


def startups(script: Script, *times: float) -> list[str | None]:
    script.begin(times[0])
    return sent(script, *((Point.STARTUP, time) for time in times))


def line(message: str, at: Point = Point.STARTUP, **fields) -> Refusal:
    return Refusal(at=at, message=message, **fields)


def test_an_error_has_the_fields_that_it_was_given_and_no_others():
    """Proxies leave out the untranslated severity, or the severity and the code."""
    postgres = error_response(sqlstate="57P03", message="m", detail="d", hint="h")
    neon = error_response(severity="ERROR", severity_en="", sqlstate="XX000", message="m")
    prisma = error_response(severity=None, message="m")
    german = error_response(severity="FEHLER", severity_en="ERROR", message="m")
    assert postgres[5:] == b"SFATAL\0VFATAL\0C57P03\0Mm\0Dd\0Hh\0\0"
    assert neon[5:] == b"SERROR\0CXX000\0Mm\0\0"
    assert prisma[5:] == b"Mm\0\0"
    assert german[5:] == b"SFEHLER\0VERROR\0Mm\0\0"
    for message in (postgres, neon, prisma, german):
        assert message[:1] == b"E"
        assert int.from_bytes(message[1:5], "big") == len(message) - 1


def test_an_error_of_the_second_protocol_is_a_letter_and_its_text():
    """So says a server that could not fork, whatever the client speaks."""
    assert error_response(bare=True, message="could not fork\n", sqlstate="53300") == b"Ecould not fork\n\0"


def test_a_line_with_nothing_to_say_says_nothing():
    """The connection just ends."""
    assert error_response(then=End.RESET) == b""


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"at": Point.STARTUP, "message": "m", "then": End.READY}, "not at STARTUP"),
        ({"at": Point.IDLE, "message": "m", "then": End.READY}, "not at IDLE"),
        ({"at": Point.QUERY, "then": End.READY}, "needs something to say"),
        ({"at": Point.PARSE, "message": "m", "executed": True}, "not at PARSE"),
        ({"at": Point.AUTHENTICATION, "message": "m", "matching": "x"}, "no statement at AUTHENTICATION"),
        ({"at": Point.TLS, "bare": True}, "message="),
        ({"at": Point.QUERY, "nth": 0}, "nth must be at least 1, not 0"),
        ({"at": Point.QUERY, "times": 0}, "times must be at least 1, not 0"),
        ({"at": Point.QUERY, "beyond": -1}, "beyond must be at least 0, not -1"),
        ({"at": Point.QUERY, "seconds": 0.0}, r"seconds must be more than 0, not 0\.0"),
        ({"at": Point.QUERY, "seconds": float("nan")}, "seconds must be more than 0, not nan"),
    ],
)
def test_what_does_not_fit_together_is_named(fields, complaint):
    """A script that could never be performed is refused when it is written."""
    with pytest.raises(ValueError, match=complaint):
        Refusal(**fields)


def test_lines_follow_each_other():
    """The first that applies is sent, and what comes after it begins to count when it is done."""
    script = Script((line("first", times=2), line("second", times=1)), lambda: 0)
    assert startups(script, 0.0, 0.0, 0.0, 0.0) == ["first", "first", "second", None]
    assert [each.message for each in script.sent] == ["first", "first", "second"]


def test_a_line_can_begin_late_and_end_early():
    """The second and the third occasion, and no other."""
    assert startups(Script((line("m", nth=2, times=2),), lambda: 0), 0.0, 0.0, 0.0, 0.0) == [None, "m", "m", None]


def test_time_runs_from_the_first_attempt():
    """However long the server has been there before."""
    script = Script((line("short", seconds=1.0), line("long", seconds=3.0)), lambda: 0)
    assert startups(script, 100.0, 101.0, 101.5, 103.0, 103.5) == ["short", "short", "long", "long", None]


def test_a_full_server_is_full_while_its_clients_stay():
    """Two may come in; a third when one has left."""
    counts = iter((0, 1, 2, 3, 1))
    script = Script((line("full", beyond=2),), lambda: next(counts))
    heard = sent(script, *[(Point.STARTUP, 0.0)] * 5)
    assert heard == [None, None, "full", "full", None]


def test_a_line_is_said_at_its_point_only():
    """A script may speak at several."""
    script = Script(tuple(line(point.value, at=point) for point in Point if point is not Point.IDLE), lambda: 0)
    assert sent(script, *((point, 0.0, b"COMMIT") for point in Point)) == [
        *(point.value for point in Point if point is not Point.IDLE),
        None,
    ]


def test_statements_are_known_by_what_they_contain():
    """Its SQL, its arguments, or a function of both."""
    script = Script((line("text", at=Point.QUERY, matching="INSERT", times=1),), lambda: 0)
    assert sent(script, (Point.QUERY, 0.0, b"SELECT"), (Point.QUERY, 0.0, b"INSERT\0x")) == [None, "text"]
    script = Script((line("argument", at=Point.QUERY, matching=b"\0x"),), lambda: 0)
    assert sent(script, (Point.QUERY, 0.0, b"INSERT\0x")) == ["argument"]
    script = Script((line("function", at=Point.QUERY, matching=lambda sql: len(sql) == 3),), lambda: 0)
    assert sent(script, (Point.QUERY, 0.0, b"ab"), (Point.QUERY, 0.0, b"abc")) == [None, "function"]


@pytest.mark.parametrize(
    ("sql", "is_commit"),
    [(b"COMMIT", True), (b"\n commit;", True), (b"END", True), (b"ENDLESS", False), (b"SELECT 'COMMIT'", False)],
)
def test_a_commit_begins_with_its_word(sql, is_commit):
    """END means the same."""
    script = Script((line("m", at=Point.COMMIT),), lambda: 0)
    assert sent(script, (Point.COMMIT, 0.0, sql)) == ["m" if is_commit else None]


def test_a_point_that_is_a_text_is_refused():
    """The message says what is meant."""
    with pytest.raises(TypeError, match=r"at must be a Point, such as Point\.STARTUP, not 'startup'"):
        Refusal(at="startup", message="m")
