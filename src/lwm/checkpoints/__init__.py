"""Checkpoints: reading and writing models in every format, one tensor at a time."""
