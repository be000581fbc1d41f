"""A network link that goes down without a word, between two network namespaces: how long each phase takes to end.

It takes root and Linux. Elsewhere the fault proxy's black hole stands in for it, in other tests: that acknowledges what it swallows.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import FaultProxy, TlsCertificates

pytestmark = [
    pytest.mark.needs("ip"),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces take root and Linux"),
]

USER_TIMEOUT, DEADLINE = 3.0, 4.0
SLACK = 5.0
"""Seconds beyond these that a busy machine may take."""
PORT = 6543
CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Link:
    """A link to a network namespace, in which a listener passes everything on to a server: a cable that can be cut.

    Attributes:
        address: Where the listener is, with port `PORT`.
    """

    def __init__(self, host: str, port: int) -> None:
        # Of each process its own, four at a time, from the network for benchmarks, 198.18.0.0/15.
        first = os.getpid() % 2**15 * 4
        self._here, self.address = (
            f"198.{18 + first // 2**16}.{first // 2**8 % 2**8}.{first % 2**8 + n}" for n in (1, 2)
        )
        self._target = host, port
        self._name, self._near, self._far = (f"{kind}{os.getpid()}" for kind in ("quiet", "n", "f"))
        self._last: bytes | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        ip("netns", "add", self._name)
        try:
            ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
            ip("addr", "add", f"{self._here}/30", "dev", self._near)
            ip("link", "set", self._near, "up")
            ip("-n", self._name, "addr", "add", f"{self.address}/30", "dev", self._far)
            self.mend()
            with ThreadPoolExecutor(1) as thread:
                listening = thread.submit(self._listen).result()
            self._server = await asyncio.start_server(self._accept, sock=listening)
        except BaseException:
            self._remove()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._remove()

    def _remove(self) -> None:
        subprocess.run(["ip", "link", "delete", self._near], check=False, capture_output=True)
        ip("netns", "delete", self._name)

    def _listen(self) -> socket.socket:
        # The thread stays in the namespace, and so does what it opens.
        with Path("/run/netns", self._name).open() as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        return socket.create_server((self.address, PORT))

    def dsn(self, user: str) -> str:
        return f"postgresql://{user}@{self.address}:{PORT}/postgres"

    def cut(self) -> None:
        ip("-n", self._name, "link", "set", self._far, "down")

    def cut_after(self, last: bytes) -> None:
        """Cut it as soon as these bytes have passed, from either side; what follows them never arrives."""
        self._last = last

    def mend(self) -> None:
        ip("-n", self._name, "link", "set", self._far, "up")

    @property
    def was_cut(self) -> bool:
        """Whether what `cut_after` waits for has passed."""
        return self._last is None

    def sockets(self) -> int:
        """Count this process's sockets that are connected to the other side."""
        inodes = set()
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
        remote = f"{socket.htonl(int.from_bytes(socket.inet_aton(self.address), 'big')):08X}:{PORT:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(line[2] == remote and line[9] in inodes for line in lines)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._pass_on(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection(*self._target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, outer))
                group.create_task(self._copy(inner, writer))
        except* OSError:
            pass
        finally:
            outer.transport.abort()
            writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        while data := await reader.read(65536):
            seen += data
            if self._last is not None and self._last in seen:
                kept = len(seen) - seen.index(self._last) - len(self._last)
                writer.write(data[: len(data) - kept])
                self._last = None
                await _until_acknowledged(writer)
                self.cut()
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        writer.close()


async def _until_acknowledged(writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(10):
        while struct.unpack("i", fcntl.ioctl(writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]:
            await asyncio.sleep(0.001)


@pytest.fixture
async def link(postgres):
    """A link at whose other end the server is."""
    async with Link(postgres.host, postgres.port) as link:
        yield link


async def connecting(pool, cut):
    await pool.expire_connections()
    cut()
    await pool.fetchval("SELECT 1")


async def idle(pool, cut):
    cut()
    await pool.fetchval("SELECT 1")


async def executing(pool, cut):
    running = asyncio.ensure_future(pool.fetchval("SELECT pg_sleep(60)"))
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
            link.dsn("postgres"),
            ssl=False, tcp_user_timeout=USER_TIMEOUT, deadline=DEADLINE, timeout=2.0, ping_after=0.0,
        )  # fmt: skip
        async with pool:
            await pool.fetchval("SELECT 1")
            error = None
            began = time.monotonic()
            try:
                await phase(pool, link.cut)
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


HANDSHAKE = {
    "asking for TLS": ("require", struct.pack("!ii", 8, 80877103)),
    "in the ClientHello": ("require", b"\x16\x03\x01"),
    "in the ServerHello": ("require", b"\x16\x03\x03"),
    "after the startup message": ("disable", b"user\0silent\0"),
    "in the server's offer of SCRAM": ("disable", b"R\0\0\0\x17\0\0\0\nSCRAM"),
    "after the client's first message of SCRAM": ("disable", b"n=silent,r="),
    "after the client's proof": ("disable", b",p="),
    "after AuthenticationOk": ("disable", b"R\0\0\0\x08\0\0\0\0"),
    "in the first ReadyForQuery": ("disable", b"Z\0\0\0\x05"),
}
"""How far a client gets that logs in: which TLS it asks for, and the last bytes that pass."""


@pytest.fixture
async def role(postgres):
    async with postgres.admin() as admin:
        await admin.execute("CREATE ROLE silent LOGIN PASSWORD 'quiet'")
    yield "silent:quiet"
    async with postgres.admin() as admin:
        await admin.execute("DROP ROLE silent")


@pytest.mark.parametrize(("sslmode", "last"), HANDSHAKE.values(), ids=HANDSHAKE)
async def test_silence_while_a_client_logs_in_ends_with_the_deadline_and_leaves_no_socket(
    postgres, role, sslmode, last
):
    """Each attempt is given up after the connect time-out, and the first call after the link is up again is served."""
    with FaultProxy(postgres.host, postgres.port, tls=TlsCertificates()) as proxy:
        async with asyncio.timeout(60), Link(proxy.host, proxy.port) as link:
            pool = ResilientPool(f"{link.dsn(role)}?sslmode={sslmode}", deadline=20.0, timeout=1.0)
            async with pool:
                assert await pool.fetchval("SELECT 1") == 1
                assert link.sockets() == 1
                await pool.expire_connections()
                link.cut_after(last)
                began = time.monotonic()
                with pytest.raises(TimeoutError) as raised:
                    await pool.fetchval("SELECT 2", deadline=1.5)
                ended = time.monotonic() - began
                assert link.was_cut
                sys.stdout.write(f"\nlink down: {raised.value!r} after {ended:.1f} s, {pool!r}\n")
                assert ended < 1.5 + SLACK
                link.mend()
                assert await pool.fetchval("SELECT 3") == 3
            assert link.sockets() == 0
