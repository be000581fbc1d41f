"""Counters, logs, and who is handed events."""
