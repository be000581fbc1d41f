"""Rewrites the parts of README.md that are made from elsewhere: the tables of verdicts, of arguments, and of figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.retry.classifier import RULES, Rule
from resilient_pool.retry.verdict import Fault, Outcome, Phase, Verdict

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def verdicts() -> str:
    """Write the classifier's table, in the order in which its rules are asked."""
    rows = [
        (
            _sentence(rule.evidence),
            _when(rule),
            ", ".join(sorted(rule.codes)),
            f"`{rule.verdict.fault.value}`",
            f"`{rule.verdict.outcome.value}`",
            _again(rule.verdict),
        )
        for rule in RULES
    ]
    return _table(("what was seen", "when", "SQLSTATE", "fault", "outcome", "tried again"), rows)


def arguments() -> str:
    """Write the table of constructor arguments."""
    rows = [(f"`{one.name}`", one.unit, f"`{one.default}`", one.meaning) for one in ARGUMENTS]
    return _table(("argument", "unit or type", "default", "meaning"), rows)


def benchmarks() -> str:
    """Quote what a call costs."""
    return _quote("overhead.md", "Aims")


def recovery() -> str:
    """Quote what a recovery takes: the aims, and the crowd that meets a database which sleeps."""
    return _quote("recovery.md", "Aims", "100 callers")


def _quote(name: str, *titles: str) -> str:
    """Quote what `make bench` wrote: how it was measured, and the sections whose titles begin so."""
    if not (RESULTS / name).exists():
        return "Run `make bench` to measure it on your machine.\n"
    head, *sections = (RESULTS / name).read_text(encoding="utf-8").split("\n## ")
    quoted = [section.partition("\n")[2] for title in titles for section in sections if section.startswith(title)]
    source = f"More in `benchmarks/results/{name}`; `make bench` measures your machine."
    return "\n\n".join(part.strip() for part in (head.partition("\n")[2], *quoted, source)) + "\n"


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
    return "if repeatable" if verdict.outcome is Outcome.UNKNOWN else "yes"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] if text[:1] != "`" else text


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


PARTS = MappingProxyType({"verdicts": verdicts, "arguments": arguments, "benchmarks": benchmarks, "recovery": recovery})


def render(text: str) -> str:
    """Return a README's text with its generated parts made anew.

    Args:
        text: The README as it is. Everything outside the markers stays.

    Raises:
        ValueError: A marker is missing.
    """
    for name, part in PARTS.items():
        before, begin, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not begin or not end:
            raise ValueError(f"README.md has no markers {name}:begin and {name}:end")
        text = f"{before}{begin}{part()}{end}{after}"
    return text


def main() -> None:
    """Rewrite README.md."""
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
