"""Compute exact attention: dense, blockwise, around a ring of devices, and over caches."""
