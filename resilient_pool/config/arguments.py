"""The constructor's arguments as a type checker sees them; `pool_config.py` documents and checks them."""

from __future__ import annotations

import os
import ssl as ssl_module
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypedDict

import asyncpg

from resilient_pool.clock import Clock
from resilient_pool.config.pool_config import CredentialsSource, PasswordSource, SessionReset
from resilient_pool.events import Observer
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.decision import RetryBudget
from resilient_pool.retry.verdict import Classifier

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    RecordT = TypeVar("RecordT", bound=asyncpg.Record, default=asyncpg.Record)
else:
    from typing import TypeVar  # without a default before Python 3.13; only type checkers need it

    RecordT = TypeVar("RecordT", bound=asyncpg.Record)


class ConnectArguments(TypedDict, total=False):
    """What `asyncpg.connect` takes; the documentation has a table of units and defaults."""

    dsn: str | None
    host: str | Sequence[str] | None
    port: int | Sequence[int] | None
    user: str | None
    password: str | PasswordSource | None
    credentials: CredentialsSource | None
    passfile: str | os.PathLike[str] | None
    service: str | None
    servicefile: str | os.PathLike[str] | None
    database: str | None
    timeout: float | None
    statement_cache_size: int | None
    max_cached_statement_lifetime: float
    max_cacheable_statement_size: int
    command_timeout: float | None
    ssl: str | bool | ssl_module.SSLContext | None
    direct_tls: bool | None
    server_settings: Mapping[str, str] | None
    target_session_attrs: str | None
    krbsrvname: str | None
    gsslib: str | None


class ProfileArguments(TypedDict, total=False):
    """What profiles hold. All other arguments may stand beside a profile, for type checkers too."""

    min_size: int
    max_size: int
    max_inactive_connection_lifetime: float
    max_lifetime: float
    timeout: float | None
    deadline: float | None
    statement_cache_size: int | None
    session_reset: SessionReset
    ssl: str | bool | ssl_module.SSLContext | None
    may_pause: bool


class PoolArguments(ConnectArguments, total=False):
    """What `ResilientPool` takes, but for `record_class`; the documentation has a table of units and defaults."""

    min_size: int
    max_size: int
    max_waiting: int | None
    init_size: int | None
    max_queries: int
    max_inactive_connection_lifetime: float
    connect: Callable[..., Awaitable[object]] | None
    setup: Callable[..., Awaitable[object]] | None
    init: Callable[..., Awaitable[object]] | None
    reset: Callable[..., Awaitable[None]] | None
    loop: AbstractEventLoop | None
    connection_class: type[asyncpg.Connection[Any]]
    classifier: Classifier
    backoff: BackoffPolicy
    reconnect: BackoffPolicy
    deadline: float | None
    may_pause: bool
    fail_fast: bool
    ping_after: float
    ping_timeout: float
    max_lifetime: float
    session_reset: SessionReset
    reset_timeout: float
    retry_unknown: bool
    commit_log: str | None
    pure_functions: Iterable[str]
    observers: Iterable[Observer]
    retry_budget: RetryBudget
    clock: Clock | None
    tcp_keepalive: bool
    tcp_user_timeout: float | None


class TypedPoolArguments(PoolArguments, Generic[RecordT], total=False):
    """All that `ResilientPool` takes. `record_class` is the type of its records, for type checkers too."""

    record_class: type[RecordT]
