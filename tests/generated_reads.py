"""Writes SELECTs that name functions wherever PostgreSQL's grammar lets one: over the probes of `disguises.py`.

`Writer` makes one choice after the other with `choose`, so hypothesis can make them, remember them and make them smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Functions from int to int, with effects and without.
FUNCTIONS = (
    *("audit", "rollup", "elsewhere.hidden", '"Tell Me"', "größe", "by_default", "wants", "fixed", "steady", "abs"),
    "a_function_whose_name_is_exactly_as_long_as_postgresql_allows63",
)
ATTRIBUTES = ("audit", "rollup", '"Tell Me"', "größe", "fixed", "steady", "abs", "pg_advisory_lock", "lo_create")
TREATED = ("pg_advisory_lock", "lo_create", "abs", "int4")
CALLS = (
    "nextval('numbers')::int",
    "setval('numbers', {0})::int",
    "lo_create(0)::int",
    "pg_try_advisory_lock({0})::int",
    "length(pg_advisory_lock({0})::text)",
    "length(set_config('application_name', {0}::text, false))",
    "length(pg_notify('effects', {0}::text)::text)",
    "length(pg_logical_emit_message(false, 'a', 'b')::text)",
    "length(log({0}::text)::text)",
    "age({0}::text)",
    "length(random()::text)",
    "length(clock_timestamp()::text)",
    "1 + {0}",
    "length(pg_input_is_valid('5', 'positive')::text)",
    "length(array_in('{{5}}', 'positive'::regtype, -1)::text)",
    "length((NOT ({0} ===! 5))::text)",
    "length((3 >># {0})::text)",
    "length(('[1,5)'::telling_span)::text)",
    "length((SELECT count(DISTINCT p) FROM paired)::text)",
    "length((SELECT count(DISTINCT s) FROM spotted)::text)",
    "length((SELECT count(*) FROM hash_parted WHERE a = {0})::text)",
)
OPERATORS = (
    *(
        "+",
        "-",
        "*",
        "OPERATOR(pg_catalog.+)",
        "@+@",
        "OPERATOR(public.@+@)",
        "OPERATOR(elsewhere.<->)",
        "@+@ -",
        "+ @",
    ),
    *("@+@ @", "/* a */ @+@ -- b\n"),
)
TYPES = (*("positive", "more_positive", "small", "int", "public.positive", '"positive"', "numeric(10, 2)", "int4"),)
COMPARISONS = (
    "=",
    "<>",
    "<",
    "IS DISTINCT FROM",
    "IS NOT DISTINCT FROM",
    "OPERATOR(pg_catalog.<>)",
    "> ALL (ARRAY[1]) OR 1 =",
)
VIEWS = (
    "telling",
    "over_telling",
    "notifying",
    "locking",
    "configuring",
    "counting",
    "checking",
    "sequenced",
    "plain",
    "over_plain",
    "kept",
)
HONEST = {
    "fixed",
    "steady",
    "abs",
    "int4",
    "+",
    "-",
    "*",
    "OPERATOR(pg_catalog.+)",
    "+ @",
    "small",
    "int",
    "numeric(10, 2)",
    "plain",
    "kept",
    "over_plain",
    "length(random()::text)",
    "length(clock_timestamp()::text)",
    "1 + {0}",
}
"""What of all these has no effect."""
BLANKS = (" ", " ", " ", "/**/", "\n", "-- x\n", "/* /* a */ ' */")


class Writer:
    """Writes one statement.

    Args:
        choose: Chooses one of several things.
    """

    def __init__(self, choose: Callable[[Sequence[str]], str]) -> None:
        self._choose = choose
        self._aliases: list[str] = []
        self._number = 0
        self._honest = int(choose(("0", "4", "4", "20")))

    def statement(self) -> str:
        """Write a statement."""
        form = self._choose(
            (
                "{0}",
                "{0}",
                "{0};",
                "({0})",
                "VALUES ({1}), ({1})",
                "WITH c AS {2}({0}) SELECT * FROM c",
                "WITH c(a) AS (SELECT {1}) SELECT c.a FROM c",
            )
        )
        return form.format(
            self._query(3), self._expression(2), self._choose(("", "MATERIALIZED ", "NOT MATERIALIZED "))
        )

    def _query(self, depth: int) -> str:
        outer, self._aliases = self._aliases, []
        source = self._from(depth)
        select = ", ".join(self._expression(depth) for _ in range(int(self._choose(("1", "1", "2")))))
        distinct = self._choose(("", "", "", "DISTINCT ", "DISTINCT ON (1) ", "ALL "))
        where = self._choose(("", "", " WHERE {0}")).format(self._condition(depth - 1))
        group = self._choose(
            (
                "",
                "",
                "",
                " GROUP BY {0}",
                " GROUP BY ARRAY[1, {0}]",
                " GROUP BY ROLLUP ({0})",
                " GROUP BY 1 + {0}, CUBE ({0})",
                " GROUP BY GROUPING SETS ((), ARRAY[1, {0}])",
                " GROUP BY DISTINCT {0}",
            )
        ).format(self._expression(depth - 1))
        order = self._choose(("", "", " ORDER BY {0}", " LIMIT {0}", " OFFSET {0}", " HAVING {1}")).format(
            self._expression(depth - 1), self._condition(depth - 1)
        )
        self._aliases = outer
        select = "count(*)" if group and self._choose(("yes", "no")) == "yes" else select
        return f"SELECT{self._blank()}{distinct}{select}{source}{where}{group}{order}"

    def _from(self, depth: int) -> str:
        items = [self._item(depth - 1) for _ in range(int(self._choose(("0", "1", "1", "2"))))]
        if not items:
            return ""
        if len(items) == 1:
            return f"{self._blank()}FROM{self._blank()}{items[0]}"
        between = self._choose((", ", " CROSS JOIN ", " JOIN {0} ON {1}", " LEFT JOIN {0} ON {1}"))
        if "{0}" in between:
            condition = self._choose(("{0}", "ARRAY[1, 2] = ARRAY[1, {1}] AND {0}", "(ARRAY[1, 2])[1] = {1} AND {0}"))
            condition = condition.format(self._condition(depth - 1), self._expression(depth - 1))
            return f" FROM {items[0]}" + between.format(items[1], condition)
        return f" FROM {items[0]}{between}{items[1]}"

    def _item(self, depth: int) -> str:
        self._number += 1
        alias = f"x{self._number}"
        item = self._choose(
            (
                f"users {alias}",
                f"generate_series(1, 2) {alias}",
                f"generate_series(1, 2::bigint) AS {alias}",
                f"unnest(ARRAY[{{0}}, 2]) WITH ORDINALITY AS {alias}(a, b)",
                f"ROWS FROM (generate_series(1, 2), {{1}}({{0}})) {alias}",
                f"{{1}}({{0}}) AS {alias}",
                f"LATERAL {{1}}({{0}}) {alias}",
                f"CAST({{0}} AS int) AS {alias}",
                f"coalesce({{0}}) AS {alias}",
                f"to_regclass('numbers') {alias}",
                f"(SELECT {{0}} AS a) {alias}",
                f"(VALUES ({{0}})) AS {alias}(a)",
                f"{{2}} {alias}",
                f"users AS {alias} TABLESAMPLE SYSTEM (100)",
                f"json_to_record('{{{{\"a\": 5}}}}') AS {alias}(a {{3}})",
                f"parted {alias}",
            )
        ).format(self._expression(depth), self._word(FUNCTIONS), self._word(VIEWS), self._word(TYPES))
        self._aliases.append(f"{alias}.id" if item.startswith("users") else f"length({alias}::text)")
        if " " not in item.partition(alias)[0].strip() and "(" in item:  # the value of a function
            self._aliases.append(f"length(({alias}.{self._word(ATTRIBUTES)})::text)")
        return item

    def _condition(self, depth: int) -> str:
        if depth < 0:
            return "true"
        return self._choose(
            (
                "{0} {2} {1}",
                "{0} IN (1, {1})",
                "{0} BETWEEN 0 AND {1}",
                "EXISTS (SELECT {0})",
                "NOT ({0} = {1})",
                "{0}::text LIKE ('a' || {1}::text)",
                "{0} = ANY (ARRAY[1, {1}])",
                "({0}, 1) = ({1}, 1)",
            )
        ).format(self._expression(depth - 1), self._expression(depth - 1), self._choose(COMPARISONS))

    def _expression(self, depth: int) -> str:
        if depth < 0:
            return self._choose(("1", "2", "5", "$$7$$::int", *self._aliases[:2]))
        form = self._choose(
            (
                *("{0}", "{0} {6} {1}", "{4}({0})", "({0})::{2}::int", "CASE WHEN {9} THEN {0} ELSE {1} END")
                * self._honest,
                "{0}",
                "{4}({0})",
                "{4}{7}({0})",
                "{5}",
                "{0} {6} {1}",
                "length(({0}).{8}::text)",
                "length((ARRAY[{0}, {1}])[1].{8}::text)",
                "(SELECT length(s.{8}::text) FROM generate_series(1, {0}) s LIMIT 1)",
                "(SELECT s.nextval::int FROM regclass('numbers'::text) AS s)",
                "length(TREAT({0} AS {10})::text)",
                "({0})::{2}::int",
                "CAST({0} AS {2})::int",
                "({2} '5')::int",
                "unwrap(({0})::wrapped)",
                "CASE WHEN {9} THEN {0} ELSE {1} END",
                "coalesce({0}, {1})",
                "nullif({0}, {1})",
                "(ARRAY[{0}, {1}])[{0}]",
                "(SELECT total(v) FROM (VALUES ({0})) w(v))",
                "(SELECT max(v) OVER (ORDER BY {0}) FROM (VALUES ({1})) w(v) LIMIT 1)",
                "({3})",
                "EXTRACT(year FROM now())::int + {0}",
                "length(substring('abc' FROM {0}))",
                "('{{5}}'::positive[])[1]",
                "(_positive '{{5}}')[{0}]",
                "(SELECT length(u.touch::text) FROM users u)",
            )
        )
        attribute = self._spelled(self._word(ATTRIBUTES))
        return form.format(
            self._expression(depth - 1),
            self._expression(depth - 2),
            self._word(TYPES),
            self._query(depth - 2) if depth > 1 and "{3}" in form else "SELECT 1",
            self._spelled(self._word(FUNCTIONS)),
            self._word(CALLS).format(self._expression(depth - 2)),
            self._word(OPERATORS),
            self._blank(),
            attribute,
            self._condition(depth - 2),
            self._word(TREATED),
        )

    def _word(self, words: Sequence[str]) -> str:
        # Most texts are honest but for one word or two: it is these that could be taken for reads.
        honest = [word for word in words if word in HONEST]
        return self._choose((*(honest * self._honest), *words))

    def _spelled(self, name: str) -> str:
        if '"' in name or "." in name or not name.isascii():
            return name
        return self._choose((name, name, name.upper(), f'"{name}"', f"{name}/**/"))

    def _blank(self) -> str:
        return self._choose(BLANKS)
