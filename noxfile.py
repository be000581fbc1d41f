"""The tests on every Python from 3.11 on that this machine has: `make pythons`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nox

OLDEST, NEWEST = 11, 20
"""The minor versions of Python 3 that are looked for."""
TESTS = (
    "tests/unit",
    "tests/integration/test_transactions.py",
    "tests/integration/test_transaction_cancellation.py",
    "tests/integration/test_cancelled_at_random.py",
)
# As in the Makefile.
IN_PARALLEL = ("--numprocesses", "2", "--dist", "loadfile")

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def interpreters() -> list[str]:
    """Find one interpreter of each version: on PATH, else beside this one, as pyenv installs them."""
    # pyenv's shims are on PATH for every version, but start only the chosen ones.
    beside = Path(sys.base_prefix).parent
    found = []
    for minor in range(OLDEST, NEWEST):
        on_path = shutil.which(f"python3.{minor}")
        installed = sorted(map(str, beside.glob(f"3.{minor}*/bin/python3.{minor}")))
        candidates = [*([on_path] if on_path else []), *reversed(installed)]
        found += [path for path in candidates if _starts(path)][:1]
    return found


def _starts(path: str) -> bool:
    # Without ssl, an interpreter was built without what an application needs.
    return subprocess.run([path, "-c", "import ssl, venv"], capture_output=True, check=False).returncode == 0  # noqa: S603


@nox.session(python=interpreters())
def tests(session: nox.Session) -> None:
    """Install the wheel with what the tests need, and run the unit and transaction tests, or those named after `--`."""
    session.install("--quiet", "--constraint", "constraints.txt", "hatchling")
    session.install("--quiet", "--constraint", "constraints.txt", "--no-build-isolation", ".[dev]")
    session.run("python", "-VV")
    session.run("pytest", "--quiet", *IN_PARALLEL, *(session.posargs or TESTS))
