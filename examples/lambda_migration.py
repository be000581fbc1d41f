"""An AWS Lambda function that migrates: deploy it with a directory `migrations`, DATABASE_URL and a time-out of 5 minutes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from resilient_pool import run_migration

MARGIN = 10.0  # seconds, kept for the migration and the answer


def handler(_event: object, context: Any) -> dict[str, object]:
    """Wait for the database until 10 s before this invocation ends, at least 1 s, then apply what is new.

    A migration that has begun is not cut short: give the function a time-out that leaves room for the longest.
    """
    migrations = Path(os.environ["LAMBDA_TASK_ROOT"]) / "migrations"
    seconds = max(context.get_remaining_time_in_millis() / 1000 - MARGIN, 1.0)
    result = asyncio.run(run_migration(migrations, deadline=seconds))
    return {"applied": list(result.applied), "waited": result.waited}
