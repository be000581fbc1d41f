"""A function as a runtime runs it: one request for each line on its standard input, frozen in between."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from resilient_pool import ResilientPool, profiles

# Shorter than the freeze: it outlasts every one of them.
TIMEOUTS = {"max_inactive_connection_lifetime": 0.1, "reset_timeout": 0.1, "ping_timeout": 0.1, "ping_after": 0.05}


async def serve(dsn: str, loop: asyncio.AbstractEventLoop, *, hooked: bool) -> None:
    """Answer each line with a line: what a write and a read gave, or the error."""
    async with ResilientPool(dsn, ssl=False, **(profiles.LAMBDA | TIMEOUTS)) as pool:
        # A thread would go on running the loop's own business while it waits; a runtime blocks in the same way.
        while line := sys.stdin.readline():
            around = pool.invocation(deadline=5.0) if hooked else contextlib.nullcontext()
            try:
                async with around:
                    await pool.execute("INSERT INTO requests VALUES ($1)", int(line))
                    found = await pool.fetchval("SELECT count(*) FROM requests WHERE id = $1", int(line))
                    await pool.execute("SET application_name TO 'left behind'")
                answer = f"{found} {pool.stats().resetting}"
            except Exception as error:
                answer = repr(error)
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner() as runner:
        runner.run(serve(sys.argv[1], runner.get_loop(), hooked=sys.argv[2] == "hooked"))
