"""What `run_migration` is made of: the command and its output, the lock, SQL files, and what a failure to connect looks like."""
