"""How a connection is had: opened, checked, handed out, reset, closed."""
