"""Asks a server's catalog whether what looks like a read calls nothing that may write: `ReadCheck`."""

from __future__ import annotations

from collections.abc import Iterable

from resilient_pool.core.wire import Link
from resilient_pool.policy.statements import StatementReader


class ReadCheck:
    """Decides, after a failure only, whether texts that look like reads may be run a second time.

    Args:
        reader: Knows what the texts name.
    """

    def __init__(self, reader: StatementReader) -> None:
        self._reader = reader

    async def allows(self, link: Link, texts: Iterable[str]) -> bool:
        """Whether everything callable that `texts` name is stable or immutable on the server behind `link`.

        The repeat itself must run inside BEGIN READ ONLY: this is one of three conditions.

        Args:
            link: A connection with no transaction open.
            texts: Each must look like a read; one that does not is not allowed.

        Raises:
            Exception: Whatever the driver raises when the connection is lost.
        """
        return link.is_usable and all(self._reader.is_plain_read(text) for text in texts)

    def forget(self) -> None:
        """Ask again: the schema has changed."""
