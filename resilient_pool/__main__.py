"""`python -m resilient_pool` is the command `resilient-pool`."""

from __future__ import annotations

import sys

from resilient_pool.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
