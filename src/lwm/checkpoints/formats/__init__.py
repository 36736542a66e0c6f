"""Read and write one checkpoint format per file."""
