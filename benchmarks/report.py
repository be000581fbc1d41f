"""Turns samples into medians with their spread, and those into Markdown; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median and the quartiles on either side of it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)

    @classmethod
    def of_ratios(cls, samples: Sequence[float], base: Sequence[float]) -> Spread:
        """Ratios are formed within each round, whose two figures were taken a moment apart."""
        return cls.of([mine / other for mine, other in zip(samples, base, strict=True)])

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A figure that was promised: what it is, its bound, and which side of the bound is good."""

    what: str
    bound: float
    at_most: bool
    digits: int = 2

    def promise(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"

    def verdict(self, median: float) -> str:
        met = median <= self.bound if self.at_most else median >= self.bound
        return "met" if met else "**not met**"

    def row(self, figures: Sequence[Spread]) -> list[str]:
        """Return one row of a table: the aim, then figure and verdict per loop."""
        cells = [f"{figure.text(self.digits)}, {self.verdict(figure.median)}" for figure in figures]
        return [self.what, self.promise(), *cells]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table that is also readable as it stands: the first column left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ":" if column else "-" * (width + 2) for column, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])
