"""What counts as evidence of a COMMIT: not absence, not another server's word, not an id of another epoch."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import shutil
import uuid

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.events import OutcomeResolved
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture
async def log(postgres: EmbeddedPostgres):
    name = f"public.log_{uuid.uuid4().hex}"
    yield name
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE IF EXISTS {name}")


async def nothing(connection):
    await connection.fetch("SELECT 1")


async def count(server, table="t"):
    async with server.admin() as admin:
        return await admin.fetchval(f"SELECT count(*) FROM {table}")


def lost_after(proxy, table, runs, *, arrived=True, hang=False):
    """Return a block that inserts a row, and whose first COMMIT is lost with nobody to ask until the proxy accepts again."""

    async def block(connection):
        runs.append(None)
        await connection.execute(f"INSERT INTO {table} VALUES (1)")
        if len(runs) == 1:
            if not hang:
                proxy.refuse()
            if arrived:
                proxy.swallow_next_answer("hang" if hang else "fin", matching=b"COMMIT")
            else:
                proxy.lose_next_request(matching=b"COMMIT")

    return block


# Absence


async def crashed_and_asked_again(proxy, table, log, server, meanwhile):
    """Lose a COMMIT that arrived, crash the server so that ids mean nothing, do something, and let it be asked."""
    runs = []
    async with ResilientPool(proxy.dsn(server.dsn()), max_size=1, deadline=20.0, commit_log=log) as pool:
        await pool.run_in_transaction(nothing)
        running = asyncio.create_task(pool.run_in_transaction(lost_after(proxy, table, runs)))
        await eventually(lambda: proxy.fired)
        await server.restart("immediate")
        await meanwhile()
        proxy.accept()
        await running
    return runs


@pytest.fixture
async def server():
    async with EmbeddedPostgres(18) as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE t (id int)")
        yield server


async def test_a_token_whose_row_was_made_older_is_not_pruned_before_its_time(server):
    """Its own age says when it was written; another pool's pruning leaves it alone."""

    async def meanwhile():
        async with server.admin() as admin:
            await admin.execute("UPDATE public.commits SET written_at = written_at - interval '25 hours'")
        async with ResilientPool(server.dsn(), commit_log="public.commits") as other:
            await other.run_in_transaction(lambda connection: connection.execute("CREATE TABLE u (id int)"))
            await asyncio.sleep(0.3)

    with FaultProxy(server.host, server.port) as proxy:
        runs = await crashed_and_asked_again(proxy, "t", "public.commits", server, meanwhile)
    assert (len(runs), await count(server)) == (1, 1)


@pytest.mark.parametrize(
    "sql",
    [
        "TRUNCATE public.commits",
        "CREATE TABLE again (LIKE public.commits INCLUDING ALL); DROP TABLE public.commits; ALTER TABLE again RENAME TO commits",
    ],
    ids=["emptied", "made anew"],
)
async def test_a_log_that_was_emptied_or_made_anew_proves_nothing(server, sql):
    """The row may have been there."""

    async def meanwhile():
        async with server.admin() as admin:
            await admin.execute(sql)

    with FaultProxy(server.host, server.port) as proxy:
        with pytest.raises(OutcomeUnknownError):
            await crashed_and_asked_again(proxy, "t", "public.commits", server, meanwhile)
    assert await count(server) == 1


async def test_a_token_is_dated_when_it_is_written_and_not_when_its_transaction_began(postgres, table, log):
    """A transaction that lasts for a day is not pruned as soon as it has committed."""
    async with ResilientPool(postgres.dsn(), commit_log=log) as pool:

        async def block(connection):
            await connection.execute(f"INSERT INTO {table} VALUES (1)")
            await asyncio.sleep(0.3)

        await pool.run_in_transaction(block)
    async with postgres.admin() as admin:
        late = await admin.fetchval(
            f"SELECT l.written_at - to_timestamp((('x' || translate(left(token::text, 13), '-', ''))::bit(48)::bigint) / 1000.0)"
            f" BETWEEN interval '-2 ms' AND interval '2 ms' FROM {log} AS l"
        )
        assert late
        began = await admin.fetchval(f"SELECT count(*) FROM {log} WHERE written_at < now() - interval '1 hour'")
        assert began == 0


async def test_rows_of_either_kind_are_pruned_when_they_are_old(postgres, table, log):
    """Those of earlier versions by their column; those with a time of their own when both are past."""
    async with ResilientPool(postgres.dsn(), commit_log=log) as pool:
        await pool.run_in_transaction(nothing)
        async with postgres.admin() as admin:
            old = "lpad(to_hex((extract(epoch FROM now() - interval '26 hours') * 1000)::bigint), 12, '0')"
            await admin.execute(
                f"INSERT INTO {log} VALUES (gen_random_uuid(), now() - interval '26 hours'), "
                f"(({old} || '7' || substr(md5('a'), 14))::uuid, now() - interval '26 hours'), "
                f"(({old} || '7' || substr(md5('b'), 14))::uuid, now()), "
                f"(gen_random_uuid(), now() - interval '24 hours')"
            )
            await pool.run_in_transaction(lambda connection: connection.execute(f"INSERT INTO {table} VALUES (1)"))
            async with asyncio.timeout(5):
                while await admin.fetchval(f"SELECT count(*) FROM {log}") != 3:
                    await asyncio.sleep(0.01)


# Which server


@pytest.mark.parametrize("target", [None, "primary"])
@pytest.mark.parametrize("with_log", [False, True], ids=["without a log", "with a log"])
async def test_a_standbys_word_is_not_the_last(server, with_log, target):
    """It is asked again elsewhere, until the primary is back."""
    async with await server.standby("follower") as standby:
        with FaultProxy(server.host, server.port) as proxy:
            runs = []
            async with ResilientPool(
                f"postgresql://postgres@127.0.0.1:{proxy.port},127.0.0.1:{standby.port}/postgres",
                max_size=1,
                deadline=15.0,
                commit_log="public.commits" if with_log else None,
                target_session_attrs=target,
            ) as pool:
                await pool.run_in_transaction(nothing)
                running = asyncio.create_task(pool.run_in_transaction(lost_after(proxy, "t", runs, hang=True)))
                await eventually(lambda: proxy.fired)
                await asyncio.sleep(0.2)
                await server.stop("fast")
                proxy.refuse()
                proxy.rst()
                await asyncio.sleep(0.5)
                await server.start()
                proxy.accept()
                await running
            assert (len(runs), await count(server)) == (1, 1)


async def test_the_timeline_is_the_one_that_is_written_now(tmp_path):
    """A standby from a cold copy has its primary's statistics; after its promotion only the timeline tells them apart.

    The timeline of the last checkpoint would not: it follows later.
    """
    settings = {"wal_level": "replica", "max_wal_senders": "4", "wal_keep_size": "256MB", "checkpoint_timeout": "5min"}
    copy = tmp_path / "copy"
    shared = __import__("pathlib").Path("/tmp") / f"cold_{uuid.uuid4().hex}"  # the server's own user must reach it
    async with EmbeddedPostgres(18, settings=settings) as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE t (id int)")
        await server.stop("fast")
        try:
            shared.mkdir(mode=0o755)
            copy = shared / "data"
            shutil.copytree(server.data_directory, copy)
            (copy / "postmaster.pid").unlink(missing_ok=True)
            await server.start()
            (copy / "standby.signal").touch()
            with (copy / "postgresql.auto.conf").open("a") as config:
                config.write(f"primary_conninfo = 'host=127.0.0.1 port={server.port} user=postgres'\n")
            async with EmbeddedPostgres(18, data_directory=copy, settings={**settings, "hot_standby": "on"}) as standby:
                await lose_to_a_stranger(server, standby)
        finally:
            shutil.rmtree(shared, ignore_errors=True)


async def lose_to_a_stranger(server, standby):
    with FaultProxy(server.host, server.port) as proxy:
        ids = []
        async with ResilientPool(proxy.dsn(server.dsn()), max_size=1, deadline=30.0) as pool:
            await pool.run_in_transaction(nothing)
            async with standby.admin() as follower:
                await follower.execute("ALTER SYSTEM SET primary_conninfo = ''")
                await follower.execute("SELECT pg_reload_conf()")
                while await follower.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(0.01)

            async def block(connection):
                await connection.execute("INSERT INTO t VALUES (1)")
                ids.append(int(await connection.fetchval("SELECT pg_current_xact_id()::text")))
                proxy.refuse()
                proxy.swallow_next_answer(matching=b"COMMIT")

            running = asyncio.create_task(pool.run_in_transaction(block))
            await eventually(lambda: proxy.fired)
            await server.stop("immediate")
            async with standby.admin() as follower:
                await follower.fetchval("SELECT pg_promote(wait => true)")
                while await follower.fetchval("SELECT pg_is_in_recovery()"):
                    await asyncio.sleep(0.001)
                while int(await follower.fetchval("SELECT pg_current_xact_id()::text")) < ids[0]:
                    pass
                assert await follower.fetchval("SELECT pg_xact_status($1::text::xid8)", str(ids[0])) == "committed"
            proxy.retarget(standby.host, standby.port)
            proxy.accept()
            with pytest.raises(OutcomeUnknownError) as caught:
                await running
            assert caught.value.xid == ids[0]
            assert len(ids) == 1


# Standbys and read-only sessions


async def copy_a_table(connection):
    await connection.copy_from_table("t", output=io.BytesIO())


async def look_around(connection):
    connection.get_settings()
    connection.get_server_version()
    await connection.set_type_codec("json", encoder=str, decoder=str, schema="pg_catalog")
    await connection.fetch("SELECT * FROM t")


async def set_something(connection):
    await connection.execute("SET LOCAL work_mem = '8MB'")
    await connection.fetch("SELECT * FROM t")


async def use_a_cursor(connection):
    await connection.execute("DECLARE c CURSOR FOR SELECT * FROM t")
    await connection.execute("FETCH ALL FROM c")


READING = [nothing, copy_a_table, look_around, set_something, use_a_cursor]


@pytest.mark.parametrize("with_log", [False, True], ids=["without a log", "with a log"])
async def test_a_transaction_that_reads_works_on_a_standby(server, with_log):
    """Whatever it does beside, and also when its COMMIT is lost: nothing can be written there."""
    async with await server.standby("follower") as standby:
        with FaultProxy(standby.host, standby.port) as proxy:
            async with ResilientPool(
                proxy.dsn(standby.dsn()),
                max_size=1,
                deadline=6.0,
                target_session_attrs="standby",
                commit_log="public.commits" if with_log else None,
            ) as pool:
                for block in READING:
                    for options in ({}, {"readonly": True}):
                        await pool.run_in_transaction(block, **options)
                        proxy.swallow_next_answer(matching=b"COMMIT")
                        await pool.run_in_transaction(block, **options)


@pytest.mark.parametrize("made", [False, True], ids=["no log yet", "a log"])
async def test_a_transaction_that_reads_works_in_a_read_only_session_with_a_log(server, made):
    """No row can be left, and none is needed."""
    if made:
        async with ResilientPool(server.dsn(), commit_log="public.commits") as pool:
            await pool.run_in_transaction(nothing)
    settings = {"default_transaction_read_only": "on"}
    async with ResilientPool(server.dsn(), commit_log="public.commits", server_settings=settings, deadline=5.0) as pool:
        for block in READING:
            await pool.run_in_transaction(block)
        assert pool.stats().retries_total == 0


async def test_a_transaction_made_read_only_inside_works_with_a_log(server):
    """The row that cannot be written is no reason to fail."""
    async with ResilientPool(server.dsn(), commit_log="public.commits", deadline=5.0) as pool:
        runs = []

        async def block(connection):
            runs.append(None)
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            await connection.fetch("SELECT * FROM t")

        await pool.run_in_transaction(block)
        assert len(runs) == 1


# Other roles


@pytest.fixture
async def tenant(postgres: EmbeddedPostgres, table):
    name = f"tenant_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE ROLE {name}; GRANT ALL ON {table} TO {name};"
            f"CREATE FUNCTION become_{name}() RETURNS void LANGUAGE sql AS $$ SELECT set_config('role', '{name}', true) $$;"
            f"CREATE FUNCTION in_{name}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM set_config('role', '{name}', true); RETURN NEW; END $$"
        )
    yield name
    async with postgres.admin() as admin:
        await admin.execute(
            f"DROP FUNCTION become_{name}; DROP FUNCTION in_{name} CASCADE; DROP OWNED BY {name}; DROP ROLE {name}"
        )


HOW_ROLES_CHANGE = {
    "SET LOCAL ROLE": "SET LOCAL ROLE {}",
    "SET ROLE": "SET ROLE {}",
    "SET SESSION AUTHORIZATION": "SET SESSION AUTHORIZATION {}",
    "set_config": "SELECT set_config('role', '{}', true)",
    "a function": "SELECT become_{}()",
}


@pytest.mark.parametrize("how", HOW_ROLES_CHANGE.values(), ids=HOW_ROLES_CHANGE)
@pytest.mark.parametrize("fault", [None, "lost", "swallowed"])
async def test_a_tenant_that_may_not_write_the_log_commits_all_the_same(
    postgres, proxy, table, log, tenant, how, fault, caplog
):
    """The id is asked for instead, once, and the log says that its table cannot be written to."""
    events, runs = [], []

    async def block(connection):
        runs.append(None)
        await connection.execute(how.format(tenant))
        await connection.execute(f"INSERT INTO {table} VALUES (1)")
        assert await connection.fetchval("SELECT current_user") == tenant

    caplog.set_level(logging.WARNING, "resilient_pool")
    async with ResilientPool(
        proxy.dsn(postgres.dsn()), max_size=1, deadline=8.0, commit_log=log, observers=[events.append]
    ) as pool:
        await pool.run_in_transaction(nothing)
        if fault == "lost":
            proxy.lose_next_request(matching=b"COMMIT")
        if fault == "swallowed":
            proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(block)
    answers = [event.answer for event in events if isinstance(event, OutcomeResolved)]
    assert answers == {None: [], "lost": ["aborted"], "swallowed": ["committed"]}[fault]
    assert len(runs) == (2 if fault == "lost" else 1)
    assert await count(postgres, table) == 1
    assert sum(f"commit log {log}" in record.getMessage() for record in caplog.records) == 1


async def test_a_trigger_that_takes_on_a_role_costs_one_attempt_once(postgres, table, log, tenant):
    """It is not visible in a text; after the first transaction the pool is prepared for it."""
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TRIGGER r BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION in_{tenant}()")
    runs = []

    async def block(connection):
        runs.append(None)
        await connection.execute(f"INSERT INTO {table} VALUES (1)")

    async with ResilientPool(postgres.dsn(), max_size=1, deadline=8.0, commit_log=log) as pool:
        await pool.run_in_transaction(block)
        assert len(runs) == 2
        await pool.run_in_transaction(block)
        await pool.run_in_transaction(block)
        assert len(runs) == 4
    assert await count(postgres, table) == 3


async def test_a_setup_that_takes_on_a_role_commits_with_a_log(postgres, table, log, tenant):
    """Also where every transaction runs under it."""

    async def setup(connection):
        await connection.execute(f"SET ROLE {tenant}")

    async with ResilientPool(postgres.dsn(), max_size=1, commit_log=log) as owner:
        await owner.run_in_transaction(nothing)
    async with ResilientPool(postgres.dsn(), max_size=1, deadline=8.0, commit_log=log, setup=setup) as pool:
        for _ in range(2):
            await pool.run_in_transaction(lambda connection: connection.execute(f"INSERT INTO {table} VALUES (1)"))
        assert pool.stats().retries_total == 0
    assert await count(postgres, table) == 2


# Pools that repeat what is unknown


async def test_exactly_once_is_not_applied_twice_on_a_pool_that_repeats_what_is_unknown(server):
    """After a crash the id means nothing, so it is unknown."""
    with FaultProxy(server.host, server.port) as proxy:
        async with ResilientPool(proxy.dsn(server.dsn()), max_size=1, deadline=20.0, retry_unknown=True) as pool:
            await pool.run_in_transaction(nothing)
            proxy.swallow_next_answer("hang", matching=b"COMMIT")
            running = asyncio.create_task(pool.execute("INSERT INTO t VALUES (1)", exactly_once=True))
            await eventually(lambda: proxy.fired)
            await asyncio.sleep(0.2)
            await server.restart("immediate")
            proxy.rst()
            with pytest.raises(OutcomeUnknownError):
                await running
    assert await count(server) == 1


async def test_an_unknown_outcome_reaches_a_handler_written_for_the_driver(postgres, proxy, table):
    """As SQLSTATE 08007, also through another transaction's block, which is not run again for it."""
    runs = []
    async with ResilientPool(proxy.dsn(postgres.dsn()), max_size=2, deadline=5.0) as pool:

        async def outer(connection):
            runs.append(None)
            await connection.fetch("SELECT 1")
            proxy.swallow_next_answer(matching=b"COMMIT")
            await pool.run_in_transaction(
                lambda inner: inner.execute(f"INSERT INTO {table} VALUES (1)"), resolve_commit=False
            )

        with contextlib.suppress(asyncpg.TransactionResolutionUnknownError):
            await pool.run_in_transaction(outer)
            pytest.fail("it was called done")
    assert len(runs) == 1
