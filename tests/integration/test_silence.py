"""A network link that goes down without a word, between two network namespaces: how long each phase takes to end.

It takes root and Linux. Elsewhere the fault proxy's black hole stands in for it, in other tests: that acknowledges what it swallows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time

import pytest

from resilient_pool import ResilientPool

pytestmark = [
    pytest.mark.needs("ip"),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces take root and Linux"),
]

USER_TIMEOUT, DEADLINE = 3.0, 4.0
SLACK = 5.0
"""Seconds beyond these that a busy machine may take."""
HERE, THERE, PORT = "10.213.77.1", "10.213.77.2", 6543
FORWARDER = """
import asyncio, sys
async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def serve(reader, writer):
    inner, outer = await asyncio.open_unix_connection(sys.argv[3])
    await asyncio.gather(copy(reader, outer), copy(inner, writer))
async def main():
    async with await asyncio.start_server(serve, sys.argv[1], int(sys.argv[2])) as server:
        print("ready", flush=True)
        await server.serve_forever()
asyncio.run(main())
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link(postgres):
    """A link to a namespace from which the server's UNIX socket is reached; call it to cut the link."""
    name = f"quiet{os.getpid()}"
    near, far = f"n{os.getpid()}", f"f{os.getpid()}"
    ip("netns", "add", name)
    process = None
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{HERE}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{THERE}/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        socket = f"{postgres.socket_directory}/.s.PGSQL.{postgres.port}"
        command = ["ip", "netns", "exec", name, sys.executable, "-c", FORWARDER, THERE, str(PORT), socket]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        yield lambda: ip("-n", name, "link", "set", far, "down")
    finally:
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
        subprocess.run(["ip", "link", "delete", near], check=False, capture_output=True)
        ip("netns", "delete", name)


async def connecting(pool, cut):
    await pool.expire_connections()
    cut()
    await pool.fetchval("SELECT 1")


async def idle(pool, cut):
    cut()
    await pool.fetchval("SELECT 1")


async def executing(pool, cut):
    running = asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(0.5)"))
    await asyncio.sleep(0.2)
    cut()
    await running


async def committing(pool, cut):
    async def block(connection):
        await connection.execute("CREATE TEMP TABLE silent (id int) ON COMMIT DROP")
        cut()

    await pool.run_in_transaction(block)


async def copying(pool, cut):
    async def source():
        for number in range(10_000):
            if number == 5:
                cut()
            yield b"x" * 9_999 + b"\n"

    async with pool.acquire() as connection:
        await connection.execute("CREATE TEMP TABLE silent (text text)")
        await connection.copy_to_table("silent", source=source())


async def closing(pool, cut):
    cut()


@pytest.mark.parametrize("phase", [connecting, idle, executing, committing, copying, closing], ids=lambda f: f.__name__)
async def test_silence_ends_within_the_limits_in_every_phase(postgres, link, phase):
    """The call fails when its deadline or the kernel's own limit is over, and closing takes no longer either."""
    began = time.monotonic()
    async with asyncio.timeout(60):
        pool = ResilientPool(
            f"postgresql://postgres@{THERE}:{PORT}/postgres",
            ssl=False, tcp_user_timeout=USER_TIMEOUT, deadline=DEADLINE, timeout=2.0, ping_after=0.0,
        )  # fmt: skip
        async with pool:
            await pool.fetchval("SELECT 1")
            error = None
            began = time.monotonic()
            try:
                await phase(pool, link)
            except Exception as raised:
                error = raised
            ended = time.monotonic() - began
            closing_began = time.monotonic()
        closed = time.monotonic() - closing_began
    sys.stdout.write(
        f"\nlink down, {phase.__name__}: {type(error).__name__} after {ended:.1f} s, closed in {closed:.1f} s\n"
    )
    assert (error is None) == (phase is closing)
    assert ended < USER_TIMEOUT + DEADLINE + SLACK
    assert closed < 5 + SLACK
    with contextlib.suppress(ProcessLookupError):
        await postgres.terminate_backends()
