"""Rewrites the parts of the documentation that are made from the package: the tables of verdicts, arguments and profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from resilient_pool.config.pool_config import ARGUMENTS
from resilient_pool.profiles import EXPLAINED, Profile
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
            ", ".join(sorted(rule.codes)) + "; any in connect" * rule.recoded,
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


_SHOWN = (
    ("idle", "max_inactive_connection_lifetime"),
    ("age", "max_lifetime"),
    ("connect", "timeout"),
    ("wait", "deadline"),
    ("statement cache", "statement_cache_size"),
    ("reset", "session_reset"),
    ("TLS", "ssl"),
)


def profiles() -> str:
    """Write the table of profiles; what one leaves at the pool's default stands in brackets."""
    rows = [(f"[`{name}`](#{name.lower()})", *_values(profile)) for name, profile in EXPLAINED.items()]
    return _table(("profile", *(title for title, _ in _SHOWN), "more"), rows)


def reasons(profile: Profile) -> str:
    """Write what a profile sets, and why."""
    rows = [
        (f"`{name}`", f"`{choice.value!r}`", _sentence(choice.reason), choice.source)
        for name, choice in profile.choices.items()
    ]
    return _table(("argument", "value", "why", "source"), rows)


def _values(profile: Profile) -> Iterator[str]:
    defaults = {argument.name: argument.default for argument in ARGUMENTS}
    automatic = {"statement_cache_size": "found out", "ssl": "as stated"}
    for _, name in _SHOWN:
        choice = profile.choices.get(name)
        default = automatic.get(name) or defaults[name].removesuffix(".0").strip("'")
        yield f"({default})" if choice is None else _plain(choice.value)
    shown = {name for _, name in _SHOWN}
    others = (f"`{name}={choice.value!r}`" for name, choice in profile.choices.items() if name not in shown)
    yield ", ".join(others)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


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
        "profiles": (DOCS / "services.md", profiles),
        **{name: (DOCS / "services.md", partial(reasons, profile)) for name, profile in EXPLAINED.items()},
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
