"""Sources: where examples come from, each a sequence that any place can be read from."""
