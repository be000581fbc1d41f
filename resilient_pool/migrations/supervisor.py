"""The only program that runs beside this package's own process: it starts one command, and ends it when it is told to or left alone.

It is run as `python supervisor.py SECONDS`. The first line of its standard input says in JSON what to run, since arguments
can be read by others. Nothing comes after it: when the input ends, because the process at the other end closed it or died,
however suddenly, the command's whole process group is interrupted as by Ctrl-C; after SECONDS it is terminated, and then killed. It ends as the command did, with 128 and the signal's number for one
that a signal ended. It uses the standard library only, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

_TO_TERMINATE = 3.0
_POLL = 0.02
_NOT_RUN = 127


def main() -> int:
    """Run the command and return the exit status."""
    seconds = float(sys.argv[1])
    # Functions, unlike SIG_IGN, are not handed down to the command.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    command = _told()
    if command is None:
        return _NOT_RUN
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)  # noqa: S603 - that is its task
    except OSError as error:
        sys.stderr.write(f"cannot run {os.fsdecode(command[0])!r}: {error.strerror}\n")
        return _NOT_RUN
    ending = threading.Lock()
    threading.Thread(target=_when_left_alone, args=(process.pid, seconds, ending), daemon=True).start()
    status = process.wait()
    with ending:  # nothing that the command has started outlives it
        _end(process.pid, 0.0)
    return status if status >= 0 else 128 - status


def _told() -> list[bytes] | None:
    """Read what to run and set its environment; `None` if we were left alone before that was said."""
    said = b""
    while not said.endswith(b"\n"):
        more = os.read(sys.stdin.fileno(), 65536)
        if not more:
            return None
        said += more
    request = json.loads(said)
    for name, value in request["environment"].items():
        os.environb[name.encode("latin-1")] = value.encode("latin-1")
    return [word.encode("latin-1") for word in request["command"]]


def _when_left_alone(group: int, seconds: float, ending: threading.Lock) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    with ending:
        _end(group, seconds)


def _end(group: int, seconds: float) -> None:
    steps = ((signal.SIGINT, seconds),) if seconds else ()
    for number, patience in (*steps, (signal.SIGTERM, _TO_TERMINATE), (signal.SIGKILL, _TO_TERMINATE)):
        if not _signal(group, number):
            return
        until = time.monotonic() + patience
        while time.monotonic() < until and _signal(group, 0):
            time.sleep(_POLL)


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group, and say whether any process was there to get it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
