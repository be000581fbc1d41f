"""The URLs that migration tools and frameworks use: `migrate` and `wait` read them, and a command gets its own as it is."""

from __future__ import annotations

import pytest
from migration_tools import program, run

from resilient_pool import run_migration

WORDS = [
    "ssl=disable",
    "ssl=prefer",
    "prepared_statement_cache_size=0",
    "channel_binding=prefer",
    "channel_binding=require",
    "keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=3",
    "pool=5&timeout=5000&reaping_frequency=10&prepared_statements=false&advisory_locks=false",
    "encoding=unicode&min_messages=warning",
    "schema=public&connection_limit=5&pool_timeout=10&pgbouncer=true&socket_timeout=60",
    "sslmode=disable&gssencmode=disable&application_name=deploy&target_session_attrs=any",
    "pool_size=5&max_overflow=10&pool_recycle=300&pool_pre_ping=true",
    "pool_max_conns=10&default_query_exec_mode=simple_protocol&x-migrations-table=versions",
]


def with_words(dsn: str, scheme: str, words: str) -> str:
    """The same database as another tool writes it."""
    return dsn.replace("postgresql", scheme, 1) + ("&" if "?" in dsn else "?") + words


@pytest.mark.parametrize("words", WORDS)
async def test_a_migration_reads_the_words_of_other_tools(postgres, words):
    """The lock and the waiting take what a connection needs of them; the command's URL is untouched."""
    url = with_words(postgres.dsn(), "postgresql+asyncpg", words)
    source = "import os, sys; assert os.environ['DATABASE_URL'] == sys.argv[1]"
    result = await run_migration([*program(source), url], dsn=url, on_line=lambda _: None)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "scheme", ["postgresql+asyncpg", "postgresql+psycopg2", "postgresql+psycopg", "postgres", "postgres+asyncpg"]
)
async def test_waiting_reads_the_scheme_with_a_drivers_name(postgres, scheme):
    """As SQLAlchemy writes it, with a password that must be quoted; from the environment or from --dsn."""
    url = with_words(postgres.dsn(), scheme, WORDS[2])
    for given in ((), ("--dsn", url)):
        status, _, errors = await run("wait", "--timeout", "20", *given, dsn=None if given else url)
        assert status == 0, errors


async def test_an_option_that_no_program_is_known_to_use_is_refused(postgres):
    """It may be a typo: nothing is run."""
    status, _, errors = await run("wait", dsn=with_words(postgres.dsn(), "postgresql", "slmode=disable"))
    assert status == 2
    assert "did you mean 'sslmode'" in errors


async def test_the_doctor_reads_them_too_and_says_what_the_pool_refuses(postgres):
    """The application's pool is given the same DSN, most likely."""
    url = with_words(postgres.dsn(), "postgresql", "keepalives_idle=30")
    status, output, errors = await run("doctor", dsn=url)
    assert (status, errors) == (1, "")
    assert "problem dsn: the pool refuses it" in output
    assert "'keepalives_idle'; use the argument tcp_user_timeout" in output
