"""Runs PgQueuer's own tests of its drivers and queries over `ResilientPool`: `make peers`.

    python run_pgqueuer.py FOLDER

FOLDER holds the tests of its source distribution. The server is started here. Where they open a connection or a pool of asyncpg's
they get one of this project's. Left out are the files that are about its schema, its command line and its web pages, and those that
mostly wait.
"""

from __future__ import annotations

import asyncio
import os
import sys
import types

import asyncpg
import pytest

import resilient_pool
from resilient_pool.testing import EmbeddedPostgres

FILES = "buffers cancellation completion driver_remove_listener drivers execute_after heartbeat listeners queries"


def give_ours() -> None:
    """Let what is imported from now on as asyncpg connect with ours, which has imported the real one."""
    ours = types.ModuleType("asyncpg")
    vars(ours).update(vars(asyncpg), connect=resilient_pool.connect, create_pool=resilient_pool.create_pool)
    sys.modules["asyncpg"] = ours


def leave_out_containers() -> None:
    """Stand in for the package that would start a server in a container: its names are imported, and not used."""
    for name, contents in {
        "testcontainers": {},
        "testcontainers.core": {},
        "testcontainers.core.container": {"DockerContainer": object},
        "testcontainers.core.wait_strategies": {"HealthcheckWaitStrategy": object},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module


def main(folder: str) -> int:
    """Run the tests, and return pytest's exit code."""
    server = EmbeddedPostgres(18, settings={"max_connections": 100})
    asyncio.run(server.start())
    try:
        os.environ["EXTERNAL_POSTGRES_DSN"] = f"postgresql://postgres@{server.host}:{server.port}/postgres"
        give_ours()
        leave_out_containers()
        os.chdir(folder)
        options = ["-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--rootdir=.", "-c", os.devnull, "-q"]
        return pytest.main([*options, *(f"test/test_{name}.py" for name in FILES.split())])
    finally:
        asyncio.run(server.close())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
