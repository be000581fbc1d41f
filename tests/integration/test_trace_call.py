"""The script that lists what one call goes through."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "trace_call.py"


async def test_the_trace_begins_with_the_method_and_ends_where_the_connection_is_put_back(monkeypatch):
    """A warm call meets five files; one that was lost meets the classifier, and begins again in the same function."""
    specification = importlib.util.spec_from_file_location("trace_call", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "trace_call", script)  # its dataclass looks itself up there
    specification.loader.exec_module(script)
    traces = await script.measure()
    warm, *repeated = traces.values()
    assert warm.files[0] == "execution/query_methods.py"
    assert len(warm.files) <= script.WARM_FILES
    assert warm.total <= script.WARM_CALLS
    idle, new = repeated
    assert len(idle.files) <= script.REPEATED_FILES
    assert len(new.files) <= script.REPEATED_FILES + script.CONNECTING_FILES
    for trace in repeated:
        assert "retry/classifier.py" in trace.files
        assert str(trace).startswith("  execution/query_methods.py: 1\n    Queries.fetch\n  pool.py: 1\n")
