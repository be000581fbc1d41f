"""A primary and a streaming standby, which may change their roles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resilient_pool.testing import EmbeddedPostgres


@dataclass(slots=True)
class Pair:
    """Two servers, of which one follows the other; which one is changed by `fail_over` and `switch_over`.

    Attributes:
        primary: The one that writes.
        standby: The one that follows it.
    """

    primary: EmbeddedPostgres
    standby: EmbeddedPostgres

    async def commit_on_both(self) -> None:
        """Let the primary acknowledge what the standby has, from now on."""
        await self.primary.apply_settings({"synchronous_standby_names": "*"})

    async def fail_over(self, down: Callable[[], None] = lambda: None) -> None:
        """Crash the primary, call `down`, and promote the standby."""
        await self.primary.stop("immediate")
        down()
        await self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    async def switch_over(self, down: Callable[[], None] = lambda: None) -> None:
        """Let the two change their roles in place: each keeps its address. Call `down` when the primary is down."""
        await self.primary.stop("fast")
        down()
        await self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        follow(self.standby, self.primary)
        await self.standby.start()

    def dsn(self, *, ports: tuple[int, int] | None = None) -> str:
        """Name both hosts, in the order that they were made in."""
        first, second = ports or (self.primary.port, self.standby.port)
        return f"postgresql://postgres@127.0.0.1:{first},127.0.0.1:{second}/postgres"


def follow(server: EmbeddedPostgres, primary: EmbeddedPostgres) -> None:
    """Make a server that is stopped a standby."""
    data = Path(server.data_directory)
    server._write("standby.signal", "")
    configuration = data / "postgresql.auto.conf"
    line = f"primary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres'\nsynchronous_standby_names = ''\n"
    server._write(configuration.name, configuration.read_text() + line)
