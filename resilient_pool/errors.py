"""The few exceptions that are ours. Everything else reaches the application as the driver raised it."""

from __future__ import annotations


class ResilientPoolError(Exception):
    """The base of this package's own exceptions."""


class ConfigurationError(ResilientPoolError, ValueError):
    """A constructor argument or a DSN is wrong. The message names it, its value (never a secret) and what is accepted."""


class AcquireTimeoutError(ResilientPoolError, TimeoutError):
    """No connection became free within the deadline. Nothing was sent to the server."""


class OutcomeUnknownError(ResilientPoolError):
    """A statement that may write was lost on the way, and nobody can tell whether it took effect.

    The driver's error is the `__cause__`. The statement's text and arguments are not part of this error.

    Attributes:
        operation: The kind of operation, such as `"execute"` or `"transaction"`.
        xid: The transaction's id (`xid8`) where it is known, to be asked of `pg_xact_status` later; else `None`.
    """

    def __init__(self, operation: str, *, xid: int | None = None) -> None:
        self.operation = operation
        self.xid = xid
        known_as = "" if xid is None else f" (transaction id {xid})"
        advice = (
            "a pool with commit_log= finds out, also after a crash or a failover"
            if operation == "transaction"
            else "pass idempotent=True for a statement that may safely run twice"
        )
        super().__init__(
            f"the connection was lost during {operation}{known_as}: it is not known whether it took effect. "
            f"It was not repeated, because repeating it could apply it twice; {advice}"
        )
