"""The demo's command line: the exit status that follows from the results."""

from __future__ import annotations

import pytest

from demo.__main__ import main
from demo.ledger import audit
from demo.results import Answer
from demo.scenario import Scenario


def replace_run(monkeypatch: pytest.MonkeyPatch, *, lost: bool = False, attempts: int = 1) -> None:
    """Replace the run of a scenario by one that takes no time; ResilientPool did well except for the arguments."""

    async def run(self: Scenario, _display: object, _seconds: float, resume_seconds: float) -> None:
        for pool, result in self.pause_results.items():
            result.add(resume_seconds, None)
            result.attempts, result.paused_after = attempts, 1.0
            self.scores[pool].add(Answer(kind="write", row=1, began=0.0, ended=1.0), step="nothing")
            self.audits[pool] = audit(self.scores[pool].writes, {} if lost else {1: 1})

    monkeypatch.setattr(Scenario, "run", run)


def test_promises_that_were_kept_end_in_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The last line says which."""
    replace_run(monkeypatch)
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ResilientPool: nothing failed")


@pytest.mark.parametrize("broken", [{"lost": True}, {"attempts": 1000}])
def test_one_broken_promise_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: dict[str, int]
):
    """Whether of the faults or of the pause."""
    replace_run(monkeypatch, **broken)
    assert main(["--resume-seconds", "15"]) == 1
    assert "ResilientPool did not keep its promises:" in capsys.readouterr().out
