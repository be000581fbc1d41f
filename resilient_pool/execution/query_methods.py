"""asyncpg's query methods, written once: each is a call of one function on one connection."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, BinaryIO, Generic, Literal, TypeAlias, TypedDict, TypeVar, Unpack, cast, overload

from asyncpg import Record

from resilient_pool._validation import require_call
from resilient_pool.config.arguments import RecordT
from resilient_pool.pooling import driver
from resilient_pool.pooling.driver import until_lost

T = TypeVar("T")
OtherRecord = TypeVar("OtherRecord", bound=Record)

Arguments: TypeAlias = Sequence[object]
"""The arguments of one execution of a statement."""
Output: TypeAlias = "os.PathLike[str] | str | BinaryIO | Callable[[bytes], Coroutine[object, object, None]]"
"""Where a COPY goes."""
Source: TypeAlias = "os.PathLike[str] | str | BinaryIO | AsyncIterable[bytes]"
"""Where a COPY comes from."""
# asyncpg takes a path as text too; its stubs do not say so.


class CopyOptions(TypedDict, total=False):
    """The options of COPY, with the meaning PostgreSQL's manual gives them."""

    format: Literal["text", "csv", "binary"] | None
    oids: bool | None
    delimiter: str | None
    null: str | None
    header: bool | None
    quote: str | None
    escape: str | None
    force_quote: bool | Iterable[str] | None
    encoding: str | None


class CopyInOptions(CopyOptions, total=False):
    """The options of COPY into a table."""

    freeze: bool | None
    force_not_null: bool | Iterable[str] | None
    force_null: bool | Iterable[str] | None
    where: str | None


class CallOptions(TypedDict, total=False):
    """What the query methods take beside asyncpg's arguments: see `Queries`."""

    idempotent: bool
    deadline: float | None
    fail_fast: bool | None


class StatementOptions(CallOptions, total=False):
    """What those take that run a single statement."""

    exactly_once: bool


class Queries(ABC, Generic[RecordT]):
    """What can be asked of a pool, and of a connection acquired from one.

    Every method takes what asyncpg's method of that name takes and returns what it returns, and these beside:

    `idempotent`: the statement may run twice without harm, so it is also repeated when it is not known whether it took
    effect. Default `False`; one that only reads needs no promise: what looks like a read is repeated in a read-only
    transaction if the server's catalog says that everything it calls is stable or immutable.

    `exactly_once` (of a pool's `execute`, `fetch`, `fetchrow` and `fetchval`): run a statement that may write as a
    transaction of its own, as `pool.transaction()` does: if the answer is lost the server is asked what became of it. The
    statement must be allowed inside a transaction. It costs three round trips more.

    `fail_fast`: whether to fail at once, with the error of the last attempt to connect, while the server is known to be
    away. Default: as the pool was made.

    `deadline`: how many seconds the pool may spend on getting a healthy connection and on starting another attempt.
    Default: the pool's. It never cuts a running statement: `timeout=` does.

    Every method raises the driver's own error when repeating does not help, and `OutcomeUnknownError` when a statement
    that may write was lost on the way and may not be repeated.
    """

    @abstractmethod
    async def _run(
        self,
        operation: str,
        sql: str | None,
        options: CallOptions,
        execute: Callable[..., Awaitable[T]],
        *arguments: object,
        replayable: bool = True,
    ) -> T:
        """Run one operation: `execute(connection, *arguments)`, with asyncpg's connection.

        Args:
            operation: What the application calls it.
            sql: Its text; `None` if it has none that could be judged.
            options: The caller's.
            execute: Executes it.
            *arguments: What to call that with.
            replayable: Whether the arguments can be read twice.
        """

    @overload
    async def fetch(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: None = None,
        **options: Unpack[StatementOptions],
    ) -> list[RecordT]: ...
    @overload
    async def fetch(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: type[OtherRecord],
        **options: Unpack[StatementOptions],
    ) -> list[OtherRecord]: ...
    async def fetch(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
        **options: Unpack[StatementOptions],
    ) -> list[Any]:
        """Run a query and return its rows."""
        if options or timeout is not None:
            require_call(Queries.fetch, timeout, options, StatementOptions.__annotations__)
        return await self._run("fetch", query, options, driver.fetch, query, args, timeout, record_class)

    @overload
    async def fetchrow(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: None = None,
        **options: Unpack[StatementOptions],
    ) -> RecordT | None: ...
    @overload
    async def fetchrow(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: type[OtherRecord],
        **options: Unpack[StatementOptions],
    ) -> OtherRecord | None: ...
    async def fetchrow(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
        **options: Unpack[StatementOptions],
    ) -> Record | None:
        """Run a query and return its first row, or `None`."""
        if options or timeout is not None:
            require_call(Queries.fetchrow, timeout, options, StatementOptions.__annotations__)
        return await self._run("fetchrow", query, options, driver.fetchrow, query, args, timeout, record_class)

    async def fetchval(
        self,
        query: str,
        *args: object,
        column: int = 0,
        timeout: float | None = None,
        **options: Unpack[StatementOptions],
    ) -> Any:
        """Run a query and return one value of its first row, or `None`."""
        if options or timeout is not None:
            require_call(Queries.fetchval, timeout, options, StatementOptions.__annotations__)
        return await self._run("fetchval", query, options, driver.fetchval, query, args, timeout, column)

    @overload
    async def fetchmany(
        self,
        query: str,
        args: Iterable[Arguments],
        *,
        timeout: float | None = None,
        record_class: None = None,
        **options: Unpack[CallOptions],
    ) -> list[RecordT]: ...
    @overload
    async def fetchmany(
        self,
        query: str,
        args: Iterable[Arguments],
        *,
        timeout: float | None = None,
        record_class: type[OtherRecord],
        **options: Unpack[CallOptions],
    ) -> list[OtherRecord]: ...
    async def fetchmany(
        self,
        query: str,
        args: Iterable[Arguments],
        *,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
        **options: Unpack[CallOptions],
    ) -> list[Any]:
        """Run a query once for each of `args`, all or none, and return all rows."""
        if options or timeout is not None:
            require_call(Queries.fetchmany, timeout, options, CallOptions.__annotations__)
        return await self._run(
            "fetchmany",
            query,
            options,
            lambda connection: until_lost(
                connection, connection.fetchmany(query, args, timeout=timeout, record_class=record_class), timeout
            ),
            replayable=isinstance(args, Sequence),
        )

    async def execute(
        self,
        query: str,
        *args: object,
        timeout: float | None = None,
        **options: Unpack[StatementOptions],
    ) -> str:
        """Run a command, or without arguments several, and return the status of the last."""
        if options or timeout is not None:
            require_call(Queries.execute, timeout, options, StatementOptions.__annotations__)
        return await self._run("execute", query, options, driver.execute, query, args, timeout)

    async def executemany(
        self,
        command: str,
        args: Iterable[Arguments],
        *,
        timeout: float | None = None,
        **options: Unpack[CallOptions],
    ) -> None:
        """Run a command once for each of `args`, all or none. A generator of arguments is not read twice."""
        if options or timeout is not None:
            require_call(Queries.executemany, timeout, options, CallOptions.__annotations__)
        await self._run(
            "executemany",
            command,
            options,
            lambda connection: until_lost(connection, connection.executemany(command, args, timeout=timeout), timeout),
            replayable=isinstance(args, Sequence),
        )

    async def copy_from_table(
        self,
        table_name: str,
        *,
        output: Output,
        columns: Iterable[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        fail_fast: bool | None = None,
        **options: Unpack[CopyOptions],
    ) -> str:
        """Copy a table to a path, a file or a coroutine function. Only the file of a path is written anew when the copy is cut."""
        if options or timeout is not None:
            require_call(Queries.copy_from_table, timeout, options, CopyOptions.__annotations__)
        return await self._run(
            "copy_from_table",
            _reading(table_name, schema_name),
            CallOptions(deadline=deadline, fail_fast=fail_fast),
            lambda connection: connection.copy_from_table(
                table_name,
                output=cast("Any", output),
                columns=columns,
                schema_name=schema_name,
                timeout=timeout,
                **options,
            ),
            replayable=_is_file(output),
        )

    async def copy_from_query(
        self,
        query: str,
        *args: object,
        output: Output,
        timeout: float | None = None,
        idempotent: bool = False,
        deadline: float | None = None,
        fail_fast: bool | None = None,
        **options: Unpack[CopyOptions],
    ) -> str:
        """Copy a query's rows to a path, a file or a coroutine function. Only the file of a path is written anew when it is cut."""
        if options or timeout is not None:
            require_call(Queries.copy_from_query, timeout, options, CopyOptions.__annotations__)
        return await self._run(
            "copy_from_query",
            query,
            CallOptions(idempotent=idempotent, deadline=deadline, fail_fast=fail_fast),
            lambda connection: connection.copy_from_query(
                query, *args, output=cast("Any", output), timeout=timeout, **options
            ),
            replayable=_is_file(output),
        )

    async def copy_to_table(
        self,
        table_name: str,
        *,
        source: Source,
        columns: Iterable[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,
        idempotent: bool = False,
        deadline: float | None = None,
        fail_fast: bool | None = None,
        **options: Unpack[CopyInOptions],
    ) -> str:
        """Copy a path, a file or an asynchronous iterator into a table. Only the file of a path is read twice, and no pipe."""
        if options or timeout is not None:
            require_call(Queries.copy_to_table, timeout, options, CopyInOptions.__annotations__)
        return await self._run(
            "copy_to_table",
            None,
            CallOptions(idempotent=idempotent, deadline=deadline, fail_fast=fail_fast),
            lambda connection: until_lost(
                connection,
                connection.copy_to_table(
                    table_name,
                    source=cast("Any", source),
                    columns=columns,
                    schema_name=schema_name,
                    timeout=timeout,
                    **options,
                ),
                timeout,
            ),
            replayable=_is_file(source),
        )

    async def copy_records_to_table(
        self,
        table_name: str,
        *,
        records: Iterable[Arguments] | AsyncIterable[Arguments],
        columns: Iterable[str] | None = None,
        schema_name: str | None = None,
        timeout: float | None = None,
        where: str | None = None,
        **options: Unpack[CallOptions],
    ) -> str:
        """Copy records into a table. A list of them can be sent again when the copy is known to have failed."""
        if options or timeout is not None:
            require_call(Queries.copy_records_to_table, timeout, options, CallOptions.__annotations__)
        return await self._run(
            "copy_records_to_table",
            None,
            options,
            lambda connection: until_lost(
                connection,
                connection.copy_records_to_table(
                    table_name, records=records, columns=columns, schema_name=schema_name, timeout=timeout, where=where
                ),
                timeout,
            ),
            replayable=isinstance(records, Sequence),
        )


def _is_file(place: object) -> bool:
    """Whether it is the path of a file that is the same, or is written anew, each time: a pipe or a terminal is not."""
    # What the file system refuses to say raises nothing here, as it does with pathlib: the driver meets it, too.
    if not isinstance(place, str | os.PathLike):
        return False
    return os.path.isfile(place) or not os.path.exists(place)  # noqa: PTH110, PTH113


def _reading(table: str, schema: str | None) -> str:
    # What is read when a table is copied: also a table's policies may do more than that.
    return "TABLE " + ".".join('"{}"'.format(name.replace('"', '""')) for name in (schema, table) if name is not None)
