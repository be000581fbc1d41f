"""What fixtures of a longer life than a test do in a thread: a test may ask for one while its own event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from resilient_pool.testing import EmbeddedPostgres


def run_in_thread(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine to its end."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


def serve_in_thread(server: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """Start a server, give it out, and close it in the thread that started it."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(server.start())).result()
        try:
            yield server
        finally:
            thread.submit(lambda: asyncio.run(server.close())).result()
