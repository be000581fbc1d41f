"""The machine's clock, moved on by a test: for a process that was frozen, or for time that is not waited for."""

from __future__ import annotations

from resilient_pool.clock import SystemClock


class JumpingClock(SystemClock):
    """The machine's, and what a test has added to it; no timer fires for that.

    Attributes:
        frozen: For how many seconds the process was frozen, which the event loop has not counted.
        passed: How many seconds are to have passed besides.
    """

    frozen = 0.0
    passed = 0.0

    def now(self) -> float:
        """Return the time, both included."""
        return super().now() + self.frozen + self.passed

    def monotonic(self) -> float:
        """Return the event loop's kind of time, without the frozen one."""
        return super().monotonic() + self.passed
