"""Attention: masks, rotary positions, and exact attention dense, blockwise, round a ring and over
caches."""
