"""The package's names: all that it says it has, loaded when they are asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resilient_pool

SOURCE = Path(resilient_pool.__file__)


def test_what_a_type_checker_sees_is_what_there_is():
    """Each name is imported for type checkers from where it is loaded from."""
    imports = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if node.module.startswith("resilient_pool.") and alias.name != "__version__"
    }
    assert seen == resilient_pool._HOME
    assert sorted(seen) == sorted(set(resilient_pool.__all__) - {"__version__"})


@pytest.mark.parametrize("name", resilient_pool.__all__)
def test_each_name_is_there(name):
    """And the same object each time."""
    assert getattr(resilient_pool, name) is getattr(resilient_pool, name)
    assert name in dir(resilient_pool)


def test_other_names_are_not():
    """The error is Python's own."""
    with pytest.raises(AttributeError, match="module 'resilient_pool' has no attribute 'create_pol'"):
        resilient_pool.create_pol  # noqa: B018


def test_importing_the_package_loads_no_driver():
    """What loads it for a part of it, such as pytest for its plugin, does not load the rest."""
    program = (
        "import sys, resilient_pool; assert 'asyncpg' not in sys.modules and 'asyncio' not in sys.modules, sys.modules.keys(); "
        "resilient_pool.events.Event, resilient_pool.profiles.LAMBDA, resilient_pool.create_pool; "
        "from resilient_pool import *; assert create_pool is resilient_pool.create_pool and 'asyncpg' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
