"""Data: tokenizers, chat templates, documents."""
