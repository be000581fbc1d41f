"""What moves: connections, slots, waiting and retrying."""
