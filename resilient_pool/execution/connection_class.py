"""Leases of an application's own connection class: methods that it overrides are called as it declares them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import asyncpg
from asyncpg.transaction import Transaction

from resilient_pool.pooling.driver import AnyConnection, until_lost

L = TypeVar("L")

# What a lease adds to asyncpg's arguments.
_OURS = ("idempotent", "exactly_once", "deadline", "fail_fast")
_STATEMENTS = frozenset({"fetch", "fetchrow", "fetchval", "execute"})
# Of the others it is not known which of their arguments can be read twice.
_READ_ONCE = frozenset(
    {
        "fetchmany",
        "executemany",
        "copy_from_table",
        "copy_from_query",
        "copy_to_table",
        "copy_records_to_table",
    }
)
_SENDS_MUCH = frozenset({"fetchmany", "executemany", "copy_to_table", "copy_records_to_table"})
_WITH_A_TEXT = _STATEMENTS | {"fetchmany", "executemany", "copy_from_query"}
_FIRST = {"add_listener": "LISTEN", "remove_listener": "UNLISTEN", "reset": "ROLLBACK"}
_CODECS = frozenset({"set_type_codec", "set_builtin_type_codec", "reset_type_codec"})


def lease_class(base: type[L], connection_class: type[asyncpg.Connection[Any]]) -> type[L]:
    """Return a subclass of `base` that has what the class adds, and takes what its overridden methods take."""
    overridden = {
        name: make(name, getattr(connection_class, name))
        for name, make in _FORWARDED.items()
        if getattr(connection_class, name) is not getattr(asyncpg.Connection, name)
    }
    found: Any = base
    members = {"__slots__": (), "__getattr__": found._attribute, **overridden}  # noqa: SLF001
    made = types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(members))
    return cast("type[L]", made)


def _statement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    ours = [argument for argument in _OURS if argument not in inspect.signature(original).parameters]

    @functools.wraps(original)
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {argument: kwargs.pop(argument) for argument in ours if argument in kwargs}
        return await self._run(
            name,
            _text(args, kwargs) if name in _WITH_A_TEXT else None,
            own,
            _call(name, args, kwargs)
            if name not in _SENDS_MUCH
            else _until_lost(_call(name, args, kwargs), kwargs.get("timeout")),
            replayable=name in _STATEMENTS,
        )

    return forward


def _first(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        sql = _FIRST.get(name) or _text(args, kwargs)
        return await self._first(name, sql, _call(name, args, kwargs))

    return forward


def _codec(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def forward(self: Any, *args: Any, **kwargs: Any) -> None:
        await self._set_codec(name, _call(name, args, kwargs))

    return forward


def _close(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def forward(self: Any, *args: Any, **kwargs: Any) -> None:
        await self._close(_call(name, args, kwargs))

    return forward


def _cursor(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._cursors(_text(args, kwargs) or "", _call(name, args, kwargs))

    return forward


def _transaction(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = _call(name, args, kwargs)(self._peek(name))
        return self._transaction(made) if type(made) is Transaction else made

    return forward


_FORWARDED = {
    **dict.fromkeys(_STATEMENTS | _READ_ONCE, _statement),
    **dict.fromkeys([*_FIRST, "prepare"], _first),
    **dict.fromkeys(_CODECS, _codec),
    "close": _close,
    "cursor": _cursor,
    "transaction": _transaction,
}


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[AnyConnection], Any]:
    return lambda connection: getattr(connection, name)(*args, **kwargs)


def _until_lost(call: Callable[[AnyConnection], Any], timeout: object) -> Callable[[AnyConnection], Any]:
    # What an application's own signature calls so may be anything.
    limit = timeout if isinstance(timeout, int | float) else None
    return lambda connection: until_lost(connection, call(connection), limit)


def _text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    text = args[0] if args else kwargs.get("query", kwargs.get("command"))
    return text if isinstance(text, str) else None
