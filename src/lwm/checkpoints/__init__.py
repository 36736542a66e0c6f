"""Read and write models in every format, one tensor at a time."""
