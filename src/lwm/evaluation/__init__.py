"""Measure a model: long-context tasks, perplexity, and reports."""
