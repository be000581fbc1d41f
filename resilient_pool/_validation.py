"""Checks of arguments. A message names the field, the unit and, unless it may be a secret, the value, or the nearest known name."""

from __future__ import annotations

import functools
import inspect
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from resilient_pool.errors import ConfigurationError, UnknownArgumentError

P = ParamSpec("P")
T = TypeVar("T")

_NUMBER_LIKE = re.compile(r"[-+]?[0-9.]{0,6} ?(?:ms|s|sec|m|min|h)?")
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Unusable:
    """Stands for a value that is wrong and must not be shown: a password of a wrong type, a URL where there is no place for one."""

    __slots__ = ("_kind",)

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return self._kind


def is_number_like(text: str) -> bool:
    """Return whether a text is empty, or a short number with or without a unit: nothing that could be a password."""
    return _NUMBER_LIKE.fullmatch(text) is not None


def is_sendable(value: object) -> bool:
    """Return whether a value is a text that reaches a server whole: a NUL ends it, and what follows is read as something else."""
    return isinstance(value, str) and "\0" not in value and value.encode(errors="ignore").decode() == value


def shown(value: object, shows: Callable[[str], bool] = is_number_like) -> str:
    """Return a wrong value as a message may show it: under a wrong name stands anything, a password too.

    Args:
        value: The value.
        shows: Which texts cannot be secret, such as those that are much like an accepted word. Of others, and of objects
            that are not known to be harmless, only the type is shown.
    """
    if isinstance(value, str):
        return repr(value) if shows(value) else "a str that may be secret"
    if isinstance(value, tuple | list):
        each = [shown(item, shows) for item in value[:3]] + ["..."] * (len(value) > 3)  # noqa: PLR2004
        return f"({', '.join(each)}{',' * (len(each) == 1)})"
    if value is None or isinstance(value, int | float | type | FunctionType | BuiltinFunctionType | Unusable):
        return reprlib.repr(value)
    return type(value).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question that names the known name most like `name`, or nothing if none is."""
    from difflib import get_close_matches  # noqa: PLC0415 - only what is refused needs it

    found = get_close_matches(name.lower(), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def require_known(
    names: Iterable[str],
    known: Iterable[str],
    *,
    of: str = "",
    but: str = "",
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise `UnknownArgumentError` for the first name that is not known.

    Args:
        names: The names of the arguments that were given; their values may be secrets.
        known: The names that are taken.
        of: The function's name, to be shown; nothing for the pool's constructor.
        but: What to do instead, to be shown.
        elsewhere: Names that other libraries have for what is known here, as to its names here.
    """
    known = list(known)
    for name in names:
        if name not in known:
            owner, instead = f" of {of}()" if of else "", f" ({but})" if but else ""
            meant = f"; did you mean {elsewhere[name]!r}?" if name in elsewhere else nearest(name, known)
            raise UnknownArgumentError(f"unknown argument {name!r}{owner}{meant}{instead}")


def require_call(
    function: Callable[..., object], timeout: object, names: Collection[str], more: Iterable[str] = ()
) -> None:
    """Check a call of a function whose unknown arguments are taken by its `**`.

    Args:
        function: Whose other arguments are known.
        timeout: The time limit that it was given.
        names: The names of what its `**` took.
        more: What of that is known.

    Raises:
        UnknownArgumentError: A name is not known.
        ConfigurationError: The time limit is no number of seconds.
    """
    if names:
        require_known(names, [*_taken(function), *more], of=function.__name__)
    require_seconds("timeout", timeout)


def _taken(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in _BY_NAME and each.name != "self"]


def names_nearest(function: Callable[P, T], of: str | None = None) -> Callable[P, T]:
    """Make a function name the nearest known argument when it is given an unknown one."""
    known = _taken(function)
    accepted = frozenset(known)
    kinds = [each.kind for each in inspect.signature(function).parameters.values()]
    many = inspect.Parameter.VAR_POSITIONAL in kinds
    most = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)

    def check(count: int, names: Collection[str]) -> None:
        if count > most and not many:
            raise TypeError(f"{of or function.__name__}() takes its further arguments by name only")
        if not accepted.issuperset(names):
            require_known(names, known, of=of or function.__name__)

    # Arguments may hold a secret, and a report of an error may show the variables of these frames.
    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            check(len(args), list(kwargs))
            return function(*args, **kwargs)
        finally:
            del args, kwargs

    @functools.wraps(function)
    async def checked_when_awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            check(len(args), list(kwargs))
            call = cast("Any", function(*args, **kwargs))
        finally:
            del args, kwargs
        return await call

    return cast("Callable[P, T]", checked_when_awaited) if inspect.iscoroutinefunction(function) else checked


def constructor_names_nearest(kind: type[T]) -> type[T]:
    """Make a class name the nearest known argument when its constructor is given an unknown one."""
    kind.__init__ = names_nearest(kind.__init__, of=kind.__name__)  # type: ignore[method-assign]
    return kind


def require_seconds(field: str, value: object) -> None:
    """Raise `ConfigurationError` unless `value` is `None` or a finite number of seconds, at least 0."""
    if value is not None:
        require_number(field, value, unit="a number of seconds or None", least=0)


def require_number(field: str, value: object, *, unit: str, least: float, above: bool = False) -> None:
    """Raise `ConfigurationError` unless `value` is a finite number of at least (or `above`) `least`."""
    if not is_number(value, least=least, above=above):
        bound = f"more than {least:g}" if above else f"at least {least:g}"
        raise ConfigurationError(f"{field} must be {unit}, {bound}, not {shown(value)}")


def require_count(field: str, value: object, *, unit: str) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number of at least 1."""
    if not is_number(value, least=1, whole=True):
        raise ConfigurationError(f"{field} must be {unit}, a whole number of at least 1, not {shown(value)}")


def is_number(value: object, *, least: float, above: bool = False, whole: bool = False) -> bool:
    """Return whether `value` is a finite (or `whole`) number of at least (or `above`) `least`."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    try:
        return math.isfinite(value) and (value > least if above else value >= least)
    except OverflowError:  # an int that no float can hold
        return False
