"""What is decided: pure values and functions, with no I/O, no clock, no chance of their own and no event loop."""
