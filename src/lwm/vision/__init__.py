"""What the model sees: images and videos in and out as arrays of pixels. Knows nothing of models,
tokens or text."""
