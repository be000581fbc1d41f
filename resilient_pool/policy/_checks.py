"""Checks of numbers that policies are made of, with messages that name the field, the unit and the value."""

from __future__ import annotations

import math

from resilient_pool.errors import ConfigurationError


def require_number(field: str, value: object, *, unit: str, least: float, above: bool = False) -> None:
    """Raise `ConfigurationError` unless `value` is a finite number of at least (or `above`) `least`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and math.isfinite(value) and (value > least if above else value >= least):  # type: ignore[arg-type,operator]
        return
    bound = f"more than {least:g}" if above else f"at least {least:g}"
    raise ConfigurationError(f"{field} must be {unit}, {bound}, not {value!r}")


def require_count(field: str, value: object, *, unit: str) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{field} must be {unit}, a whole number of at least 1, not {value!r}")
