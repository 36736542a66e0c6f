"""Define training runs as functions that return complete, typed configurations."""
