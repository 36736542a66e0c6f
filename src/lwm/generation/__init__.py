"""Generate text, images and videos on top of the engine."""
