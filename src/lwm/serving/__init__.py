"""Serve a model to many clients: an API in OpenAI's shape."""
