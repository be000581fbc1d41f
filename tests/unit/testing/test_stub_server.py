"""What a stand-in for a server answers, message by message, without a connection."""

from __future__ import annotations

import struct

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._protocol import Message, compose
from resilient_pool.testing._stub_server import INVALID, Login, StubServer

STARTUP = Message(kind=b"", data=struct.pack("!ii", 8, 196608))
CANCEL = Message(kind=b"", data=struct.pack("!ii", 8, _messages.CANCEL_REQUEST))


def message(kind: bytes, body: bytes = b"") -> Message:
    return Message(kind=kind, data=compose(kind, body))


def answers(server: StubServer, *messages: Message) -> list[tuple[bytes, bytes]]:
    """Give it messages, and cut what it answers into kinds and bodies."""
    splitter, found = _messages.Splitter(untyped=False), []
    splitter.feed(b"".join(map(server.answer, messages)))
    while (answer := splitter.next()) is not None:
        found.append((answer.kind, answer.body))
    return found


def ready(login: Login = "trust") -> StubServer:
    server = StubServer(7, login, {})
    answers(server, STARTUP)
    return server


def queries(*texts: str) -> list[str]:
    """What simple queries are answered with: the command tag, or the code of the error, and the transaction's status."""
    server, found = ready(), []
    for text in texts:
        (kind, body), (_, status) = answers(server, message(b"Q", text.encode() + b"\0"))
        word = body[:-1].decode() if kind == b"C" else _messages.sqlstate(message(kind, body))
        found.append(f"{word} {status.decode()}")
    return found


def test_a_client_is_let_in_and_told_what_it_needs_to_know():
    """Consent, settings, the process id, and readiness."""
    parameters = answers(StubServer(7, "trust", {"server_version": "13.1", "crdb_version": "CockroachDB"}), STARTUP)
    settings = dict(body[:-1].split(b"\0") for kind, body in parameters if kind == b"S")
    assert parameters[0] == (b"R", b"\0\0\0\0")
    assert settings[b"server_version"] == b"13.1"
    assert settings[b"crdb_version"] == b"CockroachDB"
    assert settings[b"client_encoding"] == b"UTF8"
    assert parameters[-2] == (b"K", b"\0\0\0\7salt")
    assert parameters[-1] == (b"Z", b"I")


def test_a_password_is_asked_for_and_taken():
    """In clear text and as MD5, whatever it is."""
    for login, request in (("password", b"\0\0\0\3"), ("md5", b"\0\0\0\5salt")):
        server = StubServer(7, login, {})
        assert answers(server, STARTUP) == [(b"R", request)]
        assert answers(server, message(b"p", b"guess\0"))[0] == (b"R", b"\0\0\0\0")


def test_scram_goes_to_its_last_step_and_fails():
    """The server would have to know the password."""
    server = StubServer(7, "scram", {})
    assert answers(server, STARTUP) == [(b"R", b"\0\0\0\x0aSCRAM-SHA-256\0\0")]
    ((kind, body),) = answers(server, message(b"p", b"SCRAM-SHA-256\0\0\0\0\x10n,,n=,r=abc"))
    assert kind == b"R"
    assert body.startswith(b"\0\0\0\x0br=abc")
    assert body.endswith(b",s=c2FsdA==,i=4096")
    ((kind, body),) = answers(server, message(b"p", b"c=biws,r=abc,p=proof"))
    assert _messages.sqlstate(message(kind, body)) == "28P01"


def test_a_request_to_cancel_has_no_answer():
    """As with any server."""
    assert answers(StubServer(7, "trust", {}), CANCEL) == []


def test_statements_are_answered_with_their_tags():
    """Nothing was found, nothing changed."""
    assert queries("SELECT 1", "insert into x values (1)", "UPDATE x", "RESET ALL", "/* */", "") == [
        "SELECT 0 I",
        "INSERT 0 0 I",
        "UPDATE 0 I",
        "RESET I",
        " I",
        " I",
    ]


def test_transactions_begin_and_end():
    """With all the words for it; one that has failed can only be rolled back."""
    assert queries("BEGIN", "SELECT 1", "ROLLBACK TO SAVEPOINT x", "COMMIT") == [
        "BEGIN T",
        "SELECT 0 T",
        "ROLLBACK T",
        "COMMIT I",
    ]
    assert queries("START TRANSACTION", INVALID.decode(), "SELECT 1", "END", "SELECT 1") == [
        "START TRANSACTION T",
        "42601 E",
        "25P02 E",
        "ROLLBACK I",
        "SELECT 0 I",
    ]
    assert queries("begin", INVALID.decode(), "rollback to savepoint x", "abort") == [
        "BEGIN T",
        "42601 E",
        "ROLLBACK T",
        "ROLLBACK I",
    ]


def test_a_prepared_statement_takes_as_many_texts_as_it_names():
    """And returns no rows."""
    asked = message(b"P", b"s\0SELECT $2 || $1\0\0\0"), message(b"D", b"Ss\0")
    assert answers(ready(), *asked) == [(b"1", b""), (b"t", struct.pack("!hii", 2, 25, 25)), (b"n", b"")]
    executed = message(b"B", b"\0s\0"), message(b"D", b"P\0"), message(b"E", b"\0\0\0\0\0"), message(b"S")
    assert answers(ready(), asked[0], *executed) == [
        (b"1", b""),
        (b"2", b""),
        (b"n", b""),
        (b"C", b"SELECT 0\0"),
        (b"Z", b"I"),
    ]
    assert answers(ready(), message(b"H"), message(b"C", b"Ss\0"), message(b"S")) == [(b"3", b""), (b"Z", b"I")]


def test_after_an_error_everything_is_skipped_until_the_next_sync():
    """As the protocol has it."""
    failed = message(b"P", b"\0" + INVALID + b"\0\0\0"), message(b"B", b"\0\0"), message(b"E", b"\0\0\0\0\0")
    (kind, _), last = answers(ready(), *failed, message(b"S"))
    assert (kind, last) == (b"E", (b"Z", b"I"))
