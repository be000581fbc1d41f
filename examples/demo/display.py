"""Draws the demo: a live table on a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from demo.faults import FAULT_STEPS, FaultStep
from demo.ledger import Audit
from demo.results import PauseResult, Score, Tally

Scores = Mapping[str, Score]
PauseResults = Mapping[str, PauseResult]
Audits = Mapping[str, Audit]

WIDTH = 100
"""Columns of output that goes to no terminal."""
REFRESH = 8
"""Drawings per second."""
ERRORS_SHOWN = 10
"""Different errors listed when the pool failed."""


class Display(Protocol):
    """Where the demo shows its progress."""

    def __enter__(self) -> Self:
        """Start the output."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the output."""
        ...

    def show_status(self, what: str) -> None:
        """Show what is being prepared."""
        ...

    def pause_started(self, description: str) -> None:
        """Show that the databases have paused."""
        ...

    def pause_finished(self) -> None:
        """Show the results of the requests to the paused databases."""
        ...

    def step_started(self, step: FaultStep) -> None:
        """Show that a step starts."""
        ...

    def step_finished(self, step: FaultStep) -> None:
        """Show the result of a step."""
        ...


class LiveDisplay:
    """A table that redraws itself in place: first the one of the result, then the one of the steps."""

    def __init__(self, console: Console, pause_results: PauseResults, scores: Scores) -> None:
        self._console = console
        self._pause_results = pause_results
        self._scores = scores
        self._now = "starting"
        self._is_pausing = True
        self._current: FaultStep | None = None
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=REFRESH, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def show_status(self, what: str) -> None:
        """Show it under the table."""
        self._now, self._current = what, None

    def pause_started(self, description: str) -> None:
        """Show it under the table."""
        self._now = description

    def pause_finished(self) -> None:
        """Let the table stand, and go on below it."""
        self._is_pausing = False
        self._console.print(pause_table(self._pause_results))

    def step_started(self, step: FaultStep) -> None:
        """Mark the step's line."""
        self._now, self._current = step.description, step

    def step_finished(self, step: FaultStep) -> None:
        """Do nothing: the table shows it already."""

    def _draw(self) -> Group:
        table = (
            pause_table(self._pause_results) if self._is_pausing else steps_table(self._scores, current=self._current)
        )
        return Group(table, Text(f"now: {self._now}", style="italic"))


class PlainDisplay:
    """One line per thing that happens."""

    def __init__(self, console: Console, pause_results: PauseResults, scores: Scores) -> None:
        self._console = console
        self._pause_results = pause_results
        self._scores = scores

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def show_status(self, what: str) -> None:
        """Print it."""
        self._console.print(f"{what} ...")

    def pause_started(self, description: str) -> None:
        """Print it."""
        self._console.print(f"{description} ...")

    def pause_finished(self) -> None:
        """Print the table."""
        self._console.print(pause_table(self._pause_results))

    def step_started(self, step: FaultStep) -> None:
        """Print the step's description."""
        self._console.print(f"{step.name}: {step.description} ...")

    def step_finished(self, step: FaultStep) -> None:
        """Print what it did to each application."""
        for pool, score in self._scores.items():
            tally = score.steps.get(step.name, Tally())
            self._console.print(
                f"  {pool}: {tally.operations} operations, {tally.failures} failed, {tally.unknown} reported unknown,"
                f" slowest {tally.slowest:.2f} s"
            )


def display(console: Console, pause_results: PauseResults, scores: Scores) -> LiveDisplay | PlainDisplay:
    """Choose the display that fits where the output goes."""
    kind = LiveDisplay if console.is_terminal else PlainDisplay
    return kind(console, pause_results, scores)


def console() -> Console:
    """Make the console for standard output, with a fixed width where it is no terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def pause_table(pause_results: PauseResults) -> Table:
    """Draw the results of the requests to the paused databases, one line per figure and one column per pool."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Two pools, each with a database that pauses when idle",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for pool in pause_results:
        table.add_column(pool, justify="right", no_wrap=True)
    each = pause_results.values()
    table.add_row("requests", *(str(result.asked) for result in each))
    table.add_row("  answered", *(str(result.answered) for result in each))
    table.add_row("  failed", *(_count(result.failures, "red") for result in each))
    table.add_row("slowest request", *(f"{result.slowest:.2f} s" for result in each))
    table.add_row("attempts to connect while it resumed", *(str(result.attempts) for result in each))
    table.add_section()
    table.add_row("connections open now", *(str(result.connections) for result in each))
    table.add_row("the database is now", *(result.database for result in each))
    table.add_row("paused again after the last answer", *(_paused_again(result) for result in each))
    return table


def _paused_again(result: PauseResult) -> Text:
    if result.paused_after is not None:
        return Text(f"after {result.paused_after:.1f} s", style="green")
    return Text("" if result.not_paused_in is None else f"not in {result.not_paused_in:.1f} s", style="red")


def steps_table(scores: Scores, *, current: FaultStep | None) -> Table:
    """Draw what happened so far, one line per step and pool."""
    table = Table(box=box.SIMPLE_HEAD, title="One application, two pools, the same faults", title_justify="left")
    table.add_column("fault", no_wrap=True)
    table.add_column("pool", no_wrap=True)
    for name in ("operations", "failed", "unknown", "slowest"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in FAULT_STEPS:
        style = "bold" if step is current else ""
        for line, (pool, score) in enumerate(scores.items()):
            table.add_row("" if line else step.name, pool, *_step_cells(score.steps.get(step.name)), style=style)
    return table


def _step_cells(tally: Tally | None) -> list[Text]:
    if tally is None:
        return []
    return [
        Text(str(tally.operations)),
        _count(tally.failures, "red"),
        _count(tally.unknown, "yellow"),
        Text(f"{tally.slowest:.2f} s"),
    ]


def _count(number: int, alarm: str) -> Text:
    return Text(str(number), style=alarm if number else "green")


def summary_table(scores: Scores, audits: Audits) -> Table:
    """Draw the figures of the whole run, one line per figure and one column per pool."""
    table = Table(box=box.SIMPLE_HEAD, title="Summary", title_justify="left")
    table.add_column("")
    for pool in scores:
        table.add_column(pool, justify="right")
    totals = [score.total() for score in scores.values()]
    found = [audits[pool] for pool in scores]
    table.add_row("operations", *(str(total.operations) for total in totals))
    table.add_row("failures the application saw", *(_count(total.failures, "red") for total in totals))
    table.add_row("  of these never answered", *(str(total.unanswered) for total in totals))
    table.add_row("reported unknown", *(_count(total.unknown, "yellow") for total in totals))
    table.add_row("  of these in the database", *(str(len(each.unknown_present)) for each in found))
    table.add_row("slowest answer", *(f"{total.slowest:.2f} s" for total in totals))
    table.add_section()
    table.add_row("lost: reported done, absent", *(_count(len(each.lost), "red") for each in found))
    table.add_row("duplicated: present twice", *(_count(len(each.duplicated), "red") for each in found))
    table.add_row("reported failed, but present", *(_count(len(each.ghosts), "red") for each in found))
    return table


def verdict(pool: str, violations: Sequence[str], errors: Counter[str]) -> Text:
    """Say in words how the pool did; with violations, also the errors its application saw, most frequent first."""
    if not violations:
        kept = "nothing failed that waiting cures, nothing twice, nothing lost, pauses undisturbed"
        return Text(f"{pool}: {kept}.", style="green")
    seen = [f"  {times} x {error}" for error, times in errors.most_common(ERRORS_SHOWN)]
    return Text("\n".join([f"{pool} did not keep its promises:", *(f"  {line}" for line in violations), *seen]), "red")
