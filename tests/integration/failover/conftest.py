"""Two servers for each test."""

from __future__ import annotations

import pytest
from server_pair import Pair

from resilient_pool.testing import EmbeddedPostgres


@pytest.fixture
async def pair():
    """Both servers, with an empty table `item`."""
    async with EmbeddedPostgres(18, settings={"wal_keep_size": "256MB"}) as primary:
        async with primary.admin() as admin:
            await admin.execute("CREATE TABLE item (id int)")
        async with await primary.standby("follower") as standby:
            yield Pair(primary, standby)
