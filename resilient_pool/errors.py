"""The package's own exceptions. Every other error reaches the application as the driver raised it."""

from __future__ import annotations

import asyncpg


class ResilientPoolError(Exception):
    """The base of this package's own exceptions."""


class ConfigurationError(ResilientPoolError, ValueError):
    """A constructor argument or a DSN is wrong. The message names it, its value (never a secret) and what is accepted."""


class UnknownArgumentError(ConfigurationError, TypeError):
    """There is no argument of that name. The message names it and the nearest known one, and never its value."""


class AcquireTimeoutError(ResilientPoolError, TimeoutError):
    """No connection became free within the deadline, or none could. Nothing was sent to the server.

    Attributes:
        retry_after: In how many seconds another call makes sense, if a service lets no new connection in before; else `None`.
            Then the call has failed at once, because its deadline would have come first.
    """

    retry_after: float | None = None

    def __str__(self) -> str:
        return f"{super().__str__()}; see docs/symptoms.md#acquire-timeout"


class PoolOverloadedError(AcquireTimeoutError):
    """As many callers as `max_waiting` allows were waiting for a connection already. Nothing was sent; it was not waited for."""

    def __str__(self) -> str:
        return ResilientPoolError.__str__(self)


class OutcomeUnknownError(ResilientPoolError, asyncpg.TransactionResolutionUnknownError):
    """It is not known whether a statement, or a transaction, took effect, and it must not be repeated, or not any longer.

    To handlers written for asyncpg it is SQLSTATE 08007, a `PostgresError`. The driver's error is the `__cause__`. The
    statement's text and arguments are not part of this error.

    Attributes:
        operation: The kind of operation, such as `"execute"` or `"transaction"`.
        xid: The transaction's id (`xid8`) where it is known; else `None`. `pg_xact_status` knows it later, as long as the server has
            neither crashed nor been replaced since: after that another transaction may have the same id.
        repeated: Whether it was declared to be repeatable, and was given up in the end.
        sqlstate: `"08007"`.
    """

    def __init__(self, operation: str, *, xid: int | None = None, repeated: bool = False) -> None:
        self.operation = operation
        self.xid = xid
        self.repeated = repeated
        known_as = "" if xid is None else f" (transaction id {xid})"
        why = "It was not repeated, because repeating it could apply it twice"
        if repeated:
            why, advice = "It was declared to be repeatable, and given up when no further attempt was allowed", ""
        elif operation != "transaction":
            advice = (
                "; pass idempotent=True if it may safely run twice, or exactly_once=True to have the pool find out, and mark "
                "functions that only read STABLE"
            )
        elif xid is not None:
            advice = "; after a crash or a failover only a pool with commit_log= can find out"
        else:
            advice = ""
        super().__init__(
            f"it is not known whether {operation}{known_as} took effect: the cause of this error is all that was seen. "
            f"{why}{advice}; see docs/symptoms.md#outcome-unknown"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # What Python does by itself would call the class with the message.
        return _unknown_again, (type(self), self.operation, self.xid, self.repeated), dict(self.__dict__)


def _unknown_again(
    kind: type[OutcomeUnknownError], operation: str, xid: int | None, repeated: bool
) -> OutcomeUnknownError:
    return kind(operation, xid=xid, repeated=repeated)


class MigrationFailedError(ResilientPoolError):
    """A migration failed by itself: the database was there, and waiting would not have helped.

    Of a directory of SQL files, the server's error is the `__cause__`.

    Attributes:
        exit_code: The command's exit status; `None` if there was no command.
        output: The last lines of its output, without secrets.
        attempts: How often it was run; more than once only if it could not connect before.
        waited: Seconds spent waiting for the database, for the lock and between attempts.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        output: tuple[str, ...] = (),
        attempts: int = 1,
        waited: float = 0.0,
    ) -> None:
        self.exit_code = exit_code
        self.output = output
        self.attempts = attempts
        self.waited = waited
        super().__init__(message)


class MigrationLockedError(ResilientPoolError, TimeoutError):
    """Another migration held the lock until the deadline. Nothing was run.

    Attributes:
        holder: Who held it, as far as the server tells.
    """

    def __init__(self, name: str, holder: str, waited: float) -> None:
        self.holder = holder
        super().__init__(
            f"the lock {name!r} was not free within {waited:.1f} s, so nothing was run; it is held by {holder}. "
            "Wait for that migration to end, or allow a longer deadline"
        )
