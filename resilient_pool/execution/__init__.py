"""How a statement is run: attempts, retries, transactions, and what became of a lost COMMIT."""
