"""A parser of command lines whose errors show nothing that may hold a password."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from resilient_pool._validation import is_number_like, nearest
from resilient_pool.config.secrets import MASK, scrub
from resilient_pool.migrations.command import may_hold_a_password, secrets_around

_LONG_OPTION = re.compile(r"--[a-z][a-z0-9-]{0,40}", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names, and shows of a wrong command line only what is certain to be harmless."""

    def __init__(self, *, given: Sequence[str], **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._given = tuple(given)

    def error(self, message: str) -> NoReturn:
        """Write the usage and a message without what may be secret, and exit with 2.

        A word of the command line is quoted only if it is a number, or much like one of the words that are taken.
        """
        known = [word for action in self._actions for word in action.choices or ()]
        for argument in self._given:
            for word in (argument, argument.partition("=")[2]):
                if not (is_number_like(word) or get_close_matches(word, known)):
                    message = message.replace(repr(word), MASK)
        super().error(without_arguments(message, self._given))

    def refuse_unknown(self, extras: Sequence[str], before: str = "") -> None:
        """End with an error if there are arguments that were not understood; their values are not shown."""
        if not extras:
            return
        options = [extra for extra in extras if extra.startswith("-") and extra != "-"]
        if not options:
            self.error(
                f"{before}unexpected arguments, {len(extras)} of them; the database is named by --dsn or DATABASE_URL"
            )
        name = options[0].partition("=")[0]
        if _LONG_OPTION.fullmatch(name) is None:
            self.error(f"{before}unknown option {name[:2]}")
        self.error(f"{before}unknown option {name}{nearest(name, self._option_string_actions)}")


def without_arguments(text: str, given: Iterable[str]) -> str:
    """Return a text without what may hold a password of the command line that it speaks of."""
    given = tuple(given)
    for argument in given:
        for secret in _possible_secrets_in(argument):
            for form in (repr(secret)[1:-1], secret):
                text = text.replace(form, MASK)
    return scrub(text, secrets_around(given))


def _possible_secrets_in(argument: str) -> Iterable[str]:
    """Yield an argument, or the value in it, if that may hold a password."""
    name, equals, value = argument.partition("=")
    if equals and _LONG_OPTION.fullmatch(name):
        argument = value
    if may_hold_a_password(argument):
        yield argument
