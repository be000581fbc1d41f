"""One connection to a pausing server: its answer may be a long time coming, and is decided by the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import SupportsIndex

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._relay import Ending, Manner, Relay, Rules, State, Stream

_TEXTS = MappingProxyType(
    {
        "53300": "sorry, too many clients already",
        "57P03": "the database system is starting up",
        "57P05": "terminating connection due to idle-session timeout",
    }
)


class Ear(asyncio.StreamReader):
    """Tells of bytes, and of their end, when they come and not when they are read.

    Args:
        heard: Called with the number of bytes.
        limit: How many bytes to hold before the client has to wait.
    """

    def __init__(self, heard: Callable[[int], None], limit: int) -> None:
        super().__init__(limit=limit)
        self.has_ended = asyncio.Event()
        self._heard = heard

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Take what was received."""
        received = bytes(data)
        self._heard(len(received))
        super().feed_data(received)

    def feed_eof(self) -> None:
        """Take note that no more will come."""
        self.has_ended.set()
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        """Take note that the connection was lost."""
        self.has_ended.set()
        super().set_exception(exc)


class PausableRelay(Relay):
    """A flow that waits until `serve()`, `reset()` or `turn_away()` says how it is met.

    Args:
        rules: For this visit alone.
        client: The client's side, read by an `Ear`.
        number: Which attempt it is.
        settings: What to add to the client's startup parameters.
        settled: Called with the visit and its outcome; later outcomes of the same visit mean nothing.
    """

    def __init__(
        self,
        rules: Rules,
        client: Stream,
        number: int,
        settings: Mapping[str, str],
        settled: Callable[[PausableRelay, str], None],
    ) -> None:
        super().__init__(rules, client, number)
        self.is_decided = False
        self._code = ""
        self._settings = settings
        self._settled = settled
        self._go_on = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether a server would count it as a connection."""
        return self.client_is_there and self.state is State.OPEN

    @property
    def is_served(self) -> bool:
        """Whether it has, or is about to get, a session on the server."""
        return self.is_open and self.is_decided and self._rules.manner is Manner.SERVE

    def serve(self) -> None:
        """Lead the client to the server."""
        self._decide(Manner.SERVE)

    def reset(self) -> None:
        """Reset the connection."""
        self._decide(Manner.RST)

    def turn_away(self, sqlstate: str) -> None:
        """Answer the client's startup message with a FATAL error."""
        self._code = sqlstate
        self._decide(Manner.ERROR)

    def time_out(self) -> None:
        """End an idle session as a server's `idle_session_timeout` does."""
        self._pass_to_client(_messages.fatal_error("57P05", _TEXTS["57P05"]))
        self.end("fin", server_sees_close=True)

    def end(self, how: Ending, *, server_sees_close: bool) -> None:
        """Do as every flow, and tell the server."""
        super().end(how, server_sees_close=server_sees_close)
        if self._rules.manner is Manner.RST:
            self._settled(self, "reset")
        else:
            self._settled(self, self._code or "failed")

    async def run(self) -> None:
        """Serve the connection to its end."""
        left = asyncio.get_running_loop().create_task(self._wait_for_the_end())
        try:
            await super().run()
        finally:
            left.cancel()
            self._settled(self, "gave up" if self._ear.has_ended.is_set() else "failed")

    @property
    def _ear(self) -> Ear:
        assert isinstance(self._client.reader, Ear)  # noqa: S101 - nobody else makes the readers
        return self._client.reader

    def _decide(self, manner: Manner) -> None:
        self._rules.manner = manner
        self.is_decided = True
        self._go_on.set()

    async def _wait_for_the_end(self) -> None:
        await self._ear.has_ended.wait()
        self._go_on.set()

    async def _greet(self) -> None:
        await self._go_on.wait()
        if not self.is_decided:
            raise EOFError  # the client left before anybody had answered
        await super()._greet()

    async def _introduce(self, request: _messages.Message) -> None:
        if request.code != _messages.CANCEL_REQUEST:
            self._rules.error = _messages.fatal_error(self._code, self._text(request))
            await super()._introduce(_messages.with_parameters(request, self._settings))
        elif self._rules.manner is Manner.SERVE:
            self._settled(self, "cancel")
            await super()._introduce(request)

    def _text(self, request: _messages.Message) -> str:
        if self._code in _TEXTS:
            return _TEXTS[self._code]
        said = _messages.startup_parameters(request)
        user = said.get("user", "")
        host = self._client.writer.get_extra_info("peername")[0]
        encrypted = self._client.writer.get_extra_info("ssl_object") is not None
        return (
            f'no pg_hba.conf entry for host "{host}", user "{user}", database "{said.get("database", user)}", '
            f"{'SSL encryption' if encrypted else 'no encryption'}"
        )

    def _read_answers(self) -> None:
        super()._read_answers()
        if self.turned_away_with:
            self._settled(self, self.turned_away_with)
        elif self.is_ready:
            self._settled(self, "served")
