"""Compute exact attention: over whole sequences, over sharded ones, and over a key-value cache."""
