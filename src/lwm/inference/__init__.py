"""Inference: sampling, scheduling, the engine over token ids, and the model object a user
holds."""
