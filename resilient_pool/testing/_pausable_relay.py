"""One connection to a pausing server, which decides when and how it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import SupportsIndex

from resilient_pool.testing import _protocol as _messages
from resilient_pool.testing._relay import AcceptMode, Ending, ProxyState, Relay, State, Stream

_TEXTS = MappingProxyType(
    {
        "53300": "sorry, too many clients already",
        "57P03": "the database system is starting up",
        "57P05": "terminating connection due to idle-session timeout",
    }
)


class CountingReader(asyncio.StreamReader):
    """Reports bytes, and end of file, when they are received and not when they are read.

    Args:
        on_bytes: Called with the number of bytes.
        limit: How many bytes to hold before the client has to wait.
    """

    def __init__(self, on_bytes: Callable[[int], None], limit: int) -> None:
        super().__init__(limit=limit)
        self.at_eof_event = asyncio.Event()
        self._on_bytes = on_bytes

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Take what was received."""
        received = bytes(data)
        self._on_bytes(len(received))
        super().feed_data(received)

    def feed_eof(self) -> None:
        """Take note that no more will come."""
        self.at_eof_event.set()
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        """Take note that the connection was lost."""
        self.at_eof_event.set()
        super().set_exception(exc)


class PausableRelay(Relay):
    """A relay that holds the client until `serve()`, `reset()` or `refuse()` is called.

    Args:
        proxy_state: Of this relay alone.
        client: The client's side, read by a `CountingReader`.
        number: Which attempt it is.
        settings: What to add to the client's startup parameters.
        on_outcome: Called with the relay and its outcome; only the first outcome of a relay counts.
    """

    def __init__(
        self,
        proxy_state: ProxyState,
        client: Stream,
        number: int,
        settings: Mapping[str, str],
        on_outcome: Callable[[PausableRelay, str], None],
    ) -> None:
        super().__init__(proxy_state, client, number)
        self.is_decided = False
        self._code = ""
        self._settings = settings
        self._on_outcome = on_outcome
        self._decided = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether a server would count it as a connection."""
        return self.client_connected and self.state is State.OPEN

    @property
    def is_served(self) -> bool:
        """Whether it has, or is about to get, a session on the server."""
        return self.is_open and self.is_decided and self._proxy_state.accept_mode is AcceptMode.SERVE

    def serve(self) -> None:
        """Lead the client to the server."""
        self._decide(AcceptMode.SERVE)

    def reset(self) -> None:
        """Reset the connection."""
        self._decide(AcceptMode.RST)

    def refuse(self, sqlstate: str) -> None:
        """Answer the client's startup message with a FATAL error."""
        self._code = sqlstate
        self._decide(AcceptMode.ERROR)

    def end_idle_session(self) -> None:
        """End an idle session as a server's `idle_session_timeout` does."""
        self._pass_to_client(_messages.fatal_error("57P05", _TEXTS["57P05"]))
        self.end("fin", server_sees_close=True)

    def end(self, how: Ending, *, server_sees_close: bool) -> None:
        """End the connection, and report the outcome."""
        super().end(how, server_sees_close=server_sees_close)
        if self._proxy_state.accept_mode is AcceptMode.RST:
            self._on_outcome(self, "reset")
        else:
            self._on_outcome(self, self._code or "failed")

    async def run(self) -> None:
        """Serve the connection to its end."""
        left = asyncio.get_running_loop().create_task(self._wait_for_eof())
        try:
            await super().run()
        finally:
            left.cancel()
            self._on_outcome(self, "gave up" if self._reader.at_eof_event.is_set() else "failed")

    @property
    def _reader(self) -> CountingReader:
        assert isinstance(self._client.reader, CountingReader)  # noqa: S101 - PausingServer makes all readers
        return self._client.reader

    def _decide(self, accept_mode: AcceptMode) -> None:
        self._proxy_state.accept_mode = accept_mode
        self.is_decided = True
        self._decided.set()

    async def _wait_for_eof(self) -> None:
        await self._reader.at_eof_event.wait()
        self._decided.set()

    async def _handshake(self) -> None:
        await self._decided.wait()
        if not self.is_decided:
            raise EOFError  # the client disconnected before it was answered
        await super()._handshake()

    async def _start_session(self, request: _messages.Message) -> None:
        if request.code != _messages.CANCEL_REQUEST:
            self._proxy_state.error = _messages.fatal_error(self._code, self._error_text(request))
            await super()._start_session(_messages.with_parameters(request, self._settings))
        elif self._proxy_state.accept_mode is AcceptMode.SERVE:
            self._on_outcome(self, "cancel")
            await super()._start_session(request)

    def _error_text(self, request: _messages.Message) -> str:
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
        if self.startup_error:
            self._on_outcome(self, self.startup_error)
        elif self.is_ready:
            self._on_outcome(self, "served")
