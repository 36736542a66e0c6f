"""Compute attention in code written for one kind of processor."""
