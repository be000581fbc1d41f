"""Tests that start a program of one of Debian's packages, where it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ONE_OF_EACH = """
import pytest

@pytest.mark.needs("no-such-program")
def test_that_needs_it(): pass

def test_that_does_not(): pass
"""


@pytest.fixture
def run(tmp_path):
    """Run two tests, of which one needs a program that no machine has."""
    (tmp_path / "tests").mkdir()
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "debian-packages").write_text("# package, program\nsome-package no-such-program\n")
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_two.py").write_text(ONE_OF_EACH)

    def run(*options, **environment):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "tests"],
            cwd=tmp_path,
            env={**os.environ, "PYTEST_ADDOPTS": "", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("options", [[], ["--numprocesses=2"]], ids=["one process", "two processes"])
def test_a_test_whose_program_is_missing_is_left_out_and_counted(run, options):
    """The summary names the command that installs it."""
    ended = run(*options, RESILIENT_POOL_REQUIRE_PROGRAMS="")
    assert ended.returncode == 0, ended.stdout
    assert "1 passed" in ended.stdout
    assert "1 tests need the package some-package: apt-get install -y some-package" in ended.stdout


def test_a_missing_program_is_an_error_where_nothing_may_be_left_out(run):
    """As in the gate that every change must pass."""
    ended = run(RESILIENT_POOL_REQUIRE_PROGRAMS="1")
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "apt-get install -y some-package" in ended.stderr


def test_every_package_of_the_list_names_its_program():
    """One line has one of each."""
    lines = (TESTS.parent / ".ci" / "debian-packages").read_text().splitlines()
    assert all(len(line.split()) == 2 for line in lines if not line.startswith("#"))
