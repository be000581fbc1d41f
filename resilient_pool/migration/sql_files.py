"""The only module that applies a directory of SQL files: each once, in order, in a transaction, and recorded."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from resilient_pool.connection import ResilientConnection
from resilient_pool.errors import ConfigurationError, MigrationFailedError, OutcomeUnknownError
from resilient_pool.migration.output import LineSink
from resilient_pool.policy.atomicity import ends_transaction, is_atomic
from resilient_pool.policy.lexer import Kind, tokens
from resilient_pool.pool import ResilientPool

TABLE = "resilient_pool_migrations"
"""Where applied files are recorded, in the first schema of the search path."""

NO_TRANSACTION = "-- resilient-pool: no transaction"
"""The first line of a file whose one statement cannot run in a transaction, such as CREATE INDEX CONCURRENTLY."""

_CREATE = f"""
    CREATE TABLE IF NOT EXISTS {TABLE} (
        name text PRIMARY KEY, checksum text NOT NULL, started_at timestamptz NOT NULL DEFAULT now(),
        finished_at timestamptz)
"""
_EXISTS = f"SELECT pg_catalog.to_regclass('{TABLE}') IS NOT NULL"
_RECORDED = f"SELECT name, checksum, finished_at IS NOT NULL AS finished FROM {TABLE}"  # noqa: S608
# A second transaction that inserts the same name waits for the first one's end, so that even without the lock, and even
# if nobody knows what became of the first, no file is applied twice.
_RECORD = f"""
    INSERT INTO {TABLE} (name, checksum, finished_at) VALUES ($1, $2, CASE WHEN $3 THEN clock_timestamp() END)
    ON CONFLICT (name) DO NOTHING RETURNING true
"""  # noqa: S608
_FINISH = f"UPDATE {TABLE} SET finished_at = clock_timestamp() WHERE name = $1 AND checksum = $2"  # noqa: S608
_FORGET = f"DELETE FROM {TABLE} WHERE name = $1 AND checksum = $2 AND finished_at IS NULL"  # noqa: S608
# Two that create it at the same moment may get in each other's way in spite of IF NOT EXISTS.
_MADE_BY_ANOTHER = (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError)
_NUMBER = re.compile(r"(\d+)")
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlFile:
    """One file.

    Attributes:
        name: Its name in the directory.
        sql: What it holds.
        checksum: SHA-256 of that, with line ends as Unix writes them.
        transactional: Whether it runs in a transaction.
    """

    name: str
    sql: str
    checksum: str
    transactional: bool


def read_directory(directory: Path) -> tuple[SqlFile, ...]:
    """Return the `*.sql` files of a directory in the order of their names, with numbers in them counted as numbers.

    Raises:
        ConfigurationError: It is no directory, holds no such file, or one that cannot be read or ends its transaction.
    """
    if not directory.is_dir():
        raise ConfigurationError(f"{str(directory)!r} is not a directory of SQL files")
    paths = sorted(directory.glob("*.sql"), key=lambda path: _order(path.name))
    if not paths:
        raise ConfigurationError(f"the directory {str(directory)!r} holds no file whose name ends in .sql")
    return tuple(_read(path) for path in paths)


def _order(name: str) -> tuple[tuple[object, ...], str]:
    parts = _NUMBER.split(name)
    return tuple(int(part) if position % 2 else part for position, part in enumerate(parts)), name


def _read(path: Path) -> SqlFile:
    try:
        sql = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path.name} cannot be read as UTF-8 text: {error}") from error
    transactional = sql.partition("\n")[0].strip() != NO_TRANSACTION
    if transactional and ends_transaction(sql):
        raise ConfigurationError(
            f"{path.name} may end the transaction that it runs in: take BEGIN, COMMIT, ROLLBACK and PREPARE out, since each "
            "file is one transaction. If it is one statement that cannot run in a transaction, begin the file with "
            f"{NO_TRANSACTION!r}"
        )
    if not transactional and not _is_one_statement(sql):
        raise ConfigurationError(
            f"{path.name} is marked {NO_TRANSACTION!r} but is not one statement for certain: put each into a file of its own"
        )
    return SqlFile(
        name=path.name, sql=sql, checksum=hashlib.sha256(sql.encode()).hexdigest(), transactional=transactional
    )


def _is_one_statement(sql: str) -> bool:
    found, ended = False, False
    for token in tokens(sql):
        separates = token.kind is Kind.SIGN and token.text == ";"
        if token.kind is Kind.DOUBT or (ended and not separates):
            return False
        found, ended = True, separates
    return found


class SqlDirectory:
    """A directory of SQL files, to be applied by `apply`.

    Args:
        files: What is in it, as `read_directory` returns it.
        tell: Is given one line for each file applied.
    """

    def __init__(self, files: Sequence[SqlFile], tell: LineSink) -> None:
        self._files = tuple(files)
        self._tell = tell

    async def apply(self, pool: ResilientPool) -> tuple[str, ...]:
        """Apply what is not recorded yet, and return the names.

        Raises:
            MigrationFailedError: A recorded file has changed, or was begun outside a transaction and not finished, or our
                role may not record anything; then nothing was applied. Or a file failed: those before it stay applied.
        """
        recorded = await _recorded(pool)
        for file in self._files:
            if file.name in recorded:
                _check(file, recorded[file.name])
        applied = []
        for file in self._files:
            if file.name not in recorded and await self._apply(pool, file):
                self._tell(f"applied {file.name}")
                applied.append(file.name)
        return tuple(applied)

    async def _apply(self, pool: ResilientPool, file: SqlFile) -> bool:
        try:
            if file.transactional:
                return await _in_transaction(pool, file)
            return await _outside_transaction(pool, file)
        except MigrationFailedError:
            raise
        except OutcomeUnknownError as error:
            raise MigrationFailedError(f"{file.name}: the connection was lost, and its end is not known") from error
        except Exception as error:
            # Whatever it is: the database was there when it began, so this is not "the database never came".
            raise _failed(file, error) from error


async def _recorded(pool: ResilientPool) -> dict[str, asyncpg.Record]:
    """Return what is recorded, by name; make the table first if there is none."""
    try:
        if not await pool.fetchval(_EXISTS):
            with contextlib.suppress(*_MADE_BY_ANOTHER):
                await pool.execute(_CREATE, idempotent=True)
        return {row["name"]: row for row in await pool.fetch(_RECORDED)}
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationFailedError(
            f"our role may not keep the table {TABLE}, where applied files are recorded, in the first schema of its search "
            f"path: {error}. GRANT it CREATE ON that SCHEMA, or, if the table is there, SELECT, INSERT, UPDATE, DELETE ON it"
        ) from error


def _check(file: SqlFile, recorded: asyncpg.Record) -> None:
    if not recorded["finished"]:
        raise MigrationFailedError(
            f"{file.name}, which runs outside a transaction, was begun before and its end is not known: see whether its "
            f"statement has taken effect. If it has, set finished_at in its row of the table {TABLE}; if it has not, delete "
            "that row"
        )
    if recorded["checksum"] != file.checksum:
        raise MigrationFailedError(
            f"{file.name} has changed since it was applied (recorded as {recorded['checksum'][:12]}, now "
            f"{file.checksum[:12]}): restore it, and put the change into a new file"
        )


async def _in_transaction(pool: ResilientPool, file: SqlFile) -> bool:
    attempts = _Attempts(file)
    while True:
        try:
            return await pool.run_in_transaction(attempts.record_and_run)
        except OutcomeUnknownError:
            # The server could not tell what became of the COMMIT, but the record is part of that transaction: it is
            # there if, and only if, the file took effect.
            if await _is_recorded(pool, file):
                return True
            if attempts.are_spent:
                raise


class _Attempts:
    """One file's transaction, as often as it is repeated: after a lost connection, and after a conflict with another one."""

    def __init__(self, file: SqlFile) -> None:
        self._file = file
        self._begun = 0

    @property
    def are_spent(self) -> bool:
        """Whether no further one may begin."""
        return self._begun >= _ATTEMPTS

    async def record_and_run(self, connection: ResilientConnection) -> bool:
        """Record the file and run it, unless it is recorded; its last attempt's error is final."""
        self._begun += 1
        try:
            # First the record: afterwards the file may have changed the search path.
            if not await connection.fetchval(_RECORD, self._file.name, self._file.checksum, True):
                return False
            await connection.execute(self._file.sql)
        except Exception as error:
            if self.are_spent:
                raise _failed(self._file, error, f" (in each of {_ATTEMPTS} attempts)") from error
            raise
        return True


async def _outside_transaction(pool: ResilientPool, file: SqlFile) -> bool:
    if not await pool.fetchval(_RECORD, file.name, file.checksum, False, exactly_once=True):
        return False
    try:
        await pool.execute(file.sql)
    except asyncpg.PostgresError:
        # The server refused the one statement, so it can be begun again. What it leaves behind, as a failed CREATE INDEX
        # CONCURRENTLY leaves an invalid index, is for its author to remove. A CALL may have committed something before.
        if is_atomic(file.sql):
            await pool.execute(_FORGET, file.name, file.checksum, idempotent=True)
        raise
    await pool.execute(_FINISH, file.name, file.checksum, idempotent=True)
    return True


async def _is_recorded(pool: ResilientPool, file: SqlFile) -> bool:
    found: Sequence[asyncpg.Record] = await pool.fetch(_RECORDED)
    return any(row["name"] == file.name and row["checksum"] == file.checksum for row in found)


def _failed(file: SqlFile, error: Exception, more: str = "") -> MigrationFailedError:
    said = str(error) if isinstance(error, asyncpg.PostgresError) else f"{type(error).__name__}: {error}".rstrip(": ")
    return MigrationFailedError(f"{file.name}{_place(file, error)}: {said}{more}")


def _place(file: SqlFile, error: Exception) -> str:
    position = getattr(error, "position", None)
    if not isinstance(position, str) or not position.isdigit():
        return ""
    return f", line {file.sql.count(chr(10), 0, int(position) - 1) + 1}"
