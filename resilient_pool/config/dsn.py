"""Reads DSNs and service files. What it raises never repeats their text.

Everything that reads text reports trouble as `_Problem`, which ends in this module: `ConfigurationError` is raised where
neither the text nor an exception that saw it is at hand any more. `urllib.parse.urlsplit` is not used, since it remembers
what it was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote

from resilient_pool._validation import nearest
from resilient_pool.config.secrets import Secret
from resilient_pool.config.settings_names import SETTINGS_NAMES
from resilient_pool.errors import ConfigurationError

LONGEST_TIMEOUT = 86400.0
"""What "no limit" means to `timeout`, in seconds: one day."""

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

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
_HIGHEST_PORT = 65535
# SQLAlchemy's "postgresql+asyncpg", JDBC's "jdbc:postgresql", Django's "postgis" and the like.
_FOREIGN_SCHEME = re.compile(r"(?:jdbc:)?(?:postgres|postgresql|postgis|pgsql|psql|ecto|timescale)(?:\+\w+)?")

# The names by which DSNs and service files call what is an argument here.
_ARGUMENTS: Mapping[str, str] = {
    "host": "host",
    "port": "port",
    "user": "user",
    "dbname": "database",
    "database": "database",
    "passfile": "passfile",
    "service": "service",
    "servicefile": "servicefile",
    "sslmode": "ssl",
    "target_session_attrs": "target_session_attrs",
    "krbsrvname": "krbsrvname",
    "gsslib": "gsslib",
}

# asyncpg knows these in a DSN only.
_TLS = ("sslcert", "sslkey", "sslrootcert", "sslcrl", "ssl_min_protocol_version", "ssl_max_protocol_version")

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
    return _reported(f"the service {service!r}", lambda: _read_service(service, servicefile))


def arguments_of_variable(variable: str, option: str) -> dict[str, object]:
    """Return what an environment variable says that holds the value of one option.

    Raises:
        ConfigurationError: Its value is not one of the option's.
    """
    value = os.environ.get(variable)
    return _reported(variable, lambda: _read_options({option: value} if value else {}))


def _reported(source: str, read: Callable[[], dict[str, object]], *, hint: str = "") -> dict[str, object]:
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
    head, query = _cut(rest, "?")
    authority, path = _cut(head, "/")
    if "@" in path or "@" in query or authority.count("@") > 1:
        raise _Problem("an '@' that does not end the user's name and password must be written %40", misquoted=True)
    login, _, hosts = authority.rpartition("@")
    return _read_parts(login, hosts, path, query, lenient=lenient)


def _require_scheme(scheme: str) -> None:
    if scheme in ("postgresql", "postgres"):
        return
    if scheme.startswith(("postgresql+", "postgres+")):
        raise _Problem(
            "the scheme is written as for SQLAlchemy, with a driver's name behind a '+'; write postgresql:// instead"
        )
    raise _Problem(f"the scheme must be postgresql or postgres: {_FORM}")


def _cut(text: str, mark: str) -> tuple[str, str]:
    head, _, tail = text.partition(mark)
    return head, tail


def _read_parts(login: str, hosts: str, path: str, query: str, *, lenient: bool) -> dict[str, object]:
    found: dict[str, object] = {}
    user, _, password = login.partition(":")
    if user:
        found["user"] = _decoded(user, "user name")
    if password:
        found["password"] = Secret(_decoded(password, "password"))
    if hosts:
        found["host"], ports = _read_hosts(hosts.split(","), _decoded)
        if any(ports):
            found["port"] = ports
    if path:
        found["database"] = _decoded(path, "database name")
    pairs = _query_pairs(query)
    if lenient:
        pairs = _translated(pairs)
    # What stands before the '?' wins over the same said behind it, as in asyncpg.
    if hosts:
        pairs.pop("host", None)
    return _read_options(pairs) | found


def _decoded(text: str, what: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise _Problem(f"the {what} has a '%' without two hexadecimal digits behind it, or %00", misquoted=True)
    try:
        return unquote(text, errors="strict")
    except UnicodeError:
        problem = f"the {what} is not percent-encoded UTF-8"
    raise _Problem(problem)


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
        options["sslmode"] = _SSL_WORDS.get(options["sslmode"].lower(), options["sslmode"].lower())
    if options.get("sslrootcert") == SYSTEM_ROOTS:
        options["sslmode"] = "verify-full"  # a lesser mode beside it is no reason not to migrate
    return options


# Hosts and ports


def _read_hosts(
    specifications: Iterable[str], decode: Callable[[str, str], str]
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    pairs = [_read_host(specification, decode) for specification in specifications]
    return tuple(host for host, _ in pairs), tuple(port for _, port in pairs)


def _read_host(specification: str, decode: Callable[[str, str], str]) -> tuple[str, int | None]:
    if specification.startswith("/"):
        return specification, None
    host, port = specification, ""
    if specification.startswith("["):
        match = _BRACKETED.fullmatch(specification)
        if match is None:
            raise _Problem("an IPv6 address must have the form [address]:port", misquoted=True)
        host, port = match["address"], match["port"] or ""
    else:
        host, _, port = specification.partition(":")
    host = decode(host, "host")
    if not host or "[" in host or "]" in host:
        raise _Problem("a host is empty or malformed", misquoted=True)
    return host, _read_port(decode(port, "port")) if port else None


def _read_port(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) <= _HIGHEST_PORT:  # noqa: PLR2004 - 65535 has 5 digits
        return int(text)
    raise _Problem(f"a port must be a number from 1 to {_HIGHEST_PORT}", misquoted=True)


# Options


def _read_options(pairs: Mapping[str, str]) -> dict[str, object]:
    found: dict[str, object] = {}
    settings: dict[str, str] = {}
    # `pgbouncer` comes last: it overrules a size, as in Prisma.
    for name in sorted(pairs, key=lambda name: name == "pgbouncer"):
        value = pairs[name]
        if name in _TLS:
            found["tls"] = {**_mapping(found.get("tls")), name: value}
        elif name in _READERS:
            found |= _READERS[name](name, value)
        elif name in _ARGUMENTS:
            found.setdefault(_ARGUMENTS[name], value)
        elif name in _UNSUPPORTED or name.lower() in _FOREIGN:
            _require_harmless(name, value)
        elif name.lower() in SETTINGS_NAMES or name in _STARTUP or "." in name.strip("."):
            settings[name] = value
        elif name not in _SETTINGS_ALIASES:
            # Behind a password an unknown name may be the rest of that password.
            raise _unknown_option("" if "password" in pairs or "sslpassword" in pairs else name)
    for name, value in _aliased_settings(pairs):
        settings.setdefault(name, value)
    if settings:
        found["server_settings"] = settings
    return _with_hosts(found)


def _mapping(value: object) -> Mapping[str, str]:
    return value if isinstance(value, dict) else {}


def _require_harmless(name: str, value: str) -> None:
    """Raise `_Problem` unless the option asks for nothing that asyncpg does not do anyway."""
    if name.lower() in _FOREIGN:
        raise _Problem(f"the option {name!r} is meant for another program{_FOREIGN[name.lower()]}")
    if value.lower() not in _UNSUPPORTED[name]:
        raise _Problem(f"asyncpg cannot honour the option {name!r}{_INSTEAD.get(name, '; remove it')}")


def _unknown_option(name: str) -> _Problem:
    if not _IDENTIFIER.fullmatch(name):
        return _Problem("an unknown option", misquoted=True)
    known = {*_ARGUMENTS, *_TLS, *_READERS, *_SETTINGS_ALIASES, *_UNSUPPORTED, *_FOREIGN, *SETTINGS_NAMES}
    return _Problem(f"unknown option {name!r}{nearest(name, known)}")


# Prisma's schema is one identifier, to be taken as it is written.
_SETTINGS_ALIASES = ("fallback_application_name", "schema")


def _aliased_settings(pairs: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if "fallback_application_name" in pairs:
        yield "application_name", pairs["fallback_application_name"]
    if "schema" in pairs:
        yield "search_path", '"' + pairs["schema"].replace('"', '""') + '"'


def _with_hosts(found: dict[str, object]) -> dict[str, object]:
    """Read the texts of `host` and `port` as lists."""
    if isinstance(host := found.get("host"), str):
        found["host"], ports = _read_hosts(host.split(","), lambda text, _: text)
        if any(ports):
            found.setdefault("port", ports)
    if isinstance(port := found.get("port"), str):
        found["port"] = tuple(_read_port(text) for text in port.split(","))
    return found


def _secret(name: str, value: str) -> dict[str, object]:
    return {name: Secret(value)}


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        problem = f"the option {name!r} must be a number"
    raise _Problem(problem)


def _count(argument: str) -> Callable[[str, str], dict[str, object]]:
    def read(name: str, value: str) -> dict[str, object]:
        number = _number(name, value)
        return {argument: int(number) if number.is_integer() else number}

    return read


def _seconds(argument: str, unlimited: float | None, scale: float = 1.0) -> Callable[[str, str], dict[str, object]]:
    def read(name: str, value: str) -> dict[str, object]:
        return {argument: _number(name, value) / scale or unlimited}

    return read


def _flag(name: str, value: str, words: Mapping[str, bool]) -> bool:
    if value.lower() not in words:
        raise _Problem(f"the option {name!r} must be one of {', '.join(words)}")
    return words[value.lower()]


def _read_pgbouncer(name: str, value: str) -> dict[str, object]:
    return {"statement_cache_size": 0} if _flag(name, value, {"true": True, "false": False}) else {}


def _read_keepalives(name: str, value: str) -> dict[str, object]:
    return {"tcp_keepalive": _flag(name, value, {"1": True, "0": False})}


def _read_negotiation(name: str, value: str) -> dict[str, object]:
    return {"direct_tls": _flag(name, value, {"direct": True, "postgres": False})}


# Zero is no limit in libpq's and in Prisma's words.
_READERS: Mapping[str, Callable[[str, str], dict[str, object]]] = {
    "password": _secret,
    "sslpassword": _secret,
    "sslnegotiation": _read_negotiation,
    "connection_limit": _count("max_size"),
    "connect_timeout": _seconds("timeout", LONGEST_TIMEOUT),
    "pool_timeout": _seconds("deadline", None),
    "socket_timeout": _seconds("command_timeout", None),
    "statement_cache_size": _count("statement_cache_size"),
    "pgbouncer": _read_pgbouncer,
    "keepalives": _read_keepalives,
    "tcp_user_timeout": _seconds("tcp_user_timeout", None, scale=1000.0),
}


# Service files


def _read_service(service: str, servicefile: str | None) -> dict[str, object]:
    chosen = servicefile or os.environ.get("PGSERVICEFILE")
    path = Path(chosen) if chosen else home_file(".pg_service.conf", ".pg_service.conf")
    if path is None:
        raise _Problem("there is no home directory to look for a service file in")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise _Problem(f"the service file {str(path)!r} cannot be read: {type(error).__name__}") from None
    pairs = _service_pairs(lines, f"[{service}]")
    if pairs is None:
        raise _Problem(f"it is not defined in {str(path)!r}")
    return _read_options(pairs)


def _service_pairs(lines: Iterable[str], header: str) -> dict[str, str] | None:
    """Return the options behind the first line that is `header`, or `None` if there is none."""
    pairs: dict[str, str] | None = None
    for line in map(str.strip, lines):
        if line.startswith("["):
            if pairs is not None:
                break
            pairs = {} if line == header else None
        elif pairs is not None and line and not line.startswith("#"):
            name, separator, value = line.partition("=")
            if not separator or name.strip() == "service":
                raise _Problem("a line is not of the form option=value, or it names another service")
            if value.strip():
                pairs.setdefault(name.strip(), value.strip())
    return pairs
