"""Migrations that wait for the database: wake it, take the lock, run once, and again only if it could not be reached."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import re
import shlex
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import backoff as waiting

from resilient_pool.config import PoolConfig, SealedDsn, seal
from resilient_pool.core.clock import SystemClock
from resilient_pool.errors import ConfigurationError, MigrationFailedError
from resilient_pool.migration.command import run_command
from resilient_pool.migration.lock import MigrationLock
from resilient_pool.migration.output import Lines, LineSink, guarded, print_line, secrets_around
from resilient_pool.migration.sql_files import SqlDirectory
from resilient_pool.migration.symptoms import could_not_connect, failed_to_connect
from resilient_pool.observe.events import Dispatcher, MigrationRepeated, MigrationStarted, Observer
from resilient_pool.observe.redaction import Secret, scrub
from resilient_pool.policy.backoff import BackoffPolicy
from resilient_pool.policy.retry import Retry, RetryState, decide
from resilient_pool.policy.verdict import Fault, Outcome, Phase, Verdict
from resilient_pool.pool import ResilientPool

MIGRATION_BACKOFF = BackoffPolicy(
    base=3.0, factor=2, max_value=None, jitter=waiting.random_jitter, max_attempts=5, max_elapsed=None
)
"""For a database that may be asleep: 3, 6, 12 and 24 s, each and up to 1 s more, between 5 attempts."""

CONNECT_TIMEOUT = 10.0
"""Seconds for one attempt to connect: 5 x 10 s, and waits of 45 to 49 s, are about 100 s in the worst case."""

DEADLINE = 240.0
"""Seconds for all waiting together; of a function's five minutes, one is left to the migration."""

LOCK = "resilient_pool.migration"
"""The name of the lock."""

# One connection holds the lock, the other asks.
_CONNECTIONS = 2
_DRIVER_IN_SCHEME = re.compile(r"^(postgres(?:ql)?)\+\w+(?=://)")

Migration = str | Sequence[str] | Path | Callable[[], object] | Callable[[], Awaitable[object]]
"""A command, a directory of SQL files, or a function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationResult:
    """How a migration ended well.

    Attributes:
        attempts: How often it was run; more than once only if it could not connect before.
        waited: Seconds spent waiting for the database, for the lock and between attempts.
        exit_code: The command's exit status, 0; `None` if there was no command.
        output: The last lines of the command's output, without secrets.
        applied: The names of the SQL files applied.
        lock_losses: How often the lock was lost meanwhile, so that another migration may have run beside this one.
    """

    attempts: int
    waited: float
    exit_code: int | None = None
    output: tuple[str, ...] = ()
    applied: tuple[str, ...] = ()
    lock_losses: int = 0


async def run_migration(
    migration: Migration,
    *,
    dsn: str | None = None,
    backoff: BackoffPolicy = MIGRATION_BACKOFF,
    deadline: float | None = DEADLINE,
    timeout: float = CONNECT_TIMEOUT,
    lock: str | None = LOCK,
    stop_within: float = 10.0,
    on_line: LineSink = print_line,
    observers: Iterable[Observer] = (),
) -> MigrationResult:
    """Wait for the database, then run a migration: one at a time, and once.

    Only a migration that certainly could not connect is run again, under the same policy; any other failure is final.
    Cancelled, it interrupts the command as Ctrl-C does and waits for its end.

    Args:
        migration: A command, as a sequence or as one text that is split as a shell would (no shell is run). Its
            environment is this process's, with `DATABASE_URL` as `dsn` says if that is given. Or a `Path`: a directory whose
            `*.sql` files are applied, each once and in a transaction. Or a function without arguments; one that is not a
            coroutine function is called in a thread, where a cancellation cannot end it.
        dsn: Where the database is; by default what `DATABASE_URL` says, else the PG* variables.
        backoff: When to try again, while waiting and between attempts. Default: 3, 6, 12, 24 s and up to 1 s each; 5 attempts.
        deadline: Seconds in all for waiting (for the database and for the lock) and beginning attempts; it never cuts a
            running migration. Default 240, `None` is no limit.
        timeout: Seconds for one attempt to connect while waiting. Default 10.
        lock: Name of the advisory lock under which it runs; `None` for none. Locks of different databases are different.
        stop_within: Seconds for a cancelled command to end by itself, before it is terminated and 3 s later killed.
        on_line: Is given each line of output, without secrets. Default: standard output. Should it raise, that is logged,
            and it is told no more.
        observers: Are told the pool's events while waiting, and the migration's.

    Returns:
        How it ended; only if it ended well.

    Raises:
        MigrationFailedError: The command or an SQL file failed.
        MigrationLockedError: Another migration held the lock until the deadline.
        ConfigurationError: An argument is wrong, or there is no such command or directory.
        Exception: The driver's own error, if the database never came; what a function raised.
    """
    if not math.isfinite(stop_within) or stop_within < 0:
        raise ConfigurationError(f"stop_within must be a number of seconds, at least 0, not {stop_within!r}")
    if lock is not None and not lock:
        raise ConfigurationError("lock must be a name; None is for no lock")
    sealed = sealed_dsn(dsn)
    explicit = None if dsn is None else Secret(dsn)
    del dsn
    task = _task(migration, PoolConfig.from_arguments(sealed), explicit, guarded(on_line), stop_within)
    told = tuple(observers)
    pool = ResilientPool(
        sealed, max_size=_CONNECTIONS, reconnect=backoff, deadline=deadline, timeout=timeout, observers=told
    )
    async with pool:
        return await _Run(task, pool, backoff, deadline, Dispatcher(told)).run(lock)


def sealed_dsn(dsn: str | None) -> SealedDsn:
    """Return the DSN to use, sealed: the one given, else `DATABASE_URL`; without a driver's name as SQLAlchemy writes it."""
    chosen = dsn if dsn is not None else os.environ.get("DATABASE_URL")
    return seal(_DRIVER_IN_SCHEME.sub(r"\1", chosen) if isinstance(chosen, str) else chosen, {})[0]


def count(attempts: int) -> str:
    """Say how many attempts."""
    return f"{attempts} attempt" if attempts == 1 else f"{attempts} attempts"


class _CouldNotConnect(Exception):  # noqa: N818 - it never leaves this module
    """An attempt that certainly changed nothing.

    Attributes:
        reason: What it said, without secrets.
        final: What to raise if it is not run again.
    """

    def __init__(self, reason: str, final: Exception) -> None:
        self.reason = reason
        self.final = final
        super().__init__(reason)


class _Task(Protocol):
    """What is run.

    Attributes:
        name: What it is called when it is told of.
    """

    name: str

    async def attempt(self, pool: ResilientPool, done: _Progress) -> MigrationResult:
        """Run it.

        Raises:
            _CouldNotConnect: It may be run again.
            Exception: It failed.
        """
        ...


@dataclass(slots=True, kw_only=True)
class _Progress:
    """How far a run has come."""

    attempts: int = 0
    running: float = 0.0
    waited: float = 0.0


def _task(migration: Migration, config: PoolConfig, dsn: Secret | None, on_line: LineSink, stop_within: float) -> _Task:
    if isinstance(migration, Path):
        return _Directory(migration, on_line)
    if callable(migration):
        return _Function(migration, config)
    command = shlex.split(migration) if isinstance(migration, str) else [*migration]
    return _Command(command, config, dsn, on_line, stop_within)


class _Command:
    """A command, as run_migration's task."""

    def __init__(
        self, command: list[str], config: PoolConfig, dsn: Secret | None, on_line: LineSink, stop_within: float
    ) -> None:
        if not command or shutil.which(command[0]) is None:
            raise ConfigurationError(f"there is no command {command[0]!r}" if command else "the command is empty")
        self._command = command
        self._dsn = dsn
        self._secrets = (*config.secrets(), *secrets_around(command if dsn is None else [*command, dsn.reveal()]))
        self._on_line = on_line
        self._stop_within = stop_within
        self.name = scrub(shlex.join(command), self._secrets)

    async def attempt(self, _pool: ResilientPool, done: _Progress) -> MigrationResult:
        lines = Lines(self._secrets, self._on_line)
        environment = dict(os.environ)
        if self._dsn is not None:
            environment["DATABASE_URL"] = self._dsn.reveal()
        code = await run_command(self._command, lines, environment=environment, stop_within=self._stop_within)
        told = tuple(lines.told)
        if not code:
            return MigrationResult(attempts=done.attempts, waited=done.waited, exit_code=code, output=told)
        failed = MigrationFailedError(
            f"{self.name} failed with exit status {code}{_signal_in(code)}",
            exit_code=code,
            output=told,
            attempts=done.attempts,
            waited=done.waited,
        )
        symptom = could_not_connect(tuple(lines.heard))
        if symptom is None:
            raise failed
        raise _CouldNotConnect(scrub(symptom, self._secrets), failed)


def _signal_in(code: int) -> str:
    try:
        return f" (ended by {signal.Signals(code - 128).name})"
    except ValueError:
        return ""


class _Directory:
    """A directory of SQL files, as run_migration's task."""

    def __init__(self, directory: Path, on_line: LineSink) -> None:
        self.name = str(directory)
        self._files = SqlDirectory(directory, on_line)

    async def attempt(self, pool: ResilientPool, done: _Progress) -> MigrationResult:
        try:
            applied = await self._files.apply(pool)
        except MigrationFailedError as error:
            error.attempts, error.waited = done.attempts, done.waited
            raise
        return MigrationResult(attempts=done.attempts, waited=done.waited, applied=applied)


class _Function:
    """A function, as run_migration's task."""

    def __init__(self, function: Callable[[], object], config: PoolConfig) -> None:
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self._function = function
        self._config = config

    async def attempt(self, _pool: ResilientPool, done: _Progress) -> MigrationResult:
        try:
            await self._call()
        except Exception as error:
            reason = failed_to_connect(error, self._config.classifier)
            if reason is None:
                raise
            raise _CouldNotConnect(scrub(reason, self._config.secrets()), error) from error
        return MigrationResult(attempts=done.attempts, waited=done.waited)

    async def _call(self) -> None:
        if inspect.iscoroutinefunction(getattr(self._function, "func", self._function)):
            outcome = self._function()
        else:
            outcome = await asyncio.to_thread(self._function)
        if inspect.isawaitable(outcome):
            await outcome


class _Run:
    """One call of run_migration."""

    def __init__(
        self, task: _Task, pool: ResilientPool, policy: BackoffPolicy, deadline: float | None, dispatcher: Dispatcher
    ) -> None:
        self._task = task
        self._pool = pool
        self._clock = SystemClock()
        self._dispatcher = dispatcher
        self._started = self._clock.monotonic()
        self._ends = None if deadline is None else self._started + deadline
        self._state = RetryState(reconnect=policy, started=self._started)
        self._done = _Progress()

    async def run(self, lock: str | None) -> MigrationResult:
        await self._wake()
        if lock is None:
            return await self._run(lambda: 0)
        guard = MigrationLock(self._pool, lock, self._clock, self._dispatcher)
        async with guard.held(self._left()):
            return await self._run(lambda: guard.losses)

    async def _run(self, losses: Callable[[], int]) -> MigrationResult:
        while True:
            try:
                result = await self._attempt()
            except _CouldNotConnect as failure:
                delay = self._delay(failure)
            else:
                return replace(result, lock_losses=losses())
            await self._clock.sleep(delay)
            await self._wake()

    async def _wake(self) -> None:
        await self._pool.fetchval("SELECT 1", deadline=self._left())

    async def _attempt(self) -> MigrationResult:
        began = self._clock.monotonic()
        elapsed = began - self._started
        self._done.attempts += 1
        self._done.waited = elapsed - self._done.running
        self._dispatcher.tell(MigrationStarted(migration=self._task.name, attempt=self._done.attempts, elapsed=elapsed))
        try:
            return await self._task.attempt(self._pool, self._done)
        finally:
            self._done.running += self._clock.monotonic() - began

    def _delay(self, failure: _CouldNotConnect) -> float:
        now = self._clock.monotonic()
        verdict = Verdict(fault=Fault.UNREACHABLE, outcome=Outcome.NOT_EXECUTED)
        decision = decide(
            verdict, self._state, phase=Phase.CONNECT, repeatable=True, now=now, deadline=self._ends, budget=None
        )
        if not isinstance(decision, Retry):
            failure.final.add_note(f"resilient_pool: it could not connect in {count(self._done.attempts)}")
            raise failure.final
        self._dispatcher.tell(
            MigrationRepeated(
                reason=failure.reason,
                attempt=self._done.attempts,
                delay=decision.delay,
                elapsed=now - self._started,
            )
        )
        return decision.delay

    def _left(self) -> float | None:
        return None if self._ends is None else max(0.001, self._ends - self._clock.monotonic())
