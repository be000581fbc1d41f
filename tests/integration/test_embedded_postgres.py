"""What the embedded server promises to tests, each promise seen from a plain asyncpg connection."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
from waiting import eventually

from resilient_pool.testing import EmbeddedPostgres


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
async def server():
    async with EmbeddedPostgres() as server:
        yield server


@pytest.mark.parametrize(("fixture", "major"), [("postgres", 18), ("postgres16", 16)])
async def test_each_version_serves_over_tcp_and_over_a_unix_socket(request, fixture, major):
    """Both addresses lead to a server of the version asked for."""
    server = request.getfixturevalue(fixture)
    for host in (server.host, server.socket_directory):
        connection = await asyncpg.connect(**{**server.connect_arguments(), "host": host})
        assert connection.get_server_version().major == major
        assert await connection.fetchval("SHOW max_connections") == "60"
        await connection.close()


async def test_a_role_is_let_in_only_with_its_password(server):
    """Passwords and names with awkward characters pass through the DSN, and a wrong password is refused."""
    password = "p@ss 'wörd'/%"
    await server.create_role('odd "name"', password, options="CONNECTION LIMIT 1")
    await server.create_database("my shop", owner='odd "name"')
    connection = await asyncpg.connect(server.dsn("my shop", 'odd "name"', password))
    assert await connection.fetchval("SELECT current_user || '@' || current_database()") == 'odd "name"@my shop'
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await asyncpg.connect(server.dsn("my shop", 'odd "name"', password))
    await connection.close()
    for wrong in ("wrong", None):
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.dsn("my shop", 'odd "name"', wrong))


async def test_applied_settings_reach_sessions_that_are_already_open(server):
    """A change is in force when the call returns, and None takes it back."""
    connection = await asyncpg.connect(server.dsn())
    await server.apply_settings({"work_mem": "5MB", "enable_seqscan": False})
    assert await connection.fetchval("SHOW work_mem") == "5MB"
    assert await connection.fetchval("SHOW enable_seqscan") == "off"
    await server.apply_settings({"work_mem": None})
    assert await connection.fetchval("SHOW work_mem") == "4MB"
    await connection.close()


async def test_terminated_backends_are_counted_and_gone(server):
    """Only sessions that the condition names are ended."""
    spared = await asyncpg.connect(server.dsn(), server_settings={"application_name": "spared"})
    others = [await asyncpg.connect(server.dsn()) for _ in range(3)]
    assert await server.terminate_backends("application_name <> 'spared'") == 3
    await eventually(lambda: all(connection.is_closed() for connection in others))
    assert await spared.fetchval("SELECT 1") == 1
    await spared.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_keeps_the_port_and_the_data(server, mode):
    """Clients find the same address and everything that was committed."""
    port = server.port
    async with server.admin() as connection:
        await connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    await server.restart(mode)
    assert server.port == port
    async with server.admin() as connection:
        assert await connection.fetchval("SELECT value FROM kept") == 7


async def test_a_smart_stop_waits_for_clients_and_says_so_when_they_stay(server):
    """The limit is honoured, and a harder stop still works."""
    connection = await asyncpg.connect(server.dsn())
    with pytest.raises(TimeoutError, match="smart"):
        await server.stop("smart", timeout=0.2)
    assert server.is_running
    await server.stop("immediate")
    assert not server.is_running
    assert server.pid is None
    connection.terminate()
    with pytest.raises(OSError):
        await asyncpg.connect(server.dsn())


async def test_a_killed_backend_is_a_crash_for_every_session(server):
    """SIGKILL of one process ends the others, and the server recovers by itself."""
    victim, bystander = [await asyncpg.connect(server.dsn()) for _ in range(2)]
    server.kill_backend(victim.get_server_pid())
    await eventually(lambda: victim.is_closed() and bystander.is_closed())
    await eventually(lambda: "database system is ready to accept connections" in server.log.partition("reinit")[2])
    connection = await asyncpg.connect(server.dsn())
    await connection.close()


async def test_a_frozen_server_answers_no_client_until_it_is_thawed(server):
    """New connections hang with the postmaster, present ones too when asked for."""
    connection = await asyncpg.connect(server.dsn())
    server.freeze()
    with pytest.raises(TimeoutError):
        await asyncpg.connect(server.dsn(), timeout=0.2)
    assert await connection.fetchval("SELECT 1") == 1
    server.freeze(backends=True)
    answer = asyncio.ensure_future(connection.fetchval("SELECT 2"))
    assert not (await asyncio.wait([answer], timeout=0.2))[0]
    server.thaw()
    assert await answer == 2
    await connection.close()


async def test_a_standby_follows_and_takes_over(server):
    """It reads what the primary wrote, refuses to write, and writes once promoted."""
    async with server.admin() as connection:
        await connection.execute("CREATE TABLE followed AS SELECT 1 AS value")
    async with await server.standby("replica") as standby:
        async with server.admin() as connection:
            assert await connection.fetchval("SELECT application_name FROM pg_stat_replication") == "replica"
        async with standby.admin() as connection:
            assert await connection.fetchval("SELECT value FROM followed") == 1
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await connection.execute("INSERT INTO followed VALUES (2)")
        await server.stop("immediate")
        await standby.promote()
        async with standby.admin() as connection:
            await connection.execute("INSERT INTO followed VALUES (2)")
            assert await connection.fetchval("SELECT count(*) FROM followed") == 2


async def test_two_servers_are_two_systems():
    """No two servers share an identity, whatever they have in common."""
    identities = set()
    for _ in range(2):
        async with EmbeddedPostgres() as server, server.admin() as connection:
            identities.add(await connection.fetchval("SELECT system_identifier FROM pg_control_system()"))
    assert len(identities) == 2


async def test_a_server_that_cannot_start_shows_its_log_and_leaves_nothing():
    """The error quotes what PostgreSQL said, and the temporary directory is gone."""
    server = EmbeddedPostgres(settings={"max_connections": "many"})
    with pytest.raises(RuntimeError, match=r'invalid value for parameter "max_connections": "many"'):
        await server.start()
    assert server.log == ""
    assert not server.is_running


async def test_a_given_data_directory_outlives_its_server():
    """A second server finds what a first one left in the same directory."""
    async with EmbeddedPostgres() as leases:
        base = Path(leases.socket_directory) / "kept"
        server = EmbeddedPostgres(data_directory=base)
        async with server, server.admin() as connection:
            await connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
        async with EmbeddedPostgres(data_directory=base) as again, again.admin() as connection:
            assert await connection.fetchval("SELECT value FROM kept") == 7


def test_a_server_outlives_the_event_loop_it_was_started_in():
    """Start, use and stop may each happen in another loop."""
    server = EmbeddedPostgres()
    asyncio.run(server.start())

    async def ask() -> int:
        async with server.admin() as connection:
            return await connection.fetchval("SELECT 1")

    assert asyncio.run(ask()) == 1
    directory = server.socket_directory
    asyncio.run(server.close())
    assert not Path(directory).exists()


PROGRAM = """
import asyncio, sys
from resilient_pool.testing import EmbeddedPostgres
server = EmbeddedPostgres()
asyncio.run(server.start())
print(server.pid, server.socket_directory, flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_over_however_the_process_ends(end):
    """The guard stops the server and removes its directory even after SIGKILL; an ordinary exit does so itself."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "exit" if end == "exit" else "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with program:
        pid, directory = program.stdout.readline().decode().split()
        assert pid.isdecimal()
        if end != "exit":
            assert alive(int(pid))
            program.send_signal(getattr(signal, end))
        program.wait()
    if end in {"SIGTERM", "SIGKILL"}:
        asyncio.run(eventually(lambda: not alive(int(pid)) and not Path(directory).exists()))
    assert not alive(int(pid))
    assert not Path(directory).exists()


async def test_binaries_that_others_cannot_reach_are_copied(monkeypatch):
    """A virtual environment below a private directory is no obstacle when the tests run as root."""
    from resilient_pool.testing import _installation as _host

    monkeypatch.setattr(_host, "_open_to_all", lambda prefix: False)
    monkeypatch.setenv("HOME", "")
    async with EmbeddedPostgres() as server:
        assert os.path.exists(f"{server.socket_directory}/copied") == (os.geteuid() == 0)  # noqa: ASYNC240, PTH110
        async with server.admin() as connection:
            assert await connection.fetchval("SELECT 1") == 1


def test_an_unknown_version_is_refused_before_anything_starts():
    """The message names the versions there are."""
    with pytest.raises(ValueError, match=r"\[16, 18\], not 9"):
        EmbeddedPostgres(9)
