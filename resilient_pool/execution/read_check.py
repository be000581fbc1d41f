"""Asks a server's catalog whether what looks like a read calls nothing that may write: `ReadCheck`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import asyncpg

from resilient_pool.pooling.driver import DriverConnection
from resilient_pool.retry.classifier import refuses_question
from resilient_pool.sql.function_effects import FUNCTIONS_WITH_EFFECTS, HARMLESS_FUNCTIONS
from resilient_pool.sql.read_only import StatementReader

_REMEMBERED = 1024
_KEPT = 10.0
"""For how many seconds: long enough for what a restart cuts off at once, and short beside the time between migrations."""

# What a text reaches: `r`elations, `t`ypes, functions (`p`), `o`perators and operator `f`amilies, from the names and operators
# in it. Names count in every schema, so a search_path hides nothing. Beyond the names:
#
# * a view's query, a table's policies, a domain's checks and the default arguments of functions are stored as trees of
#   nodes. PostgreSQL's own functions are taken from the fields that call one: dependencies on them are not recorded. Every
#   number that can be the OID of a user's object is taken for one.
# * a relation reaches its partitions and children, and its row type; a type its base, element, attributes and subtype, its
#   casts, and what it is read, written and compared with; a function its arguments' and result's types, and an aggregate,
#   which PostgreSQL always calls immutable, its parts. Casts between two types of PostgreSQL's own can be anywhere.
# * operators that a construct implies (IN, LIKE, JOIN ... USING) need not be in the text. Others are found through what is
#   compared: DISTINCT, GROUP BY, ORDER BY and UNION use the type's default operator class, whatever its operators are
#   called. The planner puts an operator's negator or commutator in its place, or another member of its family, and calls a
#   family's support functions for sorts, searches in an index, ranges and the choice of partitions.
_REACHED = """
WITH RECURSIVE
named AS MATERIALIZED (SELECT DISTINCT n::name AS name FROM pg_catalog.unnest($1::text[]) AS n),
operator AS MATERIALIZED (
    SELECT o.oid, oprleft, oprright FROM pg_catalog.pg_operator AS o
    WHERE o.oid >= 16384
      AND (o.oprname IN ('=', '<>', '<', '>', '<=', '>=', '~', '!~', '~*', '!~*', '~~', '!~~', '~~*', '!~~*', '-', '||')
           OR EXISTS (SELECT FROM pg_catalog.unnest($2::text[]) AS run WHERE pg_catalog.strpos(run, o.oprname::text) > 0))
),
compared AS MATERIALIZED (
    SELECT opcintype AS type, opcfamily AS family FROM pg_catalog.pg_opclass WHERE opcintype >= 16384
    UNION SELECT member, amopfamily FROM pg_catalog.pg_amop, pg_catalog.unnest(ARRAY[amoplefttype, amoprighttype]) AS member
    WHERE member >= 16384
    UNION SELECT member, amprocfamily FROM pg_catalog.pg_amproc, pg_catalog.unnest(ARRAY[amproclefttype, amprocrighttype]) AS member
    WHERE member >= 16384
),
class AS MATERIALIZED (SELECT c.oid, opcfamily FROM pg_catalog.pg_opclass AS c WHERE c.oid >= 16384),
reached (class, oid) AS (
    (SELECT 'r', c.oid FROM pg_catalog.pg_class AS c JOIN named ON c.relname = named.name WHERE c.oid >= 16384
     UNION ALL
     SELECT 't', t.oid FROM pg_catalog.pg_type AS t JOIN named ON t.typname = named.name WHERE t.oid >= 16384
     UNION ALL
     SELECT 'p', p.oid FROM pg_catalog.pg_proc AS p JOIN named ON p.proname = named.name
     UNION ALL
     SELECT 'o', o.oid FROM operator AS o WHERE oprleft < 16384 AND oprright < 16384
     UNION ALL
     SELECT 'f', opcfamily FROM pg_catalog.pg_opclass AS c WHERE c.oid >= 16384 AND opcdefault AND opcintype < 16384
     UNION ALL
     SELECT 'p', castfunc FROM pg_catalog.pg_cast
     WHERE castfunc >= 16384 AND castsource < 16384 AND casttarget < 16384)
  UNION
    SELECT edge.class, edge.oid
    FROM reached, LATERAL (
        SELECT 'r', inhrelid FROM pg_catalog.pg_inherits WHERE reached.class = 'r' AND inhparent = reached.oid
        UNION ALL
        SELECT 't', reltype FROM pg_catalog.pg_class AS c WHERE reached.class = 'r' AND c.oid = reached.oid
        UNION ALL
        SELECT 't', pg_catalog.unnest(ARRAY[typbasetype, typelem, typarray]) FROM pg_catalog.pg_type AS t
        WHERE reached.class = 't' AND t.oid = reached.oid
        UNION ALL
        SELECT 'p', put FROM pg_catalog.pg_type AS t, pg_catalog.unnest(ARRAY[typinput, typoutput]::oid[]) AS put
        WHERE reached.class = 't' AND t.oid = reached.oid AND t.typtype = 'b' AND put >= 16384
        UNION ALL
        SELECT 't', atttypid FROM pg_catalog.pg_type AS t JOIN pg_catalog.pg_attribute ON attrelid = typrelid
        WHERE reached.class = 't' AND t.oid = reached.oid AND typrelid <> 0 AND attnum > 0 AND NOT attisdropped
        UNION ALL
        SELECT 't', rngsubtype FROM pg_catalog.pg_range
        WHERE reached.class = 't' AND reached.oid IN (rngtypid, rngmultitypid)
        UNION ALL
        SELECT 'p', pg_catalog.unnest(ARRAY[rngcanonical, rngsubdiff]::oid[]) FROM pg_catalog.pg_range
        WHERE reached.class = 't' AND reached.oid IN (rngtypid, rngmultitypid)
        UNION ALL
        SELECT 'p', castfunc FROM pg_catalog.pg_cast WHERE reached.class = 't' AND reached.oid IN (castsource, casttarget)
        UNION ALL
        SELECT 'o', o.oid FROM operator AS o WHERE reached.class = 't' AND reached.oid IN (oprleft, oprright)
        UNION ALL
        SELECT 'f', family FROM compared WHERE reached.class = 't' AND type = reached.oid
        UNION ALL
        SELECT 'f', opcfamily FROM pg_catalog.pg_range JOIN class ON class.oid = rngsubopc
        WHERE reached.class = 't' AND reached.oid IN (rngtypid, rngmultitypid)
        UNION ALL
        SELECT 'f', opcfamily FROM pg_catalog.pg_index JOIN class ON class.oid = ANY (indclass)
        WHERE reached.class = 'r' AND indrelid = reached.oid
        UNION ALL
        SELECT 'f', opcfamily FROM pg_catalog.pg_partitioned_table JOIN class ON class.oid = ANY (partclass)
        WHERE reached.class = 'r' AND partrelid = reached.oid
        UNION ALL
        SELECT 'p', amproc::oid FROM pg_catalog.pg_amproc
        WHERE reached.class = 'f' AND amprocfamily = reached.oid AND amproc >= 16384
        UNION ALL
        SELECT 'o', amopopr FROM pg_catalog.pg_amop WHERE reached.class = 'f' AND amopfamily = reached.oid
        UNION ALL
        SELECT 'f', amopfamily FROM pg_catalog.pg_amop WHERE reached.class = 'o' AND amopopr = reached.oid
        UNION ALL
        SELECT 'o', pg_catalog.unnest(ARRAY[oprcom, oprnegate]) FROM pg_catalog.pg_operator AS o
        WHERE reached.class = 'o' AND o.oid = reached.oid
        UNION ALL
        SELECT 'p', oprcode::oid FROM pg_catalog.pg_operator AS o WHERE reached.class = 'o' AND o.oid = reached.oid
        UNION ALL
        SELECT 'o', aggsortop FROM pg_catalog.pg_aggregate WHERE reached.class = 'p' AND aggfnoid = reached.oid
        UNION ALL
        SELECT 't', pg_catalog.unnest(p.proargtypes::oid[] || p.proallargtypes || p.prorettype)
        FROM pg_catalog.pg_proc AS p WHERE reached.class = 'p' AND p.oid = reached.oid AND p.oid >= 16384
        UNION ALL
        SELECT 'p', pg_catalog.unnest(ARRAY[aggtransfn, aggfinalfn, aggcombinefn, aggserialfn, aggdeserialfn, aggmtransfn,
                                            aggminvtransfn, aggmfinalfn]::oid[])
        FROM pg_catalog.pg_aggregate WHERE reached.class = 'p' AND aggfnoid = reached.oid AND reached.oid >= 16384
        UNION ALL
        SELECT found.class, found.oid
        FROM (
            SELECT ev_action::text FROM pg_catalog.pg_rewrite JOIN pg_catalog.pg_class AS c ON c.oid = ev_class
            WHERE reached.class = 'r' AND ev_class = reached.oid AND ev_type = '1' AND c.relkind = 'v'
            UNION ALL
            SELECT polqual::text FROM pg_catalog.pg_policy JOIN pg_catalog.pg_class AS c ON c.oid = polrelid
            WHERE reached.class = 'r' AND polrelid = reached.oid AND c.relrowsecurity
            UNION ALL
            SELECT conbin::text FROM pg_catalog.pg_constraint WHERE reached.class = 't' AND contypid = reached.oid
            UNION ALL
            SELECT proargdefaults::text FROM pg_catalog.pg_proc AS p
            WHERE reached.class = 'p' AND p.oid = reached.oid AND p.oid >= 16384
        ) AS stored (tree), LATERAL (
            SELECT 'p', field[1]::oid
            FROM pg_catalog.regexp_matches(tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') AS field
            UNION
            SELECT object.class, object.oid
            FROM (SELECT DISTINCT CASE WHEN number[1]::int8 BETWEEN 16384 AND 4294967295 THEN number[1]::int8::oid END AS oid
                  FROM pg_catalog.regexp_matches(tree, '(?<![0-9])([0-9]{5,10})(?![0-9])', 'g') AS number) AS number,
                LATERAL (
                SELECT 'r', c.oid FROM pg_catalog.pg_class AS c WHERE c.oid = number.oid
                UNION ALL SELECT 't', t.oid FROM pg_catalog.pg_type AS t WHERE t.oid = number.oid
                UNION ALL SELECT 'p', p.oid FROM pg_catalog.pg_proc AS p WHERE p.oid = number.oid
                UNION ALL SELECT 'o', o.oid FROM pg_catalog.pg_operator AS o WHERE o.oid = number.oid
                UNION ALL SELECT 'f', f.oid FROM pg_catalog.pg_opfamily AS f WHERE f.oid = number.oid
            ) AS object (class, oid)
        ) AS found (class, oid)
    ) AS edge (class, oid)
    WHERE edge.oid >= 16384 OR (edge.class IN ('p', 'f') AND edge.oid > 0)
)
"""
# Foreign tables are read by a program that may do anything. Functions of `internal` and triggers cannot be called by name.
_QUESTION = f"""{_REACHED}
SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE proname = 'pg_notify' AND provolatile = 'v' AND oid < 16384)
   AND EXISTS (SELECT FROM pg_catalog.pg_rewrite WHERE ev_class = 'pg_catalog.pg_views'::pg_catalog.regclass)
   AND NOT EXISTS (
        SELECT FROM reached JOIN pg_catalog.pg_class AS c ON reached.class = 'r' AND c.oid = reached.oid
        WHERE c.relkind = 'f')
   AND NOT EXISTS (
        SELECT FROM reached JOIN pg_catalog.pg_proc AS p ON reached.class = 'p' AND p.oid = reached.oid
        JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace
        WHERE p.prokind <> 'p' AND p.prorettype NOT IN (2279, 3838)
          AND NOT 2281 = ANY (p.proargtypes::oid[])
          AND CASE WHEN p.oid < 16384
                THEN p.proname = ANY ($3::text[]) OR (p.provolatile = 'v' AND NOT p.proname = ANY ($4::text[]))
                ELSE (p.provolatile = 'v' OR p.proname = ANY ($3::text[]))
                     AND NOT p.proname = ANY ($5::text[]) AND NOT n.nspname || '.' || p.proname = ANY ($5::text[])
              END)
"""  # noqa: S608 - nothing of a text is in it
_EFFECTS = sorted(FUNCTIONS_WITH_EFFECTS)
_HARMLESS = sorted(HARMLESS_FUNCTIONS)


class ReadCheck:
    """Decides, after a failure only, whether texts that look like reads may be run a second time.

    PostgreSQL's word is believed: a function marked stable or immutable is taken to be so. Functions that were declared in
    `pure_functions=` are not asked about.

    Args:
        reader: Knows what the texts name.
        now: Returns the present time in seconds; answers count for ten. By default they count until `forget()`.
    """

    def __init__(self, reader: StatementReader, now: Callable[[], float] = lambda: 0.0) -> None:
        self.reader = reader
        self._now = now
        self._answers: dict[tuple[frozenset[str], frozenset[str]], tuple[bool, float]] = {}

    async def allows(self, driver: DriverConnection, texts: Iterable[str], *, timeout: float | None = None) -> bool:
        """Whether everything callable that `texts` name is stable or immutable on the server behind `driver`.

        The repeat itself must run inside BEGIN READ ONLY: this is one of three conditions. It takes one query for texts
        that were not asked about within the last seconds, or since the schema is known to have changed.

        Args:
            driver: A connection with no transaction open.
            texts: All of them are asked about at once. One that does not look like a read is not allowed.
            timeout: The limit in seconds. Default: the driver's.

        Raises:
            Exception: What the driver raises when the connection is lost or the time is up.
        """
        statements = [self.reader.read(text) for text in texts]
        if not all(statement.looks_like_read for statement in statements):
            return False
        names = frozenset[str]().union(*(statement.names for statement in statements))
        operators = frozenset[str]().union(*(statement.operators for statement in statements))
        remembered = self._answers.get((names, operators))
        asked_at = self._now()
        if remembered is not None and asked_at < remembered[1] + _KEPT:
            return remembered[0]
        if not driver.has_catalog:
            return False
        try:
            answer = await self._ask(driver, names, operators, timeout)
        except asyncpg.PostgresError as error:
            # Databases that only speak PostgreSQL's protocol have other catalogs. What could not be asked is not allowed.
            if driver.connection.is_closed():
                raise
            driver.has_catalog = not refuses_question(error)
            return False
        if len(self._answers) >= _REMEMBERED:
            self._answers.clear()
        self._answers[names, operators] = answer, asked_at
        return answer

    async def _ask(
        self, driver: DriverConnection, names: frozenset[str], operators: frozenset[str], timeout: float | None
    ) -> bool:
        # In a database of a single-byte encoding PostgreSQL folds letters outside ASCII, too.
        spellings = sorted(names | {name.lower() for name in names})
        arguments = (spellings, sorted(operators), _EFFECTS, _HARMLESS, sorted(self.reader.pure))
        return await driver.fetchval_uncached(_QUESTION, *arguments, timeout=timeout) is True

    def forget(self) -> None:
        """Ask again: the schema has changed."""
        self._answers.clear()
