"""Checks what `make dist` built: the version is that of the changelog, and wheel and sdist work in an empty environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import importlib.metadata, importlib.resources, sys
import resilient_pool
assert resilient_pool.__version__ == importlib.metadata.version("resilient-pool") == sys.argv[1]
assert importlib.resources.files("resilient_pool").joinpath("py.typed").is_file()
assert not any(name.partition(".")[0] in ("sqlalchemy", "opentelemetry", "pytest") for name in sys.modules)
"""


def version_of(distribution: Path) -> str:
    """Return the version in a distribution's file name."""
    return re.match(r"resilient_pool-([^-]+?)(?:-py3-none-any\.whl|\.tar\.gz)$", distribution.name)[1]


def check_changelog(version: str) -> None:
    """Require a heading of this version, or of what is not released yet, on top of the changelog.

    Args:
        version: The version that was built.

    Raises:
        SystemExit: The newest heading names another version.
    """
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if newest not in ("Unreleased", version):
        raise SystemExit(
            f"the newest heading of CHANGELOG.md is [{newest}], but resilient_pool/_version.py says {version}"
        )


def check_install(distribution: Path, version: str) -> None:
    """Install a distribution into an empty environment, import it there, and run its command.

    Args:
        distribution: A wheel or an sdist.
        version: What it must say of itself.
    """
    with tempfile.TemporaryDirectory() as home:
        venv.create(home, with_pip=True)
        scripts = Path(home) / "bin"
        pip = [scripts / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", distribution], check=True, cwd=home)
        subprocess.run([scripts / "python", "-W", "error", "-c", PROGRAM, version], check=True, cwd=home)
        subprocess.run([scripts / "resilient-pool", "--help"], check=True, cwd=home, stdout=subprocess.DEVNULL)


def main() -> None:
    """Check every distribution in a folder."""
    distributions = sorted(Path(sys.argv[1]).resolve().iterdir())
    assert [one.suffix for one in distributions] == [".whl", ".gz"], distributions
    for one in distributions:
        check_changelog(version_of(one))
        check_install(one, version_of(one))
        print(f"{one.name}: installs, imports and runs")


if __name__ == "__main__":
    main()
