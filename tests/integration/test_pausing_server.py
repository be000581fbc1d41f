"""PausingServer, seen through plain asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from waiting import eventually

from resilient_pool.testing import EmbeddedPostgres, FaultProxy, PausingServer, TlsCertificates

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
RESUME = 0.4
ALL_WAYS = ("hang", "refuse", "reset", "57P03", "28000")
NOT_THERE = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.TooManyConnectionsError,
)


@pytest.fixture
def pausing(postgres: EmbeddedPostgres):
    """Makes servers, which by default pause only on demand, and closes them."""
    with contextlib.ExitStack() as servers:

        def start(**arguments) -> PausingServer:
            arguments = {"pause_after": None, "resume_seconds": RESUME, **arguments}
            return servers.enter_context(PausingServer(postgres.host, postgres.port, **arguments))

        yield start


@pytest.fixture
async def connect(postgres: EmbeddedPostgres):
    opened = []

    async def connect(server: PausingServer, **arguments) -> asyncpg.Connection:
        dsn = server.dsn(postgres.dsn())
        opened.append(await asyncpg.connect(dsn, **{"ssl": False, "timeout": 10, **arguments}))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.terminate()


async def attempt_until_served(server: PausingServer, connect, pace: float = 0.05) -> Counter[str]:
    """Try again until a connection is there; return what the attempts before it ended with."""
    met: Counter[str] = Counter()
    async with asyncio.timeout(20):
        while True:
            try:
                await connect(server)
            except NOT_THERE as error:
                met[type(error).__name__] += 1
                await asyncio.sleep(pace)
            else:
                return met


def reasons(error: BaseException | None) -> list[type[BaseException]]:
    """The types along the chain: asyncpg hides a reset behind an error of its own, unless it came very early."""
    found = []
    while error is not None:
        found.append(type(error))
        error = error.__cause__ or error.__context__
    return found


def outcomes(server: PausingServer) -> list[str]:
    return [attempt.outcome for attempt in server.attempts]


def events(server: PausingServer) -> list[str]:
    return [entry.event for entry in server.log]


async def test_an_awake_server_is_the_real_one(pausing, connect):
    """Statements pass, the attempt is counted as served, and it is in flight no more."""
    server = pausing()
    assert await (await connect(server)).fetchval("SELECT 1") == 1
    (attempt,) = server.attempts
    assert (attempt.number, attempt.phase, attempt.outcome) == (1, "awake", "served")
    assert attempt.at <= attempt.settled_at <= time.monotonic()
    assert (server.in_flight, server.peak_in_flight, server.open_connections) == (0, 1, 1)
    assert (server.phase, server.pauses) == ("awake", 0)


async def test_it_pauses_when_no_client_has_been_connected_for_a_while(pausing, connect):
    """The time counts from the end of the last connection, and an open one prevents it however idle."""
    server = pausing(pause_after=0.3)
    connections = [await connect(server), await connect(server)]
    with pytest.raises(TimeoutError, match=r"not paused after 0\.6 s but awake, with 2 connections open"):
        await server.until("paused", timeout=0.6)
    await connections[0].close()
    with pytest.raises(TimeoutError, match="1 connections open"):
        await server.until("paused", timeout=0.6)
    await connections[1].close()
    await server.until("paused", timeout=5)
    last_left = max(entry.at for entry in server.log if entry.event == "left")
    first_served = server.attempts[0].settled_at
    (paused,) = [entry for entry in server.log if entry.event == "paused" and entry.at > first_served]
    assert paused.at - last_left >= 0.29


async def test_it_pauses_when_no_client_ever_connects(pausing):
    """The first pause needs no connection before it."""
    await pausing(pause_after=0.05).until("paused", timeout=5)


async def test_an_attempt_that_hangs_is_served_after_the_resume(pausing, connect):
    """The first attempt wakes the server, and all that wait get their sessions when it is up."""
    server = pausing(resume_seconds=1.5)
    server.pause()
    began = time.monotonic()
    await asyncio.gather(*(connect(server) for _ in range(3)))
    assert time.monotonic() - began >= 1.5
    assert outcomes(server) == ["served"] * 3
    assert [attempt.phase for attempt in server.outage_attempts] == ["paused", "resuming", "resuming"]
    assert server.peak_in_flight == 3
    assert [event for event in events(server) if event in {"paused", "resuming", "resumed"}] == [
        "paused",
        "resuming",
        "resumed",
    ]


async def test_a_client_that_stops_waiting_still_wakes_the_server(pausing, connect, postgres):
    """It is noted as having given up at once, and the real server never hears of it."""
    server = pausing(resume_seconds=60)
    server.pause()
    with pytest.raises(TimeoutError):
        await connect(server, timeout=0.1, server_settings={"application_name": "impatient"})
    await eventually(lambda: outcomes(server) == ["gave up"])
    assert (server.phase, server.in_flight) == ("resuming", 0)
    server.resume()
    assert server.peak_in_flight == 0
    async with postgres.admin() as admin:
        assert not await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'impatient'")


@pytest.mark.parametrize(
    ("away", "error", "outcome"),
    [
        ("reset", ConnectionResetError, "reset"),
        ("57P03", asyncpg.CannotConnectNowError, "57P03"),
        ("28000", asyncpg.InvalidAuthorizationSpecificationError, "28000"),
    ],
)
async def test_each_way_of_being_away_is_what_it_says(pausing, connect, away, error, outcome):
    """Every attempt before the resume ends so, is counted so, and the first after it is served."""
    server = pausing(away=away, resume_seconds=60)
    server.pause()
    for _ in range(3):
        with pytest.raises(NOT_THERE) as failure:
            await connect(server)
        assert error in reasons(failure.value)
    assert outcomes(server) == [outcome] * 3
    server.resume()
    await connect(server)
    assert outcomes(server) == [outcome] * 3 + ["served"]
    assert len(server.outage_attempts) == 3


@pytest.mark.parametrize("tls", [False, True])
async def test_the_missing_pg_hba_entry_reads_like_the_real_one(pausing, connect, tls):
    """Its text has the client's own host, user and database, and what a server that knows TLS says of the encryption."""
    certificates = TlsCertificates() if tls else None
    server = pausing(away="28000", tls=certificates, resume_seconds=60)
    server.pause()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as refusal:
        await connect(server, ssl=certificates.client_context() if certificates else "prefer", user="me", database="my")
    expected = 'no pg_hba.conf entry for host "127.0.0.1", user "me", database "my"'
    assert str(refusal.value) == expected + ", SSL encryption" * tls
    if tls:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as refusal:
            await connect(server, ssl=False, user="me", database="my")
        assert str(refusal.value) == expected + ", no encryption"


async def test_a_client_that_asks_for_tls_first_is_answered_like_by_a_real_server(pausing):
    """A single "N" for the request, and the FATAL error only for the startup message, then the end."""
    server = pausing(away="57P03", resume_seconds=60)
    server.pause()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"\0\0\0\x08\x04\xd2\x16\x2f")
    assert await asyncio.wait_for(reader.readexactly(1), 5) == b"N"
    writer.write(b"\0\0\0\x11\0\x03\0\0user\0me\0\0")
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer[:1] == b"E"
    assert answer[5:].split(b"\0")[:4] == [b"SFATAL", b"VFATAL", b"C57P03", b"Mthe database system is starting up"]
    writer.close()
    await writer.wait_closed()


async def test_a_server_that_refuses_is_woken_by_an_attempt_that_it_resets(pausing, connect):
    """All others are refused by the kernel until it is up, which only the client can count."""
    server = pausing(away="refuse", resume_seconds=60)
    server.pause()
    with pytest.raises(NOT_THERE) as failure:
        await connect(server)
    assert ConnectionResetError in reasons(failure.value)
    await eventually(lambda: "port closed" in events(server))
    for _ in range(4):
        with pytest.raises(ConnectionRefusedError):
            await connect(server)
    assert outcomes(server) == ["reset"]
    server.resume()
    await eventually(lambda: "port open" in events(server))
    await connect(server)
    assert outcomes(server)[-1] == "served"
    assert len(server.outage_attempts) == 1


async def test_no_attempt_is_counted_twice_or_forgotten_around_the_opening_port(pausing, connect):
    """What clients saw, less what the kernel refused, and what the server counted are the same number, many times over."""
    server = pausing(away="refuse", resume_seconds=0.05)
    for round_ in range(1, 11):
        server.pause()
        with pytest.raises(NOT_THERE):
            await connect(server)
        await eventually(lambda round_=round_: events(server).count("port closed") == round_)
        before = len(server.attempts)
        met = await asyncio.gather(*(attempt_until_served(server, connect, pace=0.005) for _ in range(5)))
        made = 5 + sum(sum(each.values()) for each in met)
        expected = made - sum(each["ConnectionRefusedError"] for each in met)
        await eventually(lambda before=before, expected=expected: len(server.attempts) - before >= expected)
        assert len(server.attempts) - before == expected


async def test_no_attempt_is_counted_twice_or_forgotten_around_the_closing_port(pausing, connect):
    """A connection that the kernel has accepted when the port is closed, and the server has not, is reset without being seen."""
    server = pausing(away="refuse", resume_seconds=0.05)
    for _ in range(10):
        server.pause()
        before = len(server.attempts)
        met = await asyncio.gather(*(attempt_until_served(server, connect, pace=0.005) for _ in range(5)))
        most = sum(sum(each.values()) - each["ConnectionRefusedError"] for each in met)
        await eventually(lambda before=before: outcomes(server)[before:].count("served") == 5)
        assert 1 <= outcomes(server)[before:].count("reset") <= most
        assert len(server.attempts) - before == 5 + outcomes(server)[before:].count("reset")


async def test_a_mix_is_the_same_for_the_same_seed(pausing, connect):
    """Attempts draw from all ways, in an order that the seed decides."""

    async def drawn(seed: int) -> list[str]:
        server = pausing(away=("reset", "57P03", "28000"), seed=seed, resume_seconds=60)
        server.pause()
        for _ in range(12):
            with pytest.raises(NOT_THERE):
                await connect(server)
        return outcomes(server)

    first = await drawn(1)
    assert await drawn(1) == first
    assert await drawn(2) != first
    assert set(first) == {"reset", "57P03", "28000"}


async def test_a_mix_of_everything_ends_with_a_connection(pausing, connect):
    """Also one that closes its port now and then opens it again, while it is still away."""
    server = pausing(away=ALL_WAYS, seed=5, resume_seconds=3.0)
    server.pause()
    await asyncio.gather(*(attempt_until_served(server, connect, pace=0.1) for _ in range(3)))
    seen = set(outcomes(server))
    assert {"reset", "57P03", "28000", "served"} <= seen
    resumed = next(entry.at for entry in server.log if entry.event == "resumed")
    assert min(entry.at for entry in server.log if entry.event == "port open") < resumed


async def test_only_so_many_connections_are_allowed_at_first(pausing, connect):
    """Others get 53300 until one of the allowed leaves or the time is over."""
    server = pausing(capacity=2, capacity_seconds=2.5)
    connections = [await connect(server) for _ in range(3)]  # no limit before the first resume
    for connection in connections:
        await connection.close()
    server.pause()
    allowed = [await connect(server), await connect(server)]
    with pytest.raises(asyncpg.TooManyConnectionsError, match="sorry, too many clients already"):
        await connect(server)
    assert outcomes(server)[-1] == "53300"
    await allowed[0].close()
    await eventually(lambda: server.open_connections == 1)
    await connect(server)
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await connect(server)
    await eventually(lambda: "no limit" in events(server))
    await connect(server)


async def test_those_who_waited_for_the_resume_are_limited_too(pausing, connect):
    """As many as are allowed are admitted, in any order."""
    server = pausing(capacity=2, capacity_seconds=30)
    server.pause()
    results = await asyncio.gather(*(connect(server) for _ in range(6)), return_exceptions=True)
    assert Counter(type(result).__name__ for result in results) == {"Connection": 2, "TooManyConnectionsError": 4}
    assert Counter(outcomes(server)) == {"served": 2, "53300": 4}
    assert server.peak_in_flight == 6


async def test_what_the_real_server_says_is_counted_as_what_it_is(pausing, connect):
    """An unknown database is that and no outage, and a request to cancel is an attempt of its own kind."""
    server = pausing()
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await connect(server, database="nowhere")
    connection = await connect(server)
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(30)", timeout=0.1)
    assert await connection.fetchval("SELECT 1") == 1
    assert outcomes(server) == ["3D000", "served", "cancel"]


async def test_an_unreachable_server_behind_it_is_a_failed_attempt(postgres, connect):
    """The client is reset, and the attempt does not stay in flight."""
    with FaultProxy(postgres.host, postgres.port) as gone:
        gone.refuse()
        with PausingServer(gone.host, gone.port, pause_after=None) as server:
            with pytest.raises(NOT_THERE):
                await connect(server)
            await eventually(lambda: outcomes(server) == ["failed"])


async def test_idle_sessions_are_ended_by_the_server_itself(pausing, connect):
    """The setting can be read by the session, the reason is 57P05, and the server pauses after that."""
    server = pausing(pause_after=0.1, idle_session_timeout=1.5)
    connection = await connect(server)
    heard = asyncio.get_running_loop().create_future()
    connection.add_termination_listener(lambda _: heard.set_result(True))
    assert await connection.fetchval("SHOW idle_session_timeout") == "1500ms"
    await asyncio.wait_for(heard, 5)
    await server.until("paused", timeout=5)
    own = await connect(server, server_settings={"idle_session_timeout": "7000"})
    assert await own.fetchval("SHOW idle_session_timeout") == "7s"


async def test_pausing_at_once_ends_idle_sessions_and_waits_for_busy_ones(pausing, connect):
    """It is as if the idle ones had timed out; a transaction or a running statement is never cut."""
    server = pausing()
    idle, busy = await connect(server), await connect(server)
    transaction = busy.transaction()
    await transaction.start()
    with pytest.raises(RuntimeError, match="cannot pause while awake with 1 connections in use"):
        server.pause(timeout=0.1)
    assert await idle.fetchval("SELECT 1") == 1
    await transaction.rollback()
    begun = time.monotonic()
    running = asyncio.ensure_future(busy.execute("SELECT pg_sleep(0.3)"))
    await eventually(lambda: server.bytes_since(begun) > 0)
    await asyncio.to_thread(server.pause)
    assert await running == "SELECT 1"
    await eventually(lambda: idle.is_closed() and busy.is_closed())
    assert (server.phase, server.open_connections) == ("paused", 0)


async def test_an_idle_session_is_told_why_it_ends(pausing):
    """The last that a paused session's client gets is a FATAL 57P05 and the end of the stream."""
    server = pausing()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    startup = b"\0\x03\0\0user\0postgres\0database\0postgres\0\0"
    writer.write((len(startup) + 4).to_bytes(4, "big") + startup)
    await eventually(lambda: outcomes(server) == ["served"])
    server.pause()
    said = await asyncio.wait_for(reader.read(), 5)
    assert b"SFATAL\0VFATAL\0C57P05\0Mterminating connection due to idle-session timeout\0\0" in said
    writer.close()
    await writer.wait_closed()


async def test_it_can_be_told_to_be_up(pausing, connect):
    """Waiting clients are served at once, and resuming twice changes nothing."""
    server = pausing(resume_seconds=60)
    server.pause()
    waiting = asyncio.ensure_future(connect(server))
    await server.until("resuming", timeout=5)
    with pytest.raises(RuntimeError, match="resuming"):
        server.pause(timeout=0.1)
    server.resume()
    await asyncio.wait_for(waiting, 5)
    server.resume()
    assert events(server).count("resumed") == 1


async def test_a_resume_that_was_due_is_forgotten_when_it_came_early(pausing, connect):
    """It does not end the next pause, which only an attempt may."""
    server = pausing(resume_seconds=1.0)
    server.pause()
    waiting = asyncio.ensure_future(connect(server))
    await server.until("resuming", timeout=5)
    server.resume()
    await waiting
    server.pause()
    with pytest.raises(TimeoutError, match=r"not awake after 1\.5 s but paused"):
        await server.until("awake", timeout=1.5)


async def test_nothing_sent_is_zero_bytes(pausing, connect):
    """Bytes count from the moment asked for, and also those that are not read yet."""
    server = pausing(resume_seconds=60)
    connection = await connect(server)
    quiet_since = time.monotonic()
    assert server.bytes_since(quiet_since) == 0
    assert server.bytes_since(0.0) > 0
    await connection.execute("SELECT 'something to say'")
    assert server.bytes_since(quiet_since) == len("Q....SELECT 'something to say'.")
    await connection.close()
    await eventually(lambda: server.open_connections == 0)
    server.pause()
    while_paused = time.monotonic()
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"hello")
        await eventually(lambda: server.bytes_since(while_paused) == 5)
    assert server.bytes_since(time.monotonic()) == 0


async def test_only_the_time_awake_is_paid_for(pausing, connect):
    """It stands still from the pause to the end of the resume."""
    server = pausing()
    await eventually(lambda: server.awake_seconds > 0.05)
    server.pause()
    awake = server.awake_seconds
    await connect(server)
    (began, paused, resumed) = [e.at for e in server.log if e.event in {"started", "paused", "resumed"}]
    assert awake == pytest.approx(paused - began)
    assert resumed - paused >= RESUME
    await eventually(lambda: server.awake_seconds > awake + 0.05)
    total = server.awake_seconds
    assert total <= time.monotonic() - began - (resumed - paused)


async def test_it_keeps_time_while_the_program_under_test_is_blocked(pausing):
    """The event loop that uses it may block: the server still pauses, and a blocking wait sees it."""
    server = pausing(pause_after=0.1)
    server.wait_until("paused", timeout=5)
    assert server.pauses == 1


async def test_the_log_reads_like_a_story(pausing, connect):
    """Each line has the time, who it is about and what happened."""
    server = pausing()
    server.pause()
    await (await connect(server)).close()
    await eventually(lambda: "left" in events(server))
    lines = [re.sub(r"^ +\d+\.\d{3} s  ", "", line) for line in server.report().splitlines()]
    assert lines == [
        "started",
        "paused",
        "attempt 1: arrived",
        "resuming",
        "resumed",
        "attempt 1: served",
        "attempt 1: left",
    ]


@pytest.mark.parametrize("phase", ["awake", "paused", "resuming"])
async def test_closing_leaves_nothing_behind(postgres, connect, phase):
    """Neither the port nor the thread nor a session, in any phase, and the counts can still be read."""
    threads = threading.active_count()
    async with PausingServer(postgres.host, postgres.port, pause_after=None, away=("hang", "refuse")) as server:
        connection = await connect(server)
        pid = connection.get_server_pid()
        waiting = None
        if phase != "awake":
            server.pause()
        if phase == "resuming":
            waiting = asyncio.ensure_future(connect(server))
            await server.until("resuming", timeout=5)
    awake = server.awake_seconds
    if waiting is not None:
        with pytest.raises(NOT_THERE):
            await waiting
    await eventually(connection.is_closed)
    assert threading.active_count() == threads
    assert server.attempts[0].outcome == "served"
    assert (server.in_flight, server.open_connections, server.phase) == (0, 0, phase)
    assert server.awake_seconds == awake
    with pytest.raises(ConnectionRefusedError):
        await connect(server)
    with pytest.raises(RuntimeError, match="closed"):
        server.pause()
    async with postgres.admin() as admin, asyncio.timeout(10):
        while await admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
            await asyncio.sleep(0.01)


async def test_a_closed_server_can_be_started_again(postgres, connect):
    """On the same port, awake, with new counts."""
    server = PausingServer(postgres.host, postgres.port, pause_after=None)
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.attempts
    with server:
        port = server.port
        server.pause()
    with server:
        await connect(server)
        assert (server.port, server.pauses, outcomes(server)) == (port, 0, ["served"])


async def test_the_example_of_the_documentation_runs(capsys):
    """It passes as it stands there, and what it prints ends with the second pause."""
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "PausingServer" in code]
    names: dict[str, Any] = {}
    exec(compile(example, "testing.md", "exec"), names)
    await names["test_my_application_meets_a_sleeping_database"]()
    printed = capsys.readouterr().out
    assert printed.count("paused\n") == 2
    assert printed.endswith("paused\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"away": "sleep"}, "away must be one or more of hang, refuse, reset, 57P03, 28000, not 'sleep'"),
        ({"away": ()}, r"not \(\)"),
        ({"pause_after": -1}, "pause_after must be at least 0, not -1"),
        ({"resume_seconds": float("nan")}, "resume_seconds must be at least 0, not nan"),
        ({"capacity": 0}, "capacity must be at least 1, not 0"),
        ({"capacity_seconds": -0.5}, "capacity_seconds must be at least 0, not -0.5"),
        ({"idle_session_timeout": 0}, "idle_session_timeout must be at least 0.001, not 0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(arguments, message):
    """The message names the argument and the value."""
    with pytest.raises(ValueError, match=message):
        PausingServer("127.0.0.1", 5432, **arguments)
