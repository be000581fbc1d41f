"""What the value of a constructor argument may be: checks with messages that name unit, range and value, and never a secret."""

from __future__ import annotations

import functools
import os
import re
import reprlib
import ssl as ssl_module
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, NamedTuple, cast

import asyncpg

from resilient_pool._validation import is_number
from resilient_pool.config.dsn import SSL_MODES
from resilient_pool.config.secrets import Secret, holds_secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import is_observer
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.decision import RetryBudget

Check = Callable[[str, object], None]


class Kind(NamedTuple):
    """What a value may be.

    Attributes:
        unit: What documentation says of it: a unit, a type or the accepted words.
        check: Raises `ConfigurationError` for a value of another kind.
        quiet: Whether the configuration's `repr` leaves it out: it may hold a secret, or says nothing to a reader.
    """

    unit: str
    check: Check
    quiet: bool = False


_HIGHEST_PORT = 65535
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_NO_SETTINGS = frozenset({"user", "password", "database"})


class Unusable:
    """Stands for a value that is wrong and must not be shown: a password of a wrong type, a URL where there is no place for one."""

    __slots__ = ("_kind",)

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return self._kind


def unrevealing(value: object) -> object:
    """Return the value, or what stands for it if it is a text that holds the password of a URL."""
    if isinstance(value, str | bytes | os.PathLike | list | tuple) and holds_secret(value):
        return Unusable(f"a {type(value).__name__} that holds a password")
    return value


def option(
    default: object,
    kind: Kind,
    meaning: str,
    *,
    factory: Callable[[], object] | None = None,
    shown: str | None = None,
) -> Any:
    """Make a field of `PoolConfig`.

    Args:
        default: Its default, unless there is a `factory`.
        kind: What its value may be.
        meaning: What it bounds or chooses, for documentation.
        factory: Makes the default.
        shown: The default as documentation shows it. Default: its `repr`.
    """
    metadata = {**kind._asdict(), "meaning": meaning, "default": shown}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def _refuse(name: str, accepted: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"{name} must be {accepted}, not {reprlib.repr(unrevealing(value))}")


def _kind(unit: str, accepted: str, fits: Callable[[object], bool], *, optional: bool = False) -> Kind:
    def check(name: str, value: object) -> None:
        if not (value is None and optional) and not fits(value):
            raise _refuse(name, accepted, value)

    return Kind(unit, check)


def _number(unit: str, least: float, *, above: bool = False, whole: bool = False, optional: bool = False) -> Kind:
    accepted = (
        f"{'a whole number' if whole else 'a number'} of {unit}, {'more than' if above else 'at least'} {least:g}"
    )
    fits = functools.partial(is_number, least=least, above=above, whole=whole)
    return _kind(unit, accepted + (", or None" if optional else ""), fits, optional=optional)


def one_of(*words: str, optional: bool = True) -> Kind:
    """Accept some words."""
    accepted = "one of " + ", ".join(map(repr, words))
    return _kind(
        " / ".join(words), accepted, lambda value: isinstance(value, str) and value in words, optional=optional
    )


def _instance(unit: str, accepted: str, *kinds: type, optional: bool = True) -> Kind:
    return _kind(unit, accepted, lambda value: isinstance(value, kinds), optional=optional)


def _function(unit: str) -> Kind:
    return _kind(unit, f"callable: {unit}", callable, optional=True)


def _subclass(base: type) -> Kind:
    return _kind(
        "class",
        f"a subclass of asyncpg.{base.__name__}",
        lambda value: isinstance(value, type) and issubclass(value, base),
    )


def _having(unit: str, *methods: str, optional: bool = False) -> Kind:
    def check(name: str, value: object) -> None:
        missing = [method for method in methods if not callable(getattr(value, method, None))]
        if missing and not (value is None and optional):
            raise _refuse(name, f"{unit} with the method {missing[0]}()", value)

    return Kind(unit, check)


def _sequence(unit: str, accepted: str, fits: Callable[[object], bool], *, optional: bool = False) -> Kind:
    return _kind(unit, accepted, lambda value: isinstance(value, tuple) and all(map(fits, value)), optional=optional)


_CALLABLES = _sequence("callables", "a sequence of callables", callable)


def _check_observers(name: str, value: object) -> None:
    _CALLABLES.check(name, value)
    for observer in cast("tuple[object, ...]", value):
        if not is_observer(observer):
            raise _refuse(name, "plain functions, which need not be awaited", observer)


def _check_settings(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(word, str) for pair in value.items() for word in pair):
        # The values may be secret; the type is enough.
        raise ConfigurationError(f"{name} must be a dict of str to str, or None")
    for setting in _NO_SETTINGS.intersection(value):
        raise ConfigurationError(f"{name} holds {setting!r}, which is no setting of the server's but an argument")


def _check_password(name: str, value: object) -> None:
    if not (value is None or isinstance(value, Secret) or callable(value)):
        raise ConfigurationError(f"{name} must be a str or an (async) function that returns one, not {value}")


def _is_filled(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _HIGHEST_PORT


def _is_table(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else ()
    return len(parts) == 2 and all(map(_PLAIN_NAME.fullmatch, parts))  # noqa: PLR2004


def _is_tls_choice(value: object) -> bool:
    return isinstance(value, bool | ssl_module.SSLContext) or value in SSL_MODES


BACKOFF = _instance("BackoffPolicy", "a BackoffPolicy", BackoffPolicy, optional=False)._replace(quiet=True)
BUDGET = _instance("RetryBudget", "a RetryBudget", RetryBudget, optional=False)._replace(quiet=True)
BYTES = _number("bytes", 0, whole=True)
CLASSIFIER = _having("a classifier", "classify")._replace(quiet=True)
CLOCK = _having("a clock", "now", "monotonic", "sleep", "call_later", optional=True)._replace(quiet=True)
CONNECTIONS = _number("connections", 0, whole=True)
CONNECTION_CLASS = _subclass(asyncpg.Connection)
CREDENTIALS = _function("(async) function")._replace(quiet=True)
EVENT_LOOP = _instance("event loop", "an asyncio event loop", AbstractEventLoop)._replace(quiet=True)
FLAG = _instance("bool", "True or False", bool, optional=False)
FLAG_OR_NONE = _instance("bool", "True or False", bool)
FUNCTION_NAMES = _sequence("names", "a sequence of function names", _is_filled)
GSS_LIBRARY = one_of("gssapi", "sspi")
HOOK = _function("async function")._replace(quiet=True)
HOSTS = _sequence("str or sequence of str", "a non-empty str or a sequence of them", _is_filled, optional=True)
MAX_SIZE = _number("connections", 1, whole=True)
OBSERVERS = Kind(_CALLABLES.unit, _check_observers, quiet=True)
OPERATIONS = _number("operations", 1, whole=True)
PASSWORD = Kind("str or (async) function", _check_password, quiet=True)
PATH = _instance("path", "a str or a path", str, os.PathLike)
PORTS = _sequence(
    "port number, or one for each host", f"a whole number from 1 to {_HIGHEST_PORT}", _is_port, optional=True
)
POSITIVE_SECONDS = _number("seconds", 0, above=True)
RECORD_CLASS = _subclass(asyncpg.Record)
SECONDS = _number("seconds", 0)
SECONDS_OR_NONE = _number("seconds", 0, above=True, optional=True)
SESSION_RESET = one_of("auto", "background", "on_release", "off", optional=False)
SETTINGS = Kind("dict of str", _check_settings)
STATEMENTS = _number("statements", 0, whole=True, optional=True)
TABLE = _kind(
    "'schema.table'", "'schema.table', both of small letters, digits and _, or None", _is_table, optional=True
)
TARGET = one_of("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
TEXT = _instance("str", "a str", str)
TLS = _kind(
    "sslmode, bool or SSLContext",
    f"one of {', '.join(map(repr, SSL_MODES))}, True, False or an ssl.SSLContext",
    _is_tls_choice,
    optional=True,
)
TLS_VERSION = one_of("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
