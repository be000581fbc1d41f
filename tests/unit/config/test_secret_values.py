from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import time
from urllib.parse import quote, quote_plus

import pytest

from resilient_pool.config.secrets import MASK, Secret, scrub

CANARY = "Zq7/wV:xJ@kP%mT#gY?bN[hF]cR+dL sX'oK\"uW\\yGé"
PIECES = re.findall(r"[A-Za-z0-9]{2,}", CANARY)


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        lambda secret: f"{secret}",
        lambda secret: f"{secret!r:>40}",
        lambda secret: f"{secret:>40}",
        lambda secret: "%s" % secret,  # noqa: UP031 - one of the ways
    ],
)
def test_a_secret_is_masked_however_it_is_shown(show):
    """No way of turning it into text reveals it or its length."""
    shown = show(Secret(CANARY))
    assert MASK in shown
    assert shown == show(Secret("x"))


def test_a_secret_reveals_itself_when_asked_to():
    """What was put in comes out."""
    assert Secret(CANARY).reveal() == CANARY


def test_a_secret_is_no_text():
    """It is not a `str`, and cannot be joined, measured or iterated as one."""
    secret = Secret(CANARY)
    assert not isinstance(secret, str)
    for use in (len, iter, lambda it: it + "x", "".join, json.dumps, pickle.dumps):
        with pytest.raises(TypeError) as caught:
            use(secret)
        assert not any(piece in str(caught.value) for piece in PIECES)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_cannot_be_pickled(protocol):
    """Pickling raises instead of writing it."""
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(Secret(CANARY), protocol)


def test_a_secret_lists_no_attribute_that_shows_it():
    """Neither `vars` nor a walk over its attributes finds the text."""
    secret = Secret(CANARY)
    with pytest.raises(TypeError):
        vars(secret)
    with pytest.raises(TypeError):
        secret.__getstate__()
    assert CANARY not in [value for _, value in inspect.getmembers(secret)]
    assert not any(piece in repr(inspect.getmembers(secret)) for piece in PIECES[:4])


def test_a_copy_of_a_secret_is_the_secret():
    """Copying makes no second place where it is held."""
    secret = Secret(CANARY)
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret


def test_secrets_are_equal_when_their_texts_are():
    """Equality and hash follow the text, and no text equals a secret."""
    assert Secret(CANARY) == Secret(CANARY)
    assert hash(Secret(CANARY)) == hash(Secret(CANARY))
    assert Secret(CANARY) != Secret("other")
    assert Secret(CANARY) != CANARY
    assert hash(Secret("x")) != hash("x")


def test_only_text_can_be_a_secret():
    """The error names the type, not the value."""
    with pytest.raises(TypeError, match="a secret must be a str, not bytes") as caught:
        Secret(b"Zq7")
    assert "Zq7" not in str(caught.value)


def lowered(text):
    return re.sub(r"%[0-9A-F]{2}", lambda escape: escape[0].lower(), text)


@pytest.mark.parametrize(
    "written",
    [
        CANARY,
        quote(CANARY),
        quote(CANARY, safe=""),
        quote_plus(CANARY),
        lowered(quote(CANARY, safe="")),
        repr(CANARY)[1:-1],
        ascii(CANARY)[1:-1],
        json.dumps(CANARY)[1:-1],
        json.dumps(CANARY, ensure_ascii=False)[1:-1],
        CANARY.replace("'", "''"),
        CANARY[:24],
        CANARY[-24:],
        CANARY[8:30],
    ],
)
def test_a_known_secret_is_taken_out_however_it_is_written(written):
    """Whole, in part, URL-quoted in each way, and escaped: no piece of it is left."""
    scrubbed = scrub(f"before <{written}> after", [Secret(CANARY)])
    assert not any(piece in scrubbed for piece in PIECES), scrubbed
    assert scrubbed.startswith("before <****")
    assert scrubbed.endswith("> after")


@pytest.mark.parametrize(
    ("secret", "text", "scrubbed"),
    [
        ("", "nothing is secret", "nothing is secret"),
        ("ab", "a cab", "a c****"),
        ("hunter2", "hunter2!", "****!"),
        ("hunter2", "the hunt is on", "the **** is on"),
        ("hunter2", "a bunt", "a bunt"),
        ("hunter2hunter2", "hunter2hunter2", "****"),
        ("hunter2", "hunter2hunter2", "****"),
        ("correcthorsebattery", "incorrect horse", "incorrect horse"),
        ("correcthorsebattery", "host horsebattery not found", "host **** not found"),
    ],
)
def test_a_part_is_half_of_a_secret_but_four_to_eight_characters(secret, text, scrubbed):
    """Shorter runs are left, so that the text stays readable."""
    assert scrub(text, [Secret(secret)]) == scrubbed


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("postgresql://u:s3cret@h/db", "postgresql://u:****@h/db"),
        ("to postgres://u:s3:c@re/t@h:5/db?x=1 failed", "to postgres://u:****@h:5/db?x=1 failed"),
        ("'redis://:s3cret@h'", "'redis://:****@h'"),
        ("postgresql+asyncpg://u:s3cret@h", "postgresql+asyncpg://u:****@h"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("https://host:8080/path", "https://host:8080/path"),
        ("host=h password=s3cret user=u", "host=h password=**** user=u"),
        ("password = 's3 cr\\'et' x", "password = **** x"),
        ("connect(password='s3 cret', host='h')", "connect(password=****, host='h')"),
        ('PGPASSWORD="s3 cret" psql', "PGPASSWORD=**** psql"),
        ("sslpassword=s3cret", "sslpassword=****"),
        ("?PassWord=s3cret", "?PassWord=****"),
        ("{'password': 's3 cret', 'x': 1}", "{'password': ****, 'x': 1}"),
        ('{"password": "s3\\" cret"}', '{"password": ****}'),
        ("ALTER ROLE r PASSWORD 's3''cret' VALID", "ALTER ROLE r PASSWORD **** VALID"),
        ('password authentication failed for user "u"', 'password authentication failed for user "u"'),
    ],
)
def test_passwords_are_taken_out_of_text_even_when_nobody_knows_them(text, scrubbed):
    """URLs and `password=...` pairs lose their password and nothing else."""
    assert scrub(text) == scrubbed


def test_scrubbing_leaves_nothing_of_the_secret_in_the_regular_expressions_cache():
    """No pattern is made of a secret, since the `re` module remembers patterns."""
    scrub("some text", [Secret("remembered-secret")])
    assert "remembered-secret" not in repr(vars(re).get("_cache")) + repr(vars(re).get("_cache2"))


def test_several_secrets_are_taken_out_of_one_text():
    """Each of them, in any order."""
    assert scrub("first-one and second-two", [Secret("second-two"), Secret("first-one")]) == "**** and ****"


def test_a_long_word_takes_no_longer_than_a_long_text():
    """Commands write keys and images in base64; the time for them must not grow with the square of their length."""
    word = "x" * 60_000
    started = time.process_time()
    assert scrub(word) == word
    assert scrub(f"{word}_password=secret") == f"{word}_password=****"
    assert scrub(f"{word}://me:secret@host") == f"{word}://me:****@host"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("postgresql:/u:s3cret@h/db", "postgresql:/u:****@h/db"),
        ("PosixPath('postgresql:/u:s3cret@h/db')", "PosixPath('postgresql:/u:****@h/db')"),
        ("jdbc:postgresql://u:s3cret@h/db", "jdbc:postgresql://u:****@h/db"),
        ("http://a:1/x?u=postgres://u:s3cret@h", "http://a:****@h"),
    ],
)
def test_the_password_of_a_url_that_became_a_path_or_part_of_another_is_taken_out(text, scrubbed):
    """One slash is what `Path` leaves of two; rather too much is taken out than too little."""
    assert scrub(text) == scrubbed


ADVERSE = {
    "URLs without a user": "http://host:8080/path,",
    "users without a host": "a://b:",
    "an @ after each": "a://b:c@",
    "a scheme of one letter": "a:/",
    "names without values": "password=",
    "blanks behind a name": "password ",
    "open quotes": "password='",
    "three quotes": "pwd='''",
    "quotes of two kinds": "pwd=\"'",
    "escaped quotes": "pwd='\\'",
    "beginnings of the name": "pass",
    "one letter": "a",
    "blanks": " ",
}


@pytest.mark.parametrize("piece", ADVERSE.values(), ids=ADVERSE)
def test_a_long_line_is_scrubbed_in_milliseconds(piece):
    """Twice the length takes about twice the time, also of a line that is written to take long."""
    secrets = [Secret("abcdefgh12345678")]

    def seconds(length):
        text = (piece * (length // len(piece) + 1))[:length] + "@"
        started = time.process_time()
        scrub(text, secrets)
        return time.process_time() - started

    assert min(seconds(65_536) for _ in range(3)) < 0.15
