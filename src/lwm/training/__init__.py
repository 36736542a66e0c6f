"""Train a model: loss, optimizer, step, loop, metrics and training checkpoints."""
