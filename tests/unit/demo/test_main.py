"""The demo's command line: what it makes of a performance."""

from __future__ import annotations

import pytest

from demo.__main__ import main
from demo.results import Answer, Ledger
from demo.scenario import Performance


def perform(monkeypatch: pytest.MonkeyPatch, *, lost: int = 0, attempts: int = 1) -> None:
    """Put a performance on that takes no time, and in which ResilientPool did well but for what is said."""

    async def play(self: Performance, _display: object, _seconds: float, resume_seconds: float) -> None:
        for pool, night in self.nights.items():
            night.add(resume_seconds, None)
            night.attempts, night.asleep_after = attempts, 1.0
            self.scores[pool].add(Answer(kind="write", row=1, began=0.0, ended=1.0), act="nothing")
            self.ledgers[pool] = Ledger(lost=lost, duplicated=0, ghosts=0, unknown_present=0)

    monkeypatch.setattr(Performance, "play", play)


def test_promises_that_were_kept_end_in_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The last line says which."""
    perform(monkeypatch)
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ResilientPool: nothing failed")


@pytest.mark.parametrize("broken", [{"lost": 1}, {"attempts": 1000}])
def test_one_broken_promise_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: dict[str, int]
):
    """By day or by night."""
    perform(monkeypatch, **broken)
    assert main(["--resume-seconds", "15"]) == 1
    assert "ResilientPool did not keep its promises:" in capsys.readouterr().out
