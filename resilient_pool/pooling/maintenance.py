"""What becomes of a connection after use: released, reset, aged, replaced, closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from typing import TypeVar

import asyncpg
import backoff

from resilient_pool.clock import TimeoutQueue, Timer
from resilient_pool.config.secrets import scrub
from resilient_pool.events import ConnectionDiscarded, ConnectionOpened, DiscardReason
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool

T = TypeVar("T")

_LOGGER = logging.getLogger("resilient_pool")

_CLOSE_LIMIT = 2.0
# max_lifetime is shortened by up to this share, so that connections opened together do not end together.
_LIFETIME_JITTER = 0.1
# 50 s where the server closes idle sessions after 60 s.
_SHARE_OF_THE_SERVERS_PATIENCE = 5 / 6
# These connections are beyond a goodbye: it could only hang.
_WITHOUT_GOODBYE = frozenset(
    {
        DiscardReason.STALE,
        DiscardReason.PING_FAILED,
        DiscardReason.FAILED,
        DiscardReason.RESET_FAILED,
        DiscardReason.CLOSED,
    }
)


class Maintenance:
    """Keeps the resources of one pool fit, in the background.

    Attributes:
        loop: The pool's event loop, once it is opened.
        closing: Whether connections are no longer kept.
        returning: How many of them are expected back within a round trip: those that have nothing to cancel before.
        generation: How often `expire()` was called. What was opened before the last time is not kept.
        reaper: Closes, in time, what is idle for too long; `None` if it is not set.
        loop_is_ending: Whether a task of ours was cancelled, though not by us: the event loop is about to end.
    """

    def __init__(self, context: PoolContext, resources: ResourcePool[DriverConnection], connector: Connector) -> None:
        self._context = context
        self._config = context.config
        self._clock = context.clock
        self._resources = resources
        self._connector = connector
        self._background: set[asyncio.Task[object]] = set()
        self._chores: set[asyncio.Task[object]] = set()
        self._resets: dict[PoolEntry[DriverConnection], asyncio.Task[None]] = {}
        self._is_reset_reported = False
        self._openings: set[asyncio.Timeout] = set()
        self._cut: set[asyncio.Task[object]] = set()
        self._watched: TimeoutQueue[asyncio.Task[None]] = TimeoutQueue(
            context.clock, lambda task, _: self._cut_short(task)
        )
        self.reaper: Timer | None = None
        self.generation = 0
        self._pid = os.getpid()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closing = False
        self.returning = 0
        self.loop_is_ending = False
        resources.on_return = self.release

    # Opening

    async def open_into(self, entry: PoolEntry[DriverConnection], seconds: float | None) -> None:
        """Open a connection into an empty entry; `seconds` bound it. Raises whatever opening raises; the entry stays empty."""
        self.require_open()
        generation = self.generation
        started = self._clock.now()
        try:
            async with asyncio.timeout(None) as scope:
                self._openings.add(scope)
                driver = await self._connector.open(seconds)
        except TimeoutError:
            self.require_open()
            raise
        finally:
            self._openings.discard(scope)
        if self.closing:
            driver.terminate()
            self.require_open()
        if driver.connection.is_closed():
            raise asyncpg.InterfaceError("the server closed a connection as soon as it was made: connection is closed")
        now = self._clock.now()
        self._context.counters.open_seconds += now - started
        entry.fill(
            driver,
            now=now,
            expires_at=now + self._draw_lifetime(),
            generation=generation,
            asked_at=started,
            uses=driver.queries,
        )
        if self._context.events:
            self._context.events.emit(
                ConnectionOpened(elapsed=now - started, server_pid=driver.pid, size=self._resources.size)
            )

    def _draw_lifetime(self) -> float:
        longest = self._config.max_lifetime
        return longest - backoff.full_jitter(longest * _LIFETIME_JITTER) if longest else float("inf")

    def require_open(self) -> None:
        """Raise if no connection is opened any more."""
        if self.closing:
            where = "closing" if self._pid == os.getpid() else "used in a forked process"
            raise asyncpg.InterfaceError(f"pool is {where}: no connection is opened any more")

    @property
    def is_in_own_loop(self) -> bool:
        """Whether the event loop that runs here is the pool's: only there can anything be begun."""
        try:
            return self.loop in (None, asyncio.get_running_loop())
        except RuntimeError:
            return False

    # Giving back

    def reset_and_release_anywhere(self, entry: PoolEntry[DriverConnection]) -> None:
        """Take back an entry whose connection has ended: in any thread, in any event loop or none."""
        if self.loop is None or self.is_in_own_loop:
            self.reset_and_release(entry)
        elif self.loop.is_running():
            self.loop.call_soon_threadsafe(self.reset_and_release, entry)
        elif self.loop.is_closed():
            self._resources.drop(entry)
        else:
            if entry.resource is not None:
                entry.resource.invalidated = True
            self.release(entry)

    def release(self, entry: PoolEntry[DriverConnection]) -> None:
        """Take back an entry whose session is as it was: close what is unfit, and keep the rest for the next caller.

        Every entry comes back through here: after use, after a reset, newly opened, handed to a caller who was cancelled
        meanwhile, emptied or never filled.
        """
        if entry.resource is not None:
            reason = self._unfit(entry)
            if reason is None:
                entry.idle_since = self._clock.now()
            else:
                self.close_connection(entry, reason)
        self._resources.put(entry)
        if self.reaper is None and self.may_reap:
            self._schedule_reaping()

    def reset_and_release(
        self, entry: PoolEntry[DriverConnection], seconds: float | None = None
    ) -> asyncio.Task[None] | None:
        """Take back an entry whose session may have changed: reset it in the background, or give it up.

        Returns:
            The reset. No caller has to wait for it, and one that does must not cancel it. `None` if there is nothing to
            reset.
        """
        reason = self._unfit(entry)
        if reason is not None:
            self.release(entry)
            return None
        entry.taken_at = self._clock.now()
        prompt = entry.resource is not None and not entry.resource.is_cancelling
        self.returning += prompt
        # A caller that waits for it must learn that its time is up; if none does, a limit that costs less is enough.
        watched = seconds is None and self._config.session_reset != "on_release"
        limit = self._config.reset_timeout if seconds is None else seconds
        # The entry is not given back by the task itself: one that is cancelled before its first step would never do it.
        task = self._context.begin(
            self._reset(entry, limit, watched=watched), lambda task: self._end_reset(entry, task, prompt=prompt)
        )
        self._resets[entry] = task
        self._background.add(task)
        if watched:
            self._watched.begin(task, limit, self._clock.monotonic())
        return task

    async def _reset(self, entry: PoolEntry[DriverConnection], seconds: float, *, watched: bool) -> None:
        driver = entry.resource
        # What failed on it may have been judged by now, and the connection with it.
        if driver is not None and self._unfit(entry) is None:
            self._context.counters.resets += 1
            await driver.restore(self._config.reset, seconds, watched=watched)

    def _end_reset(self, entry: PoolEntry[DriverConnection], task: asyncio.Task[None], *, prompt: bool) -> None:
        self._background.discard(task)
        self._watched.waiting.pop(task, None)
        if task.cancelled() and task not in self._cut:
            self.loop_is_ending = True
        self._cut.discard(task)
        del self._resets[entry]
        self.returning -= prompt
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._discard_after(error, entry)
        elif task.cancelled():
            self.discard(entry, DiscardReason.RESET_FAILED)
        else:
            self.release(entry)

    def _discard_after(self, error: BaseException, entry: PoolEntry[DriverConnection]) -> None:
        reason = scrub(f"{type(error).__name__}: {error}", self._config.secrets())
        driver = entry.resource
        # A loss is no news. What the application's own reset met has no caller who could see it.
        is_ours = self._config.reset is not None and driver is not None and not driver.connection.is_closed()
        if is_ours and not self._is_reset_reported:
            self._is_reset_reported = True
            _LOGGER.warning("reset= failed, so its connection was closed: %s (said once; stats() counts them)", reason)
        self.close_connection(entry, DiscardReason.RESET_FAILED, error=reason)
        self.release(entry)

    def _unfit(self, entry: PoolEntry[DriverConnection]) -> DiscardReason | None:
        """Say why an entry's connection must not be kept, or `None`, and take note of what it has answered."""
        driver = entry.resource
        if driver is None or driver.invalidated or driver.connection.is_closed():
            if driver is not None and driver.ended:
                return DiscardReason.CLOSED
            return DiscardReason.CLOSING if self.closing else DiscardReason.FAILED
        uses = driver.queries
        if uses != entry.uses:
            entry.uses, entry.asked_at = uses, entry.taken_at
            if not (driver.has_served or driver.is_cancelling):
                driver.has_served = True
        if self.closing:
            return DiscardReason.CLOSING
        if entry.generation != self.generation:
            return DiscardReason.GENERATION
        if uses >= self._config.max_queries and driver.has_served:  # what was asked to open it counts, but not alone
            return DiscardReason.MAX_QUERIES
        return None

    @property
    def resetting(self) -> int:
        """How many connections are being reset now."""
        return len(self._resets)

    @property
    def lone_reset(self) -> asyncio.Task[None] | None:
        """The reset of the connection used last, if it is prompt and nothing else is under way: only one caller is about."""
        if self.returning != 1 or len(self._resets) != 1 or self._resources.size != self._resources.idle + 1:
            return None
        ((entry, reset),) = self._resets.items()
        newest = self._resources.last_used
        return reset if newest is None or newest.idle_since <= entry.taken_at else None

    def connections(self) -> list[DriverConnection]:
        """List the open connections, whatever they are doing."""
        drivers = (entry.resource for entry in self._resources)
        return [driver for driver in drivers if driver is not None and not driver.connection.is_closed()]

    def detach(self, entry: PoolEntry[DriverConnection]) -> None:
        """Let an entry go with its connection, for good: its place in the pool is free."""
        self._resources.drop(entry)

    # Discarding

    def is_outdated(self, entry: PoolEntry[DriverConnection]) -> bool:
        """Whether an entry is older than the last `expire()`."""
        return entry.generation != self.generation

    def close_connection(
        self, entry: PoolEntry[DriverConnection], reason: DiscardReason, *, error: str | None = None
    ) -> None:
        """Close an entry's connection without waiting, and keep the entry, now empty."""
        driver = entry.empty()
        if driver is None:
            return
        self._context.counters.discarded[reason] += 1
        if self._context.events:
            self._context.events.emit(
                ConnectionDiscarded(
                    reason=reason, age=self._clock.now() - entry.opened_at, server_pid=driver.pid, error=error
                )
            )
        if reason in _WITHOUT_GOODBYE or driver.connection.is_closed():
            driver.terminate()
        else:
            self._background.add(
                self._context.begin(driver.close(_CLOSE_LIMIT), lambda task: self._closed(driver, task))
            )

    def discard(self, entry: PoolEntry[DriverConnection], reason: DiscardReason) -> None:
        """Close an entry's connection without waiting, and give the entry to the first caller that waits for one."""
        self.close_connection(entry, reason)
        self.release(entry)

    def expire(self) -> None:
        """Condemn every connection opened before now: the idle ones at once, the others when they are given back."""
        self.generation += 1
        for entry in self._resources.withdraw(lambda _: True):
            self.discard(entry, DiscardReason.GENERATION)

    def discard_idle_since(self, asked_at: float, reason: DiscardReason = DiscardReason.PING_FAILED) -> None:
        """Discard every connection that was asked last then or earlier: one like them was just found dead."""
        for entry in self._resources.withdraw(lambda entry: entry.asked_at <= asked_at):
            self.discard(entry, reason)

    # Ageing

    @property
    def _idle_limit(self) -> float:
        """How long a connection may be idle, in seconds: less than the server's own patience, if it has one; 0 for ever."""
        own, info = self._config.max_inactive_connection_lifetime, self._connector.server_info
        servers = 0.0 if info is None else (info.idle_session_timeout or 0.0) * _SHARE_OF_THE_SERVERS_PATIENCE
        return min(own, servers) if own and servers else own or servers

    def close_if_idle_too_long(self, entry: PoolEntry[DriverConnection]) -> None:
        """Close the connection of an entry that was just taken, if it was idle for too long.

        The timer does that in time, unless the process was frozen.
        """
        limit, idle = self._idle_limit, self._clock.now() - entry.idle_since
        if limit and idle >= limit and self._resources.size > self._config.min_size:
            self.close_connection(entry, DiscardReason.IDLE)

    @property
    def may_reap(self) -> bool:
        """Whether there is any that may be closed because it is idle for too long."""
        return bool(self._resources.size > self._config.min_size and self._idle_limit)

    def _schedule_reaping(self) -> None:
        oldest, limit = self._resources.oldest_idle_since, self._idle_limit
        if oldest is None or self.closing:
            return
        if not self.is_in_own_loop:
            return  # what is given back next is followed by the timer
        self.reaper = self._clock.call_later(max(oldest + limit - self._clock.now(), 0.0), self._reap)

    def _reap(self) -> None:
        self.reaper = None
        # A timer may fire a little early; what is as good as due goes too, or the timer would have to run again.
        due = self._clock.now() - self._idle_limit + 0.01
        for entry in self._resources.withdraw(lambda entry: entry.idle_since <= due, keep=self._config.min_size):
            self.discard(entry, DiscardReason.IDLE)
        if self.reaper is None and self.may_reap:
            self._schedule_reaping()

    # The end

    def begin_closing(self) -> None:
        """Keep nothing from now on, and close what is idle."""
        self.closing = True
        with contextlib.suppress(
            RuntimeError
        ):  # terminate() needs no running loop; what runs in none waits for nothing
            for opening in self._openings:
                opening.reschedule(asyncio.get_running_loop().time())
        if self.reaper is not None:
            self.reaper.cancel()
            self.reaper = None
        for chore in self._chores:
            self._cut_short(chore)
        for entry in self._resources.withdraw(lambda _: True):
            self.discard(entry, DiscardReason.CLOSING)

    async def finish(self, seconds: float | None) -> bool:
        """Wait until every connection is back and closed.

        Only what the application holds may take long: resets, attempts to connect and goodbyes have limits of their own,
        and what does not even then end is waited for no more.

        Returns:
            Whether everything came back within `seconds`.
        """
        limit = self._clock.call_later(self._config.reset_timeout + _CLOSE_LIMIT, self._abandon_our_own)
        try:
            async with asyncio.timeout(seconds):
                await self._resources.drained()
        except TimeoutError:
            _LOGGER.warning(
                "closing the pool: %d connection(s) not released within %g s are cut off",
                self._resources.size,
                seconds,
            )
            return False
        finally:
            limit.cancel()
        ends = self._clock.monotonic() + 2 * _CLOSE_LIMIT
        while self._background and self._clock.monotonic() < ends:
            await asyncio.wait(self._background, timeout=2 * _CLOSE_LIMIT)
        self._watched.stop()
        return not self._background

    def _abandon_our_own(self) -> None:
        for entry in self._resources:
            if entry.resource is None or entry in self._resets:
                self.close_connection(entry, DiscardReason.CLOSING)
                self._resources.drop(entry)

    async def wait_for_background(self, seconds: float | None) -> None:
        """Wait until nothing is done in the background; what is not done after `seconds` is cut short."""
        ends = None if seconds is None else self._clock.monotonic() + seconds
        try:
            busy: set[asyncio.Task[object]] = set()
            while self._background and not busy:  # what ends may begin something else, such as a goodbye
                left = None if ends is None else max(ends - self._clock.monotonic(), 0.0)
                _, busy = await asyncio.wait(self._background, timeout=left)
        finally:
            for task in self._background:
                self._cut_short(task)
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_LIMIT)

    def report_long_close(self, seconds: float) -> None:
        """Warn that connections have not come back, and say how many."""
        _LOGGER.warning(
            "closing the pool takes over %g s: %d connection(s) not released yet", seconds, self._resources.size
        )

    def cut_off(self) -> None:
        """Close every connection at once, also those in use, and do nothing that needs an event loop."""
        self.closing = True  # first: a lease whose connection is closed gives its entry back
        for entry in self._resources:
            if entry.resource is not None:
                entry.resource.invalidated = True
                entry.resource.terminate()

    def disown(self) -> None:
        """Touch nothing any more: in a forked process all connections are the parent's."""
        self.closing = True
        for driver in self.connections():
            driver.disown()

    def terminate(self) -> None:
        """Close every connection at once, also those in use. It needs no running event loop."""
        self.cut_off()
        self.begin_closing()
        for task in self._background:
            self._cut_short(task)
        self._watched.stop()
        self._resources.stop_draining()

    def run_in_background(self, work: Coroutine[object, object, object]) -> None:
        """Run background work that is cancelled when the pool is closed."""
        if self.closing:
            work.close()
        else:
            chore = self._context.begin(work, self._forget)
            self._background.add(chore)
            self._chores.add(chore)

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._background.discard(task)
        self._chores.discard(task)
        self._cut.discard(task)

    def _closed(self, driver: DriverConnection, task: asyncio.Task[object]) -> None:
        self._forget(task)
        if not task.cancelled():
            task.exception()  # it is closed all the same
        driver.terminate()

    def _cut_short(self, task: asyncio.Task[object]) -> None:
        self._cut.add(task)
        task.cancel()
