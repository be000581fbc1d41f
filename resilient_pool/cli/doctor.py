"""Diagnoses a database and a pool's arguments: `examine` queries the server, `diagnose` is pure; neither changes anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import asyncpg

from resilient_pool import profiles
from resilient_pool.config.pool_config import PoolConfig, SealedDsn, UnlessStated
from resilient_pool.config.secrets import Secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import Event, Observer, PoolerDetected
from resilient_pool.pool import ResilientPool
from resilient_pool.pooling.driver import numbers_transactions
from resilient_pool.retry.backoff import BackoffPolicy
from resilient_pool.retry.classifier import refuses_question

Level = Literal["ok", "advice", "problem"]

_OLDEST_TESTED, _RESOLVES_COMMITS = 16, 13
_TOLERATED_SKEW = 2.0
_MARGIN = 5.0
_CONNECT_TIMEOUT = 10.0
_NO_ARGUMENTS: Mapping[str, object] = MappingProxyType({})

# One query each, since a server that only speaks PostgreSQL's protocol may refuse any of them.
_QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "version": "pg_catalog.current_setting('server_version_num')::int",
        "resolves": "pg_catalog.to_regprocedure('pg_catalog.pg_xact_status(xid8)') IS NOT NULL",
        "standby": "pg_catalog.pg_is_in_recovery()",
        "idle": "EXTRACT(epoch FROM pg_catalog.current_setting('idle_session_timeout', true)::interval)::float8",
        "connections": (
            "pg_catalog.current_setting('max_connections', true)::int"
            " - COALESCE(pg_catalog.current_setting('superuser_reserved_connections', true)::int, 0)"
            " - COALESCE(pg_catalog.current_setting('reserved_connections', true)::int, 0)"
        ),
        "synchronous_commit": "pg_catalog.current_setting('synchronous_commit')",
        "tls": "EXISTS (SELECT FROM pg_catalog.pg_stat_ssl WHERE ssl AND pid = pg_catalog.pg_backend_pid())",
        "tls_version": "(SELECT version FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid())",
        "remote": "COALESCE(pg_catalog.host(pg_catalog.inet_client_addr()) !~ '^(127[.]|::1$)', false)",
        "role": "current_user::text",
        "may_terminate": (
            "(SELECT rolsuper OR pg_catalog.pg_has_role(rolname, 'pg_signal_backend', 'MEMBER') "
            "FROM pg_catalog.pg_roles WHERE rolname = current_user)"
        ),
        "clock": "EXTRACT(epoch FROM pg_catalog.clock_timestamp())::float8",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a server. What it does not say is `None`.

    Attributes:
        version: Its number, as in `server_version_num`.
        resolves: Whether it can be asked what became of a transaction.
        standby: Whether it is in recovery.
        idle: After how many idle seconds it ends a session; 0 or `None` for never.
        connections: How many clients it lets in, besides those for which it keeps some.
        synchronous_commit: Its `synchronous_commit`.
        tls: Whether the connection is encrypted.
        tls_version: How.
        remote: Whether the connection came over a network.
        may_terminate: Whether our role may terminate other roles' sessions.
        role: Our role.
        skew: By how many seconds its clock is ahead of ours.
        pooler: Whether a pooler stands in between.
        unsaid: What it has refused to say, by these names.
    """

    version: int | None
    resolves: bool | None
    standby: bool | None
    idle: float | None
    connections: int | None
    synchronous_commit: str | None
    tls: bool | None
    tls_version: str | None
    remote: bool | None
    may_terminate: bool | None
    role: str | None
    skew: float | None
    pooler: bool
    unsaid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at.
        level: `"ok"`, `"advice"` for what could be better, or `"problem"` for what will fail.
        text: What was found, in plain words.
        details: What belongs to it, one thing each.
        change: The setting to change, and how; nothing where the level is `"ok"`.
    """

    check: str
    level: Level
    text: str
    details: tuple[str, ...] = ()
    change: str = ""

    @property
    def page(self) -> str:
        """The page of the documentation that explains it."""
        return "docs/reference/arguments.md" if self.check == "dsn" else _CHECKS[self.check][1]


async def examine(
    dsn: SealedDsn,
    *,
    deadline: float,
    backoff: BackoffPolicy,
    observers: Iterable[Observer] = (),
    arguments: Mapping[str, object] = _NO_ARGUMENTS,
) -> tuple[Finding, ...]:
    """Wait for a database, query it, and return findings on it and on the DSN.

    Raises:
        ConfigurationError: The DSN or an argument is wrong.
        Exception: The driver's own error, if the database was never available.
    """
    config = PoolConfig.from_arguments(dsn, **arguments)  # before the database is waited for
    poolers: list[Event] = []

    def record_pooler(event: Event) -> None:
        if isinstance(event, PoolerDetected):
            poolers.append(event)

    pool = ResilientPool(
        dsn,
        max_size=1,
        reconnect=backoff,
        deadline=deadline,
        timeout=_CONNECT_TIMEOUT,
        observers=[record_pooler, *observers],
    )
    async with pool:
        await pool.fetchval("SELECT 1")  # so that the next ones measure a round trip, and no connecting
        answers, unsaid = await _ask(pool)
    facts = Facts(**answers, pooler=bool(poolers), unsaid=unsaid)
    return (*_refusals(dsn), *diagnose(facts, config))


async def _ask(pool: ResilientPool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what the server says, by the names of `Facts`, and the names of what it has refused to say."""
    answers: dict[str, Any] = {}
    unsaid: list[str] = []
    before = after = 0.0
    # On one lease: a call that is refused is followed by a reset, and that may be refused as well.
    async with pool.acquire() as connection:
        for name, question in _QUESTIONS.items():
            before = datetime.now(UTC).timestamp()
            try:
                answers[name] = await connection.fetchval(f"SELECT {question}")
            except asyncpg.PostgresError as error:
                if not refuses_question(error):
                    raise
                answers[name] = None
                unsaid.append(name)
            after = datetime.now(UTC).timestamp()
        answers["resolves"] = answers["resolves"] and numbers_transactions(connection)
    clock = answers.pop("clock")  # the last one asked
    return {**answers, "skew": None if clock is None else clock - (before + after) / 2}, tuple(unsaid)


def _refusals(dsn: SealedDsn) -> Iterator[Finding]:
    """Yield the pool's own error for the DSN: it accepts no parameters of other programs."""
    if not isinstance(dsn, Secret):
        return
    try:
        PoolConfig.from_arguments(Secret(dsn.reveal()))
    except ConfigurationError as error:
        text = f"the pool refuses it, though it can be read: {error}"
        change = "write the application's DSN as the pool takes it, and give the pool as arguments what it cannot say"
        yield Finding(check="dsn", level="problem", text=text, change=change)


def diagnose(facts: Facts, config: PoolConfig) -> tuple[Finding, ...]:
    """Judge what is known of a server and of a pool's configuration, without asking the server."""
    judged = ((check, judge(facts, config)) for check, (judge, _) in _CHECKS.items())
    return tuple(Finding(check=check, **said._asdict()) for check, said in judged if said is not None)


class _Judgement(NamedTuple):
    """What one check finds; see `Finding`."""

    level: Level
    text: str
    change: str = ""
    details: tuple[str, ...] = ()


def _server(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if not facts.unsaid:
        return None
    text = f"it does not say what PostgreSQL says, or not to our role ({', '.join(facts.unsaid)}): nothing is found out about that"
    return _Judgement("advice", text, "a profile, if it is not PostgreSQL itself")


def _profile(_facts: Facts, config: PoolConfig) -> _Judgement:
    """Name the profile that fits, and what it would change of what is known of the application's pool."""
    name = profiles.fitting(config.host or (), config.port or ())
    if name is None:
        return _Judgement("ok", "no profile of this package's is known to fit the host's name")
    profile = profiles.EXPLAINED[name]
    fits = f"profiles.{name} fits ({profile.service})"
    differs = tuple(
        f"{argument}={choice.value!r} instead of {getattr(config, argument)!r}: {choice.reason}"
        for argument, choice in profile.choices.items()
        if not _agrees(config, argument, choice.value)
    )
    if not differs:
        return _Judgement("ok", f"{fits}, and changes nothing of what the DSN and the options say")
    text = f"{fits}; beside what the DSN and the options say it has"
    return _Judgement("advice", text, f"ResilientPool(dsn, **profiles.{name})", differs)


def _agrees(config: PoolConfig, argument: str, value: object) -> bool:
    """Whether a profile would leave an argument as it is."""
    present = getattr(config, argument)
    stated = present is not None or "PGSSLMODE" in os.environ
    return bool(present == value or (isinstance(value, UnlessStated) and stated))


def _with(config: PoolConfig, name: str) -> str:
    """Name the setting that a finding depends on, since the application's pool may have another value."""
    value, default = getattr(config, name), PoolConfig.__dataclass_fields__[name].default
    return f"with the default {name} ({value:g})" if value == default else f"with {name}={value:g}"


def _version(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if facts.version is None:
        return None
    major = facts.version // 10000
    if major < _RESOLVES_COMMITS:
        text = f"PostgreSQL {major} cannot be asked what became of a COMMIT in the way that this package asks"
        return _Judgement("problem", text, "upgrade, or pass resolve_commit=False")
    if not facts.resolves:
        text = f"it says that it is PostgreSQL {major}, but cannot be asked what became of a COMMIT: if lost, it is unknown"
        change = "let what must not be applied twice find out by itself whether it was: by a unique key, say"
        return _Judgement("advice", text, change)
    text = f"PostgreSQL {major}: a COMMIT whose answer was lost can be resolved, except after a crash or a failover"
    if major >= _OLDEST_TESTED:
        return _Judgement("ok", f"{text}; a pool with commit_log= resolves it then too")
    text += f"; this package is tested on {_OLDEST_TESTED} and newer"
    return _Judgement("advice", text, f"upgrade to PostgreSQL {_OLDEST_TESTED} or newer")


def _idle_sessions(facts: Facts, config: PoolConfig) -> _Judgement | None:
    if "idle" in facts.unsaid:
        return None
    if not facts.idle:
        return _Judgement("ok", "the server ends no idle sessions by itself")
    known = f"the server ends sessions that are idle for {facts.idle:g} s (idle_session_timeout)"
    lifetime = config.max_inactive_connection_lifetime
    if lifetime and lifetime < facts.idle:
        setting = _with(config, "max_inactive_connection_lifetime")
        return _Judgement("ok", f"{known}; the pool closes its own before, {setting}")
    text = f"{known}, before the pool closes them by itself; each costs a new connection at its next use"
    change = f"max_inactive_connection_lifetime={max(facts.idle - _MARGIN, facts.idle / 2):g}"
    return _Judgement("advice", text, change)


def _pausing(_facts: Facts, config: PoolConfig) -> _Judgement:
    if config.min_size:
        text = f"min_size={config.min_size} keeps connections open, and a serverless database awake"
        return _Judgement("advice", text, "min_size=0, if the database should pause")
    if not config.max_inactive_connection_lifetime:
        text = "max_inactive_connection_lifetime=0 keeps idle connections open, and a serverless database awake"
        return _Judgement("advice", text, "max_inactive_connection_lifetime=50, if the database should pause")
    return _Judgement("ok", f"{_with(config, 'min_size')}, an idle pool keeps nothing open, so the database can pause")


def _connections(facts: Facts, config: PoolConfig) -> _Judgement | None:
    if facts.connections is None or facts.pooler:  # a pooler's limit is its own
        return None
    known = f"the server lets {facts.connections} clients in (max_connections, less its reserve)"
    processes = facts.connections // config.max_size
    if not processes:
        text = f"{known}: fewer than one pool may open, {_with(config, 'max_size')}"
        return _Judgement("advice", text, f"max_size={facts.connections} or less, or a pooler")
    plural = "" if processes == 1 else "es"
    return _Judgement("ok", f"{known}: enough for {processes} process{plural} {_with(config, 'max_size')}")


def _keepalive(_facts: Facts, config: PoolConfig) -> _Judgement:
    if config.tcp_keepalive and config.tcp_user_timeout is not None:
        return _Judgement(
            "ok", f"a server that vanishes is noticed within seconds, {_with(config, 'tcp_user_timeout')}"
        )
    text = "a server that vanishes without a word may hang a query for a quarter of an hour"
    return _Judgement("advice", text, "tcp_keepalive=True, tcp_user_timeout=30")


def _pooler(facts: Facts, config: PoolConfig) -> _Judgement:
    if not facts.pooler:
        return _Judgement("ok", "no pooler stands in between; prepared statements are safe")
    if not config.statement_cache_size:
        return _Judgement("ok", "a pooler stands in between; the pool does without named prepared statements")
    text = "a pooler stands in between, and named prepared statements can return another query's result there"
    return _Judgement("problem", text, "statement_cache_size=0, or leave it out")


def _encryption(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if facts.tls is None:
        return None
    if facts.tls:
        return _Judgement("ok", f"the connection is encrypted ({facts.tls_version})")
    if facts.remote and not facts.pooler:
        text = "the connection comes over a network and is not encrypted"
        return _Judgement("advice", text, "sslmode=verify-full, or at least require")
    return _Judgement("ok", "the server sees no encryption, on a connection from the same machine or a pooler's")


def _durability(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if facts.synchronous_commit is None:
        return None
    if facts.synchronous_commit != "off":
        text = f"synchronous_commit is {facts.synchronous_commit}: what was committed survives a crash of the server"
        return _Judgement("ok", text)
    text = "synchronous_commit is off: a crash of the server loses what it has just said it committed"
    return _Judgement("advice", text, "synchronous_commit=on")


def _permissions(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if facts.may_terminate is None:
        return None
    if facts.may_terminate:
        return _Judgement("ok", f"{facts.role} may terminate other roles' sessions")
    return _Judgement(
        "ok",
        f"{facts.role} may terminate its own sessions, but not other roles'; should it have to end what holds up a "
        f"migration, that takes GRANT pg_signal_backend TO {facts.role}",
    )


def _clock(facts: Facts, _config: PoolConfig) -> _Judgement | None:
    if facts.skew is None:
        return None
    text = f"the server's clock and this machine's differ by {abs(facts.skew):.1f} s"
    if abs(facts.skew) <= _TOLERATED_SKEW:
        return _Judgement("ok", text)
    change = "synchronise both with NTP; the pool does not mind, but passwords and tokens that expire do"
    return _Judgement("advice", text, change)


def _role_of_server(facts: Facts, config: PoolConfig) -> _Judgement | None:
    if facts.standby is None:
        return None
    if facts.standby and config.target_session_attrs not in ("standby", "read-only", "prefer-standby"):
        text = "the server is a standby and accepts no writes"
        return _Judgement("problem", text, "another host, or target_session_attrs=primary")
    return _Judgement("ok", f"the server is a {'standby' if facts.standby else 'primary'}")


_CHECKS: Mapping[str, tuple[Callable[[Facts, PoolConfig], _Judgement | None], str]] = MappingProxyType(
    {
        "profile": (_profile, "docs/services.md"),
        "server": (_server, "docs/services.md"),
        "server version": (_version, "docs/transactions.md"),
        "idle sessions": (_idle_sessions, "docs/connections.md"),
        "pausing": (_pausing, "docs/serverless.md"),
        "connections": (_connections, "docs/tuning.md"),
        "keepalive": (_keepalive, "docs/connections.md"),
        "pooler": (_pooler, "docs/poolers.md"),
        "encryption": (_encryption, "docs/symptoms.md#certificate"),
        "durability": (_durability, "docs/transactions.md"),
        "permissions": (_permissions, "docs/transactions.md"),
        "clock": (_clock, "docs/transactions.md"),
        "role": (_role_of_server, "docs/symptoms.md#read-only"),
    }
)
"""By its name, what each check does, and which page explains it; in the order in which they are shown."""
