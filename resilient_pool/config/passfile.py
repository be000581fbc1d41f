"""Reads password files (PostgreSQL's manual, "The Password File")."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from resilient_pool.config.dsn import home_file
from resilient_pool.config.secrets import Secret

_ENTRY = r"(?s)" + r"((?:[^\\:]|\\.)*):" * 4 + r"(.*)"
_ESCAPE = r"(?s)\\(.)"


class PasswordFile:
    """The password that a password file holds for one login; called, it reads the file anew.

    asyncpg reads the file for every connection too: a password changed there needs no restart of the application.
    """

    __slots__ = ("_database", "_logins", "_path", "_user", "last")

    def __init__(self, path: Path, logins: Iterable[tuple[str, int]], database: str, user: str) -> None:
        self._path = path
        self._logins = tuple(logins)
        self._database = database
        self._user = user
        self.last = self._find()

    def __repr__(self) -> str:
        return f"<PasswordFile {str(self._path)!r}>"

    def __call__(self) -> Secret | None:
        """Return the password as the file holds it now, or the last one it held."""
        self.last = self._find() or self.last
        return self.last

    def _find(self) -> Secret | None:
        entries = [entry for line in _lines(self._path) if (entry := _entry(line.reveal())) is not None]
        for host, port in self._logins:
            # What is said about local connections holds for all sockets, as in asyncpg.
            names = {host, "localhost"} if host.startswith("/") else {host}
            wanted = (names, {str(port)}, {self._database}, {self._user})
            for fields, password in entries:
                if all(field == "*" or _unescaped(field) in each for field, each in zip(fields, wanted, strict=True)):
                    return password
        return None


def chosen_file(passfile: str | None) -> Path | None:
    """Return the password file's path: the one given, that of `PGPASSFILE`, or the one in the home directory."""
    chosen = passfile or os.environ.get("PGPASSFILE")
    return Path(chosen) if chosen else home_file(".pgpass", "pgpass.conf")


def _lines(path: Path) -> Iterator[Secret]:
    try:
        if not path.exists() or not _is_private(path):
            return
        text = Secret(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError):
        return  # as libpq does: without the file's help
    for line in text.reveal().split("\n"):
        if line and not line.startswith("#"):
            yield Secret(line.rstrip("\r"))


def _is_private(path: Path) -> bool:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        trouble = "it is not a plain file"
    elif os.name != "nt" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        trouble = "its permissions must be u=rw (0600) or less"
    else:
        return True
    warnings.warn(f"the password file {str(path)!r} is ignored: {trouble}", stacklevel=2)
    return False


def _entry(line: str) -> tuple[Sequence[str], Secret] | None:
    """Split a line into four fields, still escaped, and the password; a line with too few fields is none."""
    match = re.fullmatch(_ENTRY, line)
    return None if match is None else (match.groups()[:-1], Secret(_unescaped(match.groups()[-1])))


def _unescaped(text: str) -> str:
    """Take each backslash away that stands before another character."""
    return re.sub(_ESCAPE, r"\1", text)
