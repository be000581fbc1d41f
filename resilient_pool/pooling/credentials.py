"""User name and password, as they are given, or asked of the application: once for all who need them at the same time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import asyncpg

from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import Hidden, Secret
from resilient_pool.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Whom to connect as.

    Attributes:
        user: The user's name; `None` for the driver's choice.
        password: The password; `None` if there is none.
    """

    user: str | None
    password: Secret | None


class Credentials:
    """Gives the login of one configuration.

    Connections that are opened at the same time share one question. It is cancelled when the last of them is.

    Args:
        config: Its `credentials`, or its `user` and `password`.
    """

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._question: asyncio.Task[Login] | None = None
        self._waiting = 0

    @property
    def are_asked_for(self) -> bool:
        """Whether another question may have another answer."""
        return self._config.credentials is not None or callable(self._config.password)

    @property
    def give_user(self) -> bool:
        """Whether another question may be answered with another user."""
        return self._config.credentials is not None

    async def get(self) -> Login:
        """Return the login as it is now.

        Raises:
            ConfigurationError: The application's function returned something else. No message shows what.
            Exception: Whatever that function raises.
        """
        password = self._config.password
        if self._config.credentials is None and (password is None or isinstance(password, Secret)):
            return Login(user=self._config.user, password=password)
        question = self._question
        if question is None:
            question = self._question = asyncio.get_running_loop().create_task(self._ask())
            question.add_done_callback(self._answered)
        self._waiting += 1
        try:
            await asyncio.wait([question])
        finally:
            self._waiting -= 1
            if not self._waiting and not question.done():
                self._question = None
                question.cancel()
        if question.cancelled():
            raise asyncpg.InterfaceError("the function that gives the password was cancelled")
        return question.result()

    def _answered(self, question: asyncio.Task[Login]) -> None:
        if self._question is question:
            self._question = None
        if not question.cancelled():
            question.exception()  # those who asked may all have gone

    async def _ask(self) -> Login:
        if self._config.credentials is not None:
            return _login(await _answer(self._config.credentials))
        ask = self._config.password
        return Login(user=self._config.user, password=_password(await _answer(ask), "password"))  # type: ignore[arg-type]


async def _answer(ask: Callable[[], object]) -> Hidden[object]:
    """Call the application's function, and hide at once what it returns."""
    answer = ask()
    if inspect.isawaitable(answer):
        return Hidden(await answer)
    return Hidden(answer)


def _login(answer: Hidden[object]) -> Login:
    if not isinstance(answer.reveal(), tuple) or len(answer.reveal()) != 2:  # type: ignore[arg-type] # noqa: PLR2004
        raise ConfigurationError("credentials= must return a tuple of the user's name and the password")
    user, password = map(Hidden, answer.reveal())  # type: ignore[call-overload]
    if not isinstance(user.reveal(), str):
        raise ConfigurationError("credentials= must return a tuple of the user's name, a str, and the password")
    return Login(user=user.reveal(), password=_password(password, "credentials"))


def _password(answer: Hidden[object], argument: str) -> Secret | None:
    kind = type(answer.reveal())
    if issubclass(kind, str):
        return Secret(answer.reveal())  # type: ignore[arg-type]
    if answer.reveal() is None or issubclass(kind, Secret):
        return answer.reveal()  # type: ignore[return-value]
    raise ConfigurationError(f"the password that {argument}= returns must be a str, not {kind.__name__}")
