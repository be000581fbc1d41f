from __future__ import annotations

import asyncpg
import pytest

from resilient_pool.config.pool_config import PoolConfig
from resilient_pool.config.settings_names import SETTINGS_NAMES


@pytest.mark.parametrize("server", ["postgres16", "postgres"])
async def test_every_setting_that_a_session_may_bring_along_is_known(server, request):
    """Every server lists a part of what the package knows; should one list more, the module is to be written anew."""
    async with request.getfixturevalue(server).admin() as connection:
        rows = await connection.fetch(
            "SELECT lower(name) FROM pg_settings WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend')"
        )
    assert {row[0] for row in rows} <= SETTINGS_NAMES, "run: python scripts/list_server_settings.py"


async def test_what_a_dsn_says_reaches_the_server(postgres):
    """Settings of the server's, Prisma's schema, and a key's passphrase that stands beside them."""
    dsn = f"{postgres.dsn()}?work_mem=1234kB&my.own=x&schema=a%20b&sslpassword=y&sslmode=disable"
    connection = await asyncpg.connect(**PoolConfig.from_arguments(dsn).connect_arguments())
    try:
        shown = [await connection.fetchval(f"SHOW {name}") for name in ("work_mem", "my.own", "search_path")]
    finally:
        await connection.close()
    assert shown == ["1234kB", "x", '"a b"']
