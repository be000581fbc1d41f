"""Rewrites the parts of the documentation that are made from the package: the tables of verdicts and of arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.retry.classifier import RULES, Rule
from resilient_pool.retry.verdict import Fault, Outcome, Phase, Verdict

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def verdicts() -> str:
    """Write the classifier's table, in the order in which its rules are asked."""
    rows = [
        (
            rule.service,
            _sentence(rule.evidence),
            _when(rule),
            ", ".join(sorted(rule.codes)),
            f"`{rule.verdict.fault.value}`",
            f"`{rule.verdict.outcome.value}`",
            _again(rule.verdict),
            rule.known.value,
        )
        for rule in RULES
    ]
    return _table(("service", "what was seen", "when", "SQLSTATE", "fault", "outcome", "tried again", "known"), rows)


def arguments() -> str:
    """Write the table of constructor arguments."""
    rows = [(f"`{one.name}`", one.unit, f"`{one.default}`", one.meaning) for one in ARGUMENTS]
    return _table(("argument", "unit or type", "default", "meaning"), rows)


def _when(rule: Rule) -> str:
    """Say in which phases a rule applies, and whether what was seen is the end of the connection."""
    phases, lost = rule.where
    absent = set(Phase) - phases
    named = sorted(phase.value for phase in (phases if len(absent) > 1 else absent))
    when = f"{'not in ' * (len(absent) == 1)}{', '.join(named)}" if absent else ""
    end = {None: "", True: "the connection is lost", False: "it lives"}[lost]
    return "; ".join(filter(None, (when, end)))


def _again(verdict: Verdict) -> str:
    if verdict.fault is Fault.PERMANENT:
        return "no"
    if verdict.not_before is not None:
        return f"after {verdict.not_before:g} s"
    if verdict.only_for is not None:
        return f"for {verdict.only_for:g} s"
    return "if repeatable" if verdict.outcome is Outcome.UNKNOWN else "yes"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if text[:1] != "`" else text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


PARTS: Mapping[str, tuple[Path, Callable[[], str]]] = MappingProxyType(
    {
        "verdicts": (DOCS / "verdicts.md", verdicts),
        "arguments": (DOCS / "reference" / "arguments.md", arguments),
    }
)
"""The page on which a part stands, between its markers, and what makes it."""


def render(name: str, text: str) -> str:
    """Return a page's text with its generated part made anew.

    Args:
        name: The part's name, as in `PARTS`.
        text: The page as it is. Everything outside the markers stays.

    Raises:
        ValueError: A marker is missing.
    """
    before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise ValueError(f"the page has no markers {name}:begin and {name}:end")
    return f"{before}{begin}\n{PARTS[name][1]()}\n{end}{after}"


def main() -> None:
    """Rewrite the pages."""
    for name, (page, _) in PARTS.items():
        page.write_text(render(name, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
