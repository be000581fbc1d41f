"""Runs asyncpg's own tests of its pool against `ResilientPool`: `make peers`.

    python run_asyncpg_pool.py FOLDER

FOLDER holds asyncpg's source distribution, unpacked. The server is started here. Left out are tests of what is asyncpg's own:
its holders and its queue, its maintenance task, its messages, and its class.
"""

from __future__ import annotations

import asyncio
import os
import sys

import asyncpg._testbase
import asyncpg.pool
import pytest

from resilient_pool import ResilientPool
from resilient_pool.testing import EmbeddedPostgres

LEFT_OUT = {
    "reads or replaces the attributes _holders or _queue": (
        "04 expire_connections floor_reconnect_honors_expired_generation handles_query_cancel_in_release "
        "handles_task_cancel_in_acquire_with_timeout handles_task_cancel_in_release max_inactive_time_01 max_inactive_time_02 "
        "max_inactive_time_03 max_inactive_time_05 min_size_backs_off_on_target_attribute_mismatch min_size_keeps_connections_alive "
        "min_size_reconnect_after_expiry min_size_restored_after_idle_connection_loss min_size_restored_after_multiple_losses "
        "min_size_retries_closed_connection min_size_retries_failed_reconnect min_size_reuses_retained_connections "
        "min_size_restored_after_recycling min_size_zero_allows_full_expiry shutdown_cancels_floor_reconnect release_after_protocol_abort release_timeout_during_cancellation"
    ),
    "expects a connection for each of five callers that give theirs back at once": "07",
    "looks at a connection after its release": "exception_in_setup_and_init",
    "compares a repr, a docstring, a message or a class": "11 13 init_run_until_complete min_size_validation",
    "expects a warning about a transaction that a release finds open": "release_in_xact",
}


class PeersPool(ResilientPool):
    """What the test case tears down."""

    _maintenance_task = None


def create_pool(dsn=None, *, pool_class=asyncpg.pool.Pool, **arguments):
    """Take the place of the test case's function of that name, except where it is asked for a class of its own."""
    if pool_class is not asyncpg.pool.Pool:
        return ORIGINAL(dsn, pool_class=pool_class, **arguments)
    return PeersPool(dsn, **{"min_size": 10, "max_size": 10, **arguments})


ORIGINAL = asyncpg._testbase.create_pool


def main(folder: str) -> int:
    """Run the tests, and return pytest's exit code."""
    server = EmbeddedPostgres(18, settings={"max_connections": 100})
    asyncio.run(server.start())
    try:
        where = {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": "postgres", "PGDATABASE": "postgres"}
        os.environ.update(where)
        asyncpg._testbase.create_pool = create_pool
        left_out = [
            f"--deselect=tests/test_pool.py::TestPool::test_pool_{name}"
            for names in LEFT_OUT.values()
            for name in names.split()
        ]
        os.chdir(folder)
        # Away from asyncpg's own configuration, and with the installed driver rather than the sources beside the tests.
        options = ["-p", "no:cacheprovider", "-p", "no:asyncio", "--rootdir=.", "-c", os.devnull, "-q"]
        return pytest.main([*options, *left_out, "tests/test_pool.py"])
    finally:
        asyncio.run(server.close())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
