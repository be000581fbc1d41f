"""How the fault proxy reads the protocol, on messages composed by hand."""

from __future__ import annotations

import struct

import pytest

from resilient_pool.testing import _protocol as _messages


def typed(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


def untyped(code: int, body: bytes = b"") -> bytes:
    return struct.pack("!ii", len(body) + 8, code) + body


def read(*messages: bytes) -> list[bytes | None]:
    """Return what the server would execute for each message."""
    reader, splitter = _messages.RequestReader(), _messages.Splitter(untyped=False)
    splitter.feed(b"".join(messages))
    subjects = []
    while (message := splitter.next()) is not None:
        subjects.append(reader.read(message))
        reader.passed(message)
    return subjects


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_messages_are_whole_however_the_stream_is_cut(size):
    """Every piece size gives the same messages, and what is incomplete stays behind."""
    whole = typed(b"Q", b"SELECT 1\0") + typed(b"S") + typed(b"Q", b"\0")
    stream = whole + b"Q\0\0"
    splitter, found = _messages.Splitter(untyped=False), []
    for start in range(0, len(stream), size):
        splitter.feed(stream[start : start + size])
        while (message := splitter.next()) is not None:
            found.append(message)
    assert [message.kind for message in found] == [b"Q", b"S", b"Q"]
    assert b"".join(message.data for message in found) == whole
    assert found[0].body == b"SELECT 1\0"
    assert splitter.rest() == b"Q\0\0"
    assert splitter.rest() == b""


def test_a_stream_begins_without_types():
    """Requests for TLS and the startup message are recognised by their code; later messages have a type."""
    splitter = _messages.Splitter(untyped=True)
    splitter.feed(untyped(_messages.TLS_REQUEST) + untyped(196608, b"user\0me\0database\0mine\0\0") + typed(b"S"))
    first, second = splitter.next(), splitter.next()
    splitter.session_started()
    third = splitter.next()
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.code, second.code, third.kind) == (_messages.TLS_REQUEST, 196608, b"S")
    assert _messages.startup_parameters(second) == {"user": "me", "database": "mine"}


def test_what_is_no_protocol_is_refused():
    """A length that cannot be is not waited for."""
    splitter = _messages.Splitter(untyped=False)
    splitter.feed(b"Q\0\0\0\3")
    with pytest.raises(ValueError, match="3 bytes"):
        splitter.next()


PARSE = typed(b"P", b"name\0INSERT 1\0\0\0")
BIND = typed(b"B", b"portal\0name\0argument")
EXECUTE = typed(b"E", b"portal\0\0\0\0\0")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([typed(b"Q", b"COMMIT;\0")], [b"COMMIT;\0"], id="simple query"),
        pytest.param([PARSE, typed(b"D", b"Sname\0"), typed(b"H")], [None, None, None], id="only prepared"),
        pytest.param([PARSE, BIND, EXECUTE], [None, None, b"INSERT 1\0argument"], id="prepared and executed"),
        pytest.param([PARSE, BIND, EXECUTE, EXECUTE], [None, None, *[b"INSERT 1\0argument"] * 2], id="fetched again"),
        pytest.param([PARSE, typed(b"C", b"Sname\0"), BIND, EXECUTE], [None] * 3 + [b"\0argument"], id="closed"),
        pytest.param([PARSE, BIND, typed(b"C", b"Pportal\0"), EXECUTE], [None] * 3 + [b""], id="portal closed"),
        pytest.param([typed(b"d", b"1\n"), typed(b"c"), typed(b"X")], [None, None, None], id="copy data and goodbye"),
    ],
)
def test_what_is_executed_is_known_by_its_sql_and_arguments(messages, expected):
    """A statement keeps the SQL it was prepared from until it is closed."""
    assert read(*messages) == expected


@pytest.mark.parametrize(
    ("message", "rounds"), [(b"Q", 1), (b"S", 1), (b"F", 1), (b"P", 0), (b"B", 0), (b"E", 0), (b"H", 0), (b"d", 0)]
)
def test_a_round_ends_where_the_server_will_say_that_it_is_ready(message, rounds):
    """Simple queries, function calls and Syncs end one; nothing else does."""
    reader = _messages.RequestReader()
    before = reader.round
    reader.passed(_messages.Message(kind=message, data=typed(message)))
    assert reader.round - before == rounds


def test_a_fatal_error_has_its_code_and_its_text():
    """It is composed as the manual's section on error fields says."""
    expected = b"SFATAL\0VFATAL\0C57P03\0Mstarting up\0\0"
    assert _messages.fatal_error("57P03", "starting up") == typed(b"E", expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"user": "me"}, {"user": "me", "idle_session_timeout": "300"}),
        ({"user": "me", "idle_session_timeout": "5"}, {"user": "me", "idle_session_timeout": "5"}),
    ],
)
def test_a_startup_message_takes_more_parameters(said, expected):
    """The client's own come first and are never changed, and the message remains one."""
    body = b"".join(f"{name}\0{value}\0".encode() for name, value in said.items()) + b"\0"
    message = _messages.Message(kind=b"", data=untyped(196608, body))
    longer = _messages.with_parameters(message, {"idle_session_timeout": "300"})
    splitter = _messages.Splitter(untyped=True)
    splitter.feed(longer.data)
    assert splitter.next() == longer
    assert splitter.rest() == b""
    assert longer.code == 196608
    assert longer.data[-2:] == b"\0\0"
    assert _messages.startup_parameters(longer) == expected


def test_an_error_is_known_by_its_code():
    """The field may stand anywhere, and is empty where there is none."""
    error = _messages.Message(kind=b"E", data=_messages.fatal_error("28P01", "Code C57P03"))
    assert _messages.sqlstate(error) == "28P01"
    assert _messages.sqlstate(_messages.Message(kind=b"E", data=typed(b"E", b"MCode\0\0"))) == ""
