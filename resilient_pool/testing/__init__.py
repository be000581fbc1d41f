"""Tools for testing programs against a PostgreSQL that misbehaves on command; needs the extra `testing`."""

from __future__ import annotations

from resilient_pool.testing._event_log import Attempt, LogEntry
from resilient_pool.testing.clock import ScriptedClock, ScriptedTimer
from resilient_pool.testing.pausing import PausingServer
from resilient_pool.testing.postgres import ConnectArguments, EmbeddedPostgres
from resilient_pool.testing.proxy import FaultProxy, ProxiedConnection
from resilient_pool.testing.scripted import End, Point, Refusal, ScriptedServer
from resilient_pool.testing.tls import TlsCertificates

__all__ = [
    "Attempt",
    "ConnectArguments",
    "EmbeddedPostgres",
    "End",
    "FaultProxy",
    "LogEntry",
    "PausingServer",
    "Point",
    "ProxiedConnection",
    "Refusal",
    "ScriptedClock",
    "ScriptedServer",
    "ScriptedTimer",
    "TlsCertificates",
]
