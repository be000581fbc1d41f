"""The script that lists what one call goes through."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "trace_call.py"


async def test_the_trace_begins_with_the_method_and_ends_where_the_connection_is_put_back(monkeypatch):
    """A warm call meets no module of the retry policy but the budget; one that was lost meets the classifier."""
    specification = importlib.util.spec_from_file_location("trace_call", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "trace_call", script)  # its dataclass looks itself up there
    specification.loader.exec_module(script)
    traces = await script.measure()
    warm, *repeated = traces.values()
    assert warm.files[0] == "execution/query_methods.py"
    assert {file for file in warm.files if file.startswith("retry/")} <= {"retry/decision.py"}
    for trace in repeated:
        assert "retry/classifier.py" in trace.files
        assert trace.total > warm.total
        assert str(trace).startswith("  execution/query_methods.py: 3\n    Queries.fetch")
