"""Alembic's own template for asynchronous engines, with nothing changed but the URL, on a database that sleeps."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import resilient_pool
from resilient_pool.testing import PausingServer

ALEMBIC = str(Path(sys.executable).with_name("alembic"))
REVISION = """
from alembic import op
import sqlalchemy as sa

revision, down_revision = "1", None


def upgrade():
    op.create_table("made", sa.Column("id", sa.Integer, primary_key=True))
    op.execute("INSERT INTO made VALUES (17)")


def downgrade():
    op.drop_table("made")
"""


async def alembic(directory, *arguments):
    """What a command of Alembic's printed."""
    root = str(Path(resilient_pool.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    process = await asyncio.create_subprocess_exec(
        *(ALEMBIC, *arguments),
        cwd=directory,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode() + errors.decode()


async def test_alembics_async_template_works_with_the_url(postgres, empty_database, tmp_path):
    """Up, down and offline; the first command meets a database that is asleep, and each leaves no connection behind."""
    await alembic(tmp_path, "init", "--template", "async", "scripts")
    (tmp_path / "scripts" / "versions" / "first.py").write_text(REVISION)
    settings = (tmp_path / "alembic.ini").read_text()
    async with PausingServer(postgres.host, postgres.port, resume_seconds=1, away=("reset", "57P03")) as server:
        url = f"postgresql+resilient://postgres@{server.host}:{server.port}/{empty_database}?deadline=30"
        (tmp_path / "alembic.ini").write_text(settings.replace("driver://user:pass@localhost/dbname", url))
        server.pause()
        async with asyncio.timeout(60):
            offline, _ = await asyncio.gather(
                alembic(tmp_path, "upgrade", "head", "--sql"), alembic(tmp_path, "upgrade", "head")
            )
            assert "CREATE TABLE made" in offline
            async with postgres.admin(empty_database) as admin:
                assert await admin.fetchval("SELECT id FROM made") == 17
                others = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
                while await admin.fetchval(others, empty_database):
                    await asyncio.sleep(0.05)
                await alembic(tmp_path, "downgrade", "base")
                assert await admin.fetchval("SELECT to_regclass('made')") is None
