"""Read and write one checkpoint format per module; `open.py` says how to add one."""
