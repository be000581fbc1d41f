"""A canary password appears nowhere: not in logs, reprs, exceptions, notes or tracebacks with captured locals."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import io
import logging
import pickle
import traceback
from urllib.parse import quote, quote_plus

import asyncpg
import pytest

from resilient_pool import ResilientPool, StructlogObserver
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

CANARY = "c@n/a:r%y #1?&\"'é"
PARTS = [CANARY, quote(CANARY, safe=""), quote_plus(CANARY), quote(CANARY), repr(CANARY)[1:-1]]


@pytest.fixture
def log():
    """Everything any logger says, at DEBUG."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    asyncio.get_event_loop_policy()
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)


@pytest.fixture
async def role(postgres: EmbeddedPostgres) -> str:
    """A role whose password is the canary."""
    async with postgres.admin() as admin:
        await admin.execute("DROP ROLE IF EXISTS canary")
    await postgres.create_role("canary", CANARY)
    return "canary"


def assert_clean(text: str) -> None:
    for part in PARTS:
        assert part not in text


def report(error: BaseException) -> str:
    """Everything that an error report could show."""
    captured = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(captured.format(chain=True)) + repr(error) + str(getattr(error, "__notes__", ""))


def pool_for(server: EmbeddedPostgres, role: str, **arguments) -> ResilientPool:
    dsn = f"postgresql://{role}:{quote(CANARY, safe='')}@{server.host}:{arguments.pop('port', server.port)}/postgres"
    return ResilientPool(dsn, observers=[StructlogObserver()], **arguments)


async def test_the_password_works_and_is_neither_logged_nor_shown(postgres, role, log) -> None:
    """The pool, its configuration, its leases and its query loggers only ever hold something that reveals it."""
    records = []
    async with pool_for(postgres, role) as pool:
        async with pool.acquire() as connection:
            with connection.query_logger(records.append):
                await connection.fetch("SELECT 1")
            await asyncio.sleep(0)
            assert_clean(repr(connection) + repr(connection._con) + repr(connection._con._params))
        assert_clean(repr(pool) + repr(pool._config) + repr(pool.stats()) + repr(vars(pool)))
    assert records
    assert_clean(repr(records))
    assert_clean(log.getvalue())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param({"port": 1, "deadline": 0.3}, ConnectionRefusedError, id="refused"),
        pytest.param({"database": "nowhere"}, asyncpg.InvalidCatalogNameError, id="no such database"),
        pytest.param({"user": "nobody"}, asyncpg.InvalidPasswordError, id="wrong password"),
        pytest.param({"server_settings": {"nosuch": "1"}}, asyncpg.UndefinedObjectError, id="bad setting"),
        pytest.param({"ssl": "require"}, ConnectionError, id="no TLS"),
    ],
)
async def test_a_connection_that_cannot_be_made_tells_no_secret(postgres, role, log, arguments, expected) -> None:
    """The driver's frames hold the password while it connects; a report with locals does not show it."""
    async with pool_for(postgres, role, **{"deadline": 0.3, **arguments}) as pool:
        with pytest.raises(expected) as caught:
            await pool.fetch("SELECT 1")
    assert_clean(report(caught.value))
    assert_clean(log.getvalue())


async def test_a_connect_that_hangs_tells_no_secret(postgres, role, log) -> None:
    """Also not when it is cut by the deadline."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.hang()
        async with pool_for(postgres, role, port=proxy.port, deadline=0.3) as pool:
            with pytest.raises(TimeoutError) as caught:
                await pool.fetch("SELECT 1")
    assert_clean(report(caught.value))
    assert_clean(log.getvalue())


async def test_a_password_is_asked_for_at_every_connect_and_once_more_when_it_was_wrong(postgres, role) -> None:
    """A rotated password is picked up, by a coroutine function too."""
    answers = ["outdated", CANARY, CANARY]
    asked = []

    async def password() -> str:
        asked.append(1)
        return answers.pop(0)

    arguments = {"host": postgres.host, "port": postgres.port, "user": role, "database": "postgres"}
    async with ResilientPool(password=password, **arguments) as pool:
        assert await pool.fetchval("SELECT current_user") == role
        assert len(asked) == 2
        await pool.expire_connections()
        assert await pool.fetchval("SELECT 1") == 1
        assert len(asked) == 3


async def test_a_password_that_stays_wrong_is_final_after_the_second_question(postgres, role) -> None:
    """Nothing is gained by knocking again and again: some servers lock the role."""
    asked = []

    def password() -> str:
        asked.append(1)
        return "wrong"

    arguments = {"host": postgres.host, "port": postgres.port, "user": role, "database": "postgres"}
    async with ResilientPool(password=password, **arguments) as pool:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await pool.fetch("SELECT 1")
    assert len(asked) == 2


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://canary:{}@[::1/postgres",
        "postgresql://canary:{}@host:port/postgres",
        "mysql://canary:{}@host/postgres",
        "postgresql://canary:{}@host/postgres?sslmod=require",
        "postgresql://canary:{}@host/postgres?password={}&nonsense",
        "canary:{}@host",
    ],
)
@pytest.mark.parametrize("quoted", [True, False])
def test_a_malformed_dsn_is_refused_without_its_secret(dsn: str, quoted: bool) -> None:
    """The message says what is wrong with it, and the report of it shows no part of the password."""
    filled = dsn.replace("{}", quote(CANARY, safe="") if quoted else CANARY)
    try:
        ResilientPool(filled)
    except ValueError as error:
        captured = error
    else:
        return  # some of these parse when the password is quoted otherwise; then nothing is said at all
    text = "".join(
        traceback.TracebackException(
            type(captured), captured, captured.__traceback__.tb_next, capture_locals=True
        ).format()
    )
    assert_clean(text)


async def give_it():
    return CANARY


def pool_by(source: str, server: EmbeddedPostgres, role: str, port: int, **others) -> ResilientPool:
    """A pool that learns the password in one of the ways there are; the test's own frames do not hold it."""
    where = {"host": server.host, "port": port, "database": "postgres"}
    plain = f"postgresql://{role}@{server.host}:{port}/postgres"

    async def connector(dsn, password, **options):
        return await asyncpg.connect(dsn, password=password, **options)

    match source:
        case "DSN":
            return ResilientPool(plain.replace("@", f":{quote(CANARY, safe='')}@"), **others)
        case "argument":
            return ResilientPool(user=role, password=CANARY, **where, **others)
        case "function":
            return ResilientPool(user=role, password=give_it, **where, **others)
        case "credentials":
            return ResilientPool(credentials=lambda: (role, CANARY), **where, **others)
        case "several hosts":
            hosts = {"host": [server.host, "localhost"], "port": [port, port], "database": "postgres"}
            return ResilientPool(user=role, password=CANARY, **hosts, **others)
    return ResilientPool(plain, password=CANARY, connect=connector, **others)


SOURCES = ["DSN", "argument", "function", "credentials", "several hosts", "connector"]


@pytest.mark.parametrize("source", SOURCES)
async def test_a_connect_that_is_cancelled_tells_no_secret(postgres, role, log, source) -> None:
    """At whatever moment: the driver's frames hold the password while it connects, and a cancellation goes through them."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.delay(0.02)
        for turn in range(1, 9):
            async with pool_by(source, postgres, role, proxy.port, max_size=2) as pool:
                task = asyncio.create_task(pool._connector.open(None))
                await asyncio.wait([task], timeout=turn * 0.013)
                task.cancel()
                await asyncio.wait([task])
                if task.cancelled():
                    try:
                        task.result()
                    except asyncio.CancelledError as error:
                        assert_clean(report(error))
                else:
                    task.result().terminate()
    assert_clean(log.getvalue())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fault", ["hang", "reject", "wrong"])
async def test_whichever_way_the_password_was_given_a_failure_tells_no_secret(
    postgres, role, log, source, fault
) -> None:
    """Cut by the deadline, reset, or refused."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        getattr(proxy, fault, lambda: proxy.answer_with_error("28P01", "password authentication failed"))()
        observed = {"deadline": 0.3, "observers": [StructlogObserver()]}
        async with pool_by(source, postgres, role, proxy.port, **observed) as pool:
            assert_clean(repr(pool) + repr(pool._config) + repr(vars(pool._connector)))
            with pytest.raises((OSError, asyncpg.PostgresError)) as caught:
                await pool.fetch("SELECT 1")
            group = ExceptionGroup("several", [caught.value])
    assert_clean(report(caught.value) + report(group))
    assert_clean(log.getvalue())


async def test_the_event_loops_debug_mode_logs_no_secret(postgres, role, log) -> None:
    """It logs slow callbacks with their arguments, and tasks with what they run."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0
    try:
        for source in SOURCES:
            async with pool_by(source, postgres, role, postgres.port) as pool:
                await pool.fetch("SELECT 1")
    finally:
        loop.set_debug(False)
    assert log.getvalue()
    assert_clean(log.getvalue())


def test_a_configuration_cannot_be_pickled_with_its_secret() -> None:
    """And a copy, or a list of its fields, shows none."""
    for pool in (
        ResilientPool(f"postgresql://u:{quote(CANARY, safe='')}@h"),
        ResilientPool(password=CANARY, connect=print),
    ):
        config = pool._config
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(config)
        assert_clean(repr(copy.copy(config)) + repr(dataclasses.asdict(config)) + repr(inspect.getmembers(config)))
