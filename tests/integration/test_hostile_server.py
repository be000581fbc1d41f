"""A server that means harm, or is none: garbage, impossible lengths, endless messages, messages at the wrong time; and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import ssl
import struct
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import FaultProxy, TlsCertificates

PAGE = os.sysconf("SC_PAGE_SIZE")
MOST_BYTES = 64 * 2**20
"""How much memory an attempt may take, over what there was."""


def message(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a message of the protocol, or one that lies about its length."""
    return kind + struct.pack("!i", len(body) + 4 if length is None else length) + body


READY = message(b"Z", b"I")
PARAMETERS = (b"server_version\x0018.0\0", b"client_encoding\0UTF8\0", b"standard_conforming_strings\0on\0")
LET_IN = (
    message(b"R", struct.pack("!i", 0))
    + b"".join(message(b"S", each) for each in PARAMETERS)
    + message(b"K", struct.pack("!ii", 1, 1))
    + READY
)
NOTICE = message(b"N", b"SNOTICE\0C00000\0M" + b"x" * 1000 + b"\0\0")
ROW = message(b"D", struct.pack("!hi", 1, -5) + b"x" * 10)


def garbage(seed: int) -> bytes:
    return random.Random(seed).randbytes(5_000)


# What the server says instead of an answer: at login, or to the first statement. A length below four is not among it: asyncpg
# (0.32) reads such a message for ever, without a turn of the event loop. SECURITY.md says so.
SAYS = {
    "nothing but a closed door": b"",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    **{f"garbage {seed}": garbage(seed) for seed in range(8)},
    "a length of two gigabytes": message(b"D", b"x" * 100, length=2**31 - 1),
    "an unknown way to log in": message(b"R", struct.pack("!i", 99)),
    "a torn challenge": message(b"R", struct.pack("!i", 10) + b"SCRAM-SHA-256"),
    "a challenge of a billion rounds": message(b"R", struct.pack("!i", 10) + b"SCRAM-SHA-256\0\0"),
    "rows without a question": ROW * 100 + READY,
    "an error without fields": message(b"E", b"\0") + READY,
    "an error without an end": message(b"E", b"SFATAL\0C", length=20),
    "a parameter that is no text": message(b"S", b"\xff\xfe\0\xff\0") + READY,
    "ready before the login": READY * 50,
    "a copy that was not asked for": message(b"G", b"\0\0\0") + message(b"d", b"x" * 100) + READY,
}


class Hostile:
    """A server that lets clients in or not, and then says something over and over.

    Args:
        says: What it says.
        at_login: Whether instead of letting clients in, or in answer to what they ask then.
        endless: Whether without an end.
    """

    def __init__(self, says: bytes, *, at_login: bool, endless: bool = False) -> None:
        self._says, self._at_login, self._endless = says, at_login, endless
        self.sent = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.dsn = f"postgresql://postgres@127.0.0.1:{self._server.sockets[0].getsockname()[1]}/postgres"
        self._writers = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.read(4096)
            if not self._at_login:
                writer.write(LET_IN)
                await reader.read(4096)
            while self._says:
                writer.write(self._says)
                self.sent += len(self._says)
                await writer.drain()
                if not self._endless:
                    await reader.read(4096)
                    break
            writer.close()


def memory() -> int:
    """Return how many bytes of this process are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


async def ask(server: Hostile, **arguments) -> tuple[object, float, int]:
    """Ask for 1, and return the answer or the error, how many seconds that took, and how much memory at most."""
    before = peak = memory()
    began = time.monotonic()
    options = {"deadline": 0.4, "timeout": 0.3, "command_timeout": 0.3, "reset_timeout": 0.3, "ssl": False, **arguments}
    async with ResilientPool(server.dsn, **options) as pool:
        call = asyncio.ensure_future(pool.fetchval("SELECT 1"))
        while not call.done():
            await asyncio.wait([call], timeout=0.02)
            peak = max(peak, memory())
        answer = call.exception() or call.result()
    return answer, time.monotonic() - began, peak - before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at_login", [True, False], ids=["at login", "as an answer"])
@pytest.mark.parametrize("says", SAYS.values(), ids=SAYS)
async def test_whatever_a_server_says_ends_in_an_error_within_the_time(says, at_login):
    """Never in an answer, and without more memory than it takes to hear it out."""
    async with Hostile(says, at_login=at_login) as server:
        answer, seconds, taken = await ask(server)
    assert isinstance(answer, Exception), answer
    assert seconds < 6
    assert taken < MOST_BYTES


# Run as a program: it asks the server at the address that is its argument.
ASKING = """
import asyncio, resource, sys, resilient_pool

async def main():
    async with resilient_pool.create_pool(sys.argv[1], ssl=False, deadline=2) as pool:
        await pool.fetchval("SELECT 1")

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
asyncio.run(main())
"""


@pytest.mark.parametrize(
    "says",
    [struct.pack("!i", 11) + b"r=a,s=QUJD,i=4096", struct.pack("!i", 12) + b"v=QUJD"],
    ids=["a challenge", "a last word"],
)
async def test_scram_out_of_turn_still_ends_the_process_as_the_security_page_says(says):
    """A fault of asyncpg's, in every version that is supported: when it is mended this fails, and SECURITY.md changes."""
    async with Hostile(message(b"R", says), at_login=True) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ASKING, server.dsn, stderr=asyncio.subprocess.DEVNULL
        )
        async with asyncio.timeout(30):
            assert await process.wait() == -signal.SIGSEGV


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at_login", [True, False], ids=["at login", "as an answer"])
async def test_endless_notices_end_with_the_time_and_fill_no_memory(at_login):
    """They are read and dropped."""
    async with Hostile(NOTICE * 50, at_login=at_login, endless=True) as server:
        answer, seconds, taken = await ask(server)
    assert isinstance(answer, Exception)
    assert server.sent > 2**20
    assert seconds < 6
    assert taken < MOST_BYTES


# TLS


@pytest.fixture
def secured(postgres):
    """A proxy that speaks TLS with a certificate for 127.0.0.1."""
    certificates = TlsCertificates()
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy:
        yield proxy, certificates


async def test_verify_full_accepts_the_right_certificate(secured, postgres, tmp_path):
    """Of the authority that was named, for the host that was asked for."""
    proxy, certificates = secured
    root = certificates.write_ca(tmp_path / "ca.pem")
    async with ResilientPool(f"{proxy.dsn(postgres.dsn())}?sslmode=verify-full&sslrootcert={root}") as pool:
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT 42") == 42
            assert connection._con._protocol.is_ssl


async def test_verify_full_refuses_an_authority_that_is_not_ours_at_once(secured, postgres, tmp_path):
    """No statement and no password is sent, and no wait would cure it."""
    proxy, _ = secured
    root = TlsCertificates().write_ca(tmp_path / "other.pem")
    async with ResilientPool(
        f"{proxy.dsn(postgres.dsn())}?sslmode=verify-full&sslrootcert={root}", deadline=20
    ) as pool:
        async with asyncio.timeout(10):
            with pytest.raises(ssl.SSLCertVerificationError):
                await pool.fetchval("SELECT 42")


async def test_verify_full_refuses_a_certificate_for_another_host_at_once(postgres, tmp_path):
    """The authority is ours, the name is not: no login is begun, and no second attempt is made. `verify-ca` lets it pass."""
    certificates = TlsCertificates("db.example.com")
    root = certificates.write_ca(tmp_path / "ca.pem")
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy:
        dsn = f"{proxy.dsn(postgres.dsn())}?sslrootcert={root}&sslmode="
        async with ResilientPool(dsn + "verify-full", deadline=20) as pool:
            began = time.monotonic()
            with pytest.raises(ssl.SSLCertVerificationError, match=r"127\.0\.0\.1"):
                await pool.fetchval("SELECT 42")
            assert time.monotonic() - began < 5
        assert proxy.attempts == 1
        async with ResilientPool(dsn + "verify-ca") as pool:
            assert await pool.fetchval("SELECT 42") == 42


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
async def test_a_server_without_tls_gets_nothing_from_a_client_that_requires_it(postgres, tmp_path, mode):
    """Someone in between may have answered "N": the login is not begun, neither at once nor later."""
    root = TlsCertificates().write_ca(tmp_path / "ca.pem")
    extra = "" if mode == "require" else f"&sslrootcert={root}"
    seen = bytearray()

    async def serve(reader, writer):
        seen.extend(await reader.read(8))
        writer.write(b"N")
        with contextlib.suppress(OSError):
            seen.extend(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        dsn = f"postgresql://app:very-secret@127.0.0.1:{port}/postgres?sslmode={mode}{extra}"
        async with ResilientPool(dsn, deadline=1.0) as pool:
            with pytest.raises((ConnectionError, asyncpg.PostgresError, TimeoutError)):
                await pool.fetchval("SELECT 42")
    assert seen
    assert {bytes(seen)[index : index + 8] for index in range(0, len(seen), 8)} == {struct.pack("!ii", 8, 80877103)}
