"""The only module that decides who may open a connection, and that tries to reach a server which is not known to be up."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from resilient_pool.config import PoolConfig
from resilient_pool.core.clock import Clock
from resilient_pool.core.connector import Connector
from resilient_pool.core.judgement import judge, nearest_sqlstate
from resilient_pool.core.slots import Slot, Slots
from resilient_pool.core.upkeep import Upkeep
from resilient_pool.core.wire import Link
from resilient_pool.errors import AcquireTimeoutError
from resilient_pool.observe.events import Dispatcher, GateClosed, GateOpened, RetryScheduled
from resilient_pool.observe.stats import Counters
from resilient_pool.policy.verdict import Failure, Fault, Phase, Verdict

# For so long after the first failure a server that lets nobody in may be one that is waking up: 15 s is usual, 30 s and
# more after a day of sleep.
WAKE_WINDOW = 60.0


class RecoveryGate:
    """Keeps a crowd from a server that is not known to be up.

    The first connection of a pool, and the first one after an attempt has failed or after the last connection was closed,
    is opened by one prober, under the `reconnect` policy. Everybody else waits for a slot, each under its own deadline,
    and holds none. When the prober gets through, waiters are admitted: 1, 2, 4, ... may open at the same time, each step
    when an opening has succeeded. When nobody waits any more the prober stops.

    Args:
        config: The policy and the classifier.
        slots: Where callers wait, and which is told how many of them may open.
        upkeep: Opens connections.
        connector: Knows whether writes are expected to work.
        clock: Tells the time and waits.
        counters: Where it counts.
        dispatcher: Who is told.
    """

    def __init__(
        self,
        config: PoolConfig,
        slots: Slots[Link],
        upkeep: Upkeep,
        connector: Connector,
        clock: Clock,
        counters: Counters,
        dispatcher: Dispatcher,
    ) -> None:
        self._config = config
        self._slots = slots
        self._upkeep = upkeep
        self._connector = connector
        self._clock = clock
        self._counters = counters
        self._dispatcher = dispatcher
        self._outage: _Outage | None = None
        self._wake_window = _WakeWindow()
        self._prober: asyncio.Task[None] | None = None
        self._attempt_began: float | None = None
        self._not_before = clock.monotonic()
        slots.on_want = self.call
        slots.admit(0)

    def __repr__(self) -> str:
        return f"<RecoveryGate {'closed' if self.is_closed else 'open'} admitted={self._slots.admitted}>"

    @property
    def is_closed(self) -> bool:
        """Whether the last attempt to connect failed in a way that waiting cures."""
        return self._outage is not None

    # For those who want a connection

    def doubt(self) -> None:
        """Take the server for one that is not known to be up."""
        self._slots.admit(0)

    def doubt_if_alone(self) -> None:
        """Doubt, if there is no connection left that has worked."""
        if self._slots.admitted and not self._slots.has_resources:
            self.doubt()

    def call(self) -> None:
        """Let the prober open what nobody else may: while the server is not known to be up, or to keep `min_size`."""
        needed = not self._slots.admitted or self._slots.size < self._config.min_size
        if needed and self._prober is None and not self._upkeep.closing:
            self._prober = self._upkeep.spawn(self._probe())

    def leave(self) -> None:
        """Stop the prober, if whoever leaves was the last who waited."""
        if self._prober is not None and not self._slots.wants:
            self.stop()

    def stop(self) -> None:
        """Stop the prober, whatever it is doing."""
        prober, self._prober = self._prober, None
        if prober is not None:
            prober.cancel()

    def refusal(self) -> Exception | None:
        """Return an error for a caller who does not wait any longer: how the last attempt failed. `None` if it did not."""
        return None if self._outage is None else self._outage.refusal(self._clock.monotonic())

    def most_telling(self, timeout: AcquireTimeoutError) -> Exception:
        """Choose what a caller sees whose time has run out: why there was no connection, if that is known."""
        if self._slots.admitted:
            return timeout
        if self._outage is not None:
            return self._outage.refusal(self._clock.monotonic())
        if self._attempt_began is None:
            return timeout
        return AcquireTimeoutError(
            "no connection could be opened in time: the last attempt to connect began "
            f"{self._clock.monotonic() - self._attempt_began:.2f} s ago, and the server did not answer it; "
            "raise deadline if it takes longer to wake up"
        )

    async def open_into(self, slot: Slot[Link], deadline: float | None) -> bool:
        """Open a connection into an empty slot in the caller's hands, if the caller may.

        Args:
            slot: The slot.
            deadline: Until when, on the line of `Clock.monotonic()`.

        Returns:
            Whether there is a connection now. If not, the slot must be given up, and another one waited for.

        Raises:
            Exception: What opening raised, if waiting does not cure it or the caller's own time is up.
        """
        self.doubt_if_alone()
        if not self._slots.may_open:
            return False
        try:
            await self._upkeep.open_into(slot, None if deadline is None else deadline - self._clock.monotonic())
        except Exception as error:
            if deadline is not None and self._clock.monotonic() >= deadline:
                self.doubt()  # an attempt that was cut short tells nothing
                raise
            final = self._failed(error)
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
            delay = self._not_before - self._clock.monotonic()
            if delay > 0:
                await self._clock.sleep(delay)
            slot = self._slots.reserve()
            if slot is None:
                return  # whoever gives a place up calls again
            await self._attempt(slot)
            # Once admitted, those who wait open for themselves.
            wanted = self._slots.wants and not (self._slots.admitted and self._slots.waiting)

    async def _attempt(self, slot: Slot[Link]) -> None:
        self._attempt_began = self._clock.monotonic()
        # For the case that it is given up because nobody waits, and somebody comes right after.
        self._not_before = self._attempt_began + self._config.reconnect.base
        failure = None
        try:
            await self._upkeep.open_into(slot, None)
        except Exception as error:  # noqa: BLE001 - it is classified, and told to those who wait
            failure = error
        finally:
            if slot.resource is None:
                self._slots.put(slot)
        if failure is None:
            self._not_before = self._clock.monotonic()
            self._upkeep.keep(slot)
            self._succeeded()
            return
        final = self._failed(failure)
        if final is not None:
            self._slots.dismiss_waiters(final)

    # What follows from an attempt

    def _succeeded(self) -> None:
        outage, self._outage = self._outage, None
        self._wake_window.close()
        if outage is not None:
            elapsed = self._clock.monotonic() - outage.began
            self._dispatcher.tell(GateOpened(attempts=outage.attempts, elapsed=elapsed))
        admitted = self._slots.admitted
        if admitted < self._config.max_size:
            # One more for each success makes each round twice as wide as the one before.
            self._slots.admit(admitted + 1)
            # Connections that are being reset come back sooner than others could be opened.
            while self._slots.waiting > self._upkeep.returning and self._slots.offer():
                pass

    def _failed(self, error: Exception) -> Callable[[], Exception] | None:
        """Take note of a failed attempt.

        Returns:
            `None` if the server is waited for: nobody may open any more then. Otherwise what makes the error of each
            caller for whom this was the last attempt.
        """
        now = self._clock.monotonic()
        failure = Failure(
            error=error,
            phase=Phase.CONNECT,
            sent=False,
            waking=self._wake_window.covers(now),
            writable=self._connector.expects_writes,
        )
        verdict = judge(self._config, failure)
        self._counters.connect_failures += 1
        outage = self._outage or _Outage(now, self._config.reconnect.delays())
        # Of several that fail at once only the first tells how long the server has been away.
        is_news = self._prober is asyncio.current_task() or self._slots.admitted > 0
        outage.remember(error, verdict, counts=is_news)
        if verdict.fault is Fault.PERMANENT:
            self._not_before = now  # whoever comes next may have mended it
        if verdict.fault is Fault.PERMANENT or self._is_exhausted(outage):
            self._outage = None
            return lambda: outage.refusal(now)
        outage.indulged = outage.indulged or self._is_indulgence(failure)
        self._shut(outage, failure, verdict)
        if is_news:
            self._plan(outage, failure, verdict)
        return None

    def _is_exhausted(self, outage: _Outage) -> bool:
        most = self._config.reconnect.max_attempts
        return most is not None and outage.attempts >= most

    def _is_indulgence(self, failure: Failure) -> bool:
        return judge(self._config, replace(failure, waking=False)).fault is Fault.PERMANENT

    def _shut(self, outage: _Outage, failure: Failure, verdict: Verdict) -> None:
        if self._outage is None:
            self._outage = outage
            self._dispatcher.tell(GateClosed(fault=verdict.fault, sqlstate=nearest_sqlstate(failure)))
        self._slots.admit(0)
        self._slots.dismiss_impatient(lambda: outage.refusal(self._clock.monotonic()))

    def _plan(self, outage: _Outage, failure: Failure, verdict: Verdict) -> None:
        now, delay = self._clock.monotonic(), next(outage.delays)
        self._not_before = now + delay
        self._counters.retries[verdict.fault] += 1
        if self._dispatcher:
            self._dispatcher.tell(
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


class _Outage:
    """What is remembered of a server that cannot be reached, until it can.

    Attributes:
        began: When the first attempt failed.
        attempts: How many attempts have failed.
        delays: What to wait between two attempts.
        indulged: Whether one of them would have been the last, had the server not possibly been waking up.
    """

    __slots__ = ("_error", "_fault", "_is_given", "_notes", "attempts", "began", "delays", "indulged")

    def __init__(self, now: float, delays: Iterator[float]) -> None:
        self.began = now
        self.attempts = 0
        self.delays = delays
        self.indulged = False

    def remember(self, error: Exception, verdict: Verdict, *, counts: bool) -> None:
        """Keep how the last attempt failed, for those who wait."""
        self.attempts += counts
        self._error = error
        self._fault = verdict.fault
        self._notes = tuple(getattr(error, "__notes__", ()))
        self._is_given = False

    def refusal(self, now: float) -> Exception:
        """Return an exception for one caller, with what was tried in its notes: the last error, or its twin."""
        refusal = _twin(self._error, self._notes) if self._is_given else self._error
        self._is_given = True
        if self.attempts > 1 or self._fault is not Fault.PERMANENT:
            refusal.add_note(
                f"resilient_pool: gave up after {self.attempts} attempt{'s' * (self.attempts > 1)} to connect in "
                f"{now - self.began:.2f} s; the last fault was {self._fault.value}"
            )
        if self.indulged:
            refusal.add_note(
                "resilient_pool: it was tried again because a server that is waking up refuses in the same way, "
                f"for up to {WAKE_WINDOW:g} s"
            )
        return refusal


class _WakeWindow:
    """Tells whether a server that lets nobody in may be one that is waking up."""

    __slots__ = ("_last_failure", "_since")

    def __init__(self) -> None:
        self._since: float | None = None
        self._last_failure = 0.0

    def covers(self, now: float) -> bool:
        """Take note of a failure at `now`, and say whether it falls into the window."""
        if self._since is None or now - self._last_failure > WAKE_WINDOW:
            self._since = now  # a server that was left alone for so long may have gone to sleep
        self._last_failure = now
        return now - self._since < WAKE_WINDOW

    def close(self) -> None:
        """Take note that the server is awake."""
        self._since = None


def _twin(error: Exception, notes: tuple[str, ...]) -> Exception:
    """Return a copy of an error for another caller: tracebacks and notes are added to each one's own."""
    try:
        twin = copy.copy(error)
    except Exception:  # noqa: BLE001 - an exception of the application's that cannot be copied is shared
        return error
    if type(twin) is not type(error):
        return error
    twin.__cause__, twin.__context__ = error.__cause__, error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    twin.__notes__ = list(notes)
    return twin
