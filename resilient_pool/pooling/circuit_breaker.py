"""Circuit breaker for connecting: one task probes a server that is not known to be up, all others wait."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from resilient_pool.config.secrets import scrub
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.events import CircuitClosed, CircuitOpened, RetryScheduled
from resilient_pool.pooling.connect import Connector
from resilient_pool.pooling.context import PoolContext, nearest_sqlstate
from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.pooling.resource_pool import PoolEntry, ResourcePool
from resilient_pool.retry.verdict import Failure, Fault, Verdict

_LOGGER = logging.getLogger("resilient_pool")

# For so long after the first failure a server that refuses every login may be waking up: 15 s is usual, 30 s and
# more after a day of sleep.
WAKE_WINDOW = 60.0
# After so many seconds without an answer another attempt is made beside the first: a server that wakes lets attempts hang,
# but so does an address from which the server has moved away.
UNANSWERED = 5.0
_AT_ONCE = 2
# The server is there, but what the application's `init` has asked it for failed in a curable way.
_ABOUT_SETTING_UP = frozenset({Fault.CONTENTION, Fault.STATEMENT_CACHE})
_ABOUT_ONE_MORE_CONNECTION = _ABOUT_SETTING_UP | {Fault.OVERLOADED}


class CircuitBreaker:
    """Lets one task probe a server that is not known to be up, while all other callers wait.

    The first connection of a pool, and the first one after an attempt has failed or after the last connection was closed,
    is opened by one prober, under the `reconnect` policy. Everybody else waits for an entry, each under its own deadline,
    and holds none. When the prober gets through, waiters are admitted: 1, 2, 4, ... may open at the same time, each step
    when an opening has succeeded. When no caller waits any more the prober stops.

    The prober makes one attempt at a time, and a second one beside it when that has not been answered for 5 s.

    A server that has no room for one more connection, or refuses it for good (a wrong password, say), while others of this
    pool work, is not away: those serve all callers, no more are opened than there are, and the prober finds out when another
    one is let in again. Without any connection such a refusal is final at once.

    A verdict may say for how long another attempt is useless (`not_before`): the prober waits for that long, and a caller whose
    deadline comes first fails at once, unless a connection works that it can have. One that says for how long there is
    hope (`only_for`) is final when the same was still said after that time.

    Without any observer, too, the log says when the server is away and when it is back: one line each, at WARNING.

    Attributes:
        is_opening: Whether the pool itself is being opened: its first connections serve no callers yet.
    """

    def __init__(
        self,
        context: PoolContext,
        resources: ResourcePool[DriverConnection],
        maintenance: Maintenance,
        connector: Connector,
    ) -> None:
        self._context = context
        self._config = context.config
        self._clock = context.clock
        self._resources = resources
        self._maintenance = maintenance
        self._connector = connector
        self._outage: Outage | None = None
        self._last_outage: Outage | None = None
        self._capped: Outage | None = None
        self._is_reported = False
        self._wake_window, self._doubt = _Series(), _Series()
        self._blocked_until = -math.inf
        self._prober: asyncio.Task[None] | None = None
        self._attempts: set[asyncio.Task[bool]] = set()
        self._attempt_began: float | None = None
        self._delays = context.config.reconnect.delays()
        self._not_before = context.clock.monotonic()
        self._last_opened: DriverConnection | None = None
        self._is_final = False
        self.is_opening = False
        resources.on_connection_needed = self.maintain
        resources.set_connect_limit(0)

    def __repr__(self) -> str:
        return f"<CircuitBreaker {'closed' if self.is_open else 'open'} admitted={self._resources.connect_limit}>"

    @property
    def is_open(self) -> bool:
        """Whether the last attempt to connect failed in a way that waiting cures."""
        return self._outage is not None

    # For those who want a connection

    def half_open(self) -> None:
        """Let no caller open a connection until the prober has opened one."""
        self._resources.set_connect_limit(0)

    @property
    def is_settled(self) -> bool:
        """Whether no caller is refused, and the prober is not needed: as nearly always."""
        return (
            self._outage is None
            and self._capped is None
            and self._blocked_until == -math.inf
            and self._resources.connect_limit > 0
            and self._resources.size >= self._config.min_size
        )

    def half_open_if_unconnected(self) -> None:
        """Do that if no connection is left."""
        if self._resources.connect_limit and not self._resources.has_resources:
            self.half_open()

    def ensure_prober(self) -> None:
        """Start the prober if it is needed: while the server is not known to be up, or to keep `min_size`."""
        needed = (
            not self._resources.connect_limit
            or self._resources.size < self._config.min_size
            or self._capped is not None
        )
        if self._prober is not None or not needed or self._maintenance.closing:
            return
        # A connection may be terminated elsewhere, or while no loop runs: the next caller sees to the rest then.
        if self._maintenance.is_in_own_loop:
            self._maintenance.loop_is_ending = False
            self._prober = self._context.begin(self._probe())

    def maintain(self) -> None:
        """Let the prober open what is missing, but not for an idle pool whose last refusal was final, or whose event loop ends."""
        if self._resources.is_awaited or not (self._is_final or self._maintenance.loop_is_ending):
            self.ensure_prober()

    def stop_prober_if_unused(self) -> None:
        """Stop the prober, if no caller waits any more."""
        if self._prober is not None and not self._resources.is_connection_needed:
            self.stop()

    def stop(self) -> None:
        """Stop the prober, whatever it is doing."""
        for task in self._tasks():
            task.cancel()
        self._prober = None
        self._attempts.clear()

    def _tasks(self) -> set[asyncio.Task[None] | asyncio.Task[bool]]:
        return {*self._attempts, *([] if self._prober is None else [self._prober])}

    async def wait_until_stopped(self) -> None:
        """Stop the prober and wait for its end, unless a caller waits for a connection."""
        if self._resources.waiting:
            return
        working = self._tasks()
        self.stop()
        if working:
            await asyncio.wait(working)

    def restart(self) -> None:
        """Forget what is known of the server: connections go to another one from now on."""
        self.stop()
        self.half_open()
        self._take_outage()
        self._is_final = False
        self._uncap()
        self._doubt.end()
        self._not_before, self._blocked_until = self._clock.monotonic(), -math.inf
        if self._resources.is_connection_needed:
            self.ensure_prober()

    def outage_since(self, instant: float) -> Outage | None:
        """Return the last outage if it goes on, or ended after an instant on the line of `Clock.monotonic()`."""
        outage = self._outage or self._last_outage
        return outage if outage is not None and (outage.ended is None or outage.ended > instant) else None

    def refusal(self, deadline: float | None, *, fail_fast: bool) -> Exception | None:
        """Return an error for a caller for whom waiting has no sense, or `None`."""
        now = self._clock.monotonic()
        if fail_fast and self._outage is not None:
            return self._outage.error_for_caller(now)
        if self._is_hopeless(math.inf if deadline is None else deadline, now) and not self._maintenance.connections():
            return self._blocked_error(now)
        return None

    def _is_hopeless(self, until: float, since: float) -> bool:
        """Whether a caller who waits since and until then has gone when the next attempt to connect makes sense."""
        longest = self._config.reconnect.max_elapsed
        return min(until, math.inf if longest is None else since + longest) <= self._blocked_until

    def _blocked_error(self, now: float) -> Exception:
        left = self._blocked_until - now
        outage = self._outage or self._capped or self._last_outage
        text = (
            f"no connection can be opened before {left:.1f} s from now, when this call would have ended: until then the service "
            f"lets no new client in; call again after that, or raise deadline"
        )
        error = AcquireTimeoutError(text) if outage is None else outage.explain(text)
        error.retry_after = left
        return error

    def error_for_timeout(self, timeout: AcquireTimeoutError) -> Exception:
        """Choose what a caller sees whose time has run out: why there was no connection, if that is known."""
        if self._capped is not None and self._resources.has_resources:
            refuses = "has no room for" if self._capped.fault is Fault.OVERLOADED else "refuses"
            return self._capped.explain(
                f"no connection became free in time: all {len(self._maintenance.connections())} that are open are in use, and the "
                f"server {refuses} another one, up to max_size={self._config.max_size}"
            )
        if self._outage is not None and not self._resources.connect_limit:
            return self._outage.error_for_caller(self._clock.monotonic())
        if self._resources.connect_limit or self._attempt_began is None:
            return timeout
        if self._attempts:
            return self._unanswered_since(self._attempt_began)
        return AcquireTimeoutError(
            f"no connection could be opened in time: {len(self._maintenance.connections())} are open and in use, and the next attempt "
            f"is due in {max(self._not_before - self._clock.monotonic(), 0.0):.2f} s; raise deadline"
        )

    def _unanswered_since(self, instant: float) -> AcquireTimeoutError:
        return AcquireTimeoutError(
            "no connection could be opened in time: the last attempt to connect began "
            f"{self._clock.monotonic() - instant:.2f} s ago, and the server did not answer it; "
            "raise deadline if it takes longer to wake up"
        )

    async def open_into(self, entry: PoolEntry[DriverConnection], deadline: float | None) -> bool:
        """Open a connection into an empty entry in the caller's hands, if the caller may.

        Returns:
            Whether there is a connection now. If not, the entry must be given up, and another one waited for.

        Raises:
            Exception: What opening raised, if waiting does not cure it or the caller's own time is up.
        """
        self.half_open_if_unconnected()
        if not self._resources.may_open:
            return False
        began = self._clock.monotonic()
        try:
            await self._maintenance.open_into(entry, None if deadline is None else deadline - began)
        except Exception as error:
            if deadline is not None and self._clock.monotonic() >= deadline:
                self.half_open()  # an attempt that was cut short says nothing of the server
                if isinstance(error, TimeoutError):
                    raise self._unanswered_since(began) from error
                raise
            final = self._failed(error, is_news=self._resources.connect_limit > 0 and self._capped is None)
            if final is not None:
                raise final() from error.__cause__
            return False
        self._succeeded()
        return True

    # The prober

    async def _probe(self) -> None:
        try:
            await self._attempt_until_unwanted()
        finally:
            # In the same turn, so that no call is lost between its end and its being forgotten.
            if self._prober is asyncio.current_task():
                self._prober = None

    async def _attempt_until_unwanted(self) -> None:
        wanted = True
        while wanted:
            await self._wait_before_attempt()
            if not self._begin_attempt():
                return  # giving a place up calls this again
            await self._wait_for_attempts()
            # Once admitted, those who wait open for themselves, as many as there may be.
            serves_itself = self._resources.connect_limit and self._resources.waiting and self._capped is None
            wanted = (
                self._resources.is_connection_needed
                and not serves_itself
                and (self._resources.is_awaited or not self._is_final)
            )

    async def _wait_before_attempt(self) -> None:
        delay = self._not_before - self._clock.monotonic()
        if delay > 0 and not self._may_attempt_at_once():
            await self._clock.sleep(delay)
        else:
            await asyncio.sleep(0)  # opening may fail, or succeed, without ever waiting for anything

    def _may_attempt_at_once(self) -> bool:
        """Whether no delay is needed: the last attempt was a success, or final and a new caller asks."""
        served = self._last_opened is not None and self._last_opened.has_served
        if self._capped is not None:
            # Without a connection that works the refusal is final, and those who wait see it at once.
            return self._capped.is_final and self._resources.waiting > 0 and not self._maintenance.connections()
        return self._resources.connect_limit > 0 or served or (self._is_final and self._resources.waiting > 0)

    def _begin_attempt(self) -> bool:
        """Begin an attempt, unless the pool is full or enough are under way; say whether it was begun."""
        entry = self._resources.reserve() if len(self._attempts) < _AT_ONCE else None
        if entry is None:
            return False
        self._attempts.add(self._context.begin(self._attempt(entry), lambda attempt: self._end_attempt(attempt, entry)))
        return True

    def _end_attempt(self, attempt: asyncio.Task[bool], entry: PoolEntry[DriverConnection]) -> None:
        # Not in the attempt itself: one that is cancelled before its first step would never give its entry back.
        if attempt in self._attempts:
            self._attempts.discard(attempt)
            self._maintenance.loop_is_ending = self._maintenance.loop_is_ending or attempt.cancelled()
        broken = None if attempt.cancelled() else attempt.exception()
        if attempt.cancelled() or broken is not None or not attempt.result():
            self._maintenance.release(entry)
        if isinstance(broken, Exception):
            # A jitter of the application's, say. No caller must wait for a prober that cannot go on.
            self._resources.fail_waiters(_ExceptionCopier(broken).make)

    async def _wait_for_attempts(self) -> None:
        self._unanswered = self._clock.call_later(UNANSWERED, self._start_second_attempt)
        try:
            while self._attempts:
                await asyncio.wait(self._attempts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._unanswered.cancel()

    def _start_second_attempt(self) -> None:
        self._begin_attempt()
        self._unanswered = self._clock.call_later(UNANSWERED, self._start_second_attempt)

    async def _attempt(self, entry: PoolEntry[DriverConnection]) -> bool:
        """Open a connection into an entry and hand it on, and return whether that was done; if not, the entry is still the attempt's."""
        self._attempt_began = self._clock.monotonic()
        # For the case that it is given up because no caller waits, and one comes right after; or that what it opens is of
        # no use.
        self._not_before = self._attempt_began + self._config.reconnect.base
        try:
            await self._maintenance.open_into(entry, None)
        except Exception as error:  # noqa: BLE001 - it is classified, and raised for those who wait
            final = self._failed(error, is_news=True)
            if final is not None:
                self._refuse(error, final)
            return False
        for other in self._attempts - {asyncio.current_task()}:
            self._attempts.discard(other)
            other.cancel()
        self._last_opened = entry.resource
        self._maintenance.release(entry)
        self._succeeded()
        return True

    # What follows from an attempt

    def _succeeded(self) -> None:
        self._end_outage()
        self._doubt.end()
        self._blocked_until = -math.inf
        self._is_final = False
        capped = self._capped
        if capped is not None and (capped.is_final or len(self._maintenance.connections()) > self._resources.ceiling):
            self._uncap()
            if capped.is_final:
                _LOGGER.warning("the database server accepts new connections again")
        if self._capped is None:
            self._delays = self._config.reconnect.delays()
        admitted = self._resources.connect_limit
        if admitted < self._config.max_size:
            # One more for each success makes each round twice as wide as the one before.
            self._resources.set_connect_limit(admitted + 1)
            # Connections that are being reset come back sooner than others could be opened.
            while self._resources.waiting > self._maintenance.returning and self._resources.offer_entry():
                pass
        if self._resources.is_connection_needed and not self._resources.waiting:
            self.ensure_prober()  # for `min_size`

    def _end_outage(self) -> None:
        outage = self._take_outage()
        self._wake_window.end()
        if outage is not None:
            elapsed = outage.lasted(self._clock.monotonic())
            self._context.events.emit(CircuitClosed(attempts=outage.attempts, elapsed=elapsed))
        if self._is_reported:
            self._is_reported = False
            _LOGGER.warning("the database server is back: connections are opened again")

    def _take_outage(self) -> Outage | None:
        outage, self._outage = self._outage, None
        if outage is not None:
            outage.ended = self._clock.monotonic()
            self._last_outage = outage
            self._context.counters.circuit_open_seconds += outage.lasted(outage.ended)
        return outage

    def _uncap(self) -> None:
        self._capped = None
        self._resources.restrict(None)

    def _refuse(self, error: Exception, final: Callable[[], Exception]) -> None:
        """Raise a final refusal for those who wait; if there are none, write it to the log."""
        if not self._resources.is_awaited and not self._is_reported:
            self._report(error, "the database server refuses connections: min_size is not kept until one is asked for")
        self._resources.fail_waiters(final)

    def _report(self, error: Exception, what: str) -> None:
        self._is_reported = True
        self._log(error, what)

    def _log(self, error: Exception, what: str) -> None:
        reason = scrub(f"{type(error).__name__}: {error}", self._config.secrets())
        _LOGGER.warning("%s (%s)", what, reason)

    def _failed(self, error: Exception, *, is_news: bool) -> Callable[[], Exception] | None:
        """Take note of a failed attempt.

        Args:
            error: How it failed.
            is_news: Whether it counts. Of several callers that fail at once only the first says anything new.

        Returns:
            `None` if the server is waited for: no caller may open any more then. Otherwise what makes the error of each
            caller for whom this was the last attempt.
        """
        now, works = self._clock.monotonic(), bool(self._maintenance.connections())
        waking = now - self._wake_window.began(now) < WAKE_WINDOW
        failure = self._connector.describe(error, waking=waking and not works)
        verdict = self._classify(failure, now)
        self._context.counters.connect_failures += 1
        if works and self._is_about_one_more_connection(verdict):
            self._cap(error, failure, verdict, now)
            return None
        self._uncap()
        is_news = is_news or self._outage is None
        outage = self._outage or Outage(now)
        outage.remember(error, verdict, counts=is_news)
        delay = self._delay_next_attempt(verdict, now, is_news=is_news)
        self._last_opened = None
        self._is_final = verdict.fault is Fault.PERMANENT
        if not (self._is_final or self._is_reported):
            self._report(error, f"{_what_is_wrong(verdict)}: callers wait, and one task tries to reach it")
        if self._is_final or self._is_exhausted(outage):
            self._take_outage()
            if not self._is_final:
                self.half_open()
            return lambda: outage.error_for_caller(now)
        outage.extended_by_wake_window = outage.extended_by_wake_window or self._is_extended_by_wake_window(failure)
        self._open_circuit(outage, failure, verdict, now)
        if is_news:
            self._emit_retry(outage, failure, verdict, delay, now)
        return None

    def _classify(self, failure: Failure, now: float) -> Verdict:
        """Classify how an attempt failed; what was to pass within some time, and is still said after it, is final."""
        verdict = self._context.classify(failure)
        if verdict.only_for is not None:
            left = self._doubt.began(now) + verdict.only_for - now
            verdict = replace(verdict, only_for=left) if left > 0 else replace(verdict, fault=Fault.PERMANENT)
        if verdict.not_before is not None and verdict.fault is not Fault.PERMANENT:
            self._blocked_until = now + verdict.not_before
        return verdict

    def _delay_next_attempt(self, verdict: Verdict, now: float, *, is_news: bool) -> float:
        """Set from when on there may be another attempt, and return in how many seconds that is."""
        delay = next(self._delays) if is_news else 0.0
        delay = delay if verdict.only_for is None else min(delay, verdict.only_for)  # and then for the last time
        delay = max(delay, verdict.not_before or 0.0)
        self._not_before = max(self._not_before, now + delay)
        return delay

    def _cap(self, error: Exception, failure: Failure, verdict: Verdict, now: float) -> None:
        """Serve all callers with the connections that are open: the server does not let in another one."""
        self._end_outage()
        is_known = self._capped is not None and self._capped.is_final
        self._capped = self._capped or Outage(now)
        self._capped.remember(error, verdict, counts=True)
        if self._capped.is_final and not is_known:
            self._log(error, "the database server refuses another connection: callers share those that are open")
        elif verdict.not_before is not None:
            self._log(error, f"{_what_is_wrong(verdict)}: callers share those that are open")
        delay = self._delay_next_attempt(verdict, now, is_news=True)
        self._last_opened, self._is_final = None, self._capped.is_final
        # With those that are being opened beside this one: they may be let in.
        self._resources.restrict(len(self._maintenance.connections()) + max(self._resources.opening - 1, 0))
        # For those that replace one of them.
        self._resources.set_connect_limit(0 if verdict.not_before else max(self._resources.connect_limit, 1))
        self._emit_retry(self._capped, failure, verdict, delay, now)

    def _is_about_one_more_connection(self, verdict: Verdict) -> bool:
        """Whether a failure to open one more says nothing of those that work."""
        if verdict.fault is Fault.PERMANENT:
            return not (self.is_opening or self._maintenance.closing)
        return verdict.fault in _ABOUT_ONE_MORE_CONNECTION or verdict.not_before is not None

    def _is_exhausted(self, outage: Outage) -> bool:
        most = self._config.reconnect.max_attempts
        return most is not None and outage.attempts >= most

    def _is_extended_by_wake_window(self, failure: Failure) -> bool:
        return self._context.classify(replace(failure, waking=False)).fault is Fault.PERMANENT

    def _open_circuit(self, outage: Outage, failure: Failure, verdict: Verdict, now: float) -> None:
        if self._outage is None:
            self._outage = outage
            self._context.counters.circuit_openings += 1
            self._context.events.emit(CircuitOpened(fault=verdict.fault, sqlstate=nearest_sqlstate(failure)))
        self.half_open()
        self._resources.fail_fast_waiters(lambda: outage.error_for_caller(now))
        longest = self._config.reconnect.max_elapsed
        if longest is not None and now - outage.began >= longest:
            # Each from its own beginning: one who has just come should not pay for those before.
            self._resources.fail_waiters_if(
                lambda _, since: since <= now - longest, lambda: outage.error_for_caller(now)
            )
        self._resources.fail_waiters_if(self._is_hopeless, lambda: self._blocked_error(now))

    def _emit_retry(self, outage: Outage, failure: Failure, verdict: Verdict, delay: float, now: float) -> None:
        self._context.retry_scheduled(
            RetryScheduled(
                operation="connect",
                fault=verdict.fault,
                outcome=verdict.outcome,
                sqlstate=nearest_sqlstate(failure),
                attempt=outage.attempts,
                delay=delay,
                elapsed=now - outage.began,
            )
        )


def _what_is_wrong(verdict: Verdict) -> str:
    if verdict.not_before is not None:
        return f"no new connection is let in for {verdict.not_before:g} s"
    return "new connections cannot be set up" if verdict.fault in _ABOUT_SETTING_UP else "the database server is away"


class Outage:
    """What is remembered of a server that cannot be reached, until it can.

    Attributes:
        began: When the first attempt failed.
        ended: When it was over; `None` while it goes on.
        attempts: How many attempts have failed.
        extended_by_wake_window: Whether one of them would have been the last, had the server not possibly been waking up.
    """

    __slots__ = ("_copier", "_error", "_is_given", "_verdict", "attempts", "began", "ended", "extended_by_wake_window")

    def __init__(self, now: float) -> None:
        self.began = now
        self.ended: float | None = None
        self.attempts = 0
        self.extended_by_wake_window = False

    def remember(self, error: Exception, verdict: Verdict, *, counts: bool) -> None:
        """Keep how the last attempt failed, for those who wait."""
        self.attempts += counts
        self._error = error
        self._verdict = verdict
        # Before any caller raises it: what that caller was handling, and is told, is no other caller's business.
        self._copier = _ExceptionCopier(error)
        self._is_given = False

    @property
    def fault(self) -> Fault:
        """How the last attempt failed."""
        return self._verdict.fault

    @property
    def is_final(self) -> bool:
        """Whether waiting does not cure how the last attempt failed."""
        return self.fault is Fault.PERMANENT

    def lasted(self, now: float) -> float:
        """Return how long it has lasted, in seconds, or did until it was over."""
        return (now if self.ended is None else self.ended) - self.began

    def error_for_caller(self, now: float) -> Exception:
        """Return an exception for one caller, with what was tried in its notes: the last error, or a copy of it."""
        refusal = self._copier.make() if self._is_given else self._error
        self._is_given = True
        for note in self._notes(now):
            if note not in getattr(refusal, "__notes__", ()):
                refusal.add_note(note)
        return refusal

    def explain(self, text: str) -> AcquireTimeoutError:
        """Return an error of our own for one caller, with the last error behind it."""
        explained = AcquireTimeoutError(text)
        explained.__cause__ = self._copier.make()
        return explained

    def _notes(self, now: float) -> Iterator[str]:
        if self.attempts > 1 or self.fault is not Fault.PERMANENT:
            yield (
                f"resilient_pool: gave up after {self.attempts} attempt{'s' * (self.attempts > 1)} to connect in "
                f"{now - self.began:.2f} s; the last fault was {self.fault.value}"
            )
        if self._verdict.not_before is not None:
            yield f"resilient_pool: another attempt makes sense {self._verdict.not_before:g} s after the last one, not before"
        if self.is_final and self._verdict.only_for is not None:
            seconds = self._verdict.only_for
            yield f"resilient_pool: it was believed after {seconds:g} s: something that passes is said in the same words"
        if self.extended_by_wake_window:
            yield (
                "resilient_pool: it was tried again because a server that is waking up refuses in the same way, "
                f"for up to {WAKE_WINDOW:g} s"
            )


class _Series:
    """Since when failures of one kind follow each other."""

    __slots__ = ("_began", "_last")

    def __init__(self) -> None:
        self._began: float | None = None
        self._last = 0.0

    def began(self, now: float) -> float:
        """Take note of a failure at `now`, and return when the first one was of the series that it belongs to."""
        if self._began is None or now - self._last > WAKE_WINDOW:
            self._began = now  # a server that was left alone for so long may have gone to sleep
        self._last = now
        return self._began

    def end(self) -> None:
        """Note that the server has let us in."""
        self._began = None


class _ExceptionCopier:
    """Makes copies of an error, one for each caller: tracebacks, contexts and notes are added to each one's own."""

    __slots__ = ("_behind", "_error", "_notes")

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._behind = (error.__cause__, error.__context__, error.__suppress_context__)
        self._notes = tuple(getattr(error, "__notes__", ()))

    def make(self) -> Exception:
        """Return a copy as the error was; an application's own that cannot be copied is shared."""
        try:
            copied = copy.copy(self._error)
        except Exception:  # noqa: BLE001 - whatever its constructor says
            return self._error
        if type(copied) is not type(self._error):
            return self._error
        copied.__cause__, copied.__context__, copied.__suppress_context__ = self._behind
        copied.__notes__ = list(self._notes)
        return copied
