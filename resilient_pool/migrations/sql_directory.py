"""Applies a directory of SQL files: each once, in order, in a transaction, and recorded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from resilient_pool.clock import Clock
from resilient_pool.errors import ConfigurationError, MigrationFailedError, OutcomeUnknownError
from resilient_pool.execution.connection import ResilientConnection
from resilient_pool.pool import ResilientPool
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.sql.lexer import Backslash, Kind, Token, tokens
from resilient_pool.sql.transaction_control import ends_transaction

TABLE = "resilient_pool_migrations"
"""Where applied files are recorded, in the first schema of the search path."""

NO_TRANSACTION = "-- resilient-pool: no transaction"
"""The first line of a file whose one statement cannot run in a transaction, such as CREATE INDEX CONCURRENTLY."""

_CREATE_TABLE = f"""
    CREATE TABLE IF NOT EXISTS {TABLE} (
        name text PRIMARY KEY, checksum text NOT NULL, started_at timestamptz NOT NULL DEFAULT now(),
        finished_at timestamptz)
"""
_TABLE_EXISTS = f"SELECT pg_catalog.to_regclass('{TABLE}') IS NOT NULL"
_SELECT_RECORDS = f"SELECT name, checksum, finished_at IS NOT NULL AS finished FROM {TABLE}"  # noqa: S608
# A second transaction that inserts the same name waits for the first one's end, so that even without the lock, and even
# if it is not known what became of the first, no file is applied twice.
_INSERT_RECORD = f"""
    INSERT INTO {TABLE} (name, checksum, finished_at) VALUES ($1, $2, CASE WHEN $3 THEN clock_timestamp() END)
    ON CONFLICT (name) DO NOTHING RETURNING true
"""  # noqa: S608
_MARK_FINISHED = f"UPDATE {TABLE} SET finished_at = clock_timestamp() WHERE name = $1 AND checksum = $2"  # noqa: S608
_DELETE_RECORD = f"DELETE FROM {TABLE} WHERE name = $1 AND checksum = $2 AND finished_at IS NULL"  # noqa: S608
# What CREATE TABLE IF NOT EXISTS raises when another session commits the same one while it runs: the first of its own
# checks that sees the other's table, its row type or an entry of a catalog's unique index.
_CREATED_CONCURRENTLY = (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError)
_NUMBER = re.compile(r"(\d+)")
_COMMAND_OF_PSQL = re.compile(r"^[ \t]*\\[A-Za-z!?]", re.MULTILINE)
_MAX_NAME_BYTES = 63

# The index of a partitioned table is invalid until all of its partitions have one, and rightly so.
# `inhdetachpending` came with PostgreSQL 14.
_INVALID = """
    SELECT 'index' AS kind, c.oid, c.oid::pg_catalog.regclass::text AS name, c.relname AS plain, t.relname AS owner
    FROM pg_catalog.pg_index i
    JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid JOIN pg_catalog.pg_class t ON t.oid = i.indrelid
    WHERE NOT i.indisvalid AND c.relkind = 'i'
    UNION ALL
    SELECT 'partition', c.oid, c.oid::pg_catalog.regclass::text, c.relname, t.relname
    FROM pg_catalog.pg_inherits h
    JOIN pg_catalog.pg_class c ON c.oid = h.inhrelid JOIN pg_catalog.pg_class t ON t.oid = h.inhparent
    WHERE (pg_catalog.to_jsonb(h) ->> 'inhdetachpending')::boolean
    ORDER BY 1, 3
"""
_ATTEMPTS = 5
# 0.5, 1, 2 and 4 s, at least half of each: while one waits, those pass that its lock would have kept waiting.
_BETWEEN_ATTEMPTS = BackoffPolicy(base=0.5, factor=2, jitter=lambda delay: delay / 2, max_attempts=_ATTEMPTS)
# Their procedure or block may commit and go on.
_RUN_CODE = frozenset({"call", "do"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SqlFile:
    """One file; its checksum is SHA-256 of the text, with line ends as Unix writes them."""

    name: str
    sql: str
    checksum: str
    transactional: bool
    statements: Statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """What a text holds, as far as it can be read.

    Attributes:
        any: Whether there is a statement, beside comments and semicolons.
        single: Whether it is certainly one statement.
        first: The first word, in lower case; empty for anything else.
        doubt: Whether the rest could not be read for certain.
        takes_data: Whether a COPY FROM STDIN waits for data.
    """

    any: bool
    single: bool
    first: str
    doubt: bool
    takes_data: bool


def read_directory(directory: Path) -> tuple[SqlFile, ...]:
    """Return the `*.sql` files of a directory in the order of their names, with numbers in them counted as numbers.

    Hidden files and directories are left out.

    Raises:
        ConfigurationError: It is no directory, holds no such file, or one that cannot be read or applied.
    """
    if not directory.is_dir():
        raise ConfigurationError(f"{str(directory)!r} is not a directory of SQL files")
    found = [path for path in directory.glob("*.sql") if not path.name.startswith(".") and not path.is_dir()]
    if not found:
        raise ConfigurationError(f"the directory {str(directory)!r} holds no file whose name ends in .sql")
    return tuple(_read(path) for path in sorted(found, key=lambda path: _sort_key(path.name)))


def _sort_key(name: str) -> tuple[tuple[object, ...], str]:
    parts = _NUMBER.split(name)
    return tuple(int(part) if position % 2 else part for position, part in enumerate(parts)), name


def _read(path: Path) -> SqlFile:
    name = path.name
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"the name of the file {name!r} is not UTF-8, and cannot be recorded") from None
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{name} is not a regular file")
    try:
        sql = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} cannot be read as UTF-8 text: {error}") from error
    statements = _statements(sql)
    transactional = sql.partition("\n")[0].strip() != NO_TRANSACTION
    problem = _problem_of(sql, statements) or (
        _problem_inside_a_transaction(sql, statements) if transactional else _problem_outside(statements)
    )
    if problem is not None:
        raise ConfigurationError(f"{name} {problem}")
    return SqlFile(
        name=name,
        sql=sql,
        checksum=hashlib.sha256(sql.encode()).hexdigest(),
        transactional=transactional,
        statements=statements,
    )


def _problem_of(sql: str, statements: Statements) -> str | None:
    if "\0" in sql:
        return "holds a character of code 0, which PostgreSQL does not take"
    if statements.takes_data:
        return (
            "holds COPY ... FROM STDIN, which waits for data that a file of SQL cannot give: write INSERT, COPY FROM a file on "
            "the server, or let psql run it as a command: migrate -- psql -v ON_ERROR_STOP=1 -f FILE"
        )
    if statements.doubt and (found := _COMMAND_OF_PSQL.search(sql)):
        line = sql.count("\n", 0, found.start()) + 1
        return (
            f"line {line} begins with a backslash, as psql's own commands do, which are no SQL: take it out, or let psql run the "
            "file as a command: migrate -- psql -v ON_ERROR_STOP=1 -f FILE"
        )
    return None


def _problem_inside_a_transaction(sql: str, statements: Statements) -> str | None:
    if not ends_transaction(sql):
        return None
    if statements.doubt:
        return (
            "cannot be read to its end for certain, so that it may end the transaction that it runs in: a quotation, a comment "
            "or a text in dollars has no end, a character is none of SQL's, or a backslash stands before a quote in '...' (write "
            "E'...' with the backslash doubled)"
        )
    return (
        "may end the transaction that it runs in: take BEGIN, COMMIT, ROLLBACK and PREPARE TRANSACTION out, since each "
        "file is one transaction. If it is one statement that cannot run in a transaction, begin the file with "
        f"{NO_TRANSACTION!r}"
    )


def _problem_outside(statements: Statements) -> str | None:
    if statements.single:
        return None
    what = "cannot be read to its end for certain" if statements.doubt else "put each into a file of its own"
    if not statements.any:
        what = "it holds none"
    return f"is marked {NO_TRANSACTION!r} but is not one statement for certain: {what}"


def _statements(sql: str) -> Statements:
    count, first, doubt, takes_data = 0, "", False, False
    depth, copies = 0, False
    previous = Token(Kind.SIGN, ";")
    for token in tokens(sql, Backslash.PLAIN):
        if token.kind is Kind.DOUBT:
            doubt = True
            break
        if token == (Kind.SIGN, ";"):
            depth, copies = 0, False
        else:
            if previous == (Kind.SIGN, ";"):
                count += 1
                copies = token == (Kind.WORD, "copy")
                first = first or (token.text if count == 1 and token.kind is Kind.WORD else "")
            if copies:
                depth += (token.text == "(") - (token.text == ")") if token.kind is Kind.SIGN else 0
                takes_data = takes_data or (
                    not depth and token == (Kind.WORD, "stdin") and previous == (Kind.WORD, "from")
                )
        previous = token
    return Statements(
        any=count > 0 or doubt, single=count == 1 and not doubt, first=first, doubt=doubt, takes_data=takes_data
    )


async def apply_files(
    pool: ResilientPool, files: Sequence[SqlFile], emit: Callable[[str], object], clock: Clock
) -> tuple[str, ...]:
    """Apply the files that are not recorded yet, and return their names.

    Raises:
        MigrationFailedError: A recorded file has changed or was renamed, or was begun outside a transaction and not
            finished, or our role may not record anything; then nothing was applied. Or a file failed: those before it
            stay applied.
    """
    recorded = await _recorded(pool)
    unfinished = any(not row["finished"] for row in recorded.values())
    _check(files, recorded, await find_invalid_objects(pool) if unfinished else frozenset())
    applied = []
    for file in files:
        if file.name not in recorded and await _apply(pool, file, clock):
            emit(f"applied {file.name}")
            applied.append(file.name)
    return tuple(applied)


async def _apply(pool: ResilientPool, file: SqlFile, clock: Clock) -> bool:
    try:
        if file.transactional:
            return await _in_transaction(pool, file, clock)
        return await _outside_transaction(pool, file)
    except MigrationFailedError:
        raise
    except OutcomeUnknownError as error:
        raise _unknown(file) from error
    except Exception as error:
        # The database was there when the file began, so this is no failure to connect.
        raise _failed(file, error) from error


async def _recorded(pool: ResilientPool) -> dict[str, asyncpg.Record]:
    """Return what is recorded, by name; make the table first if there is none."""
    try:
        if not await pool.fetchval(_TABLE_EXISTS):
            try:
                await pool.execute(_CREATE_TABLE, idempotent=True)
            except _CREATED_CONCURRENTLY:
                if not await pool.fetchval(_TABLE_EXISTS):
                    raise
        return {row["name"]: row for row in await pool.fetch(_SELECT_RECORDS)}
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationFailedError(
            f"our role may not keep the table {TABLE}, where applied files are recorded, in the first schema of its search "
            f"path: {error}. GRANT it CREATE ON that SCHEMA, or, if the table is there, SELECT, INSERT, UPDATE, DELETE ON it"
        ) from error


def _check(files: Iterable[SqlFile], recorded: Mapping[str, asyncpg.Record], invalid: Iterable[InvalidObject]) -> None:
    present = {file.name for file in files}
    gone = {row["checksum"]: name for name, row in recorded.items() if name not in present}
    for file in files:
        if file.name in recorded:
            _check_recorded(file, recorded[file.name], invalid)
        elif file.statements.any and file.checksum in gone:
            before = gone[file.checksum]
            rename = f"UPDATE {TABLE} SET name = {_quoted(file.name)} WHERE name = {_quoted(before)}"  # noqa: S608
            raise MigrationFailedError(
                f"{file.name} holds exactly what is recorded as {before}, which is no longer in the directory: most "
                f"likely it was renamed, and would be applied again. Give it its name back, or rename the record: "
                f"{rename}. If it has to be applied as well, change a comment in it"
            )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _check_recorded(file: SqlFile, recorded: asyncpg.Record, invalid: Iterable[InvalidObject]) -> None:
    if not recorded["finished"]:
        left = _named_in(file.sql, invalid)
        raise MigrationFailedError(
            f"{file.name}, which runs outside a transaction, was begun before and its end is not known: see whether its "
            f"statement has taken effect. If it has, set finished_at in its row of the table {TABLE}; if it has not, delete "
            f"that row{'. ' if left else ''}{_described(left)}"
        )
    if recorded["checksum"] != file.checksum:
        raise MigrationFailedError(
            f"{file.name} has changed since it was applied (recorded as {recorded['checksum'][:12]}, now "
            f"{file.checksum[:12]}): restore it, and put the change into a new file"
        )


async def _in_transaction(pool: ResilientPool, file: SqlFile, clock: Clock) -> bool:
    """Record the file and run it; again after a lost connection, a conflict, or a lock time-out."""
    begun = 0

    async def record_and_run(connection: ResilientConnection) -> bool:
        nonlocal begun
        begun += 1
        try:
            return await _record_and_run(connection, file)
        except Exception as error:
            if begun >= _ATTEMPTS:
                raise _failed(file, error, f" (in each of {_ATTEMPTS} attempts)") from error
            raise

    delays = _BETWEEN_ATTEMPTS.delays()
    while True:
        try:
            return await pool.run_in_transaction(record_and_run)
        except OutcomeUnknownError:
            # The outcome of the COMMIT could not be resolved, but the record is part of that transaction: it is
            # there if, and only if, the file took effect.
            if await _is_recorded(pool, file):
                return True
            if begun >= _ATTEMPTS:
                raise
        except asyncpg.LockNotAvailableError:
            # Undone as a whole. A lock_timeout is set so that others need not wait behind this: it is tried again later.
            if begun >= _ATTEMPTS:
                raise
            await clock.sleep(next(delays))


async def _record_and_run(connection: ResilientConnection, file: SqlFile) -> bool:
    # First the record: afterwards the file may have changed the search path.
    if not await connection.fetchval(_INSERT_RECORD, file.name, file.checksum, True):
        return False
    # By the driver's own connection: the lease would read millions of characters once more, in the event loop and inside the
    # transaction, to learn what is known already: that they do not end it. That they write the record has said.
    driver = connection._driver  # noqa: SLF001
    if driver is None:
        raise asyncpg.InterfaceError("the connection was lost")
    if file.statements.any:
        await driver.connection.execute(file.sql)
    return True


async def _outside_transaction(pool: ResilientPool, file: SqlFile) -> bool:
    before = await find_invalid_objects(pool)
    if not await pool.fetchval(_INSERT_RECORD, file.name, file.checksum, False, exactly_once=True):
        return False
    failure = await _run_alone(pool, file)
    try:
        after = await find_invalid_objects(pool)
    except Exception as error:  # noqa: BLE001 - what failed before it says more
        raise _failed(file, failure or error, "\nWhat it left behind could not be asked for") from (failure or error)
    invalid = _named_in(file.sql, after)
    if failure is None and not invalid:
        await pool.execute(_MARK_FINISHED, file.name, file.checksum, idempotent=True)
        return True
    # The server has answered, so that it is no longer under way. A CALL or a DO may have committed something before.
    if file.statements.first not in _RUN_CODE:
        await pool.execute(_DELETE_RECORD, file.name, file.checksum, idempotent=True)
    if failure is None:
        raise MigrationFailedError(
            f"{file.name}: the statement was skipped, or did not do all of its work: {_described(invalid)}"
        )
    left = after - before or invalid
    raise _failed(file, failure, f"\nSomething is left behind: {_described(left)}" if left else "") from failure


async def _run_alone(pool: ResilientPool, file: SqlFile) -> asyncpg.PostgresError | None:
    """Run the one statement; return the error by which the server refused it.

    Raises:
        MigrationFailedError: The connection was lost, so that its end is not known.
    """
    async with pool.acquire() as connection:
        # After this nothing is repeated on the lease: an error of such a statement does not mean that it did nothing.
        await connection.fetchval("SELECT 1")
        try:
            await connection.execute(file.sql)
        except Exception as error:
            state = getattr(error, "sqlstate", None) or ""
            lost = state[:2] == "08" or state[:3] == "57P" or connection.is_closed()
            if isinstance(error, asyncpg.PostgresError) and not lost:
                return error
            raise _unknown(file) from error
    return None


async def _is_recorded(pool: ResilientPool, file: SqlFile) -> bool:
    found: Sequence[asyncpg.Record] = await pool.fetch(_SELECT_RECORDS)
    return any(row["name"] == file.name and row["checksum"] == file.checksum for row in found)


def _unknown(file: SqlFile) -> MigrationFailedError:
    return MigrationFailedError(f"{file.name}: the connection was lost, and its end is not known")


def _failed(file: SqlFile, error: Exception, more: str = "") -> MigrationFailedError:
    said = str(error) if isinstance(error, asyncpg.PostgresError) else f"{type(error).__name__}: {error}".rstrip(": ")
    if getattr(error, "server_source_function", None) == "PreventInTransactionBlock":
        more += f"\nPut it alone into a file that begins with {NO_TRANSACTION!r}"
    return MigrationFailedError(f"{file.name}{_line_of(file, error)}: {said}{more}")


def _line_of(file: SqlFile, error: Exception) -> str:
    position = getattr(error, "position", None)
    if not isinstance(position, str) or not position.isdigit():
        return ""
    return f", line {file.sql.count(chr(10), 0, int(position) - 1) + 1}"


# What statements that commit in between leave behind when they fail: invalid indexes, partitions half detached


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidObject:
    """An invalid index, or a partition that is half detached.

    Attributes:
        kind: `"index"`, an invalid one; or `"partition"`, whose detaching was begun and not ended.
        oid: Its object id.
        name: Its name, quoted and with its schema where that is needed.
        plain: Its name alone.
        owner: Its table's name, or of a partition the partitioned table's.
    """

    kind: str
    oid: int
    name: str
    plain: str
    owner: str


async def find_invalid_objects(pool: ResilientPool) -> frozenset[InvalidObject]:
    """Return the invalid objects in the pool's database now."""
    return frozenset(InvalidObject(**dict(row)) for row in await pool.fetch(_INVALID))


def _named_in(sql: str, objects: Iterable[InvalidObject]) -> frozenset[InvalidObject]:
    """Return those that a statement names together with their table."""
    texts = (token.text for token in tokens(sql) if token.kind in (Kind.WORD, Kind.QUOTED))
    names = {text.encode()[:_MAX_NAME_BYTES].decode(errors="ignore") for text in texts}
    return frozenset(each for each in objects if each.plain in names and each.owner in names)


def _described(objects: Iterable[InvalidObject]) -> str:
    """Say what is there and what to do about it."""
    return "; ".join(
        f"the index {each.name} is invalid; DROP INDEX CONCURRENTLY {each.name}, then migrate again"
        if each.kind == "index"
        else f"the partition {each.name} of {each.owner} is not detached to the end; "
        f"ALTER TABLE {each.owner} DETACH PARTITION {each.name} FINALIZE"
        for each in sorted(objects, key=lambda each: each.name)
    )
