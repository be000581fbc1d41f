"""Which texts visibly leave something in their session, to the end of the session."""

from __future__ import annotations

import pytest

from resilient_pool.sql.session_state import LISTENER, LOCK, SETTING, session_state

LEAVES = [
    ("LISTEN news", LISTENER),
    ("LISTEN", LISTENER),  # as `add_listener()` says it
    ("SELECT 1; listen news;", LISTENER),
    ("SELECT pg_advisory_lock(1)", LOCK),
    ("SELECT pg_catalog.pg_try_advisory_lock ( 1, 2 )", LOCK),
    ('SELECT "pg_advisory_lock_shared"(1)', LOCK),
    ("INSERT INTO t SELECT 1 WHERE pg_try_advisory_lock_shared(7)", LOCK),
    ("SET search_path TO tenant", SETTING),
    ("/* a tenant's */ set SESSION statement_timeout = 5", SETTING),
    ("SET ROLE tenant", SETTING),
    ("SELECT 1; SET work_mem = '8MB'", SETTING),
]
LEAVES_NOTHING = [
    "SELECT 1",
    "SELECT 'LISTEN news'",
    "-- LISTEN news\nSELECT 1",
    "UNLISTEN news",
    "SELECT pg_advisory_xact_lock(1), pg_advisory_unlock(1)",
    "SELECT pg_advisory_lock FROM t",
    "SET LOCAL search_path TO tenant",
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET CONSTRAINTS ALL DEFERRED",
    "SET TimeZone = 'UTC'",
    "SET TIME ZONE 'UTC'",
    "SET SESSION application_name = 'x'",
    "SET NAMES 'UTF8'",
    "UPDATE t SET listen = 1",
    "ALTER ROLE r SET search_path TO tenant",
    "",
]


@pytest.mark.parametrize(("sql", "state"), LEAVES)
def test_what_a_text_leaves_in_its_session_is_seen(sql, state):
    """Wherever in the text it stands."""
    assert session_state(sql) is state


@pytest.mark.parametrize("sql", LEAVES_NOTHING)
def test_what_ends_with_the_transaction_or_is_followed_by_poolers_is_not_taken_for_it(sql):
    """Nor words in strings, comments and names."""
    assert session_state(sql) is None
