"""Import the studies of another store."""
