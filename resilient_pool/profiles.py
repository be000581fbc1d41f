"""Ready-made constructor arguments: `ResilientPool(dsn, **profiles.AURORA_SERVERLESS)`.

To change some of a profile, or to have two, merge them: `ResilientPool(dsn, **(profiles.LAMBDA | {"max_size": 2}))`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import cast

from resilient_pool.config.arguments import PoolArguments

AURORA_SERVERLESS = cast(
    "PoolArguments",
    MappingProxyType(
        {
            "may_pause": True,
            "min_size": 0,
            "max_inactive_connection_lifetime": 50.0,
            "timeout": 30.0,
            "deadline": 60.0,
        }
    ),
)
"""For a database that pauses when nobody is connected, such as Aurora Serverless v2 with a minimum capacity of zero.

It keeps nothing open when idle, gives up connections before the server drops them after 60 s, lets an attempt to connect
hang for as long as a resume takes (15 s, 30 s and more after a day of sleep), and waits for a minute in all.
"""

LAMBDA = cast(
    "PoolArguments",
    MappingProxyType(
        {
            "max_size": 1,
            "min_size": 0,
            "max_inactive_connection_lifetime": 50.0,
            "timeout": 30.0,
        }
    ),
)
"""For a function that serves one request at a time and is frozen in between, such as AWS Lambda.

One connection, which is checked after every thaw. Put `async with pool.invocation(deadline=...)` around each request.
"""
