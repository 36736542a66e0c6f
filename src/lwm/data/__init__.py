"""Turn records into rows of tokens for training."""
