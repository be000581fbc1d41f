"""The demo as a user runs it: a process of its own, from its first line to its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import resilient_pool
from demo.workload import SCHEMA, WRITE
from resilient_pool.testing import EmbeddedPostgres

WHERE = Path(resilient_pool.__path__[0]).parent
"""The installed package or the sources: whichever the tests are run on."""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIMIT = 60.0
POOLS = ("asyncpg.Pool", "ResilientPool")


async def start(temporary: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Start the demo with its output in a pipe, and with a directory of its own by which its descendants are known."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "demo",
        *arguments,
        cwd=temporary,
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{WHERE}", "TMPDIR": str(temporary)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


def figures(output: str, label: str) -> tuple[float, float]:
    """Read one line of the summary: asyncpg.Pool's figure and ResilientPool's."""
    number = r"\s+([\d.]+)(?: s)?"
    lines = re.findall(rf"^\s*{re.escape(label)}{number}{number}\s*$", output, re.MULTILINE)
    assert len(lines) == 1, f"{label!r} is not one line of\n{output}"
    plain, resilient = lines[0]
    return float(plain), float(resilient)


def states(temporary: Path) -> dict[str, str]:
    """Find every process, servers included, that was given this directory for its temporary files, and its state."""
    mark, found = f"TMPDIR={temporary}".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found[f"{entry.name}: {command}"] = state
    return found


def descendants(temporary: Path) -> list[str]:
    """Name those processes."""
    return list(states(temporary))


def stopped(temporary: Path) -> list[str]:
    """Find the descendants that stand still."""
    return [entry for entry, state in states(temporary).items() if state == "T"]


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for a limited time."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_quick_demo_ends_well_and_says_so_in_its_summary(tmp_path: Path):
    """With a paused database and under every fault only asyncpg.Pool lets failures through."""
    demo = await start(tmp_path, "--quick")
    output = (await asyncio.wait_for(demo.communicate(), LIMIT))[0].decode()

    assert demo.returncode == 0, output
    assert figures(output, "requests") == (100, 100)
    assert figures(output, "answered")[1] == 100
    plain, resilient = figures(output, "failed")
    assert plain > 0
    assert resilient == 0
    plain, resilient = figures(output, "attempts to connect while it resumed")
    assert plain > resilient
    assert figures(output, "connections open now") == (10, 0)
    assert re.search(r"the database is now +awake +paused *$", output, re.MULTILINE)
    assert re.search(r"paused again after the last answer +not in [\d.]+ s +after [\d.]+ s *$", output, re.MULTILINE)
    plain, resilient = figures(output, "operations")
    assert plain > 100
    assert resilient > 100
    plain, resilient = figures(output, "failures the application saw")
    assert plain > 0
    assert resilient == 0
    assert figures(output, "lost: reported done, absent")[1] == 0
    assert figures(output, "duplicated: present twice")[1] == 0
    assert figures(output, "reported failed, but present")[1] == 0
    assert figures(output, "slowest answer")[1] < 10
    assert "\x1b" not in output
    await wait_until(lambda: not descendants(tmp_path))


@pytest.mark.parametrize(
    ("send", "number", "status"),
    [
        pytest.param(os.killpg, signal.SIGINT, 130, id="ctrl-c, which reaches the whole group"),
        pytest.param(os.kill, signal.SIGTERM, 130, id="terminated"),
        pytest.param(os.kill, signal.SIGKILL, -signal.SIGKILL, id="killed"),
    ],
)
async def test_a_demo_cut_short_leaves_no_process_behind(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals, status: int
):
    """Ended while its applications are frozen, the worst moment, it takes them and the server with it."""
    demo = await start(tmp_path, "--quick", "--resume-seconds", "0.5")
    seen = b""
    while b"freeze:" not in seen:
        line = await asyncio.wait_for(demo.stdout.readline(), LIMIT)
        assert line, seen.decode()
        seen += line
    await wait_until(lambda: len(stopped(tmp_path)) == len(POOLS))
    assert any("postgres" in name for name in descendants(tmp_path)), "the search for descendants finds no server"
    send(demo.pid, number)
    output = (seen + (await asyncio.wait_for(demo.communicate(), LIMIT))[0]).decode()

    assert demo.returncode == status, output
    await wait_until(lambda: not descendants(tmp_path))


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--seconds", "2", "--seconds must be between 9 and 24, not 2"),
        ("--resume-seconds", "0", "--resume-seconds must be between 0.5 and 45, not 0"),
    ],
)
async def test_a_wrong_time_is_refused_before_anything_starts(tmp_path: Path, option: str, value: str, complaint: str):
    """The message names the option, its bounds and the value."""
    demo = await start(tmp_path, option, value)
    output = (await asyncio.wait_for(demo.communicate(), LIMIT))[0].decode()

    assert demo.returncode == 2
    assert complaint in output


async def test_the_demos_repeatable_write_is_applied_once_even_when_two_of_it_overlap():
    """A retry may overtake the attempt that a broken connection left running on the server."""
    async with EmbeddedPostgres() as server, server.admin() as first, server.admin() as second:
        await first.execute(SCHEMA)
        transaction = first.transaction()
        await transaction.start()
        await first.execute(WRITE, 1, "first")
        overtaken = asyncio.create_task(second.execute(WRITE, 1, "second"))
        await asyncio.wait({overtaken}, timeout=0.3)
        await transaction.commit()
        await overtaken
        assert await first.fetchval("SELECT count(*) FROM entry WHERE id = 1") == 1
