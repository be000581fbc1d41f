"""The output of a command: whole lines, no secrets, whatever the pieces in which it comes."""

from __future__ import annotations

import pytest

from resilient_pool.config.secrets import Secret
from resilient_pool.migrations.command import OutputLines, never_failing, secrets_around

CANARY = "c@n/a:r%y-7391"


def scanner(data: bytes, size: int, secrets=()) -> list[str]:
    emitted = []
    lines = OutputLines(secrets, emitted.append)
    for start in range(0, len(data), size):
        lines.feed(data[start : start + size])
    lines.end()
    assert list(lines.emitted) == emitted
    return emitted


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_lines_are_emitted_whole_and_without_secrets_however_they_are_cut(size):
    """Also a letter of several bytes is put together, and a last line without an end is emitted."""
    data = f"one\r\n\nthe password is {CANARY}!\nfür".encode()
    assert scanner(data, size, [Secret(CANARY)]) == ["one", "", "the password is ****!", "für"]


def test_nothing_is_emitted_before_its_line_has_ended():
    """The rest of a secret might still come."""
    emitted = []
    lines = OutputLines([Secret(CANARY)], emitted.append)
    lines.feed(CANARY[:7].encode())
    assert emitted == []
    lines.feed(CANARY[7:].encode() + b"\n")
    assert emitted == ["****"]


@pytest.mark.parametrize("before", range(65536 - 20, 65536, 6))
def test_an_endless_line_is_cut_short_and_tells_no_part_of_a_secret(before):
    """Wherever in the secret the limit falls; the line after it is emitted again."""
    (line, after) = scanner(b"x" * before + CANARY.encode() * 10 + b"\nafter", 5000, [Secret(CANARY)])
    assert line.endswith("x (the line goes on)")
    assert not any(CANARY[start : start + 4] in line for start in range(len(CANARY) - 3))
    assert after == "after"


def test_a_sink_that_fails_gets_no_more_lines(caplog):
    """The migration goes on, and its last lines are kept; of a broken pipe no traceback is shown."""
    calls = []

    def broken(line: str) -> None:
        calls.append(line)
        raise BrokenPipeError

    lines = OutputLines((), never_failing(broken))
    lines.feed(b"one\ntwo\n")
    assert calls == ["one"]
    assert list(lines.emitted) == ["one", "two"]
    assert "can no longer be written: BrokenPipeError()" in caplog.text
    assert "Traceback" not in caplog.text


def test_passwords_are_found_in_the_urls_of_arguments_and_environment():
    """As they are written, and unquoted."""
    environment = {"PGPASSWORD": "first", "SHOP_URL": "mysql://me:sec%2Fond@host/db", "HOME": "/home/app"}
    found = secrets_around(["--url=postgresql://me:third@host/db", "plain"], environment)
    assert {secret.reveal() for secret in found} == {"first", "sec%2Fond", "sec/ond", "third"}


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("DB_PASSWORD", "a b", "a b"),
        ("mysql_passwd", "word", "word"),
        ("OPTIONS", "host=db password=word user=me", "word"),
        ("OPTIONS", "host=db password = 'a \\'b' user=me", "a 'b"),
        ("SHOP_URL", "postgresql://host/db?user=me&password=a%20b&sslmode=require", "a b"),
    ],
)
def test_passwords_are_found_by_the_name_of_a_variable_and_in_pairs(name, value, secret):
    """Where people put them, other than into URLs."""
    assert secret in {found.reveal() for found in secrets_around([], {name: value})}
    assert list(secrets_around([], {"DB_PASSWORD": "", "PASSWORD_FILE": "/run/it", "NOTE": "password="})) == []
