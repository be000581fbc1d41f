"""What `create_async_engine("postgresql+resilient://...")` takes, and what it says to what it does not take. No server is needed."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import asyncpg
import pytest
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from resilient_pool import ConfigurationError, ResilientPool, UnknownArgumentError
from resilient_pool.contrib.sqlalchemy import engine_on, pool_of, retry_session

URL = "postgresql+resilient://user:geheim@127.0.0.1:1/database"


async def config_of(url=URL, **options):
    """The configuration of the pool that such an engine makes in this loop."""
    return pool_of(create_async_engine(url, **options))._config


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("max_size=3&deadline=2.5", {"max_size": 3, "deadline": 2.5}),
        ("max_lifetime=60&command_timeout=none", {"max_lifetime": 60.0, "command_timeout": None}),
        ("may_pause=yes&fail_fast=off", {"may_pause": True, "fail_fast": False}),
        ("ssl=require&session_reset=background", {"ssl": "require", "session_reset": "background"}),
        ("sslmode=require&target_session_attrs=primary", {"ssl": "require", "target_session_attrs": "primary"}),
        ("connect_timeout=7", {"timeout": 7.0}),
        ("host=a:1&host=b:2", {"host": ("a", "b"), "port": (1, 2)}),
    ],
)
async def test_options_of_the_url_are_the_pools_arguments(options, expected):
    """In their types; and what a DSN of the pool's takes is taken, too."""
    url = "postgresql+resilient://user@/database" if "host=" in options else URL
    config = await config_of(f"{url}?{options}")
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.user, config.database) == ("user", "database")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pool_size": 3}, {"max_size": 13}),
        ({"pool_size": 3, "max_overflow": 0}, {"max_size": 3}),
        ({"max_overflow": 2}, {"max_size": 7}),
        ({"pool_timeout": 4}, {"deadline": 4}),
        ({"pool_recycle": 300}, {"max_lifetime": 300}),
        ({"pool_recycle": -1}, {"max_lifetime": 0}),
        ({"pool_pre_ping": True, "pool_use_lifo": True}, {"max_size": 10}),
        ({"connect_args": {"command_timeout": 5, "server_settings": {"jit": "off"}}}, {"command_timeout": 5}),
    ],
)
async def test_arguments_of_sqlalchemys_pool_are_mapped(options, expected):
    """`pool_size` and `max_overflow` together are a size, `pool_timeout` is a deadline."""
    config = await config_of(**options)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("max_sise=3", "unknown option 'max_sise'; did you mean 'max_size'?"),
        ("sslmod=require", "unknown option 'sslmod'; did you mean 'sslmode'?"),
        ("deadlin=1", "unknown option 'deadlin'; did you mean 'deadline'?"),
        ("max_size=many", "the URL's option 'max_size' must be a number of connections, not 'many'"),
        ("max_size=1&max_size=2", "the URL's option 'max_size' is given twice"),
        ("observers=x", "the URL's option 'observers' takes no text"),
        ("prepared_statement_cache_size=x", "'prepared_statement_cache_size' must be a number of statements, not 'x'"),
        (
            "prepared_statement_cache_size=-1",
            "prepared_statement_cache_size must be a whole number of statements, at least 0",
        ),
        ("prepared_statement_name_func=x", "the URL's option 'prepared_statement_name_func' takes no text"),
        ("max_size=0", "max_size must be a whole number of connections"),
        ("password=geheim", "the URL's option 'password' would be shown"),
        ("sslpassword=geheim", "the URL's option 'sslpassword' would be shown"),
    ],
)
def test_a_wrong_option_of_the_url_is_refused_by_name(options, message):
    """When the engine is made, not when it first connects; and a secret is not repeated."""
    with pytest.raises(ConfigurationError) as refused:
        create_async_engine(f"{URL}?{options}")
    assert message in str(refused.value)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connect_args": {"max_sise": 3}}, "unknown argument 'max_sise'; did you mean 'max_size'?"),
        ({"connect_args": {"max_size": 3}, "pool_size": 3}, "max_size is given twice: leave it out, or pool_size="),
        (
            {"connect_args": {"deadline": 3}, "pool_timeout": 3},
            "deadline is given twice: leave it out, or pool_timeout=",
        ),
        (
            {"connect_args": {"prepared_statement_cache_size": "9"}},
            "prepared_statement_cache_size must be a whole number",
        ),
        ({"connect_args": {"prepared_statement_name_func": "x"}}, "prepared_statement_name_func must be a function"),
        ({"pool_size": 0}, "pool_size must be a number of connections"),
        ({"max_overflow": -1}, "max_overflow must be a number of connections"),
        ({"pool_timeout": -1}, "pool_timeout must be a number of seconds"),
        ({"pool_recycle": "soon"}, "pool_recycle must be a number of seconds"),
    ],
)
def test_a_wrong_argument_is_refused_when_the_engine_is_made(options, message):
    """By its own name, with the nearest right one."""
    with pytest.raises(ConfigurationError) as refused:
        create_async_engine(URL, **options)
    assert message in str(refused.value)


def test_a_misspelt_argument_is_a_type_error():
    """As of any function."""
    with pytest.raises(UnknownArgumentError):
        create_async_engine(URL, connect_args={"max_sise": 3})


async def test_a_cache_of_less_than_no_statements_is_refused_without_a_pool_too():
    """SQLAlchemy's cache of that size would turn for ever when it is first used, and the event loop with it."""
    engine = create_async_engine(f"{URL}?prepared_statement_cache_size=-1", poolclass=NullPool)
    with pytest.raises(ConfigurationError, match="prepared_statement_cache_size must be a whole number"):
        await engine.connect()


async def test_nothing_shows_the_password():
    """Neither the engine, its pool, its URL and the pool below, nor what was raised with all variables of its frames."""
    engine = create_async_engine(URL, connect_args={"deadline": 0.2, "timeout": 0.1})
    shown = [
        repr(engine),
        repr(engine.sync_engine),
        repr(engine.pool),
        str(engine.url),
        repr(pool_of(engine)),
        engine.pool.status(),
    ]
    with pytest.raises(Exception) as raised:
        await engine.connect()
    frame = raised.value.__traceback__
    while frame is not None:
        if "resilient_pool" in frame.tb_frame.f_code.co_filename:
            shown.append(repr(frame.tb_frame.f_locals))
        frame = frame.tb_next
    assert [text for text in shown if "geheim" in text] == []
    await engine.dispose()


def test_the_size_of_sqlalchemys_statement_cache_stands_in_the_url():
    """As it does for `postgresql+asyncpg`."""
    engine = create_async_engine(f"{URL}?prepared_statement_cache_size=0&deadline=3")
    assert engine.pool._recipe().statements == {"prepared_statement_cache_size": 0}


def test_what_is_refused_shows_no_password_to_those_who_collect_frames():
    """A wrong option is found before the password is in any variable."""
    with pytest.raises(ConfigurationError) as refused:
        create_async_engine(make_url(f"{URL}?deadlin=1"))
    assert "geheim" not in "".join(repr(entry.frame.f_locals) for entry in refused.traceback[1:])


async def test_an_engine_on_a_pool_takes_no_size():
    """That is the pool's own, and so is where it connects."""
    pool = ResilientPool("postgresql://127.0.0.1:1/database")
    with pytest.raises(ConfigurationError, match="that pool's own"):
        engine_on(pool, pool_size=3)
    assert pool_of(engine_on(pool)) is pool


async def test_units_of_work_need_the_dialects_own_pool():
    """Another class of pools has no leases, and another driver has none either."""
    for engine in (
        create_async_engine(URL, poolclass=NullPool),
        create_async_engine("postgresql+asyncpg://127.0.0.1:1/x"),
    ):
        with pytest.raises(ConfigurationError, match="the engine must be one of postgresql"):
            async for _ in retry_session(engine):
                pass
    with pytest.raises(ConfigurationError, match="source must be"):
        retry_session("postgresql://")
    with pytest.raises(UnknownArgumentError, match="did you mean 'isolation'"):
        retry_session(create_async_engine(URL), isolatio="serializable")


async def test_a_listener_must_not_connect_by_itself():
    """The pool opens its connections; a function that does it goes into the pool's arguments."""
    engine = create_async_engine(URL)

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect, record, arguments, options):
        return object()

    with pytest.raises(ConfigurationError, match="'connect'"):
        await engine.connect()


async def test_a_creator_that_connects_by_itself_is_refused_with_what_to_do_instead():
    """Also one that is met only when it connects."""
    engine = create_async_engine(URL)

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect, record, arguments, options):
        assert record.info == {}
        return dialect.connect(**options).cursor()

    with pytest.raises(ConfigurationError, match='into a "connect" listener'):
        await engine.connect()


async def test_an_async_creator_is_called_for_every_connection():
    """As it is on SQLAlchemy's own pool: Cloud SQL's connector is used so."""

    async def create():
        raise asyncpg.InvalidPasswordError("called")

    engine = create_async_engine("postgresql+resilient://", async_creator=create, connect_args={})
    with pytest.raises(Exception, match="called"):
        await engine.connect()
    await engine.dispose()


def test_the_installed_package_names_the_dialect():
    """A URL is enough, with nothing imported."""
    code = f"import sqlalchemy.ext.asyncio as s; print(type(s.create_async_engine({URL!r}).pool).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LeasePool\n"


def test_an_engine_that_was_never_used_is_disposed_of_without_a_loop():
    """And one that was made in no loop."""
    engine = create_async_engine(URL)
    engine.sync_engine.dispose()
    asyncio.run(engine.dispose())
