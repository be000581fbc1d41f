"""What is decided about a failure: verdicts, policies and budgets. Pure: no I/O, no clock."""
