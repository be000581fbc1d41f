"""Applications that serve HTTP in processes of their own, the examples above all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import sys
from pathlib import Path

import httpx
from migration_tools import environment

ROOT = Path(__file__).resolve().parents[2]
_ADDRESS = re.compile(r"running on (http://\S+)", re.IGNORECASE)


@contextlib.asynccontextmanager
async def client_of(*command, log, dsn):
    """Run a command of Python's on a free port, and give a client for the address that its log names."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command),
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=environment(dsn, PORT="0", PYTHONUNBUFFERED="1"),
        )
    try:
        async with asyncio.timeout(60):
            while not (found := _ADDRESS.search(log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        async with httpx.AsyncClient(base_url=found[1], timeout=40, trust_env=False) as client:
            yield client
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(30):
            await process.wait()


@contextlib.asynccontextmanager
async def client_of_example(name, log, dsn=None):
    """Run an example as its head says, with a database of its own if no `dsn` is given. Its log must show no traceback."""
    text = (ROOT / "examples" / name).read_text()
    program, *arguments = shlex.split(re.search(r"Run it with `([^`]+)`", text)[1])
    assert program == "python"
    async with client_of(*arguments, log=log, dsn=dsn) as client:
        yield client
    assert "Traceback" not in log.read_text(), log.read_text()
