"""What holds for every text of the repository: no trace of one machine, and plain words in the package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Written in parts, since this file is a text of the repository too.
MACHINES = re.compile(
    "|".join(
        (rf"(?<![\w.*~/-])/(?:{'ro' + 'ot'}|{'wo' + 'rk'})\b", "py" + r"pi\.", "python" + "hosted", "index" + "-url")
    )
)
VAGUE = re.compile(r"\b(?:whoever|nobody|somebody|anybody)\b", re.IGNORECASE)
MOST_VAGUE = 12
OUR_OWN = "resilient-pool"
INSTALLS = re.compile(r"\$\(PIP_INSTALL\)|-m pip download|session\.install\(")
HELD_FAST = re.compile(r"constraints\.txt|--no-deps\b.*(?:==|\s\.$)")
"""How an installation gets the versions that are meant, and no others."""


def texts() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every file that is tracked or about to be."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            yield name, path.read_text(encoding="utf-8", errors="replace")


def lines_with(pattern: re.Pattern[str], under: str = "") -> list[str]:
    """Find the lines of texts under a folder in which a pattern is found, as `path:line: text`."""
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        if name.startswith(under)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def normalized(requirement: str) -> str:
    """Return the name of what is required, spelled as indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_everything_that_is_installed_is_pinned():
    """What builds the package, what it needs, and what its extras name: a new release of theirs changes no result here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    required = {*project["build-system"]["requires"], *project["project"]["dependencies"]}.union(*extras)
    pinned = re.findall(r"^(.+)==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {normalized(each) for each in required} - {normalized(each) for each in pinned} == {OUR_OWN}


def test_no_installation_forgets_the_pins():
    """Each command of the Makefile and of nox that installs is held by constraints.txt, or names one version and nothing more."""
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("Makefile", "noxfile.py")]
    commands = [line for text in texts for line in text.splitlines() if INSTALLS.search(line)]
    assert len(commands) > 6
    assert [each for each in commands if not HELD_FAST.search(each)] == []


def test_no_text_names_a_machine():
    """No directory of a machine that this was written on, and no package registry, is in any text."""
    assert lines_with(MACHINES) == []


def test_the_package_speaks_plainly():
    """Comments and messages say who does a thing: a caller, a session, a process."""
    found = lines_with(VAGUE, under="resilient_pool/")
    assert len(found) <= MOST_VAGUE, "\n".join(found)


def test_the_machines_are_found():
    """The pattern sees what it is meant for, and no word that only looks like it."""
    assert MACHINES.search("see " + "/ro" + "ot/project")
    assert MACHINES.search('"HOME": "' + "/ro" + 'ot"')
    assert not MACHINES.search("time/work, https://example.com/root, /rooted")
