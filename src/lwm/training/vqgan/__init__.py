"""Train a VQGAN with the same loop as the language model."""
