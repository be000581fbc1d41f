"""Asks the server about transactions: who one is before its COMMIT, and what became of it when the answer was lost."""

from __future__ import annotations

import contextlib
import uuid
from typing import Any

import asyncpg

from resilient_pool.config import PoolConfig
from resilient_pool.connection import Lender
from resilient_pool.core.clock import Clock
from resilient_pool.core.resolution import Answer, Epoch, Mark, Reply, judge, judge_token
from resilient_pool.core.slots import Slot
from resilient_pool.core.wire import AnyConnection, Link
from resilient_pool.observe.events import Dispatcher, OutcomeResolved

_ABILITIES = """
    SELECT pg_catalog.to_regprocedure('pg_catalog.pg_xact_status(xid8)') IS NOT NULL,
           pg_catalog.has_function_privilege(pg_catalog.to_regprocedure('pg_catalog.pg_control_system()'), 'EXECUTE')
           AND pg_catalog.has_function_privilege(
               pg_catalog.to_regprocedure('pg_catalog.pg_control_checkpoint()'), 'EXECUTE')
"""
_EPOCH = """
    (SELECT system_identifier::text FROM pg_catalog.pg_control_system()),
    (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()),
    (SELECT EXTRACT(epoch FROM stats_reset)::text FROM pg_catalog.pg_stat_bgwriter)
"""
_NO_EPOCH = "NULL::text, NULL::int, NULL::text"
_ID = "pg_catalog.pg_current_xact_id_if_assigned()"
# NOTIFY gets its id only during COMMIT, too late to be asked for.
_ID_IN_ANY_CASE = "pg_catalog.pg_current_xact_id()"
_STATUS = f"SELECT pg_catalog.pg_xact_status($1::text::xid8), pg_catalog.pg_is_in_recovery(), {_EPOCH}"
# One that waits for a standby has committed here already: ending its wait would call durable what is not yet.
_TERMINATE = """
    SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
    WHERE backend_xid = $1::text::xid AND pid <> pg_catalog.pg_backend_pid()
      AND wait_event IS DISTINCT FROM 'SyncRep' AND (state = 'idle in transaction' OR $2::bool)
"""
_MISSING = frozenset({"42883", "42501", "42P01", "42703", "3F000"})
_FUTURE = "22023"

_ONE_QUESTION = 2.0
_LAST_WORD = 5.0
_PRUNE_EVERY = 3600.0


class Inquiry:
    """Asks, on behalf of one pool.

    Args:
        config: The name of the commit log, and how to wait.
        lender: Where connections come from.
        clock: Counts the deadline.
        dispatcher: Who is told.
    """

    def __init__(self, config: PoolConfig, lender: Lender, clock: Clock, dispatcher: Dispatcher) -> None:
        self._config = config
        self._lender = lender
        self._clock = clock
        self._dispatcher = dispatcher
        self._log = config.commit_log
        self._knows_ids = self._knows_epoch = False
        self._learned = False
        self._pruned: float | None = None

    # Before COMMIT

    async def learn(self, link: Link) -> None:
        """Find out, once, what the server can be asked, and make the commit log. No transaction may be open."""
        if self._learned:
            return
        connection = link.connection
        if self._log is not None and await connection.fetchval("SELECT pg_catalog.to_regclass($1)", self._log) is None:
            await self._make_log(connection)
        try:
            ids, epoch = await connection.fetchrow(_ABILITIES) or (False, False)
        except asyncpg.PostgresError:
            # Databases that only speak PostgreSQL's protocol lack some of these functions.
            if connection.is_closed():
                raise
            ids, epoch = False, False
        self._knows_ids, self._knows_epoch = bool(ids), bool(ids and epoch)
        self._learned = True

    async def _make_log(self, connection: AnyConnection) -> None:
        try:
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS {self._log} (token uuid PRIMARY KEY,"
                " written_at timestamptz NOT NULL DEFAULT now(), fenced bool NOT NULL DEFAULT false)"
            )
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError):
            # Somebody else made it in this very moment: IF NOT EXISTS does not look that closely.
            return

    async def mark(self, link: Link, *, notifies: bool) -> Mark:
        """Ask, inside a transaction, who it is. One round trip.

        Args:
            link: Where the transaction is open.
            notifies: Whether it may have an effect although it has no id yet.
        """
        token = None if self._log is None else str(uuid.uuid4())
        if token is None and not self._knows_ids:
            return Mark()
        try:
            row = await link.connection.fetchrow(
                self._question(notifies=notifies), *(() if token is None else (token,))
            )
        except asyncpg.PostgresError as error:
            # Another server than the one that was asked what it can, or somebody dropped the log.
            self._learned = self._learned and error.sqlstate not in _MISSING
            raise
        if row is None or (self._knows_ids and row[0] is None):
            return Mark(nothing_written=True)
        return Mark(xid=None if row[0] is None else int(row[0]), epoch=_epoch(row[1:]), token=token)

    def _question(self, *, notifies: bool) -> str:
        own_id = _ID_IN_ANY_CASE if notifies else _ID
        told = f"{own_id if self._knows_ids else 'NULL'}::text, {_EPOCH if self._knows_epoch else _NO_EPOCH}"
        if self._log is None:
            return f"SELECT {told}"
        condition = f"WHERE {own_id} IS NOT NULL" if self._knows_ids else ""
        return f"INSERT INTO {self._log} (token) SELECT $1::text::uuid {condition} RETURNING {told}"

    # After it

    async def resolve(self, slot: Slot[Link] | None, mark: Mark, deadline: float | None) -> Answer:
        """Find out what became of a transaction.

        Args:
            slot: Where its COMMIT was lost. Its connection is closed and replaced, and it is taken back.
            mark: What was known before.
            deadline: Until when to ask, on the line of `Clock.monotonic()`; at least for five seconds.
        """
        if slot is not None and slot.resource is not None:
            slot.resource.doomed = True
        asking = _Asking(self, slot, mark, self._clock.monotonic(), deadline)
        started = self._clock.monotonic()
        try:
            answer = await asking.run()
        finally:
            asking.finish()
        if answer in (Answer.COMMITTED, Answer.ABORTED):
            elapsed = self._clock.monotonic() - started
            self._dispatcher.tell(
                OutcomeResolved(operation="transaction", answer=answer.value, xid=mark.xid, elapsed=elapsed)
            )
        return answer

    async def ask(self, link: Link, mark: Mark, *, insist: bool, patient: bool) -> Answer:
        """Ask once.

        Args:
            link: A connection other than the one that was lost.
            mark: Whom to ask about.
            insist: Whether to end a session that still holds the transaction open.
            patient: Whether to spare it while it is working on its COMMIT.
        """
        answer = await self._ask_status(link.connection, mark)
        if answer is Answer.IN_PROGRESS and insist and mark.xid is not None:
            with contextlib.suppress(asyncpg.PostgresError):  # the role may not
                await link.connection.fetch(_TERMINATE, str(mark.xid % 2**32), not patient, timeout=_ONE_QUESTION)
        if answer is Answer.UNKNOWN and mark.token is not None:
            return await self._fence(link.connection, mark.token)
        return answer

    async def _ask_status(self, connection: AnyConnection, mark: Mark) -> Answer:
        if mark.xid is None or mark.epoch is None:
            return Answer.UNKNOWN
        try:
            row = await connection.fetchrow(_STATUS, str(mark.xid), timeout=_ONE_QUESTION)
        except asyncpg.PostgresError as error:
            if error.sqlstate in _MISSING or error.sqlstate == _FUTURE:
                return Answer.UNKNOWN
            raise
        if row is None:
            return Answer.UNKNOWN
        return judge(mark, Reply(status=row[0], in_recovery=row[1], epoch=_epoch(row[2:])))

    async def _fence(self, connection: AnyConnection, token: str) -> Answer:
        """Insert the token ourselves. It waits for a transaction that has inserted it and is not decided yet."""
        try:
            await connection.execute(
                f"INSERT INTO {self._log} (token, fenced) VALUES ($1::text::uuid, true) ON CONFLICT (token) DO NOTHING",  # noqa: S608
                token,
                timeout=_ONE_QUESTION,
            )
            fenced = await connection.fetchval(
                f"SELECT fenced FROM {self._log} WHERE token = $1::text::uuid",  # noqa: S608
                token,
                timeout=_ONE_QUESTION,
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate in _MISSING:
                return Answer.UNKNOWN
            raise
        return judge_token(fenced=fenced)

    async def find(self, slot: Slot[Link] | None, deadline: float) -> Slot[Link]:
        """Return a slot with a healthy connection: this one if it can be mended."""
        return await self._lender.mend(slot, deadline)

    @property
    def is_over(self) -> bool:
        """Whether nobody can be asked any more, because the pool is closing."""
        return self._lender.is_closing

    def give_back(self, slot: Slot[Link]) -> None:
        """Take back a slot that was asked on."""
        self._lender.recondition(slot)

    @property
    def clock(self) -> Clock:
        """Whose time deadlines are counted in."""
        return self._clock

    def delays(self) -> Any:
        """Yield the waits between questions."""
        return self._config.backoff.delays()

    # The log

    def prune(self) -> None:
        """Delete in the background, once an hour at most, what is older than a day."""
        now = self._clock.now()
        if self._log is None or (self._pruned is not None and now - self._pruned < _PRUNE_EVERY):
            return
        self._pruned = now
        self._lender.run_in_background(self._prune())

    async def _prune(self) -> None:
        with contextlib.suppress(Exception):  # nobody waits for it, and the next hour brings another chance
            lease = await self._lender.lend(_LAST_WORD)
            try:
                await lease.execute(f"DELETE FROM {self._log} WHERE written_at < now() - interval '1 day'")  # noqa: S608
            finally:
                self._lender.take_back(lease)


class _Asking:
    """The questions about one transaction, and the slot that they are asked on."""

    def __init__(
        self, inquiry: Inquiry, slot: Slot[Link] | None, mark: Mark, now: float, deadline: float | None
    ) -> None:
        self._inquiry = inquiry
        self._slot = slot
        self._mark = mark
        # What is unknown stays unknown for ever, so a transaction that used all its time still gets a last word.
        self._ends = max(now + _LAST_WORD, now + 60.0 if deadline is None else deadline)
        self._impatient_from = now + (self._ends - now) / 2

    async def run(self) -> Answer:
        clock, delays, insist = self._inquiry.clock, self._inquiry.delays(), False
        while True:
            patient = clock.monotonic() < self._impatient_from
            answer = await self._ask(insist=insist, patient=patient)
            left = self._ends - clock.monotonic()
            if answer is not Answer.IN_PROGRESS or left <= 0 or self._inquiry.is_over:
                return Answer.UNKNOWN if answer is Answer.IN_PROGRESS else answer
            insist = True
            await clock.sleep(min(next(delays), left))

    async def _ask(self, *, insist: bool, patient: bool) -> Answer:
        slot, self._slot = self._slot, None  # while it is mended it may be lost
        try:
            self._slot = slot = await self._inquiry.find(slot, self._ends)
            if slot.resource is None:
                return Answer.IN_PROGRESS
            return await self._inquiry.ask(slot.resource, self._mark, insist=insist, patient=patient)
        except Exception:  # noqa: BLE001 - whoever could not be asked is asked again
            return Answer.IN_PROGRESS

    def finish(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._inquiry.give_back(slot)


def _epoch(told: Any) -> Epoch | None:
    system, timeline, stats_reset = told
    if system is None or timeline is None or stats_reset is None:
        return None
    return Epoch(system=system, timeline=timeline, stats_reset=stats_reset)
