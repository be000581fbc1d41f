"""What the value of a constructor argument may be: checks with messages that name unit, range and value, and never a secret."""

from __future__ import annotations

import math
import os
import re
import reprlib
import ssl as ssl_module
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from resilient_pool.config.dsn import SSL_MODES
from resilient_pool.config.secrets import Secret, holds_secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import is_observer

Check = Callable[[str, object], None]

HIGHEST_PORT = 65535
_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_NO_SETTINGS = frozenset({"user", "password", "database"})


class Unusable:
    """Stands for a value that is wrong and must not be shown: a password of a wrong type, a URL where there is no place for one."""

    __slots__ = ("_kind",)

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return self._kind


def refuse(name: str, accepted: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"{name} must be {accepted}, not {reprlib.repr(unrevealing(value))}")


def unrevealing(value: object) -> object:
    """Return the value, or what stands for it if it is a text that holds the password of a URL."""
    if isinstance(value, str | bytes | os.PathLike | list | tuple) and holds_secret(value):
        return Unusable(f"a {type(value).__name__} that holds a password")
    return value


def numeric(
    unit: str, *, least: float, above: bool = False, whole: bool = False, optional: bool = False
) -> tuple[str, Check]:
    kind = int if whole else int | float
    accepted = (
        f"{'a whole number' if whole else 'a number'} of {unit}, {'more than' if above else 'at least'} {least:g}"
    )
    accepted += ", or None" if optional else ""

    def check(name: str, value: object) -> None:
        if value is None and optional:
            return
        if isinstance(value, kind) and not isinstance(value, bool):
            number = cast("float", value)
            if math.isfinite(number) and (number > least if above else number >= least):
                return
        raise refuse(name, accepted, value)

    return unit, check


def one_of(words: Sequence[str], *, optional: bool = False) -> tuple[str, Check]:
    accepted = "one of " + ", ".join(map(repr, words))

    def check(name: str, value: object) -> None:
        if not (value is None and optional) and (not isinstance(value, str) or value not in words):
            raise refuse(name, accepted, value)

    return " / ".join(words), check


def kind(unit: str, accepted: str, *kinds: type, optional: bool = True) -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not (value is None and optional) and not isinstance(value, kinds):
            raise refuse(name, accepted, value)

    return unit, check


def function(unit: str, *, optional: bool = True) -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not (value is None and optional) and not callable(value):
            raise refuse(name, f"callable: {unit}", value)

    return unit, check


def class_of(base: type) -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not (isinstance(value, type) and issubclass(value, base)):
            raise refuse(name, f"a subclass of asyncpg.{base.__name__}", value)

    return "class", check


def having(unit: str, *methods: str, optional: bool = False) -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        missing = [method for method in methods if not callable(getattr(value, method, None))]
        if missing and not (value is None and optional):
            raise refuse(name, f"{unit} with the method {missing[0]}()", value)

    return unit, check


def sequence(unit: str, accepted: str, fits: Callable[[object], bool], *, optional: bool = False) -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not (value is None and optional) and not (isinstance(value, tuple) and all(map(fits, value))):
            raise refuse(name, accepted, value)

    return unit, check


def observers() -> tuple[str, Check]:
    unit, check_callables = sequence("callables", "a sequence of callables", callable)

    def check(name: str, value: object) -> None:
        check_callables(name, value)
        for observer in cast("tuple[object, ...]", value):
            if not is_observer(observer):
                raise refuse(name, "plain functions, which need not be awaited", observer)

    return unit, check


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_filled(value: object) -> bool:
    return isinstance(value, str) and value != ""


def is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= HIGHEST_PORT


def settings_check() -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not isinstance(value, Mapping) or not all(map(is_text, (*value.keys(), *value.values()))):
            # The values may be secret; the type is enough.
            raise ConfigurationError(f"{name} must be a dict of str to str, or None")
        for setting in _NO_SETTINGS.intersection(value):
            raise ConfigurationError(f"{name} holds {setting!r}, which is no setting of the server's but an argument")

    return "dict of str", check


def table_check() -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        parts = value.split(".") if isinstance(value, str) else ()
        if value is not None and (len(parts) != 2 or not all(map(_PLAIN_NAME.fullmatch, parts))):  # noqa: PLR2004
            raise refuse(name, "'schema.table', both of small letters, digits and _, or None", value)

    return "'schema.table'", check


def password_check() -> tuple[str, Check]:
    def check(name: str, value: object) -> None:
        if not (value is None or isinstance(value, Secret) or callable(value)):
            raise ConfigurationError(f"{name} must be a str or an (async) function that returns one, not {value}")

    return "str or (async) function", check


def ssl_check() -> tuple[str, Check]:
    accepted = f"one of {', '.join(map(repr, SSL_MODES))}, True, False or an ssl.SSLContext"

    def check(name: str, value: object) -> None:
        if value is not None and not isinstance(value, bool | ssl_module.SSLContext) and value not in SSL_MODES:
            raise refuse(name, accepted, value)

    return "sslmode, bool or SSLContext", check


def about(
    kind: tuple[str, Check], meaning: str, *, default: str | None = None, quiet: bool = False
) -> dict[str, object]:
    """Return a field's metadata: what documentation says, what checks its value, whether `repr` leaves it out."""
    return {"unit": kind[0], "check": kind[1], "meaning": meaning, "default": default, "quiet": quiet}


TEXT = kind("str", "a str", str)
PATH = kind("path", "a str or a path", str, os.PathLike)
