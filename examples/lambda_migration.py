"""An AWS Lambda function that migrates: deploy it with a directory `migrations`, DATABASE_URL and a time-out of 5 minutes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from resilient_pool import run_migration

MARGIN = 10.0  # seconds, kept for the answer


def handler(_event: object, context: Any) -> dict[str, object]:
    """Wait for the database as long as this invocation lasts, then apply what is new."""
    migrations = Path(os.environ["LAMBDA_TASK_ROOT"]) / "migrations"
    seconds = context.get_remaining_time_in_millis() / 1000 - MARGIN
    result = asyncio.run(run_migration(migrations, deadline=seconds))
    return {"applied": list(result.applied), "waited": result.waited}
