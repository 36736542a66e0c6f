"""Learning: loss, optimizer, step and loop. Knows weights and batches of token ids; knows no text,
no recipe and no command line."""
