"""Queries the server for sessions and writes while a migration ran: the half of the evidence that its output cannot give."""

from __future__ import annotations

from dataclasses import dataclass

from resilient_pool.pool import ResilientPool

# Sessions are counted in every database since PostgreSQL 14, each before its first statement can run; the count survives
# a clean restart, and a crash or a fail-over to another server shows in `stats_reset`, as it does in the epoch of a COMMIT.
# A pooler hides sessions, but no write: the ids of transactions are numbered without a gap, for the whole server.
# The connected sessions are read first: a session that ends in between has been counted when its row disappears.
_CONNECTED = "SELECT pg_catalog.array_agg(pid) FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL"
_COUNTED = """
    SELECT (SELECT stats_reset FROM pg_catalog.pg_stat_bgwriter) AS since,
           (SELECT array_agg((datid, stats_reset)::text ORDER BY datid) FROM pg_catalog.pg_stat_database
            WHERE stats_reset IS NOT NULL) AS resets,
           (SELECT sum(sessions)::bigint FROM pg_catalog.pg_stat_database) AS sessions,
           CASE WHEN pg_catalog.pg_is_in_recovery() THEN NULL ELSE pg_catalog.pg_current_xact_id()::text::bigint END AS xid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerActivity:
    """Counters of a server at one moment.

    Attributes:
        server: An identity that differs for another server, and after a crash or a reset of the statistics.
        connected: The process ids of the sessions that are there.
        sessions: How many sessions there have been.
        xid: A transaction id, taken for this question.
        opened: How many connections our own pool had opened by then.
    """

    server: tuple[object, ...]
    connected: frozenset[int]
    sessions: int
    xid: int
    opened: int


async def read_activity(pool: ResilientPool, deadline: float | None) -> ServerActivity | None:
    """Return the server's counters; `None` if it has none (an older server, a standby) or does not answer.

    Args:
        pool: The pool to query with.
        deadline: Seconds that may be spent waiting for the server; `None` is no limit.
    """
    try:
        connected = await pool.fetchval(_CONNECTED, deadline=deadline)
        counted = await pool.fetchrow(_COUNTED, deadline=deadline)
    except Exception:  # noqa: BLE001 - without an answer there is no evidence; the migration itself does not depend on it
        return None
    if counted is None or counted["sessions"] is None or counted["xid"] is None:
        return None
    return ServerActivity(
        server=(counted["since"], tuple(counted["resets"] or ())),
        connected=frozenset(connected or ()),
        sessions=counted["sessions"],
        xid=counted["xid"],
        opened=pool.stats().opened,
    )


def reason_for_doubt(before: ServerActivity | None, after: ServerActivity | None) -> str | None:
    """Say why something may have happened in between, or `None`: then no one but this process began a session or wrote.

    Args:
        before: The counters before the migration began.
        after: The counters after it ended.
    """
    if before is None or after is None:
        return "the server could not be asked (that takes PostgreSQL 14 or newer, and no standby)"
    if before.server != after.server:
        return "the server crashed, is another one, or its statistics were reset meanwhile"
    own = after.opened - before.opened
    others = after.sessions - before.sessions - own
    if others:
        return f"the server counted {max(others, 1)} other session(s) meanwhile, which may have been the migration's"
    if len(after.connected - before.connected) > own:
        return "another session is connected that was not there before, and may be the migration's"
    if after.xid - before.xid != 1:
        return "something was written on the server meanwhile, which may have been the migration"
    return None
