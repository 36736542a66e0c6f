"""Run a model on token ids: sample, schedule requests, draft, and score."""
