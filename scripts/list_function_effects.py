"""Write the data module of PostgreSQL's own functions that have effects, from its catalogs and from running them.

    python scripts/list_function_effects.py

A read-only transaction stops what changes tables, sequences and large objects. It lets pass notifications, advisory locks,
settings, replication slots, statistics and signals to other processes, so a statement that names such a function must not
be repeated even there.

* A volatile function is taken to have effects, unless a call of it in `HARMLESS` was seen to leave nothing behind.
* A stable or immutable one is taken to have none, unless it was seen to have one when called with arguments that invite
  it: a query that notifies, as text; a view that notifies, as relation. So those are found that run a text, or read a
  relation, that the statement does not name.
* `ARGUED` adds what cannot be seen that way.

Needs the extra `testing`.
"""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from resilient_pool.testing import EmbeddedPostgres

VERSIONS = (16, 18)
HERE = Path(__file__).resolve().parent
MODULE = HERE.parent / "resilient_pool" / "sql" / "function_effects.py"

ARGUED = {
    # Run the checks of a type whose name is in a string, which the statement's own names do not show.
    "pg_input_is_valid",
    "pg_input_error_info",
    *("array_in", "domain_in", "multirange_in", "range_in", "record_in"),
    # Calls the hash function of a partitioned table's operator class, of a table that is named in a string.
    "satisfies_hash_partition",
    # contrib/tablefunc and contrib/xml2 mark these stable; they run a query that is in a string.
    *("crosstab", "crosstab2", "crosstab3", "crosstab4", "connectby", "xpath_table"),
    # contrib/dblink and contrib/adminpack: another session, and the server's files. Volatile, and so found by their
    # catalog entries where they are installed; named here for what is decided without a server.
    *("dblink", "dblink_exec", "dblink_connect", "dblink_connect_u", "dblink_disconnect", "dblink_open"),
    *("dblink_fetch", "dblink_close", "dblink_send_query", "dblink_get_result", "dblink_cancel_query"),
    *("pg_file_write", "pg_file_sync", "pg_file_rename", "pg_file_unlink", "pg_logdir_ls"),
    # Run a query, or read a relation, that is named in a string. Servers built without libxml cannot run them.
    *("table_to_xml", "table_to_xmlschema", "table_to_xml_and_xmlschema"),
    *("schema_to_xml", "schema_to_xmlschema", "schema_to_xml_and_xmlschema"),
    *("database_to_xml", "database_to_xmlschema", "database_to_xml_and_xmlschema"),
}
"""Taken to have effects for the reason given."""

HARMLESS = """
    array_sample(ARRAY[1, 2], 1)
    array_shuffle(ARRAY[1, 2])
    clock_timestamp()
    current_query()
    currval('probe_sequence')
    lastval()
    lo_get(4242)
    gen_random_uuid()
    uuidv4()
    uuidv7()
    random()
    random_normal()
    timeofday()
    pg_sleep(0)
    pg_sleep_for('0 s')
    pg_sleep_until('2000-01-01')
    pg_available_wal_summaries()
    pg_blocking_pids(1)
    pg_safe_snapshot_blocking_pids(1)
    pg_isolation_test_session_is_blocked(1, '{}')
    pg_collation_actual_version('"C"'::regcollation)
    pg_database_collation_actual_version(1)
    pg_control_checkpoint()
    pg_control_init()
    pg_control_recovery()
    pg_control_system()
    pg_current_logfile()
    pg_current_wal_flush_lsn()
    pg_current_wal_insert_lsn()
    pg_current_wal_lsn()
    pg_database_size('postgres')
    pg_get_aios()
    pg_get_backend_memory_contexts()
    pg_get_loaded_modules()
    pg_get_sequence_data('probe_sequence')
    pg_get_shmem_allocations()
    pg_get_wait_events()
    pg_get_wal_resource_managers()
    pg_get_wal_summarizer_state()
    pg_hba_file_rules()
    pg_ident_file_mappings()
    pg_indexes_size('probe_table')
    pg_is_in_recovery()
    pg_jit_available()
    pg_last_wal_receive_lsn()
    pg_last_wal_replay_lsn()
    pg_last_xact_replay_timestamp()
    pg_lock_status()
    pg_ls_archive_statusdir()
    pg_ls_dir('.')
    pg_ls_logicalmapdir()
    pg_ls_logicalsnapdir()
    pg_ls_summariesdir()
    pg_ls_tmpdir()
    pg_ls_waldir()
    pg_notification_queue_usage()
    pg_partition_ancestors('probe_table')
    pg_partition_tree('probe_table')
    pg_prepared_xact()
    pg_read_binary_file('PG_VERSION')
    pg_read_file('PG_VERSION')
    pg_relation_size('probe_table')
    pg_replication_origin_session_is_setup()
    pg_sequence_last_value('probe_sequence')
    pg_show_all_file_settings()
    pg_show_replication_origin_status()
    pg_stat_file('PG_VERSION')
    pg_stat_get_backend_io(pg_backend_pid())
    pg_stat_get_backend_wal(pg_backend_pid())
    pg_stat_get_io()
    pg_stat_get_recovery_prefetch()
    pg_stat_get_xact_blocks_fetched(1)
    pg_stat_get_xact_blocks_hit(1)
    pg_stat_get_xact_function_calls(1)
    pg_stat_get_xact_function_self_time(1)
    pg_stat_get_xact_function_total_time(1)
    pg_stat_get_xact_numscans(1)
    pg_stat_get_xact_tuples_deleted(1)
    pg_stat_get_xact_tuples_fetched(1)
    pg_stat_get_xact_tuples_hot_updated(1)
    pg_stat_get_xact_tuples_inserted(1)
    pg_stat_get_xact_tuples_newpage_updated(1)
    pg_stat_get_xact_tuples_returned(1)
    pg_stat_get_xact_tuples_updated(1)
    pg_stat_have_stats('database', 1, 1)
    pg_table_size('probe_table')
    pg_tablespace_size('pg_default')
    pg_total_relation_size('probe_table')
    pg_xact_commit_timestamp('1')
    pg_xact_commit_timestamp_origin('1')
    pg_xact_status('3')
    txid_status(3)
"""
"""Calls of volatile functions that are expected to leave nothing behind. What they show changes; what there is does not."""

SETUP = """
CREATE TABLE probe_table (x int);
CREATE SEQUENCE probe_sequence;
CREATE VIEW probe_view AS SELECT 1 AS x, pg_catalog.pg_notify('probe', 'view')::text AS y;
SELECT lo_from_bytea(4242, 'probe');
CREATE SCHEMA probe_schema;
CREATE VIEW probe_schema.probe_view AS SELECT * FROM public.probe_view;
"""
_TIMES = 3
"""The server's own processes leave traces, too: one call that leaves none is enough, and one that leaves some is not."""
TRACES = """
SELECT (SELECT array_agg((locktype, objid, mode)::text) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'),
       (SELECT md5(string_agg(name || '=' || coalesce(setting, ''), ',' ORDER BY name)) FROM pg_settings
        WHERE name <> 'transaction_read_only'),
       (SELECT array_agg(slot_name::text || coalesce(restart_lsn::text, '')) FROM pg_replication_slots),
       (SELECT array_agg(roname) FROM pg_replication_origin),
       (SELECT count(*) FROM pg_largeobject_metadata),
       (SELECT last_value::text || is_called FROM probe_sequence),
       (SELECT count(*) FROM pg_ls_dir('pg_snapshots')),
       (SELECT array_agg(coalesce(stats_reset::text, '')) FROM pg_stat_database),
       (SELECT stats_reset::text FROM pg_stat_bgwriter), (SELECT stats_reset::text FROM pg_stat_wal),
       (SELECT array_agg(stats_reset::text) FROM pg_stat_slru),
       (SELECT array_agg(pid ORDER BY pid) FROM pg_stat_activity WHERE backend_type = 'client backend'),
       pg_conf_load_time(), pg_is_in_recovery(), pg_current_wal_insert_lsn(),
       (SELECT count(*) FROM pg_cursors), (SELECT count(*) FROM pg_prepared_statements), pg_listening_channels()
"""
# Those that take `internal` or are triggers, handlers or validators cannot be called by name with an effect.
CALLABLE = r"""
    pronamespace = 'pg_catalog'::regnamespace
    AND prokind <> 'p'
    AND NOT ARRAY['internal', 'cstring']::regtype[]::oid[] && (proargtypes::oid[] || prorettype)
    AND prorettype::regtype::text NOT LIKE '%trigger' AND prorettype::regtype::text NOT LIKE '%\_handler'
    AND proname NOT LIKE '%\_validator'
"""
VOLATILE = f"SELECT DISTINCT proname::text FROM pg_proc WHERE {CALLABLE} AND provolatile = 'v' ORDER BY 1"  # noqa: S608
OTHERS = f"""
    SELECT oid, proname::text, proargtypes::regtype[]::text[] AS arguments
    FROM pg_proc WHERE {CALLABLE} AND provolatile <> 'v' AND prokind = 'f' ORDER BY proname, oid
"""  # noqa: S608
_QUERY = "'SELECT 1 AS node, pg_catalog.pg_notify(''probe'', ''text'')::text'"
INVITING = {
    "text": _QUERY,
    "regclass": "'public.probe_view'::regclass",
    "oid": "'public.probe_view'::regclass::oid",
    "name": "'probe_schema'::name",
    "boolean": "true",
    "tsquery": "'a'::tsquery",
    "integer": "1",
    "bigint": "1::bigint",
    "refcursor": "'probe'::refcursor",
}
"""Arguments that lead a function to an effect, if it runs a text or reads a relation; NULL for every other type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What was found on one version.

    Attributes:
        effects: The names of the functions that have effects, or are not known to have none.
        harmless: The names of the volatile functions that left nothing behind.
    """

    effects: frozenset[str]
    harmless: frozenset[str]


class Trials:
    """Calls functions on one connection, and sees what they leave behind."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._notified: list[object] = []

    async def prepare(self) -> None:
        """Make what the calls need."""
        await self._connection.execute(SETUP)
        await self._connection.fetchval("SELECT nextval('probe_sequence')")
        await self._connection.add_listener("probe", lambda *told: self._notified.append(told))

    async def call(self, call: str) -> bool | None:
        """Call something in a read-only transaction: whether it left something behind; `None` if it failed."""
        before = await self._traces()
        transaction = self._connection.transaction(readonly=True)
        await transaction.start()
        try:
            await self._connection.execute(f"SELECT * FROM {call}", timeout=5)  # noqa: S608
            has_id = await self._connection.fetchval("SELECT pg_current_xact_id_if_assigned()") is not None
        except (asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            await transaction.rollback()
            return None
        await transaction.commit()
        return has_id or await self._traces() != before

    async def _traces(self) -> tuple[object, ...]:
        # A notification is delivered with the answer that follows it.
        return (*await self._connection.fetchrow(TRACES), len(self._notified))


async def find_effects(server: EmbeddedPostgres) -> Effects:
    """Ask a running server, in a database of its own."""
    async with server.admin() as connection:
        await connection.execute("DROP DATABASE IF EXISTS probe WITH (FORCE)")
        await connection.execute("CREATE DATABASE probe")
    connection = await asyncpg.connect(server.dsn(), database="probe")
    try:
        trials = Trials(connection)
        await trials.prepare()
        volatile = {row[0] for row in await connection.fetch(VOLATILE)}
        harmless = set()
        for call in filter(None, map(str.strip, HARMLESS.splitlines())):
            name = call.partition("(")[0]
            if name in volatile and False in [await trials.call(call) for _ in range(_TIMES)]:
                harmless.add(name)
        found = set()
        for _, name, arguments in await connection.fetch(OTHERS):
            given = ", ".join(INVITING.get(argument, f"NULL::{argument}") for argument in arguments)
            call = f"pg_catalog.{_quoted(name)}({given})"
            if await trials.call(call) and await trials.call(call):
                found.add(name)
    finally:
        await connection.close()
    async with server.admin() as connection:
        await connection.execute("DROP DATABASE probe WITH (FORCE)")
    return Effects(effects=frozenset(volatile - harmless | found | ARGUED), harmless=frozenset(harmless - ARGUED))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def module(found: Iterable[Effects]) -> str:
    """Write the module."""
    as_set = runpy.run_path(str(HERE / "list_stable_functions.py"))["as_set"]
    found = tuple(found)
    effects = frozenset.union(*(each.effects for each in found))
    harmless = frozenset.union(*(each.harmless for each in found)) - effects
    return (
        f'"""The functions of PostgreSQL {" and ".join(map(str, VERSIONS))} that have effects, and the volatile ones that have none: data only.\n\n'
        'Written by scripts/list_function_effects.py.\n"""\n\nfrom __future__ import annotations\n\n'
        + as_set(
            "FUNCTIONS_WITH_EFFECTS",
            effects,
            "Every volatile function that was not seen to be harmless, and others with effects.",
        )
        + "\n"
        + as_set(
            "HARMLESS_FUNCTIONS", harmless, "Volatile functions that leave nothing behind: clocks, chance, statistics."
        )
    )


async def main() -> None:
    """Ask the servers, write the module."""
    found = []
    for version in VERSIONS:
        async with EmbeddedPostgres(version) as server:
            found.append(await find_effects(server))
    MODULE.write_text(module(found))


if __name__ == "__main__":
    asyncio.run(main())
