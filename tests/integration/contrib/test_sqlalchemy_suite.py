"""A part of the suite that SQLAlchemy has for dialects of others, in a process of its own: its plugin takes pytest over."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

import resilient_pool

FILES = {
    "setup.cfg": """
[sqla_testing]
requirement_cls = requirements:Requirements
profile_file = profiles.txt
[tool:pytest]
addopts = -p no:asyncio -p no:hypothesispytest -p no:cacheprovider
python_files = test_*.py
""",
    "conftest.py": """
import pytest
pytest.register_assert_rewrite("sqlalchemy.testing.assertions")
from resilient_pool.contrib.sqlalchemy import ResilientDialect
# The suite asks the dialect's package how to prepare a database; PostgreSQL's own has that.
ResilientDialect.load_provisioning = classmethod(lambda cls: __import__("sqlalchemy.dialects.postgresql.provision"))
ResilientDialect.driver = "asyncpg"  # by which it knows what a cursor of the server's is
from sqlalchemy.dialects.postgresql import provision
provision._extensions = []  # the tests' server has none of the extensions
from sqlalchemy.testing.plugin.pytestplugin import *
""",
    "requirements.py": """
from sqlalchemy.testing import exclusions
from sqlalchemy.testing.requirements import SuiteRequirements

class Requirements(SuiteRequirements):
    array_type = async_dialect = datetime_timezone = json_type = server_side_cursors = uuid_data_type = property(lambda self: exclusions.open())
    isolation_level = savepoints = autocommit = insert_returning = update_returning = property(lambda self: exclusions.open())

    def get_isolation_levels(self, config):
        return {
            "default": "READ COMMITTED",
            "supported": ["AUTOCOMMIT", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"],
        }
""",
    "test_part.py": """
from sqlalchemy.testing.suite.test_dialect import *
from sqlalchemy.testing.suite.test_insert import *
from sqlalchemy.testing.suite.test_results import *
from sqlalchemy.testing.suite.test_rowcount import *
from sqlalchemy.testing.suite.test_types import *
from sqlalchemy.testing.suite.test_update_delete import *
""",
}


@pytest.fixture
async def database(postgres, empty_database):
    """A database with the schemas that the suite asks for."""
    async with postgres.admin(empty_database) as admin:
        await admin.execute("CREATE SCHEMA test_schema; CREATE SCHEMA test_schema_2")
    return postgres.dsn(empty_database)


async def test_sqlalchemys_own_suite_for_dialects_passes(database, tmp_path):
    """Types, results, inserts, server-side cursors, isolation levels: none fails, and hundreds are run."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    url = database.replace("postgresql://", "postgresql+resilient://")
    root = str(Path(resilient_pool.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "--dburi", url, "-c", "setup.cfg", "test_part.py"),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    text = output.decode()
    assert process.returncode == 0, text[-5000:]
    assert int(re.search(r"(\d+) passed", text)[1]) > 400, text[-500:]
