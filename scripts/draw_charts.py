"""Draws the charts of README.md and the documentation from the benchmarks' own results."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
OURS, THEIRS = "#3f51b5", "#b0653a"
WAYS = ("refuse", "reset", "57P03", "28000")


def rows(name: str, title: str) -> list[list[str]]:
    """Return the cells of the first table in a section of the results.

    Args:
        name: The file, in `benchmarks/results`.
        title: How the section's title begins.
    """
    sections = (RESULTS / name).read_text(encoding="utf-8").split("\n## ")
    section = next(section for section in sections if section.startswith(title))
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not re.match(r"\|[-:]", line)]


def number(cell: str) -> float:
    """Return a cell's figure without its spread."""
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))


def while_waking() -> dict[str, tuple[float, float]]:
    """Return how many attempts to connect each contender made, and how many of 100 callers failed, on average over the ways."""
    found: dict[str, list[tuple[float, float]]] = {}
    way = ""
    for first, contender, failed, _, attempts, _ in rows("recovery.md", "100 callers")[1:]:
        way = first or way
        if way in WAYS:
            found.setdefault(contender, []).append((number(attempts), number(failed)))
    return {
        contender: tuple(sum(each) / len(each) for each in zip(*values, strict=True))
        for contender, values in found.items()
    }


def calls_per_second(loop: str) -> dict[str, tuple[float, float]]:
    """Return reads and writes per second with 100 workers, by contender."""
    table = {cells[0]: cells for cells in rows("overhead.md", f"{loop}: calls per second")[1:]}
    return {name: (number(table[key][1]), number(table[key][3])) for name, key in CONTENDERS.items()}


CONTENDERS = {"resilient_pool": "resilient_pool, 100 workers", "asyncpg.Pool": "asyncpg.Pool, 100 workers"}


def draw_waking() -> None:
    """Draw how many attempts 100 callers make, and how many of them fail, in the 5 s that a database needs to wake."""
    values = while_waking()
    figure, axes = plt.subplots(figsize=(7, 2.1), layout="constrained")
    names = list(reversed(values))
    colors = [OURS if name == "resilient_pool" else THEIRS for name in names]
    bars = axes.barh(names, [values[name][0] for name in names], color=colors)
    labels = [f"{attempts:,.0f} attempts, {failed:.0f} callers failed" for attempts, failed in map(values.get, names)]
    axes.bar_label(bars, labels=labels, padding=4)
    axes.set_title("attempts to connect while a database wakes for 5 s, 100 callers", fontsize=10)
    finish(figure, axes, "waking.svg", 1.35 * max(attempts for attempts, _ in values.values()))


def draw_speed() -> None:
    """Draw reads and writes per second beside asyncpg.Pool."""
    values = calls_per_second("uvloop")
    figure, axes = plt.subplots(figsize=(7, 1.7), layout="constrained")
    names, figures, colors = [], [], []
    for index, kind in enumerate(("reads", "writes")):
        for contender, color in (("resilient_pool", OURS), ("asyncpg.Pool", THEIRS)):
            names.append(f"{contender}, {kind}")
            figures.append(values[contender][index])
            colors.append(color)
    bars = axes.barh(names[::-1], figures[::-1], color=colors[::-1])
    axes.bar_label(bars, labels=[f"{value:,.0f}" for value in figures[::-1]], padding=4)
    axes.set_title("calls per second on ten connections, 100 workers, uvloop", fontsize=10)
    finish(figure, axes, "speed.svg", max(figures))


def finish(figure: plt.Figure, axes: plt.Axes, name: str, largest: float) -> None:
    """Write a chart without axis or frame, readable on light and dark pages."""
    axes.set_xlim(0, largest * 1.15)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(ASSETS / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Draw all charts."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "resilient-pool", "font.family": "sans-serif"}
    draw_waking()
    draw_speed()


if __name__ == "__main__":
    main()
