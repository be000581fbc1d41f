"""Queries about transactions: a token before COMMIT identifies one, and with it the server says whether a lost COMMIT took effect."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import asyncpg

from resilient_pool.events import OutcomeResolved
from resilient_pool.execution.read_check import ReadCheck
from resilient_pool.pooling.acquire import Acquirer
from resilient_pool.pooling.context import PoolContext
from resilient_pool.pooling.driver import AnyConnection, DriverConnection
from resilient_pool.pooling.maintenance import Maintenance
from resilient_pool.pooling.resource_pool import PoolEntry
from resilient_pool.retry.classifier import refuses_question
from resilient_pool.retry.commit_status import (
    Capabilities,
    CommitStatus,
    CommitToken,
    Epoch,
    Token,
    XactStatusReply,
    interpret_status,
    interpret_token,
)

_LOGGER = logging.getLogger("resilient_pool")

_EPOCH_FUNCTIONS = ("pg_control_system()", "pg_control_checkpoint()", "pg_current_wal_lsn()", "pg_walfile_name(pg_lsn)")


def _may_execute(role: str) -> str:
    asked = (
        f"pg_catalog.has_function_privilege({role}pg_catalog.to_regprocedure('pg_catalog.{name}'), 'EXECUTE')"
        for name in _EPOCH_FUNCTIONS
    )
    return f"coalesce({' AND '.join(asked)}, false)"


_CAPABILITIES = f"""
    SELECT pg_catalog.to_regprocedure('pg_catalog.pg_xact_status(xid8)') IS NOT NULL AS ids,
           {_may_execute("")} AS epoch,
           {_may_execute("'public', ")} AS epoch_for_all,
           pg_catalog.current_setting('transaction_read_only')::bool AS read_only
"""
# Absent is something else than closed to us.
_LOG = """
    SELECT pg_catalog.to_regclass($1) IS NOT NULL,
           coalesce(pg_catalog.has_table_privilege(pg_catalog.to_regclass($1), 'INSERT'), false)
"""
# Of a standby the last two cannot be asked. The checkpoint's timeline lags behind a promotion; the one that is written now does not.
_EPOCH = """
    (SELECT system_identifier::text FROM pg_catalog.pg_control_system()) AS system,
    CASE WHEN NOT pg_catalog.pg_is_in_recovery()
         THEN pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) END AS timeline,
    (SELECT EXTRACT(epoch FROM stats_reset)::text FROM pg_catalog.pg_stat_bgwriter) AS stats_reset,
    EXTRACT(epoch FROM pg_catalog.pg_postmaster_start_time())::float8 AS started,
    EXTRACT(epoch FROM pg_catalog.clock_timestamp())::float8 AS asked_at
"""
_NO_EPOCH = """
    NULL::text AS system, NULL::text AS timeline, NULL::text AS stats_reset, 0::float8 AS started, 0::float8 AS asked_at
"""
# It gives the transaction an id: that it had none would prove nothing, since notifications, cursors WITH HOLD and foreign
# tables need none before COMMIT.
_ID = """
    pg_catalog.pg_is_in_recovery() AS in_recovery,
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_current_xact_id()::text END AS xid
"""
_NO_ID = "false AS in_recovery, NULL::text AS xid"
# The server's time stands in the token itself (as in a UUID of version 7) and beside it. Both must be past before it is
# deleted. now() would be when the transaction began, which may be long ago.
_WITH_LOG_ROW = """
    INSERT INTO {log} (token, written_at)
    SELECT (pg_catalog.lpad(pg_catalog.to_hex((EXTRACT(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
            || pg_catalog.substr($1::text, 14))::uuid, at
    FROM (SELECT pg_catalog.clock_timestamp() AS at OFFSET 0) AS clock
    RETURNING {columns}, token::text AS token, EXTRACT(epoch FROM written_at)::float8 AS written_at,
              tableoid::text || '/' || pg_catalog.pg_relation_filenode(tableoid) AS log
"""
_STATUS = f"""
    SELECT in_recovery, system, timeline, stats_reset, started, asked_at,
           (SELECT EXTRACT(epoch FROM checkpoint_time)::float8 FROM pg_catalog.pg_control_checkpoint()) AS checkpoint_at,
           CASE WHEN NOT in_recovery AND (system, timeline, stats_reset) = ($2::text, $3::text, $4::text)
                THEN pg_catalog.pg_xact_status($1::text::xid8) END AS status
    FROM (SELECT pg_catalog.pg_is_in_recovery() AS in_recovery, {_EPOCH} OFFSET 0) AS now
"""  # noqa: S608 - nothing in it comes from outside
# One that waits for a standby has committed here already: ending its wait would call durable what is not yet.
_TERMINATE = """
    SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
    WHERE backend_xid = $1::text::xid AND pid <> pg_catalog.pg_backend_pid()
      AND wait_event IS DISTINCT FROM 'SyncRep' AND (state = 'idle in transaction' OR $2::bool)
"""
_FENCE = """
    INSERT INTO {log} (token, written_at, fenced) VALUES ($1::text::uuid, pg_catalog.clock_timestamp(), true)
    ON CONFLICT (token) DO NOTHING
"""
_FENCED = """
    SELECT (SELECT fenced FROM {log} WHERE token = $1::text::uuid) AS fenced,
           EXTRACT(epoch FROM pg_catalog.clock_timestamp())::float8 AS now,
           pg_catalog.to_regclass($2)::oid::text || '/'
           || pg_catalog.pg_relation_filenode(pg_catalog.to_regclass($2)) AS log
"""
# An hour longer than absence is taken for evidence: the clocks of two servers may differ.
_PRUNE = """
    DELETE FROM {log} WHERE token IN (
        SELECT token FROM {log}
        WHERE written_at < pg_catalog.now() - interval '25 hours'
          AND (pg_catalog.substr(token::text, 15, 1) <> '7'
               OR ('x' || pg_catalog.translate(pg_catalog.left(token::text, 13), '-', ''))::bit(48)::bigint
                  < EXTRACT(epoch FROM pg_catalog.now() - interval '25 hours') * 1000)
        LIMIT 5000)
"""
_ISOLATION = """
    SELECT pg_catalog.current_setting('default_transaction_isolation'), reset_val
    FROM pg_catalog.pg_settings WHERE name = 'default_transaction_isolation'
"""

# The server does not support the query, or the role may not send it. After a COMMIT any other error is worth another try.
_UNSUPPORTED = ("42", "0A", "3F")
_DENIED, _READ_ONLY = "42501", "25006"
# Errors of the pool's own query: without it the transaction could have gone on.
_OWN_CLASSES = ("42", "0A", "3F", "23", "22")
_OWN_STATES = frozenset({_READ_ONLY, "55P03"})

_QUERY_TIMEOUT = 2.0
_MIN_RESOLVE_TIME = 5.0
_PRUNE_EVERY = 3600.0
_SAVEPOINT = "resilient_pool"

QueryStatus = Callable[[DriverConnection, bool, bool], Awaitable[CommitStatus]]


class CommitResolver:
    """Finds out, for one pool, what became of transactions whose COMMIT was lost."""

    def __init__(
        self, context: PoolContext, acquirer: Acquirer, maintenance: Maintenance, read_check: ReadCheck
    ) -> None:
        config = context.config
        self._context = context
        self._acquirer = acquirer
        self._maintenance = maintenance
        self._read_check = read_check
        self._clock = context.clock
        self._log = config.commit_log
        # `setup` may take on another role at every use, and without resets one may be left from the use before.
        self._uses_savepoints = self._log is not None and (config.setup is not None or config.session_reset == "off")
        self._sets_up_sessions = config.session_reset == "off" or any(
            callback is not None for callback in (config.setup, config.init, config.reset, config.connect)
        )
        self._warned = False
        self._pruned: float | None = None

    # Before COMMIT

    async def detect_capabilities(self, driver: DriverConnection) -> None:
        """Find out, once for each connection, which queries it supports, and create the commit log. No transaction may be open.

        What could not be found out now, because of a time limit for example, is tried again before the next transaction.
        """
        if driver.capabilities is not None:
            return
        try:
            row = await asyncpg.Connection.fetchrow(driver.connection, _CAPABILITIES)
        except asyncpg.PostgresError as error:
            if driver.connection.is_closed():
                raise
            if refuses_question(error):
                driver.capabilities = Capabilities()
                if self._log is not None:
                    self._warn(f"the server does not say whether it can be ({error})")
            return
        if row is None:
            return
        capabilities = Capabilities(
            ids=row["ids"] and driver.numbers_transactions,
            epoch=row["ids"] and row["epoch"] and driver.numbers_transactions,
            epoch_for_all=row["epoch_for_all"],
        )
        if self._log is not None and not row["read_only"]:  # on a standby it is
            capabilities = replace(capabilities, log=await self._open_log(driver.connection, self._log))
        driver.capabilities = capabilities

    async def _open_log(self, connection: AnyConnection, log: str) -> bool:
        there, writable = await asyncpg.Connection.fetchrow(connection, _LOG, log) or (False, False)
        if there:
            if not writable:
                self._warn("the role of the pool may not insert into it")
            return bool(writable)
        with contextlib.suppress(
            # Made in this very moment by another session: IF NOT EXISTS does not look that closely.
            asyncpg.UniqueViolationError,
            asyncpg.DuplicateTableError,
            asyncpg.DuplicateObjectError,
        ):
            await asyncpg.Connection.execute(
                connection,
                f"CREATE TABLE IF NOT EXISTS {log} (token uuid PRIMARY KEY,"
                " written_at timestamptz NOT NULL DEFAULT now(), fenced bool NOT NULL DEFAULT false)",
            )
        return True

    async def prepare(self, driver: DriverConnection, *, readonly: bool, may_change_session: bool) -> CommitToken:
        """Fetch a token that identifies the open transaction. One round trip; two when a failure of the query is to be undone.

        Args:
            driver: Where the transaction is open.
            readonly: Whether it was begun read-only, so that it can leave no row in the commit log.
            may_change_session: Whether it may run under another role than it began with, or may have become read-only.

        Raises:
            Exception: Whatever the driver raises. The transaction can only be rolled back then.
        """
        capabilities: Capabilities | None = driver.capabilities
        known = capabilities or Capabilities(
            ids=driver.numbers_transactions, epoch=driver.numbers_transactions, log=self._log is not None
        )
        logs = known.log and not readonly
        if not (logs or known.ids):
            return CommitToken()
        may_differ = may_change_session and (logs or not known.epoch_for_all)
        if capabilities is None or self._uses_savepoints or may_differ:
            return await self._prepare_in_savepoint(driver, known, logs=logs)
        try:
            return await self._fetch_token(driver, known, logs=logs)
        except asyncpg.PostgresError as error:
            if is_fault_of_our_query(error, driver):
                # Another server than the one whose capabilities were detected, another role, or a log that was dropped.
                driver.capabilities, self._uses_savepoints = None, True
            raise

    async def _prepare_in_savepoint(self, driver: DriverConnection, known: Capabilities, *, logs: bool) -> CommitToken:
        try:
            await asyncpg.Connection.execute(driver.connection, f"SAVEPOINT {_SAVEPOINT}")
        except asyncpg.PostgresError as error:
            if is_fault_of_our_query(error, driver):
                driver.capabilities = Capabilities()  # nothing can be asked that could be refused
            raise
        for attempt, with_log in ((known, True), (known, False), (replace(known, epoch=False), False)):
            if with_log and not logs:
                continue
            try:
                return await self._fetch_token(driver, attempt, logs=with_log)
            except asyncpg.PostgresError as error:
                if not is_fault_of_our_query(error, driver):
                    raise
                await asyncpg.Connection.execute(driver.connection, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
                if with_log and _state(error) != _READ_ONLY:
                    self._warn(str(error))
        return CommitToken()

    async def _fetch_token(self, driver: DriverConnection, known: Capabilities, *, logs: bool) -> CommitToken:
        columns = f"{_ID if known.ids else _NO_ID}, {_EPOCH if known.epoch else _NO_EPOCH}"
        token = None
        if logs:
            row = await asyncpg.Connection.fetchrow(
                driver.connection, _WITH_LOG_ROW.format(log=self._log, columns=columns), uuid.uuid4().hex
            )
            if row is not None:
                token = Token(value=row["token"], log=row["log"], written_at=row["written_at"])
        else:
            row = await asyncpg.Connection.fetchrow(driver.connection, f"SELECT {columns}")
        if row is None:
            return CommitToken()
        xid = None if row["xid"] is None else int(row["xid"])
        return CommitToken(xid=xid, epoch=_epoch(row), token=token, nothing_written=row["in_recovery"])

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            _LOGGER.warning(
                "the commit log %s cannot be written to: %s. COMMITs are resolved by transaction id only, which a crash or "
                "a failover makes impossible. GRANT SELECT, INSERT, DELETE ON it to every role that transactions run under",
                self._log,
                reason,
            )

    # After it

    async def resolve(
        self, entry: PoolEntry[DriverConnection] | None, commit_token: CommitToken, deadline: float | None
    ) -> CommitStatus:
        """Find out what became of a transaction.

        Args:
            entry: Where its COMMIT was lost. Its connection is closed and replaced, and it is taken back.
            commit_token: What `prepare` returned.
            deadline: Until when to query, on the line of `Clock.monotonic()`; at least for five seconds.
        """
        started = self._clock.monotonic()
        status = await self._query_until(
            entry,
            lambda driver, insist, patient: self._query_status(driver, commit_token, insist=insist, patient=patient),
            deadline,
        )
        if status in (CommitStatus.COMMITTED, CommitStatus.ABORTED):
            elapsed = self._clock.monotonic() - started
            self._context.counters.outcomes_resolved[status.value] += 1
            self._context.events.emit(
                OutcomeResolved(operation="transaction", answer=status.value, xid=commit_token.xid, elapsed=elapsed)
            )
        return status

    async def check_reads(
        self,
        entry: PoolEntry[DriverConnection] | None,
        texts: tuple[str, ...],
        deadline: float | None,
        *,
        decides: bool | None,
    ) -> CommitStatus:
        """Find out whether a transaction of nothing but reads, whose COMMIT was lost, left anything to be done.

        Args:
            entry: Where its COMMIT was lost. Its connection is closed and replaced, and it is taken back.
            texts: What it sent. Each looks like a read.
            deadline: Until when to query.
            decides: Whether its COMMIT can still have refused what was read; `None` if it ran under the default isolation,
                so that it can if that is serializable.

        Returns:
            `COMMITTED` if there is nothing to be done, `ABORTED` if it may be run again under READ ONLY, `UNKNOWN`.
        """

        async def query_status(driver: DriverConnection, _insist: bool, _patient: bool) -> CommitStatus:
            if not await self._read_check.allows(driver, texts, timeout=_QUERY_TIMEOUT):
                return CommitStatus.UNKNOWN
            refuses = decides
            if refuses is None:
                levels = await asyncpg.Connection.fetchrow(driver.connection, _ISOLATION, timeout=_QUERY_TIMEOUT)
                # A default that the application may have set in the session that was lost is not known.
                refuses = self._sets_up_sessions or levels is None or "serializable" in tuple(levels)
            return CommitStatus.ABORTED if refuses else CommitStatus.COMMITTED

        return await self._query_until(entry, query_status, deadline)

    async def _query_until(
        self, entry: PoolEntry[DriverConnection] | None, query_status: QueryStatus, deadline: float | None
    ) -> CommitStatus:
        """Query until there is an answer or time is up, on the entry given, or another one while that cannot be mended."""
        if entry is not None and entry.resource is not None:
            entry.resource.invalidated = True
        began, insist = self._clock.monotonic(), False
        # What is unknown stays unknown for ever, so a transaction that used all its time still gets a last word.
        ends = max(began + _MIN_RESOLVE_TIME, began + 60.0 if deadline is None else deadline)
        delays = self._context.config.backoff.delays()
        try:
            while True:
                patient = self._clock.monotonic() < (began + ends) / 2
                before, entry = entry, None  # while it is checked or replaced it may be lost
                try:
                    entry = await self._acquirer.keep_or_acquire(before, ends)
                    status = await self._query_on(entry, query_status, insist=insist, patient=patient)
                except Exception as error:  # noqa: BLE001 - a query that failed is repeated
                    denied = isinstance(error, asyncpg.PostgresError) and _state(error)[:2] in _UNSUPPORTED
                    status = CommitStatus.ELSEWHERE if denied else CommitStatus.IN_PROGRESS
                if status not in (CommitStatus.IN_PROGRESS, CommitStatus.ELSEWHERE):
                    return status
                left = ends - self._clock.monotonic()
                if left <= 0 or self._maintenance.closing:
                    return CommitStatus.UNKNOWN
                insist = True
                await self._clock.sleep(min(next(delays), left))
        finally:
            if entry is not None:
                self._maintenance.reset_and_release_anywhere(entry)

    @staticmethod
    async def _query_on(
        entry: PoolEntry[DriverConnection], query_status: QueryStatus, *, insist: bool, patient: bool
    ) -> CommitStatus:
        if entry.resource is None:
            return CommitStatus.IN_PROGRESS
        status = await query_status(entry.resource, insist, patient)
        if status is CommitStatus.ELSEWHERE:
            entry.resource.invalidated = True  # the next connection may lead to another server
        return status

    async def _query_status(
        self, driver: DriverConnection, commit_token: CommitToken, *, insist: bool, patient: bool
    ) -> CommitStatus:
        """Query once.

        Args:
            driver: A connection other than the one that was lost.
            commit_token: Identifies the transaction.
            insist: Whether to end a session that still holds the transaction open.
            patient: Whether to spare it while it is working on its COMMIT.
        """
        status = await self._query_xact_status(driver.connection, commit_token)
        if status is CommitStatus.IN_PROGRESS and insist and commit_token.xid is not None:
            with contextlib.suppress(asyncpg.PostgresError):  # the role may not
                await asyncpg.Connection.fetch(
                    driver.connection, _TERMINATE, str(commit_token.xid % 2**32), not patient, timeout=_QUERY_TIMEOUT
                )
        if status is CommitStatus.UNKNOWN and commit_token.token is not None:
            return await self._fence(driver.connection, commit_token.token)
        return status

    async def _query_xact_status(self, connection: AnyConnection, commit_token: CommitToken) -> CommitStatus:
        epoch = commit_token.epoch
        if commit_token.xid is None or epoch is None:
            return CommitStatus.UNKNOWN
        try:
            row = await asyncpg.Connection.fetchrow(
                connection,
                _STATUS,
                str(commit_token.xid),
                epoch.system,
                epoch.timeline,
                epoch.stats_reset,
                timeout=_QUERY_TIMEOUT,
            )
        except asyncpg.PostgresError as error:
            if _state(error)[:2] not in (*_UNSUPPORTED, "22"):
                raise
            # Another server than the one that gave the id, or the role may not query it any more.
            return CommitStatus.UNKNOWN if commit_token.token is not None else CommitStatus.ELSEWHERE
        if row is None:
            return CommitStatus.UNKNOWN
        return interpret_status(
            commit_token, XactStatusReply(status=row["status"], in_recovery=row["in_recovery"], epoch=_epoch(row))
        )

    async def _fence(self, connection: AnyConnection, token: Token) -> CommitStatus:
        """Insert the token ourselves. It waits for a transaction that has inserted it and is not decided yet."""
        try:
            await asyncpg.Connection.execute(
                connection, _FENCE.format(log=self._log), token.value, timeout=_QUERY_TIMEOUT
            )
            row = await asyncpg.Connection.fetchrow(
                connection, _FENCED.format(log=self._log), token.value, self._log, timeout=_QUERY_TIMEOUT
            )
        except asyncpg.PostgresError as error:
            if _state(error) == _READ_ONLY:
                return CommitStatus.ELSEWHERE
            if _state(error)[:2] in _UNSUPPORTED:
                return CommitStatus.UNKNOWN
            raise
        if row is None:
            return CommitStatus.UNKNOWN
        return interpret_token(token, fenced=row["fenced"], log=row["log"], now=row["now"])

    # The log

    def prune(self) -> None:
        """Delete in the background, once an hour at most, what is older than 25 hours."""
        now = self._clock.now()
        if self._log is None or (self._pruned is not None and now - self._pruned < _PRUNE_EVERY):
            return
        self._pruned = now
        self._maintenance.run_in_background(self._prune())

    async def _prune(self) -> None:
        with contextlib.suppress(Exception):  # nothing waits for it, and the next hour brings another chance
            entry = await self._acquirer.keep_or_acquire(None, self._clock.monotonic() + _MIN_RESOLVE_TIME)
            try:
                await self._prune_on(entry)
            finally:
                self._maintenance.reset_and_release_anywhere(entry)

    async def _prune_on(self, entry: PoolEntry[DriverConnection]) -> None:
        done = None
        while done != "DELETE 0" and entry.resource is not None and not self._maintenance.closing:
            done = await asyncpg.Connection.execute(
                entry.resource.connection, _PRUNE.format(log=self._log), timeout=_MIN_RESOLVE_TIME
            )


def is_fault_of_our_query(error: Exception, driver: DriverConnection) -> bool:
    """Whether an error of `CommitResolver.prepare` is caused by its query alone: without it the transaction could have gone on."""
    if not isinstance(error, asyncpg.PostgresError) or driver.connection.is_closed():
        return False
    state = _state(error)
    return state[:2] in _OWN_CLASSES or state in _OWN_STATES


def _state(error: asyncpg.PostgresError) -> str:
    return error.sqlstate or ""


def _epoch(row: Any) -> Epoch | None:
    system, timeline, stats_reset = row["system"], row["timeline"], row["stats_reset"]
    if system is None or timeline is None or stats_reset is None:
        return None
    return Epoch(
        system=system,
        timeline=timeline,
        stats_reset=stats_reset,
        started=row["started"],
        asked_at=row["asked_at"],
        checkpoint_at=row.get("checkpoint_at", 0.0),
    )
