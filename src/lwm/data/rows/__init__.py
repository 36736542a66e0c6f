"""Draw examples, pack them into rows, and run this as a pipeline."""
