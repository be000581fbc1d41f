"""What a statement's text says. Pure: no I/O."""
