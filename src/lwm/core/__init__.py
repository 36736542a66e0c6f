"""Foundations: errors, configuration, mesh, sharding rules, parameters, progress. Knows no
model."""
