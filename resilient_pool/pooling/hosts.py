"""Several hosts, and host names with several addresses: one that does not answer hides none of the others."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from resilient_pool.clock import Clock
from resilient_pool.pooling.driver import AnyConnection

# So long has a candidate to answer before the next one is tried beside it; less if the time for all of them is short.
HEAD_START = 5.0
# One that did not answer the last time has less, as in "Happy Eyeballs" (RFC 8305).
SHORT_HEAD_START = 0.25
# And for so long the others come before it.
_SILENCE_COUNTS = 60.0
# The addresses of a name may change for ever.
_SILENCE_IS_KEPT = 3600.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """Where a server may be.

    Attributes:
        host: The host as it was given: a name, an address or the directory of a Unix socket.
        port: The port.
        address: One of the host's addresses; `None` for a name that is not resolved yet.
    """

    host: str
    port: int
    address: str | None

    def __str__(self) -> str:
        where = self.host if self.address in (None, self.host) else f"{self.host} ({self.address})"
        return f"{where}:{self.port}"


Dial: TypeAlias = Callable[[Candidate], Coroutine[Any, Any, AnyConnection]]
"""Opens a connection to one candidate."""


class UnansweredHosts:
    """Which candidates did not answer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._since: dict[Candidate, float] = {}

    def note(self, candidate: Candidate, *, answered: bool) -> None:
        """Note whether a candidate answered, with whatever."""
        self._since.pop(candidate, None)
        if not answered:
            now = self.clock.monotonic()
            self._since = {silent: since for silent, since in self._since.items() if now - since < _SILENCE_IS_KEPT}
            self._since[candidate] = now

    def __contains__(self, candidate: object) -> bool:
        return candidate in self._since

    def is_recent(self, candidate: Candidate) -> bool:
        """Whether it did not answer a short time ago."""
        since = self._since.get(candidate)
        return since is not None and self.clock.monotonic() - since < _SILENCE_COUNTS


def candidates(hosts: Iterable[str], ports: Iterable[int]) -> list[Candidate]:
    """Return the candidates that were configured, in their order; names are not resolved yet."""
    return [Candidate(host, port, host if _is_address(host) else None) for host, port in zip(hosts, ports, strict=True)]


def _is_address(host: str) -> bool:
    if host.startswith("/"):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class Race:
    """Tries candidates in their order, each beside those before it that have not answered; the first to succeed wins.

    While one does not answer, the others that failed are tried again, and names are resolved again: the server may have
    moved away from an address that is silent.

    Args:
        configured: What to try.
        dial: Opens a connection to one of them.
        moves_on: Whether the other candidates are tried after an error; if not, it ends the race.
        unanswered: Which of them did not answer the last time; updated with each attempt.
        share: How many seconds all of them have together, to be shared out.
        suffices: Whether an error of one candidate is reason enough not to wait for those that do not answer.

    Attributes:
        errors: How each candidate failed at last.
    """

    def __init__(
        self,
        configured: Sequence[Candidate],
        dial: Dial,
        moves_on: Callable[[Exception], bool],
        unanswered: UnansweredHosts,
        share: float,
        suffices: Callable[[Exception], bool] = lambda _: False,
    ) -> None:
        self._suffices = suffices
        self._configured = configured
        self._dial = dial
        self._moves_on = moves_on
        self._unanswered = unanswered
        self._clock = unanswered.clock
        self._share = share
        self._queue = deque(sorted(configured, key=unanswered.is_recent))
        self._running: dict[asyncio.Task[AnyConnection | list[Candidate]], Candidate] = {}
        self._latest: asyncio.Task[AnyConnection | list[Candidate]] | None = None
        self._next_at = 0.0
        self.errors: dict[Candidate, Exception] = {}

    async def run(self) -> AnyConnection | None:
        """Return the first connection, or `None` if every candidate has failed.

        Raises:
            Exception: The first error after which no other candidate is tried.
        """
        winner = None
        try:
            while winner is None and (self._queue or self._running):
                if self._queue and (self._latest not in self._running or self._clock.monotonic() >= self._next_at):
                    self._begin(self._queue.popleft())
                    continue
                if not self._queue and self._latest not in self._running and self._has_sufficient_error:
                    break
                left = max(self._next_at - self._clock.monotonic(), 0.0)
                done, _ = await asyncio.wait(self._running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    winner = winner or self._end_attempt(task)
                if not done:
                    self._note_silence()
        finally:
            for task in self._running:
                task.cancel()
                task.add_done_callback(_close_if_connected)
        return winner

    @property
    def _has_sufficient_error(self) -> bool:
        return any(map(self._suffices, self.errors.values()))

    def _begin(self, candidate: Candidate) -> None:
        share = min(HEAD_START, self._share / (len(self._queue) + 1))
        self._next_at = self._clock.monotonic() + (
            min(share, SHORT_HEAD_START) if candidate in self._unanswered else share
        )
        work = _addresses(candidate) if candidate.address is None else self._dial(candidate)
        self._latest = asyncio.ensure_future(work)
        self._running[self._latest] = candidate

    def _end_attempt(self, task: asyncio.Task[AnyConnection | list[Candidate]]) -> AnyConnection | None:
        """Note how an attempt ended, and return its connection if it has one."""
        candidate = self._running.pop(task)
        if task.cancelled():
            raise asyncio.CancelledError
        error = task.exception()
        self._unanswered.note(candidate, answered=not isinstance(error, TimeoutError))
        if error is None:
            found = task.result()
            if isinstance(found, list):
                self._enqueue(found)
                return None
            return found
        if not isinstance(error, Exception) or not self._moves_on(error):
            raise error
        self.errors[candidate] = error
        return None

    def _enqueue(self, found: Iterable[Candidate]) -> None:
        """Put the addresses of a name that was resolved in front, those that are known to be silent at the end."""
        new = [candidate for candidate in found if candidate not in self._running.values()]
        self._queue.extend(filter(self._unanswered.is_recent, new))
        self._queue.extendleft(reversed([candidate for candidate in new if not self._unanswered.is_recent(candidate)]))

    def _note_silence(self) -> None:
        """The latest candidate has had its time; if it was the last, begin again with those that have failed."""
        if self._latest in self._running:
            self._unanswered.note(self._running[self._latest], answered=False)
            self._latest = None
        if not self._queue and not self._has_sufficient_error:
            self._share = math.inf  # from now on at a distance that a recovering server can bear
            self._queue.extend(candidate for candidate in self._configured if candidate not in self._running.values())
            self._next_at = self._clock.monotonic() + (0.0 if self._queue else HEAD_START)


async def _addresses(candidate: Candidate) -> list[Candidate]:
    """Resolve a name."""
    found = await asyncio.get_running_loop().getaddrinfo(candidate.host, candidate.port, type=socket.SOCK_STREAM)
    addresses = dict.fromkeys(_address(each[4]) for each in found)
    return [replace(candidate, address=address) for address in addresses]


def _address(sockaddr: tuple[Any, ...]) -> str:
    # The fourth part of an IPv6 address is the interface of one that is local to a link.
    scoped = len(sockaddr) > 3 and sockaddr[3] and "%" not in sockaddr[0]  # noqa: PLR2004
    return f"{sockaddr[0]}%{sockaddr[3]}" if scoped else str(sockaddr[0])


def _close_if_connected(task: asyncio.Task[AnyConnection | list[Candidate]]) -> None:
    """Close what an attempt that lost the race has opened all the same; its error interests no more."""
    if not task.cancelled() and task.exception() is None and not isinstance(task.result(), list):
        task.result().terminate()  # type: ignore[union-attr]


class PinnedLoop:
    """An event loop whose connections to a host go to one of its addresses; TLS still asks for the host by its name.

    The driver keeps it with the connection, so that a request to cancel goes to the same address.
    """

    __slots__ = ("_address", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._loop = loop
        self._address = address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    # The driver looks its own tasks up by their loop.
    def __eq__(self, other: object) -> bool:
        return other is self._loop or other is self

    def __hash__(self) -> int:
        return hash(self._loop)

    def create_connection(self, factory: Callable[[], asyncio.Protocol], host: str, port: int, **options: Any) -> Any:
        """Connect to the address instead of the host."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        return self._loop.create_connection(factory, self._address, port, **options)
