"""Starts one command, and ends it when its own parent asks for that or dies.

It is run as `python supervisor.py SECONDS`. The first line of its standard input is the command as JSON, since arguments
are visible to other users. At the end of its input, because the parent has closed its end of the pipe or died, it
interrupts the command's whole process group as Ctrl-C does, terminates it after SECONDS, and then kills it. Its exit
status is the command's, or 128 and the number of the signal that ended it. It imports the standard library only, so
that it starts fast.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

_TERMINATE_SECONDS = 3.0
_POLL = 0.02
_NOT_RUN = 127


def main() -> int:
    """Run the command and return the exit status."""
    seconds = float(sys.argv[1])
    # Functions, unlike SIG_IGN, are not handed down to the command.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    command = _read_request()
    if command is None:
        return _NOT_RUN
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)  # noqa: S603 - that is its task
    except OSError as error:
        sys.stderr.write(f"cannot run {os.fsdecode(command[0])!r}: {error.strerror}\n")
        return _NOT_RUN
    ending = threading.Lock()
    threading.Thread(target=_watch_parent, args=(process.pid, seconds, ending), daemon=True).start()
    status = process.wait()
    with ending:  # nothing that the command has started outlives it
        _stop_group(process.pid, 0.0)
    return status if status >= 0 else 128 - status


def _read_request() -> list[bytes] | None:
    """Read what to run and set its environment; `None` at end of file before that."""
    received = b""
    while not received.endswith(b"\n"):
        more = os.read(sys.stdin.fileno(), 65536)
        if not more:
            return None
        received += more
    request = json.loads(received)
    for name, value in request["environment"].items():
        os.environb[name.encode("latin-1")] = value.encode("latin-1")
    return [word.encode("latin-1") for word in request["command"]]


def _watch_parent(group: int, seconds: float, ending: threading.Lock) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    with ending:
        _stop_group(group, seconds)


def _stop_group(group: int, seconds: float) -> None:
    steps = ((signal.SIGINT, seconds),) if seconds else ()
    for number, patience in (*steps, (signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, _TERMINATE_SECONDS)):
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
