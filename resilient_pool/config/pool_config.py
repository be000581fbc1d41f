"""`PoolConfig`: the constructor's arguments, validated once and frozen, without the DSN."""

from __future__ import annotations

import contextlib
import enum
import getpass
import os
import ssl as ssl_module
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Self, cast
from urllib.parse import urlencode

import asyncpg

from resilient_pool._validation import Unusable, is_sendable, require_known, shown
from resilient_pool.clock import Clock
from resilient_pool.config import _checks as kinds
from resilient_pool.config._checks import Kind, option
from resilient_pool.config.dsn import (
    LONGEST_TIMEOUT,
    SYSTEM_ROOTS,
    arguments_of_dsn,
    arguments_of_service,
    arguments_of_variable,
)
from resilient_pool.config.passfile import PasswordFile, chosen_file
from resilient_pool.config.secrets import MASK, Hidden, Secret, holds_secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.events import Observer, is_observer
from resilient_pool.retry.backoff import OPERATION_BACKOFF, RECONNECT_BACKOFF, BackoffPolicy
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.decision import RetryBudget
from resilient_pool.retry.verdict import Classifier

PasswordSource = Callable[[], "str | Secret | Awaitable[str | Secret | None] | None"]
"""Asked for the password at every connect."""

CredentialsSource = Callable[[], "tuple[str, str | Secret] | Awaitable[tuple[str, str | Secret]]"]
"""Asked for the user's name and the password at every connect."""

SessionReset = Literal["auto", "background", "on_release", "off"]

_DEFAULT_PORT = 5432
_DRIVERS_OWN = (
    *("user", "database", "timeout", "statement_cache_size", "max_cached_statement_lifetime"),
    *("max_cacheable_statement_size", "command_timeout", "ssl", "direct_tls", "target_session_attrs"),
    *("krbsrvname", "gsslib"),
)
_NO_SETTINGS = frozenset({"user", "password", "database"})

SealedDsn = Hidden[object] | Unusable | None
"""A DSN as `seal` returns it."""


class _LenientDsn(Secret):
    """A DSN in which what other programs write for themselves is taken."""

    __slots__ = ()


class UnlessStated(str):
    """A value of `ssl`, a profile's, that applies only where neither the DSN, a service file nor the environment has one."""

    __slots__ = ()


class _Settings(Mapping[str, str]):
    """Settings of the server's whose values, which may be secret, are not shown.

    Raises:
        ConfigurationError: A name or a value is no `str`, or not one that arrives whole. The message has the name.
    """

    __slots__ = ("_read",)

    def __init__(self, settings: Mapping[str, str]) -> None:
        held = dict(settings)
        for name, value in held.items():
            if not (is_sendable(name) and is_sendable(value)):
                raise ConfigurationError(
                    f"server_settings must be {kinds.SETTINGS.accepted}: {name!r} has {shown(value)}"
                )
        self._read: Callable[[], dict[str, str]] = lambda: held

    def __getitem__(self, name: str) -> str:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{name!r}: {MASK}" for name in self) + "}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One constructor argument, as documentation shows it.

    Attributes:
        name: Its name.
        unit: What its value is: a unit, a type or the accepted words.
        default: Its default, as one would write it.
        meaning: What it bounds or chooses.
    """

    name: str
    unit: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOn:
    """What a `connect=` function of the application's is called with, as it was given."""

    dsn: object
    arguments: Mapping[str, object]


_VARIABLES = {
    "host": "PGHOST",
    "user": "PGUSER",
    "database": "PGDATABASE",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# What SQLAlchemy, psycopg_pool, libpq and Prisma call it: names that are less like it than like something else.
_ELSEWHERE = {
    "pool_size": "max_size",
    "max_overflow": "max_size",
    "connection_limit": "max_size",
    "pool_timeout": "deadline",
    "acquire_timeout": "deadline",
    "pool_recycle": "max_lifetime",
    "max_idle": "max_inactive_connection_lifetime",
    "idle_timeout": "max_inactive_connection_lifetime",
    "connect_timeout": "timeout",
    "statement_timeout": "command_timeout",
    **dict.fromkeys(("sslmode", "sslpassword", "sslcert", "sslkey", "sslrootcert"), "ssl"),
}
# What the pool itself must know of what is passed on to a `connect=` function.
_HEEDED = ("timeout", "statement_cache_size", "server_settings", "target_session_attrs")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolConfig:
    """Everything that is known about a pool before it opens its first connection.

    The attributes are the arguments, under their names, with these differences: `host` and `port` are tuples of equal
    length (or `None` for the driver's own choice); `password` is a `Secret`, a callable or `None`; `init_size` is a number;
    `tls` and `sslpassword` hold what asyncpg knows in a DSN only. `ARGUMENTS` documents each.
    """

    # fmt: off
    host: tuple[str, ...] | None = option(None, kinds.HOSTS,
        "Host names, addresses or socket directories, tried in turn.")
    port: tuple[int, ...] | None = option(None, kinds.PORTS,
        "Where the server listens; 5432 unless PGPORT says otherwise.")
    user: str | None = option(None, kinds.TEXT, "The user's name.")
    password: Secret | PasswordSource | None = option(None, kinds.PASSWORD,
        "The password, or a function that returns it, called at every connect.")
    passfile: str | os.PathLike[str] | None = option(None, kinds.PATH,
        "A password file to look in when no password is given.")
    credentials: CredentialsSource | None = option(None, kinds.CREDENTIALS,
        "Returns `(user, password)`; asked at every connect, in place of `user` and `password`.")
    service: str | None = option(None, kinds.TEXT, "A section of the service file to take options from.")
    servicefile: str | os.PathLike[str] | None = option(None, kinds.PATH, "The service file.")
    database: str | None = option(None, kinds.TEXT, "The database's name.")
    timeout: float = option(60.0, kinds.POSITIVE_SECONDS, "How long one attempt to connect may take; None is a day.")
    statement_cache_size: int | None = option(None, kinds.STATEMENTS,
        "How many prepared statements a connection keeps; None is asyncpg's 100, and 0 behind a pooler.")
    max_cached_statement_lifetime: float = option(300, kinds.SECONDS,
        "How long a prepared statement is kept; 0 is for ever.")
    max_cacheable_statement_size: int = option(15360, kinds.BYTES, "The longest statement that is kept; 0 is any.")
    command_timeout: float | None = option(None, kinds.SECONDS_OR_NONE,
        "How long one statement may run; None is no limit.")
    ssl: str | bool | ssl_module.SSLContext | None = option(None, kinds.TLS,
        "Whether and how to use TLS; None is 'prefer' unless PGSSLMODE is set.")
    direct_tls: bool | None = option(None, kinds.FLAG_OR_NONE, "Whether to begin with TLS at once, unasked.")
    server_settings: Mapping[str, str] = option(None, kinds.SETTINGS,
        "Settings of the server's for every session.", factory=dict, shown="None")
    target_session_attrs: str | None = option(None, kinds.TARGET, "What kind of server to look for among the hosts.")
    krbsrvname: str | None = option(None, kinds.TEXT, "Kerberos' name of the service.")
    gsslib: str | None = option(None, kinds.GSS_LIBRARY, "Which library GSSAPI uses.")
    min_size: int = option(0, kinds.CONNECTIONS, "How many connections are kept open when idle.")
    max_size: int = option(10, kinds.MAX_SIZE, "How many connections may be open.")
    max_waiting: int | None = option(None, kinds.CALLERS_OR_NONE,
        "How many callers may wait for a connection; one more fails at once. None is no limit.")
    init_size: int = option(0, kinds.CONNECTIONS,
        "How many connections are opened at the start; None is min_size.", shown="None")
    max_queries: int = option(50000, kinds.OPERATIONS, "After how many operations a connection is replaced.")
    max_inactive_connection_lifetime: float = option(50.0, kinds.SECONDS,
        "How long a connection may be idle before it is closed; 0 is for ever.")
    connect: Callable[..., Awaitable[object]] | None = option(None, kinds.HOOK, "Called instead of asyncpg.connect.")
    setup: Callable[..., Awaitable[object]] | None = option(None, kinds.HOOK,
        "Called with a connection each time before it is used.")
    init: Callable[..., Awaitable[object]] | None = option(None, kinds.HOOK,
        "Called with a connection when it was opened.")
    reset: Callable[..., Awaitable[None]] | None = option(None, kinds.HOOK,
        "Called with a connection instead of its own reset after use.")
    loop: AbstractEventLoop | None = option(None, kinds.EVENT_LOOP, "The event loop; None is the running one.")
    connection_class: type[asyncpg.Connection[Any]] = option(asyncpg.Connection, kinds.CONNECTION_CLASS,
        "The class of the driver's connections.", shown="asyncpg.Connection")
    record_class: type[asyncpg.Record] = option(asyncpg.Record, kinds.RECORD_CLASS,
        "The class of the records returned.", shown="asyncpg.Record")
    classifier: Classifier = option(None, kinds.CLASSIFIER,
        "Says what is known about a failure.", factory=PostgresClassifier, shown="PostgresClassifier()")
    backoff: BackoffPolicy = option(OPERATION_BACKOFF, kinds.BACKOFF,
        "When to run a failed operation again, and how often.", shown="0.05 s, x2, up to 2 s; 5 attempts")
    reconnect: BackoffPolicy = option(RECONNECT_BACKOFF, kinds.BACKOFF,
        "When to try again to reach a server that is away.", shown="0.25 s, x2, up to 1 s; for 60 s")
    deadline: float | None = option(60.0, kinds.SECONDS_OR_NONE,
        "How long a call may wait for a healthy connection and begin further attempts; it never cuts a running "
        "statement. None is no limit.")
    may_pause: bool = option(False, kinds.FLAG,
        "Whether the database pauses when it has no connections: then the pool warns of what would keep it awake.")
    fail_fast: bool = option(False, kinds.FLAG,
        "Whether calls fail at once while the server is known to be away, instead of waiting for it.")
    ping_after: float = option(1.0, kinds.SECONDS,
        "How long a connection may be idle and still be used without a ping.")
    ping_timeout: float = option(1.0, kinds.POSITIVE_SECONDS,
        "How long a ping may take before the connection is given up.")
    max_lifetime: float = option(1800.0, kinds.SECONDS,
        "At what age a connection is replaced, less up to a tenth by chance; 0 is never.")
    session_reset: SessionReset = option("auto", kinds.SESSION_RESET,
        "When a session's state is reset after use, and whether.")
    reset_timeout: float = option(5.0, kinds.POSITIVE_SECONDS,
        "How long making a used connection fit again may take before it is closed.")
    retry_unknown: bool = option(False, kinds.FLAG,
        "Whether to repeat also what may already have taken effect: at least once instead of at most once.")
    commit_log: str | None = option(None, kinds.TABLE,
        "A table of the pool's own, in which every retried transaction that writes leaves a row, so that a COMMIT "
        "whose answer was lost is known for certain also after a crash or a failover. The pool makes it and prunes it.")
    pure_functions: tuple[str, ...] = option((), kinds.FUNCTION_NAMES,
        "Functions of the database's that write nothing.")
    observers: tuple[Observer, ...] = option((), kinds.OBSERVERS, "Functions that are called with every event.")
    retry_budget: RetryBudget = option(None, kinds.BUDGET,
        "What retries may add to the load of a server that is up but failing.",
        factory=RetryBudget, shown="RetryBudget()")
    clock: Clock | None = option(None, kinds.CLOCK, "Where the time comes from; None is the machine.")
    tcp_keepalive: bool = option(True, kinds.FLAG, "Whether the kernel probes idle connections of a TCP server.")
    tcp_user_timeout: float | None = option(30.0, kinds.SECONDS_OR_NONE,
        "After how long without an answer the kernel gives a TCP connection up; None is its own limit.")
    # fmt: on
    tls: Mapping[str, str] = field(default_factory=dict)
    sslpassword: Secret | None = field(default=None)
    passed: Hidden[PassedOn] | None = field(default=None)

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            kind.check(name, getattr(self, name))
        for setting in _NO_SETTINGS.intersection(self.server_settings):
            raise ConfigurationError(
                f"server_settings holds {setting!r}, which is no setting of the server's but an argument"
            )
        for observer in self.observers:
            if not is_observer(observer):
                raise ConfigurationError(
                    f"observers must be plain functions, which need not be awaited, not {shown(observer)}"
                )
        if self.min_size > self.max_size:
            raise ConfigurationError(f"min_size={self.min_size} must be at most max_size={self.max_size}")
        if not self.min_size <= self.init_size <= self.max_size:
            raise ConfigurationError(
                f"init_size={self.init_size} must be from min_size={self.min_size} to max_size={self.max_size}"
            )
        if self.tls.get("sslrootcert") == SYSTEM_ROOTS and isinstance(self.ssl, str) and self.ssl != "verify-full":
            raise ConfigurationError(
                f"sslrootcert=system needs sslmode=verify-full, not {self.ssl!r}: anyone can get a certificate from an "
                "authority that the system trusts, but not for this host's name"
            )
        hosts, ports = len(self.host or (None,)), len(self.port or (None,))
        if self.port is not None and ports != hosts:
            raise ConfigurationError(
                f"port must be one number, or one for each of the {hosts} hosts, not {ports} numbers"
            )

    def __repr__(self) -> str:
        return f"PoolConfig({', '.join(self._shown())})"

    def _shown(self) -> Iterator[str]:
        """Yield what differs from the defaults, without secrets and without what may hold some."""
        for each in fields(self):
            value = getattr(self, each.name)
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            if value is default or isinstance(value, Secret) or (each.name in _KINDS and _KINDS[each.name].quiet):
                if value is not None and each.name in ("password", "sslpassword"):
                    yield f"{each.name}={MASK}"
            elif each.name != "passed" and value != default:
                yield f"{each.name}={value!r}"

    @classmethod
    def from_arguments(cls, dsn: str | SealedDsn = None, /, **arguments: object) -> Self:
        """Validate what the application says.

        Explicit arguments win over the DSN, the DSN over the service file, and that over the environment, which fills in
        PGHOST, PGPORT, PGUSER, PGDATABASE, PGPASSWORD, PGPASSFILE, PGSERVICE and PGTARGETSESSIONATTRS. The rest of the
        environment is the driver's to read.

        With `connect=`, the DSN and what is not an argument of the pool's are that function's business, as in
        `asyncpg.create_pool`: they are kept as they are, and not even read.

        Args:
            dsn: `postgresql://user:password@host:port/database?option=value`. Options are those of asyncpg, the server's
                settings, and Prisma's `connection_limit`, `connect_timeout`, `pool_timeout`, `socket_timeout`, `schema`,
                `pgbouncer` and `statement_cache_size`.
            **arguments: See `ARGUMENTS`.

        Raises:
            ConfigurationError: Something is unknown, out of range, or cannot be honoured. No secret is part of the message
                or of any frame of this package's.
        """
        sealed, arguments = seal(dsn, arguments)
        del dsn
        if arguments.get("connect") is not None:
            return cls(**_shaped(_passed_on(sealed, arguments)))  # type: ignore[arg-type]
        require_known(arguments, [argument.name for argument in ARGUMENTS], elsewhere=_ELSEWHERE)
        given = _said(arguments)
        _require_one_source(given)
        given = _with_service(_merged(_read(sealed), given))
        return cls(**_shaped(_with_environment(given)))  # type: ignore[arg-type]

    def redirected(self, dsn: SealedDsn, arguments: Mapping[str, object]) -> Self:
        """Return what `set_connect_args` makes of this: other connection arguments, and none of the earlier ones."""
        if self.connect is not None:
            return type(self).from_arguments(dsn, connect=self.connect, **arguments)
        require_known(arguments, CONNECTION_ARGUMENTS)
        return type(self).from_arguments(dsn, **arguments)

    def keeps_awake(self) -> Iterator[str]:
        """Yield why a database that pauses when it has no connections never would."""
        if not self.may_pause:
            return
        if self.min_size:
            yield f"min_size={self.min_size} keeps connections open for ever; use min_size=0"
        if not self.max_inactive_connection_lifetime:
            yield "max_inactive_connection_lifetime=0 never closes a connection; use 50"

    def connect_arguments(self) -> dict[str, object]:
        """Return what `asyncpg.connect` is called with, except for the password and the classes.

        What asyncpg knows in a DSN only stands in a DSN that holds nothing else. Only there is `sslpassword` revealed.
        """
        arguments: dict[str, object] = {name: getattr(self, name) for name in _DRIVERS_OWN}
        arguments = {name: value for name, value in arguments.items() if value is not None or name == "timeout"}
        if self.host is not None:
            arguments["host"] = list(self.host)
        if self.port is not None:  # without a host, one port is for all places in which the driver looks
            arguments["port"] = list(self.port) if self.host is not None else self.port[0]
        if self.server_settings:
            arguments["server_settings"] = dict(self.server_settings)
        options = dict(self.tls)
        if options.get("sslrootcert") == SYSTEM_ROOTS and self.ssl in ("verify-full", True):
            return {**arguments, "ssl": self._system_context()}
        if self.sslpassword is not None:
            options["sslpassword"] = self.sslpassword.reveal()
        if options:
            # Without a path: asyncpg would take an empty one for the database's name.
            arguments["dsn"] = f"postgresql://?{urlencode(options)}"
        return arguments

    def _system_context(self) -> ssl_module.SSLContext:
        """Return what asyncpg makes of the same options, but with the authorities that the system trusts."""
        context = ssl_module.create_default_context()
        context.minimum_version = _tls_version(self.tls.get("ssl_min_protocol_version", "TLSv1.2"))
        if "ssl_max_protocol_version" in self.tls:
            context.maximum_version = _tls_version(self.tls["ssl_max_protocol_version"])
        if "sslcrl" in self.tls:
            context.load_verify_locations(cafile=self.tls["sslcrl"])
            context.verify_flags |= ssl_module.VERIFY_CRL_CHECK_CHAIN
        if "sslcert" in self.tls:
            password = "" if self.sslpassword is None else self.sslpassword.reveal
            context.load_cert_chain(self.tls["sslcert"], self.tls.get("sslkey"), password=password)
        if ssl_module.HAS_ALPN:
            context.set_alpn_protocols(["postgresql"])  # PostgreSQL 17 asks for it when TLS begins unasked
        return context

    def secrets(self) -> tuple[Secret, ...]:
        """Return every secret known now, for `scrub`. What a password function of the application's returns is not known."""
        password: object = self.password.last if isinstance(self.password, PasswordFile) else self.password
        if self.passed is not None:
            password = _sealed(self.passed.reveal().arguments.get("password"))
        return tuple(secret for secret in (password, self.sslpassword) if isinstance(secret, Secret))


def _tls_version(name: str) -> ssl_module.TLSVersion:
    return ssl_module.TLSVersion[name.replace(".", "_")]


def _said(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments without those whose `None` is as if they were not given, rather than a value that wins over the DSN's."""
    return {name: value for name, value in arguments.items() if value is not None or name not in _ABSENT_IF_NONE}


def seal(
    dsn: object, arguments: Mapping[str, object], *, passes_on: bool = False
) -> tuple[SealedDsn, dict[str, object]]:
    """Return the DSN and the arguments with everything that may be secret hidden; a `dsn` among them is taken out.

    A function that takes these from the application puts what this returns in the place of what it was given, first of
    all: a traceback with captured locals then has nothing to show. What is sealed already stays so. Nothing is raised here.

    Args:
        dsn: The DSN.
        arguments: The keywords.
        passes_on: Whether there is a `connect=` function that takes both as they are, also without one among `arguments`.
    """
    raw = passes_on or arguments.get("connect") is not None
    sealed: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Hidden | Unusable) or (value is None and not raw):
            sealed[name] = value
        elif name not in _POOL_ARGUMENTS and (raw or name not in CONNECTION_ARGUMENTS):
            sealed[name] = Hidden(value)  # under a misspelt name stands anything
        elif name in ("password", "credentials"):
            sealed[name] = value if callable(value) else _sealed(value)
        elif name == "server_settings" and isinstance(value, Mapping):
            sealed[name] = _Settings(value)
        else:
            sealed[name] = _unrevealing(name, value)
    named = sealed.pop("dsn", None)
    given = (named.reveal() if type(named) is Hidden else named) if dsn is None else dsn
    if raw:
        return given if isinstance(given, Hidden) else Hidden(given), sealed
    return _sealed(given), sealed


def seal_leniently(dsn: object) -> SealedDsn:
    """Return a DSN, sealed, in which what other programs write for themselves is taken, as `arguments_of_dsn` says."""
    return _LenientDsn(dsn) if isinstance(dsn, str) else _sealed(dsn)


def _sealed(value: object) -> Hidden[object] | Unusable | None:
    if value is None or isinstance(value, Hidden | Unusable):
        return value
    return Secret(value) if isinstance(value, str) else Unusable(type(value).__name__)


def _unrevealing(name: str, value: object) -> object:
    """Return the value, or what stands for it if it is a text that has no place there and may be a secret."""
    if isinstance(value, str | bytes | os.PathLike | list | tuple) and holds_secret(value):
        return Unusable(f"a {type(value).__name__} that holds a password")
    if isinstance(value, str) and not _KINDS[name].fits(value) and not _KINDS[name].shows(value):
        return Unusable(shown(value, _KINDS[name].shows))
    return value


def _passed_on(dsn: SealedDsn, arguments: Mapping[str, object]) -> dict[str, object]:
    """Return the pool's own arguments, and what its `connect=` function is called with.

    What the pool must know of the latter it reads there, if it can; the function may give these words another meaning.
    """
    own = _said({name: value for name, value in arguments.items() if name in _POOL_ARGUMENTS})
    rest = {name: _revealed(value) for name, value in arguments.items() if name not in _POOL_ARGUMENTS}
    shaped = _shaped({name: rest[name] for name in _HEEDED if rest.get(name) is not None})
    for name, value in shaped.items():
        with contextlib.suppress(ConfigurationError):
            _KINDS[name].check(name, value)
            own[name] = value
    return {**own, "passed": Hidden(PassedOn(dsn=_revealed(dsn), arguments=rest))}


def _revealed(value: object) -> object:
    return value.reveal() if isinstance(value, Hidden) else value


def _require_one_source(given: Mapping[str, object]) -> None:
    if callable(given.get("user")):
        raise ConfigurationError(
            "user must be a str; a function that returns user and password is given as credentials="
        )
    beside = [name for name in ("user", "password", "passfile") if name in given]
    if "credentials" in given and beside:
        raise ConfigurationError(f"credentials= gives the user and the password: leave {beside[0]} out")


def _read(dsn: SealedDsn) -> dict[str, object]:
    if isinstance(dsn, Unusable):
        raise ConfigurationError(f"dsn must be a str, not {dsn}")
    if not isinstance(dsn, Secret) or dsn == Secret(""):
        return {}
    return arguments_of_dsn(dsn, lenient=isinstance(dsn, _LenientDsn))


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Lay `over` upon `base`. Settings are merged one by one; a host brings its port along."""
    merged = {**base, **over}
    if "host" in over and "port" not in over:
        merged.pop("port", None)
    if isinstance(over.get("ssl"), UnlessStated):
        merged["ssl"] = base.get("ssl", over["ssl"])
    for name in ("server_settings", "tls"):
        below, above = base.get(name), over.get(name)
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            merged[name] = {**below, **above} if name == "tls" else _Settings({**below, **above})
    return merged


def _with_service(given: dict[str, object]) -> dict[str, object]:
    service = given.get("service") or os.environ.get("PGSERVICE")
    if not service:
        return given
    for name, value in (("service", service), ("servicefile", given.get("servicefile"))):
        _KINDS[name].check(name, value)
    said = arguments_of_service(str(service), _path(given.get("servicefile")))
    return _merged(said, {**given, "service": service})


def _path(value: object) -> str | None:
    return None if value is None else os.fspath(cast("str | os.PathLike[str]", value))


def _with_environment(given: dict[str, object]) -> dict[str, object]:
    """Fill in what libpq's environment variables say, and what the password file says."""
    for name, variable in _VARIABLES.items():
        if name not in given:
            given = arguments_of_variable(variable, name) | given
    given = _with_ports(given, arguments_of_variable("PGPORT", "port").get("port"))
    if isinstance(given.get("ssl"), UnlessStated) and os.environ.get("PGSSLMODE"):
        given = {name: value for name, value in given.items() if name != "ssl"}
    given = _with_system_roots(given)
    if "credentials" in given:
        return given | {"user": None, "password": None}
    if "password" not in given:
        given["password"] = _sealed(os.environ.get("PGPASSWORD") or None) or _from_password_file(given)
    return given


def _with_system_roots(given: dict[str, object]) -> dict[str, object]:
    """Settle what `sslrootcert=system` means, as libpq has it: `verify-full`, with the authorities that the system trusts."""
    tls = cast("Mapping[str, str]", given.get("tls", {}))
    if (tls.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")) != SYSTEM_ROOTS:
        return given
    stated = None if isinstance(given.get("ssl"), UnlessStated) else given.get("ssl")
    mode = stated or os.environ.get("PGSSLMODE") or "verify-full"
    return {**given, "ssl": mode, "tls": {**tls, "sslrootcert": SYSTEM_ROOTS}}


def _with_ports(given: dict[str, object], usual: object) -> dict[str, object]:
    """Make `host` and `port` tuples, of the same length where possible; what cannot be made one is left to be refused."""
    hosts = _listed(given.get("host"))
    ports = _listed(given.get("port", usual))
    if isinstance(ports, tuple):
        one = usual[0] if isinstance(usual, tuple) and len(usual) == 1 else _DEFAULT_PORT
        # asyncpg takes digits too: ports are often read from the environment.
        digits = (int(port) if isinstance(port, str) and port.isascii() and port.isdigit() else port for port in ports)
        ports = tuple(one if port is None else port for port in digits)
    if isinstance(hosts, tuple) and (ports is None or isinstance(ports, tuple)):
        ports = ports or (_DEFAULT_PORT,)
        ports = ports * len(hosts) if len(ports) == 1 else ports
    return {**given, "host": None if hosts == () else hosts, "port": None if ports == () else ports}


def _listed(value: object) -> object:
    if isinstance(value, str | int | float):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else value


def _from_password_file(given: Mapping[str, object]) -> PasswordFile | None:
    """Return where the password file has the password, if it has one for any of the hosts."""
    for name in ("host", "port", "user", "database", "passfile"):
        _KINDS[name].check(name, given.get(name))
    path = chosen_file(_path(given.get("passfile")))
    user = given.get("user")
    with contextlib.suppress(KeyError, OSError, ImportError):
        user = user or getpass.getuser()
    if path is None or not user:
        return None
    hosts = cast("Iterable[str]", given.get("host") or ("localhost",))
    ports = cast("Iterable[int]", given.get("port") or (_DEFAULT_PORT,))
    found = PasswordFile(path, list(zip(hosts, ports, strict=False)), str(given.get("database") or user), str(user))
    return found if found.last is not None else None


def _shaped(given: dict[str, object]) -> dict[str, object]:
    """Bring what remains into the shape that `PoolConfig` holds it in."""
    shaped = dict(given)
    if shaped.get("timeout", 0.0) is None:
        shaped["timeout"] = LONGEST_TIMEOUT
    if "init_size" not in shaped and "min_size" in shaped:
        shaped["init_size"] = shaped["min_size"]
    for name in ("pure_functions", "observers"):
        value = shaped.get(name)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            shaped[name] = tuple(value)
    settings = shaped.get("server_settings")
    if isinstance(settings, Mapping):
        shaped["server_settings"] = _Settings(settings)
    # asyncpg's own enumerations may be given for these two.
    if isinstance(target := shaped.get("target_session_attrs"), enum.Enum):
        shaped["target_session_attrs"] = target.value
    if isinstance(mode := shaped.get("ssl"), enum.Enum):
        shaped["ssl"] = mode.name.replace("_", "-")
    return shaped


_KINDS: Mapping[str, Kind] = {each.name: each.metadata["kind"] for each in fields(PoolConfig) if each.metadata}

ARGUMENTS: tuple[Argument, ...] = tuple(
    Argument(
        name=each.name,
        unit=_KINDS[each.name].unit,
        default=each.metadata["default"] or repr(each.default),
        meaning=each.metadata["meaning"],
    )
    for each in fields(PoolConfig)
    if each.name in _KINDS
)
"""Every constructor argument, in the order in which documentation shows them."""

CONNECTION_ARGUMENTS = frozenset(
    {*_DRIVERS_OWN, "host", "port", "password", "passfile", "credentials", "service", "servicefile", "server_settings"}
)
"""Those that say where and how to connect; with `connect=`, these and unknown ones are passed on to that function."""

_POOL_ARGUMENTS = frozenset(_KINDS) - CONNECTION_ARGUMENTS
# But of `command_timeout` it is a value: no limit.
_ABSENT_IF_NONE = frozenset(each.name for each in ARGUMENTS if each.default == "None") - {"command_timeout"}
