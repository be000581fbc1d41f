"""The command line: `resilient-pool migrate | wait | doctor`. Results go to standard output, the rest to standard error."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from resilient_pool._version import __version__
from resilient_pool.cli.parser import Parser, without_arguments
from resilient_pool.clock import SystemClock
from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.secrets import Secret, scrub
from resilient_pool.errors import ConfigurationError, MigrationFailedError, MigrationLockedError, ResilientPoolError
from resilient_pool.events import (
    Event,
    MigrationLockLost,
    MigrationLockWaited,
    MigrationRepeated,
    MigrationStarted,
    RetryScheduled,
)
from resilient_pool.migrations.command import print_line, secrets_around
from resilient_pool.migrations.run import (
    CONNECT_TIMEOUT,
    DEADLINE,
    LOCK,
    MIGRATION_BACKOFF,
    count,
    run_migration,
    sealed_dsn,
)
from resilient_pool.pool import ResilientPool
from resilient_pool.retry.backoff import RECONNECT_BACKOFF

if TYPE_CHECKING:
    from resilient_pool.cli.doctor import Finding

DONE, FAILED, USAGE, UNAVAILABLE = 0, 1, 2, 3
"""The exit statuses; 128 and the signal's number after a signal."""

WAIT_BACKOFF = replace(RECONNECT_BACKOFF, base=0.5, max_value=5.0, max_elapsed=None)
"""For `wait`: 0.5 s, doubling, at most 5 s, jittered as the pool's own reconnecting is, until its time is over."""

WAIT_SECONDS = 100.0

# Classes of SQLSTATE: the connection, a login refused, no such database, no room, an operator's intervention.
_NO_CONNECTION = ("08", "28", "3D", "53", "57")

_EPILOG = """\
the database:
  what --dsn names, else DATABASE_URL, else PGHOST, PGPORT, PGUSER, PGDATABASE,
  PGPASSWORD and PostgreSQL's other environment variables

exit status:
  0  done
  1  the migration failed, or the doctor found a problem
  2  the command line or the configuration is wrong
  3  the database was never available, or refused the login

examples:
  resilient-pool wait --timeout 60 && exec serve
  resilient-pool migrate migrations/
  resilient-pool migrate -- alembic upgrade head
  resilient-pool doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The command line's arguments. Default: those of this process.

    Returns:
        0 done, 1 the migration failed, 2 bad usage, 3 the database was never available; 128 and the signal's number after a signal.
    """
    _configure_streams()
    logger = logging.getLogger("resilient_pool")
    logger.addFilter(_is_not_printed_anyway)
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        _log(f"ended by {signal.SIGINT.name}")
        return 128 + signal.SIGINT
    finally:
        logger.removeFilter(_is_not_printed_anyway)
        _redirect_broken_streams()


def _is_not_printed_anyway(record: logging.LogRecord) -> bool:
    """Keep back the pool's own lines about what the progress and the findings say already: an outage, a pooler."""
    return record.module not in ("circuit_breaker", "connect")


def _main(given: list[str]) -> int:
    before, separator, command = _split_command(given)
    parser = _parser(given)
    options, extras = parser.parse_known_args(before)
    if options.action is None:
        parser.error("it takes a command: migrate, wait or doctor; --help says more")
    stray = options.action == "migrate" and options.directory
    options.parser.refuse_unknown(
        extras, "a command stands behind --, as in migrate -- alembic upgrade head; " if stray else ""
    )
    if options.action == "migrate":
        _resolve_migration(options, command if separator else None)
    elif separator:
        options.parser.error("only migrate takes a command behind --")
    _warn_of_password(options.dsn)
    return _run_safely(options)


def _split_command(given: list[str]) -> tuple[list[str], bool, list[str]]:
    """Part the options from the command behind the first `--`."""
    if "--" not in given:
        return given, False, []
    position = given.index("--")
    return given[:position], True, given[position + 1 :]


def _parser(given: Sequence[str]) -> Parser:
    make = functools.partial(Parser, given=given, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = make(
        prog="resilient-pool", description="Waits for a PostgreSQL database, migrates it, checks it.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"resilient-pool {__version__}")
    kind = cast("type[Parser]", make)  # it makes one, which is all that is asked of it
    actions = parser.add_subparsers(dest="action", metavar="COMMAND", title="commands", parser_class=kind)
    common = make(add_help=False)
    common.add_argument("--dsn", help="where the database is; a password in it can be seen in the process list")
    common.add_argument("--json", action="store_true", help="write the result to standard output as JSON")
    migrate = actions.add_parser(
        "migrate",
        parents=[common],
        epilog=_EPILOG,
        usage="resilient-pool migrate [options] (DIRECTORY | -- COMMAND...)",
        help="wait for the database, then run a migration",
        description="Waits for the database, then runs a migration: one at a time, and again only if it could not connect.",
    )
    migrate.add_argument("directory", nargs="*", help="a directory of *.sql files")
    _add_migrate_options(migrate)
    wait = actions.add_parser(
        "wait",
        parents=[common],
        epilog=_EPILOG,
        help="wait until the database answers",
        description="Waits until the database answers a query, also one that is asleep or starting.",
    )
    _add_seconds(wait, "--timeout", WAIT_SECONDS, "how long to wait")
    doctor = actions.add_parser(
        "doctor",
        parents=[common],
        epilog=_EPILOG,
        help="check the database, and give advice",
        description="Checks the database and what is known of the application's pool, and names what to change. Changes nothing.",
    )
    _add_seconds(doctor, "--timeout", WAIT_SECONDS, "how long to wait for the database")
    doctor.add_argument("--min-size", type=int, metavar="N", help="the application's min_size")
    doctor.add_argument(
        "--max-size",
        type=int,
        metavar="N",
        help="the application's max_size (default: the pool's own, or --min-size if that is more)",
    )
    doctor.add_argument("--statement-cache-size", type=int, metavar="N", help="the application's statement_cache_size")
    doctor.add_argument(
        "--max-inactive-connection-lifetime", type=float, metavar="SECONDS", help="the application's own"
    )
    for action in (migrate, wait, doctor):
        action.set_defaults(parser=action)
    return parser


def _add_migrate_options(parser: argparse.ArgumentParser) -> None:
    _add_seconds(parser, "--deadline", DEADLINE, "for all waiting together; it never cuts a running migration")
    _add_seconds(parser, "--connect-timeout", CONNECT_TIMEOUT, "for one attempt to connect while waiting")
    parser.add_argument(
        "--attempts",
        type=_attempts,
        default=MIGRATION_BACKOFF.max_attempts,
        metavar="N",
        help="how often to try (default: %(default)s)",
    )
    _add_seconds(parser, "--stop-within", 10.0, "an interrupted command has to end by itself")
    lock = parser.add_mutually_exclusive_group()
    lock.add_argument("--lock", default=LOCK, help="the advisory lock's name (default: %(default)s)")
    lock.add_argument("--no-lock", dest="lock", action="store_const", const=None, help="take no lock")


def _add_seconds(parser: argparse.ArgumentParser, option: str, default: float, meaning: str) -> None:
    parser.add_argument(
        option, type=_seconds, default=default, metavar="SECONDS", help=f"{meaning} (default: %(default)g)"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds) or seconds <= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, more than 0, not {text!r}")
    return seconds


def _attempts(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of attempts, at least 1, not {text!r}")
    return int(text)


def _resolve_migration(options: argparse.Namespace, command: list[str] | None) -> None:
    """Put what to run into `options.migration`."""
    refuse, directory = options.parser.error, options.directory
    if not directory and command is None:
        refuse("migrate takes either a directory of *.sql files or a command behind --")
    if directory and command is not None:
        refuse(f"migrate takes either a directory or a command, not both: what is {directory[0]!r} in front of the --?")
    if command is not None and not command:
        refuse("no command behind --")
    if len(directory) > 1 or (directory and " " in directory[0] and not Path(directory[0]).exists()):
        refuse(f"a command stands behind --: migrate -- {' '.join(directory)}")
    if directory and re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", directory[0]):
        refuse("migrate takes a directory of *.sql files, not a URL; the database is named by --dsn or DATABASE_URL")
    if directory == [""]:
        refuse("the directory's name is empty; the present one is '.'")
    options.migration = command or Path(directory[0])


def _warn_of_password(dsn: str | None) -> None:
    if dsn is None:
        return
    with contextlib.suppress(ConfigurationError):  # reported later
        if scrub(dsn) != dsn:
            _log(
                "warning: every user of this machine can read the password in --dsn in the process list; "
                "put it into DATABASE_URL, PGPASSWORD or a password file"
            )


def _run_safely(options: argparse.Namespace) -> int:
    actions: Mapping[str, Callable[[argparse.Namespace], Coroutine[Any, Any, int]]]
    actions = {"migrate": _migrate, "wait": _wait, "doctor": _doctor}
    caught: list[int] = []
    try:
        return asyncio.run(_until_signalled(actions[options.action](options), caught))
    except (KeyboardInterrupt, asyncio.CancelledError):
        number = caught[0] if caught else signal.SIGINT
        _log(f"ended by {signal.Signals(number).name}")
        return 128 + number
    except Exception as error:  # noqa: BLE001 - a person wants a sentence, not a traceback
        return _report(options, error)


async def _until_signalled(action: Coroutine[Any, Any, int], caught: list[int]) -> int:
    """Run an action; the first signal to end cancels it, and further ones are ignored while it ends."""
    task = asyncio.current_task()

    def cancel(number: int) -> None:
        caught.append(number)
        if task is not None and len(caught) == 1:
            task.cancel()

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # The parent process may want one ignored, as nohup does. Some event loops know no signals.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            with contextlib.suppress(NotImplementedError):
                asyncio.get_running_loop().add_signal_handler(number, cancel, number)
    return await action


def _report(options: argparse.Namespace, error: Exception) -> int:
    """Report an error, and return its exit status."""
    status, word = _meaning(error)
    notes = [*getattr(error, "__notes__", ()), *(_whereabouts(options) if status == UNAVAILABLE else ())]
    text = scrub("\n  ".join((_describe(error), *notes)), _secrets(options))
    if status == USAGE:
        text = without_arguments(text, [word for word in (options.dsn, *getattr(options, "directory", ())) if word])
    _log(f"resilient-pool: {word}: {text}")
    if options.json:
        facts: dict[str, object] = {"status": word, "exit_status": status, "error": text}
        if isinstance(error, MigrationFailedError):
            facts |= {"command_exit_status": error.exit_code, "attempts": error.attempts, "output": error.output}
            facts["waited"] = round(error.waited, 3)
        _print_json(facts)
    return status


def _meaning(error: Exception) -> tuple[int, str]:
    if isinstance(error, MigrationFailedError | MigrationLockedError):
        return FAILED, "the migration failed" if isinstance(error, MigrationFailedError) else "nothing was run"
    if isinstance(error, ConfigurationError | asyncpg.ClientConfigurationError):
        return USAGE, "wrong usage"
    about_the_server = isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "08")[:2] in _NO_CONNECTION
    if about_the_server or isinstance(error, OSError | asyncpg.InterfaceError | ResilientPoolError):
        return UNAVAILABLE, "no connection to the database"
    return FAILED, "it failed"


def _whereabouts(options: argparse.Namespace) -> Iterator[str]:
    """Yield where the database was looked for, and how to name another one if none was named."""
    config = _config_of(options)
    if config is None:
        return
    places = [f"{host}:{port}" for host, port in zip(config.host or (), config.port or (), strict=False)]
    login = [f"{what} {name}" for what, name in (("database", config.database), ("user", config.user)) if name]
    yield "looked for at " + ", ".join((*(places or ["this machine"]), *login))
    if not places and options.dsn is None:
        yield "no database was named: pass --dsn, or set DATABASE_URL or PGHOST"


def _describe(error: Exception) -> str:
    if isinstance(error, asyncpg.ClientConfigurationError):
        return f"{error}; what the DSN does not say is taken from PGSSLMODE and PostgreSQL's other variables"
    # The errors of the network and of the driver do not all say what they are.
    own = isinstance(error, ResilientPoolError | asyncpg.PostgresError)
    return str(error) if own and str(error) else f"{type(error).__name__}: {error}".rstrip(": ")


def _secrets(options: argparse.Namespace) -> tuple[Secret, ...]:
    given = [str(word) for word in (options.dsn, *_command_of(options)) if word]
    config = _config_of(options)
    return (*(() if config is None else config.secrets()), *secrets_around(given))


def _config_of(options: argparse.Namespace) -> PoolConfig | None:
    try:
        return PoolConfig.from_arguments(sealed_dsn(options.dsn))
    except ConfigurationError:
        return None


def _command_of(options: argparse.Namespace) -> Sequence[str]:
    migration = getattr(options, "migration", None)
    return migration if isinstance(migration, list) else ()


# The actions


async def _migrate(options: argparse.Namespace) -> int:
    policy = replace(MIGRATION_BACKOFF, max_attempts=options.attempts)
    result = await run_migration(
        options.migration,
        dsn=options.dsn,
        backoff=policy,
        deadline=options.deadline,
        timeout=options.connect_timeout,
        lock=options.lock,
        stop_within=options.stop_within,
        on_line=_log if options.json else print_line,
        observers=[_ProgressPrinter(options.deadline)],
    )
    _log(f"done, after {count(result.attempts)} and {result.waited:.1f} s of waiting")
    if options.json:
        _print_json({"status": "done", "exit_status": DONE, **asdict(result), "waited": round(result.waited, 3)})
    return DONE


async def _wait(options: argparse.Namespace) -> int:
    clock = SystemClock()
    started = clock.monotonic()
    async with _waiting_pool(options) as pool:
        await pool.fetchval("SELECT 1")
        async with pool.acquire() as connection:
            version = getattr(connection.get_settings(), "server_version", None)
    waited = clock.monotonic() - started
    _log(f"the database answers, after {waited:.1f} s")
    if options.json:
        _print_json({"status": "up", "exit_status": DONE, "waited": round(waited, 3), "server_version": version})
    return DONE


async def _doctor(options: argparse.Namespace) -> int:
    from resilient_pool.cli.doctor import examine  # noqa: PLC0415 - no other command needs it

    names = ("min_size", "max_size", "statement_cache_size", "max_inactive_connection_lifetime")
    arguments = {name: value for name in names if (value := getattr(options, name)) is not None}
    if "min_size" in arguments and "max_size" not in arguments:
        arguments["max_size"] = max(arguments["min_size"], PoolConfig.__dataclass_fields__["max_size"].default)
    findings = await examine(
        sealed_dsn(options.dsn),
        deadline=options.timeout,
        backoff=WAIT_BACKOFF,
        observers=[_ProgressPrinter(options.timeout)],
        arguments=arguments,
    )
    status = FAILED if any(finding.level == "problem" for finding in findings) else DONE
    if options.json:
        _print_json({"exit_status": status, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_result(*(line for finding in findings for line in _lines(finding)))
    return status


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{finding.level:8}{finding.check}: {finding.text}"
    for detail in finding.details:
        yield f"          {detail}"
    if finding.change:
        yield f"        change: {finding.change} (see {finding.page})"


def _waiting_pool(options: argparse.Namespace) -> ResilientPool:
    return ResilientPool(
        sealed_dsn(options.dsn),
        max_size=1,
        reconnect=WAIT_BACKOFF,
        deadline=options.timeout,
        timeout=min(CONNECT_TIMEOUT, max(options.timeout, 0.001)),
        observers=[_ProgressPrinter(options.timeout)],
    )


class _ProgressPrinter:
    """Writes to standard error what is being waited for."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def __call__(self, event: Event, /) -> None:
        """Write a line for `event`, if it is about waiting."""
        if isinstance(event, RetryScheduled):
            state = f" ({event.sqlstate})" if event.sqlstate else ""
            left = event.elapsed + event.delay < self._limit
            then = f"next try in {event.delay:.1f} s" if left else f"no time for another within {self._limit:g} s"
            _log(
                f"the database is {event.fault.value}{state}: attempt {event.attempt}, waited {event.elapsed:.1f} s, {then}"
            )
        elif isinstance(event, MigrationStarted):
            _log(f"running {event.migration} (attempt {event.attempt}, after {event.elapsed:.1f} s)")
        elif isinstance(event, MigrationRepeated):
            _log(f"it could not connect ({event.reason}); next try in {event.delay:.1f} s")
        elif isinstance(event, MigrationLockWaited):
            _log(f"waiting for another migration to end: {event.holder}")
        elif isinstance(event, MigrationLockLost):
            _log("warning: the connection that holds the lock was lost; another migration may run beside this one")


# Output: a success stays one though its report is not read


def _log(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _print_json(facts: Mapping[str, object]) -> None:
    _print_result(json.dumps(facts))


def _print_result(*lines: str) -> None:
    """Write a result to standard output."""
    try:
        for line in lines:
            print_line(line)
    except OSError as error:
        _log(f"warning: the result could not be written: {error.strerror}")


def _configure_streams() -> None:
    """Let standard output and error take every character; what their terminal does not know is written with a backslash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _redirect_broken_streams() -> None:
    """Turn away what cannot be written, or the interpreter would try again at its end, complain, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
