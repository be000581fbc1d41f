"""Every fault of the proxy as a plain asyncpg connection meets it: without and with TLS, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import gc
import io
import socket
import statistics
import struct
import time

import asyncpg
import pytest
import uvloop
from waiting import eventually

from resilient_pool.testing import EmbeddedPostgres, FaultProxy, TlsCertificates
from resilient_pool.testing._relay import _reset

LOST = (asyncpg.ConnectionDoesNotExistError, OSError, asyncpg.InternalClientError)
BRIEF = 0.15
# What a client says first: its length, the protocol's version, and who it is.
STARTUP = struct.pack("!ii", 23, 196608) + b"user\0postgres\0\0"


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def event_loop_policy(request):
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture(scope="module")
def certificates():
    return TlsCertificates()


@pytest.fixture(params=["plain", "tls"])
def tls(request, certificates):
    return certificates if request.param == "tls" else None


@pytest.fixture
def proxy(postgres: EmbeddedPostgres, tls):
    with FaultProxy(postgres.host, postgres.port, tls=tls) as proxy:
        yield proxy


@pytest.fixture
async def connect(postgres, proxy, tls):
    opened = []

    async def connect(**arguments) -> asyncpg.Connection:
        ssl = tls.client_context() if tls else False
        connection = await asyncpg.connect(proxy.dsn(postgres.dsn()), **{"ssl": ssl, "timeout": 10, **arguments})
        opened.append(connection)
        return connection

    yield connect
    # asyncpg's requests to cancel are tasks; uvloop complains when one is cut off while it still negotiates TLS.
    if pending := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(pending, timeout=5)
    for connection in opened:
        connection.terminate()
    # What asyncpg leaves behind of attempts that were cut short must not be blamed on a later test.
    gc.collect()


@pytest.fixture
async def ledger(postgres: EmbeddedPostgres):
    """A table, and a look at what is in it that does not pass the proxy."""
    async with postgres.admin() as connection:
        await connection.execute("DROP TABLE IF EXISTS ledger; CREATE TABLE ledger (entry int)")

        async def entries() -> list[int]:
            return [row["entry"] for row in await connection.fetch("SELECT entry FROM ledger ORDER BY entry")]

        yield entries


async def gone(postgres: EmbeddedPostgres, pid: int) -> None:
    async with asyncio.timeout(10):
        while await sessions(postgres, pid):
            await asyncio.sleep(0.01)


async def sessions(postgres: EmbeddedPostgres, *pids: int) -> int:
    async with postgres.admin() as connection:
        return await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", list(pids))


async def test_what_is_not_disturbed_passes_whole(connect, proxy, tls):
    """Large answers, COPY, NOTIFY and cursors arrive as without a proxy, encrypted when they should be."""
    connection = await connect()
    encrypted = connection._transport.get_extra_info("ssl_object") is not None
    assert encrypted == (tls is not None)
    assert await connection.fetchval("SELECT length($1::text)", "x" * 3_000_000) == 3_000_000
    assert len(await connection.fetchval("SELECT repeat('y', 3000000)")) == 3_000_000
    await connection.execute("CREATE TEMP TABLE copied (a int)")
    assert await connection.copy_records_to_table("copied", records=[(i,) for i in range(20_000)]) == "COPY 20000"
    heard = asyncio.Event()
    await connection.add_listener("news", lambda *_: heard.set())
    await connection.execute("NOTIFY news")
    await asyncio.wait_for(heard.wait(), 5)
    async with connection.transaction():
        assert [row[0] async for row in connection.cursor("SELECT generate_series(1, 120)")] == list(range(1, 121))
    await connection.close()
    await eventually(lambda: not proxy.connections)
    assert (proxy.attempts, proxy.accepted) == (1, 1)
    assert proxy.bytes_to_server > 3_000_000
    assert proxy.bytes_to_client > 3_000_000


async def test_small_answers_are_not_kept_waiting(connect):
    """Of a hundred round trips most take far less than one delayed acknowledgement of 40 ms."""
    connection, seconds = await connect(), []
    for _ in range(100):
        began = time.monotonic()
        await connection.fetchval("SELECT 1")
        seconds.append(time.monotonic() - began)
    assert statistics.median(seconds) < 0.02


async def test_these_tests_run_on_the_loop_they_are_named_after(event_loop_policy):
    """A run on uvloop is one."""
    expected = "uvloop" if isinstance(event_loop_policy, uvloop.EventLoopPolicy) else "asyncio"
    assert type(asyncio.get_running_loop()).__module__.partition(".")[0] == expected


async def test_a_connection_knows_its_session(connect, proxy):
    """Connections are found by backend pid and distinguished by the client's startup parameters."""
    first = await connect(server_settings={"application_name": "first"})
    second = await connect()
    assert [connection.number for connection in proxy.connections] == [1, 2]
    assert proxy.connection(first.get_server_pid()).parameters["application_name"] == "first"
    assert proxy.connection(second.get_server_pid()).state == "open"
    with pytest.raises(LookupError):
        proxy.connection(1)


async def test_a_cancelled_query_is_cancelled_through_the_proxy(connect, proxy):
    """A cancel request is a connection of its own and reaches the server."""
    connection = await connect()
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(30)", timeout=BRIEF)
    assert await connection.fetchval("SELECT 1") == 1
    assert proxy.attempts == 2


async def test_connections_are_refused_until_the_port_listens_again(connect, proxy):
    """Present connections stay, new ones are refused, and the port is the same afterwards."""
    connection = await connect()
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await connect()
    assert await connection.fetchval("SELECT 1") == 1
    proxy.accept()
    assert proxy.port == port
    await connect()


async def test_a_hanging_listener_never_answers(connect, proxy):
    """Connecting times out, and the connection made before does not notice."""
    connection = await connect()
    proxy.hang()
    with pytest.raises(TimeoutError):
        await connect(timeout=BRIEF)
    assert await connection.fetchval("SELECT 1") == 1
    assert proxy.attempts == 2
    assert proxy.accepted == 1
    proxy.restore()
    await connect()


@pytest.mark.parametrize("then", ["fin", "rst"])
async def test_rejected_connections_are_counted(connect, proxy, then):
    """They end at once, before the server hears of them, and the times of the attempts are known."""
    proxy.reject(then)
    for _ in range(2):
        with pytest.raises(LOST):
            await connect()
    assert (proxy.attempts, proxy.accepted) == (2, 0)
    assert proxy.attempted_at == sorted(proxy.attempted_at)


async def test_a_starting_server_says_so(connect, proxy):
    """The error has the given code, and the next attempt after `restore()` gets through."""
    proxy.answer_with_error("57P03", "the database system is starting up")
    with pytest.raises(asyncpg.CannotConnectNowError, match="starting up"):
        await connect()
    proxy.restore()
    await connect()


async def test_an_orderly_close_is_seen_by_an_idle_client(postgres, connect, proxy):
    """The connection is closed without an answer pending, and its session ends too."""
    connection = await connect()
    pid = connection.get_server_pid()
    proxy.fin()
    assert proxy.connections == []
    await eventually(connection.is_closed)
    await gone(postgres, pid)


async def test_a_reset_is_a_reset(connect, proxy):
    """The error's chain has what the kernel reports for a reset, not a mere end of file."""
    connection = await connect()
    answer = asyncio.ensure_future(connection.fetchval("SELECT pg_sleep(30)"))
    await asyncio.sleep(0)
    proxy.rst()
    with pytest.raises(LOST) as failure:
        await answer
    chain = (failure.value, failure.value.__cause__, failure.value.__context__)
    assert any(isinstance(error, ConnectionResetError) for error in chain)


async def test_the_server_need_not_see_that_the_client_was_cut_off(postgres, connect, proxy):
    """The session stays as an orphan until the proxy is closed."""
    connection = await connect()
    pid = connection.get_server_pid()
    proxy.rst(server_sees_close=False)
    await eventually(connection.is_closed)
    assert await sessions(postgres, pid) == 1
    proxy.close()
    await gone(postgres, pid)


@pytest.mark.parametrize("then", ["fin", "rst"])
@pytest.mark.parametrize("prepared", [True, False])
async def test_a_swallowed_answer_belongs_to_a_statement_that_was_executed(connect, proxy, ledger, then, prepared):
    """The client only learns of the loss, and the row is there."""
    connection = await connect()
    proxy.swallow_next_answer(then)
    with pytest.raises(LOST):
        if prepared:
            await connection.execute("INSERT INTO ledger VALUES ($1)", 1)
        else:
            await connection.execute("INSERT INTO ledger VALUES (1)")
    assert await ledger() == [1]
    assert (proxy.fired, proxy.armed) == (1, 0)
    await connect()


async def test_a_swallowed_answer_can_be_followed_by_silence(connect, proxy, ledger):
    """The statement is executed and the client waits for ever."""
    connection = await connect()
    proxy.swallow_next_answer("hang")
    waiting = asyncio.ensure_future(connection.execute("INSERT INTO ledger VALUES (1)"))
    await eventually(lambda: proxy.fired)
    assert not (await asyncio.wait([waiting], timeout=BRIEF))[0]
    assert await ledger() == [1]
    assert proxy.connections[0].state == "forgotten"
    waiting.cancel()


async def test_only_the_matching_request_is_concerned(connect, proxy, ledger):
    """Statements before it pass, and COMMIT is carried out."""
    connection = await connect()
    proxy.swallow_next_answer("rst", matching=b"COMMIT")
    with pytest.raises((*LOST, asyncpg.InterfaceError)):
        async with connection.transaction():
            await connection.execute("INSERT INTO ledger VALUES ($1)", 1)
            await connection.execute("INSERT INTO ledger VALUES ($1)", 2)
            assert proxy.fired == 0
    assert await ledger() == [1, 2]


async def test_a_prepared_statement_is_matched_by_the_sql_it_was_prepared_from(connect, proxy, ledger):
    """The fault was armed long after the statement was prepared, and finds it by text, argument or function."""
    connection = await connect()
    insert = await connection.prepare("INSERT INTO ledger VALUES (length($1)) RETURNING entry")
    assert await insert.fetchval("a") == 1
    proxy.swallow_next_answer(matching="INSERT INTO ledger")
    assert await connection.fetchval("SELECT 1") == 1
    with pytest.raises(LOST):
        await insert.fetchval("bb")
    connection = await connect()
    proxy.swallow_next_answer(matching=lambda subject: b"ccc" in subject)
    assert await connection.fetchval("INSERT INTO ledger VALUES (length($1)) RETURNING entry", "dddd") == 4
    with pytest.raises(LOST):
        await connection.fetchval("INSERT INTO ledger VALUES (length($1)) RETURNING entry", "ccc")
    assert await ledger() == [1, 2, 3, 4]


async def test_a_copy_whose_answer_is_swallowed_was_still_fed(connect, proxy, ledger):
    """The server's invitation to send data passes, only the final answer does not."""
    connection = await connect()
    proxy.swallow_next_answer(matching=b"COPY")
    before = proxy.bytes_to_client
    with pytest.raises(LOST):
        await connection.copy_to_table("ledger", source=io.BytesIO(b"1\n2\n"))
    invitation = 7 + 2 * 1
    assert proxy.bytes_to_client - before == 1 + invitation
    assert await ledger() == [1, 2]


@pytest.mark.parametrize("then", ["fin", "rst"])
async def test_a_cut_answer_never_arrives_whole(connect, proxy, ledger, then):
    """However many bytes are let through, the client never takes the statement for done."""
    for count, after_bytes in enumerate((1, 7, 1_000_000), start=1):
        connection = await connect()
        proxy.cut_next_answer(after_bytes, then)
        before = proxy.bytes_to_client
        with pytest.raises(LOST):
            await connection.execute("INSERT INTO ledger VALUES (1)")
        whole = len(b"C....INSERT 0 1.Z....I")
        assert proxy.bytes_to_client - before == min(after_bytes, whole - 1)
        assert len(await ledger()) == count


async def test_a_lost_request_was_not_executed(connect, proxy, ledger):
    """To the client it looks like a swallowed answer; to the server nothing happened."""
    connection = await connect()
    proxy.lose_next_request("rst", matching=b"INSERT")
    with pytest.raises(LOST):
        await connection.execute("INSERT INTO ledger VALUES ($1)", 1)
    assert await ledger() == []
    assert proxy.fired == 1


async def test_a_fault_can_be_armed_for_one_connection_and_for_several_requests(connect, proxy, ledger):
    """Other connections are not concerned, and each request takes one of the faults."""
    spared, hit = await connect(), await connect()
    proxy.connection(hit.get_server_pid()).swallow_next_answer()
    await spared.execute("INSERT INTO ledger VALUES (1)")
    with pytest.raises(LOST):
        await hit.execute("INSERT INTO ledger VALUES (2)")
    proxy.swallow_next_answer(times=2)
    for connection in (spared, await connect()):
        with pytest.raises(LOST):
            await connection.execute("INSERT INTO ledger VALUES (3)")
    assert await (await connect()).fetchval("SELECT 1") == 1
    assert await ledger() == [1, 2, 3, 3]


async def test_a_delay_is_felt_both_ways(connect, proxy):
    """One round trip takes two delays, and none once it is over."""
    connection = await connect(statement_cache_size=0)
    proxy.delay(0.1)
    began = time.monotonic()
    await connection.execute("SELECT 1")
    assert 0.2 <= time.monotonic() - began < 5.0
    proxy.delay(0)
    proxy.connection(connection.get_server_pid()).delay(0.05)
    began = time.monotonic()
    await connection.execute("SELECT 1")
    assert time.monotonic() - began >= 0.1


async def test_a_forgotten_connection_is_silent_for_ever_and_new_ones_are_fine(connect, proxy, ledger):
    """Not even a later `restore()` brings it back, and the server never gets the request."""
    connection = await connect()
    proxy.forget()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(connection.execute("INSERT INTO ledger VALUES (1)"), BRIEF)
    assert await (await connect()).fetchval("SELECT 1") == 1
    proxy.restore()
    # The driver's request to cancel, which has no session of its own, may still be on its way.
    assert [each.state for each in proxy.connections if each.backend_pid] == ["forgotten", "open"]
    assert await ledger() == []


async def test_a_black_hole_swallows_nothing_for_good(connect, proxy, ledger):
    """Nothing passes on present and new connections until it is mended; then what was held back arrives."""
    connection = await connect()
    proxy.blackhole()
    with pytest.raises(TimeoutError):
        await connect(timeout=BRIEF)
    waiting = asyncio.ensure_future(connection.execute("INSERT INTO ledger VALUES (1)"))
    assert not (await asyncio.wait([waiting], timeout=BRIEF))[0]
    assert await ledger() == []
    proxy.restore()
    assert await asyncio.wait_for(waiting, 5) == "INSERT 0 1"
    assert await ledger() == [1]


async def test_a_black_hole_can_be_for_one_connection_alone(connect, proxy):
    """The others go on meanwhile."""
    silent, other = await connect(), await connect()
    fault = proxy.connection(silent.get_server_pid())
    fault.blackhole()
    waiting = asyncio.ensure_future(silent.fetchval("SELECT 1"))
    assert await other.fetchval("SELECT 2") == 2
    assert not (await asyncio.wait([waiting], timeout=BRIEF))[0]
    fault.restore()
    assert await asyncio.wait_for(waiting, 5) == 1


async def test_new_connections_can_be_led_elsewhere(connect, proxy, postgres16):
    """After a fail-over the same address is another server; connections made before stay where they were."""
    before = await connect()
    proxy.retarget(postgres16.host, postgres16.port)
    after = await connect()
    assert before.get_server_version().major == 18
    assert after.get_server_version().major == 16
    assert await before.fetchval("SELECT 1") == 1


async def test_a_server_that_is_down_behind_the_proxy_is_a_reset(connect, proxy):
    """The proxy cannot refuse what it accepted, so it resets."""
    proxy.retarget("127.0.0.1", 1)
    with pytest.raises(LOST):
        await connect()
    assert (proxy.attempts, proxy.accepted) == (1, 0)


async def test_tls_is_refused_when_told_so(connect, proxy, certificates):
    """A client that insists on TLS gives up; one that only prefers it goes on without."""
    proxy.refuse_tls()
    with pytest.raises(ConnectionError, match="rejected SSL upgrade"):
        await connect(ssl=certificates.client_context())
    connection = await connect(ssl="prefer")
    assert await connection.fetchval("SELECT 1") == 1


async def test_a_certificate_of_another_authority_is_not_trusted(connect, tls):
    """The client's check is a real one."""
    if tls is None:
        return
    import ssl

    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(ssl=TlsCertificates().client_context())


async def test_the_proxy_works_while_the_clients_loop_is_blocked(connect, proxy):
    """Its methods return, having taken effect, though the loop that calls them stands still."""
    connection = await connect()
    proxy.rst()
    assert proxy.connections == []
    assert not connection.is_closed()
    await eventually(connection.is_closed)


async def test_it_is_an_asynchronous_context_manager_too(postgres):
    """Afterwards the port is closed, and every method raises an error that says so."""
    async with FaultProxy(postgres.host, postgres.port) as proxy:
        connection = await asyncpg.connect(proxy.dsn(postgres.dsn()))
    await eventually(connection.is_closed)
    with pytest.raises(ConnectionRefusedError):
        await asyncpg.connect(proxy.dsn(postgres.dsn()))
    with pytest.raises(RuntimeError, match="closed"):
        proxy.rst()


async def test_a_connection_ended_while_the_server_is_being_reached_begins_no_session():
    """The server's side is let go of as soon as it is there."""
    loop = asyncio.get_running_loop()
    with socket.create_server((FaultProxy.host, 0), backlog=0) as server, FaultProxy(*server.getsockname()) as proxy:
        server.setblocking(False)
        # One connection fills the queue, so the next one is not there before the first was accepted.
        with socket.create_connection(server.getsockname()):
            reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
            writer.write(STARTUP)
            await eventually(lambda: proxy.connections)
            proxy.fin()
            assert await asyncio.wait_for(reader.read(), 5) == b""
            (await loop.sock_accept(server))[0].close()
            side, _ = await asyncio.wait_for(loop.sock_accept(server), 10)
            with side:
                assert await asyncio.wait_for(loop.sock_recv(side, 100), 5) == b""
            writer.close()


def test_a_connection_whose_server_is_gone_can_be_reset(postgres):
    """Its socket to the server is closed already, in the turn before the proxy sees that: nothing is raised."""

    async def reset() -> None:
        _, writer = await asyncio.open_connection(postgres.host, postgres.port)
        writer.transport.abort()
        await asyncio.sleep(0)
        assert writer.get_extra_info("socket").fileno() == -1
        _reset(writer)

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # as the proxy's own
        runner.run(reset())


@pytest.mark.parametrize(
    ("method", "arguments", "named"),
    [
        ("delay", {"seconds": -1}, "seconds must be a number of seconds"),
        ("delay", {"seconds": float("nan")}, "seconds must be a number of seconds"),
        ("delay", {"seconds": "1"}, "seconds must be a number of seconds"),
        ("swallow_next_answer", {"then": "close"}, "then must be one of 'fin', 'rst', 'hang', not 'close'"),
        ("lose_next_request", {"then": None}, "then must be one of"),
        ("swallow_next_answer", {"times": 0}, "times must be a number of requests"),
        ("swallow_next_answer", {"matching": 5}, "matching must be a str, bytes or a function, not 5"),
        ("cut_next_answer", {"after_bytes": -1}, "after_bytes must be a number of bytes"),
        ("reject", {"then": "hang"}, "then must be one of 'fin', 'rst', not 'hang'"),
        ("answer_with_error", {"sqlstate": "57"}, "sqlstate must have 5 characters"),
        ("answer_with_error", {"text": "a\0b"}, "text no NUL"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(proxy, method, arguments, named):
    """Or the test that asks for it would pass without it."""
    with pytest.raises(ValueError, match=named):
        getattr(proxy, method)(**arguments)
    assert proxy.armed == 0
