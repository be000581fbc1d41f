"""COMMITs whose answers were lost, in every way that leads to another answer of the server's."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import asyncpg
import pytest
from waiting import eventually

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.events import OutcomeResolved
from resilient_pool.testing import EmbeddedPostgres, FaultProxy


@pytest.fixture
async def server():
    """A server of the test's own: it is restarted, crashed and left behind."""
    async with EmbeddedPostgres(18) as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE t (id int)")
        yield server


@pytest.fixture
async def table(postgres: EmbeddedPostgres):
    name = f"t_{uuid.uuid4().hex}"
    async with postgres.admin() as admin:
        await admin.execute(f"CREATE TABLE {name} (id int)")
    yield name
    # After a failure somebody may still hold it.
    await postgres.terminate_backends("state = 'idle in transaction'")
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {name} CASCADE")


@contextlib.asynccontextmanager
async def opened(server, proxy, **arguments):
    """A pool through the proxy, with everything asked and prepared before the faults begin.

    One connection, so that whoever asks must come through the proxy as the test has left it.
    """
    events = []
    async with ResilientPool(
        proxy.dsn(server.dsn()), **{"max_size": 1, "deadline": 8.0, "observers": [events.append], **arguments}
    ) as pool:
        pool.answers = lambda: [event.answer for event in events if isinstance(event, OutcomeResolved)]
        await pool.run_in_transaction(nothing)
        try:
            yield pool
        except BaseException:
            pool.terminate()  # closing would wait for what was lost
            raise


async def nothing(connection):
    await connection.fetch("SELECT 1")


async def insert(connection, table, before_commit=None):
    await connection.execute(f"INSERT INTO {table} VALUES (1)")
    if before_commit is not None:
        await before_commit()


async def count(server, table="t"):
    async with server.admin() as admin:
        return await admin.fetchval(f"SELECT count(*) FROM {table}")


LOGS = pytest.mark.parametrize("log", [None, "public.commits"], ids=["without a log", "with a log"])


@LOGS
@pytest.mark.parametrize("then", ["fin", "rst"])
async def test_committed_and_the_answer_swallowed(postgres, proxy, table, log, then):
    """The transaction is there once, and nothing surfaces."""
    async with opened(postgres, proxy, commit_log=log) as pool:
        proxy.swallow_next_answer(then, matching=b"COMMIT")
        await pool.run_in_transaction(insert, table)
        assert proxy.fired == 1
        assert pool.answers() == ["committed"]
    assert await count(postgres, table) == 1


@LOGS
@pytest.mark.parametrize("seen", [True, False], ids=["the server sees the loss", "the server is unaware"])
async def test_never_arrived(postgres, proxy, table, log, seen):
    """It is repeated; the session of which the server does not know that it is lost is ended first."""
    async with opened(postgres, proxy, commit_log=log) as pool:
        proxy.lose_next_request(matching=b"COMMIT", server_sees_close=seen)
        await pool.run_in_transaction(insert, table)
        assert pool.answers() == ["aborted"]
    assert await count(postgres, table) == 1


async def test_the_loop_goes_on_after_a_commit_that_never_arrived(postgres, proxy, table):
    """Also in the form with two keywords."""
    numbers = []
    async with opened(postgres, proxy) as pool:
        proxy.lose_next_request(matching=b"COMMIT")
        async for attempt in pool.transaction():
            async with attempt as connection:
                numbers.append(attempt.number)
                await insert(connection, table)
    assert numbers == [1, 2]
    assert await count(postgres, table) == 1


async def test_left_by_return_and_never_committed(postgres, proxy, table):
    """It surfaces, because nobody can go on with the loop, and it says that nothing was done."""

    async def leave(pool):
        async for attempt in pool.transaction():
            async with attempt as connection:
                return await insert(connection, table)

    async with opened(postgres, proxy) as pool:
        proxy.lose_next_request(matching=b"COMMIT")
        with pytest.raises(asyncpg.PostgresConnectionError) as caught:
            await leave(pool)
        assert "rolled back" in caught.value.__notes__[-1]
        proxy.swallow_next_answer(matching=b"COMMIT")
        await leave(pool)
    assert await count(postgres, table) == 1


async def test_the_backend_killed_before_it_could_commit(postgres, proxy, table):
    """Terminated between the block and its COMMIT."""
    async with opened(postgres, proxy) as pool:
        killed = []

        async def kill():
            if not killed:
                killed.append(await postgres.terminate_backends(f"query LIKE '%{table}%'"))

        await pool.run_in_transaction(insert, table, kill)
        assert killed == [1]
    assert await count(postgres, table) == 1


async def test_a_slow_commit(postgres, proxy, table):
    """It is waited for while it works, and not repeated."""
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE FUNCTION slow_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;"
            f"CREATE CONSTRAINT TRIGGER s AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow_{table}()"
        )
    async with opened(postgres, proxy) as pool:
        running = asyncio.create_task(pool.run_in_transaction(insert, table))
        async with postgres.admin() as admin:
            await eventually(
                lambda: admin.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'PgSleep'"
                )
            )
        proxy.rst(server_sees_close=False)
        await running
        assert pool.answers() == ["committed"]
    assert await count(postgres, table) == 1
    async with postgres.admin() as admin:
        await admin.execute(f"DROP FUNCTION slow_{table} CASCADE")


@pytest.mark.parametrize("released", [True, False], ids=["confirmed in time", "never confirmed"])
async def test_a_commit_that_waits_for_a_standby(server, released):
    """Only the standby, or the one who rules it, may call it durable."""
    with FaultProxy(server.host, server.port) as proxy:
        async with opened(server, proxy, deadline=20.0 if released else 2.0) as pool:
            await server.apply_settings({"synchronous_standby_names": "nobody"})
            await until_commits_wait(server)
            running = asyncio.create_task(pool.run_in_transaction(insert, "t"))
            async with server.admin() as admin:
                await admin.execute("SET synchronous_commit = local")
                await eventually(
                    lambda: admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
                )
            proxy.rst(server_sees_close=False)
            if released:
                await asyncio.sleep(0.3)
                await server.apply_settings({"synchronous_standby_names": ""})
                await running
                assert pool.answers() == ["committed"]
            else:
                with pytest.raises(OutcomeUnknownError) as caught:
                    await running
                assert caught.value.xid is not None
                await server.apply_settings({"synchronous_standby_names": ""})
        assert await count(server) == 1


async def until_commits_wait(server):
    """Commit until one waits: sessions wait as soon as the checkpointer, too, has read that there is a standby."""
    async with server.admin() as admin:
        with contextlib.suppress(TimeoutError):
            while True:
                await admin.execute("SELECT pg_logical_emit_message(true, 'a', 'b')", timeout=0.3)


@LOGS
@pytest.mark.parametrize("arrived", [True, False], ids=["committed", "never arrived"])
@pytest.mark.parametrize("mode", ["fast", "immediate"], ids=["cleanly", "by a crash"])
async def test_a_restart_in_between(server, log, arrived, mode):
    """Across a clean restart ids keep their meaning; across a crash only the log knows."""
    with FaultProxy(server.host, server.port) as proxy:
        async with opened(server, proxy, commit_log=log, deadline=20.0) as pool:
            if arrived:
                proxy.swallow_next_answer(matching=b"COMMIT")
            else:
                proxy.lose_next_request(matching=b"COMMIT")
            running = asyncio.create_task(pool.run_in_transaction(insert, "t", cut_off(proxy)))
            await until_fired(proxy)
            await server.restart(mode)
            proxy.accept()
            if mode == "immediate" and log is None:
                with pytest.raises(OutcomeUnknownError) as caught:
                    await running
                assert caught.value.xid is not None
                assert "commit_log=" in str(caught.value)
                assert await count(server) == int(arrived)
            else:
                await running
                assert await count(server) == 1


def cut_off(proxy):
    """Return what lets nobody in any more, once, so that the server can be asked only when the test says so."""
    calls = []

    async def before_commit():
        calls.append(None)
        if len(calls) == 1:
            proxy.refuse()

    return before_commit


async def until_fired(proxy):
    async with asyncio.timeout(10):
        while not proxy.fired:
            await asyncio.sleep(0.01)


@LOGS
async def test_a_stranger_with_the_same_id_is_not_believed(server, log):
    """After a crash the id is given again, and reads `committed`."""
    # The WAL writer writes when it reads this, and not again for ten seconds: the crash is to lose the id.
    await server.apply_settings({"wal_writer_delay": "10s"})
    with FaultProxy(server.host, server.port) as proxy:
        async with opened(server, proxy, commit_log=log, deadline=20.0) as pool:
            ids = []

            async def note(connection):
                await connection.execute("INSERT INTO t VALUES (1)")
                ids.append(await connection.fetchval("SELECT pg_current_xact_id()::text"))
                if len(ids) == 1:
                    proxy.refuse()
                    proxy.lose_next_request(matching=b"COMMIT", server_sees_close=False)

            async with server.admin() as admin:
                await admin.execute("CHECKPOINT")
            running = asyncio.create_task(pool.run_in_transaction(note))
            await until_fired(proxy)
            await server.restart("immediate")
            async with server.admin() as stranger:
                while int(await stranger.fetchval("SELECT pg_current_xact_id()::text")) < int(ids[0]):
                    pass
                assert await stranger.fetchval("SELECT pg_xact_status($1::text::xid8)", ids[0]) == "committed"
            proxy.accept()
            if log is None:
                with pytest.raises(OutcomeUnknownError) as caught:
                    await running
                assert caught.value.xid == int(ids[0])
                assert await count(server) == 0
            else:
                await running
                assert await count(server) == 1


@LOGS
@pytest.mark.parametrize("replicated", [True, False])
async def test_an_asynchronous_standby_promoted_in_between(server, log, replicated):
    """What had not reached it is gone there, and only the log knows which."""
    async with await server.standby("follower") as standby:
        with FaultProxy(server.host, server.port) as proxy:
            async with opened(server, proxy, commit_log=log, deadline=20.0) as pool:
                await pool.run_in_transaction(insert, "t")
                async with server.admin() as admin:
                    position = await admin.fetchval("SELECT pg_current_wal_flush_lsn()::text")
                async with standby.admin() as follower:
                    await caught_up(follower, position)
                    if not replicated:
                        await follower.execute("ALTER SYSTEM SET primary_conninfo = ''")
                        await follower.execute("SELECT pg_reload_conf()")
                        while await follower.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                            await asyncio.sleep(0.01)
                proxy.swallow_next_answer(matching=b"COMMIT")
                running = asyncio.create_task(pool.run_in_transaction(insert, "t", cut_off(proxy)))
                await until_fired(proxy)
                if replicated:
                    async with server.admin() as admin:
                        position = await admin.fetchval("SELECT pg_current_wal_flush_lsn()::text")
                    async with standby.admin() as follower:
                        await caught_up(follower, position)
                proxy.retarget(standby.host, standby.port)
                proxy.accept()
                await standby.promote()
                if log is None:
                    with pytest.raises(OutcomeUnknownError):
                        await running
                    assert await count(standby) == 1 + replicated
                else:
                    await running
                    assert await count(standby) == 2


async def caught_up(follower, position):
    await eventually(lambda: follower.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", position))


async def test_the_statistics_begun_anew_while_the_commit_runs(postgres, proxy, table):
    """It looks like another epoch, but the token is waited for as long as the transaction holds it."""
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE FUNCTION slow_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;"
            f"CREATE CONSTRAINT TRIGGER s AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow_{table}()"
        )
    async with opened(postgres, proxy, commit_log="public.commits") as pool:
        running = asyncio.create_task(pool.run_in_transaction(insert, table))
        async with postgres.admin() as admin:
            await eventually(
                lambda: admin.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'PgSleep'"
                )
            )
            await admin.execute("SELECT pg_stat_reset_shared('bgwriter')")
        proxy.rst(server_sees_close=False)
        await running
        assert pool.answers() == ["committed"]
    assert await count(postgres, table) == 1
    async with postgres.admin() as admin:
        await admin.execute(f"DROP FUNCTION slow_{table} CASCADE")


async def test_a_role_that_may_not_ask_gets_the_id(postgres, proxy, table):
    """Without the epoch nobody can tell, so the error says so, and the id is there to be asked for by hand."""
    role = f"r_{table}"[:40]
    await postgres.create_role(role, password="secret")
    async with postgres.admin() as admin:
        await admin.execute(
            f"GRANT INSERT ON {table} TO {role}; REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
        )
    try:
        async with ResilientPool(proxy.dsn(postgres.dsn(user=role, password="secret")), deadline=5.0) as pool:
            proxy.swallow_next_answer(matching=b"COMMIT")
            with pytest.raises(OutcomeUnknownError) as caught:
                await pool.run_in_transaction(insert, table)
            async with postgres.admin() as admin:
                assert (
                    await admin.fetchval("SELECT pg_xact_status($1::text::xid8)", str(caught.value.xid)) == "committed"
                )
    finally:
        async with postgres.admin() as admin:
            await admin.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
            await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_nobody_is_asked_who_did_not_want_to_be(postgres, proxy, table):
    """Then the outcome is unknown at once."""
    async with opened(postgres, proxy) as pool:
        proxy.swallow_next_answer(matching=b"COMMIT")
        with pytest.raises(OutcomeUnknownError):
            await pool.run_in_transaction(insert, table, resolve_commit=False)
        assert pool.answers() == []
        proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(nothing, readonly=True)


@pytest.mark.parametrize("method", ["execute", "fetch", "fetchrow", "fetchval"])
async def test_exactly_once(postgres, proxy, table, method):
    """The statement is applied once, whether its COMMIT arrived or not."""
    async with opened(postgres, proxy) as pool:
        proxy.swallow_next_answer(matching=b"COMMIT")
        await getattr(pool, method)(f"INSERT INTO {table} VALUES ($1) RETURNING id", 1, exactly_once=True)
        proxy.lose_next_request(matching=b"COMMIT")
        await getattr(pool, method)(f"INSERT INTO {table} VALUES ($1) RETURNING id", 2, exactly_once=True)
        assert pool.answers() == ["committed", "aborted"]
    assert await count(postgres, table) == 2


async def test_pools_that_make_the_log_at_the_same_moment_do_not_mind(postgres, table):
    """IF NOT EXISTS alone would let one of them fail."""
    log = f"public.log_{table}"[:60]
    pools = [ResilientPool(postgres.dsn(), commit_log=log) for _ in range(8)]
    try:
        await asyncio.gather(*pools)
        await asyncio.gather(*(pool.fetch("SELECT 1") for pool in pools))  # so that they come to it all at once
        await asyncio.gather(*(pool.run_in_transaction(insert, table) for pool in pools))
        async with postgres.admin() as admin:
            assert await admin.fetchval(f"SELECT count(*) FROM {log} WHERE NOT fenced") == 8
    finally:
        await asyncio.gather(*(pool.close() for pool in pools))
    async with postgres.admin() as admin:
        await admin.execute(f"DROP TABLE {log}")


async def test_only_writers_leave_a_row_and_old_rows_are_pruned(postgres, proxy, table):
    """A question that writes nothing itself when nothing was written."""
    log = f"public.log_{table}"[:60]
    async with opened(postgres, proxy, commit_log=log) as pool:
        async with postgres.admin() as admin:
            await admin.execute(f"INSERT INTO {log} VALUES (gen_random_uuid(), now() - interval '2 days')")
            await pool.run_in_transaction(lambda connection: connection.fetch("SELECT random()"))
            assert await admin.fetchval(f"SELECT count(*) FROM {log}") == 1
            await pool.run_in_transaction(insert, table)
            await eventually(lambda: admin.fetchval(f"SELECT count(*) = 1 FROM {log}"))
            assert await admin.fetchval(f"SELECT now() - written_at < interval '1 hour' FROM {log}")
            await admin.execute(f"DROP TABLE {log}")


async def test_a_notification_alone_is_something_to_resolve(postgres, proxy):
    """It gets an id only for being asked, and it is sent once."""
    channel = f"c_{uuid.uuid4().hex}"
    heard = []
    async with postgres.admin() as listener, opened(postgres, proxy) as pool:
        await listener.add_listener(channel, lambda *told: heard.append(told[-1]))
        proxy.lose_next_request(matching=b"COMMIT")
        await pool.run_in_transaction(lambda connection: connection.execute(f"NOTIFY {channel}, 'one'"))
        proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(lambda connection: connection.execute("SELECT pg_notify($1, 'two')", channel))
        assert pool.answers() == ["aborted", "committed"]
        await listener.execute(f"NOTIFY {channel}, 'last'")
        await eventually(lambda: answered("last" in heard))
        assert heard == ["one", "two", "last"]


async def answered(value):
    return value


@pytest.mark.parametrize(
    ("options", "attempts"),
    [
        ({}, 2),
        ({"isolation": "repeatable_read"}, 2),
        ({"isolation": "serializable"}, 2),
        ({"isolation": "repeatable_read", "readonly": True}, 1),
        ({"isolation": "serializable", "readonly": True}, 2),
        ({"readonly": True}, 1),
        ({"readonly": True, "resolve_commit": False}, 1),
    ],
    ids=str,
)
async def test_reads_whose_commit_was_lost_are_run_again_read_only_or_are_done(postgres, proxy, options, attempts):
    """What was declared read-only is done, unless it was serializable: COMMIT can still refuse then what was read."""
    modes = []

    async def read(connection):
        modes.append(await connection.fetchval("SHOW transaction_read_only"))

    async with opened(postgres, proxy) as pool:
        proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(read, **options)
        assert pool.answers() == []
        assert modes == (["on"] if options.get("readonly") else ["off"]) * 1 + ["on"] * (attempts - 1)
        assert pool.stats().retries_total == attempts - 1


@pytest.mark.parametrize("sqlstate", ["40003", "08007"])
async def test_a_server_that_does_not_know_itself_is_asked_again(postgres, proxy, table, sqlstate):
    """An answer to COMMIT that says "unknown" is no refusal."""
    async with postgres.admin() as admin:
        await admin.execute(
            f"CREATE SEQUENCE s_{table};"
            f"CREATE FUNCTION f_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF nextval('s_{table}') = 1 THEN RAISE EXCEPTION 'who knows' USING ERRCODE = '{sqlstate}'; END IF; RETURN NULL; END $$;"
            f"CREATE CONSTRAINT TRIGGER t AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f_{table}()"
        )
    async with opened(postgres, proxy) as pool:
        await pool.run_in_transaction(insert, table)
        assert pool.answers() == ["aborted"]
    assert await count(postgres, table) == 1
    async with postgres.admin() as admin:
        await admin.execute(f"DROP FUNCTION f_{table} CASCADE; DROP SEQUENCE s_{table}")


async def test_a_log_that_somebody_dropped_is_made_again(postgres, proxy, table):
    """The transaction that finds it missing is run again and succeeds: it would have done so without the log."""
    log = f"public.log_{table}"[:60]
    async with opened(postgres, proxy, commit_log=log) as pool:
        async with postgres.admin() as admin:
            await admin.execute(f"DROP TABLE {log}")
        await pool.run_in_transaction(insert, table)
        await pool.run_in_transaction(insert, table)
    async with postgres.admin() as admin:
        assert await admin.fetchval(f"SELECT count(*) FROM {log}") == 2
        await admin.execute(f"DROP TABLE {log}")
    assert await count(postgres, table) == 2


async def test_a_transaction_that_used_all_its_time_is_still_asked_about(postgres, proxy, table):
    """What is unknown stays unknown for ever, so the question may outlast the deadline."""
    async with opened(postgres, proxy) as pool:

        async def wait():
            await asyncio.sleep(0.05)

        proxy.swallow_next_answer(matching=b"COMMIT")
        await pool.run_in_transaction(insert, table, wait, deadline=0.04)
        assert pool.answers() == ["committed"]
    assert await count(postgres, table) == 1


async def test_where_the_epoch_may_not_be_asked_any_more_the_log_is(server):
    """Somebody took the right away in between, or another server never gave it."""
    await server.create_role("clerk", password="secret")
    async with server.admin() as admin:
        await admin.execute("GRANT ALL ON t TO clerk; GRANT ALL ON SCHEMA public TO clerk")
        with FaultProxy(server.host, server.port) as proxy:
            arguments = {"user": "clerk", "password": "secret", "commit_log": "public.commits"}
            async with opened(server, proxy, **arguments) as pool:
                proxy.swallow_next_answer(matching=b"COMMIT")
                running = asyncio.create_task(pool.run_in_transaction(insert, "t", cut_off(proxy)))
                await until_fired(proxy)
                await admin.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
                proxy.accept()
                await running
                assert pool.answers() == ["committed"]
    assert await count(server) == 1
