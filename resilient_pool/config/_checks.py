"""What the value of a constructor argument may be: checks with messages that name unit, range and value, and never a secret."""

from __future__ import annotations

import functools
import os
import re
import ssl as ssl_module
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, cast

import asyncpg

from resilient_pool._validation import is_number, is_number_like, is_sendable, nearest, shown
from resilient_pool.config.dsn import GSS_LIBRARIES, HIGHEST_PORT, SSL_MODES, TARGETS
from resilient_pool.config.secrets import Secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.decision import RetryBudget

_TABLE = r"[a-z_][a-z0-9_]{0,62}\.[a-z_][a-z0-9_]{0,62}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a value may be.

    Attributes:
        unit: What documentation says of it: a unit, a type or the accepted words.
        accepted: What an error says that it must be.
        fits: Whether a value is of this kind.
        optional: Whether `None` is too.
        quiet: Whether the configuration's `repr` leaves it out: it may hold a secret, or says nothing to a reader.
        shows: Which texts a message may quote, right or wrong; any other may be a password under a wrong name.
    """

    unit: str
    accepted: str
    fits: Callable[[object], bool]
    optional: bool = False
    quiet: bool = False
    shows: Callable[[str], bool] = is_number_like

    def check(self, name: str, value: object) -> None:
        """Raise `ConfigurationError` for a value of another kind."""
        if not (value is None and self.optional) and not self.fits(value):
            raise ConfigurationError(f"{name} must be {self.accepted}, not {shown(value, self.shows)}")


def option(
    default: object,
    kind: Kind,
    meaning: str,
    *,
    factory: Callable[[], object] | None = None,
    shown: str | None = None,
) -> Any:
    """Make a field of `PoolConfig`; `shown` is its default as documentation writes it, by default its `repr`."""
    metadata = {"kind": kind, "meaning": meaning, "default": shown}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


# Makers of kinds


def _number(unit: str, least: float, *, above: bool = False, whole: bool = False, optional: bool = False) -> Kind:
    number, bound = "a whole number" if whole else "a number", "more than" if above else "at least"
    return Kind(
        unit=unit,
        accepted=f"{number} of {unit}, {bound} {least:g}{', or None' if optional else ''}",
        fits=functools.partial(is_number, least=least, above=above, whole=whole),
        optional=optional,
    )


def _one_of(words: tuple[str, ...], *, optional: bool = True) -> Kind:
    return Kind(
        unit=" / ".join(words),
        accepted=f"one of {', '.join(map(repr, words))}",
        fits=lambda value: isinstance(value, str) and value in words,
        optional=optional,
        shows=lambda text: bool(nearest(text, words)),
    )


def _instance(kinds: type | UnionType, unit: str, accepted: str, **more: Any) -> Kind:
    return Kind(unit=unit, accepted=accepted, fits=lambda value: isinstance(value, kinds), **more)


def _subclass(base: type) -> Kind:
    return Kind(
        unit="class",
        accepted=f"a subclass of asyncpg.{base.__name__}",
        fits=lambda value: isinstance(value, type) and issubclass(value, base),
    )


def _having(unit: str, *methods: str, optional: bool = False) -> Kind:
    return Kind(
        unit=unit,
        accepted=f"{unit} with the method{'s' * (len(methods) > 1)} {', '.join(f'{method}()' for method in methods)}",
        fits=lambda value: all(callable(getattr(value, method, None)) for method in methods),
        optional=optional,
        quiet=True,
    )


def _tuple_of(fits: Callable[[object], bool], unit: str, accepted: str, **more: Any) -> Kind:
    return Kind(
        unit=unit, accepted=accepted, fits=lambda value: isinstance(value, tuple) and all(map(fits, value)), **more
    )


def _is_filled(value: object) -> bool:
    return is_sendable(value) and value != ""


def _is_port(value: object) -> bool:
    return is_number(value, least=1, whole=True) and cast("int", value) <= HIGHEST_PORT


def _is_settings(value: object) -> bool:
    return isinstance(value, Mapping) and all(is_sendable(word) for pair in value.items() for word in pair)


def _any_text(_: str) -> bool:
    return True


BACKOFF = _instance(BackoffPolicy, "BackoffPolicy", "a BackoffPolicy", quiet=True)
BUDGET = _instance(RetryBudget, "RetryBudget", "a RetryBudget", quiet=True)
BYTES = _number("bytes", 0, whole=True)
CALLERS_OR_NONE = _number("callers", 0, whole=True, optional=True)
CLASSIFIER = _having("a classifier", "classify")
CLOCK = _having("a clock", "now", "monotonic", "sleep", "call_later", optional=True)
CONNECTIONS = _number("connections", 0, whole=True)
CONNECTION_CLASS = _subclass(asyncpg.Connection)
CREDENTIALS = Kind(
    unit="(async) function", accepted="callable: (async) function", fits=callable, optional=True, quiet=True
)
EVENT_LOOP = _instance(AbstractEventLoop, "event loop", "an asyncio event loop", optional=True, quiet=True)
FLAG = _instance(bool, "bool", "True or False")
FLAG_OR_NONE = _instance(bool, "bool", "True or False", optional=True)
FUNCTION_NAMES = _tuple_of(_is_filled, "names", "a sequence of function names")
GSS_LIBRARY = _one_of(GSS_LIBRARIES)
HOOK = Kind(unit="async function", accepted="callable: async function", fits=callable, optional=True, quiet=True)
HOSTS = _tuple_of(
    _is_filled,
    "str or sequence of str",
    "a non-empty str without NUL or surrogates or a sequence of them",
    optional=True,
    shows=_any_text,
)
MAX_SIZE = _number("connections", 1, whole=True)
OBSERVERS = _tuple_of(callable, "callables", "a sequence of callables", quiet=True)
OPERATIONS = _number("operations", 1, whole=True)
PASSWORD = Kind(
    unit="str or (async) function",
    accepted="a str or an (async) function that returns one",
    fits=lambda value: isinstance(value, Secret) or callable(value),
    optional=True,
    quiet=True,
)
PATH = _instance(str | os.PathLike, "path", "a str or a path", optional=True, shows=_any_text)
PORTS = _tuple_of(
    _is_port, "port number, or one for each host", f"a whole number from 1 to {HIGHEST_PORT}", optional=True
)
POSITIVE_SECONDS = _number("seconds", 0, above=True)
RECORD_CLASS = _subclass(asyncpg.Record)
SECONDS = _number("seconds", 0)
SECONDS_OR_NONE = _number("seconds", 0, above=True, optional=True)
SESSION_RESET = _one_of(("auto", "background", "on_release", "off"), optional=False)
SETTINGS = Kind(
    unit="dict of str", accepted="a dict of str to str without NUL or surrogates, or None", fits=_is_settings
)
STATEMENTS = _number("statements", 0, whole=True, optional=True)
TABLE = Kind(
    unit="'schema.table'",
    accepted="'schema.table', both of small letters, digits and _, or None",
    fits=lambda value: isinstance(value, str) and re.fullmatch(_TABLE, value) is not None,
    optional=True,
    shows=lambda text: re.fullmatch(r"[\w$\"]+\.[\w$\"]+", text) is not None,
)
TARGET = _one_of(TARGETS)
TEXT = Kind(unit="str", accepted="a str without NUL or surrogates", fits=is_sendable, optional=True, shows=_any_text)
TLS = replace(
    _one_of(SSL_MODES),
    unit="sslmode, bool or SSLContext",
    accepted=f"one of {', '.join(map(repr, SSL_MODES))}, True, False or an ssl.SSLContext",
    fits=lambda value: isinstance(value, bool | ssl_module.SSLContext) or value in SSL_MODES,
)
