"""Integrations, one file for each framework. Each imports its framework only inside itself, and nothing imports them."""
