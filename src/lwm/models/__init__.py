"""Declare the models: their weights, and pure functions over them."""
