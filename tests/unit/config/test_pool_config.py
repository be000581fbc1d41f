from __future__ import annotations

import dataclasses
import functools
import ssl

import asyncpg
import backoff
import pytest
from asyncpg.connect_utils import SessionAttribute, SSLMode

from resilient_pool import ResilientPool
from resilient_pool.config.pool_config import ARGUMENTS, PoolConfig, seal
from resilient_pool.config.secrets import Secret
from resilient_pool.errors import ConfigurationError
from resilient_pool.retry.backoff import OPERATION_BACKOFF, RECONNECT_BACKOFF, BackoffPolicy
from resilient_pool.retry.classifier import PostgresClassifier
from resilient_pool.retry.decision import RetryBudget


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("HOST", "PORT", "USER", "PASSWORD", "PASSFILE", "DATABASE", "SERVICE", "SERVICEFILE"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")


def read(dsn=None, /, **arguments):
    return PoolConfig.from_arguments(dsn, **arguments)


def test_the_defaults_are_the_documented_ones():
    """An idle pool holds nothing open, and every wait has a bound."""
    config = read()
    assert (config.min_size, config.init_size, config.max_size, config.max_queries) == (0, 0, 10, 50000)
    assert (config.timeout, config.deadline, config.command_timeout) == (60.0, 60.0, None)
    assert (config.ping_after, config.ping_timeout, config.reset_timeout) == (1.0, 1.0, 5.0)
    assert (config.max_lifetime, config.max_inactive_connection_lifetime) == (1800.0, 50.0)
    assert (config.backoff, config.reconnect) == (OPERATION_BACKOFF, RECONNECT_BACKOFF)
    assert (config.session_reset, config.retry_unknown, config.statement_cache_size) == ("auto", False, None)
    assert (config.tcp_keepalive, config.tcp_user_timeout) == (True, 30.0)
    assert isinstance(config.classifier, PostgresClassifier)
    assert isinstance(config.retry_budget, RetryBudget)
    assert config.password is None


def test_each_pool_has_a_budget_of_its_own():
    """Retries of one pool are not paid by another."""
    assert read().retry_budget is not read().retry_budget


REFUSED = [
    ("max_size", 0, "max_size must be a whole number of connections, at least 1, not 0"),
    ("max_size", True, "max_size must be a whole number of connections, at least 1, not True"),
    ("max_size", 2.0, "max_size must be a whole number of connections, at least 1, not 2.0"),
    ("max_size", "10", "max_size must be a whole number of connections, at least 1, not '10'"),
    ("max_size", None, "max_size must be a whole number of connections, at least 1, not None"),
    ("min_size", -1, "min_size must be a whole number of connections, at least 0, not -1"),
    ("min_size", "1", "min_size must be a whole number of connections, at least 0, not '1'"),
    ("max_waiting", -1, "max_waiting must be a whole number of callers, at least 0, or None, not -1"),
    ("min_size", 11, "min_size=11 must be at most max_size=10"),
    ("init_size", 11, "init_size=11 must be from min_size=0 to max_size=10"),
    ("max_queries", 0, "max_queries must be a whole number of operations, at least 1, not 0"),
    ("timeout", 0, "timeout must be a number of seconds, more than 0, not 0"),
    ("command_timeout", 0, "command_timeout must be a number of seconds, more than 0, or None, not 0"),
    ("deadline", 0, "deadline must be a number of seconds, more than 0, or None, not 0"),
    ("deadline", float("inf"), "deadline must be a number of seconds, more than 0, or None, not inf"),
    ("deadline", float("nan"), "deadline must be a number of seconds, more than 0, or None, not nan"),
    ("deadline", 10**400, "deadline must be a number of seconds, more than 0, or None, not 1000"),
    ("max_size", 10**400, "max_size must be a whole number of connections, at least 1, not 1000"),
    ("ping_after", -0.1, "ping_after must be a number of seconds, at least 0, not -0.1"),
    ("ping_timeout", 0, "ping_timeout must be a number of seconds, more than 0, not 0"),
    ("reset_timeout", 0, "reset_timeout must be a number of seconds, more than 0, not 0"),
    ("max_lifetime", -1, "max_lifetime must be a number of seconds, at least 0, not -1"),
    ("max_lifetime", False, "max_lifetime must be a number of seconds, at least 0, not False"),
    ("tcp_user_timeout", 0, "tcp_user_timeout must be a number of seconds, more than 0, or None, not 0"),
    (
        "max_inactive_connection_lifetime",
        -1,
        "max_inactive_connection_lifetime must be a number of seconds, at least 0, not -1",
    ),
    ("statement_cache_size", -1, "statement_cache_size must be a whole number of statements, at least 0, or None"),
    (
        "max_cacheable_statement_size",
        1.5,
        "max_cacheable_statement_size must be a whole number of bytes, at least 0",
    ),
    ("max_cached_statement_lifetime", -1, "max_cached_statement_lifetime must be a number of seconds, at least 0"),
    (
        "session_reset",
        "always",
        "session_reset must be one of 'auto', 'background', 'on_release', 'off', not a str that may be secret",
    ),
    (
        "session_reset",
        "backgroud",
        "session_reset must be one of 'auto', 'background', 'on_release', 'off', not 'backgroud'",
    ),
    ("session_reset", None, "session_reset must be one of 'auto', 'background', 'on_release', 'off', not None"),
    ("target_session_attrs", "master", "target_session_attrs must be one of 'any', 'primary', "),
    ("gsslib", "x", "gsslib must be one of 'gssapi', 'sspi', not a str that may be secret"),
    ("ssl", "on", "ssl must be one of 'disable', 'allow', 'prefer', 'require', 'verify-ca', 'verify-full', True, "),
    ("ssl", 1, "ssl must be one of 'disable', "),
    ("direct_tls", 1, "direct_tls must be True or False, not 1"),
    ("retry_unknown", 1, "retry_unknown must be True or False, not 1"),
    ("tcp_keepalive", None, "tcp_keepalive must be True or False, not None"),
    ("host", "", "host must be a non-empty str without NUL or surrogates or a sequence of them, not ('',)"),
    ("host", 5, "host must be a non-empty str without NUL or surrogates or a sequence of them, not (5,)"),
    ("host", b"h", "host must be a non-empty str without NUL or surrogates or a sequence of them, not bytes"),
    ("port", 0, "port must be a whole number from 1 to 65535, not (0,)"),
    ("port", True, "port must be a whole number from 1 to 65535, not (True,)"),
    ("port", "x", "port must be a whole number from 1 to 65535, not a str that may be secret"),
    ("port", {}, "port must be a whole number from 1 to 65535, not dict"),
    ("user", 5, "user must be a str without NUL or surrogates, not 5"),
    ("user", str, "user must be a str; a function that returns user and password is given as credentials="),
    (
        "host",
        "postgresql://u:p@h",
        "host must be a non-empty str without NUL or surrogates or a sequence of them, not a str that holds",
    ),
    ("credentials", ("u", "p"), "credentials must be callable: (async) function, not tuple"),
    (
        "server_settings",
        {"password": "p"},
        "server_settings holds 'password', which is no setting of the server's but an",
    ),
    ("user", "u\0role\0admin", "user must be a str without NUL or surrogates, not 'u\\x00role"),
    ("database", "tenant\0user\0admin", "database must be a str without NUL or surrogates, not"),
    ("database", "\udc80", "database must be a str without NUL or surrogates, not"),
    (
        "host",
        "inside\0.example.org",
        "host must be a non-empty str without NUL or surrogates or a sequence of them, not",
    ),
    (
        "server_settings",
        {"application_name": "a\0role\0admin"},
        "server_settings must be a dict of str to str without NUL or surrogates",
    ),
    ("server_settings", {"a\0b": "c"}, "server_settings must be a dict of str to str without NUL or surrogates"),
    ("database", b"d", "database must be a str without NUL or surrogates, not bytes"),
    ("password", 5, "password must be a str or an (async) function that returns one, not int"),
    ("passfile", 5, "passfile must be a str or a path, not 5"),
    ("servicefile", 5, "servicefile must be a str or a path, not 5"),
    ("service", 5, "service must be a str without NUL or surrogates, not 5"),
    (
        "server_settings",
        {"a": 1},
        "server_settings must be a dict of str to str without NUL or surrogates, or None: 'a' has 1",
    ),
    ("server_settings", "a=1", "server_settings must be a dict of str to str without NUL or surrogates, or None"),
    ("connect", "x", "connect must be callable: async function, not a str that may be secret"),
    ("setup", 5, "setup must be callable: async function, not 5"),
    ("loop", 5, "loop must be an asyncio event loop, not 5"),
    ("connection_class", object, "connection_class must be a subclass of asyncpg.Connection, not <class 'object'>"),
    ("record_class", 5, "record_class must be a subclass of asyncpg.Record, not 5"),
    ("classifier", 5, "classifier must be a classifier with the method classify(), not 5"),
    ("clock", 5, "clock must be a clock with the methods now(), monotonic(), sleep(), call_later(), not 5"),
    ("backoff", backoff.expo, "backoff must be a BackoffPolicy, not <function exp"),
    ("reconnect", None, "reconnect must be a BackoffPolicy, not None"),
    ("retry_budget", 0.1, "retry_budget must be a RetryBudget, not 0.1"),
    ("pure_functions", "now", "pure_functions must be a sequence of function names, not a str that may be secret"),
    ("pure_functions", None, "pure_functions must be a sequence of function names, not None"),
    ("pure_functions", [1], "pure_functions must be a sequence of function names, not (1,)"),
    ("observers", print, "observers must be a sequence of callables, not <built-in function print>"),
    ("observers", [5], "observers must be a sequence of callables, not (5,)"),
]


def test_a_value_out_of_range_is_refused_with_its_name_unit_and_range():
    """And nothing is converted silently: a bool is no number, and neither is a text."""
    for name, value, message in REFUSED:
        try:
            read(**{name: value})
        except ConfigurationError as error:
            assert str(error).startswith(message), (name, value)
            assert error.__context__ is None, (name, value)
        else:
            pytest.fail(f"{name}={value!r} was taken")


class AsyncObserver:
    async def __call__(self, event):
        """Never called."""

    async def observe(self, event):
        """Never called."""

    async def generate(self, event):
        yield event


@pytest.mark.parametrize(
    "observer",
    [
        AsyncObserver(),
        AsyncObserver().observe,
        AsyncObserver().generate,
        AsyncObserver.observe,
        functools.partial(AsyncObserver.observe, None),
    ],
    ids=["object", "method", "generator", "function", "partial"],
)
def test_an_observer_that_would_have_to_be_awaited_is_refused(observer):
    """When the pool is made, and in whichever form it comes; a plain one beside it does not help."""
    message = "^observers must be plain functions, which need not be awaited"
    with pytest.raises(ConfigurationError, match=message):
        read(observers=[print, observer])
    with pytest.raises(ConfigurationError, match=message):
        ResilientPool("postgresql://nobody@nowhere/nothing", observers=[observer])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maxsize", "unknown argument 'maxsize'; did you mean 'max_size'?"),
        ("pool_size", "unknown argument 'pool_size'; did you mean 'max_size'?"),
        ("pool_timeout", "unknown argument 'pool_timeout'; did you mean 'deadline'?"),
        ("connect_timeout", "unknown argument 'connect_timeout'; did you mean 'timeout'?"),
        ("command_timeot", "unknown argument 'command_timeot'; did you mean 'command_timeout'?"),
        ("sslmode", "unknown argument 'sslmode'; did you mean 'ssl'?"),
        ("tls", "unknown argument 'tls'"),
        ("sslpassword", "unknown argument 'sslpassword'; did you mean 'ssl'?"),
        ("zzz", "unknown argument 'zzz'"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest_known(name, message):
    """A slip of the pen does not go unnoticed."""
    with pytest.raises(ConfigurationError) as caught:
        read(**{name: "x"})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_size": 1, "min_size": 1},
        {"max_lifetime": 0},
        {"max_inactive_connection_lifetime": 0},
        {"ping_after": 0},
        {"deadline": None},
        {"command_timeout": None},
        {"tcp_user_timeout": None},
        {"statement_cache_size": 0},
        {"ssl": True},
        {"ssl": False},
        {"ssl": "verify-ca"},
        {"connect": asyncpg.connect},
        {"connection_class": type("Own", (asyncpg.Connection,), {})},
        {"record_class": type("Own", (asyncpg.Record,), {})},
        {"backoff": BackoffPolicy(max_attempts=3)},
        {"retry_budget": RetryBudget(ratio=1)},
    ],
)
def test_a_value_at_the_edge_of_its_range_is_kept(arguments):
    """Zero, `None` and the classes themselves, where they mean something."""
    config = read(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


def test_values_are_brought_into_one_shape():
    """Single values and lists become tuples, enumerations of the driver's their words, None its meaning."""
    context = ssl.create_default_context()
    config = read(host=["a", "b"], port="6432", observers=[print], pure_functions={"f"}, timeout=None, ssl=context)
    assert (config.host, config.port) == (("a", "b"), (6432, 6432))
    assert (config.observers, config.pure_functions, config.timeout) == ((print,), ("f",), 86400.0)
    assert config.ssl is context
    assert read(ssl=SSLMode.verify_full).ssl == "verify-full"
    assert read(target_session_attrs=SessionAttribute.read_write).target_session_attrs == "read-write"


def test_init_size_is_min_size_unless_it_is_given():
    """As in asyncpg, also when it is given as None."""
    assert read(min_size=3).init_size == 3
    assert read(min_size=3, init_size=None).init_size == 3
    assert read(min_size=3, init_size=5).init_size == 5


def test_explicit_arguments_win_over_the_dsn():
    """One by one; settings are merged, a host brings its own port, and None is as if it were not given."""
    dsn = "postgresql://u:p@h:1/db?connection_limit=3&pool_timeout=5&geqo=off&jit=off&statement_cache_size=7&socket_timeout=2"
    config = read(dsn, max_size=4, deadline=None, server_settings={"jit": "on"}, user=None, password="q")
    assert (config.max_size, config.deadline, config.user, config.database) == (4, None, "u", "db")
    assert config.server_settings == {"geqo": "off", "jit": "on"}
    assert config.password == Secret("q")
    assert config.statement_cache_size == 7
    assert (config.command_timeout, read(dsn, command_timeout=None).command_timeout) == (2.0, None)
    assert read(dsn, statement_cache_size=8).statement_cache_size == 8
    assert (read(dsn, host="x").host, read(dsn, host="x").port) == (("x",), (5432,))
    assert (read(dsn, port=9).host, read(dsn, port=9).port) == (("h",), (9,))


def test_the_dsn_may_be_given_by_name_and_be_empty():
    """`dsn=` is how many call asyncpg; an empty one says nothing."""
    assert read(dsn="postgresql://u@h").user == "u"
    assert read(Secret("postgresql://u@h")).user == "u"
    assert read("").host is None


def test_the_environment_fills_in_what_nobody_said(monkeypatch):
    """PGHOST, PGPORT, PGUSER, PGDATABASE and PGPASSWORD, below everything else."""
    for name, value in {"HOST": "a,b:7", "PORT": "6", "USER": "u", "DATABASE": "d", "PASSWORD": "p"}.items():
        monkeypatch.setenv(f"PG{name}", value)
    config = read()
    assert (config.host, config.port, config.user, config.database) == (("a", "b"), (6, 7), "u", "d")
    assert config.password == Secret("p")
    assert read("postgresql://x@h:1,i/y").port == (1, 6)
    assert (read(user="x").user, read(database="y").database, read(port=1).port) == ("x", "y", (1, 1))
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "standby")
    assert (read().target_session_attrs, read(target_session_attrs="any").target_session_attrs) == ("standby", "any")
    monkeypatch.setenv("PGPORT", "none")
    with pytest.raises(ConfigurationError, match=r"^in PGPORT: a port must be a number from 1 to 65535$"):
        read()


def test_the_driver_is_given_what_it_takes_and_no_password():
    """The values by asyncpg's names; what was not said is left to it."""
    assert read().connect_arguments() == {
        "timeout": 60.0,
        "max_cached_statement_lifetime": 300,
        "max_cacheable_statement_size": 15360,
    }
    arguments = read("postgresql://u:p@a:1,b:2/d?sslmode=require&geqo=off", statement_cache_size=0).connect_arguments()
    assert arguments == {
        "host": ["a", "b"],
        "port": [1, 2],
        "user": "u",
        "database": "d",
        "ssl": "require",
        "server_settings": {"geqo": "off"},
        "statement_cache_size": 0,
        "timeout": 60.0,
        "max_cached_statement_lifetime": 300,
        "max_cacheable_statement_size": 15360,
    }


def test_what_the_driver_knows_in_a_dsn_only_is_given_in_one_that_holds_nothing_else():
    """And only there the key's passphrase is to be seen."""
    config = read("postgresql://u:p@h/d?sslrootcert=/a%20b&sslpassword=s%26t&ssl_min_protocol_version=TLSv1.3")
    assert config.connect_arguments()["dsn"] == (
        "postgresql://?sslrootcert=%2Fa+b&ssl_min_protocol_version=TLSv1.3&sslpassword=s%26t"
    )
    assert config.secrets() == (Secret("p"), Secret("s&t"))
    assert "s&t" not in repr(config)


def test_a_password_function_is_kept_as_it_is():
    """It is asked at every connect; what it returns is not known beforehand."""

    async def ask():
        return "p"

    config = read(password=ask)
    assert config.password is ask
    assert config.secrets() == ()


def test_repr_shows_what_was_chosen_and_no_secret():
    """Functions are left out too: they may be bound to secrets."""
    config = read("postgresql://u:hunter2@h/d?sslpassword=hunter3", max_size=3, init=print)
    assert repr(config) == (
        "PoolConfig(host=('h',), port=(5432,), user='u', password=****, database='d', max_size=3, sslpassword=****)"
    )
    assert repr(read()) == "PoolConfig()"


def test_a_configuration_cannot_be_changed():
    """Neither an attribute nor the settings in it."""
    config = read(server_settings={"jit": "on"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_size = 5
    with pytest.raises(TypeError):
        config.server_settings["jit"] = "off"


def test_a_changed_copy_is_checked_as_well():
    """`dataclasses.replace` passes the same checks."""
    assert dataclasses.replace(read(), statement_cache_size=0).statement_cache_size == 0
    with pytest.raises(ConfigurationError, match="ping_after must be a number of seconds"):
        dataclasses.replace(read(), ping_after=-1)


def test_sealing_puts_every_secret_where_it_cannot_be_seen():
    """The DSN and the password; functions and everything else stay; doing it twice changes nothing."""
    dsn, arguments = seal("postgresql://u:p@h", {"password": "q", "max_size": 3})
    assert (dsn, arguments) == (Secret("postgresql://u:p@h"), {"password": Secret("q"), "max_size": 3})
    assert seal(dsn, arguments) == (dsn, arguments)
    assert seal(None, {"dsn": "x", "password": print}) == (Secret("x"), {"password": print})
    assert repr(seal(b"hunter2", {"password": b"hunter2"})) == "(bytes, {'password': bytes})"


def test_every_argument_is_documented():
    """Name, unit, default and meaning, for all that asyncpg's pool takes and for all that is ours."""
    names = [argument.name for argument in ARGUMENTS]
    assert len(names) == len(set(names))
    assert all(argument.unit and argument.default and argument.meaning.endswith(".") for argument in ARGUMENTS)
    assert {"min_size", "init_size", "ssl", "password", "deadline", "clock"} <= set(names)
    assert not {"tls", "sslpassword", "dsn"} & set(names)
    assert {argument.name: argument.default for argument in ARGUMENTS}["ping_after"] == "1.0"
