"""Reads DSNs and service files. What it raises never repeats their text.

Everything that reads text reports trouble as `_Problem`, which ends in this module: `ConfigurationError` is raised where
neither the text nor an exception that saw it is at hand any more. `urllib.parse.urlsplit` is not used, since it remembers
what it was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import unquote

from resilient_pool._validation import nearest
from resilient_pool.config.secrets import Hidden, Secret
from resilient_pool.config.settings_names import SETTINGS_NAMES
from resilient_pool.errors import ConfigurationError

LONGEST_TIMEOUT = 86400.0
"""What "no limit" means to `timeout`, in seconds: one day."""

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TARGETS = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
GSS_LIBRARIES = ("gssapi", "sspi")
HIGHEST_PORT = 65535

SYSTEM_ROOTS = "system"
"""The value of `sslrootcert` that stands for the authorities that the system trusts."""

_FORM = "postgresql://user:password@host:port/database?option=value"
_QUOTING = (
    "most likely the user name or the password holds a character that must be percent-encoded "
    "(/ is %2F, : is %3A, @ is %40, % is %25, # is %23, ? is %3F, [ is %5B, ] is %5D; "
    'urllib.parse.quote(password, safe="") does it)'
)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,62}")
_BRACKETED = re.compile(r"\[(?P<address>[^\[\]]+)\](?::(?P<port>.*))?")
# SQLAlchemy's "postgresql+asyncpg", JDBC's "jdbc:postgresql", Django's "postgis" and the like.
_FOREIGN_SCHEME = re.compile(r"(?:jdbc:)?(?:postgres|postgresql|postgis|pgsql|psql|ecto|timescale)(?:\+\w+)?")

# What the server takes at the start of a session although `pg_settings` does not list it.
_STARTUP = frozenset({"options", "role", "session_authorization"})

# Options of libpq and Prisma whose effect asyncpg cannot have, and those of their values which ask for none.
_NEVER_HARMLESS = (
    "hostaddr keepalives_count keepalives_idle keepalives_interval oauth_client_id oauth_client_secret oauth_issuer "
    "oauth_scope require_auth requirepeer scram_client_key scram_server_key sslaccept sslcrldir sslidentity sslkeylogfile "
    "sslsrvname"
)
_UNSUPPORTED: Mapping[str, tuple[str, ...]] = {
    "channel_binding": ("disable", "prefer"),
    "client_encoding": ("utf8", "utf-8", "unicode", "auto"),
    "gssdelegation": ("0",),
    "gssencmode": ("disable", "prefer"),
    "load_balance_hosts": ("disable",),
    "max_protocol_version": ("3.0", "latest"),
    "min_protocol_version": ("3.0",),
    "replication": ("0", "false", "no", "off"),
    "sslcertmode": ("allow",),
    "sslcompression": ("0",),
    "sslsni": ("1",),
    **dict.fromkeys(_NEVER_HARMLESS.split(), ()),
}

_INSTEAD: Mapping[str, str] = {
    "channel_binding": "; use sslmode=verify-full, with sslrootcert=system or a file, and remove it",
    "hostaddr": "; write the address as the host",
    "keepalives_count": "; use the argument tcp_user_timeout",
    "keepalives_idle": "; use the argument tcp_user_timeout",
    "keepalives_interval": "; use the argument tcp_user_timeout",
    "sslaccept": "; write sslmode=require or sslmode=verify-full",
    "sslcrldir": "; write sslcrl",
}

_REMOVE = "; remove it"

# What other programs write into a DSN for themselves, in small letters, under what says the same here.
_FOREIGN_BY_HINT: Mapping[str, str] = {
    _REMOVE: (
        "async_fallback pool_pre_ping prepared_statement_name_func "  # SQLAlchemy
        "adapter advisory_locks charset conn_health_checks encoding "  # Rails, Ecto, Django, Laravel
        "insert_returning reaping_frequency "
        "binarytransfer defaultrowfetchsize loadbalancehosts preferquerymode "  # JDBC, R2DBC
        "rewritebatchedinserts sslfactory stringtype "
        "binary_parameters disable_prepared_binary_result "  # Go: lib/pq, pgx, golang-migrate, sql-migrate
        "pool_health_check_period x-migrations-table x-multi-statement x-statement-timeout "
        "single_use_connections supa uselibpqcompat workaround"  # Prisma, Supabase, node-postgres
    ),
    "; use the arguments max_size and min_size": "max_overflow pool_size pool pool_max_conns pool_min_conns pool_min_idle_conns max min",
    "; use the arguments max_lifetime and max_inactive_connection_lifetime": (
        "pool_recycle conn_max_age idle_timeout pool_max_conn_idle_time pool_max_conn_lifetime "
        "pool_max_conn_lifetime_jitter idletimeoutmillis max_idle_connection_lifetime max_connection_lifetime "
    ),
    "; use statement_cache_size, 0 for none": (
        "prepared_statement_cache_size prepare prepared_statements preparethreshold "
        "preparedstatementcachequeries default_query_exec_mode description_cache_capacity "
        "statement_cache_capacity statement_cache_mode "
    ),
    "; write sslmode=require, or sslmode=verify-full": "ssl",
    "; use the argument deadline": "checkout_timeout",
    "; write client_min_messages": "min_messages",
    "; it is a pool's argument": "reconnect",
    "; write search_path": "schema_search_path currentschema",
    "; use the arguments timeout, command_timeout and deadline": "timeout",
    "; write each setting as an option": "variables",
    "; write application_name": "applicationname",
    "; write connect_timeout": "connecttimeout logintimeout connectiontimeoutmillis",
    "; write socket_timeout": "sockettimeout",
    "; write target_session_attrs": "targetservertype",
    "; write keepalives": "tcpkeepalive",
    "; write options=endpoint%3D...": "endpoint",
}
_FOREIGN: Mapping[str, str] = {name: hint for hint, names in _FOREIGN_BY_HINT.items() for name in names.split()}

_SSL_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("1", "on", "t", "true", "yes", "no-verify"), "require"),
    **dict.fromkeys(("0", "f", "false", "no", "off"), "disable"),
}
_SERVER_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("master", "primary"), "primary"),
    **dict.fromkeys(("secondary", "slave"), "standby"),
    **dict.fromkeys(("prefersecondary", "preferslave"), "prefer-standby"),
    **dict.fromkeys(("any", "preferprimary"), "any"),
}
# What of them a single connection should heed: the option that says the same, and what its values mean.
_HEEDED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "applicationname": ("application_name", {}),
    "currentschema": ("search_path", {}),
    "hostaddr": ("host", {}),
    "schema_search_path": ("search_path", {}),
    "ssl": ("sslmode", _SSL_WORDS),
    "targetservertype": ("target_session_attrs", _SERVER_TYPES),
}
_PREPARING = ("prepare", "prepared_statement_cache_size", "prepared_statements")

T = TypeVar("T")


class _Problem(Exception):  # noqa: N818 - it never leaves this module
    """What is wrong, in words that hold nothing of the text that was read; `misquoted` if quoting may be the cause."""

    def __init__(self, text: str, *, misquoted: bool = False) -> None:
        self.misquoted = misquoted
        super().__init__(text)


def arguments_of_dsn(dsn: Secret, *, lenient: bool = False) -> dict[str, object]:
    """Return what a DSN says, by the names of this package's arguments, beside `tls` and `sslpassword`.

    Args:
        dsn: The DSN.
        lenient: Whether to take what other programs write into a DSN for themselves. What a single connection should heed
            is translated, the rest is ignored. An option that no program is known to use is refused all the same.

    Raises:
        ConfigurationError: The DSN is malformed or has an option that is unknown or cannot be honoured. Its text is part
            neither of the message nor of the traceback.
    """
    return _reported("the DSN", lambda: _read_dsn(dsn.reveal().strip(), lenient=lenient), hint=f"; {_QUOTING}")


def arguments_of_service(service: str, servicefile: str | None) -> dict[str, object]:
    """Return what the service file says about `service`, as `arguments_of_dsn` does.

    Raises:
        ConfigurationError: The file cannot be read, does not define the service, or says something that cannot be honoured.
    """
    section = _reported("the service file", lambda: Hidden(_section(service, servicefile)))
    return _reported(f"the service {service!r}", lambda: _read_options(_service_pairs(section.reveal())))


def arguments_of_variable(variable: str, option: str) -> dict[str, object]:
    """Return what an environment variable says that holds the value of one option.

    Raises:
        ConfigurationError: Its value is not one of the option's.
    """
    value = os.environ.get(variable)
    return _reported(variable, lambda: _read_options({option: value} if value else {}))


def _reported(source: str, read: Callable[[], T], *, hint: str = "") -> T:
    try:
        return read()
    except _Problem as found:
        problem = f"in {source}: {found}{hint if found.misquoted else ''}"
    raise ConfigurationError(problem)  # not inside `except`: the problem's traceback has seen the text


def home_file(posix: str, windows: str) -> Path | None:
    """Return where libpq looks for a file of the user's: in the home directory, or in `%APPDATA%` on Windows."""
    if os.name == "nt":
        directory = os.environ.get("APPDATA")
        return Path(directory) / "postgresql" / windows if directory else None
    try:
        return Path.home() / posix
    except (RuntimeError, KeyError):
        return None


# The DSN as a whole


def _read_dsn(dsn: str, *, lenient: bool) -> dict[str, object]:
    scheme, separator, rest = dsn.partition("://")
    if not separator:
        raise _Problem(f"it must have the form {_FORM}")
    if not (lenient and _FOREIGN_SCHEME.fullmatch(scheme.lower())):
        _require_scheme(scheme.lower())
    if _CONTROL.search(rest):
        raise _Problem("a control character, such as a line break or a tab, must be percent-encoded")
    if "#" in rest:
        raise _Problem("a '#' must be written %23", misquoted=True)
    head, _, query = rest.partition("?")
    authority, _, path = head.partition("/")
    if "@" in path or "@" in query or authority.count("@") > 1:
        raise _Problem("an '@' that does not end the user's name and password must be written %40", misquoted=True)
    login, _, hosts = authority.rpartition("@")
    return _read_parts(login, hosts, path, query, lenient=lenient)


def _read_parts(login: str, hosts: str, path: str, query: str, *, lenient: bool) -> dict[str, object]:
    user, _, password = login.partition(":")
    found: dict[str, object] = {}
    if user:
        found["user"] = _decoded(user, "user name")
    if password:
        found["password"] = Secret(_decoded(password, "password"))
    if hosts:
        found |= _read_hosts(hosts, _decoded)
    if path:
        found["database"] = _decoded(path, "database name")
    pairs = _query_pairs(query)
    if lenient:
        pairs = _translated(pairs)
    # What stands before the '?' wins over the same said behind it, as in asyncpg.
    if hosts:
        pairs.pop("host", None)
    return _read_options(pairs) | found


def _require_scheme(scheme: str) -> None:
    if scheme.startswith(("postgresql+", "postgres+")):
        raise _Problem(
            "the scheme is written as for SQLAlchemy, with a driver's name behind a '+'; write postgresql:// instead"
        )
    if scheme not in ("postgresql", "postgres"):
        raise _Problem(f"the scheme must be postgresql or postgres: {_FORM}")


def _decoded(text: str, what: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise _Problem(f"the {what} has a '%' without two hexadecimal digits behind it, or %00", misquoted=True)
    try:
        return unquote(text, errors="strict")
    except UnicodeError:
        raise _Problem(f"the {what} is not percent-encoded UTF-8") from None


def _query_pairs(query: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, separator, value = item.partition("=")
        if not separator:
            raise _Problem("an option has no '='", misquoted=True)
        # '+' is a blank here, and only here, as in asyncpg.
        pairs[_decoded(name, "option's name")] = _decoded(value.replace("+", " "), "option's value")
    return {name: value for name, value in pairs.items() if value}


def _translated(pairs: Mapping[str, str]) -> dict[str, str]:
    """Return the options without what is not meant for a connection; our own word wins over another program's."""
    own = {name: value for name, value in pairs.items() if name.lower() not in _FOREIGN and name not in _UNSUPPORTED}
    heeded: dict[str, str] = {}
    for name, value in pairs.items():
        if name.lower() in _HEEDED:
            option, words = _HEEDED[name.lower()]
            heeded[option] = words.get(value.lower(), value)
        elif name in _PREPARING and value in ("0", "false"):
            heeded["statement_cache_size"] = "0"
    options = {**heeded, **own}
    if "sslmode" in options:
        options["sslmode"] = _SSL_WORDS.get(options["sslmode"].lower(), options["sslmode"])
    if options.get("sslrootcert") == SYSTEM_ROOTS:
        options["sslmode"] = "verify-full"  # a lesser mode beside it is no reason not to migrate
    return options


# Hosts and ports


def _read_hosts(text: str, decode: Callable[[str, str], str]) -> dict[str, object]:
    pairs = [_read_host(each, decode) for each in text.split(",")]
    hosts, ports = tuple(host for host, _ in pairs), tuple(port for _, port in pairs)
    return {"host": hosts, "port": ports} if any(ports) else {"host": hosts}


def _read_host(text: str, decode: Callable[[str, str], str]) -> tuple[str, int | None]:
    if text.startswith("/"):
        return text, None
    if text.startswith("["):
        match = _BRACKETED.fullmatch(text)
        if match is None:
            raise _Problem("an IPv6 address must have the form [address]:port", misquoted=True)
        host, port = match["address"], match["port"] or ""
    else:
        host, _, port = text.partition(":")
    host = decode(host, "host")
    if not host or "[" in host or "]" in host:
        raise _Problem("a host is empty or malformed", misquoted=True)
    return host, _read_port(decode(port, "port")) if port else None


def _read_port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) <= HIGHEST_PORT:  # noqa: PLR2004 - 65535 has 5 digits
        return int(text)
    raise _Problem(f"a port must be a number from 1 to {HIGHEST_PORT}", misquoted=True)


# Options


def _read_options(pairs: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    settings: dict[str, str] = {}
    for name, value in pairs.items():
        if name in _OPTIONS:
            argument, read = _OPTIONS[name]
            found.setdefault(argument, read(name, value))
        elif name in _TLS:
            found["tls"] = cast("dict[str, object]", found.get("tls", {})) | {name: _TLS[name](name, value)}
        elif _is_setting(name):
            settings[name] = value
        elif name not in _ALIASES:
            # Behind a password an unknown name may be the rest of that password.
            _require_harmless(name, value, behind_a_password="password" in pairs or "sslpassword" in pairs)
    for name in _ALIASES.keys() & pairs:
        setting, form = _ALIASES[name]
        settings.setdefault(setting, form(pairs[name]))
    if settings:
        found["server_settings"] = settings
    if found.pop("pgbouncer", False):  # it overrules a size, as in Prisma
        found["statement_cache_size"] = 0
    if isinstance(host := found.pop("host", None), str):
        found = _read_hosts(host, lambda text, _: text) | found
    return found


def _is_setting(name: str) -> bool:
    known = name.lower() in SETTINGS_NAMES or name in _STARTUP or "." in name.strip(".")
    return known and name not in _UNSUPPORTED


def _require_harmless(name: str, value: str, *, behind_a_password: bool) -> None:
    """Raise `_Problem` unless the option asks for nothing that asyncpg does not do anyway."""
    if name.lower() in _FOREIGN:
        raise _Problem(f"the option {name!r} is meant for another program{_FOREIGN[name.lower()]}")
    if name in _UNSUPPORTED:
        if value.lower() in _UNSUPPORTED[name]:
            return
        raise _Problem(f"asyncpg cannot honour the option {name!r}{_INSTEAD.get(name, _REMOVE)}")
    if behind_a_password or not _IDENTIFIER.fullmatch(name):
        raise _Problem("an unknown option", misquoted=True)
    known = {*_OPTIONS, *_TLS, *_ALIASES, *_UNSUPPORTED, *_FOREIGN, *SETTINGS_NAMES}
    raise _Problem(f"unknown option {name!r}{nearest(name, known)}")


_Reader = Callable[[str, str], object]
"""Makes an argument's value of an option's name and value."""


def _text(_: str, value: str) -> str:
    return value


def _secret(_: str, value: str) -> Secret:
    return Secret(value)


def _ports(_: str, value: str) -> tuple[int, ...]:
    return tuple(_read_port(text) for text in value.split(","))


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise _Problem(f"the option {name!r} must be a number") from None
    return int(number) if number.is_integer() else number


def _seconds(unlimited: float | None, *, in_a_second: int = 1) -> _Reader:
    """Read a time; zero is no limit in libpq's and in Prisma's words."""
    return lambda name, value: float(_number(name, value)) / in_a_second or unlimited


def _words(words: Mapping[str, object]) -> _Reader:
    """Read one of some words. A value that is none of them is not shown: it may be a password in the wrong place."""
    known = {word.lower(): meaning for word, meaning in words.items()}

    def read(name: str, value: str) -> object:
        if value.lower() not in known:
            raise _Problem(f"the option {name!r} must be one of {', '.join(words)}{nearest(value, words)}")
        return known[value.lower()]

    return read


def _one_of(words: Iterable[str]) -> _Reader:
    return _words({word: word for word in words})


# The arguments that DSNs and service files hold, under the name that they have there.
_OPTIONS: Mapping[str, tuple[str, _Reader]] = {
    "host": ("host", _text),
    "port": ("port", _ports),
    "user": ("user", _text),
    "password": ("password", _secret),
    "dbname": ("database", _text),
    "database": ("database", _text),
    "passfile": ("passfile", _text),
    "service": ("service", _text),
    "servicefile": ("servicefile", _text),
    "sslmode": ("ssl", _one_of(SSL_MODES)),
    "sslnegotiation": ("direct_tls", _words({"direct": True, "postgres": False})),
    "sslpassword": ("sslpassword", _secret),
    "target_session_attrs": ("target_session_attrs", _one_of(TARGETS)),
    "krbsrvname": ("krbsrvname", _text),
    "gsslib": ("gsslib", _one_of(GSS_LIBRARIES)),
    "keepalives": ("tcp_keepalive", _words({"1": True, "0": False})),
    "tcp_user_timeout": ("tcp_user_timeout", _seconds(None, in_a_second=1000)),
    "connection_limit": ("max_size", _number),
    "connect_timeout": ("timeout", _seconds(LONGEST_TIMEOUT)),
    "pool_timeout": ("deadline", _seconds(None)),
    "socket_timeout": ("command_timeout", _seconds(None)),
    "statement_cache_size": ("statement_cache_size", _number),
    "pgbouncer": ("pgbouncer", _words({"true": True, "false": False})),
}

# asyncpg knows these in a DSN only.
_TLS: Mapping[str, _Reader] = {
    **dict.fromkeys(("sslcert", "sslkey", "sslrootcert", "sslcrl"), _text),
    **dict.fromkeys(
        ("ssl_min_protocol_version", "ssl_max_protocol_version"), _one_of(("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"))
    ),
}

# Other words for a setting, which wins. Prisma's schema is one identifier, to be taken as it is written.
_ALIASES: Mapping[str, tuple[str, Callable[[str], str]]] = {
    "fallback_application_name": ("application_name", str),
    "schema": ("search_path", lambda schema: '"' + schema.replace('"', '""') + '"'),
}


# Service files


def _section(service: str, servicefile: str | None) -> list[str]:
    """Return the lines behind the first header of a service."""
    chosen = servicefile or os.environ.get("PGSERVICEFILE")
    path = Path(chosen) if chosen else home_file(".pg_service.conf", ".pg_service.conf")
    if path is None:
        raise _Problem("there is no home directory to look for it in")
    named = f"the service file {str(path)!r}" if path.is_absolute() else "the service file"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise _Problem(f"{named} cannot be read: {type(error).__name__}") from None
    headers = [number for number, line in enumerate(lines) if line.startswith("[")]
    for number, end in zip(headers, [*headers[1:], len(lines)], strict=True):
        if lines[number] == f"[{service}]":
            return lines[number + 1 : end]
    # The name of a service that is not there may be anything, a password too.
    raise _Problem(f"{named} has no service of the name asked for{nearest(service, (lines[n][1:-1] for n in headers))}")


def _service_pairs(lines: Iterable[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, separator, value = line.partition("=")
            if not separator or name.strip() == "service":
                raise _Problem("a line is not of the form option=value, or it names another service")
            if value.strip():
                pairs.setdefault(name.strip(), value.strip())
    return pairs
