"""Several hosts, and names with several addresses: one that does not answer hides none of the others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import ResilientPool
from resilient_pool.pooling.hosts import HEAD_START
from resilient_pool.testing import FaultProxy, Point, Refusal, ScriptedServer, TlsCertificates


@contextlib.contextmanager
def silent_server(address="127.0.0.1", port=0):
    """A server that accepts connections and never says anything; yields its port and what counts its visitors."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(64)
        yield listener


def port_of(listener: socket.socket) -> int:
    return listener.getsockname()[1]


def visits(listener: socket.socket) -> int:
    """Count the connections that came since the last count."""
    listener.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def arguments(postgres, hosts, ports, **others):
    return {"host": hosts, "port": ports, "user": "postgres", "database": "postgres", "ssl": False, **others}


async def test_a_silent_first_host_takes_its_share_of_the_time_and_no_more(postgres):
    """With four seconds for both hosts, the second one is reached after two; afterwards it is asked first."""
    with silent_server() as listener:
        where = arguments(
            postgres, ["127.0.0.1", "127.0.0.1"], [port_of(listener), postgres.port], timeout=4, max_size=3
        )
        async with ResilientPool(**where) as pool:
            began = time.monotonic()
            assert await pool.fetchval("SELECT 42") == 42
            assert 1.5 < time.monotonic() - began < 3.5
            assert visits(listener) == 1
            began = time.monotonic()
            leases = await asyncio.gather(*(pool.acquire() for _ in range(3)))
            assert time.monotonic() - began < 1.8
            assert visits(listener) == 0
            for lease in leases:
                await pool.release(lease)


async def test_with_the_default_timeout_the_second_host_is_reached_within_ten_seconds(postgres):
    """A server that wakes up may be silent for a while; five seconds later the next host is tried beside it."""
    with silent_server() as listener:
        async with ResilientPool(**arguments(postgres, ["127.0.0.1"] * 2, [port_of(listener), postgres.port])) as pool:
            began = time.monotonic()
            assert await pool.fetchval("SELECT 42") == 42
            assert HEAD_START - 0.5 < time.monotonic() - began < HEAD_START + 3


async def test_a_deadline_that_is_shorter_is_shared_out_too(postgres):
    """A caller with two seconds is served by the second host."""
    with silent_server() as listener:
        where = arguments(postgres, ["127.0.0.1"] * 2, [port_of(listener), postgres.port], deadline=2)
        async with ResilientPool(**where) as pool:
            assert await pool.fetchval("SELECT 42") == 42


async def test_a_host_that_refuses_is_tried_again_while_another_is_silent(postgres):
    """The second host may come up while the first one still says nothing."""
    with silent_server() as listener, FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.reject()
        where = arguments(postgres, ["127.0.0.1"] * 2, [port_of(listener), proxy.port], deadline=30)
        async with ResilientPool(**where) as pool:
            answer = asyncio.create_task(pool.fetchval("SELECT 42"))
            async with asyncio.timeout(20):
                while not proxy.attempts:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            proxy.restore()
            async with asyncio.timeout(10):
                assert await answer == 42


@pytest.fixture
def resolver(monkeypatch):
    """What names resolve to; every question is counted."""
    real, names, asked = socket.getaddrinfo, {}, []

    def resolve(host, port, *others, **options):
        if host not in names:
            return real(host, port, *others, **options)
        asked.append(host)
        if not names[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names, asked


async def test_a_silent_first_address_of_a_name_does_not_hide_the_second(postgres, resolver):
    """The name is resolved anew for each attempt, and the address that did not answer comes last then."""
    names, asked = resolver
    names["db.test"] = ["127.0.0.2", "127.0.0.1"]
    with silent_server("127.0.0.2", postgres.port) as listener:
        where = arguments(postgres, "db.test", postgres.port, timeout=4, max_size=2)
        async with ResilientPool(**where) as pool:
            began = time.monotonic()
            assert await pool.fetchval("SELECT 42") == 42
            assert time.monotonic() - began < 3.5
            assert visits(listener) == 1
            began = time.monotonic()
            async with pool.acquire(), pool.acquire() as second:
                assert await second.fetchval("SELECT 43") == 43
            assert time.monotonic() - began < 1.8
            assert visits(listener) == 0
        assert asked == ["db.test"] * 2


async def test_tls_asks_for_the_name_whichever_address_answers(postgres, resolver, tmp_path):
    """The certificate is for the name, and `verify-full` holds; so does a request to cancel, at the same address."""
    names, _ = resolver
    names["db.test"] = ["127.0.0.2", "127.0.0.1"]
    certificates = TlsCertificates("db.test")
    dsn = f"sslmode=verify-full&sslrootcert={certificates.write_ca(tmp_path / 'ca.pem')}"
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy, silent_server("127.0.0.2", proxy.port):
        async with ResilientPool(f"postgresql://postgres@db.test:{proxy.port}/postgres?{dsn}", timeout=4) as pool:
            async with pool.acquire() as connection:
                assert await connection.fetchval("SELECT 42") == 42
                with pytest.raises(TimeoutError):
                    await connection.execute("SELECT pg_sleep(60)", timeout=0.2)
                assert await connection.fetchval("SELECT 43") == 43


async def test_an_address_from_which_the_server_has_moved_is_left_while_it_is_silent(postgres, resolver):
    """The name is resolved again while its only address does not answer."""
    names, _ = resolver
    names["db.test"] = ["127.0.0.2"]
    with silent_server("127.0.0.2", postgres.port):
        async with ResilientPool(**arguments(postgres, "db.test", postgres.port)) as pool:
            answer = asyncio.create_task(pool.fetchval("SELECT 42"))
            await asyncio.sleep(0.2)
            names["db.test"] = ["127.0.0.1"]
            async with asyncio.timeout(10):
                assert await answer == 42


async def test_a_name_that_cannot_be_resolved_does_not_hide_the_next_host(postgres, resolver):
    """Neither does a port where nobody listens, nor a server that cannot serve and says so."""
    names, _ = resolver
    names["gone.test"] = []
    with FaultProxy(postgres.host, postgres.port) as proxy:
        proxy.answer_with_error("57P03", "the database system is not accepting connections")
        hosts, ports = ["gone.test", "127.0.0.1", "127.0.0.1", "127.0.0.1"], [5432, 1, proxy.port, postgres.port]
        async with ResilientPool(**arguments(postgres, hosts, ports)) as pool:
            began = time.monotonic()
            assert await pool.fetchval("SELECT 42") == 42
            assert time.monotonic() - began < HEAD_START


async def test_what_the_server_refuses_for_good_is_not_asked_of_the_next_host(postgres):
    """A wrong password, or a database that does not exist, is final, as in libpq."""
    with FaultProxy(postgres.host, postgres.port) as proxy:
        where = arguments(postgres, ["127.0.0.1"] * 2, [postgres.port, proxy.port]) | {"database": "nowhere"}
        async with ResilientPool(**where) as pool:
            with pytest.raises(asyncpg.InvalidCatalogNameError):
                await pool.fetchval("SELECT 42")
        assert proxy.attempts == 0


NEVER = Refusal(
    at=Point.STARTUP,
    sqlstate="57P03",
    message="the database system is not accepting connections",
    detail="Hot standby mode is disabled.",
)


async def test_a_host_that_never_serves_makes_way_for_the_next(postgres):
    """A standby that lets nobody in says the same for ever."""
    with ScriptedServer(NEVER) as never:
        where = arguments(postgres, ["127.0.0.1"] * 2, [never.port, postgres.port])
        async with ResilientPool(**where) as pool:
            assert await pool.fetchval("SELECT 42") == 42
            assert pool.stats().connect_failures == 0
        assert never.attempts == 1


async def test_a_host_that_speaks_no_tls_makes_way_for_one_that_does(postgres):
    """It is required, and another host may offer it."""
    certificates = TlsCertificates()
    with (
        ScriptedServer() as plain,
        ScriptedServer(host=postgres.host, port=postgres.port, tls=certificates) as encrypted,
    ):
        where = arguments(postgres, ["127.0.0.1"] * 2, [plain.port, encrypted.port], ssl="require")
        async with ResilientPool(**where) as pool:
            assert await pool.fetchval("SELECT 42") == 42
        assert (plain.attempts, plain.statements) == (1, ())


async def test_a_host_that_is_blocked_for_some_time_does_not_hide_that_another_one_is_back_sooner(postgres):
    """Waiting is for the one that may serve first."""
    text = (
        "(ECIRCUITBREAKER) too many failed attempts to connect to the database, new connections are temporarily blocked"
    )
    blocked = Refusal(at=Point.STARTUP, sqlstate="XX000", message=text)
    starting = Refusal(at=Point.STARTUP, sqlstate="57P03", message="the database system is starting up", times=1)
    for order in (1, -1):
        with (
            ScriptedServer(blocked) as first,
            ScriptedServer(starting, host=postgres.host, port=postgres.port) as second,
        ):
            where = arguments(postgres, ["127.0.0.1"] * 2, [first.port, second.port][::order], deadline=10)
            async with ResilientPool(**where) as pool:
                assert await pool.fetchval("SELECT 42") == 42


async def test_when_every_host_fails_the_error_says_how_each_did(postgres, resolver):
    """The error is one that waiting may cure, if there is one."""
    names, _ = resolver
    names["gone.test"] = []
    hosts = ["127.0.0.1", "gone.test", "/nowhere"]
    async with ResilientPool(**arguments(postgres, hosts, [1, 5432, 5432], deadline=0.5)) as pool:
        with pytest.raises(OSError, match=r"Connect call failed|Name or service") as caught:
            await pool.fetchval("SELECT 42")
    notes = "\n".join(caught.value.__notes__)
    assert "tried 127.0.0.1:1 (ConnectionRefusedError)" in notes
    assert "gone.test:5432 (gaierror)" in notes
    assert "/nowhere:5432 (FileNotFoundError)" in notes


async def test_a_standby_is_preferred_and_a_primary_taken_when_there_is_none(postgres):
    """With several hosts `prefer-standby` asks all for a standby first; an unreachable one among them changes nothing."""
    for ports in ([postgres.port, 1], [1, postgres.port]):
        where = arguments(postgres, ["127.0.0.1"] * 2, ports, target_session_attrs="prefer-standby")
        async with ResilientPool(**where) as pool:
            assert await pool.fetchval("SELECT pg_is_in_recovery()") is False
        async with ResilientPool(**{**where, "target_session_attrs": "standby", "deadline": 0.5}) as pool:
            with pytest.raises(asyncpg.TargetServerAttributeNotMatched):
                await pool.fetchval("SELECT 1")


async def test_a_preferred_standby_that_is_silent_does_not_hide_the_primary(postgres):
    """The primary has said at once that it is none; it is taken when the other one has had its share of the time."""
    with silent_server() as listener:
        hosts, ports = ["127.0.0.1", postgres.host], [port_of(listener), postgres.port]
        where = arguments(postgres, hosts, ports, target_session_attrs="prefer-standby", deadline=3.0)
        async with ResilientPool(**where) as pool:
            started = time.monotonic()
            assert await pool.fetchval("SELECT 1") == 1
            assert time.monotonic() - started < 2.5
            await pool.expire_connections()
            assert await pool.fetchval("SELECT 1", deadline=1.0) == 1


async def test_a_cancelled_attempt_leaves_nothing_open(postgres):
    """Whichever hosts it was trying."""
    with silent_server() as first, silent_server() as second:
        where = arguments(postgres, ["127.0.0.1"] * 2, [port_of(first), port_of(second)], timeout=1)
        before = asyncio.all_tasks()
        async with ResilientPool(**where) as pool:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.8):
                    await pool.fetchval("SELECT 42")
        await eventually(lambda: asyncio.all_tasks() == before)
