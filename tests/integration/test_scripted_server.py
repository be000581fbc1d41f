"""What a plain asyncpg connection meets at each point of a script, alone and before a real server."""

from __future__ import annotations

import asyncio
import gc
import struct

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres, End, Point, Refusal, ScriptedServer, TlsCertificates
from resilient_pool.testing import _protocol as _messages

# From this version on asyncpg passes on what the server sent before it closed a connection.
TELLS_THE_REASON = tuple(int(part) for part in asyncpg.__version__.split(".")[:2]) >= (0, 32)
LIMIT = 10.0


@pytest.fixture
async def ledger(postgres: EmbeddedPostgres):
    """An empty table, and a look at it that does not pass the script."""
    async with postgres.admin() as connection:
        await connection.execute("DROP TABLE IF EXISTS scripted; CREATE TABLE scripted (entry int)")

        async def entries() -> list[int]:
            return [row["entry"] for row in await connection.fetch("SELECT entry FROM scripted ORDER BY entry")]

        yield entries
        await connection.execute("DROP TABLE scripted")


@pytest.fixture(params=["alone", "before a real server"])
def behind(request, postgres: EmbeddedPostgres) -> dict[str, object]:
    """What a scripted server needs to know of what stands behind it."""
    return {} if request.param == "alone" else {"host": postgres.host, "port": postgres.port}


async def connect(server: ScriptedServer, postgres: EmbeddedPostgres, **arguments) -> asyncpg.Connection:
    return await asyncpg.connect(server.dsn(postgres.dsn()), **{"timeout": LIMIT, **arguments})


def refusal(at: Point, **fields) -> Refusal:
    return Refusal(at=at, **{"severity": "ERROR", "sqlstate": "XX000", "message": "as written", **fields})


def seen(error: BaseException) -> BaseException:
    """What the server sent, where the driver passes it on."""
    return error.__cause__ if isinstance(error, asyncpg.ConnectionDoesNotExistError) and error.__cause__ else error


async def kinds_until_ready(reader: asyncio.StreamReader, until: bytes = b"Z") -> list[bytes]:
    """Read whole messages, and return their types; for what asyncpg would not mind."""
    kinds: list[bytes] = []
    async with asyncio.timeout(LIMIT):
        while kinds[-1:] != [until]:
            kind, length = struct.unpack("!ci", await reader.readexactly(5))
            await reader.readexactly(length - 4)
            kinds.append(kind)
    return kinds


# Before there is a session


@pytest.mark.parametrize("point", [Point.STARTUP, Point.AUTHENTICATION, Point.LOGIN])
async def test_a_client_that_is_turned_away_gets_every_field(behind, postgres, point):
    """Severity, code, message, detail and hint, as they stand in the script."""
    line = Refusal(at=point, sqlstate="57P03", message="not yet", detail="asleep", hint="wait")
    with ScriptedServer(line, **behind) as server:
        with pytest.raises(asyncpg.CannotConnectNowError) as caught:
            await connect(server, postgres)
    error = caught.value
    told = (error.severity, error.severity_en, error.sqlstate, error.message, error.detail, error.hint)
    assert told == ("FATAL", "FATAL", "57P03", "not yet", "asleep", "wait")
    assert server.sent == (line,)


async def test_a_client_that_is_let_in_again_was_not_harmed(behind, postgres):
    """The first three are refused at different points, the fourth is served."""
    lines = [refusal(point, times=1) for point in (Point.STARTUP, Point.AUTHENTICATION, Point.LOGIN)]
    with ScriptedServer(*lines, **behind) as server:
        for line in lines:
            with pytest.raises(asyncpg.InternalServerError, match="as written"):
                await connect(server, postgres, ssl=False)
            assert server.sent[-1] == line
        connection = await connect(server, postgres, ssl=False)
        await connection.execute("SELECT 1")
        await connection.close()
        assert server.attempts == len(server.attempted_at) == 4


async def test_an_answer_to_the_request_for_tls_comes_before_everything_else(behind, postgres):
    """The driver hides what it says, and never sends who the client is; one that asks for no TLS does not get there."""
    with ScriptedServer(refusal(Point.TLS, bare=True, message="could not fork"), **behind) as server:
        with pytest.raises(ConnectionError, match="SSL"):
            await connect(server, postgres, ssl="prefer")
        connection = await connect(server, postgres, ssl=False)
        await connection.close()


@pytest.mark.parametrize("then", [End.CLOSE, End.RESET, End.SILENCE])
@pytest.mark.parametrize("point", [Point.STARTUP, Point.AUTHENTICATION, Point.LOGIN])
async def test_a_connection_can_end_without_a_word(behind, postgres, point, then):
    """Closed and reset are losses; silence lasts until the client gives up."""
    with ScriptedServer(Refusal(at=point, then=then), **behind) as server:
        with pytest.raises((OSError, asyncpg.ConnectionDoesNotExistError)) as caught:
            await connect(server, postgres, ssl=False, timeout=0.3 if then is End.SILENCE else LIMIT)
        assert isinstance(caught.value, TimeoutError) is (then is End.SILENCE)


async def test_a_script_is_spoken_through_tls(behind, postgres):
    """Before the session and in it."""
    certificates = TlsCertificates()
    lines = refusal(Point.STARTUP, times=1), refusal(Point.QUERY, then=End.READY)
    with ScriptedServer(*lines, tls=certificates, **behind) as server:
        with pytest.raises(asyncpg.InternalServerError):
            await connect(server, postgres, ssl=certificates.client_context())
        connection = await connect(server, postgres, ssl=certificates.client_context())
        with pytest.raises(asyncpg.InternalServerError):
            await connection.execute("SELECT 1")
        await connection.close()


@pytest.mark.parametrize("login", ["trust", "password", "md5", "scram"])
async def test_a_stand_in_asks_for_a_password_in_every_usual_way(login):
    """Each ends in the refusal that stands in the script, after the client's proof."""
    line = Refusal(at=Point.AUTHENTICATION, sqlstate="28000", message="no such tenant")
    with ScriptedServer(line, login=login) as server:
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError) as caught:
            await asyncpg.connect(server.dsn(), ssl=False, timeout=LIMIT)
    assert caught.value.message == "no such tenant"
    assert server.sent == (line,)


def test_before_a_real_server_the_dsn_is_made_from_that_server_s(postgres):
    """Its users and databases are its own: made-up ones would only be refused."""
    server = ScriptedServer(host=postgres.host, port=postgres.port)
    with pytest.raises(ValueError, match="give dsn\\(\\) its URL"):
        server.dsn()


async def test_a_real_server_s_own_password_check_goes_before_the_script_s(postgres):
    """SCRAM runs to its end, and then the script speaks; a wrong password does not get so far."""
    await postgres.create_role("scripted", "right")
    try:
        with ScriptedServer(refusal(Point.AUTHENTICATION, times=1), host=postgres.host, port=postgres.port) as server:
            with pytest.raises(asyncpg.InvalidPasswordError, match="password authentication failed"):
                await connect(server, postgres, user="scripted", password="wrong")
            with pytest.raises(asyncpg.InternalServerError, match="as written"):
                await connect(server, postgres, user="scripted", password="right")
            connection = await connect(server, postgres, user="scripted", password="right")
            await connection.close()
    finally:
        async with postgres.admin() as admin:
            await admin.execute("DROP ROLE scripted")


# In a session


@pytest.mark.parametrize("point", [Point.PARSE, Point.QUERY])
async def test_a_statement_that_is_refused_leaves_a_session_that_works(behind, postgres, point):
    """The third of its kind, on whichever connection; the others are executed."""
    line = refusal(point, then=End.READY, matching="SELECT $1::text", nth=3, times=1)
    with ScriptedServer(line, **behind) as server:
        connection = await connect(server, postgres)
        for number in range(1, 5):
            try:
                await connection.fetch(f"SELECT $1::text AS number_{number}", "x")
            except asyncpg.InternalServerError as error:
                assert (number, error.message) == (3, "as written")
            else:
                assert number != 3
        assert not connection.is_in_transaction()
        await connection.close()


@pytest.mark.parametrize("point", [Point.PARSE, Point.QUERY])
async def test_a_statement_that_is_refused_fails_its_transaction(behind, postgres, point):
    """What follows is refused by the server, until ROLLBACK."""
    line = refusal(point, then=End.READY, matching="SELECT $1::text")
    with ScriptedServer(line, **behind) as server:
        connection = await connect(server, postgres)
        await connection.execute("BEGIN")
        with pytest.raises(asyncpg.InternalServerError):
            await connection.fetch("SELECT $1::text", "x")
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await connection.execute("SELECT 1")
        assert await connection.execute("COMMIT") == "ROLLBACK"
        await connection.close()


@pytest.mark.parametrize("prepared", [False, True])
async def test_a_commit_that_is_refused_has_rolled_back_unless_it_was_executed(postgres, ledger, prepared):
    """Whichever way it is sent, and with the session in order afterwards."""
    lines = refusal(Point.COMMIT, then=End.READY, times=1), refusal(Point.COMMIT, then=End.READY, executed=True)
    with ScriptedServer(*lines, host=postgres.host, port=postgres.port) as server:
        connection = await connect(server, postgres)
        for entry in (1, 2):
            await connection.execute("BEGIN")
            await connection.execute(f"INSERT INTO scripted VALUES ({entry})")
            with pytest.raises(asyncpg.InternalServerError, match="as written"):
                await (connection.fetch("COMMIT") if prepared else connection.execute("COMMIT"))
            assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT count(*) FROM scripted") == 1
        assert await ledger() == [2]
        await connection.close()


@pytest.mark.parametrize("then", [End.CLOSE, End.RESET, End.SILENCE])
@pytest.mark.parametrize("executed", [False, True])
async def test_a_statement_lost_with_its_connection_was_executed_if_the_script_says_so(
    postgres, ledger, executed, then
):
    """The client cannot see the difference."""
    line = refusal(Point.QUERY, then=then, executed=executed, matching="INSERT")
    with ScriptedServer(line, host=postgres.host, port=postgres.port) as server:
        connection = await connect(server, postgres)
        with pytest.raises((asyncpg.ConnectionDoesNotExistError, TimeoutError)):
            await connection.execute(
                "INSERT INTO scripted VALUES ($1)", 1, timeout=0.5 if then is End.SILENCE else LIMIT
            )
        assert connection.is_closed() is (then is not End.SILENCE)
        connection.terminate()

        async def is_as_the_script_says() -> bool:
            return await ledger() == ([1] if executed else [])

        await eventually(is_as_the_script_says)


async def test_the_last_words_of_a_connection_reach_the_driver(behind, postgres):
    """An ErrorResponse, and the end without ReadyForQuery: asyncpg 0.32 passes them on."""
    line = Refusal(at=Point.QUERY, sqlstate="08P01", message="query timeout", matching="SELECT 1")
    with ScriptedServer(line, **behind) as server:
        connection = await connect(server, postgres)
        with pytest.raises(asyncpg.ConnectionDoesNotExistError) as caught:
            await connection.execute("SELECT 1")
        assert connection.is_closed()
    if TELLS_THE_REASON:
        assert isinstance(seen(caught.value), asyncpg.ProtocolViolationError)


async def test_an_idle_session_is_ended_after_the_answer_that_is_named(behind, postgres):
    """The answer arrives whole; what is asked next finds a closed connection."""
    line = Refusal(at=Point.IDLE, sqlstate="57P05", message="idle for too long", matching="second")
    with ScriptedServer(line, **behind) as server:
        connection = await connect(server, postgres)
        await connection.execute("SELECT 1 AS first")
        assert not connection.is_closed()
        assert await connection.execute("SELECT 2 AS second")
        async with asyncio.timeout(LIMIT):
            while not connection.is_closed():
                await asyncio.sleep(0.005)


async def test_a_copy_is_refused_when_its_data_has_been_sent(postgres, ledger):
    """The client is asked for its data as ever."""
    line = refusal(Point.QUERY, then=End.READY, executed=True, matching="COPY")
    with ScriptedServer(line, host=postgres.host, port=postgres.port) as server:
        connection = await connect(server, postgres)
        with pytest.raises(asyncpg.InternalServerError):
            await connection.copy_records_to_table("scripted", records=[(1,), (2,)], columns=["entry"])
        assert await ledger() == [1, 2]
        await connection.close()


async def test_an_answer_is_replaced_as_a_whole_and_once(postgres, ledger):
    """However many results there were; but a client that is to send data is asked for it."""
    lines = [refusal(Point.QUERY, then=End.READY, executed=True, matching=word) for word in ("SELECT", "COPY")]
    with ScriptedServer(*lines, host=postgres.host, port=postgres.port) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(struct.pack("!ii", 23, 196608) + b"user\0postgres\0\0")
        await kinds_until_ready(reader)
        writer.write(_messages.compose(b"Q", b"SELECT 1; SELECT 2\0"))
        assert await kinds_until_ready(reader) == [b"E", b"Z"]
        writer.write(_messages.compose(b"Q", b"COPY scripted FROM STDIN\0"))
        assert await kinds_until_ready(reader, b"G") == [b"G"]
        writer.write(_messages.compose(b"d", b"1\n") + _messages.compose(b"c"))
        assert await kinds_until_ready(reader) == [b"E", b"Z"]
        writer.close()
        await writer.wait_closed()
    assert await ledger() == [1]


async def test_a_request_to_cancel_is_no_client_to_turn_away(postgres):
    """It reaches the server, and the connection can be used again."""
    with ScriptedServer(refusal(Point.STARTUP, nth=2), host=postgres.host, port=postgres.port) as server:
        connection = await connect(server, postgres, ssl=False)
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT pg_sleep(60)", timeout=0.2)
        assert await connection.fetchval("SELECT 1", timeout=LIMIT) == 1
        await connection.close()
        assert server.attempts == 2
        assert server.sent == ()


async def test_a_client_that_leaves_makes_room(behind, postgres):
    """Only who is there counts."""
    with ScriptedServer(refusal(Point.STARTUP, beyond=1), **behind) as server:
        connection = await connect(server, postgres, ssl=False)
        with pytest.raises(asyncpg.InternalServerError):
            await connect(server, postgres, ssl=False)
        await connection.close()
        async with asyncio.timeout(LIMIT):
            while True:
                try:
                    connection = await connect(server, postgres, ssl=False)
                except asyncpg.InternalServerError:
                    await asyncio.sleep(0.005)
                else:
                    break
        await connection.close()


async def test_a_client_that_was_turned_away_takes_no_room_however_long_it_stays(behind, postgres):
    """Its session has ended, though it has not noticed."""
    lines = refusal(Point.LOGIN, times=1), refusal(Point.STARTUP, beyond=1)
    with ScriptedServer(*lines, **behind) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(struct.pack("!ii", 23, 196608) + b"user\0postgres\0\0")
        assert (await kinds_until_ready(reader, b"E"))[-1] == b"E"
        assert server.open_connections == 1
        connection = await connect(server, postgres, ssl=False)
        await connection.close()
        writer.close()
        await writer.wait_closed()


async def test_a_session_that_has_begun_is_no_login(behind, postgres):
    """However many answers it has had: the second login is the second client's."""
    with ScriptedServer(refusal(Point.LOGIN, nth=2), **behind) as server:
        connection = await connect(server, postgres, ssl=False)
        for _ in range(3):
            await connection.execute("SELECT 1")
        with pytest.raises(asyncpg.InternalServerError):
            await connect(server, postgres, ssl=False)
        await connection.close()


async def test_a_server_that_is_closed_leaves_nothing_behind(behind, postgres, caplog):
    """Not even with clients that wait for its answer."""
    with ScriptedServer(refusal(Point.QUERY, then=End.SILENCE), **behind) as server:
        connections = [await connect(server, postgres) for _ in range(3)]
        with pytest.raises(TimeoutError):
            await connections[0].execute("SELECT 1", timeout=0.1)
    for connection in connections:
        connection.terminate()
    gc.collect()
    assert not caplog.records


async def test_what_clients_wanted_is_written_down():
    """So that a test can see that nothing was executed twice."""
    with ScriptedServer(refusal(Point.QUERY, then=End.READY, matching="UPDATE")) as server:
        connection = await asyncpg.connect(server.dsn(), timeout=LIMIT)
        await connection.execute("INSERT INTO nowhere VALUES ($1)", "x")
        with pytest.raises(asyncpg.InternalServerError):
            await connection.execute("UPDATE nowhere SET x = 1")
        await connection.close()
    assert server.statements == ("INSERT INTO nowhere VALUES ($1)", "UPDATE nowhere SET x = 1")


# A pool, and what it does then


async def test_a_pool_works_with_a_stand_in_alone():
    """It is asked what it is, has nothing to say, and serves statements and transactions all the same."""
    with ScriptedServer() as server:
        async with ResilientPool(server.dsn()) as pool:
            assert await pool.fetch("SELECT 1") == []
            assert await pool.execute("INSERT INTO nowhere VALUES (1)") == "INSERT 0 0"
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute("SET search_path = nowhere")
    assert [sql for sql in server.statements if "nowhere" in sql] == [
        "INSERT INTO nowhere VALUES (1)",
        "SET search_path = nowhere",
    ]


async def test_a_hundred_callers_are_served_by_an_endpoint_that_takes_three_seconds_to_wake(postgres):
    """As Neon's proxy says it, after a login that succeeds; one prober asks for all."""
    waking = refusal(Point.LOGIN, severity_en="", message="Couldn't connect to compute node", seconds=3.0)
    with ScriptedServer(waking, host=postgres.host, port=postgres.port) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), max_size=5) as pool:
            answers = await asyncio.gather(*(pool.fetchval("SELECT $1::int", number) for number in range(100)))
        assert answers == list(range(100))
        assert 1 <= len(server.sent) <= 9


async def test_no_call_fails_at_a_pooler_that_has_room_for_two(postgres):
    """As Supavisor says it in session mode: what there is circulates, and the refusals of more are no outage."""
    full = Refusal(
        at=Point.STARTUP,
        sqlstate="XX000",
        message="(EMAXCONNSESSION) max clients reached in session mode - max clients are limited to pool_size: 2",
        beyond=2,
    )
    slow = "SELECT $1::int FROM pg_sleep(0.02)"  # or two connections may do it all before a third is thought of
    with ScriptedServer(full, host=postgres.host, port=postgres.port) as server:
        async with ResilientPool(server.dsn(postgres.dsn()), max_size=10) as pool:
            answers = await asyncio.gather(*(pool.fetchval(slow, number) for number in range(100)))
        assert answers == list(range(100))
        assert set(server.sent) == {full}


def test_a_server_needs_a_whole_address_and_its_own_login():
    """Half an address, or a stand-in's part beside a real server's, is a mistake."""
    with pytest.raises(ValueError, match="host='db'"):
        ScriptedServer(host="db")
    with pytest.raises(ValueError, match="port=5432"):
        ScriptedServer(port=5432)
    with pytest.raises(ValueError, match="login="):
        ScriptedServer(host="db", port=5432, login="md5")
    with pytest.raises(ValueError, match="parameters="):
        ScriptedServer(host="db", port=5432, parameters={})
