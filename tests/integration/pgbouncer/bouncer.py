"""PgBouncer, started from Debian's package or from wherever PATH finds another one."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time
from typing import Self

import psycopg2
import psycopg2.extras

from resilient_pool.testing import EmbeddedPostgres
from resilient_pool.testing import _installation as host

SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def programs() -> dict[str, str]:
    """Find one PgBouncer of each version along PATH: version to path, the oldest first."""
    found: dict[str, str] = {}
    for directory in dict.fromkeys(SEARCHED.split(os.pathsep)):
        path = shutil.which("pgbouncer", path=directory)
        if path is not None:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"PgBouncer (\d+\.\d+)", answer)
            if version is not None:
                found.setdefault(version.group(1), path)
    return dict(sorted(found.items(), key=lambda item: numbers(item[0])))


def numbers(version: str) -> tuple[int, ...]:
    """Return a version as something that compares."""
    return tuple(map(int, version.split(".")))


class PgBouncer:
    """A PgBouncer of its own on 127.0.0.1, in front of a server.

    Args:
        server: What it stands before.
        version: A key of `programs()`.
        pool_mode: "transaction" or "session".
        **settings: More lines of its configuration.
    """

    def __init__(
        self, server: EmbeddedPostgres, version: str, *, pool_mode: str = "transaction", **settings: object
    ) -> None:
        self._server = server
        self._program = programs()[version]
        self._account = host.unprivileged_account()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = host.free_port()
        self.settings = {
            "pool_mode": pool_mode,
            "default_pool_size": 5,
            "max_client_conn": 200,
            # What a client that waits for the server behind is to see soon.
            "server_login_retry": 1,
            "server_connect_timeout": 3,
            **settings,
        }

    async def __aenter__(self) -> Self:
        self._base = host.make_base_directory(self._account)
        self.write_configuration()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop("immediate")
        shutil.rmtree(self._base, ignore_errors=True)

    def dsn(self, **options: object) -> str:
        """Return the URL of the database behind."""
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?{query}".rstrip("?")

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self._base / "log").read_text(errors="replace")

    def write_configuration(self) -> None:
        """Write what `start` and RELOAD read."""
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": self._base / "users",
            "admin_users": "postgres",
            "ignore_startup_parameters": "extra_float_digits",
            **self.settings,
        }
        behind = f"postgres = host={self._server.host} port={self._server.port} dbname=postgres user=postgres"
        text = "\n".join(f"{name} = {value}" for name, value in lines.items())
        self._write("users", '"postgres" ""\n')
        self._write("pgbouncer.ini", f"[databases]\n{behind}\n[pgbouncer]\n{text}\n")

    def _write(self, name: str, text: str) -> None:
        path = self._base / name
        path.write_text(text)
        self._account.own(path)

    async def start(self) -> None:
        """Start it and return when it accepts connections."""
        log = self._base / "log"
        ups = self.log.count("process up:") if log.exists() else 0
        command = [self._program, str(self._base / "pgbouncer.ini")]
        with log.open("ab") as output:
            self._process = host.launch(command, self._account, self._base, output)
        ends = time.monotonic() + 20
        # Not by a connection: it would count among the clients.
        while self.log.count("process up:") == ups:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < ends, self.log
            await asyncio.sleep(0.01)

    async def stop(self, mode: str = "immediate") -> None:
        """Stop it: "immediate" drops all clients, "kill" is its crash."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL if mode == "kill" else signal.SIGTERM)
        if mode == "immediate":  # from 1.23 on, SIGTERM waits for clients to leave, and SIGQUIT does not
            self._process.send_signal(signal.SIGQUIT)
        await asyncio.to_thread(self._process.wait, 20)

    async def restart(self, mode: str = "immediate") -> None:
        """Stop and start it, on the same port."""
        await self.stop(mode)
        await self.start()

    async def console(self, command: str) -> list[dict[str, object]]:
        """Say something to its console, and return the rows of a SHOW."""
        return await asyncio.to_thread(self._console, command)

    def _console(self, command: str) -> list[dict[str, object]]:
        connection = psycopg2.connect(host="127.0.0.1", port=self.port, user="postgres", dbname="pgbouncer")
        connection.autocommit = True
        try:
            with connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
                cursor.execute(command)
                return [dict(row) for row in cursor] if cursor.description else []
        finally:
            connection.close()
