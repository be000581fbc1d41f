"""What `resilient-pool` prints: progress once, and advice that fits the service."""

from __future__ import annotations

import json

from migration_tools import run

from resilient_pool.testing import PausingServer, ScriptedServer


async def test_an_outage_is_printed_once(postgres):
    """As progress; the line that a pool logs of it by itself is left out beside that."""
    with PausingServer(postgres.host, postgres.port, pause_after=None, resume_seconds=0.7, away="57P03") as server:
        server.pause()
        status, output, errors = await run("wait", dsn=server.dsn(postgres.dsn()))
    assert (status, output) == (0, ""), errors
    *progress, last = errors.splitlines()
    assert progress
    assert all(line.startswith("the database is unreachable (57P03): attempt ") for line in progress), errors
    assert last.startswith("the database answers, after ")


async def test_the_doctor_names_the_profile_of_the_service_and_applies_nothing(postgres):
    """By the port here, which is CockroachDB's; what a profile would change stands there line by line."""
    with ScriptedServer(host=postgres.host, port=postgres.port, listen_port=26257) as server:
        dsn = server.dsn(postgres.dsn())
        status, output, errors = await run("doctor", dsn=f"{dsn}?connect_timeout=10&sslmode=disable")
        assert (status, errors) == (0, "")
        assert "advice  profile: profiles.COCKROACHDB fits" in output
        assert "          max_lifetime=900.0 instead of 1800.0: 5 to 30 min are advised" in output
        assert "timeout" not in output.partition("change: ")[0]
        assert "        change: ResilientPool(dsn, **profiles.COCKROACHDB) (see docs/services.md)\n" in output
        status, output, _ = await run("doctor", "--json", dsn=dsn)
        (finding,) = [each for each in json.loads(output)["findings"] if each["check"] == "profile"]
        assert [detail.partition("=")[0] for detail in finding["details"]] == [
            *("max_inactive_connection_lifetime", "max_lifetime", "timeout", "statement_cache_size", "ssl")
        ]
        assert status == 0
