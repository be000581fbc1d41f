"""Migrations that wait for the database: wake it, take the lock, run once, and again only if it could not be reached."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import re
import shlex
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import backoff as waiting

from resilient_pool._validation import names_nearest, require_number
from resilient_pool.clock import SystemClock
from resilient_pool.config.pool_config import PoolConfig, SealedDsn, seal_leniently
from resilient_pool.config.secrets import Secret, scrub
from resilient_pool.errors import ConfigurationError, MigrationFailedError
from resilient_pool.events import MigrationRepeated, MigrationStarted, Observer
from resilient_pool.migrations.command import (
    LineSink,
    OutputLines,
    may_hold_a_password,
    never_failing,
    print_line,
    request_to_run,
    run_command,
    secrets_around,
    wait_until_done,
)
from resilient_pool.migrations.connect_failures import failed_to_connect
from resilient_pool.migrations.server import MigrationLock, ServerActivity, read_activity, reason_for_doubt
from resilient_pool.migrations.sql_directory import SqlFile, apply_files, read_directory
from resilient_pool.pool import ResilientPool
from resilient_pool.pooling.context import Dispatcher
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.decision import Retry, RetryState, decide
from resilient_pool.retry.verdict import Classifier, Fault, Outcome, Phase, Verdict

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
# A Path has one of the two slashes left.
_URL = re.compile(r"\A[A-Za-z][A-Za-z0-9+.\-]+:/")
_LOGGER = logging.getLogger("resilient_pool")

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


@names_nearest
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

    Only a migration that certainly changed nothing is run again, under the same policy; any other failure is final.
    Certain means that the last line was its tool's message for "could not connect", that no line before it speaks of a
    connection, and that the server, asked before and after, neither counted another session nor saw anything written
    meanwhile. Where that is not certain the error has a note that says why it was not run again.

    Cancelled, it interrupts a command as Ctrl-C does and waits for its end. A function in a thread cannot be ended: it is
    waited for, however long it takes, and the lock is held until then; a warning is logged.

    Args:
        migration: A command, as a sequence or as one text that is split as a shell would (no shell is run). Its
            environment is this process's, with `DATABASE_URL` as `dsn` says if that is given. Or a `Path`: a directory whose
            `*.sql` files are applied, each once and in a transaction. Or a function without arguments; one that is not a
            coroutine function is called in a thread of its own.
        dsn: Where the database is; by default what `DATABASE_URL` says, else the PG* variables.
        backoff: When to try again, while waiting and between attempts. Default: 3, 6, 12, 24 s and up to 1 s each; 5 attempts.
        deadline: Seconds in all for waiting (for the database and for the lock) and beginning attempts; it never cuts a
            running migration. Default 240, `None` is no limit.
        timeout: Seconds for one attempt to connect while waiting. Default 10.
        lock: Name of the advisory lock under which it runs; `None` for none. Locks of different databases are different.
        stop_within: Seconds for a cancelled command to end by itself, before it is terminated and 3 s later killed.
        on_line: Is given each line of output, without secrets. Default: standard output. Should it raise, that is logged,
            and it gets no more lines.
        observers: Get the pool's events while waiting, and the migration's.

    Returns:
        How it ended; only if it ended well.

    Raises:
        MigrationFailedError: The command or an SQL file failed.
        MigrationLockedError: Another migration held the lock until the deadline.
        ConfigurationError: An argument is wrong, or there is no such command or directory.
        TypeError: There is no such argument.
        Exception: The driver's own error, if the database was never available; what a function raised.
    """
    # Nothing is raised here while the DSN, or the migration, which may hold one, is in a local variable.
    sealed = sealed_dsn(dsn)
    explicit = Secret(dsn) if isinstance(dsn, str) else None
    del dsn
    task = _make_task(migration, explicit, never_failing(on_line), stop_within)
    del migration
    if isinstance(task, str):
        raise ConfigurationError(task)
    require_number("stop_within", stop_within, unit="a number of seconds", least=0)
    if lock is not None and not lock:
        raise ConfigurationError("lock must be a name; None is for no lock")
    await task.prepare(PoolConfig.from_arguments(sealed))
    watching = tuple(observers)
    pool = ResilientPool(
        sealed,
        max_size=_CONNECTIONS,
        reconnect=backoff,
        deadline=deadline,
        timeout=timeout,
        observers=watching,
        session_reset="background",  # whatever a file has set: its text goes past what the pool knows of the session
    )
    async with pool:
        return await _Run(task, pool, backoff, deadline, Dispatcher(watching)).run(lock)


def sealed_dsn(dsn: str | None) -> SealedDsn:
    """Return the DSN to use, sealed: the one given, else `DATABASE_URL`; with the words that other programs add."""
    return seal_leniently(dsn if dsn is not None else os.environ.get("DATABASE_URL"))


def count(attempts: int) -> str:
    """Say how many attempts."""
    return f"{attempts} attempt" if attempts == 1 else f"{attempts} attempts"


class _ConnectFailed(Exception):  # noqa: N818 - it never leaves this module
    """An attempt whose output says that it could not connect, and not that work had started.

    Attributes:
        reason: The message, without secrets.
        final: What to raise if it is not run again.
    """

    def __init__(self, reason: str, final: Exception) -> None:
        self.reason = reason
        self.final = final
        super().__init__(reason)


class _Task(Protocol):
    """What is run; only where it `may_be_repeated`, `attempt` raises `_ConnectFailed`."""

    name: str
    may_be_repeated: bool

    async def prepare(self, config: PoolConfig) -> None:
        """Get ready, or raise `ConfigurationError`, before the database is woken."""
        ...

    async def attempt(self, pool: ResilientPool) -> _Facts:
        """Run it, and return what there is to say of its end.

        Raises:
            _ConnectFailed: It may be run again, if the server confirms that it did nothing.
            Exception: It failed.
        """
        ...


class _Facts(TypedDict, total=False):
    """What a `MigrationResult` says of one kind of task."""

    exit_code: int
    output: tuple[str, ...]
    applied: tuple[str, ...]


def _make_task(migration: object, dsn: Secret | None, on_line: LineSink, stop_within: float) -> _Task | str:
    """Return the task, or what is wrong with it, for the caller to raise: variables of this frame may hold a secret."""
    if isinstance(migration, Path):
        if _URL.match(str(migration)):
            return "the migration is a URL, not a directory of SQL files; the database is what dsn= names"
        return _Directory(migration, on_line)
    if callable(migration):
        return _Function(migration)
    if not isinstance(migration, str | Sequence):
        return f"a migration is a command, a Path to a directory or a function, not {type(migration).__name__}"
    try:
        command = [os.fsdecode(word) for word in (shlex.split(migration) if isinstance(migration, str) else migration)]
    except (TypeError, ValueError) as error:
        # Only what the error is about: its text may quote a word.
        return (
            "a quotation in the command has no end" if isinstance(error, ValueError) else "a command's words are texts"
        )
    problem = _command_problem(command)
    return _Command(command, dsn, on_line, stop_within) if problem is None else problem


def _command_problem(command: list[str]) -> str | None:
    if not command:
        return "the command is empty"
    if any("\0" in word for word in command):
        return "a word of the command holds a character of code 0"
    if _URL.match(command[0]):
        return "the command is a URL, not a program; the database is what dsn= names"
    if shutil.which(command[0]) is not None:
        return None
    if may_hold_a_password(command[0]):
        return "there is no such command; it is not shown, since it may hold a password"
    return f"there is no command {command[0]!r}"


class _Command:
    """A command, as run_migration's task."""

    may_be_repeated = True

    def __init__(self, command: list[str], dsn: Secret | None, on_line: LineSink, stop_within: float) -> None:
        self._request = request_to_run(command, dsn)
        self._secrets = tuple(secrets_around(command if dsn is None else [*command, dsn.reveal()]))
        self._on_line = on_line
        self._stop_within = stop_within
        self.name = scrub(shlex.join(command), self._secrets)

    async def prepare(self, config: PoolConfig) -> None:
        self._secrets = (*config.secrets(), *self._secrets)
        self.name = scrub(self.name, self._secrets)

    async def attempt(self, _pool: ResilientPool) -> _Facts:
        lines = OutputLines(self._secrets, self._on_line)
        code = await run_command(self._request, lines, stop_within=self._stop_within)
        emitted = tuple(lines.emitted)
        if not code:
            return {"exit_code": code, "output": emitted}
        failed = MigrationFailedError(
            f"{self.name} failed with exit status {code}{_signal_in(code)}", exit_code=code, output=emitted
        )
        connect_failure, work_started = lines.scanner.connect_failure, lines.scanner.work_started
        if connect_failure is not None and work_started is None:
            raise _ConnectFailed(scrub(connect_failure, self._secrets), failed)
        if connect_failure is not None and work_started is not None:
            failed.add_note(
                "resilient_pool: it could not connect, but was not run again: it had begun "
                f"({scrub(work_started, self._secrets)!r})"
            )
        raise failed


def _signal_in(code: int) -> str:
    try:
        return f" (ended by {signal.Signals(code - 128).name})"
    except ValueError:
        return ""


class _Directory:
    """A directory of SQL files, as run_migration's task."""

    may_be_repeated = False

    def __init__(self, directory: Path, on_line: LineSink) -> None:
        self.name = str(directory)
        self._directory = directory
        self._on_line = on_line
        self._files: tuple[SqlFile, ...] = ()

    async def prepare(self, _config: PoolConfig) -> None:
        # In a thread: to read millions of characters of SQL takes seconds.
        self._files = await asyncio.to_thread(read_directory, self._directory)

    async def attempt(self, pool: ResilientPool) -> _Facts:
        return {"applied": await apply_files(pool, self._files, self._on_line, SystemClock())}


class _Function:
    """A function, as run_migration's task."""

    may_be_repeated = True

    def __init__(self, function: Callable[[], object]) -> None:
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self._function = function
        self._classifier: Classifier = PostgresClassifier()
        self._secrets: tuple[Secret, ...] = ()

    async def prepare(self, config: PoolConfig) -> None:
        self._classifier = config.classifier
        self._secrets = tuple(config.secrets())

    async def attempt(self, _pool: ResilientPool) -> _Facts:
        try:
            await self._call()
        except Exception as error:
            reason = failed_to_connect(error, self._classifier)
            if reason is None:
                raise
            raise _ConnectFailed(scrub(reason, self._secrets), error) from error
        return {}

    async def _call(self) -> None:
        if inspect.iscoroutinefunction(getattr(self._function, "func", self._function)):
            outcome = self._function()
        else:
            outcome = await self._in_a_thread()
        if inspect.isawaitable(outcome):
            await outcome

    async def _in_a_thread(self) -> object:
        """Call the function in a thread; once cancelled, wait for its end all the same, since nothing can end it."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="resilient_pool.migration")
        context = contextvars.copy_context()
        running = asyncio.get_running_loop().run_in_executor(executor, context.run, self._function)
        executor.shutdown(wait=False)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError as cancelled:
            if not running.done():
                _LOGGER.warning(
                    "the migration %s was cancelled, but a function in a thread cannot be ended: it is waited for, and the "
                    "lock is held until then",
                    self.name,
                )
            await wait_until_done(running)
            if not running.cancelled():
                error = running.exception()
                ended = "well" if error is None else f"with {type(error).__name__}"
                cancelled.add_note(f"resilient_pool: {self.name} ran to its end in its thread, and ended {ended}")
            raise


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
        self._attempts = 0
        self._running = self._waited = 0.0

    async def run(self, lock: str | None) -> MigrationResult:
        await self._wait_for_database()
        if lock is None:
            return await self._run(lambda: 0)
        guard = MigrationLock(self._pool, lock, self._clock, self._dispatcher)
        async with guard.held(self._remaining()):
            return await self._run(lambda: guard.losses)

    async def _run(self, losses: Callable[[], int]) -> MigrationResult:
        while True:
            before = await read_activity(self._pool, self._remaining()) if self._task.may_be_repeated else None
            try:
                facts = await self._attempt()
            except _ConnectFailed as failure:
                delay = await self._delay_until_next(failure, before)
            else:
                return MigrationResult(attempts=self._attempts, waited=self._waited, lock_losses=losses(), **facts)
            await self._clock.sleep(delay)
            await self._wait_for_database()

    async def _wait_for_database(self) -> None:
        await self._pool.fetchval("SELECT 1", deadline=self._remaining())

    async def _attempt(self) -> _Facts:
        began = self._clock.monotonic()
        elapsed = began - self._started
        self._attempts += 1
        self._waited = elapsed - self._running
        self._dispatcher.emit(MigrationStarted(migration=self._task.name, attempt=self._attempts, elapsed=elapsed))
        try:
            return await self._task.attempt(self._pool)
        except (MigrationFailedError, _ConnectFailed) as error:
            final = error.final if isinstance(error, _ConnectFailed) else error
            if isinstance(final, MigrationFailedError):
                final.attempts, final.waited = self._attempts, self._waited
            raise
        finally:
            self._running += self._clock.monotonic() - began

    async def _delay_until_next(self, failure: _ConnectFailed, before: ServerActivity | None) -> float:
        """Return how long to wait until the next attempt; raise what is final if there is none."""
        verdict = Verdict(fault=Fault.UNREACHABLE, outcome=Outcome.NOT_EXECUTED)
        decision = decide(
            verdict,
            self._state,
            phase=Phase.CONNECT,
            repeatable=True,
            now=self._clock.monotonic(),
            deadline=self._ends,
            budget=None,
        )
        if not isinstance(decision, Retry):
            failure.final.add_note(f"resilient_pool: it could not connect in {count(self._attempts)}")
            raise failure.final
        why_not = reason_for_doubt(before, await read_activity(self._pool, self._remaining()))
        if why_not is not None:
            failure.final.add_note(
                f"resilient_pool: its last words are that it could not connect, but it was not run again: {why_not}"
            )
            raise failure.final
        self._dispatcher.emit(
            MigrationRepeated(
                reason=failure.reason,
                attempt=self._attempts,
                delay=decision.delay,
                elapsed=self._clock.monotonic() - self._started,
            )
        )
        return decision.delay

    def _remaining(self) -> float | None:
        return None if self._ends is None else max(0.001, self._ends - self._clock.monotonic())
