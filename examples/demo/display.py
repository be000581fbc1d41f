"""Draws the demo: a live table on a terminal, plain lines elsewhere, and the summary; decides nothing."""

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

from demo.faults import ACTS, Act
from demo.results import Ledger, Night, Score, Tally

Scores = Mapping[str, Score]
Nights = Mapping[str, Night]
Ledgers = Mapping[str, Ledger]

WIDTH = 100
"""Columns of output that goes to no terminal."""
REFRESH = 8
"""Drawings per second."""
ERRORS_SHOWN = 10
"""Different errors listed when the pool failed."""


class Display(Protocol):
    """Where the demo tells what is going on."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the output in order."""
        ...

    def preparing(self, what: str) -> None:
        """Tell what is being prepared."""
        ...

    def falls_asleep(self, story: str) -> None:
        """Tell that the databases fall asleep."""
        ...

    def night_is_over(self) -> None:
        """Tell what became of the requests that found them asleep."""
        ...

    def begins(self, act: Act) -> None:
        """Tell that an act begins."""
        ...

    def ends(self, act: Act) -> None:
        """Tell that an act is over."""
        ...


class LiveDisplay:
    """A table that redraws itself in place: first the one of the night, then the one of the acts."""

    def __init__(self, console: Console, nights: Nights, scores: Scores) -> None:
        self._console = console
        self._nights = nights
        self._scores = scores
        self._now = "starting"
        self._is_night = True
        self._current: Act | None = None
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=REFRESH, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def preparing(self, what: str) -> None:
        """Show it under the table."""
        self._now, self._current = what, None

    def falls_asleep(self, story: str) -> None:
        """Show it under the table."""
        self._now = story

    def night_is_over(self) -> None:
        """Let the table stand, and go on below it."""
        self._is_night = False
        self._console.print(night_table(self._nights))

    def begins(self, act: Act) -> None:
        """Mark the act's line."""
        self._now, self._current = act.story, act

    def ends(self, act: Act) -> None:
        """Do nothing: the table shows it already."""

    def _draw(self) -> Group:
        table = night_table(self._nights) if self._is_night else acts_table(self._scores, current=self._current)
        return Group(table, Text(f"now: {self._now}", style="italic"))


class PlainDisplay:
    """One line per thing that happens."""

    def __init__(self, console: Console, nights: Nights, scores: Scores) -> None:
        self._console = console
        self._nights = nights
        self._scores = scores

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def preparing(self, what: str) -> None:
        """Print it."""
        self._console.print(f"{what} ...")

    def falls_asleep(self, story: str) -> None:
        """Print it."""
        self._console.print(f"{story} ...")

    def night_is_over(self) -> None:
        """Print the table."""
        self._console.print(night_table(self._nights))

    def begins(self, act: Act) -> None:
        """Print the act's story."""
        self._console.print(f"{act.name}: {act.story} ...")

    def ends(self, act: Act) -> None:
        """Print what it did to each application."""
        for pool, score in self._scores.items():
            tally = score.acts.get(act.name, Tally())
            self._console.print(
                f"  {pool}: {tally.operations} operations, {tally.failures} failed, {tally.unknown} reported unknown,"
                f" slowest {tally.slowest:.2f} s"
            )


def display(console: Console, nights: Nights, scores: Scores) -> LiveDisplay | PlainDisplay:
    """Choose the display that fits where the output goes."""
    kind = LiveDisplay if console.is_terminal else PlainDisplay
    return kind(console, nights, scores)


def console() -> Console:
    """Make the console for standard output, wide enough where nobody tells a width."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def night_table(nights: Nights) -> Table:
    """Draw what became of the requests that found a database asleep, one line per figure and one column per pool."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Two pools, each before a database that sleeps",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for pool in nights:
        table.add_column(pool, justify="right", no_wrap=True)
    each = nights.values()
    table.add_row("requests", *(str(night.asked) for night in each))
    table.add_row("  answered", *(str(night.answered) for night in each))
    table.add_row("  failed", *(_count(night.failures, "red") for night in each))
    table.add_row("slowest request", *(f"{night.slowest:.2f} s" for night in each))
    table.add_row("attempts to connect while it woke", *(str(night.attempts) for night in each))
    table.add_section()
    table.add_row("connections open now", *(str(night.connections) for night in each))
    table.add_row("the database is now", *(night.database for night in each))
    table.add_row("asleep again after the last answer", *(_asleep_again(night) for night in each))
    return table


def _asleep_again(night: Night) -> Text:
    if night.asleep_after is not None:
        return Text(f"after {night.asleep_after:.1f} s", style="green")
    return Text("" if night.awake_for is None else f"not in {night.awake_for:.1f} s", style="red")


def acts_table(scores: Scores, *, current: Act | None) -> Table:
    """Draw what happened so far, one line per act and pool."""
    table = Table(box=box.SIMPLE_HEAD, title="One application, two pools, the same mistreatment", title_justify="left")
    table.add_column("mistreatment", no_wrap=True)
    table.add_column("pool", no_wrap=True)
    for name in ("operations", "failed", "unknown", "slowest"):
        table.add_column(name, justify="right", no_wrap=True)
    for act in ACTS:
        style = "bold" if act is current else ""
        for line, (pool, score) in enumerate(scores.items()):
            table.add_row("" if line else act.name, pool, *_act_cells(score.acts.get(act.name)), style=style)
    return table


def _act_cells(tally: Tally | None) -> list[Text]:
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


def summary_table(scores: Scores, ledgers: Ledgers) -> Table:
    """Draw the figures of the whole run, one line per figure and one column per pool."""
    table = Table(box=box.SIMPLE_HEAD, title="Summary", title_justify="left")
    table.add_column("")
    for pool in scores:
        table.add_column(pool, justify="right")
    totals = [score.total() for score in scores.values()]
    books = [ledgers[pool] for pool in scores]
    table.add_row("operations", *(str(total.operations) for total in totals))
    table.add_row("failures the application saw", *(_count(total.failures, "red") for total in totals))
    table.add_row("  of these never answered", *(str(total.unanswered) for total in totals))
    table.add_row("reported unknown", *(_count(total.unknown, "yellow") for total in totals))
    table.add_row("  of these in the database", *(str(book.unknown_present) for book in books))
    table.add_row("slowest answer", *(f"{total.slowest:.2f} s" for total in totals))
    table.add_section()
    table.add_row("lost: reported done, absent", *(_count(book.lost, "red") for book in books))
    table.add_row("duplicated: present twice", *(_count(book.duplicated, "red") for book in books))
    table.add_row("reported failed, but present", *(_count(book.ghosts, "red") for book in books))
    return table


def verdict(pool: str, complaints: Sequence[str], errors: Counter[str]) -> Text:
    """Say in words how the pool did; with complaints, also the errors its application saw, most frequent first."""
    if not complaints:
        kept = "nothing failed that waiting cures, nothing twice, nothing lost, sleep undisturbed"
        return Text(f"{pool}: {kept}.", style="green")
    seen = [f"  {times} x {error}" for error, times in errors.most_common(ERRORS_SHOWN)]
    return Text("\n".join([f"{pool} did not keep its promises:", *(f"  {line}" for line in complaints), *seen]), "red")
