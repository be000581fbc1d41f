"""The plugin for pytest, as a project uses it: in a run of its own, with asyncio's and anyio's plugins, on workers and in fixtures of any scope."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

PLUGIN = "resilient_pool.contrib.pytest"
# What else is installed here has no part in it, and takes time to load.
WITHOUT = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:faker")
CONFTEST = """
import pytest
from resilient_pool import create_pool

@pytest.fixture
async def shop(database_dsn):
    async with create_pool(database_dsn, min_size=2, deadline=20, ping_after=0, ping_timeout=0.5) as pool:
        await pool.execute("CREATE TABLE bought (id int)")
        yield pool
"""
ASYNCIO = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = {0}
asyncio_default_test_loop_scope = {0}
filterwarnings = error
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a process of its own, and expect these outcomes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))

    def run_it(*arguments, **outcomes):
        result = pytester.runpytest_subprocess("-p", PLUGIN, *WITHOUT, *arguments, timeout=60)
        result.assert_outcomes(**outcomes)
        return result

    return run_it


def test_an_applications_test_is_put_through_each_fault(pytester, run):
    """Once for each, between its fixtures and its body; its own fixtures are ready by then, and the next test finds all as it was."""
    pytester.makeini(ASYNCIO.format("function"))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest
        from resilient_pool import OutcomeUnknownError

        async def test_without_faults(shop, database_fault):
            assert database_fault is None
            assert await shop.execute("INSERT INTO bought VALUES (1)") == "INSERT 0 1"

        @pytest.mark.database_faults(
            "none", "stale", "restart", "crash", "away", "frozen", "starting", "full", "lost_request", "lost_answer", "cut_answer",
            "vanished", at=2, matching="bought", seconds=0.3,
        )
        async def test_nothing_is_bought_twice(shop, embedded_postgres, database_dsn, database_fault):
            assert shop.get_size() == 2
            outcome = 1
            try:
                await shop.fetch("SELECT * FROM bought")
                await shop.execute("INSERT INTO bought VALUES (1)")
            except OutcomeUnknownError:
                assert str(database_fault.fault) in ("lost_request@2", "lost_answer@2", "cut_answer@2"), database_fault.fault
                outcome = 0 if database_fault.fault.name == "lost_request" else 1
            assert await shop.fetchval("SELECT count(*) FROM bought") == outcome

        async def test_all_is_well_again(shop):
            assert await shop.fetchval("SELECT count(*) FROM bought") == 0
        """
    )
    run("-v", passed=14)


def test_a_fault_that_did_not_happen_fails_the_test(pytester, run):
    """It would promise what it has not shown. A fault that nothing can be known of, and no fault at all, are errors of usage."""
    pytester.makeini(ASYNCIO.format("function"))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        test_late="""
        import pytest, unittest

        @pytest.mark.database_faults("lost_answer", at=9)
        async def test_two_requests(shop):
            await shop.fetch("SELECT 1")

        @pytest.mark.database_faults("lost_answer", at=9)
        async def test_that_fails_itself(shop):
            assert 1 == 2

        @pytest.mark.database_faults("restart")
        class TestOfAnotherKind(unittest.TestCase):
            def test_that_takes_no_fixture(self):
                pass
        """,
        test_unknown="""
        import pytest

        @pytest.mark.database_faults("restat")
        def test_one():
            pass
        """,
        test_none="""
        import pytest

        @pytest.mark.database_faults("restart", at=())
        def test_one():
            pass
        """,
        **{
            f"test_wrong_{number}": f"""
            import pytest

            @pytest.mark.database_faults("restart", {argument})
            def test_one():
                pass
            """
            for number, argument in enumerate(("at='2'", "seconds='1'", "seconds=-1", "matching=b'x'", "second=1"))
        },
    )
    result = run("--continue-on-collection-errors", failed=3, errors=7)
    result.stdout.fnmatch_lines_random(
        [
            "*lost_answer@9 did not happen: the test's body made ? such requests*",
            "*assert 1 == 2*",
            "*database_faults takes some of none, stale, *not 'restat'*",
            "*at= must be the number of a request*not ()*",
            "*database_faults does nothing for a method of unittest.TestCase*",
            "*at= must be the number of a request*not '2'*",
            "*seconds= must be a number of seconds, at least 0, not '1'*",
            "*seconds= must be a number of seconds, at least 0, not -1*",
            "*matching= must be a str, not b'x'*",
            "*database_faults takes at, matching, seconds, not second*",
        ]
    )
    result.stdout.no_fnmatch_line("*contrib/pytest.py*")


def test_fixtures_stand_before_the_same_server(pytester, run):
    """A server that sleeps, one that answers by a script, a clock of the test's own; also with anyio's plugin."""
    pytester.makeini(
        "[pytest]\nfilterwarnings = error\nembedded_postgres_settings =\n  max_connections = 23\n  work_mem = 1MB\n"
    )
    pytester.makepyfile(
        """
        import asyncpg, pytest
        from resilient_pool import create_pool
        from resilient_pool.testing import Point, Refusal

        pytestmark = pytest.mark.anyio

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        async def test_settings(database_dsn):
            connection = await asyncpg.connect(database_dsn)
            assert await connection.fetchval("SHOW max_connections") == "23"
            assert await connection.fetchval("SHOW work_mem") == "1MB"
            await connection.close()

        @pytest.mark.pausing_server(resume_seconds=0.2, pause_after=None)
        async def test_sleep(pausing_server, embedded_postgres):
            pausing_server.pause()
            async with create_pool(pausing_server.dsn(embedded_postgres.dsn())) as pool:
                assert await pool.fetchval("SELECT 1") == 1
            assert pausing_server.outage_attempts

        async def test_script(scripted_server, embedded_postgres):
            full = Refusal(at=Point.STARTUP, sqlstate="53300", message="sorry, too many clients already", times=1)
            server, other = scripted_server(full), scripted_server()
            async with create_pool(server.dsn(embedded_postgres.dsn())) as pool:
                assert await pool.fetchval("SELECT 1") == 1
            assert (server.sent, other.sent) == ((full,), ())

        async def test_clock(scripted_clock):
            await scripted_clock.sleep(3600.0)
            assert scripted_clock.sleeps == [3600.0]

        @pytest.mark.database_faults("restart")
        async def test_restart(database_dsn):
            async with create_pool(database_dsn) as pool:
                assert await pool.fetchval("SELECT 1") == 1
        """
    )
    run("-p", "no:asyncio", passed=5)


def test_a_session_of_workers_has_a_server_each(pytester, run):
    """With xdist; a pool for the whole session, before a proxy that lives as long, meets its faults as well."""
    pytester.makeini(ASYNCIO.format("session") + "database_scope = session\n")
    pytester.makeconftest(CONFTEST.replace("@pytest.fixture", '@pytest.fixture(scope="session")'))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.database_faults("stale", "restart", "lost_answer")
        async def test_a_read(shop, fault_proxy):
            assert await shop.fetchval("SELECT 1") == 1
            assert fault_proxy.attempts >= 2

        async def test_another(shop):
            assert await shop.fetchval("SELECT 1") == 1
        """
    )
    run("-n", "2", passed=4)


def test_a_project_that_does_not_use_it_pays_nothing(pytester, run):
    """No driver is imported, and of the package nothing but the plugin, once, however often it is named; it takes milliseconds."""
    pytester.makeconftest(f"pytest_plugins = [{PLUGIN!r}]")
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            ours = {name for name in sys.modules if name.startswith("resilient_pool")}
            assert ours == {
                "resilient_pool", "resilient_pool._version", "resilient_pool.contrib", "resilient_pool.contrib.pytest"
            }
            assert "asyncpg" not in sys.modules
        """
    )
    run("-p", PLUGIN, "-p", "no:asyncio", passed=1)
    program = (
        "import pytest, asyncio, threading, concurrent.futures, secrets, time; began = time.process_time(); "
        f"import {PLUGIN}; print(time.process_time() - began)"
    )
    took = min(
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) for _ in range(5)
    )
    assert took < 0.1
