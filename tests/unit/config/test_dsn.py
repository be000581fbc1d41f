from __future__ import annotations

import re
import ssl
import traceback
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from resilient_pool.config.pool_config import ARGUMENTS, PoolConfig, seal_leniently
from resilient_pool.config.secrets import Secret
from resilient_pool.errors import ConfigurationError

CANARY = "Zq7/wV:xJ@kP%mT#gY?bN[hF]cR+dL sX'oK\"uW\\yGé"
QUOTED = quote(CANARY, safe="")
PIECES = re.findall(r"[A-Za-z0-9]{2,}", CANARY)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("HOST", "PORT", "USER", "PASSWORD", "PASSFILE", "DATABASE", "SERVICE", "SERVICEFILE"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")


def read(dsn, **arguments):
    return PoolConfig.from_arguments(dsn, **arguments)


def refused(dsn, /, **arguments):
    """Return the error, having made sure that nothing about it shows a piece of the canary."""
    with pytest.raises(ConfigurationError) as caught:
        PoolConfig.from_arguments(dsn, **arguments)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    ours = error.__traceback__.tb_next  # the frame of this test holds the canary, of course
    shown = "".join(traceback.TracebackException(type(error), error, ours, capture_locals=True).format())
    assert "from_arguments" in shown
    assert not any(piece in shown for piece in PIECES), shown
    return error


def test_a_dsn_tells_where_and_as_whom_to_connect():
    """All parts before the '?' are read and percent-decoded."""
    config = read("postgresql://us%40er:pa%3Ass@ho%2Dst:6543/data%2Fbase")
    assert (config.user, config.host, config.port, config.database) == ("us@er", ("ho-st",), (6543,), "data/base")
    assert config.password == Secret("pa:ss")


@pytest.mark.parametrize(
    ("dsn", "host", "port"),
    [
        ("postgres://h", ("h",), (5432,)),
        ("POSTGRESQL://h/", ("h",), (5432,)),
        (" postgresql://h \n", ("h",), (5432,)),
        ("postgresql://h:/db", ("h",), (5432,)),
        ("postgresql://a:1,b,c:3/db", ("a", "b", "c"), (1, 5432, 3)),
        ("postgresql://[::1]:99,[fe80::1%25eth0]", ("::1", "fe80::1%eth0"), (99, 5432)),
        ("postgresql://%2Fvar%2Frun:99/db", ("/var/run",), (99,)),
        ("postgresql:///db", None, None),
        ("postgresql:///db?host=/tmp&port=99", ("/tmp",), (99,)),
        ("postgresql:///db?host=a:1,[::1]:2", ("a", "::1"), (1, 2)),
        ("postgresql:///db?port=99", None, (99,)),
        ("postgresql://h/db?port=99", ("h",), (99,)),
        ("postgresql://h:1/db?host=x:3&port=2", ("h",), (1,)),
        ("postgresql://h/db?host=x:3", ("h",), (5432,)),
        ("postgresql://a,b/db?port=1,2", ("a", "b"), (1, 2)),
        ("postgresql://a,b/db?port=1", ("a", "b"), (1, 1)),
    ],
)
def test_hosts_and_ports_are_read_as_in_a_libpq_uri(dsn, host, port):
    """Several hosts, IPv6 addresses, socket directories, and both places to say it."""
    config = read(dsn)
    assert (config.host, config.port) == (host, port)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("connection_limit=3", {"max_size": 3}),
        ("connect_timeout=7", {"timeout": 7.0}),
        ("connect_timeout=0", {"timeout": 86400.0}),
        ("pool_timeout=9", {"deadline": 9.0}),
        ("pool_timeout=0", {"deadline": None}),
        ("socket_timeout=4", {"command_timeout": 4.0}),
        ("socket_timeout=0", {"command_timeout": None}),
        ("pgbouncer=true", {"statement_cache_size": 0}),
        ("pgbouncer=true&statement_cache_size=50", {"statement_cache_size": 0}),
        ("pgbouncer=false", {"statement_cache_size": None}),
        ("statement_cache_size=50", {"statement_cache_size": 50}),
        ("schema=My%20Schema", {"server_settings": {"search_path": '"My Schema"'}}),
        ("schema=a%22b", {"server_settings": {"search_path": '"a""b"'}}),
        ("schema=a&search_path=b,c", {"server_settings": {"search_path": "b,c"}}),
        ("sslmode=verify-full", {"ssl": "verify-full"}),
        ("sslnegotiation=direct&sslmode=require", {"direct_tls": True}),
        ("sslnegotiation=postgres", {"direct_tls": False}),
        ("sslrootcert=/a&sslcert=/b", {"tls": {"sslrootcert": "/a", "sslcert": "/b"}}),
        ("sslpassword=p%26q", {"sslpassword": Secret("p&q")}),
        ("user=u&password=p+q&dbname=d", {"user": "u", "password": Secret("p q"), "database": "d"}),
        ("target_session_attrs=read-write", {"target_session_attrs": "read-write"}),
        ("krbsrvname=k&gsslib=sspi", {"krbsrvname": "k", "gsslib": "sspi"}),
        ("keepalives=0", {"tcp_keepalive": False}),
        ("tcp_user_timeout=1500", {"tcp_user_timeout": 1.5}),
        ("tcp_user_timeout=0", {"tcp_user_timeout": None}),
        ("application_name=me", {"server_settings": {"application_name": "me"}}),
        ("fallback_application_name=me", {"server_settings": {"application_name": "me"}}),
        ("DateStyle=ISO&my.own=1", {"server_settings": {"DateStyle": "ISO", "my.own": "1"}}),
        ("transaction_timeout=5s", {"server_settings": {"transaction_timeout": "5s"}}),
        ("options=-c%20geqo%3Doff", {"server_settings": {"options": "-c geqo=off"}}),
        ("role=r", {"server_settings": {"role": "r"}}),
        ("geqo=on&geqo=off", {"server_settings": {"geqo": "off"}}),
        ("channel_binding=prefer&gssencmode=disable&client_encoding=UTF8&sslsni=1", {"server_settings": {}}),
        ("sslmode=", {"ssl": None}),
    ],
)
def test_an_option_becomes_the_argument_it_means(query, expected):
    """asyncpg's own, Prisma's, libpq's and the server's settings."""
    config = read(f"postgresql:///?{query}")
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("conection_limit=3", "in the DSN: unknown option 'conection_limit'; did you mean 'connection_limit'?"),
        ("aplication_name=3", "in the DSN: unknown option 'aplication_name'; did you mean 'application_name'?"),
        ("client_encoding=latin1", "in the DSN: asyncpg cannot honour the option 'client_encoding'; remove it"),
        ("xyzzy=3", "in the DSN: unknown option 'xyzzy'"),
        (
            "channel_binding=require",
            "in the DSN: asyncpg cannot honour the option 'channel_binding'; use sslmode=verify-full, ",
        ),
        ("gssencmode=require", "in the DSN: asyncpg cannot honour the option 'gssencmode'; remove it"),
        ("hostaddr=1.2.3.4", "in the DSN: asyncpg cannot honour the option 'hostaddr'; write the address as the host"),
        ("scram_client_key=x", "in the DSN: asyncpg cannot honour the option 'scram_client_key'; remove it"),
        ("connection_limit=many", "in the DSN: the option 'connection_limit' must be a number"),
        ("pgbouncer=maybe", "in the DSN: the option 'pgbouncer' must be one of true, false"),
        ("connection_limit=0", "max_size must be a whole number of connections, at least 1, not 0"),
        ("connection_limit=2.5", "max_size must be a whole number of connections, at least 1, not 2.5"),
        ("pool_timeout=nan", "deadline must be a number of seconds, more than 0, or None, not nan"),
        ("pool_timeout=-1", "deadline must be a number of seconds, more than 0, or None, not -1.0"),
        (
            "ssl_min_protocol_version=SSLv3",
            "in the DSN: the option 'ssl_min_protocol_version' must be one of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3",
        ),
        ("sslmode=requird", "in the DSN: the option 'sslmode' must be one of disable, allow, prefer, require, "),
        ("port=1&host=a,b&port=1,2,3", "port must be one number, or one for each of the 2 hosts, not 3 numbers"),
        ("port=0", "in the DSN: a port must be a number from 1 to 65535; most likely"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_its_name(query, message):
    """The message names the option, and the nearest known one."""
    assert str(refused(f"postgresql:///?{query}")).startswith(message)


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        (f"mysql://u:{QUOTED}@h/db", "the scheme must be postgresql or postgres"),
        (f"postgresql+asyncpg://u:{QUOTED}@h/db", "write postgresql:// instead"),
        (f"postgres+psycopg2://u:{QUOTED}@h/db", "write postgresql:// instead"),
        (CANARY, "it must have the form postgresql://user:password@host"),
        (f"host=h password={CANARY}", "it must have the form postgresql://user:password@host"),
        (f"postgresql://u:{CANARY}@h/db", "must be percent-encoded"),
        (f"postgresql://u:{QUOTED}@h:port/db", "a port must be a number from 1 to 65535"),
        (f"postgresql://u:{QUOTED}@h:65536/db", "a port must be a number from 1 to 65535"),
        (f"postgresql://u:{QUOTED}@h:²/db", "a port must be a number from 1 to 65535"),
        (f"postgresql://u:{QUOTED}@a,,b/db", "a host is empty or malformed"),
        (f"postgresql://u:{QUOTED}@[::1/db", "an IPv6 address must have the form [address]:port"),
        (f"postgresql://u:{QUOTED}@[::1]x/db", "an IPv6 address must have the form [address]:port"),
        (f"postgresql://u:{QUOTED}@::1/db", "a host is empty or malformed"),
        (f"postgresql://u:{QUOTED}%zz@h/db", "a '%' without two hexadecimal digits"),
        (f"postgresql://u:{QUOTED}%@h/db", "a '%' without two hexadecimal digits"),
        (f"postgresql://u:{QUOTED}%00@h/db", "or %00"),
        (f"postgresql://u:{QUOTED}%E9@h/db", "the password is not percent-encoded UTF-8"),
        (f"postgresql://u:{QUOTED}@h/db?nope=1", "unknown option 'nope'"),
        (f"postgresql://u:{QUOTED}@h/db?nope", "an option has no '='"),
        (f"postgresql://h?password=x&{QUOTED[:3]}=1", "an unknown option; most likely"),
        (f"postgresql://h?password={CANARY}", "must be percent-encoded"),
        (f"postgresql://h?sslpassword={QUOTED}&sslmode=1", "the option 'sslmode' must be one of"),
        (f"postgresql://u:{QUOTED}@h?target_session_attrs=1", "'target_session_attrs' must be one of"),
        *(
            (f"postgresql://u@h?{name}={QUOTED}", f"the option '{name}' must be ")
            for name in (
                *("sslmode", "target_session_attrs", "gsslib", "ssl_min_protocol_version", "sslnegotiation"),
                *("keepalives", "pgbouncer", "connection_limit", "connect_timeout", "tcp_user_timeout"),
            )
        ),
        (f"postgresql://u:{QUOTED}/x@h/db", "an '@' that does not end the user's name and password"),
        *((f"postgresql://u:12{mark}x=Zq7wV@h/db", "must be") for mark in "/?#@%\n"),
    ],
)
def test_the_error_about_a_malformed_dsn_shows_nothing_of_the_password(dsn, message):
    """Not in its message, not in its chain, and not in the local variables of any frame."""
    assert message in str(refused(dsn))


@pytest.mark.parametrize("mark", list("\"'\\+ :[]é&;=,$!*()~"))
def test_a_character_that_does_not_end_the_password_may_stand_in_it(mark):
    """What asyncpg takes without quoting is taken here."""
    assert read(f"postgresql://u:a{mark}b@h/db").password == Secret(f"a{mark}b")


@pytest.mark.parametrize("dsn", [f"postgresql://u:{QUOTED}@h/db", f"postgresql://u@h/db?password={quote_plus(CANARY)}"])
def test_a_password_with_every_character_comes_out_as_it_was_meant(dsn):
    """And `repr` shows none of it."""
    config = read(dsn)
    assert config.password == Secret(CANARY)
    assert config.secrets() == (Secret(CANARY),)
    assert not any(piece in repr(config) for piece in PIECES)


@pytest.mark.parametrize(
    ("dsn", "arguments"),
    [
        (f"postgresql://u:{QUOTED}@h/db", {"max_size": -1}),
        (f"postgresql://u:{QUOTED}@h/db", {"maxsize": 1}),
        (None, {"dsn": f"postgresql://u:{QUOTED}@h/db", "max_size": -1}),
        (None, {"password": CANARY, "max_size": -1}),
        (None, {"password": CANARY.encode()}),
        (None, {"password": [CANARY]}),
        (CANARY.encode(), {}),
        (None, {"dsn": CANARY.encode()}),
    ],
)
def test_the_error_about_another_argument_shows_nothing_of_the_password(dsn, arguments):
    """Whatever is refused, and wherever the password was given."""
    refused(dsn, **arguments)


def test_nothing_of_a_dsn_is_remembered_by_the_standard_library():
    """`urlsplit` has a cache of whole URLs; it is not asked."""
    before = urlsplit_cache()
    read("postgresql://u:never-kept@h/db?password=x")
    assert urlsplit_cache() == before


def urlsplit_cache():
    from urllib.parse import urlsplit

    return urlsplit.cache_info()


@pytest.fixture
def service_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    def write(text):
        (tmp_path / ".pg_service.conf").write_text(text, encoding="utf-8")

    return write


def test_a_service_is_read_from_the_service_file(service_file):
    """Options, percent signs in passwords included; the first section of that name counts, and explicit words win."""
    service_file(
        "# mine\n[other]\nhost=no\n\n[mine]\nhost=a,b\nport = 1,2\nuser=u\npassword=%p@s/s#\ngeqo=off\nuser=late\n[mine]\nuser=x\n"
    )
    config = read("postgresql:///?service=mine", database="d")
    assert (config.host, config.port, config.user, config.database) == (("a", "b"), (1, 2), "u", "d")
    assert config.password == Secret("%p@s/s#")
    assert config.server_settings == {"geqo": "off"}
    assert read("postgresql://me@h:9?service=mine").host == ("h",)
    assert read("postgresql://me@h?service=mine").port == (5432,)
    assert "%p@s" not in repr(config)


def test_a_service_may_be_named_by_the_environment(service_file, monkeypatch):
    """PGSERVICE names it, PGSERVICEFILE the file."""
    service_file("[mine]\nuser=u\n")
    monkeypatch.setenv("PGSERVICE", "mine")
    assert read(None).user == "u"
    monkeypatch.setenv("PGSERVICEFILE", "/nowhere/services")
    with pytest.raises(ConfigurationError, match="service file '/nowhere/services' cannot be read: FileNotFoundError"):
        read(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[mine]\npassword={CANARY}\nnope=1\n", "in the service 'mine': an unknown option"),
        (f"[mine]\npassword={CANARY}\n{CANARY}\n", "in the service 'mine': a line is not of the form option=value"),
        (f"[mine]\npassword={CANARY}\nport=x\n", "in the service 'mine': a port must be a number from 1 to 65535"),
        (f"[other]\npassword={CANARY}\n", "in the service file: the service file '"),
    ],
)
def test_the_error_about_a_service_shows_nothing_of_the_password(service_file, text, message):
    """What holds for a DSN holds for the service file."""
    service_file(text)
    assert str(refused(None, service="mine")).startswith(message)


FOREIGN = [
    ("SQLAlchemy", "postgresql+asyncpg://u:p@h/db?ssl=require&prepared_statement_cache_size=0", {"ssl": "require", "statement_cache_size": 0}),
    ("SQLAlchemy, psycopg", "postgres+psycopg2://u:p@h/db?sslmode=prefer&pool_size=5", {"ssl": "prefer"}),
    ("Neon", "postgresql://u:p@h/db?sslmode=require&channel_binding=require", {"ssl": "require"}),
    ("libpq", "postgresql://u:p@h/db?keepalives=1&keepalives_idle=30&keepalives_interval=5&keepalives_count=3", {"tcp_keepalive": True}),
    ("libpq, an address alone", "postgresql:///db?hostaddr=1.2.3.4&user=u", {"host": ("1.2.3.4",)}),
    ("libpq, an address beside a name", "postgresql://u:p@h/db?hostaddr=1.2.3.4", {"host": ("h",)}),
    ("Rails", "postgres://u:p@h/db?pool=5&encoding=utf8&prepared_statements=false&timeout=5000", {"statement_cache_size": 0}),
    ("Prisma", "postgresql://u:p@h/db?schema=public&connection_limit=5&pgbouncer=true&sslaccept=strict", {"max_size": 5, "statement_cache_size": 0}),
    ("JDBC", "jdbc:postgresql://h:1/db?user=u&password=p&ssl=true&currentSchema=s&ApplicationName=a&targetServerType=primary", {"ssl": "require", "port": (1,), "target_session_attrs": "primary", "server_settings": {"search_path": "s", "application_name": "a"}}),
    ("node-postgres", "postgres://u:p@h/db?ssl=false&max=3", {"ssl": "disable"}),
    ("node-postgres, unverified", "postgres://u:p@h/db?sslmode=no-verify", {"ssl": "require"}),
    ("pgx", "postgres://u:p@h/db?pool_max_conns=3&default_query_exec_mode=exec&sslmode=disable", {"ssl": "disable"}),
    ("Django", "postgis://u:p@h/db?conn_max_age=60", {}),
    ("our own word beside another's", "postgres://u:p@h/db?ssl=true&sslmode=disable", {"ssl": "disable"}),
    ("the system's authorities", "postgres://u:p@h/db?sslmode=require&sslrootcert=system", {"ssl": "verify-full"}),
]  # fmt: skip


@pytest.mark.parametrize(("dsn", "expected"), [case[1:] for case in FOREIGN], ids=[case[0] for case in FOREIGN])
def test_a_tool_takes_what_other_programs_write_into_a_dsn(dsn, expected):
    """Migrations and waiting use the URL that the application has, whatever it is written in."""
    config = PoolConfig.from_arguments(seal_leniently(dsn))
    assert (config.user, config.database) == ("u", "db")
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_tool_refuses_an_option_that_no_program_is_known_to_use():
    """A misspelt sslmode is not taken for another program's word."""
    with pytest.raises(ConfigurationError, match="unknown option 'sslmod'; did you mean 'sslmode'"):
        PoolConfig.from_arguments(seal_leniently("postgresql://u:p@h/db?pool=5&sslmod=require"))
    with pytest.raises(ConfigurationError, match="the scheme must be postgresql or postgres"):
        PoolConfig.from_arguments(seal_leniently("mysql://u:p@h/db"))
    with pytest.raises(ConfigurationError, match="dsn must be a str, not bytes"):
        PoolConfig.from_arguments(seal_leniently(b"postgresql://u:p@h/db"))


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("pool=5", "'pool' is meant for another program; use the arguments max_size and min_size"),
        ("ssl=require", "'ssl' is meant for another program; write sslmode=require, or sslmode=verify-full"),
        (
            "prepared_statement_cache_size=0",
            "'prepared_statement_cache_size' is meant for another program; use statement_c",
        ),
        ("currentSchema=s", "'currentSchema' is meant for another program; write search_path"),
        ("channel_binding=require", "'channel_binding'; use sslmode=verify-full"),
        ("keepalives_idle=5", "'keepalives_idle'; use the argument tcp_user_timeout"),
    ],
)
def test_a_pool_refuses_what_is_meant_for_another_program_and_says_what_to_write(query, hint):
    """What would be ignored is not taken in silence where an application makes its pool."""
    assert hint in str(refused(f"postgresql://u:p@h/db?{query}"))


def test_the_systems_authorities_are_trusted_for_the_hosts_own_name_only(monkeypatch):
    """`sslrootcert=system` means verify-full, as in libpq, wherever it is said; a lesser mode beside it is refused."""
    for config in (
        read("postgresql://u:p@h/db?sslrootcert=system"),
        read("postgresql://u:p@h/db?sslrootcert=system&sslmode=verify-full"),
        read("postgresql://u:p@h/db?sslrootcert=system", ssl=True),
    ):
        arguments = config.connect_arguments()
        assert isinstance(arguments["ssl"], ssl.SSLContext)
        assert arguments["ssl"].check_hostname
        assert arguments["ssl"].verify_mode is ssl.CERT_REQUIRED
        assert "dsn" not in arguments
    assert "sslrootcert=system needs sslmode=verify-full, not 'require'" in str(
        refused("postgresql://u:p@h/db?sslrootcert=system&sslmode=require")
    )
    own = ssl.create_default_context()
    assert read("postgresql://u:p@h/db?sslrootcert=system", ssl=own).connect_arguments()["ssl"] is own
    monkeypatch.setenv("PGSSLROOTCERT", "system")
    assert isinstance(read("postgresql://u:p@h/db").connect_arguments()["ssl"], ssl.SSLContext)
    monkeypatch.setenv("PGSSLMODE", "require")
    with pytest.raises(ConfigurationError, match="sslrootcert=system needs sslmode=verify-full"):
        read("postgresql://u:p@h/db")


URL = f"postgresql://u:{QUOTED}@h/db"


@pytest.mark.parametrize(
    "arguments",
    [
        {"passwrod": CANARY},
        {"passwrod": [CANARY]},
        {"url": URL},
        {"host": URL, "max_size": -1},
        {"host": [URL], "max_size": -1},
        {"database": URL},
        {"user": URL},
        {"ssl": URL},
        {"port": URL},
        {"deadline": URL},
        {"max_size": URL},
        {"passfile": Path(URL), "max_size": -1},
        {"service": URL},
        {"session_reset": f"password={CANARY}"},
        {"pure_functions": [URL], "max_size": -1},
        {"server_settings": {"my.token": CANARY}, "max_size": -1},
        {"server_settings": {"password": CANARY}},
        {"server_settings": {"my.token": CANARY}, "dsn": "postgresql://h/db?jit=off", "max_size": -1},
        {"dsn": Path(URL)},
        {"dsn": [URL]},
        {"dsn": {"url": URL}},
        {"connect": read, "passwrod": CANARY, "dsn": URL, "max_size": -1},
        {"connect": read, "password": CANARY, "dsn": [URL], "max_size": -1},
        {"credentials": CANARY, "max_size": -1},
        {"credentials": f"u:{CANARY}"},
        {"credentials": ("u", CANARY)},
    ],
)
def test_the_error_about_any_argument_shows_nothing_of_a_password(arguments):
    """Wherever it was put by mistake: under a misspelt name, as another argument, as a path, bytes or a list."""
    refused(None, **arguments)


TAKE_ANY_TEXT = {"host", "user", "password", "passfile", "service", "servicefile", "database", "krbsrvname"}


@pytest.mark.parametrize("name", [each.name for each in ARGUMENTS if each.name not in TAKE_ANY_TEXT])
def test_a_password_under_the_name_of_another_argument_is_not_quoted(name):
    """Whatever the argument takes: a text that is not much like what it takes may be anything."""
    assert f"{name} must be " in str(refused(None, **{name: CANARY}))
    with pytest.raises(ConfigurationError) as caught:
        read(None, **{name: [CANARY, {"a": CANARY}, 5, 6]})
    assert not any(piece in str(caught.value) for piece in PIECES)


@pytest.mark.parametrize("variable", ["PGSERVICE", "PGSERVICEFILE", "PGTARGETSESSIONATTRS", "PGPORT"])
def test_a_password_in_a_variable_of_the_environment_that_is_for_something_else_is_not_quoted(monkeypatch, variable):
    """The name of a service, of a file, of a kind of server."""
    monkeypatch.setenv("PGSERVICE", "mine")
    monkeypatch.setenv("PGSERVICEFILE", __file__)
    monkeypatch.setenv(variable, CANARY)
    with pytest.raises(ConfigurationError) as caught:
        read(None)
    assert not any(piece in str(caught.value) for piece in PIECES)


def test_a_service_that_is_nearly_named_is_suggested(service_file):
    """The names that the file has are no secrets."""
    service_file("[other]\n[mine]\nuser=u\n")
    assert str(refused(None, service="mime")).endswith(
        ".pg_service.conf' has no service of the name asked for; did you mean 'mine'?"
    )


def test_a_password_of_the_environment_is_not_shown_when_something_else_of_it_is_wrong(monkeypatch):
    """The frames that read PGPASSWORD hold no text of it."""
    monkeypatch.setenv("PGPASSWORD", CANARY)
    monkeypatch.setenv("PGPORT", "none")
    assert str(refused(None)) == "in PGPORT: a port must be a number from 1 to 65535"
    monkeypatch.setenv("PGPORT", "1")
    refused(None, max_size=-1)
