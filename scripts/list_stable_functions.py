"""Write the two data modules that the reader of statements takes from PostgreSQL's own catalogs.

    python scripts/list_stable_functions.py

Both are the same for every run against the same versions of PostgreSQL. Needs the extra `testing`.
"""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from resilient_pool.testing import EmbeddedPostgres

VERSIONS = (16, 18)
SQL = Path(__file__).resolve().parent.parent / "resilient_pool" / "sql"

STABLE_FUNCTIONS_QUERY = r"""
SELECT proname::text
FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace
GROUP BY proname
HAVING bool_and(provolatile IN ('i', 's'))
    -- Parts of the machinery, which no statement can or should call by name.
    AND bool_and(NOT ARRAY['internal', 'cstring']::regtype[]::oid[] && (proargtypes::oid[] || prorettype))
    AND bool_and(prorettype::regtype::text NOT LIKE '%trigger' AND prorettype::regtype::text NOT LIKE '%\_handler')
    AND proname NOT LIKE '%\_validator'
    AND proname NOT LIKE 'pg\_event\_trigger\_%'
    -- They run a query of their own, over tables that the statement does not name.
    AND proname !~ '_to_xml(schema|_and_xmlschema)?$'
    -- The first two give the transaction an id, which a statement that writes nothing does not have; the others run the
    -- checks of a type that the statement does not name.
    AND proname NOT IN ('pg_current_xact_id', 'txid_current', 'pg_input_is_valid', 'pg_input_error_info')
"""
KEYWORDS_QUERY = "SELECT word, catcode::text FROM pg_get_keywords()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What one version's catalogs say.

    Attributes:
        functions: The names of the functions of which every overload is stable or immutable.
        keywords: The category of each keyword: R(eserved), C(olumn name), T(ype or function name), U(nreserved).
    """

    functions: frozenset[str]
    keywords: Mapping[str, str]

    def words(self, categories: str) -> frozenset[str]:
        """Return the keywords of those categories."""
        return frozenset(word for word, category in self.keywords.items() if category in categories)


async def read_catalog(server: EmbeddedPostgres) -> Catalog:
    """Ask a running server."""
    async with server.admin() as connection:
        functions = await connection.fetch(STABLE_FUNCTIONS_QUERY)
        keywords = await connection.fetch(KEYWORDS_QUERY)
    return Catalog(functions=frozenset(row[0] for row in functions), keywords=dict(keywords))


def in_all(catalogs: Iterable[Catalog], select: Callable[[Catalog], frozenset[str]]) -> frozenset[str]:
    """Return what is selected from every catalog."""
    return frozenset.intersection(*map(select, catalogs))


def in_any(catalogs: Iterable[Catalog], select: Callable[[Catalog], frozenset[str]]) -> frozenset[str]:
    """Return what is selected from at least one catalog."""
    return frozenset.union(*map(select, catalogs))


def as_set(name: str, words: Iterable[str], explanation: str) -> str:
    """Write one set of words as Python."""
    lines = textwrap.fill(" ".join(sorted(words)), width=116, break_long_words=False, break_on_hyphens=False)
    return f'_{name} = """\n{lines}\n"""\n\n{name} = frozenset(_{name}.split())\n"""{explanation}"""\n'


def modules(catalogs: Iterable[Catalog]) -> dict[str, str]:
    """Write both modules, by file name."""
    catalogs = tuple(catalogs)
    versions = " and ".join(map(str, VERSIONS))
    functions = as_set(
        "STABLE_FUNCTIONS",
        in_all(catalogs, lambda catalog: catalog.functions),
        "Their names, for any arguments.",
    )
    keywords = (
        as_set(
            "RESERVED_WORDS",
            in_all(catalogs, lambda catalog: catalog.words("R")),
            "Words that, unquoted, name nothing of the user's.",
        ),
        as_set(
            "CONSTRUCT_WORDS",
            in_all(catalogs, lambda catalog: catalog.words("C")),
            "Words that, unquoted, name no function or type of the user's: before a parenthesis, a construct of the language.",
        ),
        as_set(
            "KEYWORDS",
            in_any(catalogs, lambda catalog: catalog.words("RCTU")),
            "All words with a meaning in the grammar, the ones above among them.",
        ),
    )
    written_by = "Written by scripts/list_stable_functions.py.\n"
    opening = "from __future__ import annotations\n"
    return {
        "stable_functions.py": f'"""The functions that PostgreSQL {versions} mark stable or immutable in every form: data only.\n\n'
        f'{written_by}"""\n\n{opening}\n{functions}',
        "keywords.py": f'"""The words that the grammar of PostgreSQL {versions} gives a meaning to: data only.\n\n'
        f'{written_by}"""\n\n{opening}\n' + "\n".join(keywords),
    }


async def main() -> None:
    """Ask the servers, write the modules."""
    catalogs = []
    for version in VERSIONS:
        async with EmbeddedPostgres(version) as server:
            catalogs.append(await read_catalog(server))
    for name, text in modules(catalogs).items():
        (SQL / name).write_text(text)


if __name__ == "__main__":
    asyncio.run(main())
