"""Writes resilient_pool/config/settings_names.py: the settings that a session may bring along, as real servers list them.

Run it from the repository's root: `python scripts/list_server_settings.py`.
"""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path

from resilient_pool.testing import EmbeddedPostgres

VERSIONS = (16, 18)
TARGET = Path("resilient_pool/config/settings_names.py")
QUERY = """
SELECT lower(name) AS name FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend')
"""


async def names(version: int) -> set[str]:
    """Return the names that one server lists."""
    async with EmbeddedPostgres(version=version) as server, server.admin() as connection:
        return {row["name"] for row in await connection.fetch(QUERY)}


def main() -> None:
    """Ask every supported server and write the module."""
    found = set().union(*[asyncio.run(names(version)) for version in VERSIONS])
    listed = textwrap.fill(" ".join(sorted(found)), width=110, break_on_hyphens=False)
    versions = " and ".join(map(str, VERSIONS))
    TARGET.write_text(
        '"""Only data: the PostgreSQL settings that a session may bring along, in lower case.\n\n'
        f"Written by scripts/list_server_settings.py from the `pg_settings` of PostgreSQL {versions}.\n"
        '"""\n\nfrom __future__ import annotations\n\n'
        f'SETTINGS_NAMES = frozenset(\n    """\n{textwrap.indent(listed, " " * 4)}\n'
        '    """.split()  # noqa: SIM905 - one text is easier to compare with what a server lists\n)\n'
    )


if __name__ == "__main__":
    main()
