"""What `acquire()` hands out: a connection on loan, which replaces itself as long as nothing has happened on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
from asyncpg import Record

from resilient_pool.config import PoolConfig
from resilient_pool.core import wire
from resilient_pool.core.checkout import Checkout
from resilient_pool.core.clock import Clock
from resilient_pool.core.deadlines import deadline_after
from resilient_pool.core.read_check import ReadCheck
from resilient_pool.core.runner import Call, Runner
from resilient_pool.core.slots import Slot
from resilient_pool.core.upkeep import Upkeep
from resilient_pool.core.wire import AnyConnection, Link
from resilient_pool.policy.verdict import Phase
from resilient_pool.queries import Queries

if TYPE_CHECKING:
    from asyncpg.cursor import CursorFactory
    from asyncpg.prepared_stmt import PreparedStatement
    from asyncpg.transaction import Transaction

T = TypeVar("T")


class ResilientConnection(Queries, wire.ConnectionProxy):
    """A connection that belongs to the application until it is released. It has all methods of `asyncpg.Connection`.

    Until the first operation on it has succeeded, an operation that fails in a curable way is repeated on a replacement:
    no session state can be lost yet. From then on errors are raised as they are. What `prepare()`, `cursor()`,
    `transaction()` and `add_listener()` return lives on the connection of that moment, so they end the exception too.

    A use after release raises `asyncpg.InterfaceError`.
    """

    __slots__ = ("_busy", "_holder", "_lender", "_linked", "_pristine", "_released", "_slot", "_witness")

    def __init__(self, lender: Lender, slot: Slot[Link]) -> None:
        self._lender = lender
        self._holder = lender  # asyncpg reaches the pool behind a connection through this name
        self._slot: Slot[Link] | None = slot
        self._linked: Link | None = None
        self._released = False
        self._pristine = True
        self._busy = False
        self._witness: Callable[[str | None], None] | None = None

    def __repr__(self) -> str:
        inner = "[released]" if self._released else repr(self._linked)
        return f"<{type(self).__name__} {inner} {id(self):#x}>"

    def __getattr__(self, name: str) -> Any:
        # Methods that the application's own connection class adds, and whatever a later asyncpg brings.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._keep(name), name)

    @property
    def _con(self) -> AnyConnection | None:
        # asyncpg's name for what is behind a proxy.
        return None if self._linked is None else self._linked.connection

    def _use(self, method: str) -> AnyConnection:
        self._require_loan(method)
        if self._linked is None:
            raise asyncpg.InterfaceError(f"cannot call Connection.{method}(): its connection was lost and not replaced")
        return self._linked.connection

    def _require_loan(self, method: str) -> None:
        if self._released:
            raise asyncpg.InterfaceError(
                f"cannot call Connection.{method}(): connection has been released back to the pool"
            )

    def _keep(self, method: str, sql: str | None = None) -> AnyConnection:
        """Return the connection for something that ties itself to it: it is not replaced any more."""
        connection = self._use(method)
        self._pristine = False
        if self._witness is not None:
            self._witness(sql)
        return connection

    def bind(self, witness: Callable[[str | None], None]) -> None:
        """Keep the present connection to the end, and tell `witness` the text of everything that is sent on it.

        `None` stands for what goes past this object, and may be anything.
        """
        self._pristine = False
        self._witness = witness

    async def _run(
        self,
        operation: str,
        sql: str | None,
        execute: Callable[[AnyConnection], Awaitable[T]],
        *,
        idempotent: bool,
        deadline: float | None,
        fail_fast: bool | None,
        replayable: bool = True,
        exactly_once: bool = False,
    ) -> T:
        if exactly_once:
            raise asyncpg.InterfaceError(
                "exactly_once=True is for the pool's methods, which make a transaction of their own; on a connection use "
                "`async for attempt in pool.transaction()` around the block"
            )
        if not self._pristine:
            if self._witness is not None:
                self._witness(sql)
            return await execute(self._use(operation))
        self._require_loan(operation)
        if self._busy:
            # The driver would say the same, but the connection would be checked and replaced under the other operation.
            raise asyncpg.InterfaceError("cannot perform operation: another operation is in progress")
        call = self._lender.call(
            operation,
            sql,
            execute,
            idempotent=idempotent,
            deadline=deadline,
            fail_fast=fail_fast,
            replayable=replayable,
        )
        self._busy = True
        try:
            return await self._lender.runner.run(call, self._attempt)
        finally:
            self._busy = False
            # Also after an error: a part of a text may have taken effect in the session, a BEGIN or a lock. A connection
            # that was lost has nothing to lose any more.
            self._pristine = call.phase is not Phase.EXECUTE or call.link is None or not call.link.is_usable

    async def _attempt(self, call: Call[T]) -> T:
        self._require_loan(call.operation)
        slot, self._slot = self._slot, None  # while it is mended it may be lost
        self._slot = await self._lender.mend(slot, call.deadline, fail_fast=call.fail_fast)
        if self._released:  # by another task, which found no slot to give back
            self._lender.take_back(self)
            self._require_loan(call.operation)
        link = await self.adopt(call)
        self._require_loan(call.operation)
        return await call.run_on(link)

    async def adopt(self, call: Call[T]) -> Link:
        """Become the face of the connection in this loan's slot, set it up if it is new here, and return it."""
        link = None if self._slot is None else self._slot.resource
        if link is None:
            raise asyncpg.InternalClientError("a slot without a connection was lent")
        if link is not self._linked:
            self.part()
            link.lend(self)
            self._linked = link
            call.phase, call.link = Phase.CHECKOUT, link
            # What `setup` does is part of getting the connection: it fails as a whole, and is repeated as a whole.
            self._pristine = False
            ready = False
            try:
                await self._lender.set_up(self)
                ready = True
            finally:
                self._pristine = True
                if not ready:
                    link.doomed = True
                    self.part()
        return link

    def detach(self) -> Slot[Link] | None:
        """End the loan and return what was lent; `None` if it was lost. The connection is still to be parted from."""
        slot, self._slot = self._slot, None
        self._released = True
        return slot

    def part(self) -> None:
        """Be the face of no connection any more. Raises the driver's warning of listeners where warnings are errors."""
        link, self._linked = self._linked, None
        if link is not None:
            link.take_back()

    @property
    def is_released(self) -> bool:
        """Whether the loan has ended."""
        return self._released

    def belongs_to(self, lender: Lender) -> bool:
        """Whether this connection was lent by `lender`."""
        return self._lender is lender

    # asyncpg's other methods

    async def prepare(
        self,
        query: str,
        *,
        name: str | None = None,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
    ) -> PreparedStatement[Any]:
        """Prepare a statement, for use on this connection until it is released."""
        return await self._keep("prepare", query).prepare(query, name=name, timeout=timeout, record_class=record_class)

    def cursor(
        self,
        query: str,
        *args: object,
        prefetch: int | None = None,
        timeout: float | None = None,
        record_class: type[Record] | None = None,
    ) -> CursorFactory[Any]:
        """Make a cursor, for use on this connection until it is released."""
        connection = self._keep("cursor", query)
        return connection.cursor(query, *args, prefetch=prefetch, timeout=timeout, record_class=record_class)

    def transaction(self, *, isolation: Any = None, readonly: bool = False, deferrable: bool = False) -> Transaction:
        """Make a transaction on this connection; nothing in it is repeated."""
        self._pristine = False
        return self._use("transaction").transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)

    async def add_listener(self, channel: str, callback: Any) -> None:
        """Listen to a channel until the connection is released."""
        await self._keep("add_listener").add_listener(channel, callback)

    async def remove_listener(self, channel: str, callback: Any) -> None:
        """Stop listening to a channel."""
        await self._keep("remove_listener").remove_listener(channel, callback)

    async def reset(self, *, timeout: float | None = None) -> None:
        """Reset the session."""
        await self._keep("reset").reset(timeout=timeout)

    async def close(self, *, timeout: float | None = None) -> None:
        """Close the connection; the pool replaces it."""
        connection = self._keep("close")
        if self._linked is not None:
            self._linked.end()
        await connection.close(timeout=timeout)

    def terminate(self) -> None:
        """Close the connection without a goodbye; the pool replaces it."""
        connection = self._keep("terminate")
        if self._linked is not None:
            self._linked.end()
        connection.terminate()

    def is_closed(self) -> bool:
        """Whether the connection is closed."""
        return self._use("is_closed").is_closed()

    def is_in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._use("is_in_transaction").is_in_transaction()

    def get_server_pid(self) -> int:
        """Return the process id of the server's process for this connection."""
        return self._use("get_server_pid").get_server_pid()

    @contextlib.contextmanager
    def query_logger(self, callback: Any) -> Generator[None, None, None]:
        """Call `callback` for every query within the context."""
        with self._keep("query_logger").query_logger(callback):
            yield


class Lender:
    """Lends connections and takes them back.

    Args:
        config: The application's `setup`, and the pool's deadline.
        checkout: Finds healthy connections.
        upkeep: Makes them fit for the next one.
        runner: Repeats what fails.
        read_check: What it remembers of the server's catalog ends with the driver's caches.
        clock: Counts deadlines.
    """

    def __init__(
        self,
        config: PoolConfig,
        checkout: Checkout,
        upkeep: Upkeep,
        runner: Runner,
        read_check: ReadCheck,
        clock: Clock,
    ) -> None:
        self._config = config
        self._checkout = checkout
        self._upkeep = upkeep
        self._clock = clock
        self.runner = runner
        self.read_check = read_check

    def call(
        self,
        operation: str,
        sql: str | None,
        execute: Callable[[AnyConnection], Awaitable[T]],
        *,
        idempotent: bool,
        deadline: float | None,
        fail_fast: bool | None = None,
        replayable: bool = True,
        started: float | None = None,
    ) -> Call[T]:
        """Begin a call. Its deadline is `deadline` seconds after it `started`, by default the pool's, and now."""
        if started is None:
            started = self._clock.monotonic()
        ends, hastily = self.patience(started, deadline, fail_fast)
        return Call(
            operation, sql, execute, started, ends, idempotent=idempotent, replayable=replayable, fail_fast=hastily
        )

    def patience(self, started: float, deadline: float | None, fail_fast: bool | None) -> tuple[float | None, bool]:
        """Say until when a call that `started` then waits, and whether it fails fast, where `None` is the pool's default."""
        config = self._config
        ends = deadline_after(started, config.deadline if deadline is None else deadline)
        return ends, config.fail_fast if fail_fast is None else fail_fast

    @property
    def is_closing(self) -> bool:
        """Whether nothing is lent any more."""
        return self._upkeep.closing

    def run_in_background(self, work: Coroutine[object, object, None]) -> None:
        """Do something that nobody waits for, except the pool's `close()`."""
        self._upkeep.run_in_background(work)

    def recondition(self, slot: Slot[Link]) -> None:
        """Take back a slot that was in nobody's hands but ours."""
        self._upkeep.recondition(slot)

    async def lend(self, seconds: float | None, *, fail_fast: bool | None = None) -> ResilientConnection:
        """Lend a healthy connection within `seconds`."""
        call: Call[ResilientConnection] = self.call(
            "acquire", None, _nothing, idempotent=True, deadline=seconds, fail_fast=fail_fast
        )
        return await self.runner.run(call, self.lend_once)

    async def lend_once(self, call: Call[Any]) -> ResilientConnection:
        """Lend a connection for one attempt of a call."""
        return await self.lend_slot(await self._checkout.take(call.deadline, fail_fast=call.fail_fast), call)

    async def lend_slot(self, slot: Slot[Link], call: Call[T]) -> ResilientConnection:
        """Lend the connection of a slot, set up for the application. If that fails the connection is closed."""
        lease = ResilientConnection(self, slot)
        lent = False
        try:
            await lease.adopt(call)
            lent = True
        finally:
            if not lent:
                self.take_back(lease)
        return lease

    async def mend(self, slot: Slot[Link] | None, deadline: float | None, *, fail_fast: bool = False) -> Slot[Link]:
        """Return a slot with a healthy connection: this one if it can be mended, else another."""
        if slot is not None and await self._checkout.mend(slot, deadline):
            return slot
        return await self._checkout.take(deadline, fail_fast=fail_fast)

    async def set_up(self, lease: ResilientConnection) -> None:
        """Let the application prepare a connection."""
        if self._config.setup is not None:
            await self._config.setup(lease)

    def take_back(self, lease: ResilientConnection, seconds: float | None = None) -> asyncio.Task[None] | None:
        """End a loan; the connection is reset in the background. Returns what can be waited for."""
        slot = lease.detach()
        reset = None
        try:
            lease.part()
        finally:
            if slot is not None:
                reset = self._upkeep.recondition(slot, seconds)
        return reset

    # What asyncpg asks of the pool behind a connection when the schema has changed, and, up to 0.31, when it is closed.

    @property
    def _pool(self) -> Lender:
        return self

    def _release_on_close(self) -> None:
        """Nothing: the loan lasts until the application ends it, and the slot is looked at then."""

    def _drop_statement_cache(self) -> None:
        self.read_check.forget()
        for link in self._upkeep.links():
            link.drop_statement_cache()

    def _drop_type_cache(self) -> None:
        self.read_check.forget()
        for link in self._upkeep.links():
            link.drop_type_cache()


async def _nothing(connection: AnyConnection) -> Any:
    return connection
