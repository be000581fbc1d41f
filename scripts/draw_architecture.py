"""Rewrites the picture in ARCHITECTURE.md: which part of the package imports which, as a mermaid diagram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
PACKAGE = "resilient_pool"
BEGIN, END = "<!-- picture:begin -->\n", "<!-- picture:end -->"

Parts = Mapping[str, frozenset[str]]
"""For each part, a folder or a module of the package's root, the parts that it imports."""


def parts() -> Parts:
    """Read which part imports which from the import graph that import-linter checks."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        part = _part(module)
        if part is not None:
            imported = {_part(other) for other in graph.find_modules_directly_imported_by(module)}
            found.setdefault(part, set()).update(one for one in imported if one not in {None, part})
    return {part: frozenset(imported) for part, imported in found.items()}


def floors() -> int:
    """Count the modules on the longest chain of imports."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    heights: dict[str, int] = {}

    def height(module: str) -> int:
        if module not in heights:
            below = graph.find_modules_directly_imported_by(module)
            heights[module] = 1 + max(map(height, below), default=0)
        return heights[module]

    return max(map(height, graph.modules))


def direct(graph: Parts) -> Iterator[tuple[str, str]]:
    """Yield the imports that do not follow from others: of `a` to `b` to `c` and `a` to `c` not the last."""
    for part in sorted(graph):
        for imported in sorted(graph[part]):
            others = graph[part] - {imported}
            if not any(imported in _reachable(graph, other) for other in others):
                yield part, imported


def picture() -> str:
    """Write the diagram, from the top floor down."""
    graph = parts()
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {_node(part)}["{_label(part)}"]' for part in sorted(graph)]
    lines += [f"    {_node(part)} --> {_node(imported)}" for part, imported in direct(graph)]
    return "\n".join([*lines, "```"]) + "\n"


def render(text: str) -> str:
    """Return a page's text with its picture made anew.

    Args:
        text: The page as it is. Everything outside the markers stays.

    Raises:
        ValueError: A marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("ARCHITECTURE.md has no markers picture:begin and picture:end")
    return f"{before}{begin}{picture()}{end}{after}"


def _part(module: str) -> str | None:
    # The package itself and its command-line entry hold no code of their own.
    names = module.split(".")
    return None if len(names) == 1 or names[1] in {"__main__", "_version"} else names[1]


def _reachable(graph: Parts, part: str) -> frozenset[str]:
    below = graph.get(part, frozenset())
    return below.union(*(_reachable(graph, other) for other in below))


def _node(part: str) -> str:
    return part.strip("_")


def _label(part: str) -> str:
    return f"{part}/" if (ROOT / PACKAGE / part).is_dir() else f"{part}.py"


def main() -> None:
    """Rewrite ARCHITECTURE.md, and print how long the longest chain of imports is."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{floors()} modules on the longest chain of imports")


if __name__ == "__main__":
    main()
