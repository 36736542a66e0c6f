"""Runs by name: each recipe is a function that returns one complete, typed configuration."""
