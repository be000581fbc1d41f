"""Migrations that wait for the database and run one at a time."""
