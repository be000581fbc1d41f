"""A password that a migration or the command line is given appears in no error, no traceback with locals, and no output."""

from __future__ import annotations

import asyncio
import base64
import os
import shlex
import signal
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from migration_tools import program, run, start

from resilient_pool import ConfigurationError, MigrationFailedError, run_migration
from resilient_pool.testing import EmbeddedPostgres

CANARY = "c@n/a:r%y-7391"
FORMS = (CANARY, quote(CANARY, safe=""), CANARY[:7], CANARY[7:], quote(CANARY, safe="")[:9])
QUOTED = quote(CANARY, safe="")


def ignore(_line: str) -> None:
    """Ignore a line of output."""


def report(error: BaseException) -> str:
    """What an error report with captured locals shows, but for the frames of this file."""
    captured = traceback.TracebackException.from_exception(error, capture_locals=True)
    todo, seen = [captured], []
    while todo:
        link = todo.pop()
        seen.append(link)
        link.stack[:] = [frame for frame in link.stack if frame.filename != __file__]
        todo += [each for each in (link.__cause__, link.__context__) if each is not None and each not in seen]
    return "".join(captured.format(chain=True)) + repr(error) + str(getattr(error, "__notes__", ""))


def assert_clean(text: str) -> None:
    for form in FORMS:
        assert form not in text


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> str:
    """The DSN of a role whose password is the canary."""
    name = f"telling_{uuid.uuid4().hex[:8]}"
    await postgres.create_role(name, CANARY)
    return f"postgresql://{name}:{QUOTED}@{postgres.host}:{postgres.port}/postgres"


@pytest.mark.parametrize("source", ["dsn", "environment", "command"])
async def test_a_command_that_failed_tells_no_secret(dsn, source, monkeypatch):
    """Neither its environment nor its arguments are in a local variable of a frame."""
    command = program("raise SystemExit(3)")
    options = {"dsn": dsn} if source == "dsn" else {}
    if source != "dsn":
        monkeypatch.setenv("DATABASE_URL", dsn)
    if source == "command":
        command = [*command, dsn, f"--password={CANARY}"]
    with pytest.raises(MigrationFailedError) as caught:
        await run_migration(command, on_line=ignore, **options)
    assert_clean(report(caught.value))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 1.0])
async def test_a_command_that_was_cancelled_tells_no_secret(dsn, delay):
    """Whenever that happens: while the database is asked, while the command is started, or while it runs."""
    command = [*program("import time; time.sleep(60)"), dsn]
    running = asyncio.ensure_future(run_migration(command, dsn=dsn, on_line=ignore, stop_within=0.2))
    await asyncio.sleep(delay)
    running.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await running
    assert_clean(report(caught.value))


async def test_a_command_is_seen_with_its_arguments_once_in_the_process_list(dsn, tmp_path):
    """The supervisor gets it through a pipe."""
    own = (
        "import contextlib, pathlib\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    with contextlib.suppress(OSError):  # the process has just ended\n"
        "        print(path.read_text())"
    )
    mark = uuid.uuid4().hex
    lines: list[str] = []
    await run_migration([*program(own), mark], dsn=dsn, on_line=lines.append)
    assert "\n".join(lines).count(mark) == 1


@pytest.mark.parametrize("word", ["a b", "ü", "\udcff", "-", "'\"", "a\nb", "{}"])
async def test_a_command_gets_its_words_and_its_url_as_they_are(postgres, word, monkeypatch):
    """Whatever bytes they are, and with a foreign scheme and options untouched."""
    url = f"postgresql+asyncpg://{postgres.host}:{postgres.port}/postgres?user=postgres"
    source = "import os, sys; assert os.fsencode(sys.argv[1]).hex() == sys.argv[2]; assert os.environ['DATABASE_URL'] == sys.argv[3]"
    await run_migration([*program(source), word, os.fsencode(word).hex(), url], dsn=url, on_line=ignore)


def url() -> str:
    return f"postgresql://me:{QUOTED}@host/db"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: run_migration(url()), id="the URL for the command"),
        pytest.param(lambda: run_migration([url()]), id="the URL for the command's only word"),
        pytest.param(lambda: run_migration(url().partition("//")[2]), id="the URL without its scheme"),
        pytest.param(lambda: run_migration(Path(url())), id="the URL as a path"),
        pytest.param(lambda: run_migration(["nowhere", url()]), id="no such command"),
        pytest.param(lambda: run_migration(f"psql '{url()}"), id="a quotation without an end"),
        pytest.param(lambda: run_migration([url(), 3]), id="a word that is no text"),
        pytest.param(lambda: run_migration({url()}), id="a set"),
        pytest.param(lambda: run_migration(["true", url() + "\0"]), id="a word with a character of code 0"),
        pytest.param(lambda: run_migration(["true", url()], stop_within=-1.0), id="stop_within"),
        pytest.param(lambda: run_migration(["true", url()], dsn=url(), lock=""), id="lock"),
        pytest.param(lambda: run_migration(["true", url()], dsn=url(), deadline=-1.0), id="deadline"),
        pytest.param(lambda: run_migration(["true", url()], dsn=url(), timeout=float("nan")), id="timeout"),
        pytest.param(lambda: run_migration(["true"], dsn=url().replace("postgresql", "mysql")), id="scheme"),
        pytest.param(lambda: run_migration(["true"], dsn=url().replace("%", "@")), id="not quoted"),
        pytest.param(lambda: run_migration(["true"], dsn=["x", url()]), id="a list for the dsn"),
    ],
)
async def test_a_wrong_argument_is_refused_without_a_secret(call: Callable[[], object]):
    """Before the database is woken; neither the message nor a traceback with locals quotes it."""
    with pytest.raises(ConfigurationError) as caught:
        await call()
    assert_clean(report(caught.value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_migration("true", dns=url()), "unknown argument 'dns' of run_migration(); did you mean 'dsn'?"),
        (lambda: run_migration("true", tiemout=1, dsn=url()), "did you mean 'timeout'?"),
        (lambda: run_migration("true", url()), "by name"),
    ],
)
async def test_an_unknown_argument_is_named_with_the_nearest_and_without_its_value(call, message):
    """When the call is awaited; neither the message nor a traceback with locals quotes the value."""
    with pytest.raises(TypeError) as caught:
        await call()
    assert message in str(caught.value)
    assert_clean(report(caught.value))


def forms_of(password: str) -> list[str]:
    """How a program may show a password."""
    return [
        password,
        quote(password, safe=""),
        quote(password),
        repr(password),
        shlex.quote(password),
        f"jdbc:postgresql://host/db?user=me&password={quote(password, safe='')}",
        f"user=me password='{password}' host=db",
        f"PGPASSWORD={shlex.quote(password)}",
        base64.b64encode(password.encode()).decode(),
        base64.b64encode(f"me:{password}".encode()).decode(),
        base64.urlsafe_b64encode(f"app:{password}".encode()).decode(),
        password.encode().hex(),
    ]


@pytest.mark.parametrize("password", ["c@n'a\"r%y-7391", "pl4in-7391word"])
async def test_a_password_is_hidden_in_every_form_in_which_programs_show_it(postgres, password):
    """Quoted for a URL, a shell or SQL, in pairs, in base64 and in hexadecimal digits."""
    name = f"forms_{uuid.uuid4().hex[:8]}"
    await postgres.create_role(name, password)
    dsn = f"postgresql://{name}:{quote(password, safe='')}@{postgres.host}:{postgres.port}/postgres"
    forms = forms_of(password)
    lines: list[str] = []
    await run_migration(
        [*program("import sys; print(*sys.argv[1:], sep='\\n')"), *forms], dsn=dsn, on_line=lines.append
    )
    shown = "\n".join(lines)
    for form in [password, quote(password, safe=""), repr(password)[1:-1], *forms[8:]]:
        assert form not in shown, shown


# The command line


@pytest.mark.parametrize(
    "line",
    [
        "{url}",
        "wait {url}",
        "wait --dns {url}",
        "wait --dns={url}",
        "wait --ds {url}",
        "wait --ds={url}",
        "wait --d={url}",
        "wait --password {password}",
        "wait -W{password}",
        "wait --timeout {url}",
        "wait --json={url}",
        "wait --dsn {bare}",
        "wait --dsn user=me_password={password}",
        "doctor {url}",
        "doctor --min-size={url}",
        "doctor --max-size {url}",
        "migrate {url}",
        "migrate {bare}",
        "migrate a b {url}",
        "migrate psql {url} -f x",
        "migrate --dns {url} -- true",
        "migrate {url} -- true",
        "migrate -- {url}",
        "migrate -- {bare}",
        "migrate --attempts {url} -- true",
        "migrate --no-lock={url} -- true",
        "migrate --stop-within={url} -- true",
        "migrate ./{url}",
        "wait --dsn {url} {url}",
        "wait -- {url}",
        "demo {url}",
        "demo --seconds {url}",
        "demo --dsn={url}",
    ],
)
def test_a_wrong_command_line_shows_no_dsn(line, capsys, monkeypatch):
    """The status is 2, and the message does without what may hold a password."""
    from resilient_pool.cli.main import main

    monkeypatch.delenv("DATABASE_URL", raising=False)
    words = [word.format(url=url(), password=CANARY, bare=url().partition("//")[2]) for word in line.split()]
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    shown = "".join(capsys.readouterr())
    assert status == 2, shown
    assert_clean(shown)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wait --dns x", "unknown option --dns; did you mean '--dsn'?"),
        ("wait --tiemout=3", "unknown option --tiemout; did you mean '--timeout'?"),
        ("wait --time 3", "unknown option --time; did you mean '--timeout'?"),
        ("migrate alembic upgrade head --sql", "a command stands behind --"),
        ("wait somewhere", "unexpected arguments, 1 of them"),
        ("migrate postgresql://db/shop", "migrate takes a directory of *.sql files, not a URL"),
        ("doctor --min-size 3 --max-size 2", "min_size"),
        ("doctor --min-size -1", "min_size"),
        ("doctor --max-inactive-connection-lifetime nan", "max_inactive_connection_lifetime"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(line, message, capsys, monkeypatch):
    """And what was meant, before the database is waited for."""
    from resilient_pool.cli.main import main

    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres@127.0.0.1:1/postgres")
    try:
        status = main(line.split())
    except SystemExit as end:
        status = end.code
    shown = "".join(capsys.readouterr())
    assert (status, message in shown) == (2, True), shown


@pytest.mark.parametrize("arguments", [["wait"], ["doctor"], ["migrate", "--", "sleep", "60"]])
async def test_an_interrupted_command_line_ends_without_a_traceback(arguments, dsn):
    """While the database is waited for, and while the command runs."""
    away = dsn if "migrate" in arguments else f"postgresql://me:{QUOTED}@127.0.0.1:1/postgres"
    process = await start(*arguments, dsn=away)
    assert process.stderr is not None
    first = await asyncio.wait_for(process.stderr.readline(), 20)
    process.send_signal(signal.SIGINT)
    output, errors = await asyncio.wait_for(process.communicate(), 20)
    shown = (first + output + errors).decode()
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    assert_clean(shown)


async def test_the_doctor_takes_a_min_size_alone(postgres):
    """As much as that is the max_size then, if it is more than the pool's own."""
    status, output, errors = await run("doctor", "--min-size", "20", dsn=postgres.dsn())
    assert (status, errors) == (0, "")
    assert "min_size=20 keeps connections open" in output
