"""Ready-made constructor arguments, one constant for each service: `ResilientPool(dsn, **profiles.NEON)`.

A profile is a mapping of arguments, and these win over the DSN as all arguments do. `ssl` is the exception: it applies only where
neither the DSN nor the environment says how to use TLS, so that no profile weakens `sslmode=verify-full`. To change a value, or
to have two profiles, merge them: `ResilientPool(dsn, **(profiles.NEON | profiles.LAMBDA | {"timeout": 20}))`. What a profile does
not name is left at the pool's default. `EXPLAINED` has the reason and the source of each value, and `suggest()` names the
profile that fits a host name; none is ever applied by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, cast
from urllib.parse import unquote

from resilient_pool.config.arguments import ProfileArguments
from resilient_pool.config.pool_config import UnlessStated


class Choice(NamedTuple):
    """One argument of a profile.

    Attributes:
        value: Its value.
        reason: Why it has this value.
        source: What that rests on: a document of the vendor's, the service's sources, or this package alone.
    """

    value: object
    reason: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile with its reasons.

    Attributes:
        name: The constant's name in this module.
        service: What it is for.
        choices: Its arguments.
        idle_cut: After how many idle seconds the service, by its defaults, ends a session, or a device of its network forgets
            it; `None` for never.
        age_cut: At what age, in seconds, the service ends a session; `None` for none.
        holds: For how many seconds it may hold a client that connects before it says why it does not let it in; `None` if that
            is not known.
    """

    name: str
    service: str
    choices: Mapping[str, Choice]
    idle_cut: float | None = None
    age_cut: float | None = None
    holds: float | None = None

    @property
    def arguments(self) -> ProfileArguments:
        """The arguments alone, as the constant has them. They cannot be changed."""
        values = {name: choice.value for name, choice in self.choices.items()}
        return cast("ProfileArguments", MappingProxyType(values))


def _profile(
    name: str,
    service: str,
    *,
    idle_cut: float | None = None,
    age_cut: float | None = None,
    holds: float | None = None,
    **choices: Choice,
) -> Profile:
    given = MappingProxyType(choices)
    return Profile(name=name, service=service, choices=given, idle_cut=idle_cut, age_cut=age_cut, holds=holds)


_OURS = "this package"
_NEON = "Neon documentation, compute lifecycle"
_SUPABASE = "Supabase documentation, connecting to Postgres"
_SUPAVISOR = "Supavisor sources, 2.9"
_RDS_PROXY = "Amazon RDS user guide, RDS Proxy connection considerations"
_DSQL = "Aurora DSQL user guide, cluster quotas and database limits"
_COCKROACH = "CockroachDB documentation, connection pooling"
_PGBOUNCER = "PgBouncer configuration reference"
_GOOGLE = "Google Cloud, Compute Engine troubleshooting: idle connections"
_PRISMA = "Prisma documentation, Postgres connection pooling"

_PAUSES = Choice(True, "it is suspended when unused; the pool warns of arguments that would keep it awake", _OURS)
_NOTHING_KEPT = Choice(0, "an idle pool opens nothing, and so does not wake it", _OURS)
_A_MINUTE = Choice(60.0, "a caller waits for the longest wake-up that was seen, and somewhat longer", _OURS)
_TLS = Choice(UnlessStated("require"), "it takes no client without TLS", "vendor's documentation")
_NO_NAMES = Choice(0, "the next transaction may be in another session, without the statements of this one", _PGBOUNCER)
_NO_RESET = Choice(
    "off", "a session is kept for one transaction only: a reset would go to some other session", _PGBOUNCER
)
_FAILOVER = Choice(
    10.0, "a host that has just been given up may stay silent; the next attempt finds its successor", _OURS
)

_ALL = (
    _profile(
        "NEON",
        "Neon, the direct endpoint",
        idle_cut=300.0,
        holds=13.0,
        may_pause=_PAUSES,
        min_size=_NOTHING_KEPT,
        max_inactive_connection_lifetime=Choice(
            240.0, "a compute is suspended after 300 s without a query, and cuts what is idle", _NEON
        ),
        timeout=Choice(
            30.0, "the proxy holds a client while it wakes a compute, and tries for some 13 s", "Neon sources, proxy"
        ),
        deadline=_A_MINUTE,
        ssl=_TLS,
    ),
    _profile(
        "NEON_POOLED",
        "Neon, the endpoint with -pooler in its name",
        idle_cut=300.0,
        holds=13.0,
        may_pause=_PAUSES,
        min_size=_NOTHING_KEPT,
        max_inactive_connection_lifetime=Choice(240.0, "as without the pooler", _NEON),
        timeout=Choice(30.0, "as without the pooler", "Neon sources, proxy"),
        deadline=_A_MINUTE,
        statement_cache_size=_NO_NAMES,
        session_reset=_NO_RESET,
        ssl=_TLS,
    ),
    _profile(
        "SUPABASE_SESSION",
        "Supabase's pooler in session mode, port 5432",
        idle_cut=300.0,
        holds=60.0,
        max_inactive_connection_lifetime=Choice(
            240.0, "a pool that is unused for 300 s is stopped, with its clients", _SUPAVISOR
        ),
        timeout=Choice(65.0, "a client waits up to 60 s for a session, and is then told why there is none", _SUPAVISOR),
        deadline=Choice(70.0, "so that a caller learns what the pooler says after 60 s", _SUPAVISOR),
        statement_cache_size=Choice(
            50,
            "100 named statements a client are allowed, and asyncpg's 100 become 101 before one is dropped",
            _SUPAVISOR,
        ),
        ssl=_TLS._replace(reason="the way leads over the internet", source=_SUPABASE),
    ),
    _profile(
        "SUPABASE_TRANSACTION",
        "Supabase's poolers in transaction mode, port 6543",
        idle_cut=300.0,
        holds=60.0,
        max_inactive_connection_lifetime=Choice(
            240.0, "a pool that is unused for 300 s is stopped, with its clients", _SUPAVISOR
        ),
        timeout=Choice(65.0, "a client waits up to 60 s for a session, and is then told why there is none", _SUPAVISOR),
        deadline=Choice(70.0, "so that a caller learns what the pooler says after 60 s", _SUPAVISOR),
        statement_cache_size=_NO_NAMES._replace(reason="prepared statements are not supported", source=_SUPABASE),
        session_reset=_NO_RESET._replace(source=_SUPABASE),
        ssl=_TLS._replace(reason="the way leads over the internet", source=_SUPABASE),
    ),
    _profile(
        "RDS_PROXY",
        "Amazon RDS Proxy",
        idle_cut=1800.0,
        age_cut=86400.0,
        holds=120.0,
        max_inactive_connection_lifetime=Choice(
            900.0, "idle clients are cut after 1800 s, or as configured", _RDS_PROXY
        ),
        max_lifetime=Choice(3600.0, "a connection lives for 24 h at most", _RDS_PROXY),
        timeout=Choice(
            125.0, "a client waits up to 120 s (ConnectionBorrowTimeout) for a session, and is then told so", _RDS_PROXY
        ),
        deadline=Choice(130.0, "so that a caller learns what the proxy says after 120 s", _RDS_PROXY),
        statement_cache_size=Choice(0, "a named statement pins a session to one client", _RDS_PROXY),
        ssl=_TLS._replace(reason="logging in by IAM takes TLS, and a proxy may require it", source=_RDS_PROXY),
    ),
    _profile(
        "AURORA",
        "Aurora PostgreSQL, provisioned",
        idle_cut=350.0,
        max_inactive_connection_lifetime=Choice(
            300.0,
            "a network load balancer or a NAT gateway forgets what is idle for 350 s",
            "AWS, NLB and NAT gateways",
        ),
        timeout=_FAILOVER,
        deadline=_A_MINUTE._replace(reason="a failover takes some 30 s, and names are resolved anew within 5 s"),
    ),
    _profile(
        "AURORA_SERVERLESS",
        "Aurora Serverless v2 with a minimum capacity of zero",
        idle_cut=60.0,
        holds=15.0,
        may_pause=_PAUSES,
        min_size=_NOTHING_KEPT,
        max_inactive_connection_lifetime=Choice(
            50.0, "where idle_session_timeout is 60 s; a connection keeps it awake", "Aurora user guide, auto-pause"
        ),
        timeout=Choice(
            30.0, "a resume takes 15 s, and 30 s or more after a day of sleep", "Aurora user guide, auto-pause"
        ),
        deadline=_A_MINUTE,
    ),
    _profile(
        "AURORA_DSQL",
        "Aurora DSQL",
        age_cut=3600.0,
        max_inactive_connection_lifetime=Choice(300.0, "asyncpg's own default, as in the vendor's connector", _OURS),
        max_lifetime=Choice(
            3300.0, "a connection is ended at 60 min; less up to a tenth, that they do not end together", _DSQL
        ),
        timeout=Choice(30.0, "a cluster that is not used for long has to wake", "Aurora DSQL, troubleshooting"),
        statement_cache_size=Choice(
            100,
            "a session is one client's, though there is no pg_backend_pid to see it by",
            "vendor's asyncpg connector",
        ),
        ssl=_TLS._replace(source="Aurora DSQL user guide, connections"),
    ),
    _profile(
        "COCKROACHDB",
        "CockroachDB, its cloud or your own cluster",
        max_inactive_connection_lifetime=Choice(300.0, "as asyncpg's own default", _OURS),
        max_lifetime=Choice(
            900.0, "5 to 30 min are advised: a node that is drained, or replaced, resets what lives longer", _COCKROACH
        ),
        timeout=_FAILOVER._replace(reason="a node that is gone makes way for the next: give several hosts"),
        statement_cache_size=Choice(
            100, "a session is one client's, though its process id may differ from the handshake's", _COCKROACH
        ),
        ssl=_TLS._replace(reason="a secure cluster, or its cloud, takes no client without TLS", source=_COCKROACH),
    ),
    _profile(
        "PGBOUNCER",
        "PgBouncer in transaction mode",
        holds=15.0,
        timeout=Choice(20.0, "it tries to log in to its server again after 15 s (server_login_retry)", _PGBOUNCER),
        statement_cache_size=_NO_NAMES._replace(
            reason="safe for every version; 100 where max_prepared_statements is more than that"
        ),
        session_reset=_NO_RESET,
    ),
    _profile(
        "PGDOG",
        "PgDog in transaction mode",
        holds=5.0,
        timeout=Choice(
            10.0, "it waits for up to 5 s for a session (checkout_timeout)", "PgDog configuration reference"
        ),
        statement_cache_size=Choice(
            100,
            "it renames and follows named statements (prepared_statements = extended)",
            "PgDog configuration reference",
        ),
        session_reset=_NO_RESET._replace(source="PgDog configuration reference"),
    ),
    _profile(
        "AZURE",
        "Azure Database for PostgreSQL, flexible server",
        idle_cut=240.0,
        max_inactive_connection_lifetime=Choice(
            200.0,
            "the load balancer forgets, without a word, what is idle for 4 min",
            "Microsoft Learn, TCP reset and idle time-out",
        ),
        timeout=_FAILOVER,
        deadline=_A_MINUTE._replace(
            reason="most maintenance and failovers take less than 60 s", source="Microsoft Learn, transient errors"
        ),
        ssl=_TLS._replace(source="Microsoft Learn, require_secure_transport"),
    ),
    _profile(
        "CLOUD_SQL_POOLED",
        "Cloud SQL and AlloyDB, managed connection pooling, port 6432",
        idle_cut=600.0,
        max_inactive_connection_lifetime=Choice(540.0, "the network forgets what is idle for 10 min", _GOOGLE),
        timeout=_FAILOVER,
        statement_cache_size=_NO_NAMES._replace(source="Google Cloud, managed connection pooling"),
        session_reset=_NO_RESET._replace(source="Google Cloud, managed connection pooling"),
    ),
    _profile(
        "PLANETSCALE",
        "PlanetScale for Postgres, ports 5432 and 6432",
        idle_cut=350.0,
        max_inactive_connection_lifetime=Choice(
            300.0, "a network load balancer forgets what is idle for 350 s", "AWS, NLB"
        ),
        timeout=_FAILOVER,
        ssl=_TLS._replace(source="PlanetScale, client error reference"),
    ),
    _profile(
        "PRISMA_POSTGRES",
        "Prisma Postgres, pooled and direct",
        idle_cut=3600.0,
        may_pause=_PAUSES,
        min_size=_NOTHING_KEPT,
        max_inactive_connection_lifetime=Choice(
            300.0, "idle clients are cut after 60 min; nothing is gained by so long", _PRISMA
        ),
        timeout=Choice(
            30.0, "a database that is not used has to be started first", "Prisma, published incident reports"
        ),
        deadline=_A_MINUTE,
        statement_cache_size=_NO_NAMES._replace(
            reason="the pooled host is PgBouncer in transaction mode", source=_PRISMA
        ),
        ssl=_TLS._replace(source=_PRISMA),
    ),
    _profile(
        "LAMBDA",
        "a function that serves one request at a time and is frozen in between, such as AWS Lambda",
        max_size=Choice(1, "one request at a time needs one connection", _OURS),
        min_size=_NOTHING_KEPT._replace(reason="nothing is opened by a process that is about to be frozen"),
        max_inactive_connection_lifetime=Choice(
            50.0, "what was idle for longer is likely to be cut after a thaw", _OURS
        ),
        timeout=Choice(30.0, "a database that pauses may have to wake first", _OURS),
    ),
)

EXPLAINED: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})
"""Each profile, by its constant's name, with the reason and the source of every value."""

NEON = EXPLAINED["NEON"].arguments
"""For Neon's direct endpoint, whose compute is suspended when it is unused: nothing is held open, and a wake-up is waited for."""

NEON_POOLED = EXPLAINED["NEON_POOLED"].arguments
"""For Neon's endpoint with `-pooler` in its name: the same, through PgBouncer in transaction mode."""

SUPABASE_SESSION = EXPLAINED["SUPABASE_SESSION"].arguments
"""For Supabase's pooler in session mode (port 5432). Each client holds a session: keep `max_size` below the pooler's pool size."""

SUPABASE_TRANSACTION = EXPLAINED["SUPABASE_TRANSACTION"].arguments
"""For Supabase's poolers in transaction mode (port 6543)."""

RDS_PROXY = EXPLAINED["RDS_PROXY"].arguments
"""For Amazon RDS Proxy. Sessions are still reset after what may have changed them: the proxy has pinned them by then."""

AURORA = EXPLAINED["AURORA"].arguments
"""For a provisioned Aurora cluster, by its cluster endpoint."""

AURORA_SERVERLESS = EXPLAINED["AURORA_SERVERLESS"].arguments
"""For a database that pauses when nothing is connected to it, such as Aurora Serverless v2 with a minimum capacity of zero.

It keeps nothing open when idle, gives up connections before the server drops them after 60 s, lets an attempt to connect
hang for as long as a resume takes (15 s, 30 s and more after a day of sleep), and waits for a minute in all.
"""

AURORA_DSQL = EXPLAINED["AURORA_DSQL"].arguments
"""For Aurora DSQL. Give a function as `password=` that makes a new token: it is asked at every connect."""

COCKROACHDB = EXPLAINED["COCKROACHDB"].arguments
"""For CockroachDB. What became of a lost COMMIT cannot be asked there: it is unknown, and reported as that."""

PGBOUNCER = EXPLAINED["PGBOUNCER"].arguments
"""For PgBouncer in transaction mode, of any version. In session mode leave the profile out."""

PGDOG = EXPLAINED["PGDOG"].arguments
"""For PgDog in transaction mode."""

AZURE = EXPLAINED["AZURE"].arguments
"""For Azure's flexible server. Its PgBouncer (port 6432) is `PGBOUNCER`, whose connections are not idle for as long either."""

CLOUD_SQL_POOLED = EXPLAINED["CLOUD_SQL_POOLED"].arguments
"""For the managed connection pooling of Cloud SQL and AlloyDB."""

PLANETSCALE = EXPLAINED["PLANETSCALE"].arguments
"""For PlanetScale for Postgres. Whether the port is PgBouncer's is left to the pool to find out."""

PRISMA_POSTGRES = EXPLAINED["PRISMA_POSTGRES"].arguments
"""For Prisma Postgres, pooled or direct. On the direct host `| {"statement_cache_size": 100}` saves a round trip a query."""

LAMBDA = EXPLAINED["LAMBDA"].arguments
"""For a function that serves one request at a time and is frozen in between, such as AWS Lambda.

One connection, which is checked after every thaw. Put `async with pool.invocation(deadline=...)` around each request.
"""


# Which service a host name belongs to. The first pattern that fits counts; a port stands behind its host.
_HOSTS = (
    (r"[^.]+-pooler\..*neon\.(?:tech|build):\d+", "NEON_POOLED"),
    (r".*\.neon\.(?:tech|build):\d+", "NEON"),
    (r".*\.pooler\.supabase\.com:6543", "SUPABASE_TRANSACTION"),
    (r".*\.pooler\.supabase\.com:\d+", "SUPABASE_SESSION"),
    (r"db\.[^.]+\.supabase\.co:6543", "SUPABASE_TRANSACTION"),
    (r".*\.proxy-[^.]+\.[^.]+\.rds\.amazonaws\.com(?:\.cn)?:\d+", "RDS_PROXY"),
    (r".*\.(?:cluster|cluster-ro|cluster-custom)-[^.]+\.[^.]+\.rds\.amazonaws\.com(?:\.cn)?:\d+", "AURORA"),
    (r".*\.global-[^.]+\.global\.rds\.amazonaws\.com:\d+", "AURORA"),
    (r"[^.]+\.dsql(?:-[^.]+)?\.[^.]+\.on\.aws:\d+", "AURORA_DSQL"),
    (r".*\.cockroachlabs\.cloud:\d+", "COCKROACHDB"),
    (r".*\.postgres\.database\.(?:azure\.com|usgovcloudapi\.net|chinacloudapi\.cn):6432", "PGBOUNCER"),
    (r".*\.postgres\.database\.(?:azure\.com|usgovcloudapi\.net|chinacloudapi\.cn):\d+", "AZURE"),
    (r".*\.(?:sql|alloydb|alloydb-psc)\.goog:6432", "CLOUD_SQL_POOLED"),
    (r".*\.psdb\.cloud:\d+", "PLANETSCALE"),
    (r"(?:[^.]+\.)*db\.prisma\.io:\d+", "PRISMA_POSTGRES"),
    (r".*:26257", "COCKROACHDB"),
)
_HOST_OPTION = re.compile(r"(?:^|[\s?&])(host|port)\s*=\s*'?([^\s&']*)")
_AUTHORITY_END = re.compile(r"[/?#]")
_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(?::(\d{1,5}))?")


def suggest(dsn: str | None = None, /) -> str | None:
    """Name the profile that fits a database, by its host's name and port alone; nothing is connected to.

    Args:
        dsn: A URL, or libpq's `host=... port=...`, also one that the pool would not take. By default what PGHOST and
            PGPORT say.

    Returns:
        The name of a constant of this module, so that `profiles.EXPLAINED[name]` has the reasons; `None` for a host that is
        not known to belong to any service. In a function of AWS Lambda that is `"LAMBDA"`, which can be merged with any other.
    """
    hosts, ports = _endpoints_in(dsn) if isinstance(dsn, str) else ((), ())
    return fitting(hosts or os.environ.get("PGHOST", "").split(","), ports or os.environ.get("PGPORT", "").split(","))


def fitting(hosts: Iterable[str], ports: Iterable[str | int | None] = ()) -> str | None:
    """Do what `suggest()` does for hosts and ports that are known apart: one port, or one for each host.

    Several hosts are one service's, or none is named.
    """
    given, numbers = list(hosts), [str(port) if port else "5432" for port in ports]
    numbers = numbers * len(given) if len(numbers) == 1 else numbers + ["5432"] * (len(given) - len(numbers))
    found = {_service(f"{host.strip().lower().rstrip('.')}:{port}") for host, port in zip(given, numbers, strict=False)}
    name = found.pop() if len(found) == 1 else None
    return "LAMBDA" if name is None and "AWS_LAMBDA_FUNCTION_NAME" in os.environ else name


def _service(endpoint: str) -> str | None:
    return next((name for pattern, name in _HOSTS if re.fullmatch(pattern, endpoint)), None)


def _endpoints_in(dsn: str) -> tuple[list[str], list[str]]:
    """Find hosts and ports in what may be any text, also a URL whose password holds characters that end its parts."""
    scheme, separator, rest = dsn.strip().partition("://")
    options = dict(_HOST_OPTION.findall(rest.rpartition("?")[2] if separator else scheme))
    authority = _AUTHORITY_END.split(rest, maxsplit=1)[0]
    if "@" not in authority:
        authority = _AUTHORITY_END.split(rest.rpartition("@")[2], maxsplit=1)[0]
    authority = authority.rpartition("@")[2]
    if not authority:
        return [part for part in unquote(options.get("host", "")).split(",") if part], _split(options.get("port", ""))
    pairs = [_HOST_AND_PORT.fullmatch(part) for part in unquote(authority).split(",")]
    ports = [pair[2] or "" for pair in pairs if pair]
    return [pair[1] for pair in pairs if pair], ports if any(ports) else _split(options.get("port", ""))


def _split(ports: str) -> list[str]:
    return [port for port in unquote(ports).split(",") if port]
