"""Models: weights declared once, and pure functions over them."""
