"""What is told: events, counters and logs, none of which ever holds a secret."""
