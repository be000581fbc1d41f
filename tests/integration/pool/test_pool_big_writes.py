"""What sends much ends with its connection and with its caller, also while the driver waits until it may write."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from resilient_pool import OutcomeUnknownError
from resilient_pool.testing import FaultProxy
from resilient_pool.testing.tls import TlsCertificates

both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

ROW = ("y" * 100_000,)
MANY = [ROW] * 300
INSERT = "INSERT INTO heap VALUES ($1)"


async def records():
    for row in MANY:
        yield row


async def chunks():
    for (text,) in MANY:
        yield f"{text}\n".encode()


async def sent_by_a_prepared_statement(connection):
    statement = await connection.prepare(INSERT)
    await statement.executemany(MANY)


WAYS = {
    "executemany": lambda pool, _: pool.executemany(INSERT, MANY),
    "fetchmany": lambda pool, _: pool.fetchmany(f"{INSERT} RETURNING 1", MANY),
    "records": lambda pool, _: pool.copy_records_to_table("heap", records=MANY),
    "records of a generator": lambda pool, _: pool.copy_records_to_table("heap", records=records()),
    "chunks of a generator": lambda pool, _: pool.copy_to_table("heap", source=chunks()),
    "a file": lambda pool, path: pool.copy_to_table("heap", source=path),
}


@pytest.fixture(params=["plain", "tls"])
def way_in(request, postgres):
    certificates = TlsCertificates() if request.param == "tls" else None
    with FaultProxy(postgres.host, postgres.port, tls=certificates) as proxy:
        yield proxy, (certificates.client_context() if certificates else False)


@pytest.fixture
async def pool(make_pool, way_in, dsn, bystander):
    await bystander.execute("CREATE TABLE IF NOT EXISTS heap (x text)")
    proxy, ssl = way_in
    async with make_pool(proxy.dsn(dsn), ssl=ssl, max_size=2) as pool:
        await pool.fetchval("SELECT 1")
        yield pool
        async with asyncio.timeout(5):
            await pool.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("heap") / "heap.txt"
    path.write_text(f"{ROW[0]}\n" * len(MANY))
    return path


async def stuck(work, pool, proxy, eventually) -> asyncio.Task[None]:
    """Begin to send, until nothing gets through and the driver waits until it may write again."""
    before = proxy.bytes_to_server
    # Slowly, so that it is far from its end; and the kernel's buffers stay small, which grow for a fast reader.
    proxy.delay(0.01)
    task = asyncio.ensure_future(work)
    await eventually(lambda: proxy.bytes_to_server > before + 1_000_000)
    await asyncio.to_thread(proxy.blackhole)
    proxy.delay(0)
    seen = [0]

    def is_full() -> bool:
        sizes = [link.connection._transport.get_write_buffer_size() for link in pool._maintenance.connections()]
        seen.append(max(sizes))
        return seen[-1] > 65_536 and seen[-20:] == [seen[-1]] * 20

    await eventually(is_full)
    assert not task.done()
    return task


@both_loops
@pytest.mark.parametrize("way", WAYS)
async def test_a_loss_in_the_middle_of_it_is_told(pool, way_in, way, path, eventually):
    """Nobody waits for ever, on any loop."""
    proxy, _ = way_in
    task = await stuck(WAYS[way](pool, path), pool, proxy, eventually)
    await asyncio.to_thread(proxy.rst)
    async with asyncio.timeout(5):
        with pytest.raises(OutcomeUnknownError) as caught:
            await task
    assert isinstance(caught.value.__cause__, asyncpg.ConnectionDoesNotExistError)
    await asyncio.to_thread(proxy.restore)
    assert await pool.fetchval("SELECT 1") == 1


@both_loops
@pytest.mark.parametrize("way", WAYS)
async def test_a_cancellation_in_the_middle_of_it_arrives(pool, way_in, way, path, eventually):
    """As what it is, and in time, though the connection takes nothing any more."""
    proxy, _ = way_in
    task = await stuck(WAYS[way](pool, path), pool, proxy, eventually)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(proxy.restore)
    assert await pool.fetchval("SELECT 1") == 1


@both_loops
async def test_a_time_out_around_it_is_a_time_out(pool, way_in, eventually):
    """`asyncio.timeout` knows its own cancellation, also of what waits on a lost connection."""
    proxy, _ = way_in
    done = []

    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                done.append(limit)
                await pool.executemany(INSERT, MANY)

    task = await stuck(work(), pool, proxy, eventually)
    done[0].reschedule(asyncio.get_running_loop().time())
    async with asyncio.timeout(5):
        await task
    await asyncio.to_thread(proxy.restore)


@both_loops
async def test_a_prepared_statement_that_sends_much_ends_with_its_connection(pool, way_in, eventually):
    """Though it is the driver's own."""
    proxy, _ = way_in
    async with pool.acquire() as connection:
        task = await stuck(sent_by_a_prepared_statement(connection), pool, proxy, eventually)
        await asyncio.to_thread(proxy.rst)
        async with asyncio.timeout(5):
            with pytest.raises(asyncpg.ConnectionDoesNotExistError):
                await task
    await asyncio.to_thread(proxy.restore)


@both_loops
async def test_a_source_that_waits_for_its_next_piece_does_not_hide_a_loss(pool, way_in, eventually):
    """What comes of it has nowhere to go."""
    proxy, _ = way_in
    closed = asyncio.Event()

    async def source():
        try:
            yield b"one\n"
            await asyncio.Event().wait()
        finally:
            closed.set()

    before = proxy.bytes_to_server
    task = asyncio.ensure_future(pool.copy_to_table("heap", source=source()))
    await eventually(lambda: proxy.bytes_to_server > before + 20)
    await asyncio.to_thread(proxy.rst)
    async with asyncio.timeout(5):
        with pytest.raises(OutcomeUnknownError):
            await task
        await closed.wait()


async def test_an_error_of_the_source_is_raised_as_it_is(pool):
    """It is the application's own, and the connection is as good as before."""

    async def source():
        yield b"one\n"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await pool.copy_to_table("heap", source=source())
    assert await pool.fetchval("SELECT 1") == 1


async def test_what_is_cancelled_in_peace_leaves_its_connection(pool, way_in, eventually):
    """The server is asked to give up, and it does."""
    proxy, _ = way_in

    async def source():
        yield b"one\n"
        await asyncio.Event().wait()

    before = proxy.bytes_to_server
    task = asyncio.ensure_future(pool.copy_to_table("heap", source=source()))
    await eventually(lambda: proxy.bytes_to_server > before + 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await pool.fetchval("SELECT 1") == 1
    await eventually(lambda: not pool.stats().resetting)
    assert pool.stats().discarded == {}
