"""A primary is lost, demoted or moved under load: what callers were told is what the new primary holds."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import uuid
from pathlib import Path

import asyncpg
import pytest
from server_pair import Pair
from under_load import Load

from resilient_pool import OutcomeUnknownError, ResilientPool
from resilient_pool.testing import EmbeddedPostgres, FaultProxy

LOG = "public.commits"


def say(load: Load, what: str) -> None:
    """Print the figures of a ledger, for those who run this with `--capture=no`."""
    sys.stdout.write(
        f"\n{what}: {load.reads} reads, {len(load.done)} writes acknowledged, {len(load.unknown)} of unknown outcome, "
        f"{len(load.errors)} errors; first write {load.recovered or 0:.2f} s after the beginning of the outage\n"
    )


@pytest.mark.parametrize(
    ("target", "commit_log"),
    [(None, None), (None, LOG), ("primary", None), ("read-write", LOG)],
    ids=["no target, no log", "no target, a log", "primary, no log", "read-write, a log"],
)
async def test_a_standby_is_promoted_under_load(pair: Pair, target, commit_log):
    """Nothing acknowledged is absent, nothing is there twice; with a log no transaction's outcome stays unknown."""
    await pair.commit_on_both()
    where = {"target_session_attrs": target, "commit_log": commit_log}
    async with ResilientPool(pair.dsn(), max_size=8, deadline=40, ssl=False, **where) as pool, Load(pool) as load:
        await pair.fail_over(load.outage)
        await load.progress(60)
    say(load, f"promotion, target_session_attrs={target}, commit_log={commit_log}")
    await load.assert_ledger_holds(pair.primary)
    if commit_log:
        assert set(load.unknown.values()) <= {"one_shot"}
    assert load.recovered is not None
    assert load.recovered < 15


@pytest.mark.parametrize("target", ["primary", "read-write"])
async def test_primary_and_standby_change_their_roles_in_place_under_load(pair: Pair, target):
    """What was the primary refuses writes at its old address: they are made at the other one, and none is lost."""
    async with (
        ResilientPool(pair.dsn(), max_size=8, deadline=40, ssl=False, target_session_attrs=target) as pool,
        Load(pool) as load,
    ):
        for _ in range(2):
            await pair.switch_over(load.outage)
            await load.progress(60)
    say(load, f"roles changed twice, target_session_attrs={target}")
    await load.assert_ledger_holds(pair.primary)
    assert load.recovered is not None


async def test_a_transaction_that_began_on_a_standby_is_repeated_after_its_promotion(pair: Pair):
    """It stays read-only to its end, on a server that says it is no standby: that is no word of the application's."""
    async with ResilientPool(pair.standby.dsn(), max_size=1, deadline=20, ssl=False) as pool:
        runs = []

        async def block(connection):
            runs.append(await connection.fetchval("SELECT pg_is_in_recovery()"))
            if len(runs) == 1:
                await pair.fail_over()
            await connection.execute("INSERT INTO item VALUES (1)")

        await pool.run_in_transaction(block)
        assert runs == [True, False]
        assert await pool.fetchval("SELECT count(*) FROM item") == 1


async def test_without_a_target_the_first_host_that_answers_is_used_also_when_it_is_a_standby_now(pair: Pair):
    """As in libpq: a write waits for it to become a primary again, and then fails with the server's own error and advice."""
    async with ResilientPool(pair.dsn(), max_size=2, deadline=3, ssl=False) as pool:
        await pool.execute("INSERT INTO item VALUES (1)")
        await pair.switch_over()
        assert await pool.fetchval("SELECT count(*) FROM item") == 1
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError) as failed:
            await pool.execute("INSERT INTO item VALUES (2)")
        assert any('target_session_attrs="primary"' in note for note in failed.value.__notes__)


async def test_a_demotion_that_ends_no_connection_is_noticed_by_the_first_write(pair: Pair):
    """A proxy keeps the client's connections while the server behind becomes a standby, as some services' endpoints do."""
    with FaultProxy(pair.primary.host, pair.primary.port) as proxy:
        async with ResilientPool(proxy.dsn(pair.primary.dsn()), max_size=4, deadline=40, ssl=False) as pool:
            async with Load(pool) as load:
                await pair.switch_over(load.outage)
                await asyncio.sleep(0.5)  # what is behind the endpoint is a standby, for a while
                proxy.retarget(pair.primary.host, pair.primary.port)
                proxy.rst()
                await load.progress(60)
    say(load, "demotion behind one endpoint")
    await load.assert_ledger_holds(pair.primary)


async def test_a_standby_that_lags_does_not_say_what_became_of_a_commit(pair: Pair):
    """It has not heard of the transaction: that is no word for its absence. The primary is asked when it is back."""
    with FaultProxy(pair.primary.host, pair.primary.port) as proxy:
        dsn = pair.dsn(ports=(proxy.port, pair.standby.port))
        async with ResilientPool(dsn, max_size=1, deadline=20, ssl=False) as pool:
            await pool.execute("INSERT INTO item VALUES (0)")
            async with pair.standby.admin() as follower:
                await follower.execute("SELECT pg_wal_replay_pause()")
            runs = []

            async def block(connection):
                runs.append(1)
                await connection.execute("INSERT INTO item VALUES (1)")
                proxy.swallow_next_answer("rst", matching="COMMIT")
                proxy.refuse()

            running = asyncio.create_task(pool.run_in_transaction(block))
            async with asyncio.timeout(15):
                while not proxy.fired:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(1.0)
            assert not running.done()
            proxy.accept()
            await running
    async with pair.primary.admin() as admin:
        assert (len(runs), await admin.fetchval("SELECT count(*) FROM item WHERE id = 1")) == (1, 1)


@contextlib.asynccontextmanager
async def forwarder(address: str, port: int, target: int):
    """Pass connections to `address:port` on to the port `target` of 127.0.0.1."""
    tasks = set()

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        with contextlib.suppress(OSError):
            inner, outer = await asyncio.open_connection("127.0.0.1", target)
            await asyncio.gather(copy(reader, outer), copy(inner, writer))

    server = await asyncio.start_server(serve, address, port)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_name_that_moves_to_the_new_primary_is_followed(pair: Pair, monkeypatch):
    """It is resolved anew for each attempt: the old address is dead, or a standby."""
    names = {"db.test": "127.0.0.1"}
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def getaddrinfo(host, *arguments, **keywords):
        return await resolve(names.get(host, host), *arguments, **keywords)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    await pair.commit_on_both()
    old, new = pair.primary, pair.standby
    async with forwarder("127.0.0.2", old.port, new.port):
        dsn = f"postgresql://postgres@db.test:{old.port}/postgres"
        async with ResilientPool(dsn, max_size=8, deadline=40, ssl=False) as pool, Load(pool) as load:
            await pair.fail_over(load.outage)
            await asyncio.sleep(0.3)
            names["db.test"] = "127.0.0.2"
            await load.progress(60)
    say(load, "a name that moves")
    await load.assert_ledger_holds(new)
    assert load.recovered is not None
    assert load.recovered < 15


async def test_a_cold_copy_that_takes_the_primarys_place_is_not_believed():
    """It never followed, and gives the lost transaction's id to another one: that this one was committed says nothing."""
    place = Path("/tmp") / f"copy_{uuid.uuid4().hex}"  # the server's own user must reach it
    async with EmbeddedPostgres(18) as server:
        async with server.admin() as admin:
            await admin.execute("CREATE TABLE item (id int)")
        await server.stop("fast")
        try:
            place.mkdir(mode=0o755)
            shutil.copytree(server.data_directory, place / "data")
            await server.start()
            async with EmbeddedPostgres(18, data_directory=place / "data") as copy:
                await _lose_a_commit_to(server, copy)
        finally:
            shutil.rmtree(place, ignore_errors=True)


async def _lose_a_commit_to(server: EmbeddedPostgres, copy: EmbeddedPostgres) -> None:
    with FaultProxy(server.host, server.port) as proxy:
        async with ResilientPool(proxy.dsn(server.dsn()), max_size=1, deadline=20, ssl=False) as pool:
            runs = []

            async def block(connection):
                runs.append(int(await connection.fetchval("SELECT pg_current_xact_id()::text")))
                await connection.execute("INSERT INTO item VALUES (1)")
                proxy.refuse()
                proxy.swallow_next_answer("rst", matching="COMMIT")

            running = asyncio.create_task(pool.run_in_transaction(block))
            async with asyncio.timeout(15):
                while not proxy.fired:
                    await asyncio.sleep(0.01)
            await server.stop("immediate")
            async with copy.admin() as admin:
                while int(await admin.fetchval("SELECT pg_current_xact_id()::text")) < runs[0]:
                    pass
                assert await admin.fetchval("SELECT pg_xact_status($1::text::xid8)", str(runs[0])) == "committed"
            proxy.retarget(copy.host, copy.port)
            proxy.accept()
            with pytest.raises(OutcomeUnknownError):
                await running
            assert len(runs) == 1
