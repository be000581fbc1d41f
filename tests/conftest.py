"""Programs of Debian's packages that some tests start: `@pytest.mark.needs("pgbouncer")`.

Without the program such a test is left out, and the summary says how many were and which command installs it. With
`RESILIENT_POOL_REQUIRE_PROGRAMS=1`, as `.ci/run` sets it, a missing program is an error.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

PACKAGES = Path(__file__).resolve().parents[1] / ".ci" / "debian-packages"
# Debian puts servers where only the superuser's PATH leads.
SEARCHED = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
LEFT_OUT = pytest.StashKey[Counter[str]]()


def packages() -> dict[str, str]:
    """Read which package has which program."""
    lines = (line.split() for line in PACKAGES.read_text().splitlines() if not line.startswith("#"))
    return {program: package for package, program in lines}


def is_here(program: str) -> bool:
    """Whether a program can be started."""
    return shutil.which(program, path=SEARCHED) is not None


def pytest_configure(config: pytest.Config) -> None:
    # A shell lets what runs in the background ignore the first, `nohup` the second. Programs that tests start would inherit it.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.addinivalue_line("markers", "needs(program): start a program of one of Debian's packages")
    config.stash[LEFT_OUT] = Counter()
    missing = {package for program, package in packages().items() if not is_here(program)}
    if missing and os.environ.get("RESILIENT_POOL_REQUIRE_PROGRAMS") == "1":
        raise pytest.UsageError(
            f"tests need programs that are not here: apt-get install -y {' '.join(sorted(missing))}"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = packages()
    kept, left_out = [], []
    for item in items:
        named = {program for marker in item.iter_markers("needs") for program in marker.args}
        if not named <= known.keys():
            raise pytest.UsageError(f"{item.nodeid} needs {sorted(named - known.keys())}: add it to {PACKAGES.name}")
        missing = {known[program] for program in named if not is_here(program)}
        config.stash[LEFT_OUT].update(missing)
        (left_out if missing else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    # Each of several processes collects all tests.
    node.config.stash[LEFT_OUT] |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for package, number in sorted(config.stash[LEFT_OUT].items()):
        line = f"{number} tests need the package {package}: apt-get install -y {package}"
        terminalreporter.write_line(line, yellow=True)
