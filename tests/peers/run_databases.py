"""Runs the own tests of the package `databases` against this project's `Database`: `make peers`.

    python run_databases.py FOLDER

FOLDER holds the tests of its source distribution. The server is started here. Left out are the files that are about URLs, imports,
SQLite and the options of other drivers: nothing of a pool is in them.
"""

from __future__ import annotations

import asyncio
import os
import sys

import databases
import pytest

from resilient_pool.contrib.databases import Database
from resilient_pool.testing import EmbeddedPostgres


def main(folder: str) -> int:
    """Run the tests, and return pytest's exit code."""
    server = EmbeddedPostgres(18, settings={"max_connections": 100})
    asyncio.run(server.start())
    try:
        os.environ["TEST_DATABASE_URLS"] = f"postgresql+asyncpg://postgres@{server.host}:{server.port}/postgres"
        databases.Database = Database
        os.chdir(folder)
        options = ["-p", "no:cacheprovider", "-p", "no:asyncio", "--rootdir=.", "-c", os.devnull, "-q"]
        return pytest.main([*options, "tests/test_databases.py"])
    finally:
        asyncio.run(server.close())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
