"""Evaluation: long-context retrieval, suites, perplexity, and their pictures and reports."""
